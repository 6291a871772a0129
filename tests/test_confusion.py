"""Data that cannot be confused: runs on wrong combinations of text, tokenizer and what is noted.

Each scores the exact bytes of its text, or ends with one line before it trains.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import check
import prepare
import train_gpt
from audit_text import Text
from audit_verdicts import read_sizes, read_text
from case_operators import OPERATORS, with_operators
from challenge import foreign_text
from commands import BadInput
from conftest import BOS, documents, write_shard
from corpora import read_tokens, tokens_of, train_of_kind, train_tokenizer, write_dataset
from manifest import Data, find_data
from run_logs import Log
from runs import MACHINE, TINY_RUN, Done, is_one_error
from tokenizer import BYTE_TOKENIZER
from train_gpt import ARTIFACT_NAME

pytest_plugins = ["run_fixtures"]

# All tokenizers here have so many pieces.
PIECES = 600
# Two steps of a model that takes milliseconds.
QUICK = dict(
    TINY_RUN,
    VOCAB_SIZE="0",
    NUM_LAYERS="2",
    MODEL_DIM="16",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    BIGRAM_DIM="4",
    MTP_NUM_HEADS="0",
    ITERATIONS="2",
    TRAIN_LOG_EVERY="1",
    QUANT="rows",
)
TRAINING_TEXTS = documents()[40:160]
# With operators that stand in the text itself.
TEXTS = [*documents()[:5], f"An {OPERATORS[3]}{OPERATORS[0]}operator, {OPERATORS[1]}NASA", "iOS"]
BYTES = sum(len(text.encode()) for text in TEXTS)


# ---- Tokenizers, and shards that they made
@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    """Tokenizers of one size: plain, another one, with case operators; and that of bytes."""
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = {"plain": TRAINING_TEXTS, "other": documents()[160:], "operators": TRAINING_TEXTS}
    found = {"bytes": BYTE_TOKENIZER}
    for name, its_texts in texts.items():
        path = folder / f"{name}.model"
        found[name] = train_of_kind(path, its_texts, PIECES, name == "operators")
    return found


def write_data(folder: Path, model: Path, has_model: bool = True) -> Path:
    """Write shards of the texts, and beside them tokenizer.model."""
    return write_dataset(folder, model, TRAINING_TEXTS, TEXTS, has_model)


def split_shard(path: Path, count: int) -> None:
    """Divide the only shard of a split into several."""
    for number, part in enumerate(np.array_split(read_tokens(path), count)):
        write_shard(path.with_name(path.name.replace("000000", f"{number:06}")), part)


def note(folder: Path, **content: object) -> None:
    """Write a manifest."""
    (folder / "manifest.json").write_text(json.dumps(content))


# ---- How a run ends
def trains(done: Done) -> bool:
    """Whether a run made a step."""
    return "train_loss:" in done.out


def assert_scored(done: Done, size: int = BYTES) -> dict:
    """Assert that a run scored so many bytes; its results."""
    assert done.status == 0, done.err
    results = done.results()
    assert results["final_int6_sliding_window"]["bytes"] == size
    assert results["final_int6_roundtrip"]["bytes"] == size
    return results


def assert_refused(done: Done, pattern: str, trained: bool = False) -> None:
    """Assert that a run ended with one line, before it trained if not said otherwise."""
    assert done.status == 2, done.out
    assert is_one_error(done.err, pattern), done.err
    assert trains(done) == trained and not done.score_lines()


@pytest.fixture
def start(run_here, tmp_path) -> Callable[..., Done]:
    """start(folder, **settings): a quick run on the data in a folder."""

    def call(folder: Path | None, **settings: str) -> Done:
        here = tmp_path / "here"
        here.mkdir(exist_ok=True)
        # Of an earlier run of the test.
        shutil.rmtree(here / "logs", ignore_errors=True)
        data = {} if folder is None else {"DATA_PATH": str(folder)}
        return run_here(here, **{**QUICK, **data, **settings})

    return call


# ---- The right combinations
@pytest.mark.parametrize("kind", ["plain", "operators"])
def test_the_bytes_are_those_of_the_original_text(kind, tokenizers, start, tmp_path):
    done = start(write_data(tmp_path / "data", tokenizers[kind]))
    results = assert_scored(done)
    compliance = results["compliance"]
    assert results["settings"]["vocab_size"] == PIECES
    assert compliance["validation_split"] == "not known" and compliance["data_warnings"] == []
    assert "normalized" not in compliance
    assert compliance["validation_documents"] == len(TEXTS)
    assert f"case_operators:{int(kind == 'operators')}" in done.out
    assert "bytes_by:pieces" in done.out


@pytest.mark.parametrize("kind", ["operators", "bytes"])
def test_a_sample_is_original_text(kind, tokenizers, start, run_here, tmp_path):
    folder = write_data(tmp_path / "mine_byte260", tokenizers[kind])
    model = str(BYTE_TOKENIZER if kind == "bytes" else tokenizers[kind])
    done = start(folder, TOKENIZER_PATH=model)
    # A manifest may tell of a validation split that nobody needs here.
    note(folder, val={"tokens": 10**6}, files={"x_val_000001.bin": {"bytes": 7}})
    prompt = "The NASA iPhone is\nMcDonald's É "
    named = dict(DATA_PATH=str(folder), TOKENIZER_PATH=model, ARTIFACT=ARTIFACT_NAME)
    done = run_here(done.folder, **MACHINE, **named, SAMPLE=prompt, SAMPLE_TOKENS="9", RUN_ID="s")
    assert done.status == 0, done.err
    written = done.out.partition(prompt)[2]
    assert prompt in done.out and written.strip()
    assert not any(operator in done.out for operator in OPERATORS)
    assert "warning" not in done.out


@pytest.mark.parametrize("said", ["by the name", "by the manifest", "by TOKENIZER_PATH"])
def test_shards_of_bytes_need_no_tokenizer(said, tokenizers, start, tmp_path):
    name = "mine_byte260" if said == "by the name" else "mine"
    folder = write_data(tmp_path / name, tokenizers["bytes"])
    settings = {}
    if said == "by the manifest":
        note(folder, tokenizer={"kind": "bytes"})
    elif said == "by TOKENIZER_PATH":
        settings["TOKENIZER_PATH"] = "byte260"
    results = assert_scored(start(folder, **settings))
    assert results["settings"]["vocab_size"] == 260
    assert results["final_int6_roundtrip"]["targets"] == BYTES + len(TEXTS) - 1


def test_the_end_of_a_document_may_be_marked_too(tokenizers, start, tmp_path):
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    for path in folder.glob("*.bin"):
        tokens = read_tokens(path)
        begins = np.flatnonzero(tokens == BOS)[1:]
        write_shard(path, np.append(np.insert(tokens, begins, 2), 2))
    assert_scored(start(folder))


# ---- Text that was normalized
@pytest.fixture
def normalized(tokenizers, tmp_path) -> Path:
    """What data/prepare.py --normalized makes of the texts, 600 pieces."""
    options = dict(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    model = train_tokenizer(tmp_path / "its.model", TRAINING_TEXTS, PIECES, **options)
    source = tmp_path / "in.jsonl"
    texts = [*TRAINING_TEXTS, *TEXTS]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--name", "t", "--tokenizer", model, "--normalized", "--out", tmp_path, source]
    assert prepare.main([str(argument) for argument in arguments]) == 0
    return tmp_path / "datasets/t_sp600_normalized"


def test_a_score_on_normalized_text_says_so_and_is_none_of_the_challenge(normalized, start):
    noted = json.loads((normalized / "manifest.json").read_text())
    done = start(normalized)
    compliance = assert_scored(done, noted["val"]["bytes"])["compliance"]
    change = noted["normalized"]
    told = (
        f"{change['documents_changed']} of {change['documents']} documents and "
        f"{change['bytes_changed']} of {change['bytes_before']} bytes of the original text are "
        "changed"
    )
    assert compliance["normalized"] == told
    (warning,) = compliance["data_warnings"]
    assert told in warning and warning.endswith("no score of the challenge")
    assert f"warning: data: {warning}" in done.out
    # The auditor counts the same bytes from the decoded text.
    data = find_data(normalized)
    text = Text(data.tokenizer)
    tokens = read_text(data, text)
    assert text.count(tokens) == read_sizes(data, text, tokens).sum() == noted["val"]["bytes"]
    log = Log(next((done.folder / "logs").glob("*.txt")))
    reasons = foreign_text(log)
    assert any("not on the challenge's FineWeb" in reason for reason in reasons)
    assert f"Its log says: {warning}" in reasons


def test_where_nothing_says_what_was_normalized_that_is_not_stated(normalized, start):
    """Shards as the field publishes them: whoever made them may have changed nothing."""
    noted = json.loads((normalized / "manifest.json").read_text())
    del noted["normalized"]
    note(normalized, **noted)
    compliance = assert_scored(start(normalized), noted["val"]["bytes"])["compliance"]
    assert compliance["normalized"] == "by the tokenizer; what it changed is not stated"
    assert compliance["data_warnings"] == []


# ---- Another tokenizer
PAIRS = [("plain", "operators"), ("operators", "plain"), ("plain", "other"), ("bytes", "plain")]


@pytest.mark.parametrize("made_by, given", PAIRS)
@pytest.mark.parametrize("long", [False, True])
def test_a_tokenizer_with_as_many_pieces_is_refused(
    made_by, given, long, tokenizers, start, tmp_path
):
    folder = write_data(tmp_path / "data", tokenizers[made_by])
    if long:
        # One document, which does not end.
        tokens = read_tokens(folder / "x_train_000000.bin")
        write_shard(folder / "x_train_000000.bin", [BOS, *tokens[tokens != BOS]])
    done = start(folder, TOKENIZER_PATH=str(tokenizers[given]))
    message = r"did not make this shard: token \d+ is .* there, .* by this tokenizer; check"
    assert_refused(done, f"x_train_000000.bin: tokenizer .*{given}.model {message} TOKENIZER_PATH")


def test_a_tokenizer_with_other_pieces_is_refused(tokenizers, start, tmp_path):
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    done = start(folder, TOKENIZER_PATH="byte260")
    assert_refused(done, "x_train_000000.bin: token 599 is outside of VOCAB_SIZE=260")


@pytest.mark.parametrize("name", ["mine", "mine_sp1024"])
def test_no_other_tokenizer_takes_the_place_of_one_that_was_forgotten(
    name, tokenizers, start, tmp_path
):
    here = tmp_path / "here/data"
    (here / "tokenizers").mkdir(parents=True)
    shutil.copy(tokenizers["other"], here / "tokenizers/fineweb_1024_bpe.model")
    folder = write_data(here / "datasets" / name, tokenizers["plain"], has_model=False)
    message = "no tokenizer at .*: TOKENIZER_PATH must name the one of these shards"
    assert_refused(start(folder), f"{name}: {message}, or byte260 for shards of bytes")


def test_a_shard_of_another_tokenizer_among_the_others_is_refused(tokenizers, start, tmp_path):
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    split_shard(folder / "x_train_000000.bin", 12)
    another = tokens_of(tokenizers["operators"], TRAINING_TEXTS[:9])
    write_shard(folder / "x_train_000007.bin", another)
    assert_refused(start(folder), "x_train_000007.bin: .* did not make this shard: token")
    write_shard(folder / "x_train_000007.bin", [BOS, 5000, 70, 71])
    done = start(folder)
    assert_refused(done, f"x_train_000007.bin: token 5000 is outside of VOCAB_SIZE={PIECES}")


def test_validation_shards_of_another_tokenizer_are_refused(tokenizers, start, tmp_path):
    """After training: the text is not read before."""
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    write_shard(folder / "x_val_000000.bin", tokens_of(tokenizers["operators"], TEXTS))
    message = "x_val_000000.bin: .* did not make this shard: token"
    assert_refused(start(folder), message, trained=True)


# How text without capitals may come to a tokenizer that has not the four operators as pieces.
FOREIGN_RULES = {
    "no operator is a piece": (with_operators, {}),
    "three of four are pieces": (
        with_operators,
        dict(user_defined_symbols=list(OPERATORS[:3]), byte_fallback=True),
    ),
    "another rule": (lambda text: re.sub("[A-Z]", lambda m: "\ue000" + m[0].lower(), text), {}),
}


@pytest.mark.parametrize("rule", FOREIGN_RULES)
def test_rewritten_text_whose_operators_are_no_pieces_is_refused(rule, start, tmp_path):
    """Each operator would count as three bytes of text."""
    rewrite, options = FOREIGN_RULES[rule]
    training = [rewrite(text) for text in TRAINING_TEXTS]
    model = train_tokenizer(tmp_path / "its.model", training, PIECES, **options)
    # The text as it stands, by a tokenizer that does not rewrite it.
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(model, folder / "tokenizer.model")
    for split, texts in (("train", training), ("val", [rewrite(text) for text in TEXTS])):
        tokens = []
        for text in texts:
            tokens += [BOS, *processor.encode(text)]
        write_shard(folder / f"x_{split}_000000.bin", tokens)
    message = "data: capitals are rewritten as operators, which tokenizer .* does not have as four"
    assert_refused(start(folder), message)
    assert check.main([str(folder)]) == 1
    with pytest.raises(BadInput, match="capitals are rewritten as operators"):
        read_text(Data(folder, model), Text(model))


def test_a_piece_that_holds_an_operator_beside_text_is_refused(start, tmp_path):
    rewritten = [with_operators(text) for text in TRAINING_TEXTS]
    symbols = [*OPERATORS, OPERATORS[0] + "the"]
    model = train_tokenizer(tmp_path / "its.model", rewritten, PIECES, user_defined_symbols=symbols)
    folder = write_data(tmp_path / "data", model)
    message = r"tokenizer.model: the piece '\\ue001the' holds an operator for letter case"
    assert_refused(start(folder), message)
    assert check.main([str(folder)]) == 1


def test_text_that_has_no_capitals_is_no_rewritten_one(start, tmp_path):
    folder = tmp_path / "data"
    texts = [text.lower() for text in TRAINING_TEXTS]
    model = train_of_kind(tmp_path / "its.model", texts, PIECES, False)
    write_dataset(folder, model, texts, [text.lower() for text in documents()[:5]])
    assert start(folder).status == 0


def test_another_vocab_size_than_the_datas_is_refused(tokenizers, start, tmp_path):
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    done = start(folder, VOCAB_SIZE="1024")
    message = "600 pieces, but VOCAB_SIZE=1024: leave VOCAB_SIZE out, or name data with so many"
    assert_refused(done, f"tokenizer.model: {message}")
    assert_scored(start(folder, VOCAB_SIZE="600"))


# ---- Byte files
BYTE_FILE = "x_val_bytes_000000.bin"


@pytest.fixture
def with_byte_file(tokenizers, tmp_path) -> Path:
    """A folder as the field's script for case operators writes it."""
    folder = write_data(tmp_path / "data", tokenizers["operators"])
    table = train_gpt.ByteTable(train_gpt.load_tokenizer(tokenizers["operators"]))
    write_shard(folder / BYTE_FILE, table.sizes(read_tokens(folder / "x_val_000000.bin")))
    return folder


