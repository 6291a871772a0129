"""A quick script for the tests of records/ablate.py, and how they call that command.

The script has train_gpt.py's settings, but not torch, and writes at once what a run writes.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import ablate
import ablation_plan
import train_gpt

HEADER = '''"""Stands in for train_gpt.py."""
from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
'''
# A run with 13 layers fails, one with 14 is killed. STANDIN_SECONDS is how long a run with a seed
# above 1 takes, STANDIN_MEETS names the folder of a run that must be at work at the same time.
BODY = """
def wait_for(path):
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.05)
    sys.exit(f"error: {path} is not there")


def main():
    s, _ = settings_from(os.environ)
    Path("logs").mkdir()
    log = open(f"logs/{s.run_id}.txt", "x", buffering=1)
    print(Path(__file__).read_text() + "=" * 100, file=log)
    if s.num_layers == 13 and "STANDIN_MENDED" not in os.environ:
        sys.exit(f"error: train_loss is nan at step 7 in {os.getcwd()}")
    if s.num_layers == 14:
        print("at work", flush=True)
        os.kill(os.getpid(), 9)
    seconds = float(os.environ.get("STANDIN_SECONDS", 0)) if s.seed > 1 else 0.0
    if seconds:
        child = subprocess.Popen(["sh", "-c", "trap '' TERM; exec sleep 3600"])
        Path("child").write_text(str(child.pid))
    print("data:/data tokenizer:/data/tokenizer.model sha256:0123456789abcdef", file=log)
    # It takes its name when it is written: whoever finds the file can read the number.
    Path("pid.partial").write_text(str(os.getpid()))
    Path("pid.partial").rename("pid")
    if "STANDIN_MEETS" in os.environ:
        for name in os.environ["STANDIN_MEETS"].split():
            wait_for(Path("..", name, "pid"))
    for step in (1, s.iterations // 2, s.iterations):
        time_words = f"train_time:{step}ms step_avg:1.00ms"
        loss = 9 - step / s.iterations
        print(f"step:{step}/{s.iterations} train_loss:{loss} {time_words}", file=log)
        if s.val_loss_every:
            bpb = 3 - step / s.iterations
            print(f"step:{step}/{s.iterations} val_loss:2.0 val_bpb:{bpb} {time_words}", file=log)
        time.sleep(seconds)
    bpb = 1.8 + 0.001 * s.seed + 1e-5 * s.model_dim * s.seed ** 2
    bpb += (11 - s.num_layers) * (0.01 + 0.001 * s.seed)
    if s.ema_enabled:
        bpb += 0.001 * (s.seed - 2)
    score = dict(
        val_loss=2 * bpb, val_bpb=bpb, targets=1000, bytes=2000 + s.vocab_size, seconds=1.0
    )
    for name in ("final_model.int6.ptz", f"logs/{s.run_id}.final_model.int6.ptz"):
        Path(name).write_bytes(b"artifact")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    results = dict(
        settings=dataclasses.asdict(s), stages=dict(training=2.0), versions=dict(torch="2.0"),
        runtime=["world_size:1", "device:cpu", "dtype:float32", "attention:none"],
        bytes_total=3_000_000, steps=s.iterations, tokens=s.iterations * s.train_batch_tokens,
        step_avg_ms=1.0, train_seconds=2.0, pre_quantization=score, final_int6_roundtrip=score,
        final_int6_sliding_window=score, cores=cores, ended=time.monotonic_ns(),
        environment=dict(os.environ),
    )
    Path(f"logs/{s.run_id}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
"""


# ---- The script


def names_bound_by(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a module binds."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    found = set()
    for target in targets:
        found |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
    return found


def is_of_the_standard_library(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import takes nothing from elsewhere."""
    if isinstance(node, ast.ImportFrom):
        modules = [node.module]
    else:
        modules = [alias.name for alias in node.names]
    return all(module.split(".")[0] in sys.stdlib_module_names for module in modules)


def source_of(names: tuple[str, ...]) -> str:
    """The source of these names of train_gpt.py, and of all in it that they use."""
    statements = ast.parse(Path(train_gpt.__file__).read_text(encoding="utf-8")).body
    binds: dict[str, list[ast.stmt]] = {}
    for node in statements:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not is_of_the_standard_library(node):
            continue
        for name in names_bound_by(node):
            binds.setdefault(name, []).append(node)

    needed: list[ast.stmt] = []
    open_names = list(names)
    while open_names:
        for node in binds.pop(open_names.pop(), []):
            if node not in needed:
                needed.append(node)
                open_names += [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    needed.sort(key=lambda node: node.lineno)
    return "\n\n".join(ast.unparse(node) for node in needed)


def write_standin(path: Path) -> Path:
    """Write the quick script; its path."""
    path.write_text(f"{HEADER}\n\n{source_of(ablation_plan.NEEDED)}\n\n{BODY}")
    return path


# ---- The command


class Done(NamedTuple):
    """A call of the command that has ended."""

    folder: Path
    status: int
    out: str
    err: str

    @property
    def ablation(self) -> Path:
        """The folder of the runs."""
        return self.folder / "logs/ablations/ablation"

    def report(self) -> dict:
        """ablation.json."""
        return json.loads((self.ablation / "ablation.json").read_text())

    def row(self, label: str) -> dict:
        """The results of a change."""
        return next(row for row in self.report()["rows"] if row["label"] == label)

    def run(self, name: str) -> dict:
        """The results of a run."""
        return json.loads((self.ablation / name / "logs" / f"{name}.json").read_text())


def call(folder: Path, *arguments, **environment: str) -> Done:
    """Call ablate.py in this process, from a folder.

    No setting is in the environment but these.
    """
    folder.mkdir(exist_ok=True)
    out = io.StringIO()
    err = io.StringIO()
    hangup = getattr(signal, "SIGHUP", None)
    handler = signal.getsignal(hangup) if hangup else None
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        for field in train_gpt.fields_of():
            patch.delenv(field.name.upper(), raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        status = ablate.main([str(argument) for argument in arguments])
    if hangup:
        signal.signal(hangup, handler)
    return Done(folder, status, out.getvalue(), err.getvalue())
