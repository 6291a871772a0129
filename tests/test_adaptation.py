"""Track B: documents that are scored chunk by chunk and learnt from, against a plain loop.

A target is scored once, before anything learns from it, by whole distributions; and no document
gets anything from another.
"""

from __future__ import annotations

import collections
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import BOS, LOOPED, quiet, tiny_model, tiny_settings
from train_gpt import (
    GPT,
    NGRAM_SHARES,
    AdaptiveEvaluator,
    DocumentLearner,
    NgramMixture,
    Runtime,
    UserError,
    documents_of,
    find_occurrences,
)

CHUNK = 4
CHANGES = dict(
    ttt_enabled=True,
    ttt_chunk_size=CHUNK,
    ttt_batch_size=3,
    ttt_lr=0.2,
    eval_seq_len=18,
    memory_tokens=2,
)
# Tokens of text in a window.
WINDOW = 16


def document(length: int, seed: int) -> list[int]:
    """BOS and tokens of few kinds, so that they come again."""
    return [BOS, *np.random.default_rng(seed).integers(5, 12, length - 1).tolist()]


LENGTHS = (30, 5, 1, 12, 13, 47, 2)
DOCUMENTS = [document(length, seed) for seed, length in enumerate(LENGTHS)]
TEXT = np.concatenate(DOCUMENTS).astype(np.uint16)


class NoTable:
    """A byte for each token."""

    def sizes(self, tokens: np.ndarray) -> np.ndarray:
        return np.ones(len(tokens), dtype=np.int64)


def make_evaluator(runtime: Runtime | None = None, log=quiet, **changes) -> AdaptiveEvaluator:
    """An adaptive evaluator with tiny settings."""
    settings = tiny_settings(**{**CHANGES, **changes})
    return AdaptiveEvaluator(settings, runtime or Runtime(), NoTable(), log)


def make_learner(model: GPT, **changes) -> DocumentLearner:
    """A learner with tiny settings."""
    return DocumentLearner(model, tiny_settings(**{**CHANGES, **changes}), Runtime())


def nats_of(model: GPT, tokens: np.ndarray, **changes) -> np.ndarray:
    """The nats of each target."""
    return make_evaluator(**changes).nats(model, tokens)


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model(**CHANGES)


# ---- against a loop over documents, tokens and orders


def ngram_counts(tokens: list[int], order: int) -> collections.Counter:
    """What followed earlier occurrences of the last `order` tokens."""
    found = collections.Counter()
    wanted = tokens[-order:]
    for end in range(order, len(tokens)):
        if tokens[end - order : end] == wanted:
            found[tokens[end]] += 1
    return found


def mix_slowly(probabilities: list[float], tokens: list[int], shares: list[float]):
    """The mixture's distribution, and each order's part of it; None for one that has no part."""
    mixed = list(probabilities)
    parts = []
    for order, share in enumerate(shares, start=1):
        found = ngram_counts(tokens, order) if len(tokens) >= order else {}
        if not found:
            parts.append(None)
            continue
        total = sum(found.values())
        mixed = [(1 - share) * p for p in mixed]
        parts = [part and {k: (1 - share) * v for k, v in part.items()} for part in parts]
        parts.append({token: share * count / total for token, count in found.items()})
        for token, part in parts[-1].items():
            mixed[token] += part
    return mixed, parts