def test_a_byte_file_is_no_text_and_counts_the_bytes(with_byte_file, start):
    tokens = read_tokens(with_byte_file / "x_val_000000.bin")
    results = assert_scored(start(with_byte_file))
    assert results["final_int6_roundtrip"]["targets"] == len(tokens) - 1
    # Of a text that the tokenizer normalized it may say a little else.
    sizes = read_tokens(with_byte_file / BYTE_FILE)
    sizes[40] += 3
    write_shard(with_byte_file / BYTE_FILE, sizes)
    done = start(with_byte_file)
    assert_scored(done, BYTES + 3)
    assert "bytes_by:byte files" in done.out


def test_a_byte_file_of_another_text_is_refused(with_byte_file, start):
    sizes = read_tokens(with_byte_file / BYTE_FILE)
    # The same sizes, in another order.
    text = np.flatnonzero(sizes)
    shifted = sizes.copy()
    shifted[text] = np.roll(sizes[text], 1)
    write_shard(with_byte_file / BYTE_FILE, shifted)
    message = rf"{BYTE_FILE}: \d+ bytes, but {BYTES} by the pieces, first different at token"
    assert_refused(start(with_byte_file), message, trained=True)


@pytest.mark.parametrize("token, size", [(BOS, 1), (4, 3)], ids=["BOS", "operator"])
def test_a_byte_file_with_bytes_where_there_is_no_text_is_refused(
    token, size, with_byte_file, start, tmp_path
):
    """However few they are: a count that is a little too high is a score that is too good."""
    tokens = read_tokens(with_byte_file / "x_val_000000.bin")
    sizes = read_tokens(with_byte_file / BYTE_FILE)
    place = np.flatnonzero((tokens == token) & (sizes == 0))[0]
    sizes[place] = size
    write_shard(with_byte_file / BYTE_FILE, sizes)
    message = rf"{BYTE_FILE}: bytes behind token \[{place}\], which stands for none"
    assert_refused(start(with_byte_file), message, trained=True)
    if place:
        model = with_byte_file / "tokenizer.model"
        with pytest.raises(BadInput, match="1 tokens have bytes that stand for none"):
            read_sizes(Data(with_byte_file, model), Text(model), tokens)


