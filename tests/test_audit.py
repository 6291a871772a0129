"""The auditor: an honest record passes every check, and each planted fault fails the checks that it must."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_end_to_end import TINY_RUN, environment_with, run

TOOL = ROOT / "records" / "audit.py"
specification = importlib.util.spec_from_file_location("audit", TOOL)
audit = importlib.util.module_from_spec(specification)
specification.loader.exec_module(audit)
ARTIFACT = "final_model.int6.ptz"


# ---- a record to audit, and its doctored copies


@dataclasses.dataclass
class Record:
    """A record folder and the data that it was scored on."""

    folder: Path
    data: Path

    def read(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")

    def edit(self, name: str, *replacements: tuple[str, str]) -> None:
        """Replace texts that occur exactly once in one of the files."""
        text = self.read(name)
        for old, new in replacements:
            assert text.count(old) == 1, (text.count(old), old)
            text = text.replace(old, new)
        (self.folder / name).write_text(text, encoding="utf-8")

    def write(self) -> None:
        """submission.json and README.md, as the log says."""
        log = audit.Log(self.folder / "train_seed1337.log")
        score = log.score("final_int6_sliding_window")
        code, total = (self.folder / "train_gpt.py").stat().st_size, self.total()
        result = {name: score[name] for name in ("val_bpb", "val_loss")}
        result.update(artifact_bytes=total - code, steps=30)
        (self.folder / "submission.json").write_text(
            json.dumps(
                dict(
                    name="tiny",
                    author="a",
                    date="2026-01-02",
                    val_bpb=score["val_bpb"],
                    bytes_total=total,
                    bytes_code=code,
                    seeds=[1337],
                    seed_results={"1337": result},
                )
            )
        )
        (self.folder / "README.md").write_text(
            f"# tiny\n\nval_bpb {score['val_bpb']:.4f}, {total:,} bytes, seed 1337\n",
            encoding="utf-8",
        )

    def total(self) -> int:
        return sum((self.folder / name).stat().st_size for name in ("train_gpt.py", ARTIFACT))

    def doctor(self, *replacements: tuple[str, str]) -> None:
        """Plant a fault in the script, and let log and submission say what the doctored script says."""
        honest = self.read("train_gpt.py")
        self.edit("train_gpt.py", *replacements)
        log = self.read("train_seed1337.log")
        assert log.startswith(honest)
        code = len(self.read("train_gpt.py").encode())
        said = score(self)
        lines = re.sub(r"^(Code size:) \d+", rf"\1 {code}", log[len(honest) :], flags=re.M)
        lines = re.sub(r"^(Total submission .*:) \d+", rf"\1 {self.total()}", lines, flags=re.M)
        for line in re.findall(r"^final_int6_.*$", said, re.M):
            label = line.split()[0]
            lines, times = re.subn(rf"^{label} .*$", line, lines, flags=re.M)
            assert times == 1
        lines = restated(lines, said)
        (self.folder / "train_seed1337.log").write_text(
            self.read("train_gpt.py") + lines, encoding="utf-8"
        )
        self.write()

    def audit(self, *arguments: str, path: Path | None = None) -> tuple[int, dict[str, str], str]:
        """Exit status, the verdict of each check by name, and all that was printed."""
        command = [
            sys.executable,
            str(TOOL),
            str(path or self.folder),
            "--minutes",
            "0.05",
            *arguments,
        ]
        if "--data" not in arguments:
            command += ["--data", str(self.data)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=240,
            env=environment_with(),
            cwd=self.folder,
        )
        verdicts = re.findall(r"^(.+?) +(PASS|FAIL|-)  ", done.stdout, re.M)
        return done.returncode, dict(verdicts), done.stdout + done.stderr

    def failed(self, *checks: str, more: int = 0) -> set[str]:
        """What fails when these checks are asked for; `more` rows than checks are there."""
        status, verdicts, text = self.audit("--only", ",".join(checks))
        failed = {name for name, verdict in verdicts.items() if verdict == "FAIL"}
        assert status == (1 if failed else 0) and "-" not in verdicts.values(), text
        assert len(verdicts) == len(checks) + more, text
        return failed


def restated(lines: str, said: str) -> str:
    """The log's compliance and clock with what a doctored script states."""
    theirs, mine = (
        json.loads(re.search(r"^compliance:(.*)$", text, re.M)[1]) for text in (said, lines)
    )
    mine.update(
        {name: theirs[name] for name in ("targets", "bytes", "eval_seconds", "eval_under_600s")}
    )
    lines = re.sub(
        r"^compliance:.*$", lambda _: f"compliance:{json.dumps(mine)}", lines, flags=re.M
    )
    clock = re.search(r"^eval_seconds:\S+", said, re.M)[0]
    return re.sub(r"^eval_seconds:\S+", clock, lines, flags=re.M)