def learn_slowly(model: GPT, tokens: list[int], targets: int, s) -> list[float]:
    """Nats of a document's first targets, one matrix each, one target after the other."""
    model = copy.deepcopy(model)
    roles = model.roles()
    moved = [
        model.get_parameter(name)
        for name, role in roles.items()
        if role in ("attention", "mlp", "tied_embedding", "head")
    ]
    orders = s.ttt_ngram_order
    asked = [NgramMixture.PRIOR_TARGETS] * orders
    explained = [share * NgramMixture.PRIOR_TARGETS for share in NGRAM_SHARES[:orders]]
    nats = []
    for first in range(0, targets, s.ttt_chunk_size):
        last = min(first + s.ttt_chunk_size, targets)
        # The window ends with the whole chunk, also where the document ends within it.
        start = max(0, first + s.ttt_chunk_size - WINDOW)
        logits = model.logits(torch.tensor([tokens[start:last]]))[0, first - start :]
        probabilities = logits.double().softmax(-1)
        shares = [e / a for e, a in zip(explained, asked, strict=True)]
        losses = []
        for place in range(first, last):
            row = probabilities[place - first]
            target = tokens[place + 1]
            mixed, parts = mix_slowly(row.tolist(), tokens[: place + 1], shares)
            rest = mixed[target] - row[target].item() * np.prod(
                [1 - share for share, part in zip(shares, parts, strict=True) if part is not None]
            )
            left = 1.0
            for order in reversed(range(orders)):
                if parts[order] is not None:
                    posterior = parts[order].get(target, 0.0) / mixed[target]
                    asked[order] += left
                    explained[order] += posterior
                    left -= posterior
            weight = (mixed[target] - rest) / row[target].item()
            losses.append(-torch.log(weight * row[target] + rest))
            nats.append(losses[-1].item())
        loss = torch.stack(losses).sum() / s.ttt_chunk_size
        if s.ttt_lr:
            gradients = torch.autograd.grad(loss, moved)
            with torch.no_grad():
                for parameter, gradient in zip(moved, gradients, strict=True):
                    parameter -= s.ttt_lr * gradient
    return nats


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(ttt_lr=0.0),
        dict(ttt_ngram_order=0),
        dict(ttt_ngram_order=3, ttt_batch_size=7),
        dict(tie_embeddings=False),
        LOOPED,
    ],
    ids=["both", "ngrams alone", "matrices alone", "other shape", "head", "loops and lanes"],
)
def test_nats_are_those_of_a_loop_over_single_targets(changes):
    s = tiny_settings(**{**CHANGES, **changes})
    model = tiny_model(**{**CHANGES, **changes})
    found = nats_of(model, TEXT, **changes)
    expected = []
    for tokens, following in zip(DOCUMENTS, [*DOCUMENTS[1:], []], strict=True):
        whole = tokens + following[:1]
        expected += learn_slowly(model, whole, len(whole) - 1, s)
    assert found.shape == (len(TEXT) - 1,)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_learning_pays_on_a_text_that_repeats_itself(model):
    tokens = np.array(([BOS, *range(20, 33)] + 5 * list(range(20, 33))), dtype=np.uint16)
    fixed = nats_of(model, tokens, ttt_lr=0.0, ttt_ngram_order=0)[26:].mean()
    for changes in (dict(ttt_lr=0.0), dict(ttt_ngram_order=0)):
        assert nats_of(model, tokens, **changes)[26:].mean() < fixed - 0.1


# ---- what makes the score valid


def test_documents_end_with_the_next_beginning():
    text = np.array([BOS, 5, 6, BOS, BOS, 7, BOS], dtype=np.uint16)
    assert documents_of(text).tolist() == [[0, 3], [3, 1], [4, 2]]


def test_a_text_that_does_not_begin_with_a_document_is_refused(model):
    with pytest.raises(UserError, match="must begin with BOS"):
        nats_of(model, TEXT[1:])


def test_predictions_are_whole_distributions_whatever_was_learnt(model):
    learner = make_learner(model)
    text = torch.tensor([document(25, seed) for seed in range(3)])
    everything = torch.ones(3, CHUNK, dtype=torch.bool)
    for end in range(CHUNK, 25, CHUNK):
        probabilities = learner.predict(text[:, :end])
        assert probabilities.shape == (3, CHUNK, 64) and bool((probabilities > 0).all())
        assert float((probabilities.double().sum(-1) - 1).abs().max()) < 1e-5
        learner.learn(text[:, end - CHUNK + 1 : end + 1], everything)


