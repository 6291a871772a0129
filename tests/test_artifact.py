"""Quantization, packing under the cap, and what is left of a damaged or forged artifact: a UserError."""
from __future__ import annotations

import hashlib
import json
import os
import struct

import pytest
import torch
import zstandard
from conftest import tiny_model, tiny_settings

import train_gpt
from train_gpt import (ARTIFACT_HEADER, GPT, INT5, INT6, PrecisionPlan, Runtime, UserError, dequantize,
                       fake_quantize, pack, pack_under_cap, quantize, read_artifact, settings_from,
                       stored_parameters, unpack_into, write_atomically)

# ---- rows of codes


def hostile_matrices() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(40, 97, generator=generator)
    outlier = normal.clone()
    outlier[torch.arange(40), torch.randint(97, (40,), generator=generator)] *= 1000
    return {"normal": normal, "tiny": normal * 1e-5, "subnormal-steps": normal * 1e-6,
            "below-float16": normal * 1e-12, "huge": normal * 1e5, "zero": normal * 0, "outlier": outlier,
            "constant": torch.ones(5, 7) * 0.3, "negative": -normal.abs(),
            "mixed": normal * torch.logspace(-9, 5, 40)[:, None], "column": normal[:, :1]}


@pytest.mark.parametrize("limit", [INT5, INT6])
@pytest.mark.parametrize("name", hostile_matrices())
def test_no_weight_moves_by_more_than_half_a_step(name, limit):
    weight = hostile_matrices()[name]
    codes, scales = quantize(weight, limit)
    assert scales.dtype == torch.float16 and scales.shape == weight.shape[:1] and torch.isfinite(scales).all()
    assert codes.shape == weight.shape and torch.equal(codes, codes.round()) and codes.abs().max() <= limit
    step = scales.double()[:, None]
    error = (codes.double() * step - weight.double()).abs()
    smallest = torch.tensor(2.0 ** -25, dtype=torch.float64)  # half of float16's smallest number
    assert (error <= torch.maximum(step / 2, smallest) * (1 + 1e-6)).all()
    assert torch.equal(dequantize(codes, scales), codes.float() * scales.float()[:, None])


@pytest.mark.parametrize("limit", [INT5, INT6])
def test_the_largest_weight_of_a_row_has_the_largest_code(limit):
    weight = hostile_matrices()["normal"]
    codes, scales = quantize(weight, limit)
    assert (codes.abs().amax(1) == limit).all()
    expected = weight.abs().amax(1) / limit
    assert ((scales.float() - expected).abs() <= expected * 2.0 ** -10).all()


@pytest.mark.parametrize("limit", [INT5, INT6])
def test_quantizing_again_changes_nothing(limit):
    codes, scales = quantize(hostile_matrices()["outlier"], limit)
    again, same = quantize(dequantize(codes, scales), limit)
    assert torch.equal(codes, again) and torch.equal(scales, same)


def test_the_gradient_passes_straight_through():
    weight = hostile_matrices()["normal"].requires_grad_()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    fake = fake_quantize(weight, torch.tensor(float(INT5)))
    (fake * direction).sum().backward()
    assert torch.equal(weight.grad, direction)
    assert torch.allclose(fake, dequantize(*quantize(weight, INT5)), rtol=0, atol=1e-6)
    assert not torch.allclose(fake, weight, atol=1e-3)


# ---- there and back


def manifest_of(settings) -> dict:
    fields = train_gpt.fields_of("model", "evaluation")
    return dict(settings={field.name: getattr(settings, field.name) for field in fields}, tokenizer="ab" * 32)


def packed_model(**changes) -> tuple[GPT, train_gpt.Settings, bytes]:
    settings, model = tiny_settings(**changes), tiny_model(**changes)
    plan = PrecisionPlan(model, settings)
    return model, settings, pack(model, plan.limits, manifest_of(settings), 3)


def fresh_model(settings) -> GPT:
    torch.manual_seed(99)
    return GPT(settings, Runtime())


