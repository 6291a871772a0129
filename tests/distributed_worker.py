"""What test_distributed.py measures on one process and on several.

torchrun runs it, with train_gpt.py on PYTHONPATH; rank 0 writes what all ranks found as JSON.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import types
import zlib
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

import train_gpt
from conftest import LANES, LOOPED, VOCAB_SIZE, quiet, tiny_model, tiny_settings
from train_gpt import (
    ByteTable,
    Evaluator,
    Muon,
    ParameterGroup,
    Runtime,
    Trainer,
    TrainingRows,
    build_model,
    find_shards,
    load_tokenizer,
    load_validation,
    start_runtime,
    texts_of_pieces,
)

# 4 rows fall evenly on two ranks, 3 and 5 do not, and of 1 the second rank has none.
TRAINING = dict(
    even={},
    accumulated=dict(micro_batch_tokens=24),
    uneven=dict(train_batch_tokens=72),
    five=dict(train_batch_tokens=120, micro_batch_tokens=48),
    one=dict(train_batch_tokens=24),
    ema=dict(ema_enabled=True),
    trunk=dict(**LOOPED, **LANES, muon_row_normalize=True, min_lr=0.1),
    spelling=dict(spelling_lr=0.005),
)
# The pass, the number of tokens, and changes of the settings.
EVALUATION = dict(
    plain=("plain", 501, {}),
    sliding=("sliding", 501, {}),
    fewer_windows_than_ranks=("sliding", 12, {}),
    full_batches=("sliding", 621, dict(eval_batch_seqs=4)),
    one_target=("plain", 2, {}),
)


def train(folder: Path, runtime: Runtime, **changes) -> dict:
    """Losses of every step and the exported weights of a run through Trainer."""
    changes = {**dict(iterations=6, warmdown_iters=4), **changes}
    s = tiny_settings(vocab_size=VOCAB_SIZE, train_log_every=1, **changes)
    data = TrainingRows(find_shards(folder, "train"), s.train_seq_len, s.seed, VOCAB_SIZE)
    pieces = texts_of_pieces(load_tokenizer(folder / "tokenizer.model", VOCAB_SIZE))
    trainer = Trainer(build_model(s, runtime), s, runtime, quiet, data, 0, pieces)
    trainer.warm_up()
    losses = []
    report = trainer.report

    def keeping(*arguments) -> None:
        report(*arguments)
        losses.append(trainer.train_loss)

    trainer.report = keeping
    trainer.run(None)
    trainer.average.load_into(trainer.stored)
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return dict(
        losses=losses,
        weights=weights[::97].tolist(),
        digest=zlib.crc32(weights.numpy().tobytes()),
        steps=trainer.steps,
        qat_steps=trainer.qat_steps,
        seconds=trainer.clock.seconds,
    )


def muon(runtime: Runtime) -> list[float]:
    """Weights after three steps of Muon on five matrices of one shape, one of another, and a pair.

    Of these the last has a rate of its own.
    """
    generator = torch.Generator().manual_seed(5)
    shapes = [(8, 8)] * 5 + [(24, 8)] + [(8, 24)] * 2
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    groups = [
        ParameterGroup("attention", weights[:-1], learning_rate=1.0, weight_decay=0.04),
        ParameterGroup("mlp", weights[-1:], learning_rate=0.5, weight_decay=0.04),
    ]
    optimizer = Muon(groups, tiny_settings(), runtime)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step(scale=0.1, momentum=0.9)
    return torch.cat([weight.detach().flatten() for weight in weights]).tolist()


@contextlib.contextmanager
def without_newer_names():
    """torch.distributed as it was before 2.13."""
    with contextlib.ExitStack() as stack:
        if hasattr(dist, "all_gather_single"):
            stack.enter_context(mock.patch.object(dist, "all_gather_single"))
            del dist.all_gather_single
        yield


def evaluate(folder: Path, runtime: Runtime, name: str, length: int, changes: dict) -> dict:
    """A score of the first tokens of the validation split."""
    model = tiny_model(runtime, vocab_size=VOCAB_SIZE, **changes)
    table = ByteTable(load_tokenizer(folder / "tokenizer.model", VOCAB_SIZE))
    tokens = load_validation(find_shards(folder, "val"), VOCAB_SIZE)[:length]
    settings = tiny_settings(vocab_size=VOCAB_SIZE, **changes)
    score = Evaluator(settings, runtime, table, quiet).score(model, tokens, name)
    return dict(
        val_loss=score.val_loss, val_bpb=score.val_bpb, targets=score.targets, bytes=score.bytes
    )


def train_by_clock(folder: Path, runtime: Runtime) -> dict:
    """A run that the clock ends after about 50 readings.

    Each rank's clock has a speed of its own, so that ranks which read their own would part.
    """
    readings = itertools.count()

    def perf_counter() -> float:
        return next(readings) * 0.1 * (1 + runtime.rank)

    clock = types.SimpleNamespace(perf_counter=perf_counter)
    changes = dict(iterations=100_000, max_wallclock_seconds=5.0, late_qat_threshold=0.5)
    with mock.patch.object(train_gpt, "time", clock):
        return train(folder, runtime, **changes)


def measure(folder: Path, runtime: Runtime) -> dict:
    """Everything, the same for any number of ranks."""
    return dict(
        training={name: train(folder, runtime, **changes) for name, changes in TRAINING.items()},
        muon=muon(runtime),
        evaluation={name: evaluate(folder, runtime, *case) for name, case in EVALUATION.items()},
    )


def main() -> None:
    """Measure as a rank, and have rank 0 write what all found."""
    folder = Path(sys.argv[1])
    output = Path(sys.argv[2])
    settings = tiny_settings(device="cpu", dtype="float32", attention="sdpa", compile="0")
    runtime = start_runtime(settings)
    found = measure(folder, runtime)
    found["by_clock"] = train_by_clock(folder, runtime)
    with without_newer_names():
        found["muon_by_older_names"] = muon(runtime)
    everyone = [None] * runtime.world_size
    dist.all_gather_object(everyone, found)
    if runtime.rank == 0:
        output.write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads may abort an interpreter that ends in the ordinary way.
    os._exit(0)


if __name__ == "__main__":
    main()
