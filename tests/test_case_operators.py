"""Letter case as operators: there is a way back for every text, and every byte is counted once."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

import scan
import tokenizer
import train_gpt
from audit_text import Text
from case_operators import (
    ALL_CAPS,
    CAP_NEXT,
    ESCAPE,
    OPERATORS,
    TITLE,
    with_operators,
    without_operators,
)
from conftest import BOS, documents, write_shard

# The same examples each time, on machines of any speed, and no files of them.
SAME_EACH_TIME = settings(derandomize=True, deadline=None, database=None, max_examples=150)
VOCABULARY_SIZE = 600

# Every text that UTF-8 can hold, so without surrogates.
ANY_TEXT = st.text()
# Letters of both cases, the operators, and what looks like letters A to Z or changes length with
# its case: the kelvin sign, the long s, the dotted and the dotless i, a ligature, a digraph.
ODD_LETTERS = "ABZabzßİıſ\u212aﬁǅÉéΣςЖж漢😀\u0301\u0000 \n\t.'-_09"
RICH_TEXT = st.text(st.sampled_from([*ODD_LETTERS, *OPERATORS]))
WORDS = st.sampled_from(["the", "The", "NASA", "iPhone", "McDonald", "O'NEIL", "aB", "A", "Straße"])
SENTENCES = st.lists(st.one_of(WORDS, st.sampled_from([" ", *OPERATORS]))).map("".join)
OPERATORS_ALONE = st.text(st.sampled_from([*OPERATORS, "A", "a"]))
TEXTS = st.one_of(ANY_TEXT, RICH_TEXT, SENTENCES, OPERATORS_ALONE)
# SentencePiece writes a space as U+2581, so data/ has no text with it.
TOKENIZED_TEXTS = TEXTS.map(lambda text: text.replace("\u2581", "_"))


# ---- The rule
# The field's rule in its words (#1729), and what stands for each.
RULE = {
    "all lower: unchanged": ("the", "the"),
    "all upper, two letters or more": ("NASA", f"{ALL_CAPS}nasa"),
    "two letters": ("AB", f"{ALL_CAPS}ab"),
    "first upper, rest lower": ("The", f"{TITLE}the"),
    "one capital": ("A", f"{TITLE}a"),
    "a later capital": ("iPhone", f"i{CAP_NEXT}phone"),
    "first and later capitals": ("McDonald", f"{TITLE}mc{CAP_NEXT}donald"),
    "capitals before a word": ("PDFs", f"{TITLE}p{CAP_NEXT}d{CAP_NEXT}fs"),
    "a capital at the end": ("aB", f"a{CAP_NEXT}b"),
    "a run ends where letters end": ("A1B-Cd", f"{TITLE}a1{TITLE}b-{TITLE}cd"),
    "each word for itself": ("NEW YORK", f"{ALL_CAPS}new {ALL_CAPS}york"),
    "only A to Z": ("ÉCOLE ßİ Ж", f"É{ALL_CAPS}cole ßİ Ж"),
    "a letter that looks like one": ("\u212aA", f"\u212a{TITLE}a"),
    "operators of the text": ("".join(OPERATORS), "".join(ESCAPE + sign for sign in OPERATORS)),
    "an operator between letters": (f"A{TITLE}b", f"{TITLE}a{ESCAPE}{TITLE}b"),
    "U+E000 is none": ("\ue000A", f"\ue000{TITLE}a"),
    "nothing": ("", ""),
}


def by_the_rule(text: str) -> str:
    """The rule, letter after letter, without a regular expression."""
    found = []
    run = ""
    # Behind the text stands what is no letter, so that its last run ends.
    for sign in f"{text}\n":
        if sign.isascii() and sign.isalpha():
            run += sign
            continue
        found.append(run_by_the_rule(run))
        run = ""
        if sign in OPERATORS:
            found.append(ESCAPE)
        found.append(sign)
    return "".join(found)[:-1]


def run_by_the_rule(run: str) -> str:
    """What stands for a run of letters."""
    capitals = [place for place, letter in enumerate(run) if letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    if len(run) > 1 and len(capitals) == len(run):
        return ALL_CAPS + run.lower()
    found = []
    for place, letter in enumerate(run):
        if place in capitals:
            found.append(CAP_NEXT if place else TITLE)
        found.append(letter.lower())
    return "".join(found)


@pytest.mark.parametrize("case", RULE)
def test_the_rule_is_the_fields(case):
    text, rewritten = RULE[case]
    assert with_operators(text) == by_the_rule(text) == rewritten
    assert without_operators(rewritten) == text


@SAME_EACH_TIME
@given(TEXTS)
def test_every_text_comes_back(text):
    rewritten = with_operators(text)
    assert rewritten == by_the_rule(text)
    assert without_operators(rewritten) == text
    assert not set(rewritten) & set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_every_character_comes_back():
    for first in range(0, 0x110000, 0x10000):
        signs = [chr(code) for code in range(first, first + 0x10000)]
        text = "".join(sign for sign in signs if not "\ud800" <= sign <= "\udfff")
        # Alone, and between letters.
        for changed in (text, "A".join(text), "b".join(text)):
            assert without_operators(with_operators(changed)) == changed


@SAME_EACH_TIME
@given(TEXTS)
def test_training_has_the_same_rule(text):
    rewritten = train_gpt.TO_REWRITE.sub(train_gpt.rewritten, text)
    assert rewritten == with_operators(text)
    # Also for operators that act on nothing, which no rewritten text has.
    for changed in (rewritten, text):
        undone = train_gpt.TO_UNDO.sub(train_gpt.undone, changed)
        assert undone == without_operators(changed)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_with_nothing_to_act_on_is_left_out(operator):
    for behind in ("", " a", "é", "1"):
        assert without_operators(operator + behind) == behind


@pytest.mark.parametrize("part", ["a", "A", "aB", "Ab", "ab ", *OPERATORS])
def test_long_runs_come_back(part):
    """In quadratic time this would take hours."""
    text = 500_000 * part
    assert without_operators(with_operators(text)) == text


# ---- Bytes
class Counters(NamedTuple):
    """A tokenizer with operators, and all that count bytes by it."""

    path: Path
    tokenizer: tokenizer.Tokenizer
    in_training: train_gpt.Tokenizer
    table: train_gpt.ByteTable
    pieces: scan.Pieces
    audited: Text

    def encode(self, texts: list[str]) -> np.ndarray:
        """The tokens of documents as data/prepare.py writes them, uint16 (tokens,)."""
        return tokenizer.encode(self.path, [text.encode() for text in texts])

    def check(self, tokens: np.ndarray, size: int, part: int) -> None:
        """Assert that all find so many bytes behind tokens that are read in parts of a size."""
        sizes = self.table.sizes(tokens)
        assert sizes.sum() == size
        assert self.audited.bytes_of_targets(tokens).tolist() == sizes[1:].tolist()
        assert self.audited.count(tokens) == size
        assert self.scanned(tokens, part) == size

    def scanned(self, tokens: np.ndarray, part: int) -> int:
        """The bytes that data/check.py finds in a split of these tokens."""
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            patch.setattr(scan, "PIECE_TOKENS", part)
            path = write_shard(Path(folder, "x_val_000000.bin"), tokens)
            return scan.Scan([path], self.pieces, tqdm(disable=True)).bytes


@pytest.fixture(scope="module")
def counters(tmp_path_factory) -> Counters:
    """A tokenizer with operators as data/prepare.py trains it."""
    texts = [text.encode() for text in documents()]
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    path.write_bytes(tokenizer.train_tokenizer(VOCABULARY_SIZE, True, "t", texts))
    in_training = train_gpt.load_tokenizer(path)
    return Counters(
        path=path,
        tokenizer=tokenizer.open_tokenizer(path),
        in_training=in_training,
        table=train_gpt.ByteTable(in_training),
        pieces=scan.Pieces(path),
        audited=Text(path),
    )


def test_the_operators_are_the_pieces_4_to_7(counters):
    assert counters.tokenizer.operators == counters.in_training.operators == [4, 5, 6, 7]
    assert [counters.tokenizer.piece(token) for token in range(4, 8)] == list(OPERATORS)
    assert counters.in_training.vocab_size == counters.tokenizer.size == VOCABULARY_SIZE


@SAME_EACH_TIME
@given(TOKENIZED_TEXTS)
def test_training_and_data_have_the_same_tokens(counters, text):
    (tokens,) = counters.tokenizer.encode([text])
    assert counters.in_training.encode(text) == tokens
    assert counters.in_training.decode(tokens) == text
    assert counters.tokenizer.decode([tokens]) == [text]


@SAME_EACH_TIME
@given(st.lists(TOKENIZED_TEXTS, min_size=1, max_size=4), st.integers(1, 9))
@example(["".join(OPERATORS), ESCAPE, TITLE], 1)
@example([5 * ESCAPE, 4 * ESCAPE + "A"], 3)
def test_all_count_the_bytes_of_the_original_text(counters, texts, part):
    size = sum(len(text.encode()) for text in texts)
    counters.check(counters.encode(texts), size, part)


def test_an_escaped_operator_may_stand_on_both_sides_of_a_cut(counters):
    text = f"A{TITLE}b{ESCAPE}{ESCAPE}CD{CAP_NEXT}"
    tokens = counters.encode([text, text])
    for part in range(1, len(tokens) + 1):
        counters.check(tokens, 2 * len(text.encode()), part)


# Sequences of these are what no text is written with, but a model may write them.
LETTERS = ["a", "t", "▁", "\n", "<0x41>"]
MALFORMED = {
    "a dangling operator at the end": [TITLE],
    "before a space": [ALL_CAPS, "▁", "a"],
    "before a capital": [TITLE, "<0x41>"],
    "an escape before a letter": [ESCAPE, "a"],
    "an escape at the end": ["a", ESCAPE],
    "an escaped escape before another operator": [ESCAPE, ESCAPE, TITLE, "a"],
    "three escapes": [ESCAPE, ESCAPE, ESCAPE, "a"],
    "operators one after the other": [TITLE, CAP_NEXT, ALL_CAPS, "t"],
}


def tokens_of(counters: Counters, pieces: list[str]) -> list[int]:
    """The tokens with these texts."""
    return [counters.tokenizer.processor.piece_to_id(piece) for piece in pieces]


@pytest.mark.parametrize("case", MALFORMED)
def test_what_no_text_is_written_with_counts_as_it_is_decoded(counters, case):
    tokens = tokens_of(counters, MALFORMED[case])
    (text,) = counters.tokenizer.decode([tokens])
    counters.check(np.array([BOS, *tokens, BOS]), len(text.encode()), 2)


@SAME_EACH_TIME
@given(
    st.lists(st.lists(st.sampled_from([*LETTERS, *OPERATORS])), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_any_sequence_counts_as_it_is_decoded(counters, sequences, part):
    stream = []
    size = 0
    for pieces in sequences:
        tokens = tokens_of(counters, pieces)
        (text,) = counters.tokenizer.decode([tokens])
        assert counters.in_training.decode(tokens) == text
        size += len(text.encode())
        stream += [BOS, *tokens]
    counters.check(np.array(stream), size, part)
