"""Quantization, packing under the cap, and what is left of a damaged or forged artifact: a UserError."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import time

import numpy as np
import pytest
import torch
import zstandard
from conftest import stir, tiny_model, tiny_settings

import train_gpt
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
    pack,
    pack_under_cap,
    quantize,
    read_artifact,
    round_with_feedback,
    row_grid,
    settings_from,
    stored_parameters,
    write_atomically,
)

# ---- rows of codes


def hostile_matrices() -> dict[str, torch.Tensor]:
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
        return {"matrix": "mlp"}

    def get_parameter(self, name: str) -> torch.nn.Parameter:
        return self.weight


def row_steps(weight: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    settings = tiny_settings(quant="rows", int5_mlp="1" if limit == INT5 else "0")
    return row_grid(OneMatrix(weight), settings)["matrix"]


@pytest.mark.parametrize("limit", [INT5, INT6])
@pytest.mark.parametrize("name", hostile_matrices())
def test_no_weight_moves_by_more_than_half_a_step(name, limit):
    weight = hostile_matrices()[name]
    rows, columns = row_steps(weight, limit)
    codes = quantize(weight, rows, columns)
    assert torch.equal(rows, rows.half().float()) and rows.shape == weight.shape[:1]
    assert torch.isfinite(rows).all() and torch.equal(columns, torch.ones(weight.size(1)))
    assert (
        codes.shape == weight.shape
        and torch.equal(codes, codes.round())
        and codes.abs().max() <= limit
    )
    step = rows.double()[:, None]
    error = (codes.double() * step - weight.double()).abs()
    smallest = torch.tensor(2.0**-25, dtype=torch.float64)  # half of float16's smallest number
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
    assert torch.equal(row_steps(again, limit)[0], steps[0]) and torch.equal(
        quantize(again, *steps), codes
    )


def test_int5_is_for_the_mlp_alone():
    model = tiny_model()
    wide, narrow = (row_grid(model, tiny_settings(quant="rows", int5_mlp=x)) for x in ("0", "1"))
    for name, (rows, _) in wide.items():
        ratio = narrow[name][0] / rows
        assert ((ratio - (INT6 / INT5 if ".mlp." in name else 1.0)).abs() < 2e-3).all()


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
    weight: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, damping: float = 0.0
) -> Fit:
    fit = Fit({"matrix": torch.nn.Parameter(weight)})
    fit.rows, fit.columns, fit.DAMPING = [rows], [columns], damping
    fit.finish()
    return fit


@pytest.fixture(scope="module")
def sensitive() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix of 96x160, the costs of its rows, and those of its columns, correlated."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(96, 160, generator=generator)
    mixed = torch.randn(160, 160, generator=generator) * torch.logspace(-1, 0.5, 160)
    return weight, torch.logspace(-2, 1, 96), mixed @ mixed.T / 160 + 0.05 * torch.eye(160)


def test_feedback_is_the_best_answer_to_the_errors_before(sensitive):
    """After each rounded column, the targets of the later ones are those of least cost, solved for directly."""
    weight, columns = sensitive[0][:, :5], sensitive[2][:5, :5]
    inverse = torch.linalg.inv(columns.double())
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    steps = (
        torch.full((96,), 0.5),
        torch.tensor([1.0, 0.5, 1e-6, 1e-6, 1e-6]),
    )  # the last are not rounded
    codes = round_with_feedback(weight, *steps, factor)
    free = weight.double().clone()
    error = torch.zeros(96, 5, dtype=torch.float64)
    for j in range(2):
        expected = quantize(free[:, j : j + 1].float(), steps[0], steps[1][j : j + 1])[:, 0]
        assert torch.equal(codes[:, j], expected)
        error[:, j] = (
            weight[:, j].double() - expected.double() * steps[0].double() * steps[1][j].double()
        )
        later = slice(j + 1, None)
        solved = torch.linalg.solve(
            columns[later, later].double(), columns[later, : j + 1].double()
        )
        free[:, later] = weight[:, later].double() + (error[:, : j + 1] @ solved.T)


def test_blocks_of_columns_change_nothing(sensitive):
    """160 columns are three blocks of corrections; one block would give the same codes."""
    weight, _, columns = sensitive
    factor = torch.linalg.cholesky(torch.linalg.inv(columns.double()), upper=True).float()
    steps = torch.full((96,), 0.3), torch.ones(160)
    codes, target = round_with_feedback(weight, *steps, factor), weight.clone()
    for j in range(160):
        expected = quantize(target[:, j : j + 1], steps[0], steps[1][j : j + 1])[:, 0]
        assert (codes[:, j] != expected).float().mean() < 0.03, (
            j
        )  # ties, after sums in another order
        error = (target[:, j] - codes[:, j] * steps[0]) / factor[j, j]
        target[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]


def test_each_refinement_lowers_the_cost_at_equal_entropy(sensitive):
    """Nearest rounding with equal steps, then steps for rows, then steps for columns with feedback."""
    weight, rows, columns = sensitive
    fit = fitted(weight, rows, columns)
    row_step, column_step, _ = fit.steps["matrix"]

    def bits(codes: torch.Tensor) -> float:
        """About the entropy of codes whose scale is known."""
        return float(torch.log2(1 + codes.abs()).mean())

    def at_equal_bits(make) -> float:
        low, high = -20.0, 20.0
        for _ in range(40):
            middle = (low + high) / 2
            codes, steps = make(2.0**middle)
            low, high = (middle, high) if bits(codes) > 2.0 else (low, middle)
        return cost_of(dequantize(codes, *steps) - weight, rows, columns)

    def nearest(r, c):
        return lambda x: (quantize(weight, r * x, c), (r * x, c))

    equal = at_equal_bits(nearest(torch.ones(96), torch.ones(160)))
    by_row = at_equal_bits(nearest(row_step, torch.ones(160)))
    feedback = at_equal_bits(
        lambda x: (
            round_with_feedback(weight, row_step * x, column_step, fit.factors["matrix"]),
            (row_step * x, column_step),
        )
    )
    assert by_row < 0.7 * equal and feedback < 0.6 * by_row


def test_steps_are_in_inverse_proportion_to_the_root_of_the_cost(sensitive):
    weight, rows, columns = sensitive
    fit = fitted(weight, rows, columns)
    row_step, column_step, _ = fit.steps["matrix"]
    spread = (row_step * rows.sqrt()).log2()
    assert spread.max() - spread.min() <= 0.5 + 1e-4  # steps are powers of the root of two
    left = torch.tensor(
        [float(1 / torch.linalg.inv(columns[j:, j:].double())[0, 0]) for j in range(160)]
    )
    spread = (column_step.double() * left.sqrt()).log2()
    assert spread.max() - spread.min() <= 0.5 + 1e-3
    assert torch.equal(2 * row_step.log2(), (2 * row_step.log2()).round())


def test_without_samples_steps_are_equal_and_nothing_is_fed_back():
    model = tiny_model()
    fit = Fit(coded_parameters(model, "fit"))
    fit.finish()
    for rows, columns, _ in fit.steps.values():
        assert len(set(rows.tolist())) == len(set(columns.tolist())) == 1
    grid = fit.grid(fit.octaves(1000))
    for name, codes in fit.codes(grid).items():
        assert torch.equal(codes, quantize(model.get_parameter(name), *grid[name]))


@pytest.mark.parametrize("name", hostile_matrices())
def test_fitted_codes_stay_in_their_range_and_lose_nothing_at_the_finest_steps(name):
    weight = hostile_matrices()[name]
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(weight.size(1), weight.size(1), generator=generator)
    fit = fitted(
        weight, torch.rand(len(weight), generator=generator), mixed @ mixed.T, damping=0.05
    )
    for octaves in (-100.0, fit.octaves(math.inf), fit.octaves(1000), 100.0):
        grid = fit.grid(octaves)
        codes = fit.codes(grid)["matrix"]
        assert torch.isfinite(grid["matrix"][0]).all() and torch.equal(codes, codes.round())
        assert codes.abs().max() <= INT13
        if octaves == -100.0:
            reach = (
                weight.abs().amax(1, keepdim=True)
                * 0.02
                * (fit.steps["matrix"][1].max() / fit.steps["matrix"][1].min())
                + 1e-5
            )
            assert ((dequantize(codes, *grid["matrix"]) - weight).abs() <= reach).all()


# ---- the entropy coder


def code_matrices(kind: str) -> list[np.ndarray]:
    random = np.random.default_rng(7)
    shapes = [(64, 48), (1, 1), (3, 700), (200, 5)]
    if kind == "zeros":
        return [np.zeros(shape, np.int16) for shape in shapes]
    if kind == "extremes":
        return [random.choice([-INT13, INT13], shape).astype(np.int16) for shape in shapes]
    if kind == "every code":
        return [
            np.arange(-INT13, INT13 + 1, dtype=np.int16).reshape(1, -1),
            np.zeros((9, 9), np.int16),
        ]
    if kind == "one outlier":
        matrix = np.zeros((100, 300), np.int16)
        matrix[50, 100] = -INT13
        return [matrix]
    if kind == "flat and wide":
        return [
            random.integers(-INT13, INT13 + 1, shape).astype(np.int16)
            for shape in [*shapes, (300, 1000)]
        ]
    scales = [np.exp(random.normal(size=(m, 1)) + random.normal(size=n)) for m, n in shapes]
    return [
        np.rint(random.normal(size=s.shape) * s).clip(-INT13, INT13).astype(np.int16)
        for s in scales
    ]


KINDS = ["normal", "zeros", "extremes", "every code", "one outlier", "flat and wide"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_come_back(codec, kind):
    matrices = code_matrices(kind)
    encode, decode = CODECS[codec]
    data = encode(matrices, zstandard.ZstdCompressor(level=3).compress)
    found = decode(memoryview(data), [matrix.shape for matrix in matrices])
    assert found.dtype == np.int16
    assert np.array_equal(found, np.concatenate([matrix.ravel() for matrix in matrices]))


def entropy_bytes(codes: np.ndarray) -> float:
    """Order-0 entropy."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def test_the_coder_needs_less_than_the_entropy_of_each_matrix():
    """Rows and columns of differing scales, as trained ones have them; tables and levels are counted."""
    random = np.random.default_rng(1)
    matrices = [
        np.rint(
            random.normal(size=(m, n))
            * np.exp(0.4 * random.normal(size=(m, 1)))
            * 4
            * np.exp(0.4 * random.normal(size=n))
        )
        .clip(-INT13, INT13)
        .astype(np.int16)
        for m, n in [(512, 512), (256, 512), (1536, 512), (512, 1536)] * 2
    ]
    size = len(encode_rans(matrices, zstandard.ZstdCompressor(level=19).compress))
    assert size < 0.99 * sum(map(entropy_bytes, matrices))