@pytest.mark.parametrize("changes", [
    dict(), dict(int5_mlp="1"), dict(tie_embeddings=False),
    dict(num_layers=5, bigram_vocab_size=0, memory_tokens=0),
    dict(num_layers=1, smear_enabled=False, backout_enabled=False, mtp_num_heads=0),
], ids=["int6", "int5", "untied", "no-tables", "one-layer"])
def test_what_is_read_back_is_what_the_codes_say(changes):
    model, settings, data = packed_model(**changes)
    manifest, numbers = read_artifact(data, "a.ptz")
    read = fresh_model(settings)
    unpack_into(read, manifest, numbers, "a.ptz")
    quantized = stored_parameters(model, "mlp", "int6")
    for name, weight in stored_parameters(model).items():
        narrow = ".mlp." in name and settings.int5_mlp == "1"
        expected = dequantize(*quantize(weight, INT5 if narrow else INT6)) if name in quantized \
            else weight.detach().half().float()
        assert torch.equal(read.get_parameter(name), expected), name
    matrices = {f"blocks.{i}.{part}" for i in range(settings.num_layers) for part in (
        "attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down")}
    assert matrices <= set(quantized) and not {"embedding", "head"} & set(quantized)


def test_the_manifest_says_all_that_a_reader_needs():
    model, settings, data = packed_model(int5_mlp="1")
    manifest, _ = read_artifact(data, "a.ptz")
    assert manifest["tokenizer"] == "ab" * 32
    found, _ = settings_from({"PRESET": "record", "TRAIN_BATCH_TOKENS": "96"}, manifest["settings"])
    for field in train_gpt.fields_of("model", "evaluation"):
        assert getattr(found, field.name) == getattr(settings, field.name)
    names = list(stored_parameters(model, "mlp", "int6"))
    assert manifest["limits"] == [INT5 if ".mlp." in name else INT6 for name in names]


def test_mtp_heads_are_not_inside():
    model, settings, data = packed_model(mtp_num_heads=2)
    with torch.no_grad():
        model.mtp_heads.fill_(12345.0)
    assert pack(model, PrecisionPlan(model, settings).limits, manifest_of(settings), 3) == data
    read = fresh_model(settings)
    before = read.mtp_heads.detach().clone()
    unpack_into(read, *read_artifact(data, "a"), "a")
    assert torch.equal(read.mtp_heads, before)


def test_packing_is_the_same_each_time():
    assert packed_model()[2] == packed_model()[2]


@pytest.mark.parametrize("name, value", [("blocks.1.mlp.up", 3e6), ("embedding", 7e4), ("backout", -1e5),
                                         ("blocks.0.attention.key", float("nan")), ("memory", float("inf"))])
def test_what_float16_cannot_hold_is_refused(name, value):
    model, settings = tiny_model(), tiny_settings()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    with pytest.raises(UserError, match=name):
        pack(model, PrecisionPlan(model, settings).limits, manifest_of(settings), 3)


# ---- damage and forgery


@pytest.fixture(scope="module")
def artifact() -> bytes:
    return packed_model(mtp_num_heads=0)[2]


def sign(body: bytes, size: int) -> bytes:
    return ARTIFACT_HEADER.pack(b"GOLF", 1, 1, size, hashlib.sha256(body).digest()[:16]) + body


def forge(artifact: bytes, change) -> bytes:
    """The artifact with `change` made to its manifest and numbers, and a right checksum."""
    payload = zstandard.ZstdDecompressor().decompress(artifact[ARTIFACT_HEADER.size:])
    end = 4 + struct.unpack_from("<I", payload)[0]
    text, numbers = change(json.loads(payload[4:end]), payload[end:])
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    payload = struct.pack("<I", len(text)) + text + numbers
    return sign(zstandard.ZstdCompressor().compress(payload), len(payload))


def read_whole(data: bytes) -> GPT:
    """What ARTIFACT=... does with a file before it scores: settings, model, weights."""
    manifest, numbers = read_artifact(data, "a.ptz")
    settings, _ = settings_from({"PRESET": "record", "TRAIN_BATCH_TOKENS": "96"}, manifest["settings"])
    model = fresh_model(settings)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        unpack_into(model, manifest, numbers, "a.ptz")
    except UserError:
        assert all(torch.equal(*pair) for pair in zip(before, model.parameters()))
        raise
    return model


