"""The model: every feature off and on, causality, attention backends, rotary positions, initial weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from bench_worker import flops_per_token
from conftest import BOS, random_tokens, tiny_model, tiny_settings
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from train_gpt import (
    ATTENTION,
    GPT,
    IGNORED,
    Rotary,
    Runtime,
    Settings,
    SmearGate,
    stored_parameters,
)

OFF = dict(
    smear=dict(smear_enabled=False),
    bigram=dict(bigram_vocab_size=0),
    memory=dict(memory_tokens=0),
    backout=dict(backout_enabled=False),
    mtp=dict(mtp_num_heads=0),
    head=dict(tie_embeddings=True),
    ln_scale=dict(ln_scale=False),
    rope=dict(rope_dims=0),
)
OWN = dict(
    smear={"smear.gate"},
    bigram={"bigram.table", "bigram.projection", "bigram.scale"},
    memory={"memory"},
    backout={"backout"},
    mtp={"mtp_heads"},
    head={"head"},
    ln_scale=set(),
    rope=set(),
)
ALL_ON = dict(tie_embeddings=False)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A training batch with some BOS in it."""
    tokens = random_tokens(3, 25, seed)
    tokens[:, [4, 13]] = BOS
    return tokens[:, :-1], tokens[:, 1:]


def evaluated(seed: int = 0) -> tuple[Tensor, Tensor]:
    """What fills a window of evaluation behind the memory tokens: (3, 20)."""
    tokens, targets = batch(seed)
    return tokens[:, :20], targets[:, :20]


def switched_off(model: GPT, feature: str, **changes) -> GPT:
    """The model without a feature, its other parameters the same."""
    off = tiny_model(**{**ALL_ON, **OFF[feature], **changes})
    missing, extra = off.load_state_dict(model.state_dict(), strict=False)
    assert not missing and set(extra) == OWN[feature]
    return off


# ---- Off and on


@pytest.mark.parametrize("feature", OFF)
def test_off_takes_away_the_features_own_parameters_and_no_other(feature):
    shapes = {name: p.shape for name, p in tiny_model(**ALL_ON).named_parameters()}
    off = {name: p.shape for name, p in tiny_model(**{**ALL_ON, **OFF[feature]}).named_parameters()}
    assert off == {name: shape for name, shape in shapes.items() if name not in OWN[feature]}


@pytest.mark.parametrize("feature", OFF)
@torch.no_grad()
def test_on_changes_the_objective(feature):
    model = tiny_model(**ALL_ON)
    off = switched_off(model, feature)
    tokens, targets = batch()
    if feature == "memory":  # a row without memory is shorter, so that both score the same targets
        difference = model(tokens, targets)[0] - off(tokens[:, 4:], targets[:, 4:])[0]
    else:
        difference = model(tokens, targets)[0] - off(tokens, targets)[0]
    assert abs(difference) > 0.02


@pytest.mark.parametrize("feature", [f for f in OFF if f != "memory"])
@torch.no_grad()
def test_a_feature_at_its_neutral_value_is_exactly_the_model_without_it(feature):
    model = tiny_model(**ALL_ON, **(dict(rope_dims=8) if feature == "rope" else {}))
    if feature == "smear":
        model.smear.gate.fill_(-math.inf)
    elif feature == "bigram":
        model.bigram.table.zero_()  # as it is initialised
    elif feature == "backout":
        model.backout.zero_()
    elif feature == "head":
        model.head.copy_(model.embedding)
    elif feature == "ln_scale":
        for block in model.blocks:
            block.norm_scale.fill_(1.0)
    off = switched_off(model, feature)
    assert torch.equal(model(*batch())[1], off(*batch())[1])
    assert torch.equal(model.token_losses(*evaluated()), off.token_losses(*evaluated()))


def test_the_bigram_changes_nothing_before_training():
    model = tiny_model(stirred=False)
    off = tiny_model(stirred=False, bigram_vocab_size=0)
    off.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(*batch())[0], off(*batch())[0])


def test_gradient_reaches_every_parameter():
    model = tiny_model(**ALL_ON)
    model(*batch())[0].backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []


def test_gradient_reaches_lambda_memory_and_bigram_from_the_initial_weights():
    model = tiny_model(stirred=False)
    model(*batch())[0].backward()
    assert all(
        p.grad.any() for p in (model.backout, model.memory, model.bigram.table, model.smear.gate)
    )


# ---- SmearGate and BigramHash


