"""Shards, the order of training rows, tokenizers, and bytes of text behind the tokens."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from conftest import BOS, VOCAB_SIZE, write_shard
from train_gpt import (
    ByteTable,
    Tokenizer,
    TrainingRows,
    UserError,
    find_shards,
    load_tokenizer,
    load_validation,
    open_shard,
)

# ---- shards


def test_a_good_shard_is_mapped_and_read_back(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65536, 5000)
    found = open_shard(write_shard(tmp_path / "x_train_0.bin", tokens))
    assert np.array_equal(found, tokens) and found.dtype == np.uint16
    assert isinstance(found, np.memmap) and not found.flags.writeable


def test_a_shard_of_no_tokens_is_empty(tmp_path):
    assert len(open_shard(write_shard(tmp_path / "x_train_0.bin", []))) == 0


def header(magic: int = 20240520, version: int = 1, tokens: int = 100) -> bytes:
    """A shard's header, 1,024 bytes."""
    return struct.pack("<3i", magic, version, tokens).ljust(1024, b"\0")


DAMAGED_SHARDS = {
    "empty": b"",
    "one-byte": b"\0",
    "short-header": header()[:1023],
    "magic": header(magic=20240521) + bytes(200),
    "version": header(version=2) + bytes(200),
    "no-tokens-left": header(),
    "truncated": header() + bytes(199),
    "too-long": header() + bytes(202),
    "negative": header(tokens=-1),
    "negative-with-tokens": header(tokens=-1) + bytes(2),
    "big-endian": struct.pack(">3i", 20240520, 1, 100).ljust(1024, b"\0") + bytes(200),
    "text": b"a text " * 500,
}


def read_training_rows(path: Path) -> TrainingRows:
    """Open a shard as training does."""
    return TrainingRows([path], length=4, seed=0, vocab_size=9)


def read_validation(path: Path) -> np.ndarray:
    """Open a shard as evaluation does."""
    return load_validation([path], 65536)


@pytest.mark.parametrize("damage", DAMAGED_SHARDS)
def test_a_damaged_shard_is_named(damage, tmp_path):
    path = tmp_path / "x_val_000000.bin"
    path.write_bytes(DAMAGED_SHARDS[damage])
    for read in (open_shard, read_validation, read_training_rows):
        with pytest.raises(UserError, match="x_val_000000.bin") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_the_whole_validation_split_in_order(tmp_path):
    parts = [np.arange(10), np.arange(10, 11), [], np.arange(11, 50)]
    # Written backwards: names decide the order.
    for i in reversed(range(len(parts))):
        write_shard(tmp_path / f"x_val_{i:06}.bin", parts[i])
    write_shard(tmp_path / "x_train_000000.bin", [99])
    assert np.array_equal(load_validation(find_shards(tmp_path, "val"), 50), np.arange(50))


def test_a_token_outside_the_vocabulary_is_found_at_load_in_validation(tmp_path):
    files = [
        write_shard(tmp_path / "x_val_0.bin", [1, 2, 3]),
        write_shard(tmp_path / "x_val_1.bin", [1, 64, 3]),
    ]
    assert len(load_validation(files, 65)) == 6
    with pytest.raises(UserError, match="x_val_1.bin.*64"):
        load_validation(files, 64)


def test_a_token_outside_the_vocabulary_is_found_at_use_in_training(tmp_path):
    files = [write_shard(tmp_path / f"x_train_{i}.bin", np.full(100, 63 + i)) for i in range(2)]
    rows = TrainingRows(files, 10, 0, 64)
    with pytest.raises(UserError, match="x_train_1.bin.*64"):
        for position in range(rows.num_rows):
            assert rows.row(position).max() == 63


