"""The audited script with its artifact, as a module: all that the auditor asks of a script."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch


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

    `job` is a worker's: the artifact's path, variables for the script, threads, and seconds.
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
        self.seconds = job.get("seconds", math.inf)
        self.script = script
        self.runtime = runtime
        self.model = script.build_model(self.settings, runtime)
        self.model.load_state_dict(weights, strict=False)
        tokenizer = script.load_tokenizer(Path(job["tokenizer"]), self.settings.vocab_size)
        self.table = script.ByteTable(tokenizer)
        self.evaluator = script.Evaluator(self.settings, runtime, self.table, silent)
        # Tokens of text in a window of the evaluation: memory tokens take the other places.
        self.window = self.settings.eval_seq_len - self.settings.memory_tokens
        self.stride = self.settings.eval_stride
        # Whether it learns while it scores (track B); scripts of older records cannot.
        self.adapts = getattr(self.settings, "ttt_enabled", False)
        if self.adapts:
            # Documents side by side, and tokens that are scored before they are learnt from.
            self.documents = self.settings.ttt_batch_size
            self.chunk = self.settings.ttt_chunk_size
            self.adaptive = script.AdaptiveEvaluator(self.settings, runtime, self.table, silent)

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

    def learner(self) -> Learner:
        """Return a learner that has not seen any document."""
        return Learner(self)

    def adaptive_nats(self, tokens: np.ndarray) -> np.ndarray:
        """Return the script's nats of each target of a text: float64 (tokens - 1,)."""
        with torch.enable_grad():
            nats = self.adaptive.nats(self.model, tokens.astype(np.uint16))
        return np.asarray(nats, dtype=np.float64)

    def adaptive_score(self, tokens: np.ndarray):
        """Return the script's Score of a text."""
        with torch.enable_grad():
            return self.adaptive.score(self.model, tokens.astype(np.uint16))


class Learner:
    """The script's DocumentLearner, with arrays in place of tensors."""

    def __init__(self, candidate: Candidate):
        script = candidate.script
        self.learner = script.DocumentLearner(
            candidate.model, candidate.settings, candidate.runtime
        )
        self.documents = candidate.documents
        self.chunk = candidate.chunk
        self.learner.begin()

    def keep(self, rows: int) -> None:
        """Have only the first `rows` documents predicted from here: the others have ended."""
        self.learner.keep(rows)

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Return shares of what follows each of the last `chunk` tokens.

        `inputs`: (documents, length), of those that are kept. Shares: float32 (documents, chunk,
        vocabulary).
        """
        # It gets a copy, which it may keep.
        with torch.enable_grad():
            shares = self.learner.predict(torch.from_numpy(inputs.astype(np.int64)))
        return shares.detach().numpy()

    def learn(self, targets: np.ndarray, is_scored: np.ndarray) -> None:
        """Learn from the last prediction's targets, (documents, chunk), as far as is scored."""
        with torch.enable_grad():
            self.learner.learn(
                torch.from_numpy(targets.astype(np.int64)), torch.from_numpy(is_scored.copy())
            )


def own_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the nats of targets (...,) under logits (..., vocabulary): float64 (...,)."""
    scores = logits.astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    chosen = np.take_along_axis(scores, targets.astype(np.int64)[..., None], -1)[..., 0]
    return np.log(np.exp(scores).sum(-1)) - chosen
