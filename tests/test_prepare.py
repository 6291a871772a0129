"""data/prepare.py: one text in every form gives the same data set, which gives the text back; bad input is
one line; what stops a build leaves nothing."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import check
import documents as reading
import numpy as np
import prepare
import processes
import pytest
import sentencepiece
import shards
import zstandard
from commands import BadInput
from conftest import ROOT
from conftest import documents as docstrings
from documents import Counts, Documents, Piece, split_stream

import train_gpt

COMMAND = [sys.executable, str(ROOT / "data" / "prepare.py"), "--name", "t", "--vocab-size", "512"]
END = "\n<|end|>\n"
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
    "e\u0301 \u00e9 \ufb01 \u2126 \u01c4",  # what normalization would change
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
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts))
    return path


def run(out: Path, *arguments: object, size: int = 512, jobs: int = 1) -> int:
    return prepare.main(
        [
            "--name",
            "t",
            "--vocab-size",
            str(size),
            "--out",
            str(out),
            "--jobs",
            str(jobs),
            *map(str, arguments),
        ]
    )


def dataset(out: Path, size: int = 512) -> Path:
    return out / "datasets" / f"t_sp{size}"


def manifest(out: Path) -> dict:
    return json.loads((dataset(out) / "manifest.json").read_text())


def outputs(out: Path) -> dict[str, bytes]:
    """The content of the tokenizer and of the shards."""
    return {
        path.name: path.read_bytes() for path in out.rglob("*") if path.suffix in (".bin", ".model")
    }


def left(out: Path) -> list[str]:
    """The files there are, hidden ones too."""
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def read_shard(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A shard's header (256,) and tokens, read independently of the code under test."""
    return np.fromfile(path, "<i4", count=256), np.fromfile(path, "<u2", offset=1024)


def decode(out: Path, side: str) -> list[str]:
    """The documents of a split, as the tokenizer decodes them."""
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_file=str(out / "tokenizers" / "t_512_bpe.model")
    )
    tokens = np.concatenate(
        [read_shard(path)[1] for path in sorted(dataset(out).glob(f"t_{side}_*.bin"))]
    )
    return [
        tokenizer.decode(part[1:].tolist())
        for part in np.split(tokens, np.flatnonzero(tokens == 1)[1:])
    ]


def documents_file(path: Path, texts: list[bytes]) -> Documents:
    path.write_bytes(b"".join(map(reading.record, texts)))
    return Documents(path, 0, len(texts), sum(map(len, texts)))


def one_line(capsys) -> str:
    """What the command wrote last to standard error, behind its progress bars: the only line beside them."""
    lines = [
        line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.strip()
    ]
    said = [
        line for line in lines if "it/s" not in line and "B/s" not in line and "lines/s" not in line
    ]
    assert len(said) == 1, said
    return said[0]


# ---- What comes out


def test_shards_decode_to_the_documents_in_the_order_of_their_hashes(built, texts):
    assert decode(built, "val") + decode(built, "train") == texts


def test_headers_and_manifest_say_what_is_there(built, texts):
    found = manifest(built)
    for side in ("train", "val"):
        header, tokens = read_shard(dataset(built) / f"t_{side}_000000.bin")
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
    tokenizer = (dataset(built) / found["tokenizer"]["file"]).resolve()
    assert tokenizer == (built / "tokenizers" / "t_512_bpe.model").resolve()
    assert found["tokenizer"]["sha256"] == files.pop("t_512_bpe.model")["sha256"]
    assert found["files"] == files
    assert found["versions"]["sentencepiece"] == sentencepiece.__version__
    assert str(built) not in json.dumps(found)


def test_check_passes_what_was_made(built):
    assert check.main([str(dataset(built))]) == 0


def test_train_gpt_counts_the_bytes_of_the_validation_text_exactly(built):
    tokenizer = train_gpt.load_tokenizer(built / "tokenizers" / "t_512_bpe.model", 512)
    tokens = train_gpt.load_validation([dataset(built) / "t_val_000000.bin"], 512)
    assert train_gpt.ByteTable(tokenizer).bytes[tokens].sum() == manifest(built)["val"]["bytes"]


