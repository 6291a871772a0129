"""data/check.py: what it finds in a folder of shards, whole and harmed in every way."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import check
import numpy as np
import pytest
import sentencepiece
from commands import BadInput
from conftest import BOS, VOCAB_SIZE, documents, write_shard
from files import digest
from prepare import TOKENIZER_OPTIONS
from shards import read_shard

TRAIN, VAL = "x_train_000000.bin", "x_val_000000.bin"


@pytest.fixture
def folder(data_folder: Path, tmp_path: Path) -> Path:
    """A copy of conftest's data with a manifest of its files and counts."""
    folder = tmp_path / "own"
    shutil.copytree(data_folder, folder)
    write_manifest(folder)
    return folder


def write_manifest(folder: Path, **changes) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in folder.iterdir()
        if path.suffix in (".bin", ".model")
    }
    content = {"format": 1, "vocabulary_size": VOCAB_SIZE, "files": files, **changes}
    (folder / "manifest.json").write_text(json.dumps(content))


def tokens(folder: Path, name: str) -> list[int]:
    return read_shard(folder / name).tolist()


def run(
    folder: Path, capsys: pytest.CaptureFixture, *more: str
) -> tuple[int, dict[str, tuple[str, str]], str]:
    """The exit status, {check: (PASS or FAIL or -, figure)} and what was on standard error."""
    status = check.main([str(folder), *more])
    said = capsys.readouterr()
    rows = [line.split(None, 1) for line in said.out.split("\n\n")[0].splitlines()]
    return status, {name: tuple(rest.split(None, 1)) for name, rest in rows}, said.err


def failed(rows: dict[str, tuple[str, str]]) -> list[str]:
    return [name for name, (word, _) in rows.items() if word == "FAIL"]


def tokenizer(path: Path, texts: list[str] | None = None, **options) -> Path:
    """A tokenizer of VOCAB_SIZE pieces trained on texts, else conftest's, with these options changed."""
    model = io.BytesIO()
    lines = [line for text in texts or documents() for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        **{
            **TOKENIZER_OPTIONS,
            "vocab_size": VOCAB_SIZE,
            "max_sentence_length": 1 << 20,
            **options,
        },
    )
    path.write_bytes(model.getvalue())
    return path