@pytest.mark.parametrize("place", [2, 7, 29, 31, 48, 60, 100])
def test_nothing_before_a_place_changes_with_what_stands_there(model, place):
    """Not in the same chunk, document or batch either; and what comes later does."""
    changed = TEXT.copy()
    # Another token, and never another division into documents.
    changed[place] = 13 if TEXT[place] != BOS else BOS
    changed[place + 1 :] = np.where(TEXT[place + 1 :] == BOS, BOS, 14)
    before = nats_of(model, TEXT)
    after = nats_of(model, changed)
    assert np.array_equal(before[: place - 1], after[: place - 1])
    assert not np.array_equal(before[place:], after[place:])


def test_a_document_gets_nothing_from_others(model):
    """But for how products of other shapes are rounded."""
    nats = nats_of(model, TEXT)
    starts = np.flatnonzero(TEXT == BOS)
    for start, end in zip(starts, [*starts[1:], len(TEXT) - 1], strict=True):
        alone = nats_of(model, TEXT[start : end + 1])
        np.testing.assert_allclose(alone, nats[start:end], rtol=1e-4)


def test_other_documents_beside_it_do_not_change_a_document_by_a_bit(model):
    longest = document(47, 5)
    one = np.array([*longest, *document(30, 1), *document(9, 2)], dtype=np.uint16)
    other = np.array([*longest, *document(30, 3), *document(9, 4)], dtype=np.uint16)
    assert np.array_equal(nats_of(model, one)[:47], nats_of(model, other)[:47])


def test_a_new_batch_of_documents_starts_anew(model):
    learner = make_learner(model)
    text = torch.tensor([document(2 * CHUNK + 1, seed) for seed in range(3)])
    everything = torch.ones(3, CHUNK, dtype=torch.bool)

    def run() -> list[torch.Tensor]:
        learner.begin()
        found = []
        for end in (CHUNK, 2 * CHUNK):
            found.append(learner.predict(text[:, :end]))
            learner.learn(text[:, end - CHUNK + 1 : end + 1], everything)
        return found

    first, second = run()
    again = run()
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])


def test_what_is_not_scored_teaches_nothing(model):
    learner = make_learner(model)
    text = torch.tensor([document(2 * CHUNK + 1, seed) for seed in range(3)])
    is_scored = torch.ones(3, CHUNK, dtype=torch.bool)
    is_scored[1] = False
    fresh = make_learner(model, ttt_lr=0.0)
    fresh.predict(text[:, :CHUNK])
    learner.predict(text[:, :CHUNK])
    learner.learn(text[:, 1 : CHUNK + 1], is_scored)
    taught = learner.predict(text[:, : 2 * CHUNK])
    untaught = fresh.predict(text[:, : 2 * CHUNK])
    assert not torch.allclose(taught[0], untaught[0], atol=1e-5)
    torch.testing.assert_close(taught[1], untaught[1])


def test_the_model_itself_is_left_as_it_is(model):
    before = copy.deepcopy(model.state_dict())
    nats_of(model, TEXT)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_share_the_batches_and_find_the_same(model, world_size):
    alone = nats_of(model, TEXT)
    together = np.full(len(alone), np.nan)
    for rank in range(world_size):
        runtime = Runtime(rank=rank, world_size=world_size)
        found = make_evaluator(runtime).nats(model, TEXT)
        mine = ~np.isnan(found)
        assert np.isnan(together[mine]).all()
        together[mine] = found[mine]
    assert np.array_equal(alone, together)


def test_the_score_is_the_sum_of_the_nats_over_the_bytes(model):
    lines = []
    score = make_evaluator(log=lines.append).score(model, TEXT)
    nats = nats_of(model, TEXT)
    assert score.targets == score.bytes == len(TEXT) - 1
    assert score.val_loss == pytest.approx(nats.mean(), rel=1e-12)
    assert lines[-1].startswith(f"ttt 100% bpb:{score.val_bpb:.4f} left:0s")