@pytest.mark.parametrize(
    "form",
    [
        "md",
        "txt.gz",
        "txt.zst",
        "jsonl",
        "jsonl.gz",
        "jsonl.zst",
        "separated",
        "stdin",
        "stdin jsonl",
        "several",
    ],
)
def test_every_form_of_the_same_documents_gives_the_same_bytes(
    form, built, texts, tmp_path, monkeypatch
):
    joined, lines = (
        END.join(texts).encode(),
        write_jsonl(tmp_path / "a.jsonl", texts, "body").read_bytes(),
    )
    whole = lines if "jsonl" in form else joined
    arguments = ["--separator", END.replace("\n", r"\n"), "--text-field", "body"]
    path = tmp_path / f"in.{form}"
    if form == "md":
        path = write_folder(tmp_path, texts, ".md")
        (tmp_path / "a.jsonl").unlink()
    elif form.endswith(".gz"):
        path.write_bytes(gzip.compress(whole[:9999]) + gzip.compress(whole[9999:]))
    elif form.endswith(".zst"):
        pack, skippable = zstandard.ZstdCompressor().compress, b"\x50\x2a\x4d\x18\x02\0\0\0ab"
        path.write_bytes(pack(whole[:9999]) + skippable + pack(whole[9999:]))
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
        path, arguments = "-", arguments + ["--format", "jsonl" if "jsonl" in form else "text"]
    assert run(tmp_path / "out", path, *arguments) == 0
    assert outputs(tmp_path / "out") == outputs(built)


def test_neither_processes_nor_names_nor_buckets_change_a_byte(built, texts, tmp_path, monkeypatch):
    depths, spill = [], reading.spill

    def note(found, path):
        depths.append(len(path.name))
        return spill(found, path)

    monkeypatch.setattr(reading, "spill", note)
    monkeypatch.setattr(reading, "BUCKET", 1000)
    monkeypatch.setattr(prepare, "CHUNK", 3000)
    (tmp_path / "text").mkdir()
    assert (
        run(tmp_path / "out", write_folder(tmp_path / "text", texts[::-1] + texts[:9]), jobs=2) == 0
    )
    assert outputs(tmp_path / "out") == outputs(built)
    assert max(depths) > 2  # buckets of buckets
    assert manifest(tmp_path / "out")["duplicates"] == 9


def test_many_copies_of_one_document_do_not_split_its_bucket_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BUCKET", 300)
    counts = Counts()
    found = reading.arrange([b"x" * 200, b"y" * 200] * 50, tmp_path, counts)
    assert len(list(found)) == 2 and counts.duplicates == 98
    assert list((tmp_path / "buckets").iterdir()) == []


def test_tokens_are_spread_over_shards(built, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "TOKENS_PER_SHARD", 7000)
    assert run(tmp_path, folder) == 0
    found = [read_shard(path) for path in sorted(dataset(tmp_path).glob("t_train_*.bin"))]
    assert [header[2] for header, _ in found[:-1]] == [7000] * (len(found) - 1) and len(found) > 2
    _, whole = read_shard(dataset(built) / "t_train_000000.bin")
    assert np.array_equal(np.concatenate([tokens for _, tokens in found]), whole)


def test_a_last_shard_that_is_just_full_is_closed_and_none_follows(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "TOKENS_PER_SHARD", 4)
    writer = prepare.ShardWriter(tmp_path, "t")
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


# ---- Cutting