def test_the_coder_comes_within_three_thousandths_of_the_entropy_of_even_matrices():
    """Where no row or column tells more than the matrix: Gaussian codes of one scale."""
    random = np.random.default_rng(1)
    matrices = [
        np.rint(random.normal(size=(1024, 2048)) * scale).astype(np.int16) for scale in (1.5, 6.0)
    ]
    size = len(encode_rans(matrices, zstandard.ZstdCompressor(level=19).compress))
    assert size < 1.003 * sum(map(entropy_bytes, matrices))


def test_decoding_a_record_model_would_take_under_twenty_seconds():
    """On one core: 1 M codes here, 27 M there."""
    matrices = [
        np.random.default_rng(1).normal(size=(1024, 1024), scale=4).round().astype(np.int16)
    ]
    data = memoryview(encode_rans(matrices, zstandard.ZstdCompressor(level=3).compress))
    started = time.process_time()
    decode_rans(data, [(1024, 1024)])
    assert 27 * (time.process_time() - started) < 20


# ---- there and back


def manifest_of(settings) -> dict:
    fields = train_gpt.fields_of("model", "evaluation")
    return dict(
        settings={field.name: getattr(settings, field.name) for field in fields},
        tokenizer="ab" * 32,
    )


def packed_model(budget: int = 4000, **changes) -> tuple[GPT, train_gpt.Settings, bytes]:
    settings, model = tiny_settings(zstd_level=3, **changes), tiny_model(zstd_level=3, **changes)
    fit = Fit(coded_parameters(model, "fit"))
    fit.finish()
    data = pack_under_cap(
        model, settings, manifest_of(settings), budget, fit if settings.quant == "fit" else None
    )
    return model, settings, data


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
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
    grids, pack_ = [], pack
    monkeypatch.setattr(
        train_gpt,
        "pack",
        lambda model, codes, grid, *rest: (
            grids.append((codes, grid)),
            pack_(model, codes, grid, *rest),
        )[1],
    )
    model, settings, data = packed_model(codec=codec, **changes)
    manifest, weights = read_artifact(data, "a.ptz")
    sizes = [len(pack_(model, *each, manifest_of(settings), settings)) for each in grids]
    codes, grid = grids[sizes.index(len(data))]
    assert list(weights) == list(stored_parameters(model)) and manifest["quant"] == settings.quant
    for name, weight in stored_parameters(model).items():
        expected = (
            dequantize(codes[name], *grid[name]) if name in grid else weight.detach().half().float()
        )
        assert torch.equal(weights[name], expected) and weights[name].shape == weight.shape, name
    matrices = {
        f"blocks.{i}.{part}"
        for i in range(settings.num_layers)
        for part in (
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.out",
            "mlp.up",
            "mlp.down",
        )
    }
    assert matrices <= set(grid) and ("embedding" in grid) == (settings.quant == "fit")
    assert model.load_state_dict(weights, strict=False).unexpected_keys == []


