"""The model: every feature off and on, the trunk's order, causality, backends, initial weights."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from bench_worker import flops_per_token
from conftest import BOS, LANES, LOOPED, random_tokens, tiny_model, tiny_settings
from train_gpt import (
    ATTENTION_BACKENDS,
    GPT,
    IGNORED,
    PRESETS,
    AttentionInputs,
    Block,
    Rotary,
    Runtime,
    Settings,
    SmearGate,
    Visit,
    exclude_own_value,
    offset_keys,
    rotate,
    segment_ends,
    stored_parameters,
    trunk_order,
)

# The off value of each feature.
OFF = dict(
    smear=dict(smear_enabled=False),
    bigram=dict(bigram_vocab_size=0),
    memory=dict(memory_tokens=0),
    backout=dict(backout_enabled=False),
    mtp=dict(mtp_num_heads=0),
    head=dict(tie_embeddings=True),
    ln_scale=dict(ln_scale=False),
    # The key offset needs dimensions that do not rotate.
    rope=dict(rope_dims=0, key_offset_enabled=False),
    offset=dict(key_offset_enabled=False),
    xsa=dict(xsa_last_n=0),
    gate=dict(sparse_attn_gate_enabled=False),
    leak=dict(negative_slope=0.0),
    skip_gates=dict(skip_gates_enabled=False),
    loops=dict(num_loops=0),
    lanes=dict(parallel_start_layer=0),
)
# The parameters that each has.
OWN = dict(
    smear={"smear.gate"},
    bigram={"bigram.table", "bigram.projection", "bigram.scale"},
    memory={"memory.vectors"},
    backout={"backout.amount"},
    mtp={"mtp.heads"},
    head={"head.weight"},
    ln_scale=set(),
    rope=set(),
    offset=set(),
    xsa=set(),
    gate={f"blocks.{layer}.attention.gate.weight" for layer in range(4)},
    leak=set(),
    skip_gates={"skips.gates"},
    loops=set(),
    lanes={"blocks.3.lane_weights.keep", "blocks.3.lane_weights.write"},
)
# Those that have values with which they do nothing.
WITH_NEUTRAL = ("smear", "bigram", "backout", "mtp", "head", "ln_scale", "rope")
ALL_ON = dict(tie_embeddings=False, **LOOPED, **LANES)
ALL_OFF = {name: value for changes in OFF.values() for name, value in changes.items()}


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A training batch with some BOS in it: tokens and targets, (3, 24) each."""
    tokens = random_tokens(3, 25, seed)
    tokens[:, [4, 13]] = BOS
    return tokens[:, :-1], tokens[:, 1:]


def evaluated(seed: int = 0) -> tuple[Tensor, Tensor]:
    """What fills a window of evaluation behind the memory tokens: (3, 20) each."""
    tokens, targets = batch(seed)
    return tokens[:, :20], targets[:, :20]


def switched_off(model: GPT, feature: str, **changes) -> GPT:
    """The model without a feature, its other parameters the same."""
    off = tiny_model(**{**ALL_ON, **OFF[feature], **changes})
    missing, extra = off.load_state_dict(model.state_dict(), strict=False)
    assert not missing and set(extra) == OWN[feature]
    return off


def shapes_of(**changes) -> dict[str, torch.Size]:
    """The shape of each parameter of a model."""
    return {name: p.shape for name, p in tiny_model(**changes).named_parameters()}


# ---- Off and on


@pytest.mark.parametrize("feature", OFF)
def test_off_takes_away_the_features_own_parameters_and_no_other(feature):
    on = shapes_of(**ALL_ON)
    off = shapes_of(**{**ALL_ON, **OFF[feature]})
    assert off == {name: shape for name, shape in on.items() if name not in OWN[feature]}


@pytest.mark.parametrize("feature", OFF)
def test_a_feature_alone_adds_its_own_parameters_and_no_other(feature):
    off = shapes_of(**ALL_OFF)
    others = {name: value for name, value in ALL_OFF.items() if name not in OFF[feature]}
    if feature == "rope":
        others["key_offset_enabled"] = False
    elif feature == "offset":
        others["rope_dims"] = 4
    on = shapes_of(**{**ALL_ON, **others})
    assert set(on) - set(off) == OWN[feature] and set(off) <= set(on)


