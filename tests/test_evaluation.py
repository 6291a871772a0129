"""Evaluation: every target once and with its context, one number for any batch, nothing too early.

And what a model may learn from: only what is scored.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import train_gpt
from conftest import BOS, VOCAB_SIZE, quiet, tiny_model, tiny_settings
from train_gpt import (
    GPT,
    ByteTable,
    Evaluator,
    Runtime,
    Score,
    UserError,
    find_shards,
    load_tokenizer,
    load_validation,
    plan_windows,
)

# ---- windows


def window_cases() -> list[list[int]]:
    """Numbers of targets, windows and strides: many at random, and those at the edges."""
    cases = np.random.default_rng(0).integers(1, [400, 60, 60], size=(300, 3)).tolist()
    for targets in (1, 2, 7, 8, 9, 16, 17):
        for window in (1, 8):
            for stride in (1, 3, 8):
                cases.append([targets, window, stride])
    return cases


CASES = window_cases()


@pytest.mark.parametrize("chunk", range(6))
def test_every_target_is_scored_once_with_all_its_context(chunk):
    for targets, window, stride in CASES[chunk::6]:
        stride = min(stride, window)
        times = np.zeros(targets, dtype=int)
        context = np.zeros(targets, dtype=int)
        plan = plan_windows(targets, window, stride)
        for start, first, count in plan:
            assert 0 <= first < first + count <= window and start >= 0 and 0 < count <= stride
            scored = np.arange(start + first, start + first + count)
            times[scored] += 1
            context[scored] = scored - start + 1
        case = (targets, window, stride)
        assert (times == 1).all(), case
        least = np.minimum(np.arange(targets) + 1, window - stride + 1)
        assert (context >= least).all(), case
        # No more work than is needed.
        in_first_window = math.ceil(min(targets, window) / stride)
        later_windows = math.ceil(max(0, targets - window) / stride)
        assert len(plan) <= in_first_window + later_windows, case


# ---- the evaluator against a loop

# Made-up bytes of (previous, target) pairs, so that a wrong pair shows.
PAIRS = np.random.default_rng(5).integers(0, 5, size=(64, 64))


class PairTable(ByteTable):
    """Counts bytes as PAIRS says."""

    def __init__(self):
        pass

    def sizes(self, tokens: np.ndarray) -> np.ndarray:
        return np.append(0, PAIRS[tokens[:-1], tokens[1:]])


def text(length: int, seed: int = 0) -> np.ndarray:
    """Tokens at random, with a BOS here and there."""
    tokens = np.random.default_rng(seed).integers(1, 64, length).astype(np.uint16)
    tokens[::29] = BOS
    return tokens


def make_evaluator(log=quiet, runtime: Runtime | None = None, **changes) -> Evaluator:
    """An evaluator that counts bytes as PAIRS says."""
    return Evaluator(tiny_settings(**changes), runtime or Runtime(), PairTable(), log)


def evaluate(model: GPT, tokens: np.ndarray, name: str = "sliding", **changes) -> Score:
    """A score with these settings."""
    return make_evaluator(**changes).score(model, tokens, name)


@torch.no_grad()
def one_by_one(
    model: GPT, tokens: np.ndarray, window: int, stride: int
) -> tuple[float, float, int]:
    """Nats a target, bits a byte and bytes, one target at a time.

    Each is in the first window that holds it of those that end at window, window + stride, ... and
    with the last target.
    """
    logits_of_window = {}
    nats = 0.0
    size = 0
    targets = len(tokens) - 1
    tokens = torch.from_numpy(tokens.astype(np.int64))
    for target in range(targets):
        end = window
        while end <= target:
            end += stride
        end = min(end, targets)
        start = max(0, end - window)
        if end not in logits_of_window:
            logits_of_window[end] = model.logits(tokens[None, start:end])[0].double()
        logits = logits_of_window[end][target - start]
        nats += float(torch.logsumexp(logits, 0) - logits[tokens[target + 1]])
        size += int(PAIRS[tokens[target], tokens[target + 1]])
    return nats / targets, nats / math.log(2) / size, size


@pytest.fixture(scope="module")
def model() -> GPT:
    """A model that no test changes."""
    return tiny_model()


@pytest.mark.parametrize(
    "length, stride, batch",
    [
        (2, 5, 3),
        (11, 5, 1),
        (20, 5, 3),
        (21, 5, 3),
        (22, 5, 3),
        (77, 1, 8),
        (77, 5, 3),
        (78, 7, 64),
        (90, 20, 2),
        (64, 19, 4),
    ],
)
def test_a_sliding_pass_is_that_of_one_target_at_a_time(model, length, stride, batch):
    tokens = text(length)
    score = evaluate(model, tokens, eval_stride=stride, eval_batch_seqs=batch)
    loss, bpb, size = one_by_one(model, tokens, 20, stride)
    assert (score.targets, score.bytes) == (length - 1, size)
    assert score.val_loss == pytest.approx(loss, rel=1e-5)
    assert score.val_bpb == pytest.approx(bpb, rel=1e-5)


def test_a_plain_pass_is_that_of_one_target_at_a_time(model):
    # The training length counts here, not that of sliding windows.
    score = evaluate(model, text(93), "plain", eval_seq_len=30)
    loss, _, _ = one_by_one(model, text(93), 20, 20)
    assert score.val_loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("length", [5, 21, 40, 41, 42, 100])
def test_a_stride_of_the_window_is_the_plain_pass(model, length):
    plain = evaluate(model, text(length), "plain", eval_stride=20)
    sliding = evaluate(model, text(length), "sliding", eval_stride=20)
    # All but the seconds.
    assert plain[:-1] == sliding[:-1]


def test_windows_and_rows_hold_what_memory_tokens_leave():
    settings = tiny_settings(eval_seq_len=30, eval_stride=7)
    evaluator = Evaluator(settings, Runtime(), PairTable(), quiet)
    assert settings.row_tokens == 24 - 4 and settings.window_tokens == 30 - 4
    assert evaluator.passes["plain"] == (settings.row_tokens, settings.row_tokens)
    assert evaluator.passes["sliding"] == (settings.window_tokens, 7)


def test_the_score_does_not_depend_on_the_batch(model):
    scores = []
    for batch in (1, 2, 7, 64, 500):
        scores.append(evaluate(model, text(211), eval_stride=3, eval_batch_seqs=batch))
    assert len({(score.targets, score.bytes) for score in scores}) == 1
    losses = [score.val_loss for score in scores]
    assert max(losses) - min(losses) < 1e-6


@pytest.mark.parametrize("world_size, length", [(2, 150), (3, 150), (5, 24), (8, 40)])
def test_ranks_share_the_windows(model, world_size, length):
    """Each rank's own sums, added up, are those of one process."""
    parts = []

    class Rank(Runtime):
        """A rank whose others are silent."""

        def sum_over_ranks(self, tensor: Tensor) -> Tensor:
            parts.append(tensor.clone())
            return torch.tensor([0.0, 1.0, length - 1], dtype=torch.float64)

    whole = evaluate(model, text(length), eval_stride=2)
    for number in range(world_size):
        rank = Rank(rank=number, world_size=world_size)
        evaluate(model, text(length), eval_stride=2, runtime=rank)
    nats, size, count = torch.stack(parts).sum(0).tolist()
    assert (count, size) == (whole.targets, whole.bytes)
    assert nats / count == pytest.approx(whole.val_loss, rel=1e-6)


