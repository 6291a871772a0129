"""Two ranks on gloo against one process: training, Muon, evaluation, and that the ranks stay together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import numpy as np
import pytest
import torch

from train_gpt import Runtime

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def ranks(data_folder, tmp_path_factory) -> list[dict]:
    """What each of two ranks found, under torchrun."""
    output = tmp_path_factory.mktemp("ranks") / "found.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(WORKER),
        str(data_folder),
        str(output),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=output.parent, capture_output=True, text=True, timeout=120
    )
    errors = [
        line for line in done.stderr.splitlines() if line.startswith("[rank") and "Error" in line
    ]
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
    for found in (rank["training"][case] for rank in ranks):
        np.testing.assert_allclose(found["losses"], expected["losses"], atol=1e-4, rtol=0)
        np.testing.assert_allclose(found["weights"], expected["weights"], atol=2e-3, rtol=0)
        assert (found["steps"], found["qat_steps"]) == (6, expected["qat_steps"])


@pytest.mark.parametrize("case", distributed_worker.TRAINING)
def test_all_ranks_have_the_same_weights_to_the_bit(ranks, case):
    assert ranks[0]["training"][case]["digest"] == ranks[1]["training"][case]["digest"]


def test_muon_on_two_ranks_equals_muon_on_one(ranks, alone):
    assert ranks[0]["muon"] == ranks[1]["muon"]
    np.testing.assert_allclose(ranks[0]["muon"], alone["muon"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", distributed_worker.EVALUATION)
def test_evaluation_on_two_ranks_equals_evaluation_on_one(ranks, alone, case):
    expected = alone["evaluation"][case]
    assert expected["targets"] == distributed_worker.EVALUATION[case][1] - 1
    for found in (rank["evaluation"][case] for rank in ranks):
        assert (found["targets"], found["bytes"]) == (expected["targets"], expected["bytes"])
        np.testing.assert_allclose(found["val_loss"], expected["val_loss"], rtol=1e-6)
        np.testing.assert_allclose(found["val_bpb"], expected["val_bpb"], rtol=1e-6)


def test_ranks_stop_at_the_same_step_when_the_clock_ends_the_run(ranks):
    first, second = (rank["by_clock"] for rank in ranks)
    assert 20 < first["steps"] < 60 and first["steps"] == second["steps"]
    assert first["qat_steps"] == second["qat_steps"] > 0
    assert first["seconds"] == second["seconds"] and first["digest"] == second["digest"]