@torch.no_grad()
def test_with_all_features_off_the_loss_is_that_of_a_plain_transformer():
    """Its parameters are those of embedding, blocks and U-Net, and it equals the reference."""
    settings = tiny_settings(**ALL_OFF)
    model = tiny_model(**ALL_OFF)
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"embedding", "skips", "blocks"}
    tokens, targets = batch()
    objective, loss = model(tokens, targets)
    expected = 0.0
    for row, row_targets in zip(tokens, targets, strict=True):
        logits = reference_logits(model, settings, row)
        expected += F.cross_entropy(logits, row_targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert torch.equal(objective, loss)


@pytest.mark.parametrize("feature", OFF)
@torch.no_grad()
def test_on_changes_the_objective(feature):
    model = tiny_model(**ALL_ON)
    off = switched_off(model, feature)
    tokens, targets = batch()
    objective, _ = model(tokens, targets)
    if feature == "memory":
        # A row without memory is shorter, so that both score the same targets.
        tokens = tokens[:, 4:]
        targets = targets[:, 4:]
    without, _ = off(tokens, targets)
    assert abs(objective - without) > 0.001


@torch.no_grad()
def make_neutral(model: GPT, feature: str) -> None:
    """Give a feature the values with which it does nothing."""
    if feature == "smear":
        model.smear.gate.fill_(-math.inf)
    elif feature == "bigram":
        model.bigram.table.zero_()
    elif feature == "backout":
        model.backout.amount.zero_()
    elif feature == "head":
        model.head.weight.copy_(model.embedding.weight)
    elif feature == "ln_scale":
        for block in model.blocks:
            block.norm_scale.fill_(1.0)


@pytest.mark.parametrize("feature", WITH_NEUTRAL)
@torch.no_grad()
def test_a_feature_at_its_neutral_value_is_exactly_the_model_without_it(feature):
    # All dimensions of a head rotate, with or without saying so.
    changes = dict(rope_dims=8, key_offset_enabled=False) if feature == "rope" else {}
    model = tiny_model(**ALL_ON, **changes)
    make_neutral(model, feature)
    off = switched_off(model, feature)
    assert torch.equal(model(*batch())[1], off(*batch())[1])
    assert torch.equal(model.token_losses(*evaluated()), off.token_losses(*evaluated()))


@torch.no_grad()
def test_memory_that_equals_the_embeddings_of_tokens_is_these_tokens():
    """So memory is positions before the text, and nothing else."""
    model = tiny_model(smear_enabled=False, bigram_vocab_size=0)
    off = tiny_model(memory_tokens=0, smear_enabled=False, bigram_vocab_size=0)
    off.load_state_dict(model.state_dict(), strict=False)
    tokens, _ = evaluated()
    first = torch.arange(4).expand(3, 4)
    model.memory.vectors.copy_(model.embedding.weight[:4])
    expected = off.logits(torch.cat((first, tokens), dim=1))[:, 4:]
    torch.testing.assert_close(model.logits(tokens), expected)


def test_the_bigram_changes_nothing_before_training():
    model = tiny_model(stirred=False)
    off = tiny_model(stirred=False, bigram_vocab_size=0)
    off.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(*batch())[0], off(*batch())[0])


