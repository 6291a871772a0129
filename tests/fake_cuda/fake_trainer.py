"""A trainer of the record preset on fake tensors, as one rank of eight H100s would have it."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
import torch.distributed as dist

# Collectives on fake tensors, which torch 2.9 registers here; newer ones do it by themselves.
import torch.distributed._tools.fake_collectives  # noqa: F401
from torch.testing._internal.distributed.fake_pg import FakeStore

import train_gpt
from train_gpt import Runtime, Trainer

# QUANT=fit would need to know the gradients.
SETTINGS = dict(PRESET="record", VOCAB_SIZE="1024", INT5_MLP="1", WARMUP_STEPS="1")
# Few layers have as many graphs and the same types as eleven: the first is looped, the last has two
# lanes. Of three, not looped yet, the last takes no skip.
LOOPED = dict(SETTINGS, NUM_LOOPS="1", LOOP_START="0", LOOP_END="0")
SHALLOW = dict(LOOPED, NUM_LAYERS="2", BACKOUT_LAYER="0", PARALLEL_START_LAYER="1")
ODD = dict(LOOPED, NUM_LAYERS="3", BACKOUT_LAYER="1", PARALLEL_START_LAYER="2")


class Rows:
    """Training rows that are all alike."""

    num_rows = 1 << 20
    length = 2048

    def row(self, position: int) -> np.ndarray:
        """One of them."""
        return np.zeros(self.length + 1, dtype=np.int64)


def quiet(line: str, console: bool = True) -> None:
    """A log that keeps nothing."""


def make_trainer(environment: dict[str, str] = SETTINGS, **changes) -> Trainer:
    """A trainer with settings from this environment; `changes` are those of its Runtime."""
    settings = train_gpt.settings_from(environment)[0]
    runtime = dict(
        rank=0,
        world_size=8,
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        attention="flash3",
    )
    runtime = Runtime(**{**runtime, **changes})
    model = train_gpt.build_model(settings, runtime)
    pieces = [str(token) for token in range(settings.vocab_size)]
    return Trainer(model, settings, runtime, quiet, Rows(), 0, pieces)


@contextlib.contextmanager
def ranks():
    """Eight ranks of which this process is one, and the others are silent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()