def test_smear_gate_is_shut_at_bos_and_at_the_first_token_and_blends_elsewhere():
    gate, x, tokens = SmearGate(8), torch.randn(2, 6, 8), random_tokens(2, 6)
    with torch.no_grad():
        gate.gate.copy_(torch.randn(8))
    tokens[0, 3] = BOS
    out, g = gate(x, tokens), torch.sigmoid(gate.gate)
    shut = torch.zeros(2, 6, dtype=torch.bool)
    shut[:, 0] = shut[0, 3] = True
    assert torch.equal(out[shut], x[shut])
    blended = (1 - g) * x[:, 1:] + g * x[:, :-1]
    torch.testing.assert_close(out[:, 1:][~shut[:, 1:]], blended[~shut[:, 1:]])
    assert (out[~shut] != x[~shut]).all()


def test_the_embedding_at_bos_knows_nothing_of_the_document_before():
    model, tokens = tiny_model(bigram_vocab_size=0), random_tokens(1, 6)
    tokens[0, 3] = BOS
    other = tokens.clone()
    other[0, 2] = (other[0, 2] + 1) % 60 + 4
    before, after = model.embed(tokens)[:, 4:], model.embed(other)[:, 4:]
    assert torch.equal(before[:, 3], after[:, 3]) and not torch.equal(before[:, 2], after[:, 2])


def test_bigram_depends_on_the_pair_and_nothing_else():
    bigram = tiny_model(bigram_vocab_size=4096).bigram
    first, second = torch.tensor([[5, 9, 7, 9, 7]]), torch.tensor([[8, 9, 7, 7, 9]])
    a, b = bigram.bucket(first)[0], bigram.bucket(second)[0]
    assert a[2] == b[2] == a[4] and len({int(i) for i in (a[2], a[3], b[3])}) == 3
    assert int(a.min()) >= 0 and int(torch.cat((a, b)).max()) < 4096


def test_bigram_buckets_are_spread_evenly():
    pairs = torch.cartesian_prod(torch.arange(64), torch.arange(64))
    counts = torch.bincount(
        tiny_model(bigram_vocab_size=256).bigram.bucket(pairs)[:, 1], minlength=256
    )
    assert counts.min() > 0 and counts.max() < 3 * 4096 / 256


# ---- Memory tokens


def test_training_neither_sees_nor_scores_the_places_of_memory_tokens():
    model, (tokens, targets) = tiny_model(), batch()
    others, other_targets = tokens.clone(), targets.clone()
    others[:, :4], other_targets[:, :4] = 33, 44
    assert torch.equal(model(tokens, targets)[0], model(others, other_targets)[0])
    others[:, 4] = 33
    assert not torch.equal(model(tokens, targets)[0], model(others, targets)[0])


def test_training_loss_is_the_sum_of_the_losses_behind_the_memory_tokens():
    model, (tokens, targets) = tiny_model(), batch()
    losses = model.token_losses(tokens[:, 4:], targets[:, 4:])
    torch.testing.assert_close(model(tokens, targets)[1], losses.sum())


def test_evaluation_prepends_memory_tokens_and_scores_every_token():
    model, (tokens, targets) = tiny_model(), evaluated()
    losses = model.token_losses(tokens, targets)
    assert model.embed(tokens).shape == (3, 24, 32)
    assert losses.shape == (3, 20) and (losses > 0).all()
    assert torch.equal(
        model.embed(tokens)[0, :4], model.embed(63 - tokens)[2, :4]
    )  # the same for every row


def test_every_token_reaches_the_memory():
    model, (tokens, targets) = tiny_model(), evaluated()
    losses = model.token_losses(tokens[:1], targets[:1])[0]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, model.memory, retain_graph=True)
        assert gradient.any(dim=1).all()
    with torch.no_grad():
        model.memory[2] += torch.randn(32)
    assert (model.token_losses(tokens[:1], targets[:1])[0] != losses).all()


def test_memory_tokens_do_not_see_the_text():
    model, seen = tiny_model(), []
    model.blocks[-1].register_forward_hook(lambda *call: seen.append(call[2]))
    model.run_block = lambda block, *arguments: block(*arguments)
    for seed in (0, 1):
        model.hidden(evaluated(seed)[0])
    assert torch.equal(seen[0][:, :4], seen[1][:, :4]) and not torch.equal(
        seen[0][:, 4:], seen[1][:, 4:]
    )


def test_ignored_targets_count_nothing():
    model, (tokens, targets) = tiny_model(), evaluated()
    everything = model.token_losses(tokens, targets)
    targets = targets.clone()
    targets[1, 3:] = IGNORED
    losses = model.token_losses(tokens, targets)
    assert not losses[1, 3:].any() and torch.equal(
        losses[targets != IGNORED], everything[targets != IGNORED]
    )