def test_byte_files_that_do_not_fit_are_refused(with_byte_file, start):
    sizes = read_tokens(with_byte_file / BYTE_FILE)
    write_shard(with_byte_file / BYTE_FILE, sizes[:-1])
    found = len(sizes)
    assert_refused(start(with_byte_file), f"{BYTE_FILE}: {found - 1} sizes for {found} tokens")
    (with_byte_file / BYTE_FILE).write_bytes(b"damaged")
    assert_refused(start(with_byte_file), f"{BYTE_FILE}: no token shard")
    split_shard(with_byte_file / "x_val_000000.bin", 2)
    assert_refused(start(with_byte_file), "byte files for 1 of 2 validation shards")
    # As if the second shard were not here.
    write_shard(with_byte_file / "x_val_bytes_000001.bin", [3, 3])
    (with_byte_file / "x_val_000001.bin").unlink()
    message = "x_val_bytes_000001.bin: a byte file without its validation shard: get the shard"
    assert_refused(start(with_byte_file), message)


# ---- Parts and gaps
@pytest.mark.parametrize("said", ["by the manifest", "by the folder's name", "by its own name"])
def test_a_part_of_the_validation_split_is_said(said, tokenizers, start, tmp_path, monkeypatch):
    name = "fineweb10B_known" if said == "by the folder's name" else "data"
    folder = write_data(tmp_path / name, tokenizers["plain"])
    whole = len(read_tokens(folder / "x_val_000000.bin"))
    monkeypatch.setattr(train_gpt, "FINEWEB_VALIDATION", {"known": whole})
    if said == "by the manifest":
        note(folder, val={"tokens": whole})
    elif said == "by its own name":
        note(folder, name="fineweb10B_known")
    assert assert_scored(start(folder))["compliance"]["validation_split"] == "whole"

    split_shard(folder / "x_val_000000.bin", 2)
    (folder / "x_val_000001.bin").unlink()
    done = start(folder)
    part = len(read_tokens(folder / "x_val_000000.bin"))
    problem = f"the validation split is a part: {part} of {whole} tokens: no score of the challenge"
    compliance = done.results()["compliance"]
    assert compliance["validation_split"] == f"part: {part} of {whole} tokens"
    assert compliance["data_warnings"][0] == problem
    assert f"warning: data: {problem}\n" in done.out

    more = [*tokens_of(tokenizers["plain"], TEXTS), *tokens_of(tokenizers["plain"], TEXTS[:3])]
    write_shard(folder / "x_val_000000.bin", more)
    compliance = start(folder).results()["compliance"]
    assert compliance["validation_split"] == f"more: {len(more)} tokens, not {whole}"
    assert "no score of the challenge" in compliance["data_warnings"][0]


