"""The table of roles, of which every column has its effect; Muon; the step of both optimizers."""

from __future__ import annotations

import collections
import dataclasses
import math

import pytest
import torch
from torch import Tensor

import train_gpt
from conftest import random_tokens, tiny_model, tiny_settings
from train_gpt import (
    ARTIFACT_HEADER,
    GPT,
    INT5,
    INT6,
    ROLES,
    ByteTokenizer,
    Fit,
    Muon,
    Optimizer,
    ParameterGroup,
    Runtime,
    Settings,
    coded_parameters,
    newton_schulz,
    pack,
    pack_rows,
    read_artifact,
    spellings_of,
    stored_settings,
    texts_of_pieces,
)

# ---- The table of roles

# A rate and a decay for each setting that a role can name, no two alike.
RATES = dict(matrix_lr=0.01, tied_embed_lr=0.02, embed_lr=0.03, head_lr=0.04, scalar_lr=0.05)
DECAYS = dict(muon_wd=0.5, adam_wd=0.25, embed_wd=0.125)
MATRIX_ROLES = [role for role in ROLES if role not in ("vector", "mtp_head")]


def settings_with(role: str, **changes) -> Settings:
    """Tiny settings of a model that has parameters of this role."""
    tied = role not in ("embedding", "head")
    return tiny_settings(tie_embeddings=tied, grad_clip_norm=0.0, **changes)


def parameters_of(model: GPT, role: str) -> dict[str, Tensor]:
    """A copy of the parameters of a role by name."""
    found = {}
    for name, its_role in model.roles().items():
        if its_role == role:
            found[name] = model.get_parameter(name).detach().clone()
    assert found
    return found


def changes_in_a_step(role: str, s: Settings, gradient: bool = True) -> dict[str, Tensor]:
    """What one step of the optimizers adds to the parameters of a role."""
    model = tiny_model(tie_embeddings=s.tie_embeddings)
    optimizer = Optimizer(model, s, Runtime())
    if gradient:
        tokens = random_tokens(2, 25)
        model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    before = parameters_of(model, role)
    optimizer.step(scale=1.0, momentum=0.9)
    after = parameters_of(model, role)
    return {name: after[name] - before[name] for name in before}


@pytest.fixture
def change_role(monkeypatch):
    """change_role(role, column=value): another value in the table, until the test ends."""

    def change(role: str, **columns) -> None:
        monkeypatch.setitem(ROLES, role, ROLES[role]._replace(**columns))

    return change


@pytest.mark.parametrize("role", MATRIX_ROLES)
def test_the_column_optimizer_decides_who_trains_a_role(role, change_role):
    s = settings_with(role, **RATES, muon_wd=0.0, adam_wd=0.0)
    other = "adamw" if ROLES[role].optimizer == "muon" else "muon"
    rate = RATES[ROLES[role].learning_rate]
    change_role(role, optimizer=other)
    for change in changes_in_a_step(role, s).values():
        if other == "adamw":
            # Its first step moves each weight that has a gradient by the rate.
            moved = change[change != 0].abs()
            torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=0.01, atol=0)
        else:
            # A matrix that is about orthogonal, times the rate.
            tall = max(1.0, change.size(0) / change.size(1)) ** 0.5
            largest = torch.linalg.matrix_norm(change, 2) / (rate * tall)
            assert 0.6 < largest < 1.3


@pytest.mark.parametrize("role", ROLES)
def test_a_role_that_no_optimizer_trains_stays_as_it_is(role, change_role):
    s = settings_with(role)
    assert all(change.any() for change in changes_in_a_step(role, s).values())
    change_role(role, optimizer="nobody")
    assert not any(change.any() for change in changes_in_a_step(role, s).values())