def test_a_long_document_is_cut_behind_paragraphs_lines_words_or_characters():
    prose = ("word " * 19 + "end\n") * 3 + "\n"
    lines = "word " * 19 + "line\n"
    for text, ends in ((prose * 300, "\n\n"), (lines, "\n"), ("word ", " "), ("\u6f22", "")):
        data = (text * (300_000 // len(text.encode()))).encode()
        found = list(reading.normal_form([data.decode()], counts := Counts()))
        assert b"".join(found) == data and counts.cuts == len(found) - 1 >= 4
        assert all(len(part) <= 64 << 10 and part.decode().endswith(ends) for part in found[:-1])


@pytest.mark.parametrize("separator", [b"", b"\n", b"ab", b"aab"])
def test_how_a_stream_comes_in_blocks_does_not_matter(separator):
    draw = random.Random(1)
    for _ in range(300):
        data = bytes(draw.choices(b"aab \n", k=draw.randrange(60)))
        places = sorted(draw.choices(range(len(data) + 1), k=draw.randrange(8)))
        blocks = [data[a:b] for a, b in zip([0, *places], [*places, len(data)])]
        found = list(split_stream(iter(blocks), separator, 8))
        assert found == list(split_stream(iter([data]), separator, 8))
        assert all(
            data[piece.start :].startswith(piece.data) and len(piece.data) <= 8 for piece in found
        )
        kept = b"".join(part.data for part in found)
        assert kept == (b"".join(data.split(separator)) if separator else data)
        if not separator or max(map(len, data.split(separator))) <= 8:
            assert not separator or [p.data for p in found] == data.split(separator)[: len(found)]


def test_a_document_as_long_as_the_limit_is_not_cut():
    found = list(split_stream(iter([b"x" * 8 + b";y"]), b";", 8))
    assert found == [Piece(0, b"x" * 8, False), Piece(9, b"y", False)]


# ---- The split


@pytest.mark.parametrize(
    "count, size, held_out",
    [
        (1000, 10_000, 30),  # 3%
        (500, 10_000, 20),  # 200 KB
        (100, 10_000, 10),  # a tenth
        (2, 10, 1),
    ],
)
def test_the_first_documents_are_held_out(count, size, held_out, tmp_path):
    texts = [str(index).zfill(size).encode() for index in range(count)]
    training, validation = prepare.split(documents_file(tmp_path / "d", texts), 0.03)
    assert list(validation) == texts[:held_out] and list(training) == texts[held_out:]
    assert validation.size == held_out * size and training.size == (count - held_out) * size


def test_one_document_remains_for_training(tmp_path):
    training, validation = prepare.split(documents_file(tmp_path / "d", [b"x", b"y" * 1000]), 0.5)
    assert (training.count, validation.count) == (1, 1)


def test_the_tokenizer_is_trained_on_nothing_that_is_held_out(texts, built, tmp_path):
    model = (built / "tokenizers" / "t_512_bpe.model").read_bytes()
    training = documents_file(tmp_path / "d", [text.encode() for text in decode(built, "train")])
    assert prepare.train_tokenizer(512, "test", training) == model
    for first, known in (("000", False), ("ff", True)):  # hashes at the beginning are held out
        rare = next(
            text
            for number in range(1 << 20)
            if hashlib.sha256((text := "\u203b" * 500 + str(number)).encode())
            .hexdigest()
            .startswith(first)
        )
        out = tmp_path / first
        assert run(out, write_jsonl(tmp_path / "in.jsonl", [*texts, rare])) == 0
        pieces = sentencepiece.SentencePieceProcessor(
            model_file=str(out / "tokenizers" / "t_512_bpe.model")
        )
        assert rare in decode(out, "train" if known else "val")
        assert (pieces.piece_to_id("\u203b") != pieces.unk_id()) == known


# ---- The tokenizer


def test_long_lines_are_not_dropped_from_training(texts, tmp_path):
    line = " ".join(["\u203b\u203b"] * 5_000)  # far over SentencePiece's own limit of 4,192 bytes
    found = documents_file(tmp_path / "d", [text.encode() for text in [*texts, line]])
    model = prepare.train_tokenizer(512, "test", found)
    trained = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert trained.piece_to_id("\u203b\u203b") != trained.unk_id()


def test_training_takes_a_bounded_sample(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "TOKENIZER_SAMPLE", 20)
    found = documents_file(tmp_path / "d", [b"one\n\ntwo", b"three", b"f" * 10, b"five"])
    assert list(prepare.sample_lines(found)) == [b"one", b"two", b"three"]


def test_a_given_tokenizer_is_used_and_copied_under_the_new_name(built, folder, tmp_path):
    given = built / "tokenizers" / "t_512_bpe.model"
    assert (
        prepare.main(
            [
                "--name",
                "u",
                "--out",
                str(tmp_path),
                "--tokenizer",
                str(given),
                "--jobs",
                "1",
                str(folder),
            ]
        )
        == 0
    )
    assert (tmp_path / "tokenizers" / "u_512_bpe.model").read_bytes() == given.read_bytes()
    for side in ("train", "val"):
        shard = tmp_path / "datasets" / "u_sp512" / f"u_{side}_000000.bin"
        assert shard.read_bytes() == (dataset(built) / f"t_{side}_000000.bin").read_bytes()


def test_a_given_tokenizer_in_its_place_stays_there(built, folder, tmp_path):
    place = tmp_path / "tokenizers" / "t_512_bpe.model"
    place.parent.mkdir()
    place.write_bytes((built / "tokenizers" / place.name).read_bytes())
    before = place.stat()
    assert run(tmp_path, folder, "--tokenizer", place) == 0
    assert (place.stat().st_ino, place.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert outputs(tmp_path) == outputs(built)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(normalization_rule_name="nmt_nfkc"), "changes the document that begins"),
        (dict(bos_id=2, eos_id=1), "BOS with id 1"),
        (dict(byte_fallback=False), "a piece for each byte"),
        (dict(vocab_size=400), "400 pieces, not 512: leave --vocab-size out"),
        (None, "not a SentencePiece model"),
    ],
    ids=str,
)
def test_a_tokenizer_that_does_not_fit_is_refused(changes, message, texts, tmp_path, capsys):
    model, given = io.BytesIO(), tmp_path / "given.model"
    if changes:
        lines = [line for text in texts for line in text.split("\n") if line]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            **{
                **prepare.TOKENIZER_OPTIONS,
                "vocab_size": 512,
                "max_sentence_length": 1 << 20,
                **changes,
            },
        )
    given.write_bytes(model.getvalue() or b"no model")
    source = write_jsonl(tmp_path / "in.jsonl", [*texts, "\ufb01"])
    assert run(tmp_path / "out", source, "--tokenizer", given) == 2
    assert message in one_line(capsys)
    assert left(tmp_path / "out") == []


