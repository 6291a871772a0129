"""How the auditor judges numbers that its processes found: tolerances, and what each one means."""

from __future__ import annotations

import math

import numpy as np

from checks import Check

# Bits per byte between two ways to compute a score.
TOLERANCE = 1e-4
# The same, if one is a compiled run in bfloat16, which rounds elsewhere: by 0.00009 as measured.
BFLOAT16_TOLERANCE = 2e-4
# Nats between a loss that is counted and a log-softmax; a sum of probabilities from 1.
LOSS_TOLERANCE = 1e-3
SUM_TOLERANCE = 1e-4
# Nats a target between two ways to compute it, with other rows beside it for one; and if the
# products are in bfloat16. Probes are in float32.
SAME_NATS = 1e-4
BFLOAT16_NATS = 1e-2
# The same of all that is compared, among which rounding goes both ways: by 0 as measured.
BFLOAT16_TOGETHER = 2e-3
# Nats of a single part that products in bfloat16 may move, on top of those for each target.
BFLOAT16_PART = 0.5
# The size of the coded text may differ from its score by this share and by its last byte.
CODING_TOLERANCE = 0.005
# Standard errors in the interval of a score that is known from a sample.
STANDARD_ERRORS = 4
# Minutes for an artifact on two cores, unless others are asked for.
DEFAULT_MINUTES = 3.0


def judge_score(
    claimed: float | None,
    bits: np.ndarray,
    sizes: np.ndarray,
    windows: int,
    tolerance: float,
    margin: float,
    minutes: float = DEFAULT_MINUTES,
    name: str = "score",
    unit: str = "windows",
) -> Check:
    """Compare a claimed score with that of scored windows, of which there are `windows` in all.

    `bits` and bytes of text, `sizes`, are those of each scored window, or other `unit`: (windows,).
    If it is not all of them, the ratio of their sums is an estimate with an interval of four
    standard errors, of a finite population. Then a claim inside of it is proven only if `margin` is
    as wide; else it is said how many of these `minutes` would do.
    """
    found = bits.sum() / sizes.sum()
    scored = len(bits)
    if scored == windows:
        figure = f"own {found:.6f} bpb on all {windows:,} {unit}"
    else:
        residuals = bits - found * sizes
        variance = residuals.var(ddof=1) / scored * (1 - scored / windows)
        tolerance += STANDARD_ERRORS * math.sqrt(variance) / sizes.mean()
        figure = f"own {found:.4f} ± {tolerance:.4f} bpb on {scored:,} of {windows:,} {unit}"
    if claimed is None:
        return Check(name, None, f"{figure}; no claim")
    figure = f"claimed {claimed:.6f}, {figure}"
    agrees = abs(found - claimed) <= tolerance
    if agrees and tolerance > margin:
        share = share_that_proves(tolerance, margin, scored, windows)
        advice = f"--minutes {math.ceil(1.2 * minutes * share)} would do"
        return Check(name, None, f"{figure}: not known to {margin}", unproven=advice)
    return Check(name, bool(agrees), figure)


def share_that_proves(tolerance: float, margin: float, scored: int, windows: int) -> float:
    """How many times the scored windows it takes until the interval is as narrow as the margin.

    The interval goes with the root of 1/n - 1/N for n windows of N.
    """
    spread = tolerance**2 / (1 / scored - 1 / windows)
    return 1 / (margin**2 / spread + 1 / windows) / scored


def judge_causality(found: dict) -> tuple[bool, str]:
    """No number up to a point changes with the text behind it, and later ones do."""
    figure = f"{found['places']} places with other text behind them, "
    figure += f"{found['compared']:,} numbers up to them, "
    figure += f"largest difference {found['difference']:.3g}"
    if found["wrong"]:
        figure += f", after changes behind tokens {found['wrong'][:5]}"
    if not found["moved"]:
        figure += "; later losses did not change either"
    return found["moved"] and not found["wrong"], figure


def judge_normalization(found: dict) -> tuple[bool, str]:
    """Losses are those of a log-softmax, and the probabilities of all pieces sum to 1."""
    passed = found["difference"] <= LOSS_TOLERANCE and found["brute"] <= SUM_TOLERANCE
    figure = f"losses {found['difference']:.2g} nats from log-softmax "
    figure += f"at {found['places']:,} places; sums over the vocabulary "
    figure += f"{found['brute']:.2g} from 1 at {found['brute_places']} places"
    return passed, figure


def judge_coding(
    name: str, is_same: bool, targets: int, count: int, size: int, head: int, stated: float
) -> Check:
    """Compare the size of a coded text, in bytes, with the score that is stated of it.

    `count`: bytes of the text; `head`: those at the beginning of the file that only count.
    """
    rate = 8 * (size - head) / max(count, 1)
    # The last byte is not full.
    allowed = CODING_TOLERANCE * stated + 8 / max(count, 1)
    close = abs(rate - stated) <= allowed
    which = "the" if is_same else "ANOTHER"
    figure = f"{targets:,} tokens, {count:,} bytes of {which} text from {size:,}: "
    figure += f"{rate:.4f} bpb, scored {stated:.4f} ± {allowed:.4f}"
    return Check(name, bool(is_same and close), figure)
