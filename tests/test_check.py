"""data/check.py: what it finds in a folder of shards, whole and harmed in every way."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import check
import fineweb
import scan
from conftest import BOS, VOCAB_SIZE, documents, write_shard
from corpora import train_of_kind, train_tokenizer, write_dataset, write_documents
from files import digest
from shards import read_shard
from tokenizer import BYTE_TOKENIZER

TRAIN = "x_train_000000.bin"
VAL = "x_val_000000.bin"


@pytest.fixture
def folder(data_folder: Path, tmp_path: Path) -> Path:
    """A copy of conftest's data with a manifest of its files."""
    folder = tmp_path / "own"
    shutil.copytree(data_folder, folder)
    write_manifest(folder)
    return folder


def write_manifest(folder: Path, **changes: object) -> None:
    """Write a manifest of the files that are there, with these entries more or changed."""
    files = {}
    for path in folder.iterdir():
        if path.suffix in (".bin", ".model"):
            files[path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    content = {"format": 1, "vocabulary_size": VOCAB_SIZE, "files": files, **changes}
    (folder / "manifest.json").write_text(json.dumps(content))


def tokens(folder: Path, name: str) -> list[int]:
    """Return the tokens of a shard."""
    return read_shard(folder / name).tolist()


def run(
    folder: Path, capsys: pytest.CaptureFixture, *more: str
) -> tuple[int, dict[str, tuple[str, str]], str]:
    """Return the exit status, {check: (PASS, FAIL or -, figure)} and what is on standard error."""
    status = check.main([str(folder), *more])
    said = capsys.readouterr()
    rows = {}
    for line in said.out.split("\n\n")[0].splitlines():
        # Two words become one name.
        line = re.sub(r"^(byte|known) (files|split)", r"\1_\2", line)
        name, word, figure = line.split(None, 2)
        rows[name] = (word, figure)
    return status, rows, said.err


def words(rows: dict[str, tuple[str, str]], *names: str) -> list[str]:
    """Return PASS, FAIL or - of these checks."""
    return [rows[name][0] for name in names]


# ---- Whole data
def test_a_whole_folder_passes_and_its_counts_are_those_of_its_text(folder, capsys):
    texts = {
        "val": documents()[::10],
        "train": [text for i, text in enumerate(documents()) if i % 10],
    }
    facts = {}
    for split, held in texts.items():
        facts[split] = {
            "documents": len(held),
            "bytes": sum(len(text.encode()) for text in held),
            "tokens": len(tokens(folder, f"x_{split}_000000.bin")),
        }
    write_manifest(folder, **facts)
    status, rows, errors = run(folder, capsys, "--json", str(folder / "found.json"))
    assert (status, errors) == (0, "")
    passed = ["shards", "manifest", "tokenizer", "ids", "bytes", "lossless", "encoding"]
    passed += ["overlap", "counts"]
    assert sorted(rows) == sorted([*passed, "byte_files"])
    assert set(words(rows, *passed)) == {"PASS"} and rows["byte_files"][0] == "-"
    found = json.loads((folder / "found.json").read_text())
    for split, fact in facts.items():
        assert {key: found["counts"][split][key] for key in fact} == fact
    assert [row["name"].replace(" ", "_") for row in found["checks"]] == list(rows)
    number = len(texts["val"])
    assert f"{number} of {number} documents" in rows["lossless"][1]


def test_the_size_of_the_pieces_that_are_read_changes_nothing(folder, capsys, monkeypatch):
    plant_overlap(folder)
    whole = run(folder, capsys)
    monkeypatch.setattr(scan, "PIECE_TOKENS", 1000)
    assert run(folder, capsys) == whole


def test_the_documents_of_any_pieces_are_the_documents(folder, monkeypatch):
    ids = np.array(tokens(folder, VAL), dtype=np.uint16)
    expected = [part.tolist() for part in np.split(ids, np.flatnonzero(ids == BOS)[1:])]
    for size in (1, 7, len(ids)):
        monkeypatch.setattr(scan, "PIECE_TOKENS", size)
        found = scan.whole_documents([folder / VAL], check.tqdm(disable=True))
        assert [part.tolist() for parts in found for part in parts] == expected


def test_a_gap_in_the_numbers_is_said_and_does_not_fail(folder, capsys):
    ids = tokens(folder, TRAIN)
    (folder / TRAIN).unlink()
    # Some of many shards, which begin within a document.
    write_shard(folder / "x_train_000003.bin", ids[1:])
    write_manifest(folder)
    status, rows, _ = run(folder, capsys)
    assert status == 0 and "train shard" not in rows["shards"][1]
    assert "train begins with id" in rows["ids"][1]
    write_shard(folder / "x_train_000006.bin", ids)
    write_manifest(folder)
    status, rows, _ = run(folder, capsys)
    assert status == 0 and "train shard 4 is not there (2 numbers are missing)" in rows["shards"][1]


def test_a_manifest_that_lists_no_files_faults_no_shard(folder, capsys):
    write_manifest(folder, files={}, tokenizer={"file": "tokenizer.model", "sha256": "0" * 64})
    status, rows, _ = run(folder, capsys)
    assert status == 1 and "has another SHA-256" in rows["manifest"][1]
    assert "is not in manifest.json" not in rows["manifest"][1]


def test_a_large_split_is_encoded_again_in_part(folder, capsys, monkeypatch):
    held_out = documents()[::10]
    size = sum(len(text.encode()) for text in held_out)
    monkeypatch.setattr(check, "SAMPLE_BYTES", -(-size // 3))
    _, rows, _ = run(folder, capsys)
    third = -(-len(held_out) // 3)
    assert f"{third} of {third} documents" in rows["lossless"][1]


# ---- What is wrong with it
HARMS = []


def fails(name: str, said: str) -> Callable:
    """Note a function that harms a folder, so that this check fails and says so."""

    def note(harm: Callable[[Path], None]) -> Callable[[Path], None]:
        HARMS.append(pytest.param(harm, name, said, id=harm.__name__))
        return harm

    return note


def change_bytes(folder: Path, start: int, new: bytes, name: str = VAL) -> None:
    """Write these bytes over a shard's."""
    content = bytearray((folder / name).read_bytes())
    content[start : start + len(new)] = new
    (folder / name).write_bytes(content)
    write_manifest(folder)


def cut(folder: Path, size: int) -> None:
    """Shorten a shard to so many bytes."""
    (folder / VAL).write_bytes((folder / VAL).read_bytes()[:size])
    write_manifest(folder)


def append(folder: Path, *ids: int, name: str = VAL) -> None:
    """Append tokens to a shard."""
    write_shard(folder / name, [*tokens(folder, name), *ids])
    write_manifest(folder)


@fails("shards", "tokens in its header")
def a_token_is_missing(folder):
    cut(folder, -2)


@fails("shards", "no token shard")
def half_a_header(folder):
    cut(folder, 500)


@fails("shards", "no token shard: magic")
def another_format(folder):
    change_bytes(folder, 0, b"PK\3\4")


@fails("shards", "version 1")
def another_version(folder):
    change_bytes(folder, 4, b"\2", TRAIN)


@fails("shards", "the val split is empty")
def an_empty_split(folder):
    write_shard(folder / VAL, [])
    write_manifest(folder)


@fails("shards", "there is no train split")
def no_training_shards(folder):
    (folder / TRAIN).unlink()


@fails("ids", f"id {VOCAB_SIZE} in val")
def an_id_beyond_the_pieces(folder):
    append(folder, VOCAB_SIZE)


@fails("ids", "val begins with id")
def no_first_bos(folder):
    write_shard(folder / VAL, tokens(folder, VAL)[1:])
    write_manifest(folder)


@fails("ids", "val has 2 ids for unknown (3)")
def unknown_pieces(folder):
    append(folder, 3, 3)


@fails("ids", "train has 1 ids for padding (0)")
def padding(folder):
    append(folder, 0, name=TRAIN)


@fails("bytes", "decoded")
def one_byte_of_a_character_alone(folder):
    append(folder, BOS, 4 + 0xE2)


@fails("overlap", "1 of")
def plant_overlap(folder):
    """The last validation document begins in one training shard and ends in the next."""
    held_out = tokens(folder, VAL)
    last = held_out[len(held_out) - held_out[::-1].index(BOS) - 1 :]
    write_shard(folder / "x_train_000001.bin", [BOS, 70, 71, *last[:9]])
    write_shard(folder / "x_train_000002.bin", last[9:])
    write_manifest(folder)


@fails("manifest", f"{TRAIN} has another SHA-256")
def another_content(folder):
    content = bytearray((folder / TRAIN).read_bytes())
    content[-1] ^= 1
    (folder / TRAIN).write_bytes(content)


@fails("manifest", "x_train_000001.bin is not in")
def a_shard_that_is_not_listed(folder):
    shutil.copy(folder / TRAIN, folder / "x_train_000001.bin")


@fails("manifest", "x_train_000001.bin is not there")
def a_listed_shard_that_is_not_there(folder):
    a_shard_that_is_not_listed(folder)
    write_manifest(folder)
    (folder / "x_train_000001.bin").unlink()


@fails("counts", "but manifest.json says 1")
def other_counts(folder):
    write_manifest(folder, val={"documents": 1})


@fails("shards", "val shard 0 is not there (1 number is missing): a score would leave out")
def a_gap_in_the_validation_split(folder):
    (folder / VAL).rename(folder / "x_val_000001.bin")
    write_manifest(folder)


@fails("shards", "train shards of 2 data sets (x, y)")
def two_data_sets(folder):
    shutil.copy(folder / TRAIN, folder / "y_train_000000.bin")
    write_manifest(folder)


@fails("ids", "has no BOS (1): its documents have no beginnings")
def no_bos_at_all(folder):
    write_shard(folder / VAL, [token for token in tokens(folder, VAL) if token != BOS])
    write_manifest(folder)


@fails("encoding", "x_train_000001.bin, token")
def a_shard_of_another_vocabulary(folder):
    backwards = [text[::-1] for text in documents()]
    other = train_tokenizer(folder.parent / "other.model", backwards, VOCAB_SIZE)
    write_documents(folder / "x_train_000001.bin", documents()[:20], other)
    write_manifest(folder)


@fails("counts", "tokens, but manifest.json says 99999")
def a_part_of_the_validation_split(folder):
    write_manifest(folder, val={"tokens": 99999})


@fails("tokenizer", "case_operators")
def operators_that_the_tokenizer_lacks(folder):
    write_manifest(folder, tokenizer={"case_operators": True})


def write_byte_file(folder: Path, sizes: list[int], name: str = "x_val_bytes_000000.bin") -> None:
    """Write a byte file, which has the format of a shard, and list it."""
    write_shard(folder / name, sizes)
    write_manifest(folder)


def sizes_of(folder: Path) -> list[int]:
    """The bytes behind each token of the validation shard."""
    pieces = scan.Pieces(folder / "tokenizer.model")
    return scan.Sizes(pieces).read(np.array(tokens(folder, VAL), dtype=np.uint16)).tolist()


@fails("byte_files", "not of these shards, get them again")
def a_byte_file_of_other_shards(folder):
    write_byte_file(folder, [0 if size == 0 else 3 for size in sizes_of(folder)])


@fails("byte_files", "which stands for none: not of this shard")
def a_byte_file_with_bytes_behind_bos(folder):
    write_byte_file(folder, [5, *sizes_of(folder)[1:]])


@fails("byte_files", "sizes for")
def a_byte_file_that_is_too_short(folder):
    write_byte_file(folder, sizes_of(folder)[:-1])


@fails("byte_files", "belongs to no validation shard")
def a_stray_byte_file(folder):
    write_byte_file(folder, sizes_of(folder))
    write_byte_file(folder, [0], "x_val_bytes_000001.bin")


@fails("tokenizer", "384 pieces, but")
def a_tokenizer_of_another_size(folder):
    write_manifest(folder, vocabulary_size=512)


@fails("manifest", "model has another SHA")
def another_tokenizer(folder):
    write_manifest(folder, tokenizer={"sha256": "0"})


@fails("tokenizer", "it needs a piece ▁ of its own")
def a_tokenizer_without_a_space(folder):
    path = folder / "tokenizer.model"
    # The piece in the file, behind its length.
    space = b"\x0a\x03" + "▁".encode()
    path.write_bytes(path.read_bytes().replace(space, b"\x0a\x03" + "☃".encode()))
    write_manifest(folder)


@fails("tokenizer", "not a Sentence")
def a_tokenizer_that_is_none(folder):
    (folder / "tokenizer.model").write_bytes(b"no model")


@pytest.mark.parametrize("harm, name, said", HARMS)
def test_what_is_wrong_fails_with_its_reason(folder, capsys, harm, name, said):
    harm(folder)
    status, rows, errors = run(folder, capsys)
    assert (status, errors) == (1, "")
    assert words(rows, name) == ["FAIL"] and said in rows[name][1]


def test_byte_files_are_no_text_and_are_compared(folder, capsys):
    before = run(folder, capsys)[1]
    write_byte_file(folder, sizes_of(folder))
    status, rows, _ = run(folder, capsys)
    assert status == 0 and rows["byte_files"][0] == "PASS"
    assert rows["bytes"] == before["bytes"] and rows["overlap"] == before["overlap"]


def test_a_fault_of_the_shards_leaves_the_rest_unchecked_and_said_so(folder, capsys):
    (folder / VAL).write_bytes(b"short")
    _, rows, _ = run(folder, capsys)
    assert rows["overlap"] == ("-", "not checked: shards are wrong")


# ---- Tokenizers
def test_another_tokenizer_of_the_same_size_is_suspected(folder, capsys):
    backwards = [text[::-1] for text in documents()]
    other = train_tokenizer(folder / "other.model", backwards, VOCAB_SIZE)
    _, rows, _ = run(folder, capsys, "--tokenizer", str(other))
    assert rows["encoding"][0] == "FAIL"
    assert "did another tokenizer make these shards? Name theirs" in rows["encoding"][1]


@pytest.mark.parametrize("added, word", [([], "PASS"), (["\ufb01"], "FAIL")])
def test_a_tokenizer_that_normalizes_fails_only_where_it_changes_the_text(
    folder, capsys, added, word
):
    one = train_tokenizer(folder / "one.model", documents(), VOCAB_SIZE)
    write_documents(folder / VAL, [*documents()[::10], *added], one)
    write_manifest(folder)
    other = train_tokenizer(
        folder / "other.model", documents(), VOCAB_SIZE, normalization_rule_name="nfkc"
    )
    _, rows, _ = run(folder, capsys, "--tokenizer", str(other))
    assert words(rows, "tokenizer", "lossless") == ["PASS", word]
    assert "it normalizes" in rows["tokenizer"][1]


def normalizing(path: Path) -> Path:
    """Train a tokenizer that normalizes."""
    return train_tokenizer(path, documents(), VOCAB_SIZE, normalization_rule_name="nmt_nfkc")


CHANGE = dict(documents=9, documents_changed=3, bytes_before=1000, bytes_changed=5, bytes=998)


def test_what_normalizing_has_changed_is_said_where_it_is_stated(folder, capsys):
    model = normalizing(folder / "tokenizer.model")
    for name, texts in ((TRAIN, documents()[5:]), (VAL, documents()[:5])):
        write_documents(folder / name, texts, model)
    write_manifest(folder)
    status, rows, _ = run(folder, capsys)
    assert status == 0 and rows["normalized"][0] == "-"
    assert rows["normalized"][1].startswith("not stated: the text is the original one, or")
    write_manifest(folder, normalized=CHANGE)
    status, rows, _ = run(folder, capsys)
    assert status == 0 and rows["normalized"][0] == "-"
    assert rows["normalized"][1] == (
        "33.33% of the documents (3 of 9) and 0.500% of the bytes changed, 1,000 bytes became 998; "
        "a score on it is none of the original text's"
    )
    for damaged in ({"share": "some"}, {**CHANGE, "bytes": "many"}):
        write_manifest(folder, normalized=damaged)
        assert words(run(folder, capsys)[1], "normalized") == ["FAIL"]


def test_normalized_text_under_the_name_of_the_challenges_fails(folder, capsys):
    model = normalizing(folder / "tokenizer.model")
    for name, texts in ((TRAIN, documents()[5:]), (VAL, documents()[:5])):
        write_documents(folder / name, texts, model)
    write_manifest(folder, normalized=CHANGE, name="fineweb10B_sp384")
    status, rows, _ = run(folder, capsys)
    assert status == 1 and words(rows, "normalized", "known_split") == ["FAIL", "FAIL"]
    assert "not the challenge's text, but called so" in rows["normalized"][1]


def test_a_tokenizer_that_changes_nothing_has_not_normalized_the_text(folder, capsys):
    assert "normalized" not in run(folder, capsys)[1]
    write_manifest(folder, normalized=CHANGE)
    _, rows, _ = run(folder, capsys)
    assert words(rows, "tokenizer") == ["FAIL"]
    assert "says that it has normalized the text, but it changes none" in rows["tokenizer"][1]


def test_a_tokenizer_without_bytes_fails(folder, capsys):
    other = train_tokenizer(folder / "other.model", documents(), VOCAB_SIZE, byte_fallback=False)
    _, rows, _ = run(folder, capsys, "--tokenizer", str(other))
    assert "it needs a piece for each byte" in rows["tokenizer"][1]


def test_a_space_that_decoding_drops_before_a_document_counts_nothing(folder, capsys):
    model = train_tokenizer(
        folder / "tokenizer.model", documents(), VOCAB_SIZE, add_dummy_prefix=True
    )
    write_documents(folder / TRAIN, documents()[5:], model)
    write_documents(folder / VAL, documents()[:5], model)
    write_manifest(folder)
    status, rows, _ = run(folder, capsys)
    size = sum(len(text.encode()) for text in documents()[:5])
    assert status == 0 and rows["bytes"][1].startswith(f"{size:,} by the pieces, {size:,} decoded")


@pytest.mark.parametrize("case_operators", [False, True])
def test_a_folder_with_a_tokenizer_of_another_kind_passes(case_operators, tmp_path, capsys):
    """Bytes, and letter case as operators."""
    model = BYTE_TOKENIZER
    noted = {"kind": "bytes"}
    size = 260
    if case_operators:
        model = train_of_kind(tmp_path / "t.model", documents(), 600, True)
        noted = {"kind": "sentencepiece", "case_operators": True, "file": "tokenizer.model"}
        size = 600
    folder = write_dataset(tmp_path / "own", model, documents()[5:], documents()[:5])
    write_manifest(folder, vocabulary_size=size, tokenizer=noted)
    # The bar of the tokenizer's training.
    capsys.readouterr()
    status, rows, errors = run(folder, capsys)
    assert (status, errors) == (0, ""), rows
    size = sum(len(text.encode()) for text in documents()[:5])
    assert rows["bytes"][1].startswith(f"{size:,} by the pieces, {size:,} decoded")


# ---- The published export
@pytest.fixture
def small_fineweb(folder, monkeypatch) -> None:
    """The challenge's validation text is that of the folder."""
    held_out = documents()[::10]
    monkeypatch.setattr(fineweb, "DOCUMENTS", len(held_out))
    monkeypatch.setattr(fineweb, "BYTES", sum(len(text.encode()) for text in held_out))


def test_fineweb_is_found_with_its_tokenizer_and_what_differs_is_only_said(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr(fineweb, "DOCUMENTS", 5)
    monkeypatch.setattr(fineweb, "BYTES_TOLERANCE", 1)
    monkeypatch.setattr(check, "MOST_SHARED", 1)
    published = folder.parent / "datasets" / f"fineweb10B_sp{VOCAB_SIZE}"
    published.parent.mkdir()
    (folder.parent / "tokenizers").mkdir()
    (folder / "tokenizer.model").unlink()
    (folder / "manifest.json").unlink()
    folder.rename(published)
    model = train_tokenizer(
        folder.parent / "tokenizers" / f"fineweb_{VOCAB_SIZE}_bpe.model",
        documents(),
        VOCAB_SIZE,
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
    )
    write_documents(published / TRAIN, documents(), model)
    write_documents(published / VAL, documents()[:5], model)
    status, rows, _ = run(published, capsys)
    assert status == 0
    assert words(rows, "tokenizer", "overlap", "bytes") == ["PASS", "-", "PASS"]
    assert "it normalizes" in rows["tokenizer"][1]
    assert "5 of 5 validation documents" in rows["overlap"][1]


def test_an_export_with_much_of_the_validation_text_in_training_fails(
    folder, small_fineweb, capsys, monkeypatch
):
    monkeypatch.setattr(fineweb, "LEAKED_SHARDS", 2)
    published = folder.rename(folder.parent / "fineweb10B_sp384")
    shutil.copy(published / VAL, published / "x_train_000001.bin")
    write_manifest(published)
    status, rows, _ = run(published, capsys)
    assert status == 1 and rows["overlap"][0] == "FAIL"
    assert "no score is valid after training on it" in rows["overlap"][1]


def test_the_published_export_may_come_without_training_shards(folder, small_fineweb, capsys):
    published = folder.rename(folder.parent / "fineweb10B_sp384")
    (published / TRAIN).unlink()
    write_manifest(published)
    status, rows, errors = run(published, capsys)
    assert (status, errors, rows["overlap"]) == (0, "", ("-", "there is no train split"))
    assert "there is no train split" in rows["shards"][1]
    passed = words(rows, "shards", "manifest", "tokenizer", "ids", "bytes")
    assert set(passed) == {"PASS"}


@pytest.mark.parametrize(
    "val, passed",
    [
        (scan.Counts(1, 62_021_846, 50_000, 151_080_891), True),
        (scan.Counts(1, 62_021_632, 50_000, 151_080_891), False),
        (scan.Counts(1, 62_021_846, 49_999, 151_080_891), False),
        (scan.Counts(1, 62_021_846, 50_000, 176_000_000), False),
    ],
)
def test_the_known_constants_of_fineweb_are_compared(val, passed):
    assert check.check_known("sp1024", val).passed is passed


@pytest.mark.parametrize(
    "variant, tokens, passed",
    [
        ("sp8192", 40_541_000, True),
        ("sp8192", 9_662_464, False),
        (fineweb.CASE_OPERATOR_EXPORT, 47_853_000, True),
        (fineweb.CASE_OPERATOR_EXPORT, 9_662_464, False),
        # Nothing is known of its tokens.
        ("sp4096", 45_000_000, True),
    ],
)
def test_the_known_tokens_of_each_export_are_compared(variant, tokens, passed):
    found = check.check_known(variant, scan.Counts(1, tokens, 50_000, 151_080_891))
    assert found.passed is passed
    assert f"{tokens:,} tokens" in found.figure


def test_the_known_constants_are_asked_of_that_split_alone(folder, capsys):
    assert "known" not in run(folder, capsys)[1]
    known = folder.rename(folder.parent / "fineweb10B_sp1024")
    write_manifest(known, vocabulary_size=None)
    check.main([str(known)])
    assert re.search("known split +FAIL", capsys.readouterr().out)


# ---- The command
@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere"], "is not a folder"),
        (["empty"], "holds no token shards"),
        ([f"own/{VAL}"], "is not a folder"),
        (["own", "--tokenizer", "nowhere.model"], "no tokenizer at nowhere.model"),
        (["own", "--json", "nowhere/found.json"], "its folder does not exist"),
        (["broken"], "cannot be read as JSON"),
        (["listed"], "is no JSON object"),
        (["bare"], "no tokenizer at"),
        (["own", "--no-such-option"], "--help lists the options"),
    ],
)
def test_what_cannot_be_checked_is_one_line(folder, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(folder.parent)
    # A repository without FineWeb's tokenizer.
    monkeypatch.setattr("manifest.ROOT", folder.parent)
    for name, text in {"broken": "{", "listed": "[]", "bare": "{}"}.items():
        Path(name).mkdir()
        Path(name, "manifest.json").write_text(text)
        shutil.copy(folder / VAL, name)
    Path("empty").mkdir()
    assert check.main(arguments) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1 and said in errors


def test_an_interruption_is_one_line(folder, capsys, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check_overlap", interrupt)
    assert check.main([str(folder), "--json", str(folder / "found.json")]) == 130
    assert capsys.readouterr().err.count("\n") == 1 and not (folder / "found.json").exists()