@pytest.mark.parametrize("role", ROLES)
def test_the_column_learning_rate_names_the_setting_that_scales_an_update(role, change_role):
    s = settings_with(role, **RATES, muon_wd=0.0, adam_wd=0.0)
    before = changes_in_a_step(role, s)
    own = ROLES[role].learning_rate
    other = next(name for name in RATES if name != own)
    change_role(role, learning_rate=other)
    after = changes_in_a_step(role, s)
    for name, change in before.items():
        expected = change * (RATES[other] / RATES[own])
        assert change.any()
        torch.testing.assert_close(after[name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("decay", [*DECAYS, None])
def test_the_column_weight_decay_names_the_setting_that_shrinks_a_weight(role, decay, change_role):
    """Without gradients the decay alone is left: rate * decay of each weight."""
    s = settings_with(role, **RATES, **DECAYS)
    model = tiny_model(tie_embeddings=s.tie_embeddings)
    change_role(role, weight_decay=decay)
    factor = RATES[ROLES[role].learning_rate] * DECAYS.get(decay, 0.0)
    changes = changes_in_a_step(role, s, gradient=False)
    for name, weight in parameters_of(model, role).items():
        torch.testing.assert_close(changes[name], -factor * weight, rtol=1e-3, atol=1e-7)


def test_weight_decay_is_decoupled_and_spares_the_memory_tokens():
    """As the table says it today."""
    s = settings_with("memory", **RATES, **DECAYS)
    factors = {role: 1 - RATES[row.learning_rate] * 0.25 for role, row in ROLES.items()}
    factors["memory"] = 1.0
    for role in ("attention", "mlp", "bigram_projection"):
        factors[role] = 1 - RATES["matrix_lr"] * 0.5
    for role in ("tied_embedding", "embedding", "bigram_table"):
        factors[role] = 1 - RATES[ROLES[role].learning_rate] * 0.125
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Optimizer(model, s, Runtime()).step(scale=1.0, momentum=0.9)
    for name, role in model.roles().items():
        found = model.get_parameter(name).detach()
        torch.testing.assert_close(found, before[name] * factors[role], msg=name)
    assert torch.equal(model.memory.vectors, before["memory.vectors"])


def artifact_of(s: Settings) -> bytes:
    """The artifact of a tiny model with these settings."""
    model = tiny_model(tie_embeddings=s.tie_embeddings)
    manifest = dict(tokenizer="", settings=stored_settings(s, "model", "evaluation"))
    if s.quant == "rows":
        return pack_rows(model, s, manifest)
    fit = Fit(coded_parameters(model, "fit"))
    fit.finish()
    grid = fit.grid(fit.log2_multiplier(20_000))
    return pack(model, fit.codes(grid), grid, manifest, s)


def stored_as(kind: str | None, weight: Tensor) -> Tensor | None:
    """What an artifact of QUANT=rows and INT5_MLP=1 gives back of a weight."""
    if kind is None:
        return None
    if kind == "float16":
        return weight.half().float()
    largest_code = INT5 if kind == "int6_or_int5" else INT6
    step = (weight.abs().amax(1, keepdim=True) / largest_code + 2**-25).half().float()
    return (weight / step).round() * step


# How parameters of a role can be stored: codes are for matrices.
MATRIX_KINDS = ["int6", "int6_or_int5", "float16", None]
STORED_ROWS = [(role, kind) for role in MATRIX_ROLES for kind in MATRIX_KINDS]
STORED_ROWS += [("vector", "float16"), ("vector", None)]


@pytest.mark.parametrize("role, kind", STORED_ROWS)
def test_the_column_stored_rows_decides_what_an_artifact_holds(role, kind, change_role):
    s = settings_with(role, quant="rows", int5_mlp="1", codec="zstd", zstd_level=1)
    change_role(role, stored_rows=kind)
    _, weights = read_artifact(artifact_of(s), "an artifact")
    model = tiny_model(tie_embeddings=s.tie_embeddings)
    for name, weight in parameters_of(model, role).items():
        expected = stored_as(kind, weight)
        if expected is None:
            assert name not in weights
        else:
            torch.testing.assert_close(weights[name], expected, rtol=1e-6, atol=1e-9)


STORED_FIT = [(role, kind) for role in MATRIX_ROLES for kind in ("fitted", "float16", None)]
STORED_FIT += [("vector", "float16"), ("vector", None)]


@pytest.mark.parametrize("role, kind", STORED_FIT)
def test_the_column_stored_fit_decides_what_an_artifact_holds(role, kind, change_role):
    s = settings_with(role, quant="fit", codec="zstd", zstd_level=1)
    change_role(role, stored_fit=kind)
    _, weights = read_artifact(artifact_of(s), "an artifact")
    model = tiny_model(tie_embeddings=s.tie_embeddings)
    for name, weight in parameters_of(model, role).items():
        in_float16 = weight.half().float()
        if kind is None:
            assert name not in weights
        elif kind == "float16":
            assert torch.equal(weights[name], in_float16)
        else:
            # Codes of coarser steps than float16 has, but near.
            error = (weights[name] - weight).norm() / weight.norm()
            assert 1e-3 < error < 0.2


@pytest.mark.parametrize("quant", ["rows", "fit"])
def test_an_artifact_would_hold_mtp_heads_if_the_table_said_so(quant, change_role):
    """A reader would not know them: how many there are is a setting of training."""
    s = tiny_settings(quant=quant, codec="zstd", zstd_level=1)
    sizes = []
    for kind in (None, "float16"):
        change_role("mtp_head", **{f"stored_{quant}": kind})
        _, _, _, size, _, _ = ARTIFACT_HEADER.unpack_from(artifact_of(s))
        sizes.append(size)
    heads = tiny_model().mtp.heads
    assert sizes[1] - sizes[0] == 2 * heads.numel()


@pytest.mark.parametrize("quant", ["rows", "fit"])
def test_the_columns_of_storage_are_each_for_its_own_quantizer(quant, change_role):
    s = tiny_settings(quant=quant, codec="zstd", zstd_level=1)
    expected = artifact_of(s)
    other = "stored_fit" if quant == "rows" else "stored_rows"
    for role in MATRIX_ROLES:
        change_role(role, **{other: "float16"})
    assert artifact_of(s) == expected


def test_every_column_of_the_table_is_tested_here():
    """A new column needs a test that changes it and sees the effect."""
    tested = ("optimizer", "learning_rate", "weight_decay", "stored_rows", "stored_fit")
    assert train_gpt.Role._fields == tested


def test_every_role_names_settings_that_there_are():
    names = {field.name for field in dataclasses.fields(Settings)}
    for role in ROLES.values():
        assert role.learning_rate in names
        assert role.weight_decay is None or role.weight_decay in names


# ---- Every parameter has its place


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(tie_embeddings=False),
        dict(
            mtp_num_heads=0,
            memory_tokens=0,
            smear_enabled=False,
            bigram_vocab_size=0,
            backout_enabled=False,
        ),
    ],
    ids=["on", "untied", "off"],
)
def test_every_parameter_is_in_exactly_one_group(changes):
    model = tiny_model(**changes)
    optimizer = Optimizer(model, tiny_settings(**changes), Runtime())
    by_muon = []
    for batch in optimizer.muon.batches:
        by_muon += batch.parameters
    by_adamw = []
    for group in optimizer.adamw.param_groups:
        by_adamw += group["params"]
    counts = collections.Counter(map(id, by_muon + by_adamw))
    assert counts == {id(p): 1 for p in model.parameters()}
    matrices = set()
    for name, parameter in model.named_parameters():
        is_vector = name.endswith(("mix", "gate.weight"))
        in_block = name.startswith("blocks.") and parameter.ndim == 2
        if name == "bigram.projection" or (in_block and not is_vector):
            matrices.add(id(parameter))
    assert {id(p) for p in by_muon} == matrices