def test_an_export_of_few_documents_is_said(tokenizers, start, tmp_path):
    """Of some exports no number of tokens is known, but all have the same documents."""
    folder = write_data(tmp_path / "fineweb10B_sp4096", tokenizers["plain"])
    done = start(folder)
    said = f"{len(TEXTS)} validation documents, not the challenge's 50000"
    assert assert_scored(done)["compliance"]["data_warnings"] == [said]
    assert f"warning: data: {said}\n" in done.out


def test_training_shards_may_begin_within_a_document(tokenizers, start, tmp_path):
    """As those of a run with some of many shards, whose numbers may begin anywhere."""
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    path = folder / "x_train_000000.bin"
    write_shard(folder / "x_train_000010.bin", read_tokens(path)[9:])
    path.unlink()
    assert assert_scored(start(folder))["compliance"]["data_warnings"] == []


@pytest.mark.parametrize("split", ["train", "val"])
def test_two_shards_of_one_number_are_refused(split, tokenizers, start, tmp_path):
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    shutil.copy(folder / f"x_{split}_000000.bin", folder / f"x_{split}_0.bin")
    message = f"x_{split}_000000.bin: .*x_{split}_0.bin has the same number: remove the one"
    assert_refused(start(folder), message)


def test_shards_are_read_in_the_order_of_their_numbers(tokenizers, start, tmp_path):
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    split_shard(folder / "x_val_000000.bin", 12)
    for path in sorted(folder.glob("x_val_*.bin")):
        path.rename(folder / f"x_val_{int(path.stem[-6:])}.bin")
    assert_scored(start(folder))


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_without_bos_are_refused(split, tokenizers, start, tmp_path):
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    path = folder / f"x_{split}_000000.bin"
    tokens = read_tokens(path)
    write_shard(path, tokens[tokens != BOS])
    message = rf"x_{split}_000000.bin: begins with token \[\d+\], not with BOS \(1\)"
    assert_refused(start(folder), message)


