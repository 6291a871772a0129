"""The rules of the challenge that records keep or miss: cap, clocks, machine, text."""

from __future__ import annotations

import fineweb
from run_logs import LABELS, Log

# The track of the challenge itself.
CHALLENGE = "10min_16mb"
# Bytes of script and artifact together.
CAP = 16_000_000
# Seconds of training, and seconds of evaluation.
LIMIT = 600
GPUS = 8
GPU = "H100"
# By how many nats a token, and how surely, a record beats the last one.
NATS = 0.005
P_VALUE = 0.01


def hardware(log: Log) -> str:
    """Name the devices of a run: '8×NVIDIA H100 80GB HBM3', 'CPU, 2 threads'."""
    if log.device is None:
        return f"UNKNOWN, {log.threads} threads"
    if log.device.kind.startswith("cuda"):
        return f"{log.world_size}×{log.device.name}"
    named = f"{log.device.kind.upper()}, {log.threads} threads"
    if log.world_size > 1:
        named += f" in each of {log.world_size} processes"
    return named


def machines(logs: list[Log]) -> str:
    """Name the devices of all runs, each once."""
    return "; ".join(sorted({hardware(log) for log in logs}))


def foreign_to_challenge(log: Log) -> list[str]:
    """Say why a run's score is none of the challenge's, whatever its track."""
    reasons = []
    devices = hardware(log)
    if not (devices.startswith(f"{GPUS}×") and GPU in devices):
        run = "CPU run" if devices.startswith("CPU") else f"Run on {devices}"
        reasons.append(f"{run}, not the challenge's hardware ({GPUS}×{GPU})")
    return reasons + foreign_text(log)


def foreign_text(log: Log) -> list[str]:
    """Say why what a run was scored on, or trained on, is not the challenge's.

    What its log does not state is no reason.
    """
    reasons = []
    stated = log.compliance or {}
    score = log.score(LABELS["sliding"])
    size = 0 if score is None else score.bytes
    documents = stated.get("validation_documents", fineweb.DOCUMENTS)
    if not fineweb.has_known_bytes(size):
        reasons.append(
            f"Scored on a text of {size:,} bytes, not on the challenge's FineWeb validation text"
        )
    elif documents != fineweb.DOCUMENTS:
        reasons.append(
            f"Scored on {documents:,} documents, not on the {fineweb.DOCUMENTS:,} of the "
            "challenge's validation text"
        )
    split = str(stated.get("validation_split", ""))
    if split.startswith("part"):
        reasons.append(f"Scored on a part of the validation split ({split.removeprefix('part: ')})")
    for warning in stated.get("data_warnings", []):
        if "validation documents are among the training documents" in warning:
            reasons.append(f"Trained on validation text: {warning}")
        elif warning.startswith("the text is normalized"):
            reasons.append(f"Its log says: {warning}")
    return reasons
