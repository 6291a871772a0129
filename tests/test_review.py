"""Several folders, comparisons, and the two doors to them."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
from scipy import stats

import audit
import review
from commands import BadInput
from field_folder import CLEAN, FIELD, Folder
from field_record import FieldRecord

ADAPTING = FIELD / "adapts_while_scoring"


def rows_of(out: str) -> list[str]:
    """The first column of a table, without its head."""
    return [line.split()[0] for line in out.splitlines()[1:]]


# ---- Many folders
def test_a_folder_of_folders_is_one_table(capsys, tmp_path):
    target = tmp_path / "all.json"
    assert audit.main([str(FIELD), "--json", str(target)]) == 1
    names = rows_of(capsys.readouterr().out)
    assert names == sorted(path.name for path in FIELD.iterdir() if path.is_dir())
    content = json.loads(target.read_text())
    assert [Path(row["folder"]).name for row in content] == names
    assert set(content[0]) >= {"track", "val_bpb", "seeds", "bytes_total", "verdicts", "counts"}


def test_folders_whose_submission_has_another_name_are_in_the_table(tmp_path, capsys):
    for name in ("one", "two"):
        shutil.copytree(CLEAN, tmp_path / name)
    (tmp_path / "two/submission.json").rename(tmp_path / "two/mine.json")
    (tmp_path / "two/list.json").write_text("[1]")
    assert audit.main([str(tmp_path)]) == 0
    assert rows_of(capsys.readouterr().out) == ["one", "two"]


def test_the_table_is_sorted_as_asked_for(capsys):
    folders = [str(FIELD / name) for name in ("one_old_log", "adapts_while_scoring", "two_gpus")]
    for column, first in (
        ("folder", "adapts_while_scoring"),
        ("val_bpb", "adapts_while_scoring"),
        ("fails", "two_gpus"),
        ("bytes", "one_old_log"),
    ):
        audit.main([*folders, "--sort", column])
        assert rows_of(capsys.readouterr().out)[0] == first, column


def test_one_bad_folder_never_stops_the_table(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    folders = [str(CLEAN), str(tmp_path / "empty")]
    assert audit.main(folders) == 2
    told = capsys.readouterr()
    assert rows_of(told.out) == ["clean_three_seeds"]
    assert "empty is no record folder" in told.err
    # What does not hold is worse than what is no record.
    assert audit.main([*folders, str(FIELD / "two_gpus")]) == 1


def test_files_that_make_no_sense_cannot_be_checked(tmp_path, monkeypatch):
    def broken(record: object) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(review, "CLAIM_CHECKS", (broken,))
    found = review.review(FieldRecord(CLEAN))
    assert found.verdicts[0].state == "cannot be checked" and "odd" in found.verdicts[0].text


def test_several_artifacts_at_once_are_refused(tmp_path, capsys):
    (tmp_path / "a.ptz").touch()
    assert audit.main([str(tmp_path / "a.ptz"), str(CLEAN)]) == 2
    assert "name one artifact" in capsys.readouterr().err


def test_json_of_one_folder_has_verdicts_and_places(tmp_path):
    folder = Folder(tmp_path)
    (folder.path / "train_gpt.py").write_text("def eval_ttt():\n    loss.backward()\n")
    target = tmp_path / "one.json"
    audit.main([str(folder.path), "--json", str(target)])
    content = json.loads(target.read_text())
    assert content["places"] == ["train_gpt.py:2 eval_ttt: backward()"]
    assert content["verdicts"][0]["check"] == "score"


def test_folders_that_were_put_aside_are_left_out(tmp_path, capsys):
    for name in ("good", "bad.refused", ".hidden"):
        shutil.copytree(CLEAN, tmp_path / name)
    assert audit.main([str(tmp_path)]) == 0
    assert rows_of(capsys.readouterr().out) == ["good"]


# ---- Comparisons
def test_a_folder_beats_a_score_by_the_rule_of_the_field(capsys):
    assert audit.main([str(ADAPTING), "--beats", "1.0810"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "+0.0436 nats a token better over 3 seeds" in line
    assert "p = 0.000653" in line and "0.005 nats at p < 0.01: it beats it" in line


def test_a_folder_against_another_is_welchs_test():
    bpbs, losses = review.values_of(FieldRecord(ADAPTING))
    others, _ = review.values_of(FieldRecord(CLEAN))
    ratio = statistics.mean(losses) / statistics.mean(bpbs)
    theirs = [bpb * ratio for bpb in others]
    told = review.against_text(FieldRecord(ADAPTING), FieldRecord(CLEAN))
    assert f"{statistics.mean(theirs) - statistics.mean(losses):+.4f} nats" in told
    expected = stats.ttest_ind(
        losses, [value - 0.005 for value in theirs], equal_var=False, alternative="less"
    ).pvalue
    assert math.isclose(review.p_of_lead(losses, theirs), expected)
    other_way = review.against_text(FieldRecord(CLEAN), FieldRecord(ADAPTING))
    assert "it beats it" in told and "does not beat" in other_way


def test_one_seed_has_no_p_and_beats_nothing():
    told = review.beats_text(FieldRecord(FIELD / "one_old_log"), 2.0)
    assert "p cannot be computed" in told and "does not beat" in told
    assert review.p_of_lead([1.0, 1.1], [1.5]) is not None


def test_folders_without_scores_cannot_be_compared(tmp_path):
    with pytest.raises(BadInput, match="cannot be compared"):
        review.values_of(FieldRecord(tmp_path))


@pytest.mark.parametrize("options", [["--beats", "0"], ["--against", "absent"], ["--sort", "luck"]])
def test_options_that_make_no_sense_are_refused_in_one_line(options, capsys):
    assert audit.main([str(CLEAN), *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1