# ---- Bad input


@pytest.mark.parametrize(
    "name, content, message",
    [
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
        (
            "in.jsonl",
            b"".join(
                b'{"text": "%s"}\n' % "".join(map(chr, range(start, start + 900))).encode()
                for start in (0x4E00, 0x5E00, 0x6E00)
            ),
            "the characters of this text alone need",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
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
        (
            ["--separator", "\udcff"],
            r"--separator '\udcff': not UTF-8",
        ),  # as Python gives a byte that is none
        (["--tokenizer", "absent.model"], "absent.model: no such file"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(arguments, message, folder, tmp_path, capsys):
    assert run(tmp_path, folder, *arguments) == 2
    assert message in one_line(capsys)
    assert left(tmp_path) == []


def test_a_line_of_a_jsonl_has_a_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "LONGEST_LINE", 1 << 20)
    assert run(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", ["a", "x" * (2 << 20)])) == 2
    assert "in.jsonl, line 2: longer than 1 MB" in one_line(capsys)


def test_an_unreadable_folder_is_not_passed_over(tmp_path, monkeypatch):
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        list(reading.Input([str(tmp_path)]).files(Counts()))


def test_links_to_folders_are_followed_and_a_circle_ends(tmp_path):
    for name in ("here/a.txt", "elsewhere/b.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "here")
    found = reading.Input([str(tmp_path / "here")]).files(Counts())
    assert [name for _, name in found] == ["a.txt", "link/b.txt"]


def test_closed_standard_input_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert run(tmp_path, "-") == 2
    assert "standard input is closed" in one_line(capsys) and left(tmp_path) == []


# ---- All or nothing


def test_the_summary_ends_with_the_command_that_trains(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "o u t", folder) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == (
        "to train on it: DATA_PATH='o u t/datasets/t_sp512' "
        f"TOKENIZER_PATH='o u t/tokenizers/t_512_bpe.model' VOCAB_SIZE=512 python {ROOT}/train_gpt.py"
    )
    for fact in (" documents, 0.", " bytes per token", " KB for validation are few", " files read"):
        assert fact in printed


def test_the_summary_says_what_cuts_mean_for_the_split(built):
    note = "pieces of a document that was cut can be on both sides of the split"
    assert note in prepare.summary({**manifest(built), "cuts": 1})
    assert note not in prepare.summary(manifest(built))


def test_what_is_there_is_built_again_only_for_a_reason(texts, tmp_path, capsys):
    out, source = tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", texts)
    shard, model = dataset(out) / "t_train_000000.bin", out / "tokenizers" / "t_512_bpe.model"

    def rebuilt(*arguments: object) -> bool:
        before = dataset(out).stat().st_ino
        assert run(out, source, *arguments) == 0
        return dataset(out).stat().st_ino != before

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
    (reading, "spill"),
    (prepare, "split"),
    (prepare, "train_tokenizer"),
    (prepare, "encode"),
    (prepare.ShardWriter, "close"),
    (prepare, "versions"),
    (prepare, "publish"),
]


@pytest.mark.parametrize(
    "place, stage, error, status",
    [
        *((*stage, KeyboardInterrupt(), 130) for stage in STAGES),
        (prepare, "encode", processes.Stopped(signal.SIGTERM), 143),
        (prepare.ShardWriter, "add", OSError(28, "No space left"), 2),
    ],
    ids=lambda found: str(found)[:9],
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


OTHER = ["--force", "--held-out", "0.5"]  # makes another tokenizer of the same text
MOVES = [
    (os, "rename", "t_sp512"),
    (shards, "write_atomically", "t_512_bpe.model"),
    (os, "rename", "finished"),
]  # function and first argument, as a build puts itself in place


@pytest.mark.parametrize("place, function, name", MOVES)
def test_a_failure_when_it_is_put_in_place_leaves_what_was_there(
    place, function, name, built, folder, tmp_path, monkeypatch
):
    real, failed = getattr(place, function), []

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
    new = name != "t_sp512"  # nothing to move
    assert run(tmp_path, folder) == (2 if new else 0) and bool(failed) == new
    assert len(left(tmp_path)) == (0 if new else 4)


@pytest.mark.parametrize("place, function, name", MOVES[1:])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_killed_when_it_is_put_in_place_the_next_one_completes(
    place, function, name, first, built, folder, tmp_path, capsys
):
    if not first:
        shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    script = (
        f"import os, sys, prepare, {place.__name__} as place\nreal = place.{function}\n"
        f"place.{function} = lambda path, *more: os._exit(9) if path.name == {name!r} else "
        "real(path, *more)\nprepare.main(sys.argv[1:])"
    )
    command = [
        sys.executable,
        "-c",
        script,
        *COMMAND[2:],
        "--out",
        tmp_path,
        "--jobs",
        "1",
        folder,
        *OTHER,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "data")}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 9
    assert not dataset(tmp_path).exists()
    assert run(tmp_path, folder, *OTHER[1:]) == 0 and "just been built" in capsys.readouterr().out
    assert check.main([str(dataset(tmp_path))]) == 0 and len(left(tmp_path)) == 4


def test_no_other_process_enters_a_workspace_before_it_is_empty(tmp_path, monkeypatch):
    workspace, real, there = tmp_path / ".t-partial", os.unlink, []

    def note(path: object, **options: object) -> None:
        there.extend(os.listdir(workspace) if Path(path).name == "lock" else [])
        real(path, **options)

    (workspace / "left").mkdir(parents=True)
    with processes.own_workspace(tmp_path / "t"):
        (workspace / "finished").mkdir()
        (workspace / "documents").touch()
        monkeypatch.setattr(os, "unlink", note)
    assert there == ["lock"] and not workspace.exists()


def test_a_signal_while_the_tokenizer_is_trained_is_one_line(folder, tmp_path, monkeypatch, capsys):
    real, calls = prepare.sample_lines, []

    def raise_later(found: Documents):
        calls.append(found)
        for number, line in enumerate(real(found)):
            if len(calls) == 2 and number == 50:  # SentencePiece reads them
                signal.raise_signal(signal.SIGTERM)
            yield line

    monkeypatch.setattr(prepare, "sample_lines", raise_later)
    assert run(tmp_path, folder) == 128 + signal.SIGTERM
    assert one_line(capsys) == "interrupted: nothing half done is left" and left(tmp_path) == []


def test_signals_wait_for_what_must_not_be_half_done():
    done = []
    with pytest.raises(processes.Stopped):
        before = signal.signal(signal.SIGTERM, processes.stop)
        try:
            with processes.uninterrupted():
                signal.raise_signal(signal.SIGTERM)
                done.append("all")
            done.append("too late")
        finally:
            signal.signal(signal.SIGTERM, before)
    assert done == ["all"]


def start(out: Path, source: object, *arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, "--out", str(out), str(source), *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def session(process: subprocess.Popen) -> list[int]:
    """The processes of its session that have not ended."""
    found = subprocess.run(
        ["ps", "-s", str(process.pid), "-o", "pid=,stat="], capture_output=True, text=True
    )
    return [
        int(line.split()[0]) for line in found.stdout.splitlines() if "Z" not in line.split()[1]
    ]


def wait_for(condition, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def larger(texts, tmp_path_factory) -> Path:
    """Some MB, which take a while to encode."""
    path = tmp_path_factory.mktemp("larger") / "in.jsonl"
    return write_jsonl(path, [f"{number}\n{text}" for number in range(20) for text in texts])


def test_a_signal_to_all_processes_while_they_encode_is_one_line(larger, tmp_path):
    process = start(tmp_path, larger, "--jobs", "2")
    wait_for(lambda: list(tmp_path.glob("datasets/.*/finished/t_train_000000.bin")))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    error = process.communicate(timeout=30)[1].replace("\r", "\n").strip().splitlines()
    assert process.returncode == 130
    assert error[-1] == "interrupted: nothing half done is left" and "Traceback" not in "".join(
        error
    )
    assert "Warning" not in "".join(error)
    assert left(tmp_path) == []
    wait_for(lambda: not session(process), 10)


def test_after_a_kill_no_process_goes_on_and_the_next_run_completes(
    built, folder, larger, tmp_path
):
    process = start(tmp_path, larger, "--jobs", "2")
    wait_for(lambda: list(tmp_path.glob("datasets/.*/finished/t_train_000000.bin")))
    process.kill()
    process.communicate(timeout=10)  # the workers have its pipes, too
    wait_for(lambda: not session(process), 10)
    assert (
        left(tmp_path) and not dataset(tmp_path).exists() and not (tmp_path / "tokenizers").exists()
    )
    assert run(tmp_path, folder) == 0
    assert outputs(tmp_path) == outputs(built) and len(left(tmp_path)) == 4


def test_a_second_build_waits_for_the_first_and_uses_what_it_made(built, folder, tmp_path, capsys):
    first = start(tmp_path, "-", "--separator", r"\n<|end|>\n", stdin=subprocess.PIPE)
    wait_for(lambda: list(tmp_path.glob("datasets/.*/buckets/b0")))
    second = start(tmp_path, folder)
    assert "another process is building this, waiting for it" in second.stderr.readline()
    first.terminate()
    assert first.wait() == 143
    assert second.communicate()[0].count("\n") == 6 and second.returncode == 0
    assert outputs(tmp_path) == outputs(built) and len(left(tmp_path)) == 4


def test_builds_of_the_same_at_the_same_time_both_succeed(built, folder, tmp_path):
    both = [start(tmp_path, folder, "--jobs", "1") for _ in range(2)]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("built" in text for text in printed) == 1
    assert outputs(tmp_path) == outputs(built) and len(left(tmp_path)) == 4


def test_workers_leave_the_signals_to_their_parent():
    with processes.Workers(2) as workers:
        assert list(workers.map(abs, [-1, -2])) == [1, 2]
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
        assert list(workers.map(abs, [-3])) == [3]


def test_an_error_does_not_wait_for_what_the_workers_do():
    started = time.monotonic()
    with pytest.raises(KeyError), processes.Workers(2) as workers:
        workers.submit(time.sleep, 30)
        raise KeyError
    assert time.monotonic() - started < 20


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(BadInput, match="try fewer --jobs"), processes.Workers(2) as workers:
        list(workers.map(os._exit, [1]))