def test_gradient_reaches_every_parameter():
    model = tiny_model(**ALL_ON)
    model(*batch())[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_gradient_reaches_lambda_memory_and_bigram_from_the_initial_weights():
    model = tiny_model(stirred=False)
    model(*batch())[0].backward()
    for name in ("backout.amount", "memory.vectors", "bigram.table", "smear.gate"):
        assert model.get_parameter(name).grad.any(), name


# ---- The order of the trunk

# The layers that push, and of those that take a skip: layer -> number of the skip connection.
ORDERS = {
    1: ([], {}),
    2: ([0], {1: 0}),
    5: ([0, 1], {2: 0, 3: 1}),
    10: ([0, 1, 2, 3, 4], {5: 0, 6: 1, 7: 2, 8: 3, 9: 4}),
    11: ([0, 1, 2, 3, 4], {5: 0, 6: 1, 7: 2, 8: 3, 9: 4}),
}


@pytest.mark.parametrize("layers", ORDERS)
def test_the_order_visits_each_layer_once_and_pairs_the_halves(layers):
    pushing, skips = ORDERS[layers]
    order = trunk_order(Settings(num_layers=layers), num_loops=0)
    assert [visit.layer for visit in order] == list(range(layers))
    assert [visit.layer for visit in order if visit.pushes] == pushing
    assert {v.layer: v.skip for v in order if v.skip is not None} == skips
    # The last that was pushed is taken first.
    pushed = []
    pairs = {}
    for visit in order:
        if visit.skip is not None:
            pairs[visit.layer] = pushed.pop()
        if visit.pushes:
            pushed.append(visit.layer)
    middle = layers // 2
    assert pairs == {middle + i: middle - 1 - i for i in range(middle)} and not pushed


@pytest.mark.parametrize("layers", ORDERS)
def test_there_is_a_scale_for_each_skip_of_the_order(layers):
    model = tiny_model(num_layers=layers)
    skips = sorted(visit.skip for visit in model.looped_order if visit.skip is not None)
    rows = 0 if model.skips is None else len(model.skips.scales)
    assert skips == list(range(rows)) and rows == layers // 2


@torch.no_grad()
def test_a_trunk_may_visit_a_layer_twice():
    """As the model whose second copy of the layer has the same weights."""
    model = tiny_model(num_layers=2, ln_scale=False, backout_enabled=False)
    model.looped_order = [Visit(0, pushes=True), Visit(1), Visit(0, skip=0)]
    longer = tiny_model(num_layers=3, ln_scale=False, backout_enabled=False)
    state = model.state_dict()
    for name, value in model.state_dict().items():
        if name.startswith("blocks.0."):
            state[name.replace("blocks.0.", "blocks.2.")] = value
    longer.load_state_dict(state)
    longer.looped_order = [Visit(0, pushes=True), Visit(1), Visit(2, skip=0)]
    assert torch.equal(model(*batch())[0], longer(*batch())[0])


def test_a_layer_that_is_visited_twice_learns_from_both_visits():
    gradients = []
    for order in ([Visit(0)], [Visit(0), Visit(0)]):
        model = tiny_model(num_layers=1, mtp_num_heads=0)
        model.looped_order = order
        model(*batch())[0].backward()
        gradients.append(model.blocks[0].mlp.up.grad)
    assert all(gradient.any() for gradient in gradients)
    assert not torch.allclose(*gradients)


@torch.no_grad()
def test_backout_subtracts_the_state_after_the_middle_layer():
    model = tiny_model(backout_layer=1)
    states = []
    run_block = model.run_block

    def keeping(block: Block, *arguments) -> Tensor:
        states.append(run_block(block, *arguments))
        return states[-1]

    model.run_block = keeping
    found = model.hidden(evaluated()[0])
    expected = states[3] - model.backout.amount * states[1]
    torch.testing.assert_close(found, F.rms_norm(expected, (32,))[:, 4:])


def test_blocks_and_attention_know_their_layer():
    for layer, block in enumerate(tiny_model().blocks):
        assert block.layer == block.attention.layer == layer


# ---- SmearGate and BigramHash


def test_smear_gate_is_shut_at_bos_and_blends_elsewhere():
    smear = SmearGate(Settings(model_dim=8))
    x = torch.randn(2, 6, 8)
    tokens = random_tokens(2, 6)
    tokens[0, 3] = BOS
    with torch.no_grad():
        smear.gate.copy_(torch.randn(8))
    out = smear(x, tokens)
    # At the first token, which has none before it, it has nothing to blend.
    shut = torch.zeros(2, 6, dtype=torch.bool)
    shut[:, 0] = True
    shut[0, 3] = True
    assert torch.equal(out[shut], x[shut])
    assert (out[~shut] != x[~shut]).all()
    gate = torch.sigmoid(smear.gate)
    blended = (1 - gate) * x[:, 1:] + gate * x[:, :-1]
    torch.testing.assert_close(out[:, 1:][~shut[:, 1:]], blended[~shut[:, 1:]])


def test_the_embedding_at_bos_knows_nothing_of_the_document_before():
    model = tiny_model(bigram_vocab_size=0)
    tokens = random_tokens(1, 6)
    tokens[0, 3] = BOS
    other = tokens.clone()
    other[0, 2] = (other[0, 2] + 1) % 60 + 4
    before = model.embed(tokens)[:, 4:]
    after = model.embed(other)[:, 4:]
    assert torch.equal(before[:, 3], after[:, 3])
    assert not torch.equal(before[:, 2], after[:, 2])


def test_bigram_depends_on_the_pair_and_nothing_else():
    bigram = tiny_model(bigram_vocab_size=4096).bigram
    first = bigram.bucket(torch.tensor([[5, 9, 7, 9, 7]]))[0]
    second = bigram.bucket(torch.tensor([[8, 9, 7, 7, 9]]))[0]
    # The pair 9, 7 in three places.
    assert first[2] == second[2] == first[4]
    # 9, 7 and 7, 9 and 7, 7.
    assert len({int(first[2]), int(first[3]), int(second[3])}) == 3
    buckets = torch.cat((first, second))
    assert int(buckets.min()) >= 0 and int(buckets.max()) < 4096


def test_bigram_buckets_are_spread_evenly():
    pairs = torch.cartesian_prod(torch.arange(64), torch.arange(64))
    buckets = tiny_model(bigram_vocab_size=256).bigram.bucket(pairs)[:, 1]
    counts = torch.bincount(buckets, minlength=256)
    assert counts.min() > 0 and counts.max() < 3 * 4096 / 256


# ---- Memory tokens


def test_training_neither_sees_nor_scores_the_places_of_memory_tokens():
    model = tiny_model()
    tokens, targets = batch()
    others = tokens.clone()
    others[:, :4] = 33
    other_targets = targets.clone()
    other_targets[:, :4] = 44
    objective, _ = model(tokens, targets)
    assert torch.equal(objective, model(others, other_targets)[0])
    others[:, 4] = 33
    assert not torch.equal(objective, model(others, targets)[0])


def test_training_loss_is_the_sum_of_the_losses_behind_the_memory_tokens():
    model = tiny_model()
    tokens, targets = batch()
    losses = model.token_losses(tokens[:, 4:], targets[:, 4:])
    torch.testing.assert_close(model(tokens, targets)[1], losses.sum())


@pytest.mark.parametrize("memory_tokens", [0, 4, 7])
def test_rows_and_windows_have_the_tokens_that_memory_tokens_leave(memory_tokens):
    """The two derived lengths are what the model really gives of a row and takes as a window."""
    changes = dict(memory_tokens=memory_tokens, eval_seq_len=30)
    settings = tiny_settings(**changes)
    assert settings.row_tokens == 24 - memory_tokens
    assert settings.window_tokens == 30 - memory_tokens
    model = tiny_model(**changes)
    seen = []
    hidden = model.hidden

    def keeping(tokens: Tensor, looped: bool) -> Tensor:
        seen.append(tokens.size(1))
        return hidden(tokens, looped)

    model.hidden = keeping
    model(*batch())
    assert seen == [settings.row_tokens]
    # A window of so many tokens fills the positions, to the last.
    positions = model.embed(random_tokens(1, settings.window_tokens)).size(1)
    assert positions == model.rotary.far.size(1) == 30


def test_evaluation_prepends_memory_tokens_and_scores_every_token():
    model = tiny_model()
    tokens, targets = evaluated()
    losses = model.token_losses(tokens, targets)
    embedded = model.embed(tokens)
    assert embedded.shape == (3, 24, 32)
    assert losses.shape == (3, 20) and (losses > 0).all()
    # The same for every row.
    assert torch.equal(embedded[0, :4], model.embed(63 - tokens)[2, :4])


def test_every_token_reaches_the_memory():
    model = tiny_model()
    tokens, targets = evaluated()
    losses = model.token_losses(tokens[:1], targets[:1])[0]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, model.memory.vectors, retain_graph=True)
        assert gradient.any(dim=1).all()
    with torch.no_grad():
        model.memory.vectors[2] += torch.randn(32)
    assert (model.token_losses(tokens[:1], targets[:1])[0] != losses).all()


def test_memory_tokens_do_not_see_the_text():
    model = tiny_model()
    seen = []
    run_block = model.run_block

    def keeping(*arguments) -> Tensor:
        x = run_block(*arguments)
        seen.append(x)
        return x

    model.run_block = keeping
    for seed in (0, 1):
        model.hidden(evaluated(seed)[0])
    first = seen[3]
    second = seen[7]
    assert torch.equal(first[:, :4], second[:, :4])
    assert not torch.equal(first[:, 4:], second[:, 4:])