# ---- MTP


def test_mtp_changes_what_is_minimised_not_what_is_reported():
    model, off = tiny_model(), tiny_model(mtp_num_heads=0)
    off.load_state_dict(model.state_dict(), strict=False)
    (objective, loss), (plain, reported) = model(*batch()), off(*batch())
    assert torch.equal(plain, reported) and torch.equal(loss, reported) and objective > loss + 1
    assert not loss.requires_grad


def test_untrained_mtp_heads_cost_log_vocabulary_for_each_target_that_they_have():
    model = tiny_model(stirred=False, mtp_num_heads=3, mtp_loss_weight=0.5)
    objective, loss = model(*batch())
    extra = 0.5 * 3 * (19 + 18 + 17) / 3 * math.log(64)  # 3 rows; the last places have no target
    torch.testing.assert_close((objective - loss).item(), extra, rtol=1e-5, atol=0)


def test_mtp_head_i_predicts_i_places_further():
    model, (tokens, targets) = tiny_model(mtp_num_heads=2), batch()
    states, targets = model.hidden(tokens[:, 4:]), targets[:, 4:]
    expected = 0.0
    for ahead, head in enumerate(model.mtp_heads, 1):
        for row in range(3):
            for place in range(20 - ahead):
                log_probabilities = (30 * torch.tanh(states[row, place] @ head.T / 30)).log_softmax(
                    -1
                )
                expected -= 0.2 / 2 * log_probabilities[targets[row, place + ahead]]
    objective, loss = model(*batch())
    torch.testing.assert_close(objective - loss, expected, rtol=1e-4, atol=1e-3)


def test_mtp_heads_are_never_exported():
    model = tiny_model()
    assert set(dict(model.named_parameters())) - set(stored_parameters(model)) == {"mtp_heads"}


# ---- Size


@pytest.mark.parametrize(
    "changes, count",
    [
        (dict(), 27_124_826),
        (dict(num_layers=11, bigram_vocab_size=4096, memory_tokens=0), 27_092_058),  # entry A, #339
        (
            dict(bigram_vocab_size=2048, backout_enabled=False, memory_tokens=0),
            26_829_913,
        ),  # its base, #198
        (
            dict(num_layers=10, bigram_vocab_size=10240, backout_enabled=False, mtp_num_heads=2),
            26_598_481,
        ),  # B
    ],
    ids=["record", "A", "base of A", "B"],
)
def test_parameter_count(changes, count):
    with torch.device("meta"):
        model = GPT(Settings(**changes), Runtime())
    assert sum(p.numel() for p in model.parameters()) == count


# ---- The whole model against a plain reference


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def rotated(x: Tensor, dims: int, base: float = 10000.0) -> Tensor:
    """x (length, heads, dim) with its first dims turned, as complex numbers."""
    half = dims // 2
    turns = torch.arange(len(x))[:, None] * base ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:dims])
    turned = turned * torch.polar(torch.ones_like(turns), turns)[:, None]
    return torch.cat((turned.real, turned.imag, x[..., dims:]), -1)


