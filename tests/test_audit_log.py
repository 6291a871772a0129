"""Logs that contradict their files or themselves, on edits of a record's logs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from audit_log import check_log
from checks import Check
from run_logs import SEPARATOR, Log
from tiny_record import COMMITTED

SCRIPT = (COMMITTED / "train_gpt.py").read_bytes()
ARTIFACT = (COMMITTED / "final_model_seed1.int6.ptz").read_bytes()
# Settings as they stand in an artifact.
STORED = dict(eval_stride=64, num_layers=11)


@pytest.fixture(scope="module")
def text() -> str:
    """The log of seed 1."""
    return (COMMITTED / "train_seed1.log").read_text(encoding="utf-8")


def checked(text: str, folder: Path, required: bool = True) -> Check:
    """The verdict on an edited log."""
    path = folder / "a.log"
    path.write_text(text, encoding="utf-8")
    return check_log("log", Log(path), SCRIPT, ARTIFACT, STORED, required)


def edited(text: str, pattern: str, replacement: str) -> str:
    """Replace what matches behind the script's source; it must be there."""
    source, separator, lines = text.partition(SEPARATOR)
    lines, times = re.subn(pattern, replacement, lines, flags=re.M)
    assert times, pattern
    return source + separator + lines


# A pattern and what takes its place.
EDITS = {
    "train_time": (r"^(step:463/20000 train_loss.* train_time:)149982ms", r"\g<1>74991ms"),
    "step_avg": (r"^(step:450/.* step_avg:)323.97ms", r"\g<1>324.47ms"),
    "a step that goes back": (r"^step:400/", "step:500/"),
    "tokens": (r"( tokens:)948224 ", r"\g<1>1896448 "),
    "rate": (r"(tokens_per_second:)6322", r"\g<1>12644"),
    "stage": (r"^(stage:training )150.0s", r"\g<1>0.0s"),
    "iterations": (r"^step:463/20000 val", "step:463/463 val"),
    "limit": (r'("max_wallclock_seconds": )150.0', r"\g<1>100.0"),
    "settings": (r"^settings:\{", "settings:{{"),
    "model size": (r"^(Serialized model int6\+zstd: )3396207", r"\g<1>3396206"),
    "code size": (r"^(Code size: )109214", r"\g<1>109213"),
    "total size": (r"^(Total submission size int6\+zstd: )3505421", r"\g<1>3505420"),
    "cap": (r'("artifact_max_bytes": )16000000', r"\g<1>3505420"),
    "digest": (r"^(artifact:.*sha256:)d", r"\g<1>0"),
    "no digest": (r"^artifact:.*\n", ""),
    "rounded": (r"^(final_int6_roundtrip .* val_bpb:)1.8294", r"\g<1>1.8284"),
    "exact": (r"^(final_int6_roundtrip_exact val_loss:2.8888)9690", r"\g<1>8690"),
    "bytes": (r"^(final_int6_roundtrip .* bytes:)423163", r"\g<1>423164"),
    "targets": (r"^(final_int6_roundtrip .* targets:)185745", r"\g<1>185744"),
    "clock": (r"^eval_seconds:42.9", "eval_seconds:0.1"),
    "model": (r'"eval_stride": 64', '"eval_stride": 16'),
    "no score": (r"^final_int6_roundtrip_exact .*\n", ""),
    "no steps": (r"^step:\d+/.*\n", ""),
    "no rate": (r"^late_qat_steps:\d+ .*\n", ""),
    "no compliance": (r"^compliance:.*\n", ""),
    "compliance of another kind": (r"^compliance:\{.*", "compliance:[1]"),
    "training in time": (r'("train_under_600s": )true', r"\g<1>false"),
    "seconds of training": (r'("train_seconds": )149.98', r"\g<1>139.98"),
    "seconds of evaluation": (r'("eval_seconds": )42.8', r"\g<1>41.8"),
    "under the cap": (r'("artifact_under_16mb": )true', r"\g<1>false"),
    "targets of compliance": (r'("targets": \[)185745', r"\g<1>185744"),
    "bytes of compliance": (r'("bytes": )\[423163, 423163\]', r"\g<1>1"),
    "digest of compliance": (r'("artifact_sha256": ")d', r"\g<1>0"),
    "resumed": (r'("resumed_at": )\[\]', r"\g<1>[20]"),
    "validation": (r'("validation_opened": )"after packing"', r'\g<1>"during training"'),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_log_contradicts_itself(edit, text, tmp_path):
    found = checked(edited(text, *EDITS[edit]), tmp_path)
    assert found.passed is False and "comparisons hold" not in found.figure


def test_a_log_that_is_as_it_was_passes(text, tmp_path):
    found = checked(text, tmp_path)
    assert found.passed, found.figure


def test_another_script_is_not_the_logs(text, tmp_path):
    found = checked(f"#{text}", tmp_path)
    assert not found.passed and "its source is not the shipped script" in found.figure


def test_without_a_log_nothing_is_checked():
    found = check_log("log", None, SCRIPT, ARTIFACT, STORED, True)
    assert found.passed is None and "--log" in found.figure


@pytest.mark.parametrize("told", [[400], []])
def test_the_log_of_a_resumed_run_goes_on_from_its_checkpoint(told, text, tmp_path):
    settings = re.search(r"^settings:.*\n", text, re.M)[0]
    before, line, after = re.split(r"^(step:400/.*\n)", text, flags=re.M)
    lost = "step:450/20000 train_loss:1.0 train_time:900000ms step_avg:2000.00ms\n"
    head = f"{SEPARATOR}\n{settings}resumed at step:400 train_time:129876ms\n"
    resumed = before + line + lost + head + after
    found = checked(edited(resumed, r'("resumed_at": )\[\]', rf"\g<1>{told}"), tmp_path)
    assert found.passed is (told == [400]), found.figure


@pytest.mark.parametrize("seconds", ["train", "eval", None])
def test_a_record_states_its_times_and_they_are_under_600_seconds(seconds, text, tmp_path):
    """A log of an artifact alone may have other ones."""
    if seconds is None:
        text = edited(text, r"^compliance:.*\n", "")
    else:
        text = edited(text, rf'("{seconds}_under_600s": )true', r"\g<1>false")
    if seconds == "train":
        text = edited(text, r'("train_seconds": )149.98\d+', r"\g<1>700.0")
        text = edited(
            text, r"^(step:463/.* train_time:)\d+ms.*", r"\g<1>700000ms step_avg:1511.88ms"
        )
        text = edited(text, r"^stage:training .*", "stage:training 700.0s")
        text = edited(text, r"(tokens_per_second:)6322", r"\g<1>1355")
        text = edited(text, r'("max_wallclock_seconds": )150.0', r"\g<1>700.0")
    if seconds == "eval":
        text = edited(text, r'("eval_seconds": )42.8\d+', r"\g<1>700.0")
        text = edited(text, r"^eval_seconds:42.9", "eval_seconds:700.0")
    found = [checked(text, tmp_path, required) for required in (True, False)]
    assert [check.passed for check in found] == [False, True], found