def test_a_forged_artifact_that_changes_nothing_is_read(artifact):
    read_whole(artifact)
    read_whole(forge(artifact, lambda manifest, numbers: (manifest, numbers)))


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


@pytest.mark.parametrize("version, codec", [(0, 1), (2, 1), (1, 0), (1, 2)])
def test_another_format_or_codec_is_named(artifact, version, codec):
    with pytest.raises(UserError, match=f"format {version} with codec {codec}"):
        read_artifact(artifact[:4] + bytes([version, codec]) + artifact[6:], "a.ptz")


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 1 << 31, (1 << 64) - 1])
def test_a_forged_size_is_found(artifact, size):
    with pytest.raises(UserError, match="a.ptz"):
        read_artifact(sign(artifact[ARTIFACT_HEADER.size:], size), "a.ptz")


@pytest.mark.parametrize("body", [
    b"", b"\0" * 50, b"(\xb5/\xfd", zstandard.compress(b""), zstandard.compress(b"abc"),
    zstandard.compress(b"\xff" * 9), zstandard.compress(b"\0\0\0\0")])
def test_a_forged_body_is_found(body):
    for size in (0, 3, 4, 9, 50):
        with pytest.raises(UserError, match="a.ptz"):
            read_artifact(sign(body, size), "a.ptz")


def test_a_bomb_is_not_unpacked():
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    for size in (1 << 40, 64 << 20):
        with pytest.raises(UserError, match="a.ptz"):
            read_artifact(sign(bomb, size), "a.ptz")


SETTING_FORGERIES = [
    dict(num_layers=0), dict(num_layers=-3), dict(model_dim=33), dict(num_heads=0), dict(num_kv_heads=3),
    dict(rope_dims=3), dict(rope_dims=64), dict(backout_layer=9), dict(vocab_size=10 ** 9),
    dict(memory_tokens=24), dict(train_seq_len=0), dict(eval_stride=0), dict(eval_stride=21),
    dict(eval_batch_seqs=-1), dict(mlp_mult=1e-9), dict(logit_softcap=0), dict(rope_base=float("nan")),
    dict(logit_softcap=float("inf")), dict(num_layers=4.5), dict(num_layers="four"), dict(num_layers=None),
    dict(num_layers=[4]), dict(smear_enabled="yes"), dict(model_dim=10 ** 30), dict(model_dim=10 ** 400),
    dict(no_such_setting=1), dict(seed=3), dict(artifact="x"), dict(num_layers=3), dict(num_layers=5),
    dict(model_dim=64), dict(vocab_size=65), dict(bigram_vocab_size=0), dict(smear_enabled=False),
    dict(backout_enabled=False), dict(tie_embeddings=False), dict(memory_tokens=5), dict(num_kv_heads=4),
    dict(mlp_mult=3.5), dict(bigram_dim=9),
]


@pytest.mark.parametrize("changes", SETTING_FORGERIES, ids=lambda changes: str(changes)[:40])
def test_forged_settings_are_found(artifact, changes):
    def change(manifest, numbers):
        manifest["settings"].update(changes)
        return manifest, numbers
    with pytest.raises(UserError):
        read_whole(forge(artifact, change))


MANIFEST_FORGERIES = {
    "empty": lambda m: {}, "list": lambda m: [], "number": lambda m: 7, "null": lambda m: None,
    "no-settings": lambda m: {**m, "settings": None}, "settings-list": lambda m: {**m, "settings": [1]},
    "no-limits": lambda m: {key: m[key] for key in m if key != "limits"},
    "limits": lambda m: {**m, "limits": 3},
    "fewer-limits": lambda m: {**m, "limits": m["limits"][1:]}, "tokenizer": lambda m: {**m, "tokenizer": 3},
    "no-json": lambda m: b"{", "not-utf8": lambda m: b"\xff\xfe{}", "deep": lambda m: b"[" * 200_000,
    "nothing": lambda m: b"",
}


