"""The audited script with its artifact, as a module: all that the auditor asks of a script."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

# Windows of a forward pass, wherever what is computed shall be what is scored.
BATCH = 8


def import_script(path: Path) -> ModuleType:
    """Import a script as the module `candidate`."""
    specification = importlib.util.spec_from_file_location("candidate", path)
    script = importlib.util.module_from_spec(specification)
    # Dataclasses look up the module that they are defined in.
    sys.modules["candidate"] = script
    specification.loader.exec_module(script)
    return script


def silent(*words: object, **named: object) -> None:
    """Stand in for the script's log."""


class Candidate:
    """The artifact's model, on a CPU and not compiled, and the script's own evaluation of it.

    `job` is a worker's: the artifact's path, variables for the script, and threads.
    """

    def __init__(self, job: dict):
        script = import_script(Path("train_gpt.py"))
        artifact = job["artifact"]
        manifest, weights = script.read_artifact(Path(artifact).read_bytes(), artifact)
        self.stored = manifest["settings"]
        environment = {**job["environment"], "ARTIFACT": artifact}
        self.settings, _ = script.settings_from(environment, self.stored)
        runtime = script.start_runtime(self.settings)
        torch.set_num_threads(job["threads"])
        torch.set_grad_enabled(False)
        self.model = script.build_model(self.settings, runtime)
        self.model.load_state_dict(weights, strict=False)
        tokenizer = script.load_tokenizer(Path(job["tokenizer"]), self.settings.vocab_size)
        self.table = script.ByteTable(tokenizer)
        self.evaluator = script.Evaluator(self.settings, runtime, self.table, silent)
        # Tokens of text in a window of the evaluation: memory tokens take the other places.
        self.window = self.settings.eval_seq_len - self.settings.memory_tokens
        self.stride = self.settings.eval_stride

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return scores of what follows each token: float32 (batch, length, vocabulary).

        `tokens`: (batch, length).
        """
        return self.model.logits(torch.from_numpy(tokens.astype(np.int64))).numpy()

    def losses(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return what the script's evaluation counts, in nats, for a target behind each token.

        `tokens`, `targets` and, float64, what is returned: (batch, length).
        """
        inputs = torch.from_numpy(tokens.astype(np.int64))
        wanted = torch.from_numpy(targets.astype(np.int64))
        positions = torch.arange(inputs.size(1)).expand(inputs.shape).contiguous()
        return self.evaluator.token_losses(self.model, inputs, wanted, positions).double().numpy()


def own_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the nats of targets (...,) under logits (..., vocabulary): float64 (...,)."""
    scores = logits.astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    chosen = np.take_along_axis(scores, targets.astype(np.int64)[..., None], -1)[..., 0]
    return np.log(np.exp(scores).sum(-1)) - chosen