def test_the_manifest_says_all_that_a_reader_needs():
    model, settings, data = packed_model()
    manifest, _ = read_artifact(data, "a.ptz")
    assert manifest["tokenizer"] == "ab" * 32
    found, _ = settings_from({"PRESET": "record", "TRAIN_BATCH_TOKENS": "96"}, manifest["settings"])
    for field in train_gpt.fields_of("model", "evaluation"):
        assert getattr(found, field.name) == getattr(settings, field.name)


def test_mtp_heads_are_not_inside():
    model, settings, data = packed_model(mtp_num_heads=2)
    assert "mtp_heads" not in read_artifact(data, "a")[1]
    with torch.no_grad():
        model.mtp_heads.fill_(12345.0)
    fit = Fit(coded_parameters(model, "fit"))
    fit.finish()
    assert pack_under_cap(model, settings, manifest_of(settings), 4000, fit) == data


def test_packing_is_the_same_each_time():
    assert packed_model()[2] == packed_model()[2]


@pytest.mark.parametrize("quant", ["fit", "rows"])
@pytest.mark.parametrize(
    "name, value",
    [
        ("blocks.1.mlp.up", 1e9),
        ("backout", -1e5),
        ("skip_scales", 7e4),
        ("blocks.0.attention.key", float("nan")),
        ("memory", float("inf")),
        ("embedding", float("nan")),
    ],
)
def test_what_float16_cannot_hold_is_refused(name, value, quant):
    model, settings = tiny_model(), tiny_settings(quant=quant)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    fit = Fit(coded_parameters(model, "fit"))
    fit.finish()
    with pytest.raises(UserError, match=name):
        pack_under_cap(
            model, settings, manifest_of(settings), 4000, fit if quant == "fit" else None
        )


