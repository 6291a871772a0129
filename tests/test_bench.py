"""records/bench.py on a tiny model: its workers do the same work; its figures and table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bench
import bench_worker
import train_gpt
from bench_worker import Worker
from conftest import ROOT
from tiny_runs import TINY

FEW = {name: bench.VARIANTS[name] for name in (bench.ALL, bench.PLAIN)}


@pytest.fixture
def tiny(data_folder, monkeypatch) -> None:
    """The environment of a tiny model, for workers in this process and in others."""
    for field in train_gpt.fields_of():
        monkeypatch.delenv(field.name.upper(), raising=False)
    settings = {**TINY, "DTYPE": "float32", "DATA_PATH": str(data_folder), "OMP_NUM_THREADS": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    # A worker may replace it.
    monkeypatch.setattr(train_gpt, "newton_schulz", train_gpt.newton_schulz)
    precision = torch.get_float32_matmul_precision()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


# ---- Workers


@pytest.mark.parametrize("without", [["batches"], ["scored_only"]])
def test_a_worker_without_an_optimization_does_the_same_work(tiny, without):
    # First, since a worker without batches replaces train_gpt's function.
    whole = Worker([])
    trained = whole.train(3)
    evaluated = whole.evaluate(2)

    plain = Worker(without)
    assert plain.train(3)["loss"] == pytest.approx(trained["loss"], abs=1e-4)
    assert plain.evaluate(2)["loss"] == pytest.approx(evaluated["loss"], abs=1e-4)


def test_newton_schulz_by_matrix_sees_one_matrix_at_a_time():
    seen = []

    def newton_schulz(matrices, steps, dtype):
        seen.append(tuple(matrices.shape))
        return matrices * 2

    matrices = torch.arange(12.0).view(3, 2, 2)
    found = bench_worker.by_matrix(newton_schulz)(matrices, 5, torch.float32)
    assert seen == [(1, 2, 2)] * 3
    assert torch.equal(found, matrices * 2)


def test_a_worker_tells_what_a_machine_can_do(tiny, monkeypatch):
    monkeypatch.setattr(bench_worker, "PRODUCT_SIZE_CPU", 64)
    worker = Worker([])
    assert worker.ready() == {}
    start = worker.warm_up(1)
    assert start["warm_up_s"] > 0
    assert start["peak"] is None
    assert any(reason.startswith("dtype:float32") for reason in start["reasons"])
    assert worker.multiply()["flops_per_s"] > 0
    end = worker.finish()
    assert end["peak_memory_bytes"] > 0
    assert end["recompilations"] == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(NUM_LAYERS="many"), "settings: NUM_LAYERS=many"),
        (dict(DATA_PATH="/no/such/folder"), "DATA_PATH=/no/such/folder is not a folder"),
    ],
)
def test_what_a_worker_cannot_do_is_an_error_for_people(tiny, monkeypatch, changes, message):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(train_gpt.UserError, match=message):
        Worker([])


def test_peaks_are_known_by_the_gpus_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert bench_worker.peak_flops(torch.device("cuda")) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert bench_worker.peak_flops(torch.device("cuda")) is None
    assert bench_worker.peak_flops(torch.device("cpu")) is None


# ---- Figures


class Scripted:
    """Stands in for a variant's process: faster from round to round, by variant and script."""

    made: list[tuple[dict, str]] = []

    def __init__(self, variant: dict, environment: dict, script: Path):
        self.made.append((variant, script.parent.parent.name))
        self.start: dict = {}
        self.speed = 1000.0
        if variant.get("without") or script != Path(bench.__file__):
            self.speed = 500.0

    def ask(self, name: str, *arguments) -> dict:
        """What a worker would answer."""
        if name in ("train", "evaluate"):
            self.speed += 100.0
            return dict(tokens_per_s=self.speed, loss=2.0)
        answers = dict(
            ready={},
            warm_up=dict(
                warm_up_s=3.0,
                reasons=["dtype:bfloat16 (x)"],
                flops_per_token=1e6,
                peak=1e10,
            ),
            multiply=dict(flops_per_s=4e9),
            finish=dict(peak_memory_bytes=5_000_000, recompilations=0),
        )
        return answers[name]

    def end(self) -> None:
        """Nothing to wait for."""