def test_ignored_targets_count_nothing():
    model = tiny_model()
    tokens, targets = evaluated()
    everything = model.token_losses(tokens, targets)
    targets = targets.clone()
    targets[1, 3:] = IGNORED
    losses = model.token_losses(tokens, targets)
    counts = targets != IGNORED
    assert not losses[~counts].any() and torch.equal(losses[counts], everything[counts])


# ---- MTP


def test_mtp_changes_what_is_minimised_not_what_is_reported():
    model = tiny_model()
    off = tiny_model(mtp_num_heads=0)
    off.load_state_dict(model.state_dict(), strict=False)
    objective, loss = model(*batch())
    plain, reported = off(*batch())
    assert torch.equal(plain, reported) and torch.equal(loss, reported)
    assert objective > loss + 1 and not loss.requires_grad


def test_untrained_mtp_heads_cost_log_vocabulary_for_each_target_that_they_have():
    model = tiny_model(stirred=False, mtp_num_heads=3, mtp_loss_weight=0.5)
    objective, loss = model(*batch())
    # Of 3 rows; the last places have no target.
    targets = 3 * (19 + 18 + 17)
    extra = 0.5 * targets / 3 * math.log(64)
    torch.testing.assert_close((objective - loss).item(), extra, rtol=1e-5, atol=0)