# ---- damage and forgery


@pytest.fixture(
    scope="module", params=[("fit", "rans"), ("rows", "zstd")], ids=["fit-rans", "rows-zstd"]
)
def artifact(request) -> bytes:
    quant, codec = request.param
    return packed_model(mtp_num_heads=0, quant=quant, codec=codec)[2]


def parts(data: bytes) -> tuple[int, bytes, bytes]:
    """Codec, unpacked first part, codes."""
    _, _, codec, size, packed, _ = ARTIFACT_HEADER.unpack_from(data)
    body = data[ARTIFACT_HEADER.size :]
    return codec, zstandard.ZstdDecompressor().decompress(body[:packed]), body[packed:]


def sign(frame: bytes, codes: bytes, size: int, codec: int = 0, packed: int | None = None) -> bytes:
    """An artifact with a right checksum, whatever is in it."""
    digest = hashlib.sha256(frame + codes).digest()[:16]
    packed = len(frame) if packed is None else packed
    return ARTIFACT_HEADER.pack(b"GOLF", 2, codec, size, packed, digest) + frame + codes


def forge(artifact: bytes, change) -> bytes:
    """The artifact with `change` made to its manifest, float16s and codes, and a right checksum."""
    codec, first, codes = parts(artifact)
    end = 4 + struct.unpack_from("<I", first)[0]
    text, halves, codes = change(json.loads(first[4:end]), first[end:], codes)
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    first = struct.pack("<I", len(text)) + text + halves
    return sign(zstandard.ZstdCompressor().compress(first), codes, len(first), codec)