def test_a_long_pass_tells_how_far_it_is(model):
    lines = []
    score = evaluate(model, text(300), log=lines.append, eval_stride=1)
    assert 5 <= len(lines) <= 11
    assert lines[-1].startswith(f"sliding_window 100% bpb:{score.val_bpb:.4f} left:0s")


def test_a_target_that_is_not_scored_is_an_error(model, monkeypatch):
    def plan_of_one_window(targets: int, window: int, stride: int) -> np.ndarray:
        return np.array([[0, 0, 9]])

    monkeypatch.setattr(train_gpt, "plan_windows", plan_of_one_window)
    with pytest.raises(UserError, match="5 of 49 targets"):
        evaluate(model, text(50))


# ---- bytes


def test_a_model_that_knows_nothing_needs_six_bits_for_one_of_64():
    model = tiny_model()
    with torch.no_grad():
        model.embedding.weight.zero_()

    class TwoBytes(PairTable):
        """Every target is two bytes."""

        def sizes(self, tokens: np.ndarray) -> np.ndarray:
            return np.full(tokens.shape, 2)

    evaluator = Evaluator(tiny_settings(), Runtime(), TwoBytes(), quiet)
    score = evaluator.score(model, text(90), "sliding")
    assert score.bytes == 2 * 89
    assert (score.val_loss, score.val_bpb) == pytest.approx((math.log(64), 3.0))


