"""Faulty scripts for the tests of the auditor, and its workers without processes of their own.

A faulty script is a file: it runs the real script's source and then puts other functions in the
place of some. Faults name no more of the script than the auditor does, but for SmearGate.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import audit_worker
from conftest import ROOT
from runs import environment_with
from tiny_record import ARTIFACT, Record

TEMPLATE = '''"""The real script with another function in the place of one of its own."""

import sys

SOURCE = {source!r}
own_name = __name__
# Dataclasses look up the module that they are defined in, and main() must not run yet.
sys.modules["honest"] = sys.modules[own_name]
__name__ = "honest"
exec(compile(SOURCE, __file__, "exec"))
__name__ = own_name

{fault}

if __name__ == "__main__":
    sys.exit(main())
'''
LOOKS_AHEAD = '''
honest_forward = SmearGate.forward


def forward(self, x, tokens):
    """Blend each embedding with the next one instead of the one before."""
    return honest_forward(self, x.flip(1), tokens.flip(1)).flip(1)


SmearGate.forward = forward
'''
# In these two CHANGED stands for the losses that the script counts.
OTHER_LOSSES = '''
honest_init = Evaluator.__init__


def init(self, *arguments):
    """Put other losses into the place of the model's, wherever they are counted."""
    honest_init(self, *arguments)
    honest_losses = self.token_losses

    def token_losses(model, tokens, targets, positions):
        losses = honest_losses(model, tokens, targets, positions)
        return CHANGED

    self.token_losses = token_losses


Evaluator.__init__ = init
'''
OTHER_SUM = '''
honest_score = Evaluator.score


def score(self, model, tokens, name, **more):
    """Count other losses than those that token_losses returns."""
    honest_losses = self.token_losses

    def token_losses(model, tokens, targets, positions):
        losses = honest_losses(model, tokens, targets, positions)
        return CHANGED

    self.token_losses = token_losses
    try:
        return honest_score(self, model, tokens, name, **more)
    finally:
        self.token_losses = honest_losses


Evaluator.score = score
'''
MORE_BYTES = '''
honest_sizes = ByteTable.sizes


def sizes(self, tokens):
    """Count a byte too many for every second piece, as if there were two spaces."""
    return honest_sizes(self, tokens) + tokens % 2


ByteTable.sizes = sizes
'''
OPERATORS_AS_TEXT = '''
honest_sizes = ByteTable.sizes


def sizes(self, tokens):
    """Count an operator for letter case as the three bytes of its character."""
    counted = honest_sizes(self, tokens)
    counted[(tokens >= 4) & (tokens <= 7)] = 3
    return counted


ByteTable.sizes = sizes
'''
NO_TAIL = '''
honest_score = Evaluator.score


def score(self, model, tokens, name, **more):
    """In sliding windows, leave out what does not fill a whole stride."""
    if name == "sliding":
        tokens = tokens[: (len(tokens) - 1) // 32 * 32 + 1]
    return honest_score(self, model, tokens, name, **more)


Evaluator.score = score
'''
TWICE = '''
honest_score = Evaluator.score


def score(self, model, tokens, name, **more):
    """Count the last targets twice."""
    once = honest_score(self, model, tokens, name, **more)
    again = honest_score(self, model, tokens[-21:], name)
    share = 1 + again.val_loss * again.targets / (once.val_loss * once.targets)
    return once._replace(val_loss=once.val_loss * share, val_bpb=once.val_bpb * share)


Evaluator.score = score
'''


def faulty_script(fault: str) -> str:
    """The source of the real script with a fault planted in it."""
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    return TEMPLATE.format(source=source, fault=fault)


def doctor(record: Record, fault: str) -> None:
    """Plant a fault in a record's script, and let log and submission say what that script says."""
    lines = record.lines()
    record.script.write_text(faulty_script(fault), encoding="utf-8")
    said = scored_by(record)
    code = record.script.stat().st_size
    lines = replace_line(lines, r"Code size: .*", f"Code size: {code} bytes")
    total = f"Total submission size int6+zstd: {record.total()} bytes"
    lines = replace_line(lines, r"Total submission size .*", total)
    for line in re.findall(r"^final_int6_.*$", said, re.M):
        lines = replace_line(lines, rf"{line.split()[0]} .*", line)
    clock = re.search(r"^eval_seconds:.*$", said, re.M)[0]
    lines = replace_line(lines, r"eval_seconds:.*", clock)
    mine = json.loads(re.search(r"^compliance:(.*)$", lines, re.M)[1])
    theirs = json.loads(re.search(r"^compliance:(.*)$", said, re.M)[1])
    for name in ("targets", "bytes", "eval_seconds", "eval_under_600s"):
        mine[name] = theirs[name]
    lines = replace_line(lines, r"compliance:.*", f"compliance:{json.dumps(mine)}")
    record.write_log(lines)
    record.write()


def replace_line(text: str, pattern: str, line: str) -> str:
    """Replace the one line that is all of a pattern."""
    replaced, times = re.subn(rf"^{pattern}$", lambda _: line, text, flags=re.M)
    assert times == 1, pattern
    return replaced


def scored_by(record: Record) -> str:
    """What the record's script prints when it scores its artifact, as a module of this process."""
    settings = dict(
        ARTIFACT=ARTIFACT,
        DATA_PATH=str(record.data),
        COMPILE="0",
        DTYPE="float32",
        DEVICE="cpu",
    )
    specification = importlib.util.spec_from_file_location("doctored", record.script)
    script = importlib.util.module_from_spec(specification)
    said = io.StringIO()
    with as_a_process(record.folder, said):
        sys.modules["doctored"] = script
        specification.loader.exec_module(script)
        os.environ.update(settings)
        sys.argv = ["train_gpt.py"]
        status = script.main()
    assert status == 0, said.getvalue()
    shutil.rmtree(record.folder / "logs")
    return said.getvalue()


# ---- Workers in this process
ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def as_a_process(folder: Path, output: io.TextIOBase) -> Iterator[None]:
    """Run what follows in a folder, and leave the state of this process as it was."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    precision = torch.get_float32_matmul_precision()
    gradients = torch.is_grad_enabled()
    threads = torch.get_num_threads()
    with ONE_AT_A_TIME, pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - environment_with().keys():
            patch.delenv(name)
        kept = dict(os.environ)
        patch.setattr(sys, "argv", list(sys.argv))
        patch.chdir(folder)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                yield
        finally:
            os.environ.clear()
            os.environ.update(kept)
            torch.set_float32_matmul_precision(precision)
            torch.set_grad_enabled(gradients)
            torch.set_num_threads(threads)
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    signal.signal(number, handler)


def answer_here(processes, name: str, folder: Path) -> None:
    """Stand in for Processes.wait_for: run a worker in this process, without the guard.

    A process of its own takes seconds to import torch.
    """
    job = json.loads((folder / "job.json").read_text())
    with open(folder / "out.txt", "w", encoding="utf-8") as output, as_a_process(folder, output):
        result = audit_worker.answer(name, job)
    (folder / "result.json").write_text(json.dumps(result))