def test_figures_are_medians_over_the_rounds(monkeypatch):
    monkeypatch.setattr(bench, "Process", Scripted)
    monkeypatch.setattr(Scripted, "made", [])
    found = bench.measure(rounds=3, steps=4, batches=1)
    assert found["rounds"] == 3
    assert found["steps"] == 12

    # Rounds of 1100, 1300 and 1500; the plain path has 600, 800 and 1000.
    best = found["variants"][bench.ALL]
    plain = found["variants"][bench.PLAIN]
    assert best["train_tokens_per_s"] == found["train_tokens_per_s"] == 1300
    assert best["train_ratio"] == best["eval_ratio"] == 1.0
    assert plain["train_ratio"] == pytest.approx(800 / 1300)
    assert found["train_speedup"] == pytest.approx(1300 / 800)
    assert found["eval_speedup"] == pytest.approx(1400 / 900)

    assert best["train_gflops"] == pytest.approx(1.3)
    assert best["matmul_share"] == pytest.approx(1.3 / 4)
    assert found["mfu"] == pytest.approx(0.13)
    assert best["peak_memory_mb"] == 5.0
    assert len(Scripted.made) == 1 + len(bench.VARIANTS)
    assert set(found["variants"]) == set(bench.VARIANTS)


def test_the_table_has_a_row_for_each_variant(monkeypatch):
    monkeypatch.setattr(bench, "Process", Scripted)
    found = bench.measure(rounds=1, steps=1, batches=1)
    text = bench.table(found)
    for name, row in found["variants"].items():
        assert f"| {name} | {row['train_tokens_per_s']:,.0f} |" in text
    assert "training: 1.83 times the plain path" in text
    assert "0.110 of the GPU's peak (MFU)" in text


def test_float32_is_no_variant_where_it_is_taken_anyway(monkeypatch):
    class InFloat32(Scripted):
        def ask(self, name, *arguments):
            answer = super().ask(name, *arguments)
            if name == "warm_up":
                answer["reasons"] = ["dtype:float32 (no bfloat16 products here)"]
            return answer

    monkeypatch.setattr(bench, "Process", InFloat32)
    found = bench.measure(rounds=1, steps=1, batches=1)
    assert bench.FLOAT32 not in found["variants"]


def test_another_checkout_takes_turns_with_this_one(monkeypatch, tmp_path, capsys):
    (tmp_path / "old/records").mkdir(parents=True)
    (tmp_path / "old/records/bench.py").touch()
    monkeypatch.setattr(bench, "Process", Scripted)
    monkeypatch.setattr(Scripted, "made", [])
    assert bench.main(["--rounds", "1", "--against", str(tmp_path / "old")]) == 0
    assert [script for _, script in Scripted.made] == [ROOT.name, ROOT.name, "old"]
    out = capsys.readouterr().out
    assert "| other checkout | 600 | 0.55 |" in out
    assert "training: 1.83 times the other checkout" in out


# ---- The command


def test_the_bench_prints_its_table_and_writes_its_figures(tiny, tmp_path, capsys, monkeypatch):
    """With processes of their own."""
    monkeypatch.setattr(bench, "VARIANTS", FEW)
    path = tmp_path / "bench.json"
    status = bench.main(["--rounds", "1", "--steps", "2", "--batches", "1", "--json", str(path)])
    assert status == 0
    found = json.loads(path.read_text())
    assert list(found["variants"]) == list(FEW)
    for key in (
        "train_tokens_per_s",
        "train_speedup",
        "eval_speedup",
        "matmul_share",
        "compile_s",
        "peak_memory_bytes",
    ):
        assert found[key] > 0, key
    out = capsys.readouterr().out
    for name, row in found["variants"].items():
        assert f"| {name} | {row['train_tokens_per_s']:,.0f} |" in out


def test_a_workers_error_is_one_line(tiny, monkeypatch, capfd):
    monkeypatch.setenv("DATA_PATH", "/no/such/folder")
    with pytest.raises(SystemExit, match="^error: DATA_PATH=/no/such/folder is not a folder$"):
        bench.main(["--rounds", "1"])
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "must be at least 1"),
        (["--json", "/no/such/folder/x.json"], "is not a folder"),
        (["--against", "/no/such"], "/no/such/records/bench.py is not there"),
        (["--rounds", "few"], "--help lists the options"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, message, capsys):
    assert bench.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
