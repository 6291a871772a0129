"""records/quantization.py on a tiny model: table, figures, plot, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import quantization
import quantization_plot
import quantization_ways
import sizes
import train_gpt
from tiny_runs import TINY, call_command

RUN = dict(
    TINY,
    ITERATIONS="12",
    MAX_WALLCLOCK_SECONDS="0",
    WARMDOWN_ITERS="12",
    WARMDOWN_FRACTION="1",
    WARMUP_STEPS="0",
    LATE_QAT_THRESHOLD="0",
    SWA_EVERY="1",
    DTYPE="float32",
    ZSTD_LEVEL="3",
)


@pytest.fixture(scope="module")
def compared(data_folder, tmp_path_factory):
    """The folder of a call that trained and compared, what it printed, and its figures."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("quantization")
    arguments = ["tiny.pt", "--tokens", "1000", "--json", "found.json", "--plot", "loss.png"]
    # The name of a run is taken once its training has begun: it must not stop what follows.
    environment = dict(RUN, DATA_PATH=str(data_folder), RUN_ID="named")
    done = call_command("quantization.py", *arguments, folder=folder, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout, json.loads((folder / "found.json").read_text())


@pytest.fixture
def here(data_folder, tmp_path, monkeypatch) -> Path:
    """A folder in which the command can be called in this process, with the same settings."""
    for field in train_gpt.fields_of():
        monkeypatch.delenv(field.name.upper(), raising=False)
    for name, value in {**RUN, "DATA_PATH": str(data_folder)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    precision = torch.get_float32_matmul_precision()
    # On a busy machine threads wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


# ---- What is compared


def test_all_ways_are_in_the_table_and_the_file(compared):
    _, out, found = compared
    ways = [row["way"] for row in found["rows"]]
    assert len(ways) == len(set(ways)) == 30
    for row in found["rows"]:
        assert f"| {row['way']} | {row['bytes']:,} |" in out
        assert row["val_bpb"] == pytest.approx(found["float"]["val_bpb"] + row["loss_bpb"])
        assert row["bits"] > 0
        assert row["seconds"] > 0
    assert {
        "loss_share_at_bytes_of_int6",
        "bytes_share_at_loss_of_int6",
        "loss_over_sigma_gptq",
    } < set(found)


def test_ways_are_as_large_as_they_should_be(compared):
    _, _, found = compared
    by_way = {row["way"]: row for row in found["rows"]}
    int6 = by_way["int6 rows, zstd"]
    assert by_way["int5 MLP, zstd"]["bytes"] < int6["bytes"]
    assert by_way["int6 rows, rANS"]["val_bpb"] == int6["val_bpb"]
    for share in quantization_ways.SHARES:
        fitted = by_way[f"fit, {share:.0%} of int6's bytes"]
        assert fitted["bytes"] <= share * int6["bytes"] + 1


def test_a_second_call_compares_the_same_weights(compared, here, capsys):
    folder, _, found = compared
    assert quantization.main([str(folder / "tiny.pt"), "--tokens", "1000", "--short"]) == 0
    out = capsys.readouterr().out
    assert "step:" not in out
    assert f"val_bpb={found['float']['val_bpb']}" in out


def test_the_plot_is_a_picture(compared):
    from PIL import Image

    picture = Image.open(compared[0] / "loss.png").convert("L")
    assert picture.size == (960, 600)
    assert picture.getextrema()[0] < 60
    assert len(picture.getcolors()) > 20


def test_a_plot_without_losses_is_empty_but_there(tmp_path):
    rows = [dict(way="fit, 30% of int6's bytes", bytes=1000, loss_bpb=-0.1)]
    quantization_plot.plot(rows, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").read_bytes().startswith(b"\x89PNG")


# ---- Headline figures


def test_a_curve_is_straight_between_logarithms_and_nowhere_else():
    # y = x squared.
    sizes = [1.0, 100.0, 10.0, 0.0]
    losses = [1.0, 10_000.0, 100.0, 5.0]
    assert quantization_ways.interpolated(sizes, losses, 50.0) == pytest.approx(2500.0)
    for outside in (0.5, 101.0, 0.0):
        assert math.isnan(quantization_ways.interpolated(sizes, losses, outside))
    assert math.isnan(quantization_ways.interpolated([], [], 1.0))


def test_headlines_compare_the_curve_with_the_entry_and_with_gptq():
    curve = [dict(bytes=size, loss_bpb=1 / size) for size in (10, 100, 1000)]
    entry = dict(bytes=1000, loss_bpb=0.05)
    sigma = [
        dict(way="inside", bytes=50, loss_bpb=0.1),
        dict(way="outside", bytes=5, loss_bpb=0.1),
    ]
    found = quantization_ways.headlines(entry, sigma, curve)
    assert found["loss_share_at_bytes_of_int6"] == pytest.approx(0.02)
    assert found["bytes_share_at_loss_of_int6"] == pytest.approx(0.02)
    assert found["loss_over_sigma_gptq_each"] == {"inside": pytest.approx(0.2)}
    assert found["loss_over_sigma_gptq"] == pytest.approx(0.2)
    assert math.isnan(quantization_ways.headlines(entry, [], curve)["loss_over_sigma_gptq"])


# ---- What is refused


def test_a_file_of_another_program_is_named(here, capsys):
    (here / "other.pt").write_bytes(b"no weights")
    assert quantization.main(["other.pt"]) == 2
    err = capsys.readouterr().err
    assert "other.pt: not kept by this program" in err
    assert err.count("\n") == 1
    assert (here / "other.pt").read_bytes() == b"no weights"


def test_a_model_of_another_script_is_named(compared, here, capsys):
    kept = torch.load(compared[0] / "tiny.pt", weights_only=True)
    kept["weights"]["a.renamed.one"] = kept["weights"].popitem()[1]
    torch.save(kept, here / "other.pt")
    assert quantization.main(["other.pt"]) == 2
    assert "kept with another train_gpt.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no/such/folder.pt"], "no/such is not a folder"),
        (["tiny.pt", "--json", "nowhere/a.json"], "nowhere is not a folder"),
        (["tiny.pt", "--plot", "nowhere/a.png"], "nowhere is not a folder"),
        (["tiny.pt", "--tokens", "few"], "--help lists the options"),
    ],
)
def test_bad_options_are_named_before_anything_is_trained(here, arguments, message, capsys):
    assert quantization.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(here.iterdir())


