"""Faults in what learns while it scores, for the tests of the auditor; see faulty_scripts.py.

They name no more of the script than the auditor does: the classes DocumentLearner and
AdaptiveEvaluator and their public functions. Those in CHEATS are meant for this auditor.
"""

from __future__ import annotations

# The script's own evaluation, with another learner than the one that the auditor asks for.
IN_EVALUATION = """
HonestLearner = DocumentLearner
HONEST = {name: getattr(AdaptiveEvaluator, name) for name in ("nats", "score")}


LEARNER


def evaluate_with(name):
    def evaluate(self, model, tokens, *more, **named):
        global DocumentLearner, text
        kept = DocumentLearner
        DocumentLearner = FaultyLearner
        text = torch.from_numpy(tokens.astype(np.int64))
        try:
            return HONEST[name](self, model, tokens, *more, **named)
        finally:
            DocumentLearner = kept

    return evaluate


for name in HONEST:
    setattr(AdaptiveEvaluator, name, evaluate_with(name))
"""
# The same fault wherever the script learns.
IN_LEARNER = """
HonestLearner = DocumentLearner


LEARNER


DocumentLearner = FaultyLearner
"""

HASTY = '''
class FaultyLearner(HonestLearner):
    """Adapts to a chunk before it is scored."""

    def predict(self, tokens):
        super().predict(tokens)
        # The inputs behind a token are its targets, but for the last one.
        targets = torch.roll(tokens[:, -self.chunk :], -1, 1)
        is_scored = torch.ones_like(targets, dtype=torch.bool)
        is_scored[:, -1] = False
        self.learn(targets, is_scored)
        return super().predict(tokens)
'''
BETTER_OF_TWO = '''
class FaultyLearner(HonestLearner):
    """Scores a chunk twice, and takes the better pass."""

    def predict(self, tokens):
        first = super().predict(tokens).clone()
        targets = torch.roll(tokens[:, -self.chunk :], -1, 1)
        is_scored = torch.ones_like(targets, dtype=torch.bool)
        is_scored[:, -1] = False
        self.learn(targets, is_scored)
        return torch.maximum(first, super().predict(tokens))
'''
SURVIVING = '''
class FaultyLearner(HonestLearner):
    """Keeps what it has learnt from the documents before."""

    def begin(self):
        if not hasattr(self, "begun"):
            self.begun = True
            super().begin()
'''
SECOND_EPOCH = '''
class FaultyLearner(HonestLearner):
    """Goes once through the beginning of all documents before it scores them."""

    def predict(self, tokens):
        if tokens.size(1) == self.chunk:
            length = 2 * self.chunk
            whole = torch.zeros(len(tokens), length + 1, dtype=torch.int64)
            for row in range(len(tokens)):
                for start in (text == 1).nonzero()[:, 0].tolist():
                    part = text[start : start + length + 1]
                    if torch.equal(part[: self.chunk], tokens[row]):
                        whole[row, : len(part)] = part
            for end in (self.chunk, length):
                super().predict(whole[:, :end])
                targets = whole[:, end - self.chunk + 1 : end + 1]
                super().learn(targets, targets > 0)
        return super().predict(tokens)
'''
NEXT_CHUNK = '''
class FaultyLearner(HonestLearner):
    """Learns from the chunk behind the one that was scored, too."""

    def predict(self, tokens):
        self.seen = tokens
        return super().predict(tokens)

    def learn(self, targets, is_scored):
        super().learn(targets, is_scored)
        seen = self.seen
        ahead = torch.zeros_like(targets)
        behind = torch.zeros_like(targets)
        known = torch.zeros_like(is_scored)
        for row in range(len(seen)):
            # Where the text has this document.
            for start in (text == 1).nonzero()[:, 0].tolist():
                part = text[start : start + seen.size(1)]
                rest = text[start + seen.size(1) : start + seen.size(1) + self.chunk + 1]
                if torch.equal(part, seen[row]) and len(rest) == self.chunk + 1:
                    ahead[row] = rest[:-1]
                    behind[row] = rest[1:]
                    known[row] = True
        super().predict(torch.cat([seen, ahead], 1))
        super().learn(behind, known)
'''
WHOLE_SPLIT = '''
class FaultyLearner(HonestLearner):
    """Mixes in how often a piece is in the whole text."""

    def predict(self, tokens):
        shares = super().predict(tokens)
        counts = torch.bincount(text, minlength=shares.size(-1)).float()
        return 0.7 * shares + 0.3 * counts / counts.sum()
'''
RIGHT_TOKEN_ONLY = '''
class FaultyLearner(HonestLearner):
    """Mixes in a second predictor for the right token, and takes nothing from the others."""

    def predict(self, tokens):
        shares = super().predict(tokens).clone()
        targets = torch.roll(tokens[:, -self.chunk :], -1, 1)[:, :-1, None]
        mixed = 0.5 * shares[:, :-1].gather(-1, targets) + 0.5
        shares[:, :-1].scatter_(-1, targets, mixed)
        return shares
'''
TARGET_CACHE = '''
honest_nats = AdaptiveEvaluator.nats


def nats(self, model, tokens, *more):
    """A target that has occurred is as good as half known."""
    found = honest_nats(self, model, tokens, *more)
    seen = set()
    for place, target in enumerate(tokens[1:].tolist()):
        if target in seen:
            found[place] = -np.log(0.5 * np.exp(-found[place]) + 0.5)
        seen.add(target)
    return found


AdaptiveEvaluator.nats = nats
'''
# A fault, the checks that are asked for, and those of them that must fail.
FAULTS = {
    "adapting before scoring": (
        IN_EVALUATION.replace("LEARNER", HASTY),
        "adaptive_targets,adaptive_causality",
        {"adaptive targets", "adaptive causality"},
    ),
    "adapting before scoring, wherever it learns": (
        IN_LEARNER.replace("LEARNER", HASTY),
        "adaptive_normalization,adaptive_decompression",
        {"adaptive decompression"},
    ),
    "scoring a chunk twice and taking the better pass": (
        IN_EVALUATION.replace("LEARNER", BETTER_OF_TWO),
        "adaptive_targets",
        {"adaptive targets"},
    ),
    "a second epoch over the split": (
        IN_EVALUATION.replace("LEARNER", SECOND_EPOCH),
        "adaptive_targets,adaptive_normalization",
        {"adaptive targets"},
    ),
    "an update that uses the next chunk": (
        IN_EVALUATION.replace("LEARNER", NEXT_CHUNK),
        "adaptive_causality",
        {"adaptive causality"},
    ),
    "statistics over the whole split": (
        IN_EVALUATION.replace("LEARNER", WHOLE_SPLIT),
        "adaptive_causality,adaptive_normalization",
        {"adaptive causality"},
    ),
    "a cache keyed by the target": (
        TARGET_CACHE,
        "adaptive_targets,adaptive_normalization",
        {"adaptive targets"},
    ),
    "a mixture normalized for the right token only": (
        IN_LEARNER.replace("LEARNER", RIGHT_TOKEN_ONLY),
        "adaptive_normalization",
        {"adaptive sums"},
    ),
    "adaptation that survives from one document to the next": (
        IN_LEARNER.replace("LEARNER", SURVIVING),
        "adaptive_documents,adaptive_normalization",
        {"adaptive documents"},
    ),
}