def score(record: Record) -> str:
    """What the record's script prints when it scores its artifact; here, since imports take long."""
    specification = importlib.util.spec_from_file_location(
        "doctored", record.folder / "train_gpt.py"
    )
    script = sys.modules["doctored"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    before, precision, said = Path.cwd(), torch.get_float32_matmul_precision(), io.StringIO()
    try:
        os.chdir(record.folder)
        with contextlib.redirect_stdout(said):
            script.start(
                dict(
                    ARTIFACT=ARTIFACT,
                    DATA_PATH=str(record.data),
                    COMPILE="0",
                    DTYPE="float32",
                    DEVICE="cpu",
                )
            )
    finally:
        os.chdir(before)
        torch.set_float32_matmul_precision(precision)
    shutil.rmtree(record.folder / "logs")
    return said.getvalue()


@pytest.fixture(scope="module")
def honest(data_folder, tmp_path_factory) -> Record:
    """A tiny run and its record."""
    folder, made = (
        tmp_path_factory.mktemp("run"),
        Record(tmp_path_factory.mktemp("record"), data_folder),
    )
    done = run(folder, **TINY_RUN, DATA_PATH=str(data_folder), RUN_ID="first")
    assert done.status == 0, done.err
    for path, name in (
        (ROOT / "train_gpt.py", "train_gpt.py"),
        (folder / ARTIFACT, ARTIFACT),
        (folder / "logs/first.txt", "train_seed1337.log"),
    ):
        shutil.copy(path, made.folder / name)
    made.write()
    return made


@pytest.fixture
def record(honest, tmp_path) -> Record:
    """A copy of the honest record, to be doctored."""
    return Record(Path(shutil.copytree(honest.folder, tmp_path / "record")), honest.data)


# ---- what is honest


def test_an_honest_record_passes_every_check(honest, tmp_path):
    status, verdicts, text = honest.audit(
        "--json", str(tmp_path / "table.json"), "--keep", str(tmp_path / "kept")
    )
    assert status == 0, text
    assert list(verdicts) == [
        "size",
        "runs alone",
        "byte count",
        "every target once",
        "causality",
        "normalization",
        "score",
        "decompression",
        "log",
        "submission",
    ]
    assert set(verdicts.values()) == {"PASS"}
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in table] == list(verdicts) and all(
        row["figure"] in text for row in table
    )
    kept = sorted(
        str(path.relative_to(tmp_path / "kept")) for path in (tmp_path / "kept").rglob("*.*")
    )
    assert kept == [
        "audit.py",
        "coded.bin",
        "data/tokenizer.model",
        ARTIFACT,
        "job.json",
        "train_gpt.py",
    ]


def test_an_artifact_alone_passes_what_can_be_checked(honest, tmp_path):
    shutil.copy(honest.folder / ARTIFACT, tmp_path / "model.ptz")
    status, verdicts, text = honest.audit(
        "--script",
        str(honest.folder / "train_gpt.py"),
        "--only",
        "size,score,log,submission",
        path=tmp_path / "model.ptz",
    )
    assert (status, verdicts) == (0, {"size": "PASS", "score": "-", "log": "-"}), text
    shutil.copy(
        honest.folder / "train_seed1337.log", tmp_path / "model.txt"
    )  # which names its sha256
    status, verdicts, text = honest.audit(
        "--script",
        str(honest.folder / "train_gpt.py"),
        "--only",
        "size,log",
        path=tmp_path / "model.ptz",
    )
    assert (status, verdicts) == (0, {"size": "PASS", "log": "PASS"}), text