@pytest.mark.parametrize("tokens", [[], [1]])
def test_an_empty_validation_split_is_refused(tokens, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        load_validation([write_shard(tmp_path / "x_val_0.bin", tokens)], 64)


def test_a_missing_split_is_refused(tmp_path):
    write_shard(tmp_path / "x_train_000000.bin", range(9))
    with pytest.raises(UserError, match=f"{tmp_path}.*val"):
        find_shards(tmp_path, "val")


@pytest.mark.parametrize("length, fits", [(32, True), (33, False)])
def test_a_training_split_that_is_too_short_is_refused(length, fits, tmp_path):
    path = write_shard(tmp_path / "x_train_0.bin", np.full(65, 5))
    if fits:
        assert TrainingRows([path], length, 0, 64).num_rows == 1
    else:
        with pytest.raises(UserError, match=f"{tmp_path}.*{length}"):
            TrainingRows([path], length, 0, 64)


# ---- the order of rows

LENGTH = 7
# Tokens of the shards, among which one is empty and one too short for a row.
SHARD_SIZES = [100, 0, 9, 61, 500]
SHARD_ENDS = np.cumsum(SHARD_SIZES)


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    """Shards in which no token comes twice."""
    files = []
    for i, (size, end) in enumerate(zip(SHARD_SIZES, SHARD_ENDS, strict=True)):
        files.append(write_shard(tmp_path / f"x_train_{i}.bin", np.arange(end - size, end)))
    return files


def rows_of(data: TrainingRows, epoch: int) -> np.ndarray:
    """All rows of an epoch, (rows, length + 1)."""
    return np.stack([data.row(epoch * data.num_rows + i) for i in range(data.num_rows)])


def test_rows_are_contiguous_pieces_of_one_shard(shards):
    data = TrainingRows(shards, LENGTH, 3, 1000)
    for epoch in range(3):
        rows = rows_of(data, epoch)
        assert rows.shape == (data.num_rows, LENGTH + 1) and rows.dtype == np.int64
        assert (np.diff(rows) == 1).all()
        shard_of = np.searchsorted(SHARD_ENDS, rows, side="right")
        assert (shard_of == shard_of[:, :1]).all()


def test_each_row_comes_once_an_epoch(shards):
    data = TrainingRows(shards, LENGTH, 3, 1000)
    for epoch in range(4):
        # The last token of a row is only a target, and begins the next.
        inputs = rows_of(data, epoch)[:, :-1]
        assert len(np.unique(inputs)) == inputs.size
        # At most two rows' worth is left over in each shard that has rows.
        assert inputs.size > SHARD_ENDS[-1] - 3 * 2 * LENGTH - 9


def test_each_epoch_is_cut_at_its_own_offset(shards):
    data = TrainingRows(shards, LENGTH, 3, 1000)
    firsts = [set(rows_of(data, epoch)[:, 0] % LENGTH) for epoch in range(4)]
    assert len({frozenset(first) for first in firsts}) > 1


def test_the_order_is_new_in_each_epoch(shards):
    data = TrainingRows(shards, LENGTH, 3, 1000)
    first = rows_of(data, 0)[:, 0]
    second = rows_of(data, 1)[:, 0]
    assert (first != second).mean() > 0.8
    # Nor is it the order of the file.
    assert (np.diff(first) == LENGTH).mean() < 0.2


def test_the_order_depends_on_the_seed_and_the_epoch_alone(shards):
    data = TrainingRows(shards, LENGTH, 3, 1000)
    same = TrainingRows(shards, LENGTH, 3, 1000)
    other = TrainingRows(shards, LENGTH, 4, 1000)
    np.random.seed(0)
    forward = [data.row(i) for i in range(2 * data.num_rows)]
    np.random.seed(1)
    # From the other end, so across an epoch too, and then a row a second time.
    backward = [same.row(i) for i in reversed(range(2 * data.num_rows))]
    assert np.array_equal(forward, backward[::-1])
    assert np.array_equal(data.row(5), forward[5])
    assert not np.array_equal(forward[: data.num_rows], rows_of(other, 0))


# ---- tokenizers

TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "def add(a, b):\n    return a + b\n",
    "\tindented\twith\ttabs and  double   spaces",
    "漢字と かな, 한국어, العربية",
    "emoji 👩‍🚀 🇫🇷 😀 café naïve",
    "control \x01\x02\x7f characters",
    "  two leading spaces",
    "numbers 12345 67890 and (punctuation)!",
] * 20

LOSSLESS = dict(
    normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False
)
KINDS = {
    "identity": LOSSLESS,
    "challenge": dict(normalization_rule_name="nmt_nfkc", add_dummy_prefix=False),
    "challenge-spaces-kept": dict(
        normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, remove_extra_whitespaces=False
    ),
    "defaults": {},
    "prefix-spaces-kept": dict(remove_extra_whitespaces=False),
    "suffix": dict(treat_whitespace_as_suffix=True, add_dummy_prefix=False),
    "suffix-defaults": dict(treat_whitespace_as_suffix=True),
    "unigram": dict(model_type="unigram"),
    "newline-piece": dict(LOSSLESS, user_defined_symbols=["\n", "  "]),
}