def test_bytes_may_be_known_better(model):
    score = make_evaluator().score(model, TEXT, np.full(len(TEXT), 3))
    assert score.bytes == 3 * (len(TEXT) - 1)


def test_warm_up_compiles_all_lengths_of_windows(model, monkeypatch):
    shapes = set()
    hidden = GPT.hidden

    def noting(self, tokens, *arguments):
        shapes.add(tuple(tokens.shape))
        return hidden(self, tokens, *arguments)

    monkeypatch.setattr(GPT, "hidden", noting)
    evaluator = make_evaluator()
    evaluator.warm_up(model)
    warm = set(shapes)
    evaluator.score(model, TEXT)
    assert warm == {(3, 4), (3, 8), (3, 16)}
    # Where only the longest document of a batch goes on, nothing is compiled.
    assert {shape for shape in shapes if shape[0] == 3} == warm


def test_a_chunk_longer_than_a_window_is_refused():
    with pytest.raises(UserError, match="TTT_CHUNK_SIZE=17 exceeds a window's 16 tokens"):
        tiny_settings(**{**CHANGES, "ttt_chunk_size": 17})


def test_occurrences_are_sought_just_so_far_before_a_chunk(model, monkeypatch):
    far = np.array([*document(9, 5), *[13] * 20, *document(9, 5)[1:]], dtype=np.uint16)
    whole = nats_of(model, far, ttt_lr=0.0)
    monkeypatch.setattr(DocumentLearner, "REACH", 8)
    near = nats_of(model, far, ttt_lr=0.0)
    # Until a chunk ends that far behind the first token, nothing is out of reach.
    assert np.array_equal(whole[:12], near[:12])
    assert near[-6:].mean() > whole[-6:].mean()


def test_a_chunk_may_be_longer_than_the_reach(model, monkeypatch):
    monkeypatch.setattr(DocumentLearner, "REACH", 2)
    assert np.isfinite(nats_of(model, TEXT)).all()


def test_ranks_meet_before_they_add_up(model):
    """Those that are done wait as hosts do, not in a collective that gives up after a minute."""
    events = []

    class Noting(Runtime):
        """A runtime that says what it was asked for."""

        def meet(self) -> None:
            """Wait for the others."""
            events.append("meet")

        def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
            """The sum over one rank."""
            events.append("sum")
            return tensor

    make_evaluator(Noting()).score(model, TEXT)
    assert events == ["meet", "sum"]


# ---- occurrences


def test_occurrences_are_those_of_a_search():
    tokens = torch.tensor([document(20, seed) for seed in range(4)])
    seen = find_occurrences(tokens, chunk=6, orders=4)
    found = list(zip(*(x.tolist() for x in seen[:3]), strict=True))
    expected = []
    counts = torch.zeros(4, 4, 6)
    for row, text in enumerate(tokens.tolist()):
        for column, place in enumerate(range(14, 20)):
            for end in range(place):
                length = 0
                while length < min(4, end + 1) and text[end - length] == text[place - length]:
                    length += 1
                counts[:length, row, column] += 1
                if length:
                    expected.append((6 * row + column, length, text[end + 1]))
    assert found == expected
    assert torch.equal(seen.counts, counts)


def test_nothing_occurs_before_a_document_begins():
    """Neither with what pads the beginning, nor with the place itself."""
    seen = find_occurrences(torch.full((1, 3), BOS), chunk=3, orders=3)
    assert seen.counts[:, 0].tolist() == [[0, 1, 2], [0, 0, 1], [0, 0, 0]]


def test_a_token_that_nothing_foresaw_keeps_the_models_probability():
    probabilities = F.softmax(torch.randn(1, 2, 8), -1)
    mixture = NgramMixture(2, 1, torch.device("cpu"))
    seen = find_occurrences(torch.tensor([[1, 5, 6, 7]]), chunk=2, orders=2)
    mixed = mixture.mix(probabilities, seen, mixture.weights(seen))
    torch.testing.assert_close(mixed, probabilities)
