"""data/prepare.py: one text in every form gives the same data set, which gives the text back.

Bad input is one line; what stops a build leaves nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard

import check
import dataset
import documents
import prepare
import shards
import tokenizer
import train_gpt
from case_operators import OPERATORS, without_operators
from commands import Stopped
from conftest import ROOT
from conftest import documents as docstrings
from corpora import read_documents, train_tokenizer
from documents import Counts, Documents

END = "\n<|end|>\n"
# A character that is nowhere else in the texts.
RARE = "\u203b"
HOSTILE_TEXTS = [
    "",
    " ",
    "\n",
    "\n\n\n",
    "   three leading and trailing spaces   ",
    "runs of spaces:  2   3    4        8                16" + " " * 100,
    "def f():\n    if x:\n\treturn\t\ty  \n\n",
    "".join(map(chr, range(0x20))),
    "a\x00b\x7f\x85\r\n\r\u2028\u2029\u00a0\u200b\ufeff\ufffd",
    # What normalization would change.
    "e\u0301 \u00e9 \ufb01 \u2126 \u01c4",
    "\u6f22\u5b57\u3001\u304b\u306a \ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f469\u200d\U0001f680\U0001f1eb\U0001f1f7 \U0010ffff\uffff",
    "<s></s><unk><pad><0x41> <s> \u2585 \u2047",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Some 100 KB of documents, in the order of their hashes."""
    return sorted(docstrings(), key=lambda text: hashlib.sha256(text.encode()).digest())


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory) -> Path:
    """The documents as .txt files in folders."""
    return write_folder(tmp_path_factory.mktemp("text"), texts)


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory) -> Path:
    """The output for that folder."""
    out = tmp_path_factory.mktemp("built")
    assert run(out, folder) == 0
    return out


def write_folder(root: Path, texts: list[str], suffix: str = ".txt") -> Path:
    for index, text in enumerate(texts):
        path = root / f"part{index % 3}" / f"{index:04d}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    return root


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    lines = [json.dumps({"id": 1, field: text}) + "\n" for text in texts]
    path.write_text("".join(lines))
    return path


def run(out: Path, *arguments: object, size: int = 512, jobs: int = 1) -> int:
    """Run the command, which builds the data set `t` under a folder; return its exit status."""
    options = ["--name", "t", "--vocab-size", size, "--out", out, "--jobs", jobs, *arguments]
    return prepare.main([str(option) for option in options])


def shards_folder(out: Path) -> Path:
    """The folder of the shards that `run` makes."""
    return out / "datasets" / "t_sp512"


def model_file(out: Path) -> Path:
    """The tokenizer that `run` makes."""
    return out / "tokenizers" / "t_512_bpe.model"


def manifest(out: Path) -> dict:
    return json.loads((shards_folder(out) / "manifest.json").read_text())


def outputs(out: Path) -> dict[str, bytes]:
    """Return the content of the tokenizer and of the shards."""
    found = {}
    for path in out.rglob("*"):
        if path.suffix in (".bin", ".model"):
            found[path.name] = path.read_bytes()
    return found


def left(out: Path) -> list[str]:
    """Return the files that there are, hidden ones too."""
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def read_shard(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return a shard's header (256,) and tokens, without the code under test."""
    return np.fromfile(path, "<i4", count=256), np.fromfile(path, "<u2", offset=1024)


def decode(out: Path, side: str) -> list[str]:
    """Return the documents of a split, as the tokenizer decodes them."""
    return read_documents(sorted(shards_folder(out).glob(f"t_{side}_*.bin")), model_file(out))


def documents_file(path: Path, texts: list[bytes]) -> Documents:
    """Write documents into a file, as they are arranged."""
    path.write_bytes(b"".join(documents.record(text) for text in texts))
    return Documents(path, 0, len(texts), sum(len(text) for text in texts))


def one_line(capsys: pytest.CaptureFixture) -> str:
    """Return what the command wrote to standard error beside its progress bars: one line."""
    said = []
    for line in capsys.readouterr().err.replace("\r", "\n").split("\n"):
        is_bar = any(unit in line for unit in ("it/s", "B/s", "lines/s"))
        if line.strip() and not is_bar:
            said.append(line)
    assert len(said) == 1, said
    return said[0]


# ---- What comes out
def test_shards_decode_to_the_documents_in_the_order_of_their_hashes(built, texts):
    assert decode(built, "val") + decode(built, "train") == texts


def test_headers_and_manifest_say_what_is_there(built, texts):
    found = manifest(built)
    for side in ("train", "val"):
        header, tokens = read_shard(shards_folder(built) / f"t_{side}_000000.bin")
        assert header[:3].tolist() == [20240520, 1, len(tokens)] and not header[3:].any()
        counts = np.bincount(tokens, minlength=512)
        assert counts[:4].tolist() == [0, found[side]["documents"], 0, 0] and len(counts) == 512
        assert tokens[0] == 1
        assert found[side]["tokens"] == len(tokens)
        assert found[side]["bytes"] == sum(len(text.encode()) for text in decode(built, side))
    files = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in outputs(built).items()
    }
    tokenizer = (shards_folder(built) / found["tokenizer"]["file"]).resolve()
    assert tokenizer == (model_file(built)).resolve()
    assert found["tokenizer"]["sha256"] == files.pop("t_512_bpe.model")["sha256"]
    assert found["files"] == files
    assert found["versions"]["sentencepiece"] == sentencepiece.__version__
    assert str(built) not in json.dumps(found)


