"""What is where: the data that a log names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import record_folder
from commands import BadInput
from run_logs import Log


@pytest.fixture
def run_of(data_folder, tmp_path) -> Log:
    """The log of a run beside whose logs/ are its data, with the tokenizer elsewhere."""
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "a.txt"
    log.write_text("=" * 100 + "\ndata:mine tokenizer:moved.model sha256:00\n")
    data = Path(shutil.copytree(data_folder, tmp_path / "mine"))
    (data / "tokenizer.model").rename(tmp_path / "moved.model")
    manifest = dict(tokenizer=dict(file="../moved.model"))
    (data / "manifest.json").write_text(json.dumps(manifest))
    return Log(log)


def test_the_log_of_an_own_run_says_which_data(run_of, data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(data_folder)
    found = record_folder.data_of(run_of, None, None)
    assert [path.resolve() for path in found] == [tmp_path / "mine", tmp_path / "moved.model"]


def test_the_manifest_says_which_tokenizer(run_of, tmp_path):
    found = record_folder.data_of(None, tmp_path / "mine", None)
    assert found.tokenizer.resolve() == tmp_path / "moved.model"


def test_what_is_asked_for_comes_first(run_of, data_folder):
    tokenizer = data_folder / "tokenizer.model"
    found = record_folder.data_of(run_of, data_folder, tokenizer)
    assert found == (data_folder, tokenizer)


def test_a_tokenizer_that_is_not_there_is_refused(run_of, tmp_path):
    with pytest.raises(BadInput, match="--tokenizer .* is not a file"):
        record_folder.data_of(run_of, None, tmp_path / "absent.model")


def test_logs_are_known_by_the_seeds_in_their_names(tmp_path):
    for name in ("train_seed7.log", "train_seed12.log"):
        (tmp_path / name).write_text("")
    assert list(record_folder.logs_by_seed(tmp_path)) == [12, 7]
    (tmp_path / "train_seed07.log").write_text("")
    with pytest.raises(BadInput, match="a second one of its seed"):
        record_folder.logs_by_seed(tmp_path)
