"""Two ranks on gloo against one process: training, Muon, evaluation, and that they end together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import distributed_worker
import train_gpt
from conftest import ROOT
from train_gpt import Runtime

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def ranks(data_folder, tmp_path_factory) -> list[dict]:
    """What each of two ranks found, under torchrun."""
    output = tmp_path_factory.mktemp("ranks") / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(WORKER), str(data_folder), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # The limit is for ranks that wait for each other for ever.
    done = subprocess.run(
        command, env=environment, cwd=output.parent, capture_output=True, text=True, timeout=900
    )
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("[rank") and "Error" in line]
    assert done.returncode == 0, "\n".join(errors) or done.stderr[-2000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def alone(data_folder) -> dict:
    """What one process finds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = distributed_worker.measure(data_folder, Runtime())
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("case", distributed_worker.TRAINING)
def test_two_ranks_train_as_one_process_does(ranks, alone, case):
    expected = alone["training"][case]
    assert expected["steps"] == 6 and expected["losses"][-1] < expected["losses"][0]
    for rank in ranks:
        found = rank["training"][case]
        np.testing.assert_allclose(found["losses"], expected["losses"], atol=1e-4, rtol=0)
        np.testing.assert_allclose(found["weights"], expected["weights"], atol=2e-3, rtol=0)
        assert (found["steps"], found["qat_steps"]) == (6, expected["qat_steps"])


@pytest.mark.parametrize("case", distributed_worker.TRAINING)
def test_all_ranks_have_the_same_weights_to_the_bit(ranks, case):
    first, second = (rank["training"][case]["digest"] for rank in ranks)
    assert first == second


def test_muon_on_two_ranks_equals_muon_on_one(ranks, alone):
    first, second = (rank["muon"] for rank in ranks)
    assert first == second
    np.testing.assert_allclose(first, alone["muon"], rtol=1e-5, atol=1e-6)


def test_ranks_gather_alike_by_the_names_that_torch_had_before_2_13(ranks):
    for rank in ranks:
        assert rank["muon_by_older_names"] == rank["muon"]


@pytest.mark.parametrize(
    "names, chosen",
    [
        (["all_gather_single", "all_gather_into_tensor"], "all_gather_single"),
        (["all_gather_single"], "all_gather_single"),
        (["all_gather_into_tensor"], "all_gather_into_tensor"),
    ],
)
def test_the_name_that_is_there_gathers(monkeypatch, names, chosen):
    calls = []

    def make(name: str):
        def gather(*arguments, **options):
            calls.append((name, arguments, options))
            return "a handle"

        return gather

    functions = {name: make(name) for name in names}
    monkeypatch.setattr(train_gpt, "dist", types.SimpleNamespace(**functions))
    whole = torch.zeros(4, 2)
    share = torch.ones(2, 2)
    assert train_gpt.start_all_gather(whole, share) == "a handle"
    ((name, arguments, options),) = calls
    assert name == chosen and options == dict(async_op=True)
    assert arguments[0] is whole and arguments[1] is share


@pytest.mark.parametrize("case", distributed_worker.EVALUATION)
def test_evaluation_on_two_ranks_equals_evaluation_on_one(ranks, alone, case):
    expected = alone["evaluation"][case]
    assert expected["targets"] == distributed_worker.EVALUATION[case][1] - 1
    for rank in ranks:
        found = rank["evaluation"][case]
        assert (found["targets"], found["bytes"]) == (expected["targets"], expected["bytes"])
        np.testing.assert_allclose(found["val_loss"], expected["val_loss"], rtol=1e-6)
        np.testing.assert_allclose(found["val_bpb"], expected["val_bpb"], rtol=1e-6)


def test_ranks_stop_at_the_same_step_when_the_clock_ends_the_run(ranks):
    first, second = (rank["by_clock"] for rank in ranks)
    assert 20 < first["steps"] < 60 and first["qat_steps"] > 0
    assert first == second
