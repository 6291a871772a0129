"""records/bench.py on a tiny model: its table, its JSON, and that all variants do the same work."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, VOCAB_SIZE

BENCH = ROOT / "records" / "bench.py"
TINY = dict(
    PRESET="pocket",
    COMPILE="0",
    NUM_LAYERS="2",
    MODEL_DIM="16",
    NUM_HEADS="2",
    VOCAB_SIZE=str(VOCAB_SIZE),
    BIGRAM_VOCAB_SIZE="32",
    BIGRAM_DIM="8",
    MEMORY_TOKENS="4",
    ROPE_DIMS="4",
    TRAIN_SEQ_LEN="24",
    EVAL_SEQ_LEN="24",
    EVAL_STRIDE="6",
    EVAL_BATCH_SEQS="4",
    TRAIN_BATCH_TOKENS="96",
    MICRO_BATCH_TOKENS="96",
    DEVICE="cpu",
)


def bench(data_folder, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        **TINY,
        "DATA_PATH": str(data_folder),
        "OMP_NUM_THREADS": "1",
        **changes,
    }
    return subprocess.run(
        [sys.executable, str(BENCH), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_bench_prints_its_table_and_writes_its_figures(data_folder, tmp_path):
    path = tmp_path / "bench.json"
    done = bench(data_folder, "--rounds", "1", "--steps", "4", "--json", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(path.read_text())
    for key in (
        "train_tokens_per_s",
        "train_speedup",
        "eval_speedup",
        "matmul_share",
        "compile_s",
        "peak_memory_bytes",
    ):
        assert found[key] > 0, key
    best, plain = found["variants"]["all optimizations"], found["variants"]["plain path"]
    assert best["train_ratio"] == best["eval_ratio"] == 1.0 and found["recompilations"] == 0
    assert found["train_speedup"] == pytest.approx(1 / plain["train_ratio"])
    assert best["matmul_share"] == pytest.approx(best["train_gflops"] / found["matmul_gflops"])
    for name, row in found["variants"].items():
        assert f"| {name} | {row['train_tokens_per_s']:,.0f} |" in done.stdout
    for name in set(found["variants"]) - {
        "float32"
    }:  # the same steps on the same data, scored alike
        row = found["variants"][name]
        assert row["train_loss"] == pytest.approx(best["train_loss"], abs=0.05), name
        assert row["eval_loss"] == pytest.approx(best["eval_loss"], abs=0.02), name


@pytest.mark.parametrize(
    "arguments, changes, message",
    [
        (["--rounds", "0"], {}, "must be at least 1"),
        (["--json", "/no/such/folder/x.json"], {}, "is not a folder"),
        ([], dict(NUM_LAYERS="many"), "error: settings: NUM_LAYERS=many"),
        ([], dict(DATA_PATH="/no/such/folder"), "error: DATA_PATH=/no/such/folder is not a folder"),
    ],
)
def test_what_cannot_work_is_one_line(data_folder, arguments, changes, message):
    done = bench(data_folder, *arguments, **changes)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