def test_a_log_is_found_by_the_digest_in_it(honest, tmp_path):
    (tmp_path / "logs").mkdir()
    shutil.copy(honest.folder / ARTIFACT, tmp_path / "logs" / ARTIFACT)
    shutil.copy(honest.folder / "train_gpt.py", tmp_path)
    shutil.copy(honest.folder / "train_seed1337.log", tmp_path / "logs/mine.txt")
    (tmp_path / "logs/another.txt").write_text("no log of it")
    status, verdicts, text = honest.audit("--only", "size,log", path=tmp_path / "logs" / ARTIFACT)
    assert (status, verdicts) == (0, {"size": "PASS", "log": "PASS"}), text


# ---- planted faults

UNCHECKED = ("count == targets and math.isfinite(nats)", "True")
# a fault, the checks that are asked, and those of them that must fail
FAULTS = {
    "a SmearGate that looks ahead": (
        [("torch.cat((x[:, :1], x[:, :-1]), dim=1)", "torch.cat((x[:, 1:], x[:, -1:]), dim=1)")],
        "causality,normalization,decompression,bytes",
        {"causality", "decompression"},
    ),
    "probabilities that sum to more than one": (
        [("    return losses.view(targets.shape)", "    return losses.view(targets.shape) * 0.9")],
        "causality,normalization,decompression",
        {"normalization", "decompression"},
    ),
    "losses of the first places left out": (
        [
            (
                "        return self.losses(hidden, self.output, self.softcap, targets)\n    def forward",
                "        first = torch.arange(targets.size(1)) if places is None else places\n"
                "        return self.losses(hidden, self.output, self.softcap, targets) * (first >= 4)\n"
                "    def forward",
            )
        ],
        "normalization,targets",
        {"normalization"},
    ),
    "a byte table that counts spaces twice": (
        [('pieces[i].replace("▁", " ")', 'pieces[i].replace("▁", "  ")')],
        "bytes,targets,normalization",
        {"byte count"},
    ),
    "a tail that is not scored": (
        [("ends = np.unique(ends.clip(max=targets))", "ends = ends[ends <= targets]"), UNCHECKED],
        "targets,bytes,normalization",
        {"every target once", "byte count", "log"},
    ),
    "windows that are scored twice": (
        [
            (
                "return np.stack([starts, begins - starts, ends - begins], axis=1)",
                "return np.stack([starts, begins - starts, ends - begins], axis=1).repeat(2, axis=0)",
            ),
            UNCHECKED,
        ],
        "targets,causality",
        {"every target once"},
    ),
    "memory tokens in the places of targets": (
        [("places).double() * scored).sum()", "places).double() * scored * (places >= 4)).sum()")],
        "alone,targets,causality",
        {"runs alone", "every target once"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, record):
    """The doctored script, its log and its submission agree with each other; just the right checks fail."""
    changes, asked, expected = FAULTS[fault]
    record.doctor(*changes)
    assert record.failed(*asked.split(","), "log", "submission", "size") == expected


def test_one_byte_over_the_cap_is_too_many(record):
    room = audit.CAP - record.total()
    with open(record.folder / "train_gpt.py", "a") as file:
        file.write("#" * room)
    assert record.failed("size") == set()
    with open(record.folder / "train_gpt.py", "a") as file:
        file.write("#")
    assert record.failed("size") == {"size"}


def test_a_log_may_lower_the_cap(record):
    name = '"artifact_max_bytes": '
    record.edit("train_seed1337.log", (f"{name}16000000", f"{name}{record.total() - 1}"))
    assert record.failed("size", "log") == {"size", "log"}


def lower_the_score(record: Record) -> None:
    """Take 0.01 off the log's score, with all that follows from it, in the log and everywhere."""
    claimed = audit.Log(record.folder / "train_seed1337.log").score("final_int6_sliding_window")
    bpb, share = claimed["val_bpb"] - 0.01, 1 - 0.01 / claimed["val_bpb"]
    loss, text = claimed["val_loss"] * share, record.read("train_seed1337.log")
    for label, digits in (("final_int6_sliding_window", 4), ("final_int6_sliding_window_exact", 8)):
        stated = f"{label} val_loss:{loss:.{digits}f} val_bpb:{bpb:.{digits}f}"
        text, times = re.subn(rf"^{label} val_loss:\S+ val_bpb:\S+", stated, text, flags=re.M)
        assert times == 1
    (record.folder / "train_seed1337.log").write_text(text, encoding="utf-8")
    record.write()


def test_a_better_score_in_log_and_submission_is_caught(record):
    lower_the_score(record)
    assert record.failed("score", "log", "submission") == {"score"}


LOG_EDITS = {
    "train_time": (
        r"(\nstep:30/30 train_\S+ train_time:)(\d+)ms",
        lambda m: f"{m[1]}{int(m[2]) // 2}ms",
    ),
    "step_avg": (
        r"(\nstep:20/30 .* step_avg:)([\d.]+)ms",
        lambda m: f"{m[1]}{float(m[2]) + 0.5}ms",
    ),
    "tokens": (r"( tokens:)(\d+) ", lambda m: f"{m[1]}{int(m[2]) * 2} "),
    "rate": (r"(tokens_per_second:)(\d+)", lambda m: f"{m[1]}{int(m[2]) * 2}"),
    "stage": (r"(\nstage:training )[\d.]+s", lambda m: f"{m[1]}0.0s"),
    "limit": (r'("max_wallclock_seconds": )0.0', lambda m: f"{m[1]}0.001"),
    "source": (r"\A(.)", lambda m: f"#{m[1]}"),
    "settings": (r"\nsettings:\{", lambda m: "\nsettings:{{"),
    "sizes": (r"(\nTotal submission size int6\+zstd: )(\d+)", lambda m: f"{m[1]}{int(m[2]) - 1}"),
    "digest": (r"(\nartifact:.*sha256:)(\w)", lambda m: f"{m[1]}{'0' if m[2] != '0' else '1'}"),
    "rounded": (
        r"(\nfinal_int6_roundtrip .* val_bpb:)(\S+)",
        lambda m: f"{m[1]}{float(m[2]) - 0.001:.4f}",
    ),
    "exact": (
        r"(\nfinal_int6_roundtrip_exact val_loss:)(\S+)",
        lambda m: f"{m[1]}{float(m[2]) - 1e-5:.8f}",
    ),
    "clock": (r"\neval_seconds:\S+", lambda m: "\neval_seconds:0.0"),
    "model": (r'"eval_stride": 32', lambda m: '"eval_stride": 16'),
    "bytes": (r"(\nfinal_int6_roundtrip .* bytes:)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}"),
    "no score": (r"\nfinal_int6_roundtrip_exact .*", lambda m: ""),
    "no step": (r"\nstep:\d+/.*", lambda m: ""),
    "compliance": (r'("train_under_600s": )true', lambda m: f"{m[1]}false"),
}


@pytest.mark.parametrize("edit", LOG_EDITS)
def test_an_edited_log_contradicts_itself(edit, honest, tmp_path):
    """In this process, by the function that checks logs."""
    pattern, change = LOG_EDITS[edit]
    text = honest.read("train_seed1337.log")
    files = honest.read("train_gpt.py").encode(), (honest.folder / ARTIFACT).read_bytes()

    def checked(text: str):
        (tmp_path / "a.log").write_text(text, encoding="utf-8")
        return audit.check_log(
            "log", audit.Log(tmp_path / "a.log"), *files, dict(eval_stride=32), True
        )

    assert checked(text).passed, checked(text).figure
    edited, times = re.subn(pattern, change, text)
    assert times and checked(edited).passed is False


@pytest.mark.parametrize("told", [[20], []])
def test_the_log_of_a_resumed_run_goes_on_from_its_checkpoint(told, honest, tmp_path):
    text = honest.read("train_seed1337.log")
    files = honest.read("train_gpt.py").encode(), (honest.folder / ARTIFACT).read_bytes()
    before, line, after = re.split(r"^(step:20/.*\n)", text, flags=re.M)
    settings = re.search(r"^settings:.*\n", text, re.M)[0]
    resumed = (
        f"{line}step:30/30 train_loss:1.0 train_time:90000ms step_avg:3000.00ms\n"
        + "=" * 100
        + f"\n{settings}resumed at step:20 train_time:1ms\n"
    )
    after, times = re.subn(r'"resumed_at": \[\]', f'"resumed_at": {told}', after)
    assert times == 1
    (tmp_path / "a.log").write_text(before + resumed + after, encoding="utf-8")
    found = audit.check_log("log", audit.Log(tmp_path / "a.log"), *files, None, True)
    assert found.passed is (told == [20]), found.figure


def second_seed(record: Record) -> None:
    """Another seed's log: the first one's, with a better score, as consistent as one can type it."""
    log = record.read("train_seed1337.log").replace('"seed": 1337', '"seed": 2')
    (record.folder / "train_seed2.log").write_text(log, encoding="utf-8")
    stated = json.loads(record.read("submission.json"))
    stated.update(
        seeds=[1337, 2],
        seed_results=dict.fromkeys(("1337", "2"), stated["seed_results"]["1337"]),
    )
    (record.folder / "submission.json").write_text(json.dumps(stated))
    (record.folder / "README.md").write_text(record.read("README.md") + " and seed 2\n")


def test_a_seed_without_its_artifact_is_not_proven(record):
    second_seed(record)
    assert record.failed("log", "submission", more=2) == {
        "score of seed 2",
        "submission",
    }  # and one artifact for two


def test_a_second_log_of_a_seed_is_refused(record):
    shutil.copy(record.folder / "train_seed1337.log", record.folder / "train_seed1337_rerun.log")
    status, verdicts, text = record.audit("--only", "size,submission")
    assert (status, verdicts) == (2, {}) and "train_seed1337_rerun.log" in text


def test_a_submission_may_state_all_digits(record):
    """Those of logs/<RUN_ID>.json, where a log has eight decimals."""
    stated = json.loads(record.read("submission.json"))
    for numbers in (stated, stated["seed_results"]["1337"]):
        numbers["val_bpb"] += 4.321e-9
    (record.folder / "submission.json").write_text(json.dumps(stated))
    assert record.failed("size", "submission") == set()
    stated["seed_results"]["1337"]["val_bpb"] += 2e-8
    (record.folder / "submission.json").write_text(json.dumps(stated))
    assert record.failed("size", "submission") == {"submission"}


def test_seeds_may_differ_in_what_is_the_machines(record):
    second_seed(record)
    text = record.read("train_seed2.log")

    def checked(text: str) -> audit.Check:
        (record.folder / "train_seed2.log").write_text(text, encoding="utf-8")
        logs = {seed: audit.Log(record.folder / f"train_seed{seed}.log") for seed in (1337, 2)}
        return audit.check_submission(record.folder, record.read("train_gpt.py").encode(), logs)

    text = text.replace(
        re.search(r"sha256:(\w{64}) quant", text)[1], "0" * 64
    )  # of an artifact of its own
    found = checked(text.replace('"checkpoint_every": 0.0', '"checkpoint_every": 60.0'))
    assert found.passed, found.figure
    found = checked(
        text.replace('"muon_wd": 0.04', '"muon_wd": 0.05').replace(
            '"qk_gain_init": 1.5', '"qk_gain_init": 2'
        )
    )
    assert not found.passed and "configurations differ in muon_wd, qk_gain_init" in found.figure


@pytest.mark.parametrize(
    "change",
    [
        lambda text: re.sub(r"^compliance:.*\n", "", text, flags=re.M),
        lambda text: re.sub(
            r'"eval_seconds": [\d.]+',
            '"eval_seconds": 700.0',
            text.replace('"eval_under_600s": true', '"eval_under_600s": false'),
        ).replace("\neval_seconds:", "\neval_seconds:700.0 was:"),
    ],
)
def test_a_record_states_its_times_and_they_are_under_600_seconds(change, honest, tmp_path):
    (tmp_path / "a.log").write_text(change(honest.read("train_seed1337.log")), encoding="utf-8")
    files = honest.read("train_gpt.py").encode(), (honest.folder / ARTIFACT).read_bytes()
    found = [
        audit.check_log("log", audit.Log(tmp_path / "a.log"), *files, None, required)
        for required in (True, False)
    ]
    assert [check.passed for check in found] == [False, True], found


def test_a_score_that_is_known_too_little_is_not_proven(record):
    """On a sample: the claim lies inside of the interval, which is wider than what was asked for."""
    options = types.SimpleNamespace(margin=0.003, seed=0)
    log = audit.Log(record.folder / "train_seed1337.log")
    own = types.SimpleNamespace(
        log=log,
        options=options,
        claimed=lambda: 2.0,
        tokens=None,
        bits_and_bytes=lambda scored, tokens: (
            np.array([100.0, 220.0, 180.0]),
            np.array([50.0, 100.0, 100.0]),
        ),
    )
    found = audit.Audit.check_score(own, dict(windows=1000))
    assert found.passed is None and "not known to 0.003" in found.figure
    options.margin = 10.0
    assert audit.Audit.check_score(own, dict(windows=1000)).passed
    own.claimed = lambda: 1.0
    assert not audit.Audit.check_score(own, dict(windows=1000)).passed


def test_a_track_that_learns_while_it_scores_is_not_for_this_auditor(record):
    record.edit("train_seed1337.log", ('"track": "A"', '"track": "B"'))
    status, verdicts, text = record.audit("--only", "size")
    assert (status, verdicts) == (2, {}) and "track B" in text


def test_samples_are_drawn_anew_and_can_be_drawn_again(record):
    seeds = [
        re.search(r"--seed (\d+)", record.audit("--only", "size", *arguments)[2])[1]
        for arguments in ((), (), ("--seed", "5"))
    ]
    assert seeds[0] != seeds[1] and seeds[2] == "5"


def test_a_record_without_its_log_fails(record):
    (record.folder / "train_seed1337.log").unlink()
    assert record.failed("size", "log", "submission") == {"log", "submission"}


@pytest.mark.parametrize(
    "old, new",
    [
        ('"artifact_max_bytes": 16000000', '"artifact_max_bytes": "none"'),
        ("bytes:9", "bytes:x"),
        ("compliance:{", 'compliance:["a", "b"] {'),
        ("val_bpb:", "val_bpb:x"),
    ],
)
def test_a_log_that_makes_no_sense_fails(old, new, record):
    text = record.read("train_seed1337.log")
    head, lines = text[: text.index("=" * 100)], text[text.index("=" * 100) :]
    (record.folder / "train_seed1337.log").write_text(
        head + lines.replace(old, new), encoding="utf-8"
    )
    assert "log" in record.failed("size", "log") or old not in lines


def test_an_edited_train_time_is_caught(record):
    text = re.sub(*LOG_EDITS["train_time"], record.read("train_seed1337.log"))
    (record.folder / "train_seed1337.log").write_text(text, encoding="utf-8")
    assert record.failed("log", "submission") == {"log"}


@pytest.mark.parametrize(
    "name, value",
    [
        ("val_bpb", 1.0),
        ("bytes_total", 1),
        ("bytes_code", 1),
        ("seeds", [1]),
        ("author", ""),
        ("date", "soon"),
        ("seed_results", {"1337": dict(val_bpb=1.0)}),
        ("seed_results", {}),
        ("name", None),
        ("README.md", "none"),
        ("submission.json", "{"),
    ],
)
def test_a_submission_that_disagrees_is_caught(name, value, record):
    """In this process, by the function that checks submissions."""

    def checked():
        logs = {1337: audit.Log(record.folder / "train_seed1337.log")}
        return audit.check_submission(record.folder, record.read("train_gpt.py").encode(), logs)

    assert checked().passed, checked().figure
    stated = json.loads(record.read("submission.json"))
    if name in stated:
        (record.folder / "submission.json").write_text(json.dumps({**stated, name: value}))
    else:
        (record.folder / name).write_text(value)
    assert checked().passed is False


# ---- a script that reaches further than it may

REACHES = {
    "the network": 'import socket; socket.create_connection(("127.0.0.1", 9), timeout=1)',
    "the repository": f"open({str(ROOT / 'README.md')!r}).read()",
    "a program": 'subprocess.run(["true"])',
    "the data": "list(Path('DATA').iterdir())",
    "a place for the decoder": "open('LEFT', 'w').write('validation text')",
    "the data, under another name": "os.link(next(Path('DATA').glob('*_val_*')), 'mine.bin')",
    "a file of its own, moved out": "Path('mine').touch(); os.rename('mine', 'LEFT')",
    "the other workers": "list(Path('..').glob('*/data/*'))",
    "the network, quietly": "import socket\ntry: socket.getaddrinfo('localhost', 80)\nexcept OSError: pass",
}


@pytest.mark.parametrize("what", REACHES)
def test_a_script_that_reaches_out_is_stopped(what, record):
    left = record.folder.parent / "left"
    statement = REACHES[what].replace("DATA", str(record.data)).replace("LEFT", str(left))
    record.edit("train_gpt.py", ("\ndef score_existing(", f"\n{statement}\ndef score_existing("))
    assert record.failed("alone") == {"runs alone"} and not left.exists()


def test_a_script_that_ends_silently_fails(record):
    place = "\ndef score_existing("
    record.edit("train_gpt.py", (place, f"\nif __name__ == '__main__': os._exit(0){place}"))
    assert record.failed("alone") == {"runs alone"}


# ---- what cannot be audited


@pytest.mark.parametrize(
    "case, word",
    [
        ("absent", "does not exist"),
        ("empty", "train_gpt.py"),
        ("no artifact", r"\*\.ptz"),
        ("no data", "data"),
        ("damaged data", "damaged"),
        ("not an artifact", "refuses the artifact"),
        ("unknown check", "--only"),
        ("no script", "--script"),
        ("no log", "--log"),
        ("no tokenizer", "--tokenizer"),
        ("no time", "--minutes"),
    ],
)
def test_bad_input_is_refused_in_one_line(case, word, record, tmp_path):
    (tmp_path / "empty").mkdir()
    path, data, arguments = record.folder, record.data, []
    if case in ("absent", "empty"):
        path = tmp_path / case
    elif case == "no artifact":
        (record.folder / ARTIFACT).unlink()
    elif case == "no data":
        data = tmp_path / "empty"
    elif case in ("damaged data", "no tokenizer"):
        data = Path(shutil.copytree(record.data, tmp_path / "data"))
        shard, tokenizer = data / "x_val_000000.bin", data / "tokenizer.model"
        shard.write_bytes(shard.read_bytes()[: -1 if case == "damaged data" else None])
        tokenizer.unlink() if case == "no tokenizer" else None
    elif case == "not an artifact":
        path = record.folder / "README.md"
    else:
        arguments = {"unknown check": ["--only", "luck"], "no time": ["--minutes", "0"]}.get(
            case, [f"--{case.split()[1]}", str(tmp_path / "absent")]
        )
    status, verdicts, text = record.audit(*arguments, "--data", str(data), path=path)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert (status, verdicts, len(errors)) == (2, {}, 1) and re.search(word, errors[0]), text
    assert "Traceback" not in text


# ---- the coder


def distributions(symbols: int, kinds: int, seed: int, sharpness: float = 3.0) -> np.ndarray:
    """Logits, float32 (symbols, kinds)."""
    return (sharpness * np.random.default_rng(seed).standard_normal((symbols, kinds))).astype(
        np.float32
    )


def coded(logits: np.ndarray, symbols) -> bytes:
    begins = [audit.cumulative(row) for row in logits]
    return audit.encode((int(row[x]), int(row[x + 1])) for row, x in zip(begins, symbols))


def decoded(data: bytes, logits: np.ndarray) -> list[int]:
    decoder = audit.Decoder(data)
    return [decoder.symbol(audit.cumulative(row)) for row in logits]


@pytest.mark.parametrize(
    "length, kinds, sharpness", [(0, 3, 1), (1, 2, 1), (300, 2, 9), (200, 1024, 3), (90, 70, 40)]
)
def test_the_coder_gives_back_what_it_took_in_as_few_bytes_as_possible(length, kinds, sharpness):
    logits = distributions(length, kinds, length, sharpness)
    likely = logits.argmax(1) if length else []
    for symbols in (
        np.random.default_rng(1).integers(0, kinds, length).tolist(),
        list(map(int, likely)),
    ):
        data = coded(logits, symbols)
        assert decoded(data, logits) == symbols
        begins = [audit.cumulative(row) for row in logits]
        bits = sum(
            math.log2(audit.TOTAL / (row[x + 1] - row[x])) for row, x in zip(begins, symbols)
        )
        assert bits / 8 - 1 <= len(data) <= bits / 8 + 1
        if length and sharpness < 9:  # else some shares are below the smallest frequency
            entropy = float(audit.own_losses(logits, np.array(symbols)).sum()) / math.log(2)
            assert abs(len(data) - entropy / 8) <= 1 + 1e-6 * entropy


def test_frequencies_add_up_and_none_is_zero():
    for kinds, sharpness in ((2, 0), (1024, 3), (1024, 500), (65536, 1)):
        begins = audit.cumulative(distributions(1, kinds, 0, sharpness)[0])
        assert begins[0] == 0 and begins[-1] == audit.TOTAL and (np.diff(begins) >= 1).all()


def test_other_probabilities_give_another_text():
    logits = distributions(100, 50, 3)
    symbols = np.random.default_rng(2).integers(0, 50, 100).tolist()
    data = coded(logits, symbols)
    wrong = logits.copy()
    wrong[40, symbols[40]] += 0.1
    found = decoded(data, wrong)
    assert found[:40] == symbols[:40] and found != symbols


# ---- the auditor's own windows and bytes


@pytest.mark.parametrize(
    "targets, window, stride", [(5, 20, 7), (20, 20, 7), (21, 20, 7), (100, 20, 20), (333, 20, 1)]
)
def test_the_auditors_windows_score_each_target_once_with_its_context(targets, window, stride):
    windows = audit.plan(targets, window, stride)
    scored = np.concatenate([np.arange(first, end) for _, first, end in windows])
    assert scored.tolist() == list(range(targets))
    for start, first, end in windows[1:]:
        assert end - start == window and end - first == stride or end == targets
    assert windows[0][0] == 0 and windows[0][2] == min(window, targets)


def test_bytes_are_those_of_the_decoded_text(data_folder):
    text, tokens = audit.Text(data_folder / "tokenizer.model"), audit.read_validation(data_folder)
    assert text.bytes_of_targets(tokens).sum() == text.count(tokens) == len(text.decode(tokens))
    broken = np.array(
        [1, *text.tokenizer.encode("é")][:-1] + text.tokenizer.encode("a")
    )  # half a character
    pieces = [text.tokenizer.is_byte(int(x)) for x in broken]
    if any(pieces):  # U+FFFD would be three bytes
        assert len(text.decode(broken)) == 4 and text.count(broken) == 2


def test_pairs_are_unique():
    for length in (2, 3, 10, 101, 1000):
        numbers, kinds = audit.unique_pairs(length)
        assert len(numbers) == length and numbers.max() < kinds
        assert len(set(zip(numbers[:-1].tolist(), numbers[1:].tolist()))) == length - 1


# ---- which data


def place(folder: Path, name: str, data_folder: Path, **manifest) -> Path:
    """A copy of the test's data in a subfolder, its tokenizer elsewhere, and a manifest."""
    data = folder / name
    shutil.copytree(data_folder, data)
    (data / "tokenizer.model").rename(folder / "moved.model")
    (data / "manifest.json").write_text(
        json.dumps({"tokenizer": {"file": "../moved.model"}, **manifest})
    )
    return data


def test_the_log_of_an_own_run_says_which_data_and_the_manifest_which_tokenizer(
    data_folder, tmp_path, monkeypatch
):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.txt").write_text(
        "=" * 100 + "\ndata:mine tokenizer:moved.model sha256:00\n"
    )
    place(tmp_path, "mine", data_folder)
    monkeypatch.chdir(data_folder)
    options = argparse.Namespace(data=None, tokenizer=None)
    found = audit.find_data(options, audit.Log(tmp_path / "logs" / "a.txt"))
    assert [path.resolve() for path in found] == [tmp_path / "mine", tmp_path / "moved.model"]


@pytest.mark.parametrize("change", [0, 1])
def test_bytes_must_be_those_that_the_manifest_notes(record, data_folder, tmp_path, change):
    """With another tokenizer of the same size the script, the log and the auditor would agree on a wrong count."""
    bytes_ = audit.Log(record.folder / "train_seed1337.log").score("final_int6_sliding_window")[
        "bytes"
    ]
    data = place(tmp_path, "mine", data_folder, val=dict(bytes=bytes_ + change))
    status, verdicts, text = record.audit("--only", "bytes", "--data", str(data))
    assert (status, verdicts) == (
        (1, {"byte count": "FAIL"}) if change else (0, {"byte count": "PASS"})
    ), text