def read_whole(data: bytes) -> dict[str, torch.Tensor]:
    """What ARTIFACT=... does with a file before it scores: weights and settings."""
    manifest, weights = read_artifact(data, "a.ptz")
    settings_from({"PRESET": "record", "TRAIN_BATCH_TOKENS": "96"}, manifest["settings"])
    return weights


def test_a_forged_artifact_that_changes_nothing_is_read(artifact):
    read_whole(artifact)
    read_whole(forge(artifact, lambda *content: content))


def damaged(data: bytes):
    size, header = len(data), ARTIFACT_HEADER.size
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
        with pytest.raises(UserError, match=r"^a\.ptz: [^\n]*$"):
            read_artifact(data, "a.ptz")
            pytest.fail(how)


@pytest.mark.parametrize("version, codec", [(0, 1), (1, 1), (3, 1), (2, 2), (2, 255)])
def test_another_format_or_codec_is_named(artifact, version, codec):
    with pytest.raises(UserError, match=f"format {version} with codec {codec}"):
        read_artifact(artifact[:4] + bytes([version, codec]) + artifact[6:], "a.ptz")


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 1 << 31, (1 << 64) - 1])
def test_a_forged_size_is_found(artifact, size):
    codec, first, codes = parts(artifact)
    frame = zstandard.compress(first)
    for data in (
        sign(frame, codes, size, codec),
        sign(frame, codes, len(first), codec, packed=size),
    ):
        with pytest.raises(UserError, match="a.ptz"):
            read_artifact(data, "a.ptz")


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
        with pytest.raises(UserError, match="a.ptz"):
            read_artifact(sign(body, b"", size), "a.ptz")


def test_a_bomb_is_not_unpacked(artifact):
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    for size in (1 << 40, 64 << 20):
        with pytest.raises(UserError, match="a.ptz"):
            read_artifact(sign(bomb, b"", size), "a.ptz")
    _, first, _ = parts(artifact)
    for codes in (bomb, struct.pack("<I", len(bomb)) + bomb):
        for codec in range(len(CODECS)):
            with pytest.raises(UserError, match="a.ptz"):
                read_artifact(sign(zstandard.compress(first), codes, len(first), codec), "a.ptz")


