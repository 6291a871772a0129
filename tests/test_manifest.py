"""data/manifest.py: where data and tokenizer are, and what is noted of them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import manifest
from commands import BadInput
from manifest import (
    DEMO,
    FINEWEB,
    FINEWEB_TOKENIZER,
    Manifest,
    command_to_train,
    find_data,
    find_folder,
    find_tokenizer,
    read_manifest,
)


def make_shards(folder: Path, split: str = "val") -> Path:
    """Make a folder with what looks like a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"x_{split}_000000.bin").touch()
    return folder


def make_file(path: Path) -> Path:
    """Make an empty file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def note_tokenizer(folder: Path, path: str, name: str = "manifest.json") -> None:
    """Write a manifest that names a tokenizer."""
    (folder / name).write_text(json.dumps({"tokenizer": {"file": path}}))


@pytest.fixture
def bases(tmp_path) -> tuple[Path, Path]:
    """Two folders for the working folder and the repository."""
    found = (tmp_path / "here", tmp_path / "repository")
    for base in found:
        base.mkdir()
    return found


# ---- The manifest
@pytest.mark.parametrize("name", ["manifest.json", "meta.json"])
def test_both_names_of_a_manifest_are_read(name, tmp_path):
    (tmp_path / name).write_text('{"val": {"bytes": 7}, "tokenizer": {"file": "t.model"}}')
    found = read_manifest(tmp_path)
    assert found.name == name
    assert found.table("val") == {"bytes": 7}
    assert found.tokenizer == "t.model"


def test_what_a_manifest_does_not_say_is_empty(tmp_path):
    assert read_manifest(tmp_path) == Manifest("", {})
    for content in ({}, {"tokenizer": 7, "val": []}, {"tokenizer": {"file": 7}}):
        found = Manifest("manifest.json", content)
        assert found.table("val") == {} and found.tokenizer is None


@pytest.mark.parametrize(
    "content, said",
    [("{", "cannot be read as JSON"), ("\xff", "cannot be read as JSON"), ("[]", "no JSON object")],
)
def test_a_damaged_manifest_is_bad_input(content, said, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(BadInput, match=f"manifest.json.* {said}"):
        read_manifest(tmp_path)


# ---- The folder
def test_the_given_folder_is_taken_before_all_others(bases, tmp_path):
    make_shards(bases[0] / FINEWEB)
    assert find_folder(tmp_path / "given", bases=bases) == tmp_path / "given"


def test_a_folder_is_the_first_name_that_exists_below_a_base(bases):
    assert find_folder(None, bases=bases) is None
    demo = make_shards(bases[1] / DEMO)
    assert find_folder(None, bases=bases) == demo
    in_repository = make_shards(bases[1] / FINEWEB)
    assert find_folder(None, bases=bases) == in_repository
    here = make_shards(bases[0] / FINEWEB)
    assert find_folder(None, bases=bases) == here
    stated = make_shards(bases[1] / "of/a/log")
    assert find_folder(None, ("of/a/log", FINEWEB), bases) == stated


def test_the_working_folder_comes_before_the_repository(bases, monkeypatch):
    monkeypatch.chdir(bases[0])
    monkeypatch.setattr(manifest, "ROOT", bases[1])
    in_repository = make_shards(bases[1] / FINEWEB)
    assert find_folder(None) == in_repository
    here = make_shards(bases[0] / FINEWEB)
    assert find_folder(None) == here


# ---- The tokenizer
def test_a_tokenizer_is_the_first_of_these_that_is_there(bases):
    folder = make_shards(bases[0] / "datasets/fineweb10B_sp512")
    note_tokenizer(folder, "../noted.model")
    # From the last choice to the first, each is taken before those that are there already.
    places = [
        bases[1] / FINEWEB_TOKENIZER,
        bases[0] / FINEWEB_TOKENIZER,
        bases[0] / "tokenizers/fineweb_512_bpe.model",
        bases[0] / "datasets/noted.model",
        folder / "tokenizer.model",
        bases[0] / "of/a/log.model",
    ]
    for place in places:
        make_file(place)
        assert find_tokenizer(folder, stated="of/a/log.model", bases=bases) == place
    given = make_file(bases[0] / "given.model")
    assert find_tokenizer(folder, given, "of/a/log.model", bases) == given


def test_a_tokenizer_that_is_given_and_absent_is_replaced_by_no_other(bases):
    folder = make_shards(bases[0] / "shards")
    make_file(folder / "tokenizer.model")
    with pytest.raises(BadInput, match="no tokenizer at given.model: name it with --tokenizer"):
        find_tokenizer(folder, Path("given.model"), bases=bases)


def test_where_a_tokenizer_was_looked_for_is_said(bases):
    folder = make_shards(bases[0] / "fineweb10B_sp7")
    with pytest.raises(BadInput) as said:
        find_tokenizer(folder, bases=bases)
    for place in (
        folder / "tokenizer.model",
        folder.parent.parent / "tokenizers/fineweb_7_bpe.model",
        bases[0] / FINEWEB_TOKENIZER,
        bases[1] / FINEWEB_TOKENIZER,
    ):
        assert str(place) in str(said.value)


def test_a_folder_at_the_root_is_looked_at_like_any(bases):
    with pytest.raises(BadInput, match="/fineweb10B_sp7/tokenizer.model or /tokenizers/"):
        find_tokenizer(Path("/fineweb10B_sp7"), bases=bases)


# ---- Both
def test_data_are_shards_and_their_tokenizer(bases):
    folder = make_shards(bases[0] / FINEWEB)
    tokenizer = make_file(bases[0] / FINEWEB_TOKENIZER)
    assert find_data(bases=bases) == (folder, tokenizer)
    stated = make_shards(bases[1] / "of/a/log")
    model = make_file(bases[1] / "of/a/log/tokenizer.model")
    assert find_data(stated=("of/a/log", "gone.model"), bases=bases) == (stated, model)


def test_data_that_are_not_there_are_bad_input(bases):
    with pytest.raises(BadInput, match="no data: neither .* nor data/demo is here"):
        find_data(bases=bases)
    folder = make_shards(bases[0] / "training alone", "train")
    with pytest.raises(BadInput, match="training alone is not a folder with validation shards"):
        find_data(folder, bases=bases)
    with pytest.raises(BadInput, match="nowhere is not a folder with validation shards"):
        find_data(Path("nowhere"), bases=bases)


def test_the_command_that_trains_works_from_here(tmp_path, monkeypatch):
    (tmp_path / "he re").mkdir()
    monkeypatch.chdir(tmp_path / "he re")
    folder = Path("data sets")
    tokenizer = tmp_path / "t.model"
    script = shlex.quote(str(manifest.TRAINER))
    assert command_to_train(folder, tokenizer, 512, "torchrun") == (
        f"DATA_PATH='data sets' TOKENIZER_PATH={tokenizer} VOCAB_SIZE=512 torchrun {script}"
    )
