"""records/quantization.py on a tiny model: its table, its figures, its plot, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_bench import TINY

TOOL = ROOT / "records" / "quantization.py"
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


def compare(data_folder, folder, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        **RUN,
        "DATA_PATH": str(data_folder),
        "OMP_NUM_THREADS": "1",
        **changes,
    }
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=folder,
    )


@pytest.fixture(scope="module")
def compared(data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantization")
    pytest.importorskip("matplotlib")
    done = compare(
        data_folder,
        folder,
        "tiny.pt",
        "--tokens",
        "2000",
        "--json",
        "found.json",
        "--plot",
        "loss.png",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done, json.loads((folder / "found.json").read_text())


def test_all_ways_are_in_the_table_and_the_file(compared):
    folder, done, found = compared
    ways = [row["way"] for row in found["rows"]]
    assert len(ways) == len(set(ways)) == 26
    for row in found["rows"]:
        assert f"| {row['way']} | {row['bytes']:,} |" in done.stdout
        assert row["val_bpb"] == pytest.approx(found["float"]["val_bpb"] + row["loss_bpb"])
        assert row["bits"] > 0 and row["seconds"] > 0
    by_way = {row["way"]: row for row in found["rows"]}
    assert by_way["int5 MLP, zstd"]["bytes"] < by_way["int6 rows, zstd"]["bytes"]
    assert by_way["int6 rows, rANS"]["val_bpb"] == by_way["int6 rows, zstd"]["val_bpb"]
    for row in found["rows"]:
        if row["way"].startswith("fit, "):
            share = int(row["way"].split()[1].rstrip("%")) / 100
            assert row["bytes"] <= share * by_way["int6 rows, zstd"]["bytes"] + 1
    assert {
        "loss_share_at_bytes_of_int6",
        "bytes_share_at_loss_of_int6",
        "loss_over_sigma_gptq",
    } < set(found)


def test_a_second_call_compares_the_same_weights(compared, data_folder):
    folder, _, found = compared
    done = compare(data_folder, folder, "tiny.pt", "--tokens", "2000", "--short")
    assert done.returncode == 0 and "step:" not in done.stdout
    assert f"val_bpb={found['float']['val_bpb']}" in done.stdout


def test_the_plot_is_a_picture(compared):
    from PIL import Image

    picture = Image.open(compared[0] / "loss.png").convert("L")
    assert (
        picture.size == (960, 600)
        and picture.getextrema()[0] < 60
        and len(picture.getcolors()) > 20
    )


def test_a_file_of_another_program_is_named(data_folder, tmp_path):
    (tmp_path / "other.pt").write_bytes(b"no weights")
    done = compare(data_folder, tmp_path, "other.pt")
    assert done.returncode == 2 and "other.pt: not kept by this program" in done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / "other.pt").read_bytes() == b"no weights"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no/such/folder.pt"], "is not a folder"),
        (["tiny.pt", "--json", "nowhere/a.json"], "is not a folder"),
    ],
)
def test_bad_paths_are_named_before_anything_is_trained(data_folder, tmp_path, arguments, message):
    done = compare(data_folder, tmp_path, *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