def test_mtp_head_i_predicts_i_places_further():
    model = tiny_model(mtp_num_heads=2)
    tokens, targets = batch()
    states = model.hidden(tokens[:, 4:])
    targets = targets[:, 4:]
    expected = 0.0
    for ahead, head in enumerate(model.mtp.heads, 1):
        log_probabilities = (30 * torch.tanh(states @ head.T / 30)).log_softmax(-1)
        for row in range(3):
            for place in range(20 - ahead):
                target = targets[row, place + ahead]
                expected -= 0.2 / 2 * log_probabilities[row, place, target]
    objective, loss = model(*batch())
    torch.testing.assert_close(objective - loss, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("quant", ["fit", "rows"])
def test_mtp_heads_are_never_exported(quant):
    model = tiny_model()
    names = set(dict(model.named_parameters()))
    assert names - set(stored_parameters(model, quant)) == {"mtp.heads"}


# ---- The output layer in chunks


@pytest.mark.parametrize("chunk", [1, 10, 37, 74, 1000])
def test_losses_in_chunks_and_their_gradients_are_those_of_all_at_once(chunk, monkeypatch):
    vocabulary = 50
    monkeypatch.setattr(train_gpt, "MOST_LOGITS", chunk * vocabulary)
    generator = torch.Generator().manual_seed(chunk)
    states = torch.randn(2, 37, 8, generator=generator, requires_grad=True)
    output = torch.randn(vocabulary, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, vocabulary, (2, 37), generator=generator)
    targets[:, ::5] = train_gpt.IGNORED

    def gradients(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(0.37 * loss, (states, output))

    expected = train_gpt.softcapped_losses(states, output, 3.0, targets).sum()
    found = train_gpt.SummedLoss.apply(states, output, 3.0, targets, train_gpt.losses_and_slopes)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for one, other in zip(gradients(found), gradients(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest result of an operation has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("mtp_num_heads", [0, 2])
def test_no_logits_of_a_whole_batch_are_made(mtp_num_heads, monkeypatch):
    vocabulary = 2048
    monkeypatch.setattr(train_gpt, "MOST_LOGITS", 8 * vocabulary)
    model = tiny_model(vocab_size=vocabulary, mtp_num_heads=mtp_num_heads)
    tokens = random_tokens(32, tiny_settings().train_seq_len, vocab_size=vocabulary)
    limit = tokens.numel() * vocabulary / 4
    with LargestTensor() as largest:
        model(tokens, tokens)[0].backward()
    assert 8 * vocabulary <= largest.numel <= limit
    window = tokens[:, : tiny_settings().row_tokens]
    with LargestTensor() as largest, torch.no_grad():
        losses = model.token_losses(window, window)
    assert losses.shape == window.shape and largest.numel <= limit


# ---- Size


@pytest.mark.parametrize(
    "settings, count",
    [
        (Settings(vocab_size=1024), 32_865_932),
        (Settings(vocab_size=8192), 36_535_948),
        (Settings(**PRESETS["entry_339"]), 27_092_058),
        # The base that #339 was built on, #198.
        (
            dataclasses.replace(
                Settings(**PRESETS["entry_339"]), bigram_vocab_size=2048, backout_enabled=False
            ),
            26_829_913,
        ),
        (Settings(**PRESETS["entry_352"]), 26_598_481),
    ],
    ids=["record", "record with 8,192 pieces", "entry_339", "base of entry_339", "entry_352"],
)
def test_parameter_count(settings, count):
    with torch.device("meta"):
        model = GPT(settings, Runtime())
    assert sum(p.numel() for p in model.parameters()) == count


# ---- The whole model against a plain reference


def rms(x: Tensor) -> Tensor:
    """RMSNorm by its definition."""
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def rotated(x: Tensor, dims: int, base: float = 10000.0) -> Tensor:
    """x (length, heads, dim) with its first dims turned, as complex numbers."""
    half = dims // 2
    turns = torch.arange(len(x))[:, None] * base ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:dims])
    turned = turned * torch.polar(torch.ones_like(turns), turns)[:, None]
    return torch.cat((turned.real, turned.imag, x[..., dims:]), -1)


def reference_embedding(model: GPT, s: Settings, tokens: Tensor) -> Tensor:
    """Memory tokens and normed embeddings of one row, (positions, dim)."""
    x = model.embedding.weight[tokens]
    if model.bigram is not None:
        x = x + model.bigram(tokens[None], torch.float32)[0]
    x = rms(x)
    if model.smear is not None:
        gate = torch.sigmoid(model.smear.gate)
        blended = [x[0]]
        for i in range(1, len(tokens)):
            open_gate = gate * (tokens[i] != BOS)
            blended.append((1 - open_gate) * x[i] + open_gate * x[i - 1])
        x = torch.stack(blended)
    if s.memory_tokens:
        x = torch.cat((rms(model.memory.vectors), x))
    return x


def reference_attention(block: Block, s: Settings, y: Tensor) -> Tensor:
    """What a block's attention adds of a normed row, one head at a time."""
    length = len(y)
    dim = s.model_dim // s.num_heads
    rotary_dims = s.rope_dims or dim
    attention = block.attention
    q = rotated(rms(F.linear(y, attention.query).view(length, -1, dim)), rotary_dims)
    k = rotated(rms(F.linear(y, attention.key).view(length, -1, dim)), rotary_dims)
    v = F.linear(y, attention.value).view(length, -1, dim)
    if s.key_offset_enabled:
        for place in range(length - 1, 0, -1):
            k[place, :, rotary_dims:] = k[place - 1, :, rotary_dims:]
    future = torch.full((length, length), -math.inf).triu(1)
    heads = []
    for head in range(s.num_heads):
        shared = head * s.num_kv_heads // s.num_heads
        scores = attention.gain[head] * q[:, head] @ k[:, shared].T / math.sqrt(dim) + future
        out = scores.softmax(-1) @ v[:, shared]
        if block.layer >= s.num_layers - s.xsa_last_n:
            own = v[:, shared]
            share = (out * own).sum(-1) / own.square().sum(-1)
            out = out - share[:, None] * own
        if s.sparse_attn_gate_enabled:
            read = y[:, : s.gate_window] @ attention.gate.weight[head]
            out = torch.sigmoid(s.sparse_attn_gate_scale * read)[:, None] * out
        heads.append(out)
    return block.attention_scale * F.linear(torch.cat(heads, -1), attention.out)


def reference_mlp(block: Block, s: Settings, y: Tensor) -> Tensor:
    """What a block's MLP adds of a normed row."""
    hidden = F.linear(y, block.mlp.up)
    hidden = torch.where(hidden > 0, hidden, s.negative_slope * hidden) ** 2
    return block.mlp_scale * F.linear(hidden, block.mlp.down)


def reference_logits(model: GPT, s: Settings, tokens: Tensor, loops: int | None = None) -> Tensor:
    """Logits of one row, (length, vocabulary), with skips by index."""
    x = reference_embedding(model, s, tokens)
    embedding = x
    # The second lane, once there is one.
    z = None
    loops = s.num_loops if loops is None else loops
    layers = list(range(s.loop_start)) if loops else []
    for _ in range(loops + 1 if loops else 0):
        layers += range(s.loop_start, s.loop_end + 1)
    layers += range(layers[-1] + 1 if layers else 0, s.num_layers)
    outputs = []
    half = len(layers) // 2
    for i, layer in enumerate(layers):
        block = model.blocks[layer]
        if s.parallel_start_layer and layer >= s.parallel_start_layer and z is None:
            z = x
        if half <= i < 2 * half:
            # The visit at the same distance from the middle.
            pushed = model.skips.scales[i - half] * outputs[2 * half - 1 - i]
            if s.skip_gates_enabled:
                gate = torch.sigmoid(model.skips.gates[i - half])
                x = gate * x + (1 - gate) * pushed
            else:
                x = x + pushed
        divisor = math.sqrt(layer + 1 if s.ln_scale else 1)
        mixed = block.mix[0] * x + block.mix[1] * embedding
        attended = reference_attention(block, s, rms(mixed) / divisor)
        if z is None:
            x = mixed + attended
            x = x + reference_mlp(block, s, rms(x) / divisor)
        else:
            transformed = reference_mlp(block, s, rms(z) / divisor)
            keep = block.lane_weights.keep
            write = block.lane_weights.write
            x = keep[0] * x + write[0, 0] * attended + write[1, 0] * transformed
            z = keep[1] * z + write[0, 1] * attended + write[1, 1] * transformed
        outputs.append(x)
    if z is not None:
        x = (x + z) / 2
    if model.backout is not None:
        middle = s.num_layers // 2 if s.backout_layer < 0 else s.backout_layer
        last_visit = max(i for i, layer in enumerate(layers) if layer == middle)
        x = x - model.backout.amount * outputs[last_visit]
    states = rms(x[s.memory_tokens :])
    output = model.embedding.weight if s.tie_embeddings else model.head.weight
    return s.logit_softcap * torch.tanh(states @ output.T / s.logit_softcap)


# Every technique alone, on a plain transformer.
TECHNIQUES = [
    {**ALL_OFF, "rope_dims": 4, "key_offset_enabled": True},
    {**ALL_OFF, "xsa_last_n": 4},
    {**ALL_OFF, "xsa_last_n": 2, "num_kv_heads": 1},
    {**ALL_OFF, "sparse_attn_gate_enabled": True},
    {**ALL_OFF, "sparse_attn_gate_enabled": True, "gate_window": 32, "sparse_attn_gate_scale": 2.0},
    {**ALL_OFF, "negative_slope": 0.3},
    {**ALL_OFF, "skip_gates_enabled": True},
    {**ALL_OFF, "num_loops": 3, "loop_start": 0, "loop_end": 3},
    {**ALL_OFF, "num_layers": 11, "num_loops": 2, "loop_start": 3, "loop_end": 5},
    {**ALL_OFF, "parallel_start_layer": 2},
]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(num_layers=1, backout_enabled=False),
        dict(num_layers=5),
        dict(num_layers=11, train_seq_len=12, train_batch_tokens=12),
        ALL_OFF,
        dict(memory_tokens=0),
        dict(ln_scale=False),
        OFF["rope"],
        dict(tie_embeddings=False),
        dict(backout_layer=0),
        dict(backout_layer=3),
        dict(num_kv_heads=1),
        dict(num_kv_heads=4, logit_softcap=2.0),
        ALL_ON,
        dict(num_layers=11, num_loops=2, parallel_start_layer=8),
        *TECHNIQUES,
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_equal_a_reference(changes):
    settings = tiny_settings(**changes)
    model = tiny_model(**changes)
    tokens = batch()[0][1, :8]
    expected = reference_logits(model, settings, tokens)
    torch.testing.assert_close(model.logits(tokens[None])[0], expected, rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_before_its_loops_begin_a_model_is_the_one_without_them():
    changes = dict(num_layers=11, num_loops=2, parallel_start_layer=8)
    model = tiny_model(**changes)
    tokens, targets = batch()
    _, plain = model(tokens, targets, looped=False)
    _, looped = model(tokens, targets)
    logits = reference_logits(model, tiny_settings(**changes), tokens[0, 4:12], loops=0)
    hidden = model.hidden(tokens[:1, 4:12], looped=False)
    found = train_gpt.softcapped_logits(hidden, model.output, model.softcap)
    torch.testing.assert_close(found[0], logits, rtol=1e-4, atol=2e-4)
    assert abs(plain - looped) > 0.1


# ---- Key offset, XSA and gates


def test_offset_keys_take_what_does_not_rotate_from_the_position_before():
    keys = torch.randn(2, 5, 3, 8)
    offset = offset_keys(keys, 4)
    assert torch.equal(offset[..., :4], keys[..., :4])
    assert torch.equal(offset[:, 1:, :, 4:], keys[:, :-1, :, 4:])
    assert torch.equal(offset[:, 0], keys[:, 0])
    # Where a segment starts there is no position before.
    starts = torch.zeros(2, 5, dtype=torch.bool)
    starts[:, 0] = starts[1, 3] = True
    limited = offset_keys(keys, 4, starts)
    assert torch.equal(limited[1, 3], keys[1, 3]) and not torch.equal(limited[1, 3], offset[1, 3])
    limited[1, 3] = offset[1, 3]
    assert torch.equal(limited, offset)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
def test_what_xsa_leaves_is_orthogonal_to_the_own_value(heads, kv_heads):
    attended = torch.randn(2, 5, heads, 8)
    values = torch.randn(2, 5, kv_heads, 8)
    left = exclude_own_value(attended, values)
    own = values.repeat_interleave(heads // kv_heads, dim=2)
    assert (left * own).sum(-1).abs().max() < 1e-5
    # What was orthogonal before stays.
    torch.testing.assert_close(exclude_own_value(left, values), left)
    nothing = exclude_own_value(own, values)
    assert nothing.abs().max() < 1e-5


def test_initial_gates_are_half_open():
    model = tiny_model(stirred=False)
    attended = torch.randn(2, 5, 4, 8)
    gated = model.blocks[0].attention.gate(torch.randn(2, 5, 32), attended)
    assert torch.equal(gated, attended / 2)
    x = torch.randn(2, 5, 32)
    pushed = torch.randn(2, 5, 32)
    torch.testing.assert_close(model.skips(x, 0, pushed), (x + pushed) / 2)


@pytest.mark.parametrize(
    "changes, problem",
    [
        (dict(rope_dims=0), "KEY_OFFSET_ENABLED needs dimensions that do not rotate"),
        (dict(gate_window=33), "GATE_WINDOW=33 exceeds MODEL_DIM=32"),
        (dict(num_loops=1, loop_start=3, loop_end=2), "LOOP_START=3 to LOOP_END=2 are no blocks"),
        (dict(num_loops=1, loop_start=3, loop_end=4), "are no blocks of NUM_LAYERS=4"),
        (dict(parallel_start_layer=2), "PARALLEL_START_LAYER=2 must be above block 2"),
        (dict(parallel_start_layer=1, backout_enabled=False), "must be above block 1"),
        (
            dict(parallel_start_layer=3, num_loops=1, loop_start=2, loop_end=3),
            "must be above block 3",
        ),
    ],
    ids=str,
)
def test_a_trunk_that_cannot_be_is_refused(changes, problem):
    with pytest.raises(train_gpt.UserError, match=re.escape(problem)):
        tiny_settings(**changes)


# ---- Causality


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
@pytest.mark.parametrize("longer", [0, 16])
@torch.no_grad()
def test_no_token_changes_the_scores_before_it(backend, longer):
    model = tiny_model(Runtime(attention=backend), eval_seq_len=24 + longer)
    tokens = random_tokens(2, 20 + longer)
    tokens[0, 7] = BOS
    logits = model.logits(tokens)
    assert torch.isfinite(logits).all()
    for place in range(tokens.size(1)):
        for changed in (BOS, 2, 63):
            other = tokens.clone()
            other[:, place] = changed
            scores = model.logits(other)
            assert torch.equal(scores[:, :place], logits[:, :place])
            differs = tokens[:, place] != changed
            assert ((scores[:, place:] != logits[:, place:]).any(-1)[differs]).all()


@torch.no_grad()
def test_no_row_changes_another():
    model = tiny_model()
    tokens = random_tokens(3, 20)
    other = tokens.clone()
    other[1] = random_tokens(1, 20, seed=9)
    changed = (model.logits(tokens) != model.logits(other)).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


@torch.no_grad()
def test_probabilities_sum_to_one():
    """Those of all 64 pieces at each place, by the losses that evaluation sums."""
    model = tiny_model()
    tokens, targets = evaluated()
    losses = [model.token_losses(tokens, torch.full_like(targets, i)) for i in range(64)]
    total = (-torch.stack(losses).double()).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(3, 20).double(), atol=1e-5, rtol=0)


# ---- Attention


def random_inputs(
    length: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> AttentionInputs:
    """Queries, keys and values of two rows, with heads of 8 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for count in (heads, kv_heads, kv_heads):
        parts.append(torch.randn(2, length, count, 8, generator=generator).to(dtype))
    return AttentionInputs(*parts)


def attention_by_definition(inputs: AttentionInputs, starts: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention in float64, within the segments that begin at `starts`."""
    group = inputs.queries.size(2) // inputs.keys.size(2)
    keys = inputs.keys.double().repeat_interleave(group, dim=2)
    values = inputs.values.double().repeat_interleave(group, dim=2)
    positions = torch.arange(keys.size(1))
    scores = torch.einsum("bihd,bjhd->bhij", inputs.queries.double(), keys) / math.sqrt(8)
    scores = scores.masked_fill(positions > positions[:, None], -math.inf)
    if starts is not None:
        for row, begins in enumerate(starts):
            for place in begins.nonzero()[:, 0]:
                scores[row, :, place:, :place] = -math.inf
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
# In one block, two, three and eight.
@pytest.mark.parametrize("length", [1, 7, 128, 129, 300, 1100])
def test_blocked_attention_equals_sdpa_and_the_definition(
    dtype, tolerance, heads, kv_heads, length
):
    inputs = random_inputs(length, heads, kv_heads, dtype)
    expected = attention_by_definition(inputs)
    for backend in ("sdpa", "blocked"):
        out = ATTENTION_BACKENDS[backend].attend(inputs)
        assert out.dtype == dtype and out.shape == inputs.queries.shape
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("length", [9, 300])
def test_gradients_of_blocked_attention_equal_those_of_sdpa(kv_heads, length):
    weights = torch.randn(2, length, 4, 8)
    gradients = []
    for backend in ("sdpa", "blocked"):
        inputs = random_inputs(length, 4, kv_heads)
        for part in inputs[:3]:
            part.requires_grad_()
        (ATTENTION_BACKENDS[backend].attend(inputs) * weights).sum().backward()
        gradients.append([part.grad for part in inputs[:3]])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_blocked_attention_is_causal_to_the_bit(dtype, kv_heads):
    attend = ATTENTION_BACKENDS["blocked"].attend
    inputs = random_inputs(300, 4, kv_heads, dtype)
    before = attend(inputs)
    for place in (1, 127, 128, 200, 256, 299):
        changed = []
        for part in inputs[:3]:
            part = part.clone()
            part[:, place:] = 50 * torch.randn(part[:, place:].shape).to(dtype)
            changed.append(part)
        after = attend(AttentionInputs(*changed))
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])


# ---- Segments: attention within documents


def flash_varlen_by_definition(q, k, v, ends_q, ends_k, longest_q, longest_k, causal):
    """What flash-attn's function for sequences of several lengths gives; they lie end to end."""
    assert causal and ends_q is ends_k and ends_q.dtype == torch.int32
    assert longest_q == longest_k >= ends_q.diff().max() and ends_q.diff().min() >= 0
    assert ends_q[0] == 0 and ends_q[-1] == len(q)
    parts = []
    for start, end in itertools.pairwise(ends_q.tolist()):
        inputs = AttentionInputs(*(x[start:end][None] for x in (q, k, v)))
        parts.append(attention_by_definition(inputs)[0].to(q.dtype))
    return torch.cat(parts)


@pytest.fixture
def flash_packages(monkeypatch):
    """Both packages of flash-attn, as far as they are used with segments."""
    for name in ("flash_attn", "flash_attn_interface"):
        package = types.ModuleType(name)
        package.flash_attn_func = None
        package.flash_attn_varlen_func = flash_varlen_by_definition
        monkeypatch.setitem(sys.modules, name, package)


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 7, 200, 300])
def test_every_backend_keeps_to_segments(flash_packages, backend, heads, kv_heads, length):
    inputs = random_inputs(length, heads, kv_heads)
    starts = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.01
    starts[:, 0] = True
    starts[1, length // 2] = True
    attend, limits_of = ATTENTION_BACKENDS[backend]
    out = attend(inputs._replace(limits=limits_of(starts)))
    expected = attention_by_definition(inputs, starts)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_ends_of_segments_have_one_shape_for_any_number_of_documents():
    starts = torch.zeros(2, 100, dtype=torch.bool)
    starts[:, 0] = True
    # Five for each row of 100.
    assert segment_ends(starts).tolist() == [0, 100] + 9 * [200]
    starts[0, 50] = True
    starts[1, 7] = True
    assert segment_ends(starts).tolist() == [0, 50, 100, 107] + 7 * [200]
    # Rows never run together; of the documents too many, the last stay with the one before.
    starts[0, ::10] = True
    assert segment_ends(starts).tolist() == [*range(0, 90, 10), 100, 200]


# Documents of 6, 1, 9 and 8 tokens, and of 24.
DOCUMENTS = torch.zeros(2, 24, dtype=torch.bool)
DOCUMENTS[0, [0, 6, 7, 16]] = True
DOCUMENTS[1, 0] = True


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
@torch.no_grad()
def test_a_document_gets_the_logits_that_it_gets_alone(backend):
    """But for BigramHash, which looks one token back anywhere."""
    changes = dict(memory_tokens=0, document_attention=True, bigram_vocab_size=0, **LOOPED, **LANES)
    model = tiny_model(Runtime(attention=backend), **changes)
    tokens = random_tokens(2, 24, 3)
    tokens[tokens == BOS] = BOS + 1
    tokens[DOCUMENTS] = BOS
    logits = model.logits(tokens)
    for row in range(2):
        starts = DOCUMENTS[row].nonzero()[:, 0].tolist()
        for start, end in itertools.pairwise([*starts, 24]):
            alone = model.logits(tokens[row, start:end][None])[0]
            torch.testing.assert_close(logits[row, start:end], alone, rtol=1e-4, atol=1e-4)
    together = tiny_model(Runtime(attention=backend), **{**changes, "document_attention": False})
    assert not torch.allclose(together.logits(tokens)[0, 6:], logits[0, 6:], atol=1e-2)


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
@torch.no_grad()
def test_bfloat16_activations_give_about_the_float32_loss(backend):
    _, loss = tiny_model()(*batch())
    half = tiny_model(Runtime(dtype=torch.bfloat16, attention=backend))
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert half.logits(evaluated()[0]).dtype == torch.float32
    torch.testing.assert_close(half(*batch())[1], loss, rtol=0.02, atol=0)


# ---- Rotary positions


def rotary_settings(dims: int, train: int, longest: int, base: float = 10000.0) -> Settings:
    """Settings of rotary positions: rotated dimensions and the lengths of rows and windows."""
    return Settings(
        rope_dims=dims,
        rope_base=base,
        train_seq_len=train,
        eval_seq_len=longest,
        memory_tokens=0,
    )


def turned(rotary: Rotary, x: Tensor) -> Tensor:
    """x (batch, positions, heads, head_dim), turned by its positions."""
    return rotate(x, rotary(x.size(1)))


def test_rotary_leaves_the_other_dimensions_alone():
    x = torch.randn(1, 10, 2, 8)
    out = turned(Rotary(rotary_settings(4, 16, 16)), x)
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert torch.equal(out[:, 0], x[:, 0]) and (out[:, 1:, :, :4] != x[:, 1:, :, :4]).all()
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_products_of_rotated_vectors_depend_on_their_distance_only():
    rotary = Rotary(rotary_settings(6, 16, 16, base=100.0))
    queries = turned(rotary, torch.randn(8).expand(1, 16, 1, 8))[0, :, 0]
    keys = turned(rotary, torch.randn(8).expand(1, 16, 1, 8))[0, :, 0]
    products = queries @ keys.T
    for distance in range(-15, 16):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)
    assert products[0].std() > 0.01