DOCUMENTS = [
    "The quick brown fox",
    "x",
    " ",
    "   ",
    "  two leading",
    "trailing two  ",
    "a  b   c    d" + " " * 30,
    "line\nline\n\n\n  indented\n\ttab\t\ttab\r\n",
    "\n",
    "\n x",
    "漢字 かな 한국어 العربية",
    "👩‍🚀🇫🇷 😀 \U0010ffff",
    "".join(map(chr, range(1, 32))),
    "\x7f\x80\u200b\ufeff\u2028\u00a0\u3000",
    "e\u0301 é ﬁ Ω Ǆ ½",
    "<s></s><unk> <0x41>",
    "the right-hand side, where “quotes” — and dashes – are",
    "",
]


def train_tokenizer(path: Path, vocab_size: int = 400, **changes) -> Path:
    """Train a tokenizer on TRAINING_TEXT with these options of SentencePiece."""
    model = io.BytesIO()
    options = dict(
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        bos_id=BOS,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        hard_vocab_limit=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT),
        model_writer=model,
        vocab_size=vocab_size,
        **{**options, **changes},
    )
    path.write_bytes(model.getvalue())
    return path


def tokenizer_at(path: Path) -> Tokenizer:
    """A tokenizer of whatever size it has."""
    return Tokenizer(sentencepiece.SentencePieceProcessor(model_file=str(path)))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    """A tokenizer of each kind, as training would load it."""
    path = train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t.model", **KINDS[request.param])
    return load_tokenizer(path, tokenizer_at(path).vocab_size)


@pytest.fixture(scope="module")
def lossless(tmp_path_factory) -> Tokenizer:
    """One that gives every text back as it was, with pieces for a newline and two spaces."""
    folder = tmp_path_factory.mktemp("lossless")
    return tokenizer_at(train_tokenizer(folder / "t.model", **KINDS["newline-piece"]))


def token_of(tokenizer: Tokenizer, piece: str) -> int:
    """The token with this text."""
    return next(t for t in range(tokenizer.vocab_size) if tokenizer.piece_text(t) == piece)


def test_the_tokenizer_says_of_each_token_what_it_stands_for(lossless):
    kinds = {
        "<pad>": "control",
        "<s>": "control",
        "</s>": "control",
        "<unk>": "silent",
        "<0x41>": "byte",
        "e": "text",
        "▁": "text",
        "\n": "text",
    }
    for piece, kind in kinds.items():
        token = token_of(lossless, piece)
        assert lossless.is_control(token) == (kind == "control"), piece
        assert lossless.is_silent(token) == (kind in ("control", "silent")), piece
        assert lossless.is_byte(token) == (kind == "byte"), piece
    assert token_of(lossless, "<s>") == BOS
    assert lossless.has_space_piece()


def test_the_tokenizer_encodes_without_bos_and_decodes(tokenizer):
    tokens = tokenizer.encode("The quick brown fox")
    assert BOS not in tokens and min(tokens) > 3 and max(tokens) < tokenizer.vocab_size
    assert tokenizer.decode(tokens).strip() == "The quick brown fox"
    assert tokenizer.decode([BOS, *tokens]) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind, strips", [("identity", False), ("defaults", True)])
def test_the_tokenizer_knows_whether_a_first_space_is_dropped(tmp_path, kind, strips):
    found = tokenizer_at(train_tokenizer(tmp_path / "t.model", **KINDS[kind]))
    assert found.strips_first_space() is strips
    assert (found.decode([token_of(found, "▁the")]) == "the") is strips


class LetterTokenizer:
    """Another tokenizer behind the same interface: a token for each of ▁, a, bb and é, and BOS."""

    pieces = ["", "<s>", "▁", "a", "bb", "é"]
    vocab_size = len(pieces)
    operators = ()

    def piece_text(self, token: int) -> str:
        return self.pieces[token]

    def is_control(self, token: int) -> bool:
        return token == BOS

    def is_byte(self, token: int) -> bool:
        return False

    def is_silent(self, token: int) -> bool:
        return token <= BOS

    def strips_first_space(self) -> bool:
        return True


def test_the_byte_table_asks_a_tokenizer_nothing_but_its_interface():
    table = ByteTable(LetterTokenizer())
    assert table.bytes.tolist() == [0, 0, 1, 1, 2, 2]
    assert table.begins_document.tolist() == [False, True, False, False, False, False]
    assert table.stripped.tolist() == [False, False, True, False, False, False]
    text = np.array([BOS, 2, 2, 5, BOS, 4])
    assert table.sizes(text).tolist() == [0, 0, 1, 2, 0, 2]


