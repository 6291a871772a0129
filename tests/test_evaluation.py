"""Evaluation: every target once and with its context, one number for any batch, nothing seen too early."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, tiny_model, tiny_settings

from train_gpt import (
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

CASES = np.random.default_rng(0).integers(1, [400, 60, 60], size=(300, 3)).tolist()
CASES += [
    [n, window, stride]
    for n in (1, 2, 7, 8, 9, 16, 17)
    for window in (1, 8)
    for stride in (1, 3, 8)
]


# ---- windows


@pytest.mark.parametrize("chunk", range(6))
def test_every_target_is_scored_once_with_all_its_context(chunk):
    for targets, window, stride in CASES[chunk::6]:
        stride = min(stride, window)
        times, context = np.zeros(targets, dtype=int), np.zeros(targets, dtype=int)
        plan = plan_windows(targets, window, stride)
        for start, first, count in plan:
            places = np.arange(start + first, start + first + count)
            assert 0 <= first < first + count <= window and start >= 0 and 0 < count <= stride
            times[places] += 1
            context[places] = places - start + 1
        assert (times == 1).all(), (targets, window, stride)
        least = np.minimum(np.arange(targets) + 1, window - stride + 1)
        assert (context >= least).all(), (targets, window, stride)
        most = math.ceil(min(targets, window) / stride) + math.ceil(
            max(0, targets - window) / stride
        )
        assert len(plan) <= most  # no more work than needed


# ---- the evaluator against a loop

PAIRS = np.random.default_rng(5).integers(
    0, 5, size=(64, 64)
)  # made-up bytes of (previous, target) pairs


class PairTable:
    """Counts bytes as PAIRS says, so that a wrong pair shows."""

    def count(self, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return PAIRS[previous, targets]


def text(length: int, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(1, 64, length).astype(np.uint16)
    tokens[::29] = 1  # BOS
    return tokens


def evaluate(model, tokens, name="sliding", lines=None, runtime=None, **changes) -> Score:
    log = (lambda line: None) if lines is None else lines.append
    evaluator = Evaluator(tiny_settings(**changes), runtime or Runtime(), PairTable(), log)
    return evaluator.score(model, tokens, name)


@torch.no_grad()
def naive(model, tokens: np.ndarray, window: int, stride: int) -> tuple[float, float, int]:
    """Nats and bytes over all targets, one target at a time: each in the first window of those that end at
    window, window + stride, ... and with the last target."""
    nats, size, n = 0.0, 0, len(tokens) - 1
    ids = torch.from_numpy(tokens.astype(np.int64))
    for target in range(n):
        end = window
        while end <= target:
            end += stride
        end = min(end, n)
        start = max(0, end - window)
        logits = model.logits(ids[None, start:end])[0, target - start].double()
        nats += float(torch.logsumexp(logits, 0) - logits[ids[target + 1]])
        size += int(PAIRS[ids[target], ids[target + 1]])
    return nats / n, nats / math.log(2) / size, size


@pytest.fixture(scope="module")
def model():
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
def test_a_sliding_pass_is_the_naive_loop(model, length, stride, batch):
    tokens = text(length)
    score = evaluate(model, tokens, eval_stride=stride, eval_batch_seqs=batch)
    loss, bpb, size = naive(model, tokens, 20, stride)
    assert score.targets == length - 1 and score.bytes == size
    assert score.val_loss == pytest.approx(loss, rel=1e-5) and score.val_bpb == pytest.approx(
        bpb, rel=1e-5
    )


def test_a_plain_pass_is_the_naive_loop(model):
    score = evaluate(model, text(93), "plain", eval_seq_len=30)  # the training length counts here
    assert score.val_loss == pytest.approx(naive(model, text(93), 20, 20)[0], rel=1e-5)


@pytest.mark.parametrize("length", [5, 21, 40, 41, 42, 100])
def test_a_stride_of_the_window_is_the_plain_pass(model, length):
    plain, sliding = (
        evaluate(model, text(length), name, eval_stride=20) for name in ("plain", "sliding")
    )
    assert (plain.val_loss, plain.val_bpb, plain.bytes) == (
        sliding.val_loss,
        sliding.val_bpb,
        sliding.bytes,
    )


def test_the_score_does_not_depend_on_the_batch(model):
    scores = [
        evaluate(model, text(211), eval_stride=3, eval_batch_seqs=n) for n in (1, 2, 7, 64, 500)
    ]
    assert len({(score.targets, score.bytes) for score in scores}) == 1
    assert max(s.val_loss for s in scores) - min(s.val_loss for s in scores) < 1e-6


@pytest.mark.parametrize("world_size, length", [(2, 150), (3, 150), (5, 24), (8, 40)])
def test_ranks_share_the_windows(model, world_size, length):
    """Each rank's own sums, added up, are those of one process."""

    class Rank(Runtime):
        def sum_over_ranks(self, tensor):
            parts.append(tensor.clone())
            return torch.tensor([0.0, 1.0, length - 1], dtype=torch.float64)

    parts, whole = [], evaluate(model, text(length), eval_stride=2)
    for rank in range(world_size):
        evaluate(model, text(length), eval_stride=2, runtime=Rank(rank=rank, world_size=world_size))
    nats, size, count = torch.stack(parts).sum(0).tolist()
    assert (count, size) == (whole.targets, whole.bytes)
    assert nats / count == pytest.approx(whole.val_loss, rel=1e-6)