@pytest.mark.parametrize("name", MANIFEST_FORGERIES)
def test_a_forged_manifest_is_found(artifact, name):
    with pytest.raises(UserError, match="a.ptz"):
        read_whole(forge(artifact, lambda manifest, numbers: (MANIFEST_FORGERIES[name](manifest), numbers)))


@pytest.mark.parametrize("cut", [slice(0, 0), slice(0, -1), slice(1, None), slice(0, 100)])
def test_missing_numbers_are_found(artifact, cut):
    with pytest.raises(UserError, match="a.ptz"):
        read_whole(forge(artifact, lambda manifest, numbers: (manifest, numbers[cut])))
    with pytest.raises(UserError, match="a.ptz"):
        read_whole(forge(artifact, lambda manifest, numbers: (manifest, numbers + b"\0\0")))


def test_a_manifest_longer_than_the_file_is_found():
    payload = struct.pack("<I", 1 << 31) + b"{}"
    with pytest.raises(UserError, match="a.ptz"):
        read_artifact(sign(zstandard.compress(payload), len(payload)), "a.ptz")


# ---- under the cap


MEDIUM = dict(model_dim=128, num_layers=6, vocab_size=256, bigram_vocab_size=512, bigram_dim=16)


def pack_with(model: GPT, cap: int, int5_mlp: str = "auto", code_bytes: int = 0) -> tuple[int, list[str]]:
    """Bytes of the model under a cap, and the names of its int5 matrices."""
    settings = tiny_settings(**MEDIUM, int5_mlp=int5_mlp, artifact_max_bytes=cap, zstd_level=5)
    data, plan = pack_under_cap(model, settings, manifest_of(settings), code_bytes)
    manifest, _ = read_artifact(data, "a")
    assert manifest["limits"] == list(plan.limits.values())
    return len(data), [name for name, limit in plan.limits.items() if limit == INT5]


@pytest.fixture(scope="module")
def medium() -> GPT:
    return tiny_model(**MEDIUM)


def test_int5_mlp_0_and_1(medium):
    wide, none = pack_with(medium, 1, "0")
    narrow, every = pack_with(medium, 1 << 30, "1")
    assert none == [] and sorted(every) == sorted(stored_parameters(medium, "mlp")) and len(every) == 12
    assert narrow < 0.97 * wide


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_int5_auto_goes_as_far_as_the_cap_needs(medium, share):
    (wide, _), (narrow, every) = pack_with(medium, 1 << 30, "0"), pack_with(medium, 1 << 30, "1")
    assert pack_with(medium, wide) == (wide, [])
    code, cap = 1000, 1000 + int(narrow + share * (wide - narrow))
    size, chosen = pack_with(medium, cap, code_bytes=code)
    assert size + code <= cap
    needed = (1 - share) * len(every)
    assert set(chosen) <= set(every) and needed - 1 < len(chosen) <= needed + 2


def test_int5_auto_takes_first_what_costs_least_for_a_byte():
    model = tiny_model(**MEDIUM)
    (wide, _), (narrow, _) = pack_with(model, 1 << 30, "0"), pack_with(model, 1 << 30, "1")
    with torch.no_grad():
        model.blocks[2].mlp.down.mul_(1e-3)  # hardly any error to lose there
    assert pack_with(model, int(wide - 0.02 * (wide - narrow)))[1] == ["blocks.2.mlp.down"]


def test_when_nothing_helps_the_artifact_is_over_the_cap(medium):
    size, chosen = pack_with(medium, 1000)
    assert size > 1000 and len(chosen) == 12


@pytest.mark.parametrize("int5_mlp", ["0", "1"])
@pytest.mark.parametrize("changes", [
    MEDIUM, dict(MEDIUM, model_dim=192, bigram_vocab_size=0, memory_tokens=0)], ids=["medium", "wider"])
def test_the_estimate_is_near_the_packed_size(changes, int5_mlp):
    torch.manual_seed(5)
    settings = tiny_settings(**changes, int5_mlp=int5_mlp)
    model = tiny_model(**changes)
    plan = PrecisionPlan(model, settings)
    size = len(pack(model, plan.limits, manifest_of(settings), 22))
    assert abs(plan.estimated_bytes(model) - size) < 0.04 * size


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