def test_a_model_that_is_too_large_for_its_bytes_is_not_built(artifact):
    """A few kilobytes that claim four billion weights, with float16s to match: refused before any is made."""

    def change(manifest, halves, codes):
        manifest["settings"].update(
            model_dim=16384, num_layers=8, bigram_vocab_size=0, memory_tokens=0
        )
        with torch.device("meta"):
            model = GPT(tiny_settings(**{**manifest["settings"], "eval_batch_seqs": 1}), Runtime())
        coded = coded_parameters(model, manifest["quant"])
        sizes = [
            sum(p.shape) if name in coded else p.numel()
            for name, p in stored_parameters(model).items()
        ]
        assert sum(p.numel() for p in coded.values()) > 1 << 30
        return manifest, bytes(2 * sum(sizes)), codes

    started = time.perf_counter()
    with pytest.raises(UserError, match="do not fit the model"):
        read_artifact(forge(artifact, change), "a.ptz")
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    "place", ["start", "side", "levels", "shares", "states", "words", "cut", "longer"]
)
def test_forged_codes_are_found(place):
    """Damage to each part of a rANS stream: an error, or for levels and words perhaps other codes, never more."""
    matrices = code_matrices("normal")
    shapes = [matrix.shape for matrix in matrices]
    data = encode_rans(matrices, zstandard.ZstdCompressor(level=3).compress)
    side_end = 4 + struct.unpack_from("<I", data)[0]
    side, rest = bytearray(zstandard.decompress(data[4:side_end])), bytearray(data[side_end:])
    levels = sum(m + n for m, n in shapes)
    random = np.random.default_rng(3)
    for _ in range(30):
        new_side, new_rest, length = bytearray(side), bytearray(rest), None
        if place == "start":
            length = int(random.integers(1 << 32))
        elif place == "side":
            new_side = new_side[: int(random.integers(len(side)))]
        elif place in ("levels", "shares"):
            low, high = (0, levels) if place == "levels" else (levels, len(side))
            new_side[int(random.integers(low, high))] ^= 1 << int(random.integers(8))
        elif place in ("states", "words"):
            low, high = (
                (0, 8 * train_gpt.LANES) if place == "states" else (8 * train_gpt.LANES, len(rest))
            )
            new_rest[int(random.integers(low, high))] ^= 1 << int(random.integers(8))
        elif place == "cut":
            new_rest = new_rest[: int(random.integers(len(rest)))]
        else:
            new_rest += bytes(int(random.integers(1, 40)))
        frame = zstandard.compress(bytes(new_side))
        forged = (
            struct.pack("<I", len(frame) if length is None else length) + frame + bytes(new_rest)
        )
        with pytest.raises((ValueError, LookupError, struct.error, zstandard.ZstdError)):
            decode_rans(memoryview(forged), shapes)
            if place == "levels" or place == "shares":
                raise ValueError  # a change that no code's table depends on


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_found(artifact, value):
    def change(manifest, halves, codes):
        numbers = train_gpt.join_planes(halves, "<f2").copy()
        numbers[len(numbers) // 2] = value
        return manifest, train_gpt.split_planes([numbers], "<f2"), codes

    with pytest.raises(UserError, match="not finite"):
        read_whole(forge(artifact, change))


def mutations(data: bytes, count: int, seed: int):
    """Random damage of several kinds, signed again, so that it reaches what lies behind the checksum."""
    random = np.random.default_rng(seed)
    codec, first, codes = parts(data)
    end = 4 + struct.unpack_from("<I", first)[0]
    words = [
        b"0",
        b"-1",
        b"1e999",
        b"NaN",
        b"null",
        b"[]",
        b"{}",
        b'""',
        b"true",
        b"99999999999",
        b"\xff",
    ]
    for _ in range(count):
        pieces = [bytearray(first[4:end]), bytearray(first[end:]), bytearray(codes)]
        frame_size, claim = None, None
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
                piece[at : at + int(random.integers(1, 12))] = words[
                    int(random.integers(len(words)))
                ]
            elif kind == 4:
                claim = int(random.integers(1 << 32))
            else:
                frame_size = int(random.integers(1 << 62))
        length = len(pieces[0]) if claim is None else claim
        forged = struct.pack("<I", length) + bytes(pieces[0]) + bytes(pieces[1])
        yield sign(
            zstandard.compress(forged),
            bytes(pieces[2]),
            frame_size or len(forged),
            int(random.integers(2)) if random.random() < 0.1 else codec,
        )


def test_fuzz(artifact):
    """GOLF_FUZZ=100000 for a long one. Damage is refused in one line, or what is read has the model's shapes."""
    count, slowest, accepted = int(os.environ.get("GOLF_FUZZ", 700)), 0.0, 0
    shapes = {name: weight.shape for name, weight in read_whole(artifact).items()}
    for data in mutations(artifact, count, seed=count):
        started = time.process_time()
        try:
            weights = read_whole(data)
            accepted += 1  # other float16s, codes or settings that no shape depends on: as good as any artifact
            assert {name: weight.shape for name, weight in weights.items()} == shapes
            assert all(torch.isfinite(weight).all() for weight in weights.values())
        except UserError as error:
            assert "\n" not in str(error)
        slowest = max(slowest, time.process_time() - started)
    assert accepted < 0.6 * count and slowest < 5


def test_ten_thousand_mutations_of_a_file_are_all_refused(artifact):
    """As they would happen to a file, unsigned."""
    random = np.random.default_rng(1)
    for _ in range(10_000):
        data, kind = bytearray(artifact), int(random.integers(4))
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
            with pytest.raises(UserError):
                read_artifact(bytes(data), "a.ptz")


SETTING_FORGERIES = [
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
    dict(rope_base=float("nan")),
    dict(logit_softcap=float("inf")),
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
]


@pytest.mark.parametrize("changes", SETTING_FORGERIES, ids=lambda changes: str(changes)[:40])
def test_forged_settings_are_found(artifact, changes):
    def change(manifest, halves, codes):
        manifest["settings"].update(changes)
        return manifest, halves, codes

    with pytest.raises(UserError):
        read_whole(forge(artifact, change))


MANIFEST_FORGERIES = {
    "empty": lambda m: {},
    "list": lambda m: [],
    "number": lambda m: 7,
    "null": lambda m: None,
    "no-settings": lambda m: {**m, "settings": None},
    "settings-list": lambda m: {**m, "settings": [1]},
    "no-quant": lambda m: {key: m[key] for key in m if key != "quant"},
    "quant": lambda m: {**m, "quant": "other"},
    "quant-list": lambda m: {**m, "quant": []},
    "other-quant": lambda m: {**m, "quant": "fit" if m["quant"] == "rows" else "rows"},
    "tokenizer": lambda m: {**m, "tokenizer": 3},
    "no-json": lambda m: b"{",
    "not-utf8": lambda m: b"\xff\xfe{}",
    "deep": lambda m: b"[" * 200_000,
    "nothing": lambda m: b"",
}


@pytest.mark.parametrize("name", MANIFEST_FORGERIES)
def test_a_forged_manifest_is_found(artifact, name):
    with pytest.raises(UserError, match="a.ptz"):
        read_whole(
            forge(artifact, lambda manifest, *rest: (MANIFEST_FORGERIES[name](manifest), *rest))
        )


@pytest.mark.parametrize("cut", [slice(0, 0), slice(0, -1), slice(1, None), slice(0, 100)])
def test_missing_numbers_are_found(artifact, cut):
    for change in (
        lambda manifest, halves, codes: (manifest, halves[cut], codes),
        lambda manifest, halves, codes: (manifest, halves, codes[cut]),
        lambda manifest, halves, codes: (manifest, halves + b"\0\0", codes),
        lambda manifest, halves, codes: (manifest, halves, codes + b"\0"),
    ):
        with pytest.raises(UserError, match="a.ptz"):
            read_whole(forge(artifact, change))


def test_a_manifest_longer_than_the_file_is_found():
    payload = struct.pack("<I", 1 << 31) + b"{}"
    with pytest.raises(UserError, match="a.ptz"):
        read_artifact(sign(zstandard.compress(payload), b"", len(payload)), "a.ptz")


# ---- under the cap


MEDIUM = dict(model_dim=96, num_layers=4, vocab_size=256, bigram_vocab_size=512, bigram_dim=16)


@pytest.fixture(scope="module")
def medium() -> tuple[GPT, Fit]:
    """A model whose gradients have been seen for some steps."""
    model = tiny_model(**MEDIUM)
    stir(model)
    train_gpt.flat_gradients(list(model.parameters()))
    fit, generator = Fit(coded_parameters(model, "fit")), torch.Generator().manual_seed(4)
    for _ in range(4):
        tokens = torch.randint(256, (4, 25), generator=generator)
        for parameter in model.parameters():
            parameter.grad.zero_()
        model(tokens[:, :-1], tokens[:, 1:])[0].backward()
        fit.observe()
    fit.finish()
    return model, fit


def pack_with(medium, budget: int, **changes) -> bytes:
    settings = tiny_settings(**MEDIUM, zstd_level=5, **changes)
    fit = medium[1] if settings.quant == "fit" else None
    return pack_under_cap(medium[0], settings, manifest_of(settings), budget, fit)


def test_rows_are_the_entries_fixed_schemes(medium):
    wide, narrow = (len(pack_with(medium, 1, quant="rows", int5_mlp=x)) for x in ("0", "1"))
    assert (
        wide == len(pack_with(medium, 1 << 30, quant="rows", int5_mlp="auto"))
        and narrow < 0.97 * wide
    )


@pytest.mark.parametrize(
    "share, codec", [(0.25, "rans"), (0.5, "rans"), (0.8, "rans"), (0.4, "zstd")]
)
def test_fit_spends_the_cap_and_never_passes_it(medium, share, codec):
    finest = len(pack_with(medium, 1 << 30, codec=codec))
    budget = int(share * finest)
    size = len(pack_with(medium, budget, codec=codec))
    assert 0.999 * budget <= size <= budget


def test_fit_does_not_spend_what_gains_nothing(medium):
    data, fit = pack_with(medium, 1 << 30), medium[1]
    count = sum(weight.numel() for weight in fit.weights.values())
    assert data == pack_with(medium, 1 << 29) and 5 * count / 8 < len(data) < 8.5 * count / 8


def test_more_bytes_are_less_damage(medium):
    fit, finest, damage = medium[1], len(pack_with(medium, 1 << 30)), []
    for share in (0.3, 0.5, 0.7):
        weights = read_artifact(pack_with(medium, int(share * finest)), "a")[1]
        damage.append(
            sum(
                cost_of(weights[name] - weight.detach(), rows, columns)
                for (name, weight), rows, columns in zip(fit.weights.items(), fit.rows, fit.columns)
            )
        )
    assert damage[0] > 3 * damage[1] > 9 * damage[2] > 0


@pytest.mark.parametrize("budget", [-5, 100])
def test_when_nothing_fits_the_smallest_is_left(medium, budget):
    data = pack_with(medium, budget)
    weights = read_artifact(data, "a")[1]
    assert len(data) > 1000 and not any(weights[name].any() for name in medium[1].weights)
    assert len(data) < 0.25 * len(pack_with(medium, 1 << 30))


# ---- files


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "model.ptz"
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("model.ptz", b"second")]

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_atomically(path, b"third")
    assert path.read_bytes() == b"second"