def write_split(folder: Path, name: str, texts: list[str], model: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    write_shard(
        folder / name, [token for text in texts for token in (BOS, *processor.encode(text))]
    )


def test_a_whole_folder_passes_and_its_counts_are_those_of_its_text(folder, capsys):
    texts = {
        "val": documents()[::10],
        "train": [text for i, text in enumerate(documents()) if i % 10],
    }
    facts = {
        split: {
            "documents": len(held),
            "bytes": sum(len(text.encode()) for text in held),
            "tokens": len(tokens(folder, f"x_{split}_000000.bin")),
        }
        for split, held in texts.items()
    }
    write_manifest(folder, **facts)
    status, rows, errors = run(folder, capsys, "--json", str(folder / "found.json"))
    assert (status, errors) == (0, "")
    assert list(rows) == [
        "shards",
        "manifest",
        "tokenizer",
        "ids",
        "bytes",
        "lossless",
        "overlap",
        "counts",
    ]
    assert {word for word, _ in rows.values()} == {"PASS"}
    found = json.loads((folder / "found.json").read_text())
    for split, fact in facts.items():
        assert {key: found["counts"][split][key] for key in fact} == fact
    assert [row["name"] for row in found["checks"]] == list(rows)
    number = len(texts["val"])
    assert f"{number} of {number} documents" in rows["lossless"][1]


def harm_shard(change: Callable[[bytes], bytes], name: str = VAL) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        write_manifest(folder)

    return harm


def harm_tokens(
    change: Callable[[list[int]], list[int]], name: str = VAL
) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        write_shard(folder / name, change(tokens(folder, name)))
        write_manifest(folder)

    return harm


def plant_overlap(folder: Path) -> None:
    """The last validation document becomes a training document that begins in one shard, ends in the next."""
    held_out = tokens(folder, VAL)
    last = held_out[len(held_out) - held_out[::-1].index(BOS) - 1 :]
    write_shard(folder / "x_train_000001.bin", [BOS, 70, 71, *last[:9]])
    write_shard(folder / "x_train_000002.bin", last[9:])
    write_manifest(folder)


def other_content(folder: Path) -> None:
    content = bytearray((folder / TRAIN).read_bytes())
    content[-1] ^= 1
    (folder / TRAIN).write_bytes(content)


def spaceless(folder: Path) -> None:
    path = folder / "tokenizer.model"
    piece = b"\x0a\x03" + "▁".encode()
    path.write_bytes(path.read_bytes().replace(piece, b"\x0a\x03" + "☃".encode()))
    write_manifest(folder)


@pytest.mark.parametrize(
    "harm, name, said",
    [
        (harm_shard(lambda content: content[:-2]), "shards", "tokens in its header"),
        (harm_shard(lambda content: content[:500]), "shards", "no token shard"),
        (harm_shard(lambda content: b"PK\3\4" + content[4:]), "shards", "no token shard: magic"),
        (
            harm_shard(lambda content: content[:4] + b"\2" + content[5:], TRAIN),
            "shards",
            "version 1",
        ),
        (harm_tokens(lambda _: []), "shards", "the val split is empty"),
        (lambda folder: (folder / TRAIN).unlink(), "shards", "there is no train split"),
        (harm_tokens(lambda ids: [*ids, VOCAB_SIZE]), "ids", f"id {VOCAB_SIZE} in val"),
        (harm_tokens(lambda ids: ids[1:], TRAIN), "ids", "train begins with id"),
        (harm_tokens(lambda ids: [*ids, 3, 3]), "ids", "val has 2 ids for unknown (3)"),
        (harm_tokens(lambda ids: [*ids, 0], TRAIN), "ids", "train has 1 ids for padding (0)"),
        (
            harm_tokens(lambda ids: [*ids, BOS, 4 + 0xE2]),
            "bytes",
            "decoded",
        ),  # one byte of three, alone
        (plant_overlap, "overlap", "1 of"),
        (other_content, "manifest", f"{TRAIN} has another SHA-256"),
        (
            lambda folder: shutil.copy(folder / TRAIN, folder / "x_train_000001.bin"),
            "manifest",
            "is not in",
        ),
        (
            lambda folder: write_manifest(folder, val={"documents": 1}),
            "counts",
            "but manifest.json says 1",
        ),
        (
            lambda folder: write_manifest(folder, vocabulary_size=512),
            "tokenizer",
            "384 pieces, but",
        ),
        (
            lambda folder: write_manifest(folder, tokenizer={"sha256": "0"}),
            "manifest",
            "model has another SHA",
        ),
        (spaceless, "tokenizer", "it needs a piece ▁ of its own"),
        (
            lambda folder: (folder / "tokenizer.model").write_bytes(b"no model"),
            "tokenizer",
            "not a Sentence",
        ),
    ],
)
def test_what_is_wrong_fails_with_its_reason(folder, capsys, harm, name, said):
    harm(folder)
    status, rows, errors = run(folder, capsys)
    assert (status, errors) == (1, "")
    assert name in failed(rows) and said in rows[name][1]


def test_a_fault_of_the_shards_leaves_the_rest_unchecked_and_said_so(folder, capsys):
    (folder / VAL).write_bytes(b"short")
    _, rows, _ = run(folder, capsys)
    assert rows["overlap"] == ("-", "not checked: shards are wrong")


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
    ],
)
def test_what_cannot_be_checked_is_one_line(folder, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(folder.parent)
    for name, text in {"broken": "{", "listed": "[]", "bare": "{}"}.items():
        Path(name).mkdir()
        Path(name, "manifest.json").write_text(text)
        shutil.copy(folder / VAL, name)
    Path("empty").mkdir()
    assert check.main(arguments) == 2
    said_there = capsys.readouterr()
    assert (
        said_there.err.startswith("error: ")
        and said_there.err.count("\n") == 1
        and said in said_there.err
    )
    assert said_there.out == ""


def test_the_size_of_the_pieces_that_are_read_changes_nothing(folder, capsys, monkeypatch):
    plant_overlap(folder)
    whole = run(folder, capsys)
    monkeypatch.setattr(check, "PIECE_TOKENS", 1000)
    assert run(folder, capsys) == whole


def test_a_gap_in_the_numbers_is_said_and_does_not_fail(folder, capsys):
    (folder / TRAIN).rename(folder / "x_train_000002.bin")
    write_manifest(folder)
    status, rows, _ = run(folder, capsys)
    assert status == 0 and "train shard 0 is not there (2 numbers are missing)" in rows["shards"][1]


def test_a_large_split_is_encoded_again_in_part(folder, capsys, monkeypatch):
    total = len(documents()[::10])
    size = sum(len(text.encode()) for text in documents()[::10])
    monkeypatch.setattr(check, "SAMPLE_BYTES", -(-size // 3))
    _, rows, _ = run(folder, capsys)
    assert f"{-(-total // 3)} of {-(-total // 3)} documents" in rows["lossless"][1]


def test_another_tokenizer_of_the_same_size_is_suspected(folder, capsys):
    other = tokenizer(folder / "other.model", [text[::-1] for text in documents()])
    _, rows, _ = run(folder, capsys, "--tokenizer", str(other))
    assert "did another tokenizer make these shards?" in rows["lossless"][1]


@pytest.mark.parametrize("added, word", [([], "PASS"), (["\ufb01"], "FAIL")])
def test_a_tokenizer_that_normalizes_fails_only_where_it_changes_the_text(
    folder, capsys, added, word
):
    write_split(folder, VAL, [*documents()[::10], *added], tokenizer(folder / "one.model"))
    write_manifest(folder)
    other = tokenizer(folder / "other.model", normalization_rule_name="nfkc")
    _, rows, _ = run(folder, capsys, "--tokenizer", str(other))
    assert (rows["tokenizer"][0], rows["lossless"][0]) == ("PASS", word)
    assert "it normalizes" in rows["tokenizer"][1]


def test_a_tokenizer_without_bytes_fails(folder, capsys):
    other = tokenizer(folder / "other.model", byte_fallback=False)
    _, rows, _ = run(folder, capsys, "--tokenizer", str(other))
    assert "it needs a piece for each byte" in rows["tokenizer"][1]


def test_a_space_that_decoding_drops_before_a_document_counts_nothing(folder, capsys):
    model = tokenizer(folder / "tokenizer.model", add_dummy_prefix=True)
    write_split(folder, TRAIN, documents()[5:], model)
    write_split(folder, VAL, documents()[:5], model)
    write_manifest(folder)
    status, rows, _ = run(folder, capsys)
    size = sum(len(text.encode()) for text in documents()[:5])
    assert status == 0 and rows["bytes"][1].startswith(f"{size:,} by the pieces, {size:,} decoded")


def test_fineweb_is_found_with_its_tokenizer_and_what_differs_is_only_said(folder, capsys):
    published = folder.parent / "datasets" / f"fineweb10B_sp{VOCAB_SIZE}"
    published.parent.mkdir()
    (folder.parent / "tokenizers").mkdir()
    model = folder.parent / "tokenizers" / f"fineweb_{VOCAB_SIZE}_bpe.model"
    (folder / "tokenizer.model").unlink()
    (folder / "manifest.json").unlink()
    folder.rename(published)
    tokenizer(model, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    write_split(published, TRAIN, documents(), model)
    write_split(published, VAL, documents()[:5], model)
    status, rows, _ = run(published, capsys)
    assert status == 0
    assert (rows["tokenizer"][0], rows["overlap"][0], rows["bytes"][0]) == ("PASS", "-", "PASS")
    assert (
        "it normalizes" in rows["tokenizer"][1]
        and "5 of 5 validation documents" in rows["overlap"][1]
    )


def test_the_published_export_may_come_without_training_shards(folder, capsys):
    published = folder.rename(folder.parent / "fineweb10B_sp384")
    (published / TRAIN).unlink()
    write_manifest(published)
    status, rows, errors = run(published, capsys)
    assert (status, errors, rows["overlap"]) == (0, "", ("-", "there is no train split"))
    assert "there is no train split" in rows["shards"][1]
    assert [rows[name][0] for name in ("shards", "manifest", "tokenizer", "ids", "bytes")] == [
        "PASS"
    ] * 5


def test_a_folder_at_the_root_is_looked_at_like_any(tmp_path):
    with pytest.raises(
        BadInput, match="no tokenizer at /fineweb10B_sp7/tokenizer.model or /tokenizers/"
    ):
        check.find_tokenizer(Path("/fineweb10B_sp7"), None, {})


@pytest.mark.parametrize(
    "val, passed",
    [
        (check.Counts(1, 62_021_846, 50_000, 151_080_891), True),
        (check.Counts(1, 62_021_632, 50_000, 151_080_891), False),
        (check.Counts(1, 62_021_846, 49_999, 151_080_891), False),
        (check.Counts(1, 62_021_846, 50_000, 176_000_000), False),
    ],
)
def test_the_known_constants_of_fineweb_are_compared(val, passed):
    assert check.check_known(val).passed is passed


def test_the_known_constants_are_asked_of_that_split_alone(folder, capsys):
    assert "known" not in run(folder, capsys)[1]
    known = folder.rename(folder.parent / "fineweb10B_sp1024")
    write_manifest(known, vocabulary_size=None)
    check.main([str(known)])
    assert "known split  FAIL" in capsys.readouterr().out


def test_an_interruption_is_one_line(folder, capsys, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check_overlap", interrupt)
    assert check.main([str(folder), "--json", str(folder / "found.json")]) == 130
    assert capsys.readouterr().err.count("\n") == 1 and not (folder / "found.json").exists()


def test_the_documents_of_any_pieces_are_the_documents(folder, monkeypatch):
    ids = np.array(tokens(folder, VAL), dtype=np.uint16)
    expected = [part.tolist() for part in np.split(ids, np.flatnonzero(ids == BOS)[1:])]
    for size in (1, 7, len(ids)):
        monkeypatch.setattr(check, "PIECE_TOKENS", size)
        found = check.whole_documents([folder / VAL], check.tqdm(disable=True))
        assert [part.tolist() for parts in found for part in parts] == expected