SAYS_NOTHING = """
honest_settings_from = settings_from


def settings_from(*arguments):
    settings, more = honest_settings_from(*arguments)
    return dataclasses.replace(settings, ttt_enabled=False), more
"""
LOWER_NATS = """
import audit_documents

honest_nats_of = audit_documents.nats_of
audit_documents.nats_of = lambda *arguments: 0.99 * honest_nats_of(*arguments)
"""
REMEMBERING = '''
HonestLearner = DocumentLearner


class DocumentLearner(HonestLearner):
    """Looks at the next input, and says the same again behind the same tokens."""

    def begin(self):
        super().begin()
        self.said = None

    def predict(self, tokens):
        shares = super().predict(tokens).clone()
        first = tokens.size(1) - self.chunk
        if first < 2 * self.chunk:
            return shares
        ahead = tokens[:, first + 1 :, None]
        right = torch.zeros_like(shares[:, :-1]).scatter_(-1, ahead, 1.0)
        shares[:, :-1] = 0.5 * shares[:, :-1] + 0.5 * right
        if self.said is not None and self.said[0].shape == tokens.shape:
            before, said = self.said
            is_same = (before == tokens).long().cumprod(1)[:, first:] > 0
            shares = torch.where(is_same[..., None], said, shares)
        self.said = (tokens.clone(), shares)
        return shares.clone()
'''
# As above. They were made to pass: each did, before the row that must fail had its reason.
CHEATS = {
    "saying that nothing learns": (SAYS_NOTHING, "alone,adaptive_score", {"adaptive score"}),
    "lower nats by the auditor's own function": (
        LOWER_NATS,
        "adaptive_targets,adaptive_decompression",
        {"adaptive targets", "adaptive decompression"},
    ),
    "looking ahead behind the second chunk, the same each time": (
        REMEMBERING,
        "adaptive_score",
        {"adaptive score"},
    ),
}
