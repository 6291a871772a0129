"""data/manifest.py: where data and tokenizer are, and what is noted of them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import manifest
import train_gpt
from commands import BadInput
from manifest import (
    DEMO,
    FINEWEB,
    Manifest,
    command_to_train,
    find_data,
    find_folder,
    find_tokenizer,
    read_manifest,
)
from train_gpt import UserError


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
PREFERRED = FINEWEB[0]


def test_the_given_folder_is_taken_before_all_others(bases, tmp_path):
    make_shards(bases[0] / PREFERRED)
    assert find_folder(tmp_path / "given", bases=bases) == tmp_path / "given"


def test_a_folder_is_the_first_name_that_exists_below_a_base(bases):
    assert find_folder(None, bases=bases) is None
    demo = make_shards(bases[1] / DEMO)
    assert find_folder(None, bases=bases) == demo
    # From the last choice to the first, in the repository and here.
    for variant in reversed(FINEWEB):
        for base in reversed(bases):
            folder = make_shards(base / variant)
            assert find_folder(None, bases=bases) == folder
    stated = make_shards(bases[1] / "of/a/log")
    assert find_folder(None, ("of/a/log", PREFERRED), bases) == stated


def test_a_download_that_was_stopped_is_no_data(tmp_path, monkeypatch):
    """It has left a folder without shards, before another variant that is whole."""
    first, second = FINEWEB[:2]
    (tmp_path / first).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_folder(None, bases=[tmp_path]) is None
    assert train_gpt.find_fineweb(0) is None
    whole = make_shards(tmp_path / second)
    assert find_folder(None, bases=[tmp_path]) == whole
    assert train_gpt.find_fineweb(0) == (Path(second), "the only one that is here")


def test_the_working_folder_comes_before_the_repository(bases, monkeypatch):
    monkeypatch.chdir(bases[0])
    monkeypatch.setattr(manifest, "ROOT", bases[1])
    in_repository = make_shards(bases[1] / PREFERRED)
    assert find_folder(None) == in_repository
    here = make_shards(bases[0] / PREFERRED)
    assert find_folder(None) == here


# ---- The tokenizer
def test_a_tokenizer_is_the_first_of_these_that_is_there(bases):
    folder = make_shards(bases[0] / "datasets/fineweb10B_sp512")
    expected = [make_file(bases[0] / "tokenizers/fineweb_512_bpe.model")]
    assert find_tokenizer(folder, bases=bases) == expected[-1]
    expected.append(make_file(folder / "tokenizer.model"))
    assert find_tokenizer(folder, bases=bases) == expected[-1]
    note_tokenizer(folder, "../noted.model")
    expected.append(make_file(bases[0] / "datasets/noted.model"))
    assert find_tokenizer(folder, bases=bases) == expected[-1]
    expected.append(make_file(bases[0] / "of/a/log.model"))
    assert find_tokenizer(folder, stated="of/a/log.model", bases=bases) == expected[-1]
    given = make_file(bases[0] / "given.model")
    assert find_tokenizer(folder, given, "of/a/log.model", bases) == given


@pytest.mark.parametrize("folder", ["shards", "mytext_sp512"])
def test_no_other_tokenizer_takes_the_place_of_one_that_is_absent(folder, bases):
    made = make_shards(bases[0] / "datasets" / folder)
    make_file(bases[0] / "data/tokenizers/fineweb_1024_bpe.model")
    with pytest.raises(BadInput, match=r"no tokenizer at .*: name its own with --tokenizer"):
        find_tokenizer(made, bases=bases)
    with pytest.raises(BadInput, match="no tokenizer at given.model"):
        find_tokenizer(made, Path("given.model"), bases=bases)


# How a folder says which tokenizer made its shards: folder's name, manifest, files there.
LAYOUTS = {
    "export": ("datasets/fineweb10B_sp512", None, ["tokenizers/fineweb_512_bpe.model"]),
    "export of case operators": (
        "datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
        None,
        ["tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"],
    ),
    "export of bytes": ("datasets/fineweb10B_byte260", None, []),
    "bytes by the manifest": ("datasets/mine", {"kind": "bytes"}, []),
    "manifest": ("datasets/mine_sp512", {"file": "../../t.model"}, ["t.model"]),
    "manifest before a file": (
        "datasets/mine",
        {"file": "t.model"},
        ["datasets/mine/t.model", "datasets/mine/tokenizer.model"],
    ),
    "file": ("datasets/mine", None, ["datasets/mine/tokenizer.model"]),
    "file before the name": (
        "datasets/fineweb10B_sp512",
        None,
        ["tokenizers/fineweb_512_bpe.model", "datasets/fineweb10B_sp512/tokenizer.model"],
    ),
    "nothing": ("datasets/mine", None, []),
    "another's": ("datasets/mine_sp512", None, ["tokenizers/fineweb_512_bpe.model"]),
    "name without a file": ("datasets/fineweb10B_sp512", None, []),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_commands_and_training_find_the_same_tokenizer(layout, tmp_path):
    """train_gpt.py stands alone, so the rule is written twice: this holds both to one result."""
    name, noted, files = LAYOUTS[layout]
    folder = make_shards(tmp_path / name)
    if noted is not None:
        (folder / "manifest.json").write_text(json.dumps({"tokenizer": noted}))
    for file in files:
        make_file(tmp_path / file)
    found = []
    for find, error in ((find_tokenizer, BadInput), (train_gpt.find_tokenizer, UserError)):
        try:
            found.append(find(folder))
        except error:
            found.append(None)
    assert found[0] == found[1]
    assert (found[0] is None) == (layout in ("nothing", "another's", "name without a file"))


def test_commands_and_training_know_the_same_exports():
    assert train_gpt.FINEWEB_VARIANTS == manifest.FINEWEB_VARIANTS
    for folder in manifest.FINEWEB:
        name = Path(folder).name
        found = train_gpt.EXPORT_NAME.fullmatch(name)
        assert found is None or found.groups() == manifest.EXPORT.fullmatch(name).groups()


# ---- Both
def test_data_are_shards_and_their_tokenizer(bases):
    folder = make_shards(bases[0] / "data/datasets/fineweb10B_sp1024")
    tokenizer = make_file(bases[0] / "data/tokenizers/fineweb_1024_bpe.model")
    assert find_data(bases=bases) == (folder, tokenizer)
    stated = make_shards(bases[1] / "of/a/log")
    model = make_file(bases[1] / "of/a/log/tokenizer.model")
    assert find_data(stated=("of/a/log", "gone.model"), bases=bases) == (stated, model)


def test_a_tokenizer_with_another_digest_than_the_manifest_says_is_bad_input(bases):
    folder = make_shards(bases[0] / "mine")
    make_file(folder / "tokenizer.model")
    noted = {"tokenizer": {"file": "tokenizer.model", "sha256": "0" * 64}}
    (folder / "manifest.json").write_text(json.dumps(noted))
    with pytest.raises(BadInput, match="is not the tokenizer of .*mine"):
        find_data(folder, bases=bases)
    with pytest.raises(UserError, match="is not the tokenizer of .*mine"):
        train_gpt.find_tokenizer(folder)


def test_data_that_are_not_there_are_bad_input(bases):
    with pytest.raises(BadInput, match="no data: neither .* nor data/demo is here"):
        find_data(bases=bases)
    folder = make_shards(bases[0] / "training alone", "train")
    (folder / "x_val_bytes_000000.bin").touch()
    with pytest.raises(BadInput, match="training alone is not a folder with validation shards"):
        find_data(folder, bases=bases)
    with pytest.raises(BadInput, match="nowhere is not a folder with validation shards"):
        find_data(Path("nowhere"), bases=bases)


def test_the_command_that_trains_works_from_here(tmp_path, monkeypatch):
    (tmp_path / "he re").mkdir()
    monkeypatch.chdir(tmp_path / "he re")
    script = shlex.quote(str(manifest.TRAINER))
    assert command_to_train(Path("data sets"), "torchrun") == (
        f"DATA_PATH='data sets' torchrun {script}"
    )
