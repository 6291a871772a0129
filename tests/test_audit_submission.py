"""submission.json and README.md against the logs of a record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from audit_submission import check_submission
from checks import Check, guarded
from record_folder import logs_by_seed
from tiny_record import COMMITTED


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a record without its artifacts."""
    for path in COMMITTED.iterdir():
        if path.suffix != ".ptz":
            shutil.copy(path, tmp_path)
    return tmp_path


def checked(folder: Path) -> Check:
    script = (folder / "train_gpt.py").read_bytes()
    return guarded("submission", check_submission, folder, script, logs_by_seed(folder))


def edit(path: Path, *replacements: tuple[str, str]) -> None:
    """Replace texts that are there."""
    text = path.read_text(encoding="utf-8")
    for old, new in replacements:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def stated_in(folder: Path) -> dict:
    return json.loads((folder / "submission.json").read_text())


def state(folder: Path, stated: dict) -> None:
    (folder / "submission.json").write_text(json.dumps(stated))


def test_a_submission_that_says_what_its_logs_say_passes(folder):
    assert checked(folder).passed, checked(folder).figure


@pytest.mark.parametrize(
    "name, value, problem",
    [
        ("val_bpb", 1.0, "val_bpb is 1 but also 1.80"),
        ("bytes_total", 1, "bytes_total is 1 but also"),
        ("bytes_code", 1, "bytes_code is 1 but also"),
        ("seeds", [1], "seeds, seed_results and logs differ"),
        ("seeds", ["x"], "submission.json: ValueError"),
        ("author", "", "no author"),
        ("date", "soon", "date is not YYYY-MM-DD"),
        ("seed_results", {}, "no seed_results of 1"),
        ("seed_results", [], "submission.json: AttributeError"),
        ("name", None, "no name"),
    ],
)
def test_a_submission_that_disagrees_is_caught(name, value, problem, folder):
    state(folder, {**stated_in(folder), name: value})
    found = checked(folder)
    assert found.passed is False and problem in found.figure, found.figure


@pytest.mark.parametrize("name", ["val_bpb", "val_loss", "artifact_bytes", "steps"])
def test_a_seeds_result_that_is_not_its_logs_is_caught(name, folder):
    stated = stated_in(folder)
    stated["seed_results"]["2"][name] *= 1.001
    state(folder, stated)
    found = checked(folder)
    assert found.passed is False and f"{name} of seed 2 is" in found.figure


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"val_bpb": 1}'])
def test_a_submission_that_cannot_be_read_fails(text, folder):
    (folder / "submission.json").write_text(text)
    found = checked(folder)
    assert found.passed is False and found.figure.startswith("submission.json: ")


@pytest.mark.parametrize(
    "text, missing",
    [
        ("val_bpb 1.8017, 3,516,193 bytes, seeds 1, 2, 3", None),
        ("val_bpb 1.80175, 3516193 bytes, seeds 1, 2, 3", None),
        ("val_bpb 1.8018, 3,516,193 bytes, seeds 1, 2, 3", "1.8017"),
        ("val_bpb 11.8017, 3,516,193 bytes, seeds 1, 2, 3", "1.8017"),
        ("val_bpb 1.8017, 3,516,194 bytes, seeds 1, 2, 3", "3,516,193"),
        ("val_bpb 1.8017, 13,516,193 bytes, seeds 1, 2, 3", "3,516,193"),
        ("val_bpb 1.8017, 3,516,193,000 bytes, seeds 1, 2, 3", "3,516,193"),
        ("val_bpb 1.8017, 3,516,193 bytes, seeds 1, 22, 3", "2"),
    ],
)
def test_a_readme_says_score_bytes_and_seeds(text, missing, folder):
    (folder / "README.md").write_text(text)
    found = checked(folder)
    assert found.passed is (missing is None)
    if missing:
        assert found.figure == f"README.md does not say {missing}"


def test_a_log_of_another_seed_is_caught(folder):
    edit(folder / "train_seed2.log", ('"seed": 2,', '"seed": 4,'))
    found = checked(folder)
    assert found.passed is False and "the seed of train_seed2.log is 4" in found.figure


def test_one_artifact_for_two_seeds_is_caught(folder):
    first, second = (logs_by_seed(folder)[seed].artifact_sha256 for seed in (1, 2))
    edit(folder / "train_seed2.log", (second, first))
    found = checked(folder)
    assert found.passed is False and "logs of different seeds name one artifact" in found.figure


def test_seeds_may_differ_in_what_is_the_machines(folder):
    edit(folder / "train_seed2.log", ('"checkpoint_every": 0.0', '"checkpoint_every": 60.0'))
    assert checked(folder).passed, checked(folder).figure
    changes = [('"muon_wd": 0.04', '"muon_wd": 0.05'), ('"qk_gain_init": 1.5', '"qk_gain_init": 2')]
    edit(folder / "train_seed2.log", *changes)
    found = checked(folder)
    assert found.passed is False
    assert "configurations differ in muon_wd, qk_gain_init" in found.figure