def test_bytes_of_a_document_are_those_of_its_decoded_text(tokenizer):
    table = ByteTable(tokenizer)
    for text in DOCUMENTS:
        tokens = np.array([BOS, *tokenizer.encode(text)])
        decoded = tokenizer.decode(tokens.tolist())
        assert table.sizes(tokens).sum() == len(decoded.encode()), (text, decoded)


def test_bytes_of_a_stream_are_those_of_its_documents(tokenizer):
    encoded = [tokenizer.encode(text) for text in DOCUMENTS]
    stream = []
    for tokens in encoded:
        stream += [BOS, *tokens]
    stream = np.array([*stream, BOS])
    sizes = ByteTable(tokenizer).sizes(stream)
    assert sizes.shape == stream.shape and sizes.dtype == np.uint16
    assert sizes.sum() == sum(len(tokenizer.decode(tokens).encode()) for tokens in encoded)


def test_single_tokens(lossless):
    table = ByteTable(lossless)
    letter = token_of(lossless, "e")
    expected = {"<pad>": 0, "<s>": 0, "</s>": 0, "<unk>": 0}
    expected |= {"<0x41>": 1, "<0xFF>": 1, "▁": 1, "e": 1, "\n": 1, "▁the": 4}
    pieces = {lossless.piece_text(token) for token in range(lossless.vocab_size)}
    for piece in {"▁▁", "<0x0A>x", "字"} & pieces:
        expected[piece] = len(piece.replace("▁", " ").encode())
    for piece, size in expected.items():
        token = token_of(lossless, piece)
        assert table.sizes(np.array([BOS, token, letter, token])).tolist() == [0, size, 1, size]


def test_lossless_documents_count_their_own_bytes(tmp_path):
    tokenizer = tokenizer_at(train_tokenizer(tmp_path / "t.model", **KINDS["identity"]))
    table = ByteTable(tokenizer)
    for text in DOCUMENTS:
        tokens = np.array([BOS, *tokenizer.encode(text)])
        assert table.sizes(tokens).sum() == len(text.encode()), text


def test_bytes_of_the_validation_split(data_folder):
    tokenizer = load_tokenizer(data_folder / "tokenizer.model", VOCAB_SIZE)
    tokens = load_validation(find_shards(data_folder, "val"), VOCAB_SIZE)
    documents = np.split(tokens, np.flatnonzero(tokens == BOS))
    text = "".join(tokenizer.decode(document.tolist()) for document in documents)
    assert ByteTable(tokenizer).sizes(tokens).sum() == len(text.encode()) > 1000


def test_a_tokenizer_of_another_size_is_refused(data_folder):
    with pytest.raises(UserError, match=f"tokenizer.model.*{VOCAB_SIZE}.*VOCAB_SIZE=1024"):
        load_tokenizer(data_folder / "tokenizer.model", 1024)


@pytest.mark.parametrize("data", [b"", b"\x00", b"no tokenizer " * 99, bytes(range(256)) * 9])
def test_garbage_is_no_tokenizer(data, tmp_path):
    path = tmp_path / "garbage.model"
    path.write_bytes(data)
    with pytest.raises(UserError, match="garbage.model") as error:
        load_tokenizer(path, 400)
    assert "\n" not in str(error.value)


def test_a_truncated_tokenizer_is_refused(data_folder, tmp_path):
    path = tmp_path / "half.model"
    path.write_bytes((data_folder / "tokenizer.model").read_bytes()[:3000])
    with pytest.raises(UserError, match="half.model"):
        load_tokenizer(path, VOCAB_SIZE)


def test_a_tokenizer_without_a_space_of_its_own_is_refused(data_folder, tmp_path):
    model = (data_folder / "tokenizer.model").read_bytes()
    space = "▁".encode()
    # Field 1 of a piece is its text, here the bare ▁.
    piece = b"\x0a" + bytes([len(space)]) + space
    assert model.count(piece) == 1
    path = tmp_path / "spaceless.model"
    path.write_bytes(model.replace(piece, b"\x0a" + bytes([len(space)]) + "☃".encode()))
    with pytest.raises(UserError, match="spaceless.model.*▁"):
        load_tokenizer(path, VOCAB_SIZE)
