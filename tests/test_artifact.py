"""Quantization, packing under the cap, and damaged or forged artifacts: each ends in an error."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import struct
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import zstandard

import train_gpt
from conftest import stir, tiny_model, tiny_settings
from train_gpt import (
    ARTIFACT_HEADER,
    CODECS,
    GPT,
    INT5,
    INT6,
    INT13,
    Fit,
    Runtime,
    UserError,
    coded_parameters,
    decode_rans,
    dequantize,
    encode_rans,
    fake_quantize,
    pack_under_cap,
    quantize,
    read_artifact,
    round_with_feedback,
    row_grid,
    settings_from,
    storage_of,
    stored_parameters,
    write_atomically,
)

compress = zstandard.ZstdCompressor(level=3).compress

# ---- rows of codes


def hostile_matrices() -> dict[str, torch.Tensor]:
    """Matrices at the limits of what float16 steps can hold."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(40, 97, generator=generator)
    outlier = normal.clone()
    outlier[torch.arange(40), torch.randint(97, (40,), generator=generator)] *= 1000
    return {
        "normal": normal,
        "tiny": normal * 1e-5,
        "subnormal-steps": normal * 1e-6,
        "below-float16": normal * 1e-12,
        "huge": normal * 1e5,
        "zero": normal * 0,
        "outlier": outlier,
        "constant": torch.ones(5, 7) * 0.3,
        "negative": -normal.abs(),
        "mixed": normal * torch.logspace(-9, 5, 40)[:, None],
        "column": normal[:, :1],
    }


class OneMatrix:
    """What row_grid and Fit need to know of a model, of one MLP matrix."""

    def __init__(self, weight: torch.Tensor):
        self.weight = torch.nn.Parameter(weight)

    def roles(self) -> dict[str, str]:
        """The role of the matrix."""
        return {"matrix": "mlp"}

    def get_parameter(self, name: str) -> torch.nn.Parameter:
        """The matrix."""
        return self.weight