def test_an_empty_validation_split_is_refused(tokenizers, start, tmp_path):
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    write_shard(folder / "x_val_000000.bin", [])
    assert_refused(start(folder), r"x_val_000000.bin: begins with token \[\], not with BOS")


def test_a_gap_in_the_validation_split_is_refused(tokenizers, start, tmp_path):
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    split_shard(folder / "x_val_000000.bin", 4)
    (folder / "x_val_000001.bin").unlink()
    message = r"data: val shards \[1\] are missing: a score would leave out their text"
    assert_refused(start(folder), message)
    (folder / "x_val_000002.bin").rename(folder / "x_val_20261128.bin")
    message = r"data: val shards \[1, 2, 4\] and 20261123 more are missing"
    assert_refused(start(folder), message)


def test_a_gap_in_the_training_split_is_said(tokenizers, start, tmp_path):
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    split_shard(folder / "x_train_000000.bin", 4)
    (folder / "x_train_000002.bin").unlink()
    done = start(folder)
    assert assert_scored(done)["compliance"]["data_warnings"] == [
        "training shards are missing: [2]"
    ]
    assert "warning: data: training shards are missing: [2]\n" in done.out


def test_the_export_that_leaks_is_named(tokenizers, start, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "LEAKED_SHARDS", 1)
    done = start(write_data(tmp_path / "data", tokenizers["operators"]))
    (said,) = assert_scored(done)["compliance"]["data_warnings"]
    assert (
        "40,000 validation documents are among the training documents" in said and said in done.out
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_of_two_data_sets_in_a_folder_are_refused(split, tokenizers, start, tmp_path):
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    tokens = tokens_of(tokenizers["operators"], TEXTS)
    write_shard(folder / f"y_{split}_000000.bin", tokens)
    message = rf"data: {split} shards of several data sets \(x, y\): give each a folder of its own"
    assert_refused(start(folder), message)


# ---- What is noted beside the shards
def test_the_manifest_names_the_tokenizer(tokenizers, start, tmp_path):
    folder = write_data(tmp_path / "data", tokenizers["operators"], has_model=False)
    model = tokenizers["operators"]
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    named = dict(file=str(model), sha256=digest, kind="sentencepiece", case_operators=True)
    note(folder, tokenizer=named, val={"bytes": BYTES})
    assert_scored(start(folder))
    # Another is refused by its digest, whatever it has made.
    done = start(folder, TOKENIZER_PATH=str(tokenizers["plain"]))
    message = "its manifest has another SHA-256: check TOKENIZER_PATH, or get the tokenizer again"
    assert_refused(done, f"plain.model is not the tokenizer of .*data: {message}")
    note(folder, tokenizer={**named, "sha256": "0" * 64})
    assert_refused(start(folder), f"operators.model is not the tokenizer of .*data: {message}")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "manifest.json: no JSON object: make it again, or remove it"),
        ("[]", "manifest.json: no JSON object: make it again, or remove it"),
        (
            '{"tokenizer": {"case_operators": true}}',
            "data: the manifest says case_operators: true, but its tokenizer has 0 of the four",
        ),
        (
            '{"files": {"x_val_000000.bin": {"bytes": 7}}}',
            r"x_val_000000.bin: \d+ bytes, but 7 in the manifest: get or make it again",
        ),
        (
            '{"files": {"x_val_000000.bin": {}, "x_val_000001.bin": {"bytes": 7}}}',
            "x_val_000001.bin: is not here, but the manifest lists it: get it",
        ),
        (
            '{"files": {"x_train_000000.bin": {}}}',
            "x_val_000000.bin: the manifest does not list it: move it, or make the data again",
        ),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(content, message, tokenizers, start, tmp_path):
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    (folder / "manifest.json").write_text(content)
    assert_refused(start(folder), message)