def test_rotary_beyond_the_training_length_rescales_its_base():
    """The slowest pair turns as far over the longer context as over the training length."""
    x = torch.randn(8).expand(1, 64, 1, 8)
    rotary = Rotary(rotary_settings(8, 16, 64))
    short = Rotary(rotary_settings(8, 16, 16))
    known = turned(short, x[:, :16])
    assert torch.equal(turned(rotary, x[:, :16]), known)
    longer = turned(rotary, x)[0, :, 0]
    known = known[0, :, 0]
    torch.testing.assert_close(longer[::4, [3, 7]], known[:, [3, 7]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(longer[:16, [0, 4]], known[:, [0, 4]], rtol=1e-5, atol=1e-5)


# ---- Head and initial weights


@pytest.mark.parametrize("softcap", [2.0, 30.0])
@torch.no_grad()
def test_logits_stay_within_the_softcap(softcap):
    model = tiny_model(logit_softcap=softcap)
    model.embedding.weight.mul_(100)
    logits = model.logits(evaluated()[0])
    assert softcap * 0.99 < logits.abs().max() <= softcap


@pytest.mark.parametrize("layers", [2, 5])
def test_initial_matrices_are_orthogonal_and_output_projections_scaled(layers):
    model = tiny_model(stirred=False, num_layers=layers)
    matrices = {}
    for name, role in model.roles().items():
        if role in ("attention", "mlp", "bigram_projection"):
            matrices[name] = model.get_parameter(name).detach()
    assert len(matrices) == 6 * layers + 1
    for name, matrix in matrices.items():
        scaled = name.endswith((".out", ".down"))
        expected = torch.full((min(matrix.shape),), (2 * layers) ** -0.5 if scaled else 1.0)
        values = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, deviation",
    [
        ({}, 0.005),
        (dict(tied_embed_init_std=0.02), 0.02),
        (dict(tie_embeddings=False), 1.0),
    ],
)
@torch.no_grad()
def test_initial_embedding_is_small_where_it_is_tied(changes, deviation):
    model = tiny_model(stirred=False, **changes)
    assert float(model.embedding.weight.std()) == pytest.approx(deviation, rel=0.1)
    assert model.head is None or not model.head.weight.any()


@torch.no_grad()
def test_initial_loss_is_about_that_of_a_uniform_guess():
    loss = tiny_model(stirred=False).token_losses(*evaluated()).mean()
    assert abs(float(loss) - math.log(64)) < 0.1


# ---- Operations


@pytest.mark.parametrize(
    "changes",
    [
        dict(
            train_seq_len=64,
            memory_tokens=8,
            document_attention=False,
            rope_dims=0,
            key_offset_enabled=False,
        ),
        dict(
            train_seq_len=128,
            memory_tokens=0,
            tie_embeddings=False,
            mtp_num_heads=2,
            bigram_vocab_size=0,
        ),
    ],
)
def test_operations_are_those_that_torch_counts(changes):
    """A row of one block of attention multiplies all keys, of which a causal count takes half."""
    s = Settings(**{"vocab_size": 1024, **changes})
    rows = 3
    with torch.device("meta"):
        model = GPT(s, Runtime(attention="blocked"))
        tokens = torch.zeros(rows, s.train_seq_len, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens)[0].backward()
    half = 6 * s.num_visits * s.train_seq_len * s.model_dim
    counted = counter.get_total_flops() / (rows * s.train_seq_len)
    assert counted == flops_per_token(model, s) + half


def test_operations_of_the_record_preset():
    """298 million in matrices, 107 million in attention, of 17 visits to 11 blocks."""
    s = Settings(vocab_size=1024)
    with torch.device("meta"):
        model = GPT(s, Runtime())
    assert flops_per_token(model, s) == pytest.approx(404.5e6, rel=0.01)