def test_check_passes_what_was_made(built):
    assert check.main([str(shards_folder(built))]) == 0


def test_train_gpt_counts_the_bytes_of_the_validation_text_exactly(built):
    tokenizer = train_gpt.load_tokenizer(model_file(built), 512)
    tokens = train_gpt.load_validation([shards_folder(built) / "t_val_000000.bin"], 512)
    assert train_gpt.ByteTable(tokenizer).bytes[tokens].sum() == manifest(built)["val"]["bytes"]


FORMS = ["md", "separated", "several", "stdin", "stdin jsonl"]
FORMS += ["jsonl", "jsonl.gz", "jsonl.zst", "txt.gz", "txt.zst"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_documents_gives_the_same_bytes(
    form, built, texts, tmp_path, monkeypatch
):
    whole = END.join(texts).encode()
    if "jsonl" in form:
        whole = write_jsonl(tmp_path / "whole", texts, "body").read_bytes()
    arguments = ["--separator", END.replace("\n", r"\n"), "--text-field", "body"]
    path = tmp_path / f"in.{form}"
    if form == "md":
        path = write_folder(tmp_path, texts, ".md")
    elif form.endswith(".gz"):
        path.write_bytes(gzip.compress(whole[:9999]) + gzip.compress(whole[9999:]))
    elif form.endswith(".zst"):
        skippable = b"\x50\x2a\x4d\x18\x02\0\0\0ab"
        frames = [zstandard.compress(part) for part in (whole[:9999], whole[9999:])]
        path.write_bytes(frames[0] + skippable + frames[1])
    elif form == "jsonl":
        path.write_bytes(whole.replace(b"\n", b"\r\n").rstrip())
    elif form == "several":
        path = write_jsonl(tmp_path / "in.jsonl", texts[::2], "body")
        arguments += [tmp_path / "in.txt"]
        (tmp_path / "in.txt").write_bytes(END.join(texts[1::2]).encode())
    elif form == "separated":
        path = tmp_path / "in.TXT"
        path.write_bytes(whole)
    if form.startswith("stdin"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(whole)))
        path = "-"
        arguments += ["--format", "jsonl" if "jsonl" in form else "text"]
    assert run(tmp_path / "out", path, *arguments) == 0
    assert outputs(tmp_path / "out") == outputs(built)


def test_neither_processes_nor_names_nor_buckets_change_a_byte(built, texts, tmp_path, monkeypatch):
    depths = []
    spill = documents.spill

    def note(found: Iterable[bytes], path: Path) -> list[Documents]:
        depths.append(len(path.name))
        return spill(found, path)

    monkeypatch.setattr(documents, "spill", note)
    monkeypatch.setattr(documents, "BUCKET", 1000)
    monkeypatch.setattr(dataset, "CHUNK", 3000)
    (tmp_path / "text").mkdir()
    source = write_folder(tmp_path / "text", texts[::-1] + texts[:9])
    assert run(tmp_path / "out", source, jobs=2) == 0
    assert outputs(tmp_path / "out") == outputs(built)
    # There were buckets of buckets.
    assert max(depths) > 2
    assert manifest(tmp_path / "out")["duplicates"] == 9


def test_tokens_are_spread_over_shards(built, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "TOKENS_PER_SHARD", 7000)
    assert run(tmp_path, folder) == 0
    found = [read_shard(path) for path in sorted(shards_folder(tmp_path).glob("t_train_*.bin"))]
    assert [header[2] for header, _ in found[:-1]] == [7000] * (len(found) - 1) and len(found) > 2
    _, whole = read_shard(shards_folder(built) / "t_train_000000.bin")
    assert np.array_equal(np.concatenate([tokens for _, tokens in found]), whole)


def test_a_last_shard_that_is_just_full_is_closed_and_none_follows(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "TOKENS_PER_SHARD", 4)
    writer = shards.ShardWriter(tmp_path, "t")
    for part in np.split(np.arange(65_528, 65_536, dtype="<u2"), [3, 3, 7]):
        writer.add(part)
    writer.close()
    assert [shards.count_tokens(path) for path in sorted(tmp_path.iterdir())] == [4, 4]


def test_hostile_texts_survive(texts, tmp_path):
    assert run(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", HOSTILE_TEXTS + texts)) == 0
    found = decode(tmp_path / "out", "train") + decode(tmp_path / "out", "val")
    assert sorted(found) == sorted([text for text in HOSTILE_TEXTS if text.strip()] + texts)
    assert manifest(tmp_path / "out")["empty_documents"] == 4


def test_normal_form_is_counted(texts, tmp_path):
    lines = write_jsonl(
        tmp_path / "a.jsonl", ["a \u2581\u2581 b", "a __ b", "half a \ud83d pair", " \n "]
    )
    lines.write_bytes(b"\xef\xbb\xbf" + lines.read_bytes())
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "c.py").touch()
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.md").write_bytes(text.encode())
    assert run(tmp_path / "out", tmp_path) == 0
    found = decode(tmp_path / "out", "train") + decode(tmp_path / "out", "val")
    assert sorted(found) == sorted(["a __ b", "one\r\ntwo\r\n", *texts])
    counts = {key: manifest(tmp_path / "out")[key] for key in vars(Counts())}
    assert counts == dict(
        files_read=2 + len(texts),
        files_skipped=1,
        byte_order_marks=2,
        empty_documents=1,
        skipped_documents=1,
        cuts=0,
        replaced_characters=2,
        duplicates=1,
    )