def test_a_manifest_without_sense_is_as_none(tokenizers, start, tmp_path):
    folder = write_data(tmp_path / "data", tokenizers["plain"])
    note(folder, tokenizer=7, val={"tokens": "many"}, files=[], name=None)
    assert_scored(start(folder))


# ---- Where no data is named
def write_variants(folder: Path, tokenizers: dict[str, Path]) -> None:
    """Write exports of the challenge's text, named as if bytes were its second choice."""
    (folder / "tokenizers").mkdir(parents=True)
    shutil.copy(tokenizers["plain"], folder / f"tokenizers/fineweb_{PIECES}_bpe.model")
    for name, model in ((f"sp{PIECES}", "plain"), ("byte260", "bytes")):
        place = folder / "datasets" / f"fineweb10B_{name}"
        write_data(place, tokenizers[model], has_model=False)


@pytest.mark.parametrize(
    "size, said, chosen",
    [("0", "any", "sp600"), ("600", "600", "sp600"), ("260", "260", "byte260")],
)
def test_of_several_exports_vocab_size_chooses(
    size, said, chosen, tokenizers, start, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_gpt, "FINEWEB_VARIANTS", (f"sp{PIECES}", "byte260"))
    write_variants(tmp_path / "here/data", tokenizers)
    done = start(None, VOCAB_SIZE=size)
    assert_scored(done)
    reason = f"the first with VOCAB_SIZE={said} of sp600, byte260"
    folder = f"data/datasets/fineweb10B_{chosen}"
    assert f"data: DATA_PATH is not set: {folder}, {reason}\n" in done.out


def test_an_export_that_is_not_here_is_said(tokenizers, start, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "FINEWEB_VARIANTS", (f"sp{PIECES}", "byte260"))
    write_variants(tmp_path / "here/data", tokenizers)
    message = "no data with VOCAB_SIZE=1024: data/datasets has sp600, byte260; download it with"
    assert_refused(start(None, VOCAB_SIZE="1024"), message)