def row_steps(weight: torch.Tensor, largest_code: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The steps of rows and columns with QUANT=rows, of int5 or int6."""
    int5_mlp = "1" if largest_code == INT5 else "0"
    settings = tiny_settings(quant="rows", int5_mlp=int5_mlp)
    return row_grid(OneMatrix(weight), settings)["matrix"]


@pytest.mark.parametrize("limit", [INT5, INT6])
@pytest.mark.parametrize("name", hostile_matrices())
def test_no_weight_moves_by_more_than_half_a_step(name, limit):
    weight = hostile_matrices()[name]
    rows, columns = row_steps(weight, limit)
    assert rows.shape == weight.shape[:1]
    assert torch.isfinite(rows).all()
    assert torch.equal(rows, rows.half().float())
    assert torch.equal(columns, torch.ones(weight.size(1)))

    codes = quantize(weight, rows, columns)
    assert codes.shape == weight.shape
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() <= limit

    step = rows.double()[:, None]
    error = (codes.double() * step - weight.double()).abs()
    # Half of float16's smallest number.
    smallest = torch.tensor(2.0**-25, dtype=torch.float64)
    assert (error <= torch.maximum(step / 2, smallest) * (1 + 1e-6)).all()
    assert torch.equal(dequantize(codes, rows, columns), codes.float() * rows[:, None])


@pytest.mark.parametrize("limit", [INT5, INT6])
def test_the_largest_weight_of_a_row_has_the_largest_code(limit):
    weight = hostile_matrices()["normal"]
    rows, columns = row_steps(weight, limit)
    assert (quantize(weight, rows, columns).abs().amax(1) == limit).all()
    expected = weight.abs().amax(1) / limit
    assert ((rows - expected).abs() <= expected * 2.0**-10).all()


@pytest.mark.parametrize("limit", [INT5, INT6])
def test_quantizing_again_changes_nothing(limit):
    weight = hostile_matrices()["outlier"]
    steps = row_steps(weight, limit)
    codes = quantize(weight, *steps)
    again = dequantize(codes, *steps)
    assert torch.equal(row_steps(again, limit)[0], steps[0])
    assert torch.equal(quantize(again, *steps), codes)


def test_int5_is_for_the_mlp_alone():
    model = tiny_model()
    wide = row_grid(model, tiny_settings(quant="rows", int5_mlp="0"))
    narrow = row_grid(model, tiny_settings(quant="rows", int5_mlp="1"))
    for name, (rows, _) in wide.items():
        ratio = narrow[name][0] / rows
        expected = INT6 / INT5 if ".mlp." in name else 1.0
        assert ((ratio - expected).abs() < 2e-3).all()


def test_the_gradient_passes_straight_through():
    weight = hostile_matrices()["normal"].requires_grad_()
    steps = row_steps(weight.detach(), INT5)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    fake = fake_quantize(weight, *steps)
    (fake * direction).sum().backward()
    assert torch.equal(weight.grad, direction)
    assert torch.allclose(fake, dequantize(quantize(weight, *steps), *steps), rtol=0, atol=1e-6)
    assert not torch.allclose(fake, weight, atol=1e-3)


# ---- fitted steps


def cost_of(error: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> float:
    """What Fit says that an error costs: the sum over rows of rows[i] * E[i] @ columns @ E[i]."""
    return float((rows * ((error @ columns) * error).sum(1)).sum())


def fitted(
    weight: torch.Tensor, row_costs: torch.Tensor, column_costs: torch.Tensor, damping: float = 0.0
) -> Fit:
    """A finished fit of one matrix with these costs."""
    fit = Fit({"matrix": torch.nn.Parameter(weight)})
    fit.row_costs = [row_costs]
    fit.column_costs = [column_costs]
    fit.DAMPING = damping
    fit.finish()
    return fit


def finished_fit(model: GPT) -> Fit:
    """A fit without samples: equal steps."""
    fit = Fit(coded_parameters(model, "fit"))
    fit.finish()
    return fit


@pytest.fixture(scope="module")
def sensitive() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix of 96x160, the costs of its rows, and those of its columns, correlated."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(96, 160, generator=generator)
    mixed = torch.randn(160, 160, generator=generator) * torch.logspace(-1, 0.5, 160)
    return weight, torch.logspace(-2, 1, 96), mixed @ mixed.T / 160 + 0.05 * torch.eye(160)


def inverse_factor(column_costs: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the columns' costs."""
    inverse = torch.linalg.inv(column_costs.double())
    return torch.linalg.cholesky(inverse, upper=True).float()


def test_feedback_is_the_best_answer_to_the_errors_before(sensitive):
    """After each rounded column, the later targets are those of least cost, solved directly."""
    weight = sensitive[0][:, :5]
    column_costs = sensitive[2][:5, :5]
    rows = torch.full((96,), 0.5)
    # The last three have steps so fine that they are hardly rounded.
    columns = torch.tensor([1.0, 0.5, 1e-6, 1e-6, 1e-6])
    codes = round_with_feedback(weight, rows, columns, inverse_factor(column_costs))

    targets = weight.double().clone()
    error = torch.zeros(96, 5, dtype=torch.float64)
    for j in range(2):
        expected = quantize(targets[:, j : j + 1].float(), rows, columns[j : j + 1])[:, 0]
        assert torch.equal(codes[:, j], expected)
        read_back = expected.double() * rows.double() * columns[j].double()
        error[:, j] = weight[:, j].double() - read_back
        later = slice(j + 1, None)
        solved = torch.linalg.solve(
            column_costs[later, later].double(), column_costs[later, : j + 1].double()
        )
        targets[:, later] = weight[:, later].double() + (error[:, : j + 1] @ solved.T)


def test_blocks_of_columns_change_nothing(sensitive):
    """160 columns are three blocks of corrections; one block would give the same codes."""
    weight, _, column_costs = sensitive
    factor = inverse_factor(column_costs)
    rows = torch.full((96,), 0.3)
    columns = torch.ones(160)
    codes = round_with_feedback(weight, rows, columns, factor)
    target = weight.clone()
    for j in range(160):
        expected = quantize(target[:, j : j + 1], rows, columns[j : j + 1])[:, 0]
        # Ties may fall to the other side, after sums in another order.
        assert (codes[:, j] != expected).float().mean() < 0.03, j
        error = (target[:, j] - codes[:, j] * rows) / factor[j, j]
        target[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]


def test_each_refinement_lowers_the_cost_at_equal_entropy(sensitive):
    """Equal steps, then steps for rows, then steps for columns with feedback."""
    weight, row_costs, column_costs = sensitive
    fit = fitted(weight, row_costs, column_costs)
    steps = fit.steps["matrix"]
    equal_rows = torch.ones(96)
    equal_columns = torch.ones(160)

    def nearest(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = quantize(weight, rows, equal_columns)
        return codes, dequantize(codes, rows, equal_columns)

    def with_feedback(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = round_with_feedback(weight, rows, steps.column_steps, fit.factors["matrix"])
        return codes, dequantize(codes, rows, steps.column_steps)

    def cost_at_equal_bits(code: Callable, rows: torch.Tensor) -> float:
        """The cost once a multiplier of the rows' steps gives two bits a code."""
        low = -20.0
        high = 20.0
        for _ in range(25):
            middle = (low + high) / 2
            codes, read_back = code(rows * 2.0**middle)
            # About the entropy of codes whose scale is known.
            bits = float(torch.log2(1 + codes.abs()).mean())
            if bits > 2.0:
                low = middle
            else:
                high = middle
        return cost_of(read_back - weight, row_costs, column_costs)

    equal = cost_at_equal_bits(nearest, equal_rows)
    by_row = cost_at_equal_bits(nearest, steps.row_steps)
    feedback = cost_at_equal_bits(with_feedback, steps.row_steps)
    assert by_row < 0.7 * equal
    assert feedback < 0.6 * by_row


def test_steps_are_in_inverse_proportion_to_the_root_of_the_cost(sensitive):
    weight, row_costs, column_costs = sensitive
    steps = fitted(weight, row_costs, column_costs).steps["matrix"]
    # Steps are powers of the root of two.
    assert torch.equal(2 * steps.row_steps.log2(), (2 * steps.row_steps.log2()).round())
    spread = (steps.row_steps * row_costs.sqrt()).log2()
    assert spread.max() - spread.min() <= 0.5 + 1e-4
    left = []
    for j in range(160):
        left.append(1 / torch.linalg.inv(column_costs[j:, j:].double())[0, 0])
    spread = (steps.column_steps.double() * torch.stack(left).sqrt()).log2()
    assert spread.max() - spread.min() <= 0.5 + 1e-3


def test_without_samples_steps_are_equal_and_nothing_is_fed_back():
    model = tiny_model()
    fit = finished_fit(model)
    for steps in fit.steps.values():
        assert len(set(steps.row_steps.tolist())) == 1
        assert len(set(steps.column_steps.tolist())) == 1
    grid = fit.grid(fit.log2_multiplier(1000))
    for name, codes in fit.codes(grid).items():
        assert torch.equal(codes, quantize(model.get_parameter(name), *grid[name]))


@pytest.mark.parametrize("name", hostile_matrices())
def test_fitted_codes_stay_in_their_range_and_lose_nothing_at_the_finest_steps(name):
    weight = hostile_matrices()[name]
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(weight.size(1), weight.size(1), generator=generator)
    row_costs = torch.rand(len(weight), generator=generator)
    fit = fitted(weight, row_costs, mixed @ mixed.T, damping=0.05)
    for multiplier in (-100.0, fit.log2_multiplier(math.inf), fit.log2_multiplier(1000), 100.0):
        grid = fit.grid(multiplier)
        codes = fit.codes(grid)["matrix"]
        assert torch.isfinite(grid["matrix"][0]).all()
        assert torch.equal(codes, codes.round())
        assert codes.abs().max() <= INT13

    columns = fit.steps["matrix"].column_steps
    grid = fit.grid(-100.0)
    read_back = dequantize(fit.codes(grid)["matrix"], *grid["matrix"])
    reach = weight.abs().amax(1, keepdim=True) * 0.02 * (columns.max() / columns.min()) + 1e-5
    assert ((read_back - weight).abs() <= reach).all()


# ---- the entropy coder


def code_matrices(kind: str) -> list[np.ndarray]:
    """Matrices of codes, int16, of a kind that the coder must bear."""
    random = np.random.default_rng(7)
    shapes = [(64, 48), (1, 1), (3, 700), (200, 5)]
    if kind == "zeros":
        return [np.zeros(shape, np.int16) for shape in shapes]
    if kind == "extremes":
        return [random.choice([-INT13, INT13], shape).astype(np.int16) for shape in shapes]
    if kind == "every code":
        every = np.arange(-INT13, INT13 + 1, dtype=np.int16).reshape(1, -1)
        return [every, np.zeros((9, 9), np.int16)]
    if kind == "one outlier":
        matrix = np.zeros((100, 300), np.int16)
        matrix[50, 100] = -INT13
        return [matrix]
    if kind == "flat and wide":
        shapes.append((300, 1000))
        return [random.integers(-INT13, INT13 + 1, shape).astype(np.int16) for shape in shapes]
    matrices = []
    for rows, columns in shapes:
        scale = np.exp(random.normal(size=(rows, 1)) + random.normal(size=columns))
        codes = np.rint(random.normal(size=scale.shape) * scale)
        matrices.append(codes.clip(-INT13, INT13).astype(np.int16))
    return matrices


KINDS = ["normal", "zeros", "extremes", "every code", "one outlier", "flat and wide"]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_come_back(name, kind):
    matrices = code_matrices(kind)
    data = CODECS[name].encode(matrices, compress)
    found = CODECS[name].decode(memoryview(data), [matrix.shape for matrix in matrices])
    assert found.dtype == np.int16
    assert np.array_equal(found, np.concatenate([matrix.ravel() for matrix in matrices]))


def entropy_bytes(codes: np.ndarray) -> float:
    """Order-0 entropy."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def test_the_coder_needs_less_than_the_entropy_of_each_matrix():
    """Rows and columns of differing scales, as trained ones have them; all side data counts."""
    random = np.random.default_rng(1)
    matrices = []
    for rows, columns in [(512, 512), (256, 512), (1536, 512), (512, 1536)] * 2:
        of_rows = np.exp(0.4 * random.normal(size=(rows, 1)))
        of_columns = np.exp(0.4 * random.normal(size=columns))
        codes = np.rint(random.normal(size=(rows, columns)) * 4 * of_rows * of_columns)
        matrices.append(codes.clip(-INT13, INT13).astype(np.int16))
    size = len(encode_rans(matrices, compress))
    assert size < 0.99 * sum(map(entropy_bytes, matrices))


def test_the_coder_comes_within_three_thousandths_of_the_entropy_of_even_matrices():
    """Where no row or column tells more than the matrix: Gaussian codes of one scale."""
    random = np.random.default_rng(1)
    matrices = []
    for scale in (1.5, 6.0):
        matrices.append(np.rint(random.normal(size=(1024, 2048)) * scale).astype(np.int16))
    size = len(encode_rans(matrices, compress))
    assert size < 1.003 * sum(map(entropy_bytes, matrices))


def test_decoding_a_record_model_would_take_under_a_minute_of_a_core():
    """1 M codes here, 27 M there; in seconds of this process alone, on a core that others share."""
    random = np.random.default_rng(1)
    matrices = [random.normal(size=(1024, 1024), scale=4).round().astype(np.int16)]
    data = memoryview(encode_rans(matrices, compress))
    started = time.process_time()
    decode_rans(data, [(1024, 1024)])
    assert 27 * (time.process_time() - started) < 60


# ---- there and back

# More bytes than a tiny model can use: its steps are the finest, and one try packs it.
AMPLE = 1 << 20


def manifest_of(settings: train_gpt.Settings) -> dict:
    """What a run says of its model in the artifact."""
    kept = train_gpt.stored_settings(settings, "model", "evaluation")
    return dict(settings=kept, tokenizer="ab" * 32)


def pack_model(model: GPT, settings: train_gpt.Settings, budget: int = AMPLE) -> bytes:
    """The artifact of a model, without samples of what errors cost."""
    fit = finished_fit(model) if settings.quant == "fit" else None
    return pack_under_cap(model, settings, manifest_of(settings), budget, fit)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(quant="rows"),
        dict(quant="rows", int5_mlp="1"),
        dict(tie_embeddings=False),
        dict(quant="rows", tie_embeddings=False),
        dict(num_layers=5, bigram_vocab_size=0, memory_tokens=0),
        dict(num_layers=1, smear_enabled=False, backout_enabled=False, mtp_num_heads=0),
    ],
    ids=["fit", "int6", "int5", "untied", "rows-untied", "no-tables", "one-layer"],
)
def test_what_is_read_back_is_what_the_codes_say(changes, codec, monkeypatch):
    tried = {}
    pack = train_gpt.pack

    def remembering(model, codes, grid, manifest, settings):
        data = pack(model, codes, grid, manifest, settings)
        tried[data] = codes, grid
        return data

    monkeypatch.setattr(train_gpt, "pack", remembering)
    settings = tiny_settings(zstd_level=3, codec=codec, **changes)
    model = tiny_model(zstd_level=3, codec=codec, **changes)
    # One of these is packed under a cap that binds, which takes many tries.
    data = pack_model(model, settings, budget=AMPLE if changes else 4000)
    codes, grid = tried[data]
    assert (len(tried) > 1) == (not changes)

    manifest, weights = read_artifact(data, "a.ptz")
    stored = stored_parameters(model, settings.quant)
    assert list(weights) == list(stored)
    assert manifest["quant"] == settings.quant
    for name, weight in stored.items():
        expected = weight.detach().half().float()
        if name in grid:
            expected = dequantize(codes[name], *grid[name])
        assert torch.equal(weights[name], expected), name
        assert weights[name].shape == weight.shape, name
    for name in ("query", "key", "value", "out"):
        assert all(f"blocks.{i}.attention.{name}" in grid for i in range(settings.num_layers))
    for name in ("up", "down"):
        assert all(f"blocks.{i}.mlp.{name}" in grid for i in range(settings.num_layers))
    assert ("embedding.weight" in grid) == (settings.quant == "fit")
    assert model.load_state_dict(weights, strict=False).unexpected_keys == []


def test_the_manifest_says_all_that_a_reader_needs():
    settings = tiny_settings()
    manifest, _ = read_artifact(pack_model(tiny_model(), settings), "a.ptz")
    assert manifest["tokenizer"] == "ab" * 32
    found, _ = settings_from({"PRESET": "record", "ARTIFACT": "a.ptz"}, manifest["settings"])
    for field in train_gpt.fields_of("model", "evaluation"):
        assert getattr(found, field.name) == getattr(settings, field.name)


def test_mtp_heads_are_not_inside():
    settings = tiny_settings(mtp_num_heads=2)
    model = tiny_model(mtp_num_heads=2)
    data = pack_model(model, settings)
    assert "mtp.heads" in dict(model.named_parameters())
    assert "mtp.heads" not in read_artifact(data, "a")[1]
    with torch.no_grad():
        model.mtp.heads.fill_(12345.0)
    assert pack_model(model, settings) == data


def test_packing_is_the_same_each_time():
    settings = tiny_settings()
    assert pack_model(tiny_model(), settings) == pack_model(tiny_model(), settings)


@pytest.mark.parametrize("quant", ["fit", "rows"])
@pytest.mark.parametrize(
    "name, value",
    [
        ("blocks.1.mlp.up", 1e9),
        ("backout.amount", -1e5),
        ("skips.scales", 7e4),
        ("blocks.0.attention.key", math.nan),
        ("memory.vectors", math.inf),
        ("embedding.weight", math.nan),
    ],
)
def test_what_float16_cannot_hold_is_refused(name, value, quant):
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    with pytest.raises(UserError, match=name):
        pack_model(model, tiny_settings(quant=quant), 4000)


# ---- damage and forgery


@pytest.fixture(
    scope="module", params=[("fit", "rans"), ("rows", "zstd")], ids=["fit-rans", "rows-zstd"]
)
def artifact(request) -> bytes:
    """The artifact of a tiny model, at most 4000 bytes where steps are fitted."""
    quant, codec = request.param
    changes = dict(mtp_num_heads=0, quant=quant, codec=codec, zstd_level=3)
    return pack_model(tiny_model(**changes), tiny_settings(**changes), 4000)


def parts(data: bytes) -> tuple[int, bytes, bytes]:
    """Codec, unpacked first part, codes."""
    _, _, codec, _, packed_size, _ = ARTIFACT_HEADER.unpack_from(data)
    body = data[ARTIFACT_HEADER.size :]
    first = zstandard.ZstdDecompressor().decompress(body[:packed_size])
    return codec, first, body[packed_size:]


def split_first(first: bytes) -> tuple[bytes, bytes]:
    """The manifest's text and the float16 numbers of a first part."""
    end = 4 + struct.unpack_from("<I", first)[0]
    return first[4:end], first[end:]


def sign(
    frame: bytes, codes: bytes, size: int, codec: int = 0, packed_size: int | None = None
) -> bytes:
    """An artifact with a right checksum, whatever is in it."""
    digest = hashlib.sha256(frame + codes).digest()[:16]
    if packed_size is None:
        packed_size = len(frame)
    return ARTIFACT_HEADER.pack(b"GOLF", 2, codec, size, packed_size, digest) + frame + codes


def forge(artifact: bytes, change: Callable[[dict, bytes, bytes], tuple]) -> bytes:
    """The artifact with `change` made to its manifest, float16s and codes, and a right checksum."""
    codec, first, codes = parts(artifact)
    text, halves = split_first(first)
    manifest, halves, codes = change(json.loads(text), halves, codes)
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    first = struct.pack("<I", len(text)) + text + halves
    return sign(zstandard.ZstdCompressor().compress(first), codes, len(first), codec)


def read_whole(data: bytes) -> dict[str, torch.Tensor]:
    """What ARTIFACT=... does with a file before it scores: weights and settings."""
    manifest, weights = read_artifact(data, "a.ptz")
    settings_from({"PRESET": "record", "ARTIFACT": "a.ptz"}, manifest["settings"])
    return weights


def assert_refused(data: bytes, pattern: str = r"^a\.ptz: [^\n]*$", how: str = "") -> None:
    """Fail unless reading the file ends in a UserError that says so in one line."""
    try:
        read_whole(data)
    except UserError as error:
        assert "\n" not in str(error)
        assert re.search(pattern, str(error)), how
        return
    pytest.fail(f"was read: {how}")


def test_a_forged_artifact_that_changes_nothing_is_read(artifact):
    read_whole(artifact)
    read_whole(forge(artifact, lambda *content: content))


def damaged(data: bytes) -> Iterator[tuple[str, bytes]]:
    """What may happen to a file, and the file after it."""
    size = len(data)
    header = ARTIFACT_HEADER.size
    for end in [0, 1, 3, 4, header - 1, header, header + 1, size // 2, size - 1]:
        yield f"cut at {end}", data[:end]
    for place in [*range(header + 8), *range(header + 8, size, size // 40), size - 1]:
        for bit in (0, 7):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            yield f"bit {bit} of byte {place}", bytes(flipped)
    yield "one byte more", data + b"\0"
    yield "twice", data + data
    yield "text", b"not an artifact " * 99
    yield "another magic", b"FLOG" + data[4:]
    yield "header in front", data[:header] + data


def test_every_damage_is_found(artifact):
    for how, data in damaged(artifact):
        assert_refused(data, how=how)


@pytest.mark.parametrize("version, codec", [(0, 1), (1, 1), (3, 1), (2, 2), (2, 255)])
def test_another_format_or_codec_is_named(artifact, version, codec):
    data = artifact[:4] + bytes([version, codec]) + artifact[6:]
    assert_refused(data, f"format {version} with codec {codec}")


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 1 << 31, (1 << 64) - 1])
def test_a_forged_size_is_found(artifact, size):
    codec, first, codes = parts(artifact)
    frame = zstandard.compress(first)
    assert_refused(sign(frame, codes, size, codec))
    assert_refused(sign(frame, codes, len(first), codec, packed_size=size))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0" * 50,
        b"(\xb5/\xfd",
        zstandard.compress(b""),
        zstandard.compress(b"abc"),
        zstandard.compress(b"\xff" * 9),
        zstandard.compress(b"\0\0\0\0"),
    ],
)
def test_a_forged_body_is_found(body):
    for size in (0, 3, 4, 9, 50):
        assert_refused(sign(body, b"", size))


def test_a_bomb_is_not_unpacked(artifact):
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    for size in (1 << 40, 64 << 20):
        assert_refused(sign(bomb, b"", size))
    _, first, _ = parts(artifact)
    frame = zstandard.compress(first)
    for codes in (bomb, struct.pack("<I", len(bomb)) + bomb):
        for codec in range(len(CODECS)):
            assert_refused(sign(frame, codes, len(first), codec))


def test_a_model_that_is_too_large_for_its_bytes_is_not_built(artifact, monkeypatch):
    """A few kilobytes that claim four billion weights, with float16s to match."""

    def claim_more(manifest: dict, halves: bytes, codes: bytes) -> tuple:
        claimed = dict(model_dim=16384, num_layers=8, bigram_vocab_size=0, memory_tokens=0)
        manifest["settings"].update(claimed)
        with torch.device("meta"):
            model = GPT(tiny_settings(**manifest["settings"]), Runtime())
        quant = manifest["quant"]
        storage = storage_of(model, quant)
        counts = []
        for name, parameter in stored_parameters(model, quant).items():
            counts.append(storage[name].count_halves(parameter.shape))
        coded = coded_parameters(model, quant)
        assert sum(parameter.numel() for parameter in coded.values()) > 1 << 30
        return manifest, bytes(2 * sum(counts)), codes

    forged = forge(artifact, claim_more)
    decode_nothing = train_gpt.Codec(None, lambda *_: pytest.fail("codes were decoded"))
    monkeypatch.setattr(train_gpt, "CODECS", dict.fromkeys(CODECS, decode_nothing))
    monkeypatch.setattr(train_gpt, "join_planes", lambda *_: pytest.fail("memory was taken"))
    assert_refused(forged, "do not fit the model")


def forged_codes(data: bytes, place: str, levels: int, random: np.random.Generator) -> bytes:
    """A stream of rANS with random damage to one of its parts; `levels` is the size of these."""
    side_end = 4 + struct.unpack_from("<I", data)[0]
    side = bytearray(zstandard.decompress(data[4:side_end]))
    rest = bytearray(data[side_end:])
    states_end = 8 * train_gpt.LANES
    claimed = None
    if place == "start":
        claimed = int(random.integers(1 << 32))
    elif place == "side":
        side = side[: int(random.integers(len(side)))]
    elif place == "levels":
        side[int(random.integers(levels))] ^= 1 << int(random.integers(8))
    elif place == "frequencies":
        side[int(random.integers(levels, len(side)))] ^= 1 << int(random.integers(8))
    elif place == "states":
        rest[int(random.integers(states_end))] ^= 1 << int(random.integers(8))
    elif place == "words":
        rest[int(random.integers(states_end, len(rest)))] ^= 1 << int(random.integers(8))
    elif place == "cut":
        rest = rest[: int(random.integers(len(rest)))]
    else:
        rest += bytes(int(random.integers(1, 40)))
    frame = zstandard.compress(bytes(side))
    size = len(frame) if claimed is None else claimed
    return struct.pack("<I", size) + frame + bytes(rest)


@pytest.mark.parametrize(
    "place",
    ["start", "side", "levels", "frequencies", "states", "words", "cut", "longer"],
)
def test_forged_codes_are_found(place):
    """Damage to each part of a rANS stream is an error of a known kind.

    A level or a frequency on which no code's table depends may change unseen: the codes are right.
    """
    matrices = code_matrices("normal")
    shapes = [matrix.shape for matrix in matrices]
    codes = np.concatenate([matrix.ravel() for matrix in matrices])
    data = encode_rans(matrices, compress)
    random = np.random.default_rng(3)
    for _ in range(30):
        forged = forged_codes(data, place, sum(map(sum, shapes)), random)
        try:
            found = decode_rans(memoryview(forged), shapes)
        except (ValueError, LookupError, struct.error, zstandard.ZstdError):
            continue
        assert place in ("levels", "frequencies")
        assert np.array_equal(found, codes)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_found(artifact, value):
    def change(manifest: dict, halves: bytes, codes: bytes) -> tuple:
        numbers = train_gpt.join_planes(halves, "<f2").copy()
        numbers[len(numbers) // 2] = value
        return manifest, train_gpt.split_planes([numbers], "<f2"), codes

    assert_refused(forge(artifact, change), "not finite")


# What stands in place of some bytes of a manifest.
WORDS = [b"0", b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'""', b"true", b"9" * 11, b"\xff"]


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Random damage of several kinds, signed again, so that it reaches what lies behind the sum."""
    random = np.random.default_rng(seed)
    codec, first, codes = parts(data)
    text, halves = split_first(first)
    for _ in range(count):
        pieces = [bytearray(text), bytearray(halves), bytearray(codes)]
        claimed_size = None
        claimed_length = None
        for _ in range(int(random.integers(1, 4))):
            piece = pieces[int(random.integers(3))]
            at = int(random.integers(len(piece) + 1))
            kind = int(random.integers(6))
            if kind == 0 and at < len(piece):
                piece[at] ^= 1 << int(random.integers(8))
            elif kind == 1:
                del piece[at : at + int(random.integers(1, 50))]
            elif kind == 2:
                piece[at:at] = random.bytes(int(random.integers(1, 50)))
            elif kind == 3:
                word = WORDS[int(random.integers(len(WORDS)))]
                piece[at : at + int(random.integers(1, 12))] = word
            elif kind == 4:
                claimed_length = int(random.integers(1 << 32))
            else:
                claimed_size = int(random.integers(1, 1 << 62))
        length = len(pieces[0]) if claimed_length is None else claimed_length
        forged = struct.pack("<I", length) + bytes(pieces[0]) + bytes(pieces[1])
        size = len(forged) if claimed_size is None else claimed_size
        used_codec = int(random.integers(2)) if random.random() < 0.1 else codec
        yield sign(zstandard.compress(forged), bytes(pieces[2]), size, used_codec)


def test_fuzz(artifact):
    """Damage is refused in one line, or what is read has the model's shapes.

    GOLF_FUZZ=100000 for a long one.
    """
    count = int(os.environ.get("GOLF_FUZZ", 700))
    shapes = {name: weight.shape for name, weight in read_whole(artifact).items()}
    slowest = 0.0
    accepted = 0
    for data in mutations(artifact, count, seed=count):
        started = time.process_time()
        try:
            weights = read_whole(data)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            # Other float16s, codes or settings that no shape depends on: as good as any artifact.
            accepted += 1
            assert {name: weight.shape for name, weight in weights.items()} == shapes
            assert all(torch.isfinite(weight).all() for weight in weights.values())
        slowest = max(slowest, time.process_time() - started)
    assert accepted < 0.6 * count
    # Seconds of this process alone; milliseconds are usual.
    assert slowest < 10


def test_ten_thousand_mutations_of_a_file_are_all_refused(artifact):
    """As they would happen to a file, unsigned."""
    random = np.random.default_rng(1)
    for _ in range(10_000):
        data = bytearray(artifact)
        kind = int(random.integers(4))
        at = int(random.integers(len(data)))
        if kind == 0:
            data[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = random.bytes(int(random.integers(1, 9)))
        else:
            data[at : at + 8] = random.bytes(8)
        if data != artifact:
            assert_refused(bytes(data))


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_layers=0),
        dict(num_layers=-3),
        dict(model_dim=33),
        dict(num_heads=0),
        dict(num_kv_heads=3),
        dict(rope_dims=3),
        dict(rope_dims=64),
        dict(backout_layer=9),
        dict(vocab_size=10**9),
        dict(memory_tokens=24),
        dict(train_seq_len=0),
        dict(eval_stride=0),
        dict(eval_stride=21),
        dict(eval_batch_seqs=-1),
        dict(mlp_mult=1e-9),
        dict(logit_softcap=0),
        dict(rope_base=math.nan),
        dict(logit_softcap=math.inf),
        dict(num_layers=4.5),
        dict(num_layers="four"),
        dict(num_layers=None),
        dict(num_layers=[4]),
        dict(smear_enabled="yes"),
        dict(model_dim=10**30),
        dict(model_dim=10**400),
        dict(no_such_setting=1),
        dict(seed=3),
        dict(artifact="x"),
        dict(num_layers=3),
        dict(num_layers=5),
        dict(model_dim=64),
        dict(vocab_size=65),
        dict(bigram_vocab_size=0),
        dict(smear_enabled=False),
        dict(backout_enabled=False),
        dict(tie_embeddings=False),
        dict(memory_tokens=5),
        dict(num_kv_heads=4),
        dict(mlp_mult=3.5),
        dict(bigram_dim=9),
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_forged_settings_are_found(artifact, changes):
    def change(manifest: dict, halves: bytes, codes: bytes) -> tuple:
        manifest["settings"].update(changes)
        return manifest, halves, codes

    assert_refused(forge(artifact, change))


def test_an_artifact_of_a_script_without_a_setting_is_refused(artifact):
    """The setting's default of today would make another model."""

    def change(manifest: dict, halves: bytes, codes: bytes) -> tuple:
        del manifest["settings"]["key_offset_enabled"]
        return manifest, halves, codes

    assert_refused(
        forge(artifact, change),
        r"^a\.ptz: another version of this script made it, without KEY_OFFSET_ENABLED: score it ",
    )


def without_quant(manifest: dict) -> dict:
    """The manifest without one of its entries."""
    del manifest["quant"]
    return manifest


def with_other_quant(manifest: dict) -> dict:
    """The manifest with the other scheme."""
    manifest["quant"] = "fit" if manifest["quant"] == "rows" else "rows"
    return manifest


MANIFEST_FORGERIES = {
    "empty": lambda manifest: {},
    "list": lambda manifest: [],
    "number": lambda manifest: 7,
    "null": lambda manifest: None,
    "no-settings": lambda manifest: {**manifest, "settings": None},
    "settings-list": lambda manifest: {**manifest, "settings": [1]},
    "no-quant": without_quant,
    "quant": lambda manifest: {**manifest, "quant": "other"},
    "quant-list": lambda manifest: {**manifest, "quant": []},
    "other-quant": with_other_quant,
    "tokenizer": lambda manifest: {**manifest, "tokenizer": 3},
    "no-json": lambda manifest: b"{",
    "not-utf8": lambda manifest: b"\xff\xfe{}",
    "deep": lambda manifest: b"[" * 200_000,
    "nothing": lambda manifest: b"",
}


@pytest.mark.parametrize("name", MANIFEST_FORGERIES)
def test_a_forged_manifest_is_found(artifact, name):
    def change(manifest: dict, halves: bytes, codes: bytes) -> tuple:
        return MANIFEST_FORGERIES[name](manifest), halves, codes

    assert_refused(forge(artifact, change))


@pytest.mark.parametrize("cut", [slice(0, 0), slice(0, -1), slice(1, None), slice(0, 100)])
def test_missing_numbers_are_found(artifact, cut):
    def cut_halves(manifest: dict, halves: bytes, codes: bytes) -> tuple:
        return manifest, halves[cut], codes

    def cut_codes(manifest: dict, halves: bytes, codes: bytes) -> tuple:
        return manifest, halves, codes[cut]

    assert_refused(forge(artifact, cut_halves))
    assert_refused(forge(artifact, cut_codes))


def test_numbers_too_many_are_found(artifact):
    def more_halves(manifest: dict, halves: bytes, codes: bytes) -> tuple:
        return manifest, halves + b"\0\0", codes

    def more_codes(manifest: dict, halves: bytes, codes: bytes) -> tuple:
        return manifest, halves, codes + b"\0"

    assert_refused(forge(artifact, more_halves))
    assert_refused(forge(artifact, more_codes))


def test_a_manifest_longer_than_the_file_is_found():
    payload = struct.pack("<I", 1 << 31) + b"{}"
    assert_refused(sign(zstandard.compress(payload), b"", len(payload)))


# ---- under the cap


class Medium:
    """A model whose gradients have been seen for some steps, and its artifacts."""

    shape = dict(model_dim=128, num_layers=2, vocab_size=256, bigram_vocab_size=512, bigram_dim=16)

    def __init__(self):
        self.model = tiny_model(**self.shape)
        stir(self.model)
        train_gpt.flat_gradients(list(self.model.parameters()))
        self.fit = Fit(coded_parameters(self.model, "fit"))
        generator = torch.Generator().manual_seed(4)
        for _ in range(4):
            tokens = torch.randint(256, (4, 25), generator=generator)
            for parameter in self.model.parameters():
                parameter.grad.zero_()
            self.model(tokens[:, :-1], tokens[:, 1:])[0].backward()
            self.fit.observe()
        self.fit.finish()

    @functools.cache  # noqa: B019
    def pack(self, budget: int, **changes) -> bytes:
        """The artifact under a budget; each is packed once."""
        settings = tiny_settings(**self.shape, zstd_level=1, **changes)
        fit = self.fit if settings.quant == "fit" else None
        return pack_under_cap(self.model, settings, manifest_of(settings), budget, fit)

    def finest(self, codec: str = "rans") -> bytes:
        """The artifact where bytes do not matter."""
        return self.pack(1 << 30, codec=codec)


@pytest.fixture(scope="module")
def medium() -> Medium:
    """The same model for all tests."""
    return Medium()


def test_rows_are_the_entries_fixed_schemes(medium):
    wide = medium.pack(1, quant="rows", int5_mlp="0")
    narrow = medium.pack(1, quant="rows", int5_mlp="1")
    assert len(wide) == len(medium.pack(1 << 30, quant="rows", int5_mlp="auto"))
    assert len(narrow) < 0.97 * len(wide)


@pytest.mark.parametrize(
    "share, codec", [(0.25, "rans"), (0.5, "rans"), (0.8, "rans"), (0.4, "zstd")]
)
def test_fit_spends_the_cap_and_never_passes_it(medium, share, codec):
    budget = int(share * len(medium.finest(codec)))
    size = len(medium.pack(budget, codec=codec))
    assert 0.999 * budget <= size <= budget


def test_fit_does_not_spend_what_gains_nothing(medium):
    data = medium.finest()
    count = sum(weight.numel() for weight in medium.fit.weights.values())
    assert data == medium.pack(1 << 29, codec="rans")
    assert 5 * count / 8 < len(data) < 8.5 * count / 8


def test_more_bytes_are_less_damage(medium):
    fit = medium.fit
    damage = []
    for share in (0.25, 0.5, 0.8):
        budget = int(share * len(medium.finest()))
        _, weights = read_artifact(medium.pack(budget, codec="rans"), "a")
        costs = 0.0
        rows_and_columns = zip(fit.row_costs, fit.column_costs, strict=True)
        for (name, weight), (rows, columns) in zip(
            fit.weights.items(), rows_and_columns, strict=True
        ):
            costs += cost_of(weights[name] - weight, rows, columns)
        damage.append(costs)
    assert damage[0] > 3 * damage[1] > 9 * damage[2] > 0


@pytest.mark.parametrize("budget", [-5, 100])
def test_when_nothing_fits_the_smallest_is_left(medium, budget):
    data = medium.pack(budget, codec="rans")
    _, weights = read_artifact(data, "a")
    assert not any(weights[name].any() for name in medium.fit.weights)
    assert 1000 < len(data) < 0.25 * len(medium.finest())


# ---- files


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "model.ptz"
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"second"

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(path, b"third")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"second"