def test_a_long_pass_tells_how_far_it_is(model):
    lines = []
    score = evaluate(model, text(300), lines=lines, eval_stride=1)
    assert 5 <= len(lines) <= 11
    assert lines[-1].startswith(f"sliding_window 100% bpb:{score.val_bpb:.4f} left:0s")


def test_a_target_that_is_not_scored_is_an_error(model, monkeypatch):
    monkeypatch.setattr("train_gpt.plan_windows", lambda *_: np.array([[0, 0, 9]]))
    with pytest.raises(UserError, match="5 of 49 targets"):
        evaluate(model, text(50))


# ---- bytes


def test_a_model_that_knows_nothing_needs_six_bits_for_one_of_64():
    model = tiny_model()
    with torch.no_grad():
        model.embedding.zero_()
    evaluator = Evaluator(tiny_settings(), Runtime(), PairTable(), lambda line: None)
    evaluator.table.count = lambda previous, targets: np.full(targets.shape, 2)
    score = evaluator.score(model, text(90), "sliding")
    assert (score.val_loss, score.val_bpb) == pytest.approx(
        (math.log(64), 3.0)
    ) and score.bytes == 2 * 89


def test_scored_bytes_are_those_of_the_text(data_folder):
    tokenizer = load_tokenizer(data_folder / "tokenizer.model", VOCAB_SIZE)
    tokens = load_validation(find_shards(data_folder, "val"), VOCAB_SIZE)
    settings = tiny_settings(vocab_size=VOCAB_SIZE, eval_stride=20, eval_batch_seqs=64)
    evaluator = Evaluator(settings, Runtime(), ByteTable(tokenizer), lambda line: None)
    score = evaluator.score(tiny_model(vocab_size=VOCAB_SIZE), tokens, "sliding")
    documents = [
        tokenizer.decode(part.tolist()) for part in np.split(tokens, np.flatnonzero(tokens == 1))
    ]
    assert score.bytes == sum(len(document.encode()) for document in documents)
    assert score.targets == len(tokens) - 1
    bits = score.val_loss * score.targets / math.log(2)
    assert score.val_bpb == pytest.approx(bits / score.bytes, rel=1e-9)


# ---- what a model may see, and what it says


@torch.no_grad()
def test_probabilities_sum_to_one(model):
    ids = torch.from_numpy(text(20).astype(np.int64))[None].expand(64, -1)
    every = torch.arange(64)[:, None].expand(
        -1, 20
    )  # each piece in turn as the target of every place
    total = (-model.token_losses(ids, every).double()).exp().sum(0)
    assert (total - 1).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "blocked"])
def test_a_changed_token_leaves_earlier_losses_as_they_were(attention):
    model = tiny_model(Runtime(attention=attention))
    ids = torch.from_numpy(text(21).astype(np.int64))[None]
    before = model.token_losses(ids[:, :-1], ids[:, 1:])
    for place in range(1, 21):
        changed = ids.clone()
        changed[0, place] = 1 if ids[0, place] != 1 else 9
        after = model.token_losses(changed[:, :-1], changed[:, 1:])
        assert torch.equal(after[:, : place - 1], before[:, : place - 1])
        assert (
            after[0, place - 1] != before[0, place - 1]
        )  # its own loss is another, and so are later ones
        assert place == 20 or not torch.equal(after[:, place:], before[:, place:])


def test_the_first_target_of_a_document_counts(model):
    """Whatever stands before BOS, the documents' own targets and BOS itself are all in the sum."""
    tokens = text(60)
    assert evaluate(model, tokens).targets == 59
    assert evaluate(model, tokens).bytes == PAIRS[tokens[:-1], tokens[1:]].sum()


@pytest.mark.parametrize("attention", ["sdpa", "blocked"])
def test_a_longer_evaluation_than_training(attention):
    changes = dict(eval_seq_len=84, eval_stride=16)
    model = tiny_model(Runtime(attention=attention), **changes)
    score = evaluate(model, text(300), **changes)
    assert score.val_loss == pytest.approx(naive(model, text(300), 80, 16)[0], rel=1e-5)
    plain, usual = (
        evaluate(model, text(300), "plain", **changes),
        evaluate(tiny_model(), text(300), "plain"),
    )
    assert plain.val_loss == pytest.approx(
        usual.val_loss, rel=1e-6
    )  # short rows keep the base of training


def test_the_rescaled_base_turns_slower_and_no_further_than_in_training():
    short, long = tiny_model().rotary, tiny_model(eval_seq_len=96).rotary
    assert torch.equal(short.near, long.near)
    turned, usual = (
        torch.acos(table[0, 1, 0].double()).tolist() for table in (long.far, long.near)
    )
    assert long.far.size(1) == 96  # four times the training length
    assert turned[0] == usual[0] and turned[-1] == pytest.approx(usual[-1] / 4, rel=0.01)