def reference_logits(model: GPT, s: Settings, tokens: Tensor) -> Tensor:
    """Logits of one row, (length, vocabulary): one head at a time, skips by index."""
    length, dim = s.memory_tokens + len(tokens), s.model_dim // s.num_heads
    x = rms(
        model.embedding[tokens]
        + (model.bigram(tokens[None], torch.float32)[0] if model.bigram else 0.0)
    )
    if model.smear:
        gate = torch.sigmoid(model.smear.gate)
        x = torch.stack(
            [
                x[i] if i == 0 or tokens[i] == BOS else (1 - gate) * x[i] + gate * x[i - 1]
                for i in range(len(tokens))
            ]
        )
    if s.memory_tokens:
        x = torch.cat((rms(model.memory), x))
    x0, outputs, half = x, [], s.num_layers // 2
    mask = torch.full((length, length), -math.inf).triu(1)
    for i, block in enumerate(model.blocks):
        if half <= i < 2 * half:  # the block at the same distance from the middle
            x = x + model.skip_scales[i - half] * outputs[2 * half - 1 - i]
        x = block.mix[0] * x + block.mix[1] * x0
        y = rms(x) / math.sqrt(i + 1 if s.ln_scale else 1)
        q, k, v = (
            F.linear(y, w).view(length, -1, dim)
            for w in (block.attention.query, block.attention.key, block.attention.value)
        )
        q, k = (rotated(rms(a), s.rope_dims or dim) for a in (q, k))
        heads = []
        for head in range(s.num_heads):
            shared = head * s.num_kv_heads // s.num_heads
            scores = (
                block.attention.gain[head] * q[:, head] @ k[:, shared].T / math.sqrt(dim) + mask
            )
            heads.append(scores.softmax(-1) @ v[:, shared])
        x = x + block.attention_scale * F.linear(torch.cat(heads, -1), block.attention.out)
        y = rms(x) / math.sqrt(i + 1 if s.ln_scale else 1)
        x = x + block.mlp_scale * F.linear(F.relu(F.linear(y, block.mlp.up)) ** 2, block.mlp.down)
        outputs.append(x)
    if model.backout is not None:
        x = x - model.backout * outputs[half if s.backout_layer < 0 else s.backout_layer]
    states = rms(x[s.memory_tokens :])
    scores = states @ (model.embedding if s.tie_embeddings else model.head).T
    return s.logit_softcap * torch.tanh(scores / s.logit_softcap)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(num_layers=1, backout_enabled=False),
        dict(num_layers=5),
        dict(num_layers=11, train_seq_len=12, train_batch_tokens=12),
        dict(
            memory_tokens=0,
            smear_enabled=False,
            bigram_vocab_size=0,
            backout_enabled=False,
            mtp_num_heads=0,
        ),
        dict(memory_tokens=0),
        dict(ln_scale=False),
        dict(rope_dims=0),
        dict(tie_embeddings=False),
        dict(backout_layer=0),
        dict(backout_layer=3),
        dict(num_kv_heads=1),
        dict(num_kv_heads=4, logit_softcap=2.0),
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_equal_a_reference(changes):
    settings, model, tokens = tiny_settings(**changes), tiny_model(**changes), batch()[0][1, :8]
    expected = reference_logits(model, settings, tokens)
    torch.testing.assert_close(model.logits(tokens[None])[0], expected, rtol=1e-4, atol=2e-4)


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
    model, tokens = tiny_model(), random_tokens(3, 20)
    other = tokens.clone()
    other[1] = random_tokens(1, 20, seed=9)
    changed = (model.logits(tokens) != model.logits(other)).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


@torch.no_grad()
def test_probabilities_sum_to_one():
    model, (tokens, targets) = tiny_model(), evaluated()
    every = torch.stack(
        [model.token_losses(tokens, torch.full_like(targets, i)) for i in range(64)]
    )
    torch.testing.assert_close(
        (-every.double()).exp().sum(0), torch.ones(3, 20).double(), atol=1e-5, rtol=0
    )


# ---- Attention


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    "length", [1, 7, 128, 129, 300, 1100]
)  # in one block, two, three and eight
def test_blocked_attention_equals_sdpa_and_the_definition(
    dtype, tolerance, heads, kv_heads, length
):
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, length, n, 8, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    shared = heads // kv_heads
    keys, values = (x.double().repeat_interleave(shared, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), keys) / math.sqrt(8)
    scores = scores.masked_fill(
        torch.arange(length)[None, :] > torch.arange(length)[:, None], -math.inf
    )
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values)
    for backend in ("sdpa", "blocked"):
        out = ATTENTION[backend](q, k, v)
        assert out.dtype == dtype and out.shape == q.shape
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("length", [9, 300])
def test_gradients_of_blocked_attention_equal_those_of_sdpa(kv_heads, length):
    gradients = []
    for backend in ("sdpa", "blocked"):
        torch.manual_seed(0)
        qkv = [torch.randn(2, length, n, 8, requires_grad=True) for n in (4, kv_heads, kv_heads)]
        (ATTENTION[backend](*qkv) * torch.randn(2, length, 4, 8)).sum().backward()
        gradients.append([x.grad for x in qkv])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_blocked_attention_is_causal_to_the_bit(dtype, kv_heads):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 300, n, 8, dtype=dtype) for n in (4, kv_heads, kv_heads))
    before = ATTENTION["blocked"](q, k, v)
    for place in (1, 127, 128, 200, 256, 299):
        later_q, later_k, later_v = (x.clone() for x in (q, k, v))
        for x in (later_q, later_k, later_v):
            x[:, place:] = 50 * torch.randn(x[:, place:].shape).to(dtype)
        after = ATTENTION["blocked"](later_q, later_k, later_v)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
@torch.no_grad()
def test_bfloat16_activations_give_about_the_float32_loss(backend):
    loss = tiny_model()(*batch())[1]
    half = tiny_model(Runtime(dtype=torch.bfloat16, attention=backend))
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert half.logits(evaluated()[0]).dtype == torch.float32
    torch.testing.assert_close(half(*batch())[1], loss, rtol=0.02, atol=0)


