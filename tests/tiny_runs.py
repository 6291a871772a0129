"""The environment of tiny runs of the commands in records/, and how the tests call these."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import train_gpt
from conftest import ROOT, VOCAB_SIZE

# Seconds after which a call has failed: a busy machine needs many of them.
PATIENCE = 900.0
# Settings of a model that takes milliseconds, for the data of the fixture data_folder.
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
    DOCUMENT_ATTENTION="0",
    ROPE_DIMS="4",
    TRAIN_SEQ_LEN="24",
    EVAL_SEQ_LEN="24",
    EVAL_STRIDE="6",
    EVAL_BATCH_SEQS="4",
    TRAIN_BATCH_TOKENS="96",
    MICRO_BATCH_TOKENS="96",
    DEVICE="cpu",
)


def call_command(
    name: str, *arguments: str, folder: Path | None = None, **settings: str
) -> subprocess.CompletedProcess:
    """Call a command of records/ in a process of its own; no settings are set but these."""
    known = {field.name.upper() for field in train_gpt.fields_of()}
    environment = {key: text for key, text in os.environ.items() if key not in known}
    return subprocess.run(
        [sys.executable, str(ROOT / "records" / name), *arguments],
        env={**environment, "OMP_NUM_THREADS": "1", **settings},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=folder,
    )