def test_a_wrong_setting_is_one_line(here, monkeypatch, capsys):
    monkeypatch.setenv("NUM_LAYERS", "many")
    assert quantization.main(["tiny.pt"]) == 2
    assert capsys.readouterr().err.startswith("error: settings: NUM_LAYERS=many must be")


def test_a_plot_without_matplotlib_is_refused_before_anything_is_trained(here, monkeypatch, capsys):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    assert quantization.main(["tiny.pt", "--plot", "a.png"]) == 2
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err
    assert not list(here.iterdir())


# ---- sizes.py: shapes and sizes


def test_each_shape_is_trained_once_and_quantized_to_each_size(here, capsys):
    pytest.importorskip("matplotlib")
    call = ["MLP_MULT=2 NUM_LAYERS=1", "--out", "found", "--bytes", "9000,7000"]
    call += ["--seeds", "2", "--tokens", "500"]
    assert sizes.main(call) == 0
    out = capsys.readouterr().out
    models = json.loads((here / "found/sizes.json").read_text())
    assert [(model["shape"], model["seed"]) for model in models] == [
        ("base", 1),
        ("NUM_LAYERS=1 MLP_MULT=2.0", 1),
        ("base", 2),
        ("NUM_LAYERS=1 MLP_MULT=2.0", 2),
    ]
    assert models[0]["parameters"] > models[1]["parameters"]
    assert models[0]["float_bpb"] != models[2]["float_bpb"]
    for model in models:
        assert [row["asked"] for row in model["sizes"]] == [7000, 9000]
        for row in model["sizes"]:
            assert row["bytes"] <= row["asked"]
            assert row["val_bpb"] == pytest.approx(model["float_bpb"] + row["loss_bpb"])
    mean = (models[0]["sizes"][0]["val_bpb"] + models[2]["sizes"][0]["val_bpb"]) / 2
    assert f"| {mean:.4f} (" in out
    assert (here / "found/sizes.png").read_bytes().startswith(b"\x89PNG")

    # What was kept is not trained again.
    assert sizes.main(call) == 0
    assert "step:" not in capsys.readouterr().out
    assert json.loads((here / "found/sizes.json").read_text()) == models


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["LAYERS=1"], "LAYERS is not a setting"),
        (["NUM_LAYERS"], "NUM_LAYERS: write NAME=value"),
        (["SEED=2"], "SEED=2: every run has its own; use --seeds"),
        ([], "--help lists the options"),
        (["--bytes", "0"], "--help lists the options"),
        (["--bytes", "many"], "--help lists the options"),
        (["--bytes", "3000", "--seeds", "0"], "--seeds 0: write how many"),
        (["NUM_LAYERS=many"], "NUM_LAYERS=many must be"),
    ],
)
def test_bad_shapes_are_named_before_anything_is_trained(here, arguments, message, capsys):
    pytest.importorskip("matplotlib")
    if len(arguments) == 1:
        arguments = [*arguments, "--bytes", "3000"]
    assert sizes.main([*arguments, "--out", "found"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(here.glob("found/*"))