# ---- Rotary positions


def test_rotary_leaves_the_other_dimensions_alone():
    x = torch.randn(1, 10, 2, 8)
    out = Rotary(4, 10000.0, 16, 16)(x)
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert torch.equal(out[:, 0], x[:, 0]) and (out[:, 1:, :, :4] != x[:, 1:, :, :4]).all()
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_products_of_rotated_vectors_depend_on_their_distance_only():
    rotary, q, k = Rotary(6, 100.0, 16, 16), torch.randn(8), torch.randn(8)
    rows = [rotary(x.expand(1, 16, 1, 8))[0, :, 0] for x in (q, k)]
    products = rows[0] @ rows[1].T
    for distance in range(-15, 16):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)
    assert products[0].std() > 0.01


def test_rotary_beyond_the_training_length_rescales_its_base():
    """The slowest pair turns as far over the whole longer context as it did over the training length."""
    x = torch.randn(8).expand(1, 64, 1, 8)
    rotary, short = Rotary(8, 10000.0, 16, 64), Rotary(8, 10000.0, 16, 16)
    assert torch.equal(rotary(x[:, :16]), short(x[:, :16]))
    longer, known = rotary(x)[0, :, 0], short(x[:, :16])[0, :, 0]
    torch.testing.assert_close(longer[::4, [3, 7]], known[:, [3, 7]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(longer[:16, [0, 4]], known[:, [0, 4]], rtol=1e-5, atol=1e-5)


# ---- Head and initial weights


@pytest.mark.parametrize("softcap", [2.0, 30.0])
@torch.no_grad()
def test_logits_stay_within_the_softcap(softcap):
    model = tiny_model(logit_softcap=softcap)
    model.embedding.mul_(100)
    logits = model.logits(evaluated()[0])
    assert softcap * 0.99 < logits.abs().max() <= softcap


@pytest.mark.parametrize("layers", [2, 5])
def test_initial_matrices_are_orthogonal_and_output_projections_scaled(layers):
    model = tiny_model(stirred=False, num_layers=layers)
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim == 2
        and not name.endswith("mix")
        and name not in ("embedding", "memory", "skip_scales", "bigram.table")
    }
    assert len(matrices) == 6 * layers + 1
    for name, matrix in matrices.items():
        scaled = name.endswith((".out", ".down"))
        expected = torch.full((min(matrix.shape),), (2 * layers) ** -0.5 if scaled else 1.0)
        torch.testing.assert_close(
            torch.linalg.svdvals(matrix.detach()), expected, rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def test_initial_embedding_is_small_where_it_is_tied():
    tied, untied = tiny_model(stirred=False), tiny_model(stirred=False, tie_embeddings=False)
    assert abs(float(tied.embedding.std()) / 0.005 - 1) < 0.1
    assert abs(float(untied.embedding.std()) - 1) < 0.1 and not untied.head.any()
    assert (
        abs(float(tiny_model(stirred=False, tied_embed_init_std=0.02).embedding.std()) / 0.02 - 1)
        < 0.1
    )


@torch.no_grad()
def test_initial_loss_is_about_that_of_a_uniform_guess():
    loss = tiny_model(stirred=False).token_losses(*evaluated()).mean()
    assert abs(float(loss) - math.log(64)) < 0.1


@pytest.mark.cuda
@torch.no_grad()
def test_backends_agree_on_a_gpu():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 33, n, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
    torch.testing.assert_close(
        ATTENTION["sdpa"](q, k, v), ATTENTION["blocked"](q, k, v), rtol=2e-2, atol=2e-2
    )


# ---- Operations


@pytest.mark.parametrize(
    "changes",
    [
        dict(train_seq_len=64, memory_tokens=8, rope_dims=0),
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
    s, rows = Settings(**changes), 3
    with torch.device("meta"):
        model, tokens = (
            GPT(s, Runtime(attention="blocked")),
            torch.zeros(rows, s.train_seq_len, dtype=torch.long),
        )
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens)[0].backward()
    half = 6 * s.num_layers * s.train_seq_len * s.model_dim
    assert counter.get_total_flops() / (rows * s.train_seq_len) == flops_per_token(model, s) + half


def test_operations_of_the_record_preset():
    with torch.device("meta"):
        model = GPT(Settings(), Runtime())
    assert flops_per_token(model, Settings()) == pytest.approx(
        230e6, rel=0.01
    )  # 161 in matrices, 69 in attention