# ---- The split
@pytest.mark.parametrize(
    "count, size, held_out",
    [
        # 3%, 200 KB, a tenth, one document
        (1000, 10_000, 30),
        (500, 10_000, 20),
        (100, 10_000, 10),
        (2, 10, 1),
    ],
)
def test_the_first_documents_are_held_out(count, size, held_out, tmp_path):
    texts = [str(index).zfill(size).encode() for index in range(count)]
    training, validation = dataset.split(documents_file(tmp_path / "d", texts), 0.03)
    assert list(validation) == texts[:held_out] and list(training) == texts[held_out:]
    assert validation.size == held_out * size and training.size == (count - held_out) * size


def test_one_document_remains_for_training(tmp_path):
    training, validation = dataset.split(documents_file(tmp_path / "d", [b"x", b"y" * 1000]), 0.5)
    assert (training.count, validation.count) == (1, 1)


def test_the_tokenizer_is_trained_on_nothing_that_is_held_out(texts, built, tmp_path):
    model = (model_file(built)).read_bytes()
    training = documents_file(tmp_path / "d", [text.encode() for text in decode(built, "train")])
    assert tokenizer.train_tokenizer(512, False, "test", training) == model
    # Documents whose hashes begin with zeros are held out.
    for first, known in (("000", False), ("ff", True)):
        rare = document_hashed(first)
        out = tmp_path / first
        assert run(out, write_jsonl(tmp_path / "in.jsonl", [*texts, rare])) == 0
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file(out)))
        assert rare in decode(out, "train" if known else "val")
        assert (pieces.piece_to_id(RARE) != pieces.unk_id()) == known


def document_hashed(first: str) -> str:
    """Return a document of many RARE whose SHA-256 begins with these digits."""
    number = 0
    while True:
        text = RARE * 500 + str(number)
        if hashlib.sha256(text.encode()).hexdigest().startswith(first):
            return text
        number += 1


# ---- The tokenizer
def test_long_lines_are_not_dropped_from_training(texts, tmp_path):
    # Far over SentencePiece's own limit of 4,192 bytes.
    line = " ".join([RARE * 2] * 5_000)
    found = documents_file(tmp_path / "d", [text.encode() for text in [*texts, line]])
    model = tokenizer.train_tokenizer(512, False, "test", found)
    trained = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert trained.piece_to_id(RARE * 2) != trained.unk_id()


def test_training_takes_a_bounded_sample(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "SAMPLE_BYTES", 20)
    found = documents_file(tmp_path / "d", [b"one\n\ntwo", b"three", b"f" * 10, b"five"])
    assert list(tokenizer.sample_lines(found, False)) == [b"one", b"two", b"three"]


# ---- Case operators
@pytest.fixture(scope="module")
def with_operators(folder, tmp_path_factory) -> Path:
    """The output for that folder with operators in the place of capitals."""
    out = tmp_path_factory.mktemp("with operators")
    assert run(out, folder, "--case-operators") == 0
    return out


CASEOPS_NAMES = [
    "datasets/t_sp512_caseops/manifest.json",
    "datasets/t_sp512_caseops/t_train_000000.bin",
    "datasets/t_sp512_caseops/t_val_000000.bin",
    "tokenizers/t_512_bpe_caseops.model",
]


def decode_case(out: Path, side: str) -> list[str]:
    """Return the documents of a split, with operators undone."""
    paths = sorted((out / "datasets/t_sp512_caseops").glob(f"t_{side}_*.bin"))
    rewritten = read_documents(paths, out / CASEOPS_NAMES[-1])
    return [without_operators(text) for text in rewritten]


def test_with_case_operators_every_document_decodes_to_itself(with_operators, texts):
    assert left(with_operators) == CASEOPS_NAMES
    assert decode_case(with_operators, "val") + decode_case(with_operators, "train") == texts
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(with_operators / CASEOPS_NAMES[-1])
    )
    capitals = set(string.ascii_uppercase)
    # A byte piece is called <0x4A>.
    assert not any(
        capitals & set(pieces.id_to_piece(piece))
        for piece in range(512)
        if not pieces.is_byte(piece)
    )


def test_hostile_texts_survive_case_operators(texts, tmp_path):
    operators = ["".join(OPERATORS), f"NASA{OPERATORS[1]}nasa", 5 * OPERATORS[3], "ǅ İ ß Straße É"]
    source = write_jsonl(tmp_path / "in.jsonl", [*HOSTILE_TEXTS[4:], *operators, *texts])
    assert run(tmp_path / "out", source, "--case-operators") == 0
    found = decode_case(tmp_path / "out", "train") + decode_case(tmp_path / "out", "val")
    assert sorted(found) == sorted([*HOSTILE_TEXTS[4:], *operators, *texts])
    assert check.main([str(tmp_path / "out/datasets/t_sp512_caseops")]) == 0


