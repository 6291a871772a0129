"""The auditor's own windows and bytes, and the text by which it counts targets."""

from __future__ import annotations

import numpy as np
import pytest

from audit_probes import unique_pairs
from audit_text import Text, read_validation, sliding_windows, take_validation
from conftest import BOS, write_shard


@pytest.mark.parametrize(
    "targets, window, stride", [(5, 20, 7), (20, 20, 7), (21, 20, 7), (100, 20, 20), (333, 20, 1)]
)
def test_the_auditors_windows_score_each_target_once_with_its_context(targets, window, stride):
    windows = sliding_windows(targets, window, stride)
    scored = np.concatenate([np.arange(first, end) for _, first, end in windows])
    assert scored.tolist() == list(range(targets))
    for start, first, end in windows[1:]:
        assert end - start == window
        assert end - first == stride or end == targets
    assert windows[0].tolist() == [0, 0, min(window, targets)]


def test_bytes_are_those_of_the_decoded_text(data_folder):
    text = Text(data_folder / "tokenizer.model")
    tokens = read_validation(data_folder)
    size = len(text.decode(tokens))
    assert text.bytes_of_targets(tokens).sum() == text.count(tokens) == size


def test_a_byte_of_half_a_character_is_one_byte(data_folder):
    """Decoded it is U+FFFD, which has three."""
    text = Text(data_folder / "tokenizer.model")
    pieces = [text.tokenizer.processor.piece_to_id(piece) for piece in ("<0xC3>", "a")]
    tokens = np.array([BOS, *pieces])
    assert len(text.decode(tokens)) == 4 and text.count(tokens) == 2


def test_a_document_does_not_count_for_the_next_one(data_folder):
    text = Text(data_folder / "tokenizer.model")
    documents = [np.array([BOS, *tokens]) for tokens in text.tokenizer.encode(["a b", " c", ""])]
    tokens = np.concatenate(documents)
    assert text.decode(tokens) == b"a b c" and text.count(tokens) == 5


def test_validation_that_is_taken_is_gone(tmp_path):
    write_shard(tmp_path / "x_val_000001.bin", [4, 5])
    write_shard(tmp_path / "x_val_000000.bin", [1, 2, 3])
    write_shard(tmp_path / "x_train_000000.bin", [9])
    assert take_validation(tmp_path).tolist() == [1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["x_train_000000.bin"]


@pytest.mark.parametrize("length", [2, 3, 10, 101, 1000])
def test_pairs_are_unique(length):
    numbers, kinds = unique_pairs(length)
    assert len(numbers) == length and numbers.max() < kinds
    pairs = set(zip(numbers[:-1].tolist(), numbers[1:].tolist(), strict=True))
    assert len(pairs) == length - 1