def test_bytes_that_are_given_count_instead_of_those_of_the_table():
    settings = tiny_settings(eval_stride=3)
    evaluator = Evaluator(settings, Runtime(), PairTable(), quiet)
    sizes = np.arange(61, dtype=np.uint16) % 10
    score = evaluator.score(tiny_model(), text(61), "sliding", sizes=sizes)
    assert score.bytes == sizes[1:].sum()


def test_scored_bytes_are_those_of_the_text(data_folder):
    tokenizer = load_tokenizer(data_folder / "tokenizer.model", VOCAB_SIZE)
    tokens = load_validation(find_shards(data_folder, "val"), VOCAB_SIZE)
    settings = tiny_settings(vocab_size=VOCAB_SIZE, eval_stride=20, eval_batch_seqs=64)
    evaluator = Evaluator(settings, Runtime(), ByteTable(tokenizer), quiet)
    score = evaluator.score(tiny_model(vocab_size=VOCAB_SIZE), tokens, "sliding")
    documents = np.split(tokens, np.flatnonzero(tokens == BOS))
    texts = [tokenizer.decode(document.tolist()) for document in documents]
    assert score.bytes == sum(len(document.encode()) for document in texts)
    assert score.targets == len(tokens) - 1
    bits = score.val_loss * score.targets / math.log(2)
    assert score.val_bpb == pytest.approx(bits / score.bytes, rel=1e-9)


# ---- what a model may see


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "blocked"])
def test_a_changed_token_leaves_earlier_losses_as_they_were(attention):
    model = tiny_model(Runtime(attention=attention))
    tokens = torch.from_numpy(text(21).astype(np.int64))[None]
    before = model.token_losses(tokens[:, :-1], tokens[:, 1:])
    for place in range(1, 21):
        changed = tokens.clone()
        changed[0, place] = 9 if tokens[0, place] == BOS else BOS
        after = model.token_losses(changed[:, :-1], changed[:, 1:])
        assert torch.equal(after[:, : place - 1], before[:, : place - 1])
        # Its own loss is another, and so are later ones.
        assert after[0, place - 1] != before[0, place - 1]
        assert place == 20 or not torch.equal(after[:, place:], before[:, place:])


def test_the_first_target_of_a_document_counts(model):
    """Whatever stands before BOS, the documents' own targets and BOS itself are all in the sum."""
    tokens = text(60)
    score = evaluate(model, tokens)
    assert score.targets == 59
    assert score.bytes == PAIRS[tokens[:-1], tokens[1:]].sum()


@pytest.mark.parametrize("attention", ["sdpa", "blocked"])
def test_a_longer_evaluation_than_training(attention):
    changes = dict(eval_seq_len=84, eval_stride=16)
    model = tiny_model(Runtime(attention=attention), **changes)
    score = evaluate(model, text(300), **changes)
    loss, _, _ = one_by_one(model, text(300), 80, 16)
    assert score.val_loss == pytest.approx(loss, rel=1e-5)
    # Short rows keep the base of training.
    plain = evaluate(model, text(300), "plain", **changes)
    usual = evaluate(tiny_model(), text(300), "plain")
    assert plain.val_loss == pytest.approx(usual.val_loss, rel=1e-6)


def first_turns(table: Tensor) -> list[float]:
    """The angle between two positions in each pair of dimensions."""
    cosines = table[0, 1, 0].double()
    return torch.acos(cosines).tolist()


def test_the_rescaled_base_turns_slower_and_no_further_than_in_training():
    short = tiny_model().rotary
    # Four times the training length.
    long = tiny_model(eval_seq_len=96).rotary
    assert torch.equal(short.near, long.near) and long.far.size(1) == 96
    turned = first_turns(long.far)
    usual = first_turns(long.near)
    assert turned[0] == usual[0] and turned[-1] == pytest.approx(usual[-1] / 4, rel=0.01)
