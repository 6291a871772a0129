"""The tables of records/README.md."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import field_record
import submit
from commands import BadInput
from conftest import ROOT
from field_logs import FieldLog
from leaderboard import ADAPTS, LOGS_ONLY, MARKERS, leaderboard, split_readme, update_leaderboard

FIELD = ROOT / "tests/field_records"
README = f"# Records\n\n{MARKERS[0]}\nold\n{MARKERS[1]}\n\nafter\n"


@pytest.fixture
def records(tmp_path, monkeypatch) -> Path:
    """An empty records/ for the command."""
    (tmp_path / "README.md").write_text(README)
    monkeypatch.setattr(submit, "RECORDS", tmp_path)
    return tmp_path


def enter(
    records: Path, track: str, folder_name: str, artifact: bool = True, **changes: object
) -> Path:
    """Put a record there, of which only submission.json is looked at; return its folder."""
    folder = records / f"track_{track}" / f"2026-01-02_{folder_name}"
    folder.mkdir(parents=True)
    stated = dict(
        name=folder_name,
        author="a|b",
        date="2026-01-02",
        val_bpb=1.5,
        val_bpb_std=0.001,
        bytes_total=1234567,
        seeds=[1, 2],
        hardware="CPU, 2 threads",
        beats=dict(claimed=1.6, nats=0.1, p_value=0.00123, holds=True),
    )
    (folder / "submission.json").write_text(json.dumps({**stated, **changes}))
    if artifact:
        (folder / "final_model_seed1.int6.ptz").touch()
        (folder / "train_gpt.py").write_text("def read_artifact(data, name):\n    ...\n")
    return folder


def test_records_are_ranked_by_track_and_score(records):
    enter(records, "pocket", "Worse", val_bpb=1.9, beats=None)
    enter(records, "pocket", "Better")
    enter(records, "10min_16mb", "Real", val_bpb=1.1, val_bpb_std=None)
    enter(records, "pocket", "Bad.refused", val_bpb=0.1)
    enter(records, "other", "Worst.refused")
    text = leaderboard(records)
    assert re.findall(r"### Track (\w+)|\[(\w+)\]", text) == [
        ("10min_16mb", ""),
        ("", "Real"),
        ("pocket", ""),
        ("", "Better"),
        ("", "Worse"),
    ]
    row = [
        "| 1 | 1.5000 ± 0.0010 | [Better](track_pocket/2026-01-02_Better/)",
        "a\\|b | 2026-01-02 | 2 | 1,234,567 | CPU, 2 threads | 0.00123 against 1.6 |",
    ]
    assert " | ".join(row) in text
    assert "| 1 | 1.1000 | [Real]" in text


def test_records_of_track_b_are_ranked_apart(records):
    enter(records, "pocket", "Fixed")
    enter(records, "pocket", "Adapts", val_bpb=1.4, evaluation_track="B", sliding_val_bpb=1.52)
    enter(records, "pocket", "Worse", val_bpb=1.6, evaluation_track="B", sliding_val_bpb=1.51)
    enter(records, "pocket", "Odd", val_bpb=1.3, evaluation_track="C")
    enter(records, "other", "Only", evaluation_track="B", sliding_val_bpb=1.5)
    text = leaderboard(records)
    fixed, adapting = text.partition("### Track pocket")[2].split(ADAPTS)
    assert re.findall(r"^\| (\d) .*?\[(\w+)\]", fixed, re.M) == [("1", "Fixed")]
    assert re.findall(r"^\| (\d) .*?\[(\w+)\]", adapting, re.M) == [("1", "Adapts"), ("2", "Worse")]
    assert "| 1 | 1.4000 ± 0.0010 | 1.5200 | [Adapts]" in adapting
    assert "not ranked: track_pocket/2026-01-02_Odd/" in adapting
    assert "No record yet." not in text


def test_ablations_are_linked_below_their_tracks_table(records):
    enter(records, "pocket", "Real")
    for track in ("pocket", "other"):
        (records / f"track_{track}/one").mkdir(parents=True)
        (records / f"track_{track}/one/ablation.json").write_text('{"name": "what helps"}')
    text = leaderboard(records)
    assert text.startswith(
        "### Track other\n\nNo record yet.\n\n"
        "- ablation: [what helps](track_other/one/)\n\n### Track pocket\n"
    )
    assert text.endswith("0.00123 against 1.6 |\n\n- ablation: [what helps](track_pocket/one/)\n")
    (records / "track_other/one/ablation.json").write_text("[]")
    with pytest.raises(BadInput, match="ablation.json cannot be linked"):
        leaderboard(records)


def test_without_records_the_leaderboard_says_so(records):
    expected = README.replace("old\n", "\nNo record yet.\n\n")
    assert submit.main(["--leaderboard"]) == 0
    assert (records / "README.md").read_text() == expected
    update_leaderboard(records)
    assert (records / "README.md").read_text() == expected


@pytest.mark.parametrize("changes", [dict(val_bpb="good"), dict(seeds=None), dict(beats=[1])])
def test_a_submission_that_cannot_be_ranked_stands_below_the_table(changes, records):
    enter(records, "pocket", "Odd", **changes)
    enter(records, "pocket", "Good")
    assert submit.main(["--leaderboard"]) == 0
    text = (records / "README.md").read_text()
    assert "| 1 | 1.5000 ± 0.0010 | [Good]" in text
    assert re.search(r"^- not ranked: track_pocket/2026-01-02_Odd/: .*cannot be ranked", text, re.M)


def test_folders_without_an_artifact_are_ranked_apart(records):
    enter(records, "10min_16mb", "Proven", val_bpb=1.2)
    foreign = enter(records, "10min_16mb", "Foreign", artifact=False, val_bpb=1.1)
    shutil.copytree(FIELD / "two_gpus", foreign, dirs_exist_ok=True)
    unreadable = enter(records, "10min_16mb", "Unreadable", artifact=False)
    (unreadable / "submission.json").write_text("{")
    text = leaderboard(records)
    proven, logs_only = text.split(LOGS_ONLY)
    assert "| 1 | 1.2000 ± 0.0010 | [Proven]" in proven and "Foreign" not in proven
    row = "| 1 | 1.1374 | [Example](track_10min_16mb/2026-01-02_Foreign/) | A Person | 2026-04-02 "
    assert row + "| 3 | 15,650,789 | hardware |" in logs_only
    assert "| 2 | - | [2026-01-02_Unreadable](track_10min_16mb/" in logs_only


def test_each_log_is_read_once(records, monkeypatch):
    folder = enter(records, "10min_16mb", "Foreign", artifact=False)
    shutil.copytree(FIELD / "two_gpus", folder, dirs_exist_ok=True)
    read = []
    monkeypatch.setattr(
        field_record, "FieldLog", lambda path, name: read.append(name) or FieldLog(path, name)
    )
    assert "[Example]" in leaderboard(records)
    assert read == sorted(path.name for path in folder.glob("*.log"))


def test_what_others_call_their_record_stays_in_its_cell(records):
    enter(records, "pocket", "Odd", artifact=False, name="a|b](c)\nd", seeds=[1])
    assert "[a\\|b)(c) d](track_pocket/2026-01-02_Odd/)" in leaderboard(records)


def test_a_readme_without_markers_is_left_alone(records, capsys):
    (records / "README.md").write_text("mine")
    assert submit.main(["--leaderboard"]) == 2
    assert MARKERS[0] in capsys.readouterr().err
    assert (records / "README.md").read_text() == "mine"


def test_the_committed_leaderboard_is_what_is_generated():
    before, after = split_readme(ROOT / "records")
    expected = f"{before}\n{leaderboard(ROOT / 'records')}\n{after}"
    assert (ROOT / "records/README.md").read_text(encoding="utf-8") == expected