@pytest.mark.parametrize("place", ["", "smear", "blocks.1.mlp"])
def test_a_parameter_without_a_role_is_an_error(place):
    model = tiny_model()
    model.get_submodule(place).forgotten = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises((AttributeError, KeyError)):
        Optimizer(model, tiny_settings(), Runtime())


def test_every_parameter_moves_in_one_step():
    model = tiny_model(tie_embeddings=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, tiny_settings(tie_embeddings=False), Runtime())
    tokens = random_tokens(2, 25)
    model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    optimizer.step(scale=1.0, momentum=0.9)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert not parameter.grad.any(), name


# ---- Muon


@pytest.mark.parametrize("rows, columns", [(32, 32), (96, 32), (32, 96), (64, 48), (1, 8)])
def test_newton_schulz_makes_matrices_about_orthogonal(rows, columns):
    torch.manual_seed(rows + columns)
    u, _, v = torch.linalg.svd(torch.randn(5, rows, columns), full_matrices=False)
    sizes = torch.tensor([1e-3, 1.0, 50.0, 7.0, 0.1])
    values = torch.logspace(0, -1.5, min(rows, columns)) * sizes[:, None]
    out = newton_schulz(u * values[:, None, :] @ v, 5, torch.float32)
    found = torch.linalg.svdvals(out)
    assert out.shape == (5, rows, columns) and found.min() > 0.6 and found.max() < 1.3
    # Diagonal, if the singular vectors stayed.
    turned_back = u.transpose(1, 2) @ out @ v.transpose(1, 2)
    diagonal = turned_back.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(turned_back, torch.diag_embed(diagonal), atol=2e-3, rtol=0)
    assert diagonal.min() > 0.6


def test_newton_schulz_in_bfloat16_is_about_orthogonal_too():
    torch.manual_seed(0)
    found = torch.linalg.svdvals(newton_schulz(torch.randn(4, 32, 96), 5, torch.bfloat16).float())
    assert found.min() > 0.6 and found.max() < 1.3