def test_the_manifest_says_whether_there_are_case_operators(built, with_operators, texts):
    said = json.loads((with_operators / CASEOPS_NAMES[0]).read_text())
    assert said["tokenizer"]["kind"] == "sentencepiece"
    assert said["tokenizer"]["case_operators"] is True
    assert said["tokenizer"]["file"] == "../../tokenizers/t_512_bpe_caseops.model"
    # The bytes are those of the text.
    assert said["train"]["bytes"] + said["val"]["bytes"] == sum(len(t.encode()) for t in texts)
    plain = manifest(built)["tokenizer"]
    assert (plain["kind"], plain["case_operators"]) == ("sentencepiece", False)


def test_training_finds_and_counts_what_has_case_operators(with_operators, capsys):
    folder = with_operators / "datasets/t_sp512_caseops"
    path = train_gpt.find_tokenizer(folder)
    assert path.samefile(with_operators / CASEOPS_NAMES[-1])
    tokens = train_gpt.load_validation([folder / "t_val_000000.bin"], 512)
    sizes = train_gpt.ByteTable(train_gpt.load_tokenizer(path)).sizes(tokens)
    assert sizes.sum() == json.loads((folder / "manifest.json").read_text())["val"]["bytes"]
    assert check.main([str(folder)]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_both_kinds_of_a_data_set_stand_side_by_side(built, with_operators, folder, tmp_path):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    assert run(tmp_path, folder, "--case-operators") == 0
    assert left(tmp_path) == sorted(left(built) + CASEOPS_NAMES)
    assert run(tmp_path, folder) == 0
    assert left(tmp_path) == sorted(left(built) + CASEOPS_NAMES)


@pytest.mark.parametrize("options", [[], ["--case-operators"]])
def test_a_given_tokenizer_with_operators_writes_them(with_operators, folder, tmp_path, options):
    given = with_operators / CASEOPS_NAMES[-1]
    assert run(tmp_path, folder, "--tokenizer", given, *options) == 0
    assert left(tmp_path) == CASEOPS_NAMES and outputs(tmp_path) == outputs(with_operators)


def test_a_given_tokenizer_without_operators_cannot_write_them(built, folder, tmp_path, capsys):
    given = model_file(built)
    assert run(tmp_path, folder, "--tokenizer", given, "--case-operators") == 2
    message = "t_512_bpe.model has no pieces for --case-operators: leave one of them out"
    assert message in one_line(capsys) and left(tmp_path) == []


def test_a_given_tokenizer_is_used_and_copied_under_the_new_name(built, folder, tmp_path):
    given = model_file(built)
    options = ["--name", "u", "--out", tmp_path, "--tokenizer", given, "--jobs", "1", folder]
    assert prepare.main([str(option) for option in options]) == 0
    assert (tmp_path / "tokenizers" / "u_512_bpe.model").read_bytes() == given.read_bytes()
    for side in ("train", "val"):
        shard = tmp_path / "datasets" / "u_sp512" / f"u_{side}_000000.bin"
        assert shard.read_bytes() == (shards_folder(built) / f"t_{side}_000000.bin").read_bytes()


def test_a_given_tokenizer_in_its_place_stays_there(built, folder, tmp_path):
    place = model_file(tmp_path)
    place.parent.mkdir()
    shutil.copy(model_file(built), place)
    before = place.stat()
    assert run(tmp_path, folder, "--tokenizer", place) == 0
    assert (place.stat().st_ino, place.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert outputs(tmp_path) == outputs(built)


# ---- A given tokenizer that normalizes
NORMALIZED_NAMES = [
    "datasets/t_sp512_normalized/manifest.json",
    "datasets/t_sp512_normalized/t_train_000000.bin",
    "datasets/t_sp512_normalized/t_val_000000.bin",
    "tokenizers/t_512_bpe_normalized.model",
]
# Each of them becomes another text, some more than once.
TO_NORMALIZE = ["a \ufb01nd", "two  spaces", "\u00bd\ta\nb", "\u0344", "\uff21\uff22 \u212b"]


@pytest.fixture(scope="module")
def normalizing(texts, tmp_path_factory) -> Path:
    """A tokenizer that normalizes, as the public ones of 8,192 pieces do."""
    path = tmp_path_factory.mktemp("normalizing") / "given.model"
    return train_tokenizer(
        path,
        texts,
        512,
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
        user_defined_symbols=[],
    )


@pytest.fixture(scope="module")
def normalized(texts, normalizing, tmp_path_factory) -> Path:
    """The output with that tokenizer, for the documents and texts that are normalized."""
    out = tmp_path_factory.mktemp("normalized")
    source = write_jsonl(out / "in.jsonl", [*texts, *TO_NORMALIZE])
    assert run(out, source, "--tokenizer", normalizing, "--normalized") == 0
    source.unlink()
    return out


def at_rest(model: Path, text: str) -> str:
    """The text as a tokenizer gives it back, without the code under test."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for _ in range(9):
        text = processor.decode(processor.encode(text))
    return text


def test_the_normalized_text_is_what_is_written_split_and_counted(normalized, normalizing, texts):
    assert left(normalized) == NORMALIZED_NAMES
    shards = [normalized / name for name in NORMALIZED_NAMES[1:3]]
    noted = json.loads((normalized / NORMALIZED_NAMES[0]).read_text())
    before = [*texts, *TO_NORMALIZE]
    after = [at_rest(normalizing, text) for text in before]
    # Documents that have become the same are one, and their hashes are those of what is left.
    due = sorted(set(after), key=lambda text: hashlib.sha256(text.encode()).digest())
    train, val = (read_documents([path], normalizing) for path in shards)
    assert val + train == due
    assert noted["duplicates"] == len(after) - len(due)
    for side, found in (("train", train), ("val", val)):
        size = sum(len(text.encode()) for text in found)
        assert (noted[side]["bytes"], noted[side]["documents"]) == (size, len(found))
    changed = [old != new for old, new in zip(before, after, strict=True)]
    told = noted["normalized"]
    assert (told["documents"], told["documents_changed"]) == (len(before), sum(changed))
    assert sum(changed) >= len(TO_NORMALIZE)
    assert told["bytes_before"] == sum(len(text.encode()) for text in before)
    assert told["bytes"] == sum(len(text.encode()) for text in after)
    assert 0 < told["bytes_changed"] < 0.2 * told["bytes_before"]


def test_the_ids_are_those_of_the_normalized_text_and_of_no_other(normalized, normalizing):
    """However often a text had to be normalized: \\u0344 needs two passes."""
    model = normalized / NORMALIZED_NAMES[3]
    assert model.read_bytes() == normalizing.read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for name in NORMALIZED_NAMES[1:3]:
        _, tokens = read_shard(normalized / name)
        for document in np.split(tokens, np.flatnonzero(tokens == 1)[1:]):
            ids = document[1:].tolist()
            assert processor.encode(processor.decode(ids)) == ids


def test_training_and_check_count_the_bytes_of_the_normalized_text(normalized, capsys):
    folder = normalized / "datasets/t_sp512_normalized"
    size = json.loads((folder / "manifest.json").read_text())["val"]["bytes"]
    model = train_gpt.load_tokenizer(normalized / NORMALIZED_NAMES[3], 512)
    tokens = train_gpt.load_validation([folder / "t_val_000000.bin"], 512)
    assert train_gpt.ByteTable(model).sizes(tokens).sum() == size
    capsys.readouterr()
    assert check.main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"^bytes +PASS  {size:,} by the pieces, {size:,} decoded", said, re.M)
    assert re.search(r"^normalized  - +\d.*none of the original text's$", said, re.M)


def test_neither_processes_nor_chunks_change_normalized_bytes(
    normalized, normalizing, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(dataset, "CHUNK", 5000)
    source = write_jsonl(tmp_path / "in.jsonl", [*TO_NORMALIZE, *reversed(texts)])
    options = ["--tokenizer", normalizing, "--normalized"]
    assert run(tmp_path / "out", source, *options, jobs=2) == 0
    assert outputs(tmp_path / "out") == outputs(normalized)


def test_what_normalizing_leaves_of_the_text_is_said(normalizing, tmp_path, capsys):
    # The second becomes the first, the last nothing.
    source = write_jsonl(tmp_path / "in.jsonl", ["find me", "\ufb01nd  me", "other", "\u200b\x01"])
    assert run(tmp_path / "out", source, "--tokenizer", normalizing, "--normalized") == 0
    said = capsys.readouterr().out
    assert "t: 2 documents, 0.0 MB, 1 files read, 1 empty documents, 1 duplicates" in said
    # Of 7 + 9 + 5 + 4 bytes: a ligature of three and a space; four.
    assert (
        "normalized: 50.00% of the documents (2 of 4) and 32.000% of the bytes changed, 25 bytes "
        "became 19; the text that is left is the one to score" in said
    )


def test_a_tokenizer_that_normalizes_may_have_case_operators_too(texts, tmp_path):
    given = train_tokenizer(
        tmp_path / "given.model",
        [text.lower() for text in texts],
        512,
        normalization_rule_name="nmt_nfkc",
        user_defined_symbols=list(OPERATORS),
    )
    # Capitals of another width are capitals once they are normalized.
    source = write_jsonl(tmp_path / "in.jsonl", ["\uff21\uff22 iOS \ufb01", *texts[:9]])
    assert run(tmp_path / "out", source, "--tokenizer", given, "--normalized") == 0
    folder = tmp_path / "out/datasets/t_sp512_caseops_normalized"
    found = []
    for path in sorted(folder.glob("*.bin")):
        found += [without_operators(text) for text in read_documents([path], given)]
    assert "AB iOS fi" in found and len(found) == 10
    assert check.main([str(folder)]) == 0


def test_normalized_needs_a_tokenizer_that_normalizes(built, folder, tmp_path, capsys):
    assert run(tmp_path, folder, "--normalized") == 2
    assert "--normalized is for a --tokenizer that is given" in one_line(capsys)
    given = model_file(built)
    assert run(tmp_path, folder, "--tokenizer", given, "--normalized") == 2
    assert "t_512_bpe.model changes no text: leave --normalized out" in one_line(capsys)
    assert left(tmp_path) == []


def test_changed_bytes_are_those_of_characters_that_are_gone():
    found = tokenizer.Normalization()
    found.count("same", "same")
    found.count("\u00bd \u00bd", "1/2 1/2")
    found.count("a  b ", "a b")
    told = "66.67% of the documents (2 of 3) and 42.857% of the bytes changed, 14 bytes became 14"
    assert str(found) == told
    more = tokenizer.Normalization(7, 1, 100, 10, 90)
    more.add(found)
    assert more == tokenizer.Normalization(10, 3, 114, 16, 104)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "or let it with --normalized"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes the document that begins"),
        ({"bos_id": 2, "eos_id": 1}, "BOS with id 1"),
        ({"byte_fallback": False}, "a piece for each byte"),
        ({"vocabulary_size": 400}, "400 pieces, not 512: leave --vocab-size out"),
        (None, "not a SentencePiece model"),
    ],
    ids=str,
)
def test_a_tokenizer_that_does_not_fit_is_refused(changes, message, texts, tmp_path, capsys):
    given = tmp_path / "given.model"
    if changes is None:
        given.write_bytes(b"no model")
    else:
        train_tokenizer(given, texts, **{"vocabulary_size": 512, **changes})
    source = write_jsonl(tmp_path / "in.jsonl", [*texts, "\ufb01"])
    assert run(tmp_path / "out", source, "--tokenizer", given) == 2
    assert message in one_line(capsys)
    assert left(tmp_path / "out") == []


# ---- Bad input
def many_characters() -> bytes:
    """Return a .jsonl of 2,700 different characters, more than the tokenizer has pieces."""
    lines = []
    for start in (0x4E00, 0x5E00, 0x6E00):
        text = "".join(chr(code) for code in range(start, start + 900))
        lines.append(f'{{"text": "{text}"}}\n')
    return "".join(lines).encode()


BAD_INPUT = [
    ("absent.txt", None, "absent.txt: no such file or folder"),
    ("in.pdf", b"text", "in.pdf: neither .txt, .md nor .jsonl"),
    ("in.txt", b"", "there is no text in the input"),
    ("in.txt", b" \n\n \t", "there is no text in the input"),
    ("in.txt", b"all of it is one document", "there is only one document in the input"),
    (
        "in.txt",
        b"\x89PNG\r\n\x1a\n\0\0\0",
        "in.txt: not UTF-8 text: invalid start byte at byte 0",
    ),
    ("in.txt", b"text\0text", "in.txt: not UTF-8 text: zero byte at byte 4"),
    (
        "in.txt",
        b"x" * 200_000 + b"\xff",
        "in.txt: not UTF-8 text: invalid start byte at byte 200,000",
    ),
    (
        "in.txt",
        b"\xef\xbb\xbfx\xe2\x82",
        "in.txt: not UTF-8 text: unexpected end of data at byte 4",
    ),
    ("in.txt.gz", b"text", "in.txt.gz: cut short or damaged"),
    ("in.txt.gz", gzip.compress(b"text" * 99)[:-9], "in.txt.gz: cut short or damaged"),
    (
        "in.md.zst",
        zstandard.compress(random.Random(1).randbytes(99))[:-1],
        "in.md.zst: cut short or damaged",
    ),
    ("in.md.zst", zstandard.compress(b"text") + b"more", "in.md.zst: cut short or damaged"),
    ("in.md.zst", b"", "in.md.zst: cut short or damaged"),
    ("in.jsonl", b'{"text": "a"}\n\n{"text": \n', "in.jsonl, line 3: not JSON"),
    (
        "in.jsonl",
        b'{"text": "a"}\n{"body": "b"}',
        "in.jsonl, line 2: no text in a field 'text'",
    ),
    ("in.jsonl", b'{"text": 1}', "in.jsonl, line 1: no text in a field 'text'"),
    ("in.jsonl", b'["text"]', "in.jsonl, line 1: no text in a field 'text'"),
    ("in.jsonl", b"[" * 100_000, "in.jsonl, line 1: not JSON"),
    (
        "in.jsonl",
        b'{"text": "\xff"}',
        "in.jsonl, line 1: not UTF-8 text: invalid start byte at byte 10",
    ),
    ("in.jsonl", b'{"text": "few"}\n{"text": "words"}', "this text has enough for at most"),
    ("in.jsonl", many_characters(), "the characters of this text alone need"),
]


@pytest.mark.parametrize(
    "name, content, message", BAD_INPUT, ids=[message for _, _, message in BAD_INPUT]
)
def test_bad_input_is_one_line_and_leaves_nothing(name, content, message, tmp_path, capsys):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert run(tmp_path / "out", path) == 2
    line = one_line(capsys)
    assert line.startswith("error: ") and message in line
    assert left(tmp_path / "out") == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--name", "a/b"], "--name 'a/b'"),
        (["--name", "x_val"], "--name 'x_val'"),
        (["--name", "*"], "--name"),
        (["--vocab-size", "511"], "the vocabulary size must be 512 to 65,536, not 511"),
        (["--vocab-size", "0"], "the vocabulary size must be 512 to 65,536, not 0"),
        (["--vocab-size", "65537"], "the vocabulary size must be 512 to 65,536, not 65537"),
        (["--held-out", "0"], "--held-out is over 0"),
        (["--jobs", "0"], "--jobs at least 1"),
        # As Python gives a byte that is no UTF-8.
        (["--separator", "\udcff"], r"--separator '\udcff': not UTF-8"),
        (["--tokenizer", "absent.model"], "absent.model: no such file"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(arguments, message, folder, tmp_path, capsys):
    assert run(tmp_path, folder, *arguments) == 2
    assert message in one_line(capsys)
    assert left(tmp_path) == []


def test_closed_standard_input_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert run(tmp_path, "-") == 2
    assert "standard input is closed" in one_line(capsys) and left(tmp_path) == []


# ---- All or nothing
def test_the_summary_ends_with_the_command_that_trains(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "o u t", folder) == 0
    printed = capsys.readouterr().out
    script = shlex.quote(str(ROOT / "train_gpt.py"))
    assert printed.splitlines()[-1] == (
        f"to train on it: DATA_PATH='o u t/datasets/t_sp512' python {script}"
    )
    for fact in (" documents, 0.", " bytes per token", " KB for validation are few", " files read"):
        assert fact in printed


def test_the_summary_says_what_cuts_mean_for_the_split(built):
    note = "pieces of a document that was cut can be on both sides of the split"
    assert note in dataset.summary({**manifest(built), "cuts": 1})
    assert note not in dataset.summary(manifest(built))


def test_what_is_there_is_built_again_only_for_a_reason(texts, tmp_path, capsys):
    out = tmp_path / "out"
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    shard = shards_folder(out) / "t_train_000000.bin"
    model = model_file(out)

    def rebuilt(*arguments: object) -> bool:
        before = shards_folder(out).stat().st_ino
        assert run(out, source, *arguments) == 0
        return shards_folder(out).stat().st_ino != before

    assert run(out, source) == 0
    whole = outputs(out)
    assert not rebuilt() and "already built" in capsys.readouterr().out
    assert rebuilt("--force")
    shard.write_bytes(shard.read_bytes()[:-2])
    assert rebuilt()
    model.unlink()
    assert rebuilt()
    assert outputs(out) == whole
    write_jsonl(source, texts[:-5])
    capsys.readouterr()
    assert run(out, source) == 2
    assert "made of other input or with other options: --force replaces it" in one_line(capsys)
    assert outputs(out) == whole
    assert rebuilt("--force") and outputs(out) != whole
    assert left(out) == [
        "datasets/t_sp512/manifest.json",
        "datasets/t_sp512/t_train_000000.bin",
        "datasets/t_sp512/t_val_000000.bin",
        "tokenizers/t_512_bpe.model",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "datasets/t_sp512/thesis.txt",
        "datasets/t_sp512/t_val_000000.bin",
        "tokenizers/t_512_bpe.model",
    ],
)
def test_what_others_made_is_never_replaced(name, folder, tmp_path, capsys):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("precious")
    assert run(tmp_path, folder, "--force") == 2
    assert "left as it is" in one_line(capsys)
    assert (tmp_path / name).read_text() == "precious" and left(tmp_path) == [name]


STAGES = [
    (documents, "spill"),
    (dataset, "split"),
    (dataset, "train_tokenizer"),
    (dataset, "encode"),
    (shards.ShardWriter, "close"),
    (dataset, "versions"),
    (dataset, "publish"),
]
STOPS = [(place, stage, KeyboardInterrupt(), 130) for place, stage in STAGES]
STOPS.append((dataset, "encode", Stopped(signal.SIGTERM), 143))
STOPS.append((shards.ShardWriter, "add", OSError(28, "No space left"), 2))


@pytest.mark.parametrize(
    "place, stage, error, status", STOPS, ids=[f"{stop[1]}-{stop[3]}" for stop in STOPS]
)
def test_a_build_that_is_stopped_leaves_what_was_there(
    place, stage, error, status, built, folder, tmp_path, monkeypatch, capsys
):
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(place, stage, fail)
    assert run(tmp_path, folder) == status
    assert len(one_line(capsys)) < 80 and left(tmp_path) == []
    before = left(built), outputs(built)
    assert run(built, folder, "--force") == status
    assert (left(built), outputs(built)) == before


# These make another tokenizer of the same text.
OTHER = ["--force", "--held-out", "0.5"]
# Function and first argument, as a build puts itself in place.
MOVES = [
    (os, "rename", "t_sp512"),
    (dataset, "write_atomically", "t_512_bpe.model"),
    (os, "rename", "finished"),
]


@pytest.mark.parametrize("place, function, name", MOVES)
def test_a_failure_when_it_is_put_in_place_leaves_what_was_there(
    place, function, name, built, folder, tmp_path, monkeypatch
):
    real = getattr(place, function)
    failed = []

    def fail(path: Path, *more: object) -> None:
        if path.name == name and not failed:
            failed.append(name)
            raise OSError(28, "No space left on device")
        real(path, *more)

    monkeypatch.setattr(place, function, fail)
    before = left(built), outputs(built)
    assert run(built, folder, *OTHER) == 2 and failed
    assert (left(built), outputs(built)) == before
    failed.clear()
    status = run(tmp_path, folder)
    if name == "t_sp512":
        # In a new place there is nothing to move.
        assert (status, failed, len(left(tmp_path))) == (0, [], 4)
    else:
        assert (status, failed, left(tmp_path)) == (2, [name], [])


# The command, which ends like a process that is killed when a function gets a path of this name.
KILLED = """
import os, sys, prepare
import {place} as place
real = place.{function}
def end(path, *more):
    if path.name == {name!r}:
        os._exit(9)
    real(path, *more)
place.{function} = end
prepare.main(sys.argv[1:])
"""


@pytest.mark.parametrize("place, function, name", MOVES[1:])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_killed_when_it_is_put_in_place_the_next_one_completes(
    place, function, name, first, built, folder, tmp_path, capsys
):
    if not first:
        shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    script = KILLED.format(place=place.__name__, function=function, name=name)
    with start(tmp_path, folder, "--jobs", "1", *OTHER, script=script) as process:
        process.communicate()
    assert process.returncode == 9
    assert not shards_folder(tmp_path).exists()
    assert run(tmp_path, folder, *OTHER[1:]) == 0 and "just been built" in capsys.readouterr().out
    assert check.main([str(shards_folder(tmp_path))]) == 0 and len(left(tmp_path)) == 4


def test_a_signal_while_the_tokenizer_is_trained_is_one_line(folder, tmp_path, monkeypatch, capsys):
    real = tokenizer.sample_lines
    calls = []

    def raise_later(found: Documents, case_operators: bool) -> Iterator[bytes]:
        calls.append(found)
        for number, line in enumerate(real(found, case_operators)):
            # Now SentencePiece reads them.
            if len(calls) == 2 and number == 50:
                signal.raise_signal(signal.SIGTERM)
            yield line

    monkeypatch.setattr(tokenizer, "sample_lines", raise_later)
    assert run(tmp_path, folder) == 128 + signal.SIGTERM
    assert one_line(capsys) == "interrupted: nothing half done is left" and left(tmp_path) == []


def start(
    out: Path, source: object, *arguments: str, script: str | None = None, **options: object
) -> subprocess.Popen:
    """Start the command, or this script with its arguments, in a group of processes of its own."""
    program = [str(ROOT / "data" / "prepare.py")] if script is None else ["-c", script]
    command = [sys.executable, *program, "--name", "t", "--vocab-size", "512", "--out", str(out)]
    modules = os.pathsep.join([str(ROOT / "data"), str(ROOT / "tests")])
    return subprocess.Popen(
        [*command, str(source), *arguments],
        env={**os.environ, "PYTHONPATH": modules, "HELD": str(out / "held")},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Wait until the condition holds, while the process is running; for ten minutes at most."""
    limit = time.monotonic() + 600
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.02)


def running(group: int) -> list[str]:
    """Return the processes of a group that have not ended."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pgid=,pid=,stat="], capture_output=True, text=True, check=True
    )
    found = []
    for line in listed.stdout.splitlines():
        process_group, process, state = line.split()[:3]
        if int(process_group) == group and not state.startswith("Z"):
            found.append(process)
    return found


# The command, whose workers begin to encode and do not end.
ENCODING = """
import sys, dataset, held, prepare
dataset.encode = held.encode
sys.exit(prepare.main(sys.argv[1:]))
"""


def start_encoding(out: Path, source: Path) -> subprocess.Popen:
    """Start the command with two processes and wait until they encode."""
    out.mkdir()
    process = start(out, source, "--jobs", "2", script=ENCODING)
    wait_for((out / "held").exists, process)
    (out / "held").unlink()
    return process


def test_a_signal_to_all_processes_while_they_encode_is_one_line(folder, tmp_path):
    out = tmp_path / "out"
    with start_encoding(out, folder) as process:
        # As a terminal does.
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate()[1].replace("\r", "\n").strip().splitlines()
    assert process.returncode == 130
    assert error[-1] == "interrupted: nothing half done is left"
    assert "Traceback" not in "".join(error) and "Warning" not in "".join(error)
    assert left(out) in ([], ["held"])
    wait_for(lambda: not running(process.pid))


def test_after_a_kill_no_process_goes_on_and_the_next_run_completes(built, folder, tmp_path):
    out = tmp_path / "out"
    with start_encoding(out, folder) as process:
        process.kill()
        # The workers have its pipes, too: they end.
        process.communicate()
    wait_for(lambda: not running(process.pid))
    (out / "held").unlink(missing_ok=True)
    assert left(out) and not shards_folder(out).exists() and not (out / "tokenizers").exists()
    assert run(out, folder) == 0
    assert outputs(out) == outputs(built) and len(left(out)) == 4


def test_a_second_build_waits_for_the_first_and_uses_what_it_made(built, folder, tmp_path, capsys):
    with start(tmp_path, "-", "--separator", r"\n<|end|>\n", stdin=subprocess.PIPE) as first:
        wait_for(lambda: list(tmp_path.glob("datasets/.*/buckets/b0")), first)
        with start(tmp_path, folder) as second:
            assert "another process is building this, waiting for it" in second.stderr.readline()
            first.terminate()
            assert first.wait() == 143
            printed = second.communicate()[0]
    assert printed.count("\n") == 6 and second.returncode == 0
    assert outputs(tmp_path) == outputs(built) and len(left(tmp_path)) == 4


def test_builds_of_the_same_at_the_same_time_both_succeed(built, folder, tmp_path):
    both = [start(tmp_path, folder, "--jobs", "1") for _ in range(2)]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("built" in text for text in printed) == 1
    assert outputs(tmp_path) == outputs(built) and len(left(tmp_path)) == 4