def test_newton_schulz_of_a_batch_is_that_of_each_matrix():
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 16) * torch.tensor([1.0, 1e-4, 1e4])[:, None, None]
    one_by_one = torch.cat([newton_schulz(matrix[None], 5, torch.float32) for matrix in matrices])
    torch.testing.assert_close(newton_schulz(matrices, 5, torch.float32), one_by_one)
    assert torch.equal(newton_schulz(torch.zeros(1, 4, 4), 5, torch.float32), torch.zeros(1, 4, 4))


def plain_muon(
    weight: Tensor,
    gradients: list[Tensor],
    rates: list[float],
    momenta: list[float],
    decay: float,
    row_normalize: bool,
) -> Tensor:
    """Muon of one matrix as published: momentum, Nesterov, five iterations, scaled step."""
    momentum_buffer = torch.zeros_like(weight)
    tall = math.sqrt(max(1, weight.size(0) / weight.size(1)))
    for gradient, rate, momentum in zip(gradients, rates, momenta, strict=True):
        momentum_buffer = momentum * momentum_buffer + (1 - momentum) * gradient
        x = (1 - momentum) * gradient + momentum * momentum_buffer
        if row_normalize:
            x = torch.stack([row / row.norm() for row in x])
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        weight = weight * (1 - rate * decay) - rate * tall * x
    return weight


@pytest.mark.parametrize("row_normalize", [False, True])
def test_muon_equals_a_plain_implementation_for_each_matrix(row_normalize):
    """Also where groups of other rates and decays share a shape."""
    torch.manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 8), (8, 24), (8, 8)]
    # The rate and the decay of each matrix.
    kinds = [(1.0, 0.3), (1.0, 0.3), (1.0, 0.3), (0.5, 0.3), (0.5, 0.1)]
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    gradients = [[torch.randn(shape) for _ in range(4)] for shape in shapes]
    scales = [0.1, 0.2, 0.05, 0.01]
    momenta = [0.85, 0.9, 0.95, 0.95]

    expected = []
    members = collections.defaultdict(list)
    for weight, its_gradients, kind in zip(weights, gradients, kinds, strict=True):
        rates = [scale * kind[0] for scale in scales]
        expected.append(
            plain_muon(weight.detach(), its_gradients, rates, momenta, kind[1], row_normalize)
        )
        members[kind].append(weight)
    groups = []
    for (rate, decay), parameters in members.items():
        groups.append(ParameterGroup("attention", parameters, rate, decay))

    muon = Muon(groups, tiny_settings(muon_row_normalize=row_normalize), Runtime())
    for step in range(4):
        for weight, its_gradients in zip(weights, gradients, strict=True):
            weight.grad = its_gradients[step].clone()
        muon.step(scales[step], momenta[step])
    found = [weight.detach() for weight in weights]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---- What pieces that are spelled alike share


def pieces_of(size: int) -> list[str]:
    """A vocabulary in which many have much in common, some have not, and one repeats another."""
    pieces = ["<unk>", "<s>", "▁", "▁the", "the", "▁The", "THE", "▁then", "9", "▁é", "é"]
    for number in range(size - len(pieces)):
        pieces.append(chr(0x4E00 + number))
    return pieces


def test_the_spellings_of_a_piece():
    assert spellings_of("▁The") == [
        ("space", True),
        ("kind", True, False, False, True),
        ("word", "the"),
        ("beginning", "t"),
        ("end", "e"),
        ("beginning", "th"),
        ("end", "he"),
        ("beginning", "the"),
        ("end", "the"),
    ]
    assert spellings_of("▁") == [
        ("space", True),
        ("kind", False, False, False, False),
        ("word", ""),
    ]
    assert spellings_of("") == []


@pytest.mark.parametrize(
    "one, other, kinds",
    [
        ("▁walking", "▁talking", ["end", "end", "end", "end", "kind", "space"]),
        ("▁at", "at", ["beginning", "beginning", "end", "end", "kind", "word"]),
        ("at", "AT", ["beginning", "beginning", "end", "end", "space", "word"]),
        ("9", "▁1", ["kind"]),
        ("x", "9", ["space"]),
        ("x", "▁Y", []),
    ],
)
def test_what_pieces_share(one, other, kinds):
    shared = set(spellings_of(one)) & set(spellings_of(other))
    assert sorted(spelling[0] for spelling in shared) == kinds


def test_shared_spelling_is_adamw_of_a_sum():
    """The embedding moves as one that is stored as a sum of two, each trained by AdamW."""
    s = tiny_settings(spelling_lr=0.01, embed_wd=0.0, grad_clip_norm=0.0)
    model = tiny_model()
    pieces = pieces_of(s.vocab_size)
    optimizer = Optimizer(model, s, Runtime(), pieces)

    kinds = sorted({str(spelling) for piece in pieces for spelling in spellings_of(piece)})
    has = torch.zeros(len(pieces), len(kinds))
    for token, piece in enumerate(pieces):
        for spelling in spellings_of(piece):
            has[token, kinds.index(str(spelling))] = 1.0
    has = has[:, has.sum(0) > 1]
    own = torch.nn.Parameter(model.embedding.weight.detach().clone())
    shared = torch.nn.Parameter(torch.zeros(has.size(1), own.size(1)))
    groups = [dict(params=[own], lr=s.tied_embed_lr), dict(params=[shared], lr=s.spelling_lr)]
    plain = torch.optim.AdamW(groups, betas=(s.beta1, s.beta2), eps=s.adam_eps, weight_decay=0.0)

    torch.manual_seed(1)
    for _ in range(4):
        gradient = torch.randn_like(own)
        (own + has @ shared).backward(gradient)
        plain.step()
        plain.zero_grad()
        model.embedding.weight.grad.copy_(gradient)
        optimizer.step(scale=1.0, momentum=0.9)
    torch.testing.assert_close(model.embedding.weight, own + has @ shared)
    assert (shared.abs().amax(1) > 0.01).all()


def test_an_output_matrix_of_its_own_shares_spelling_too():
    s = tiny_settings(spelling_lr=0.01, tie_embeddings=False, head_lr=0.0, adam_wd=0.0)
    model = tiny_model(tie_embeddings=False)
    before = model.head.weight.detach().clone()
    optimizer = Optimizer(model, s, Runtime(), ["▁a", "9"] * (s.vocab_size // 2))
    # Only the first piece has a gradient, and half of all have its spellings.
    model.head.weight.grad[0] = 1.0
    optimizer.step(scale=1.0, momentum=0.9)
    moved = (model.head.weight != before).all(1)
    assert moved.tolist() == [True, False] * (s.vocab_size // 2)


def test_pieces_that_share_nothing_move_alone():
    s = tiny_settings(spelling_lr=0.01)
    optimizer = Optimizer(tiny_model(), s, Runtime(), [""] * s.vocab_size)
    assert len(optimizer.spellings[0].change) == 0
    optimizer.step(scale=1.0, momentum=0.9)


def test_the_texts_of_a_byte_tokenizer_are_its_characters():
    texts = texts_of_pieces(ByteTokenizer())
    assert texts[:4] == [""] * 4
    assert texts[4 + ord("a")] == "a" and texts[4 + ord(" ")] == " "
    assert texts[4 + 128 :] == [""] * 128


def test_shared_spelling_needs_the_pieces():
    with pytest.raises(ValueError, match="SPELLING_LR needs the pieces"):
        Optimizer(tiny_model(), tiny_settings(spelling_lr=0.01), Runtime())


# ---- A step of both


def test_learning_rates_follow_the_scale_and_momentum_goes_to_muon(monkeypatch):
    optimizer = Optimizer(tiny_model(), tiny_settings(), Runtime())
    calls = []

    def keeping(scale: float, momentum: float) -> None:
        calls.append((scale, momentum))

    monkeypatch.setattr(optimizer.muon, "step", keeping)
    optimizer.step(scale=0.5, momentum=0.87)
    assert calls == [(0.5, 0.87)]
    rates = {group["role"]: group["lr"] for group in optimizer.adamw.param_groups}
    assert rates == dict(
        bigram_table=0.0175, tied_embedding=0.0175, memory=0.0175, vector=0.0125, mtp_head=0.004
    )


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e3])
def test_clip_shortens_the_whole_gradient_to_the_limit_and_no_further(monkeypatch, limit):
    model = tiny_model()
    optimizer = Optimizer(model, tiny_settings(grad_clip_norm=limit), Runtime())
    tokens = random_tokens(2, 25)
    (model(tokens[:, :-1], tokens[:, 1:])[0] / 40).backward()
    before = [p.grad.clone() for p in model.parameters()]
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in before]))
    assert 0.01 < norm < 100
    clipped = []

    def keeping(scale: float, momentum: float) -> None:
        clipped.extend(p.grad.clone() for p in model.parameters())

    monkeypatch.setattr(optimizer.muon, "step", keeping)
    optimizer.step(scale=1.0, momentum=0.9)
    factor = limit / norm if limit == 1e-3 else 1.0
    expected = [gradient * factor for gradient in before]
    torch.testing.assert_close(clipped, expected, rtol=1e-3, atol=0)
