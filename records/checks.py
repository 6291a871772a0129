"""Verdicts of the checks of records, and the table that shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from commands import described

# The auditor's checks, in the order of its table, by the names that --only takes. Those of what
# adapts are for artifacts of track B.
CHECKS = (
    "size",
    "alone",
    "bytes",
    "targets",
    "causality",
    "normalization",
    "score",
    "decompression",
    "adaptive_targets",
    "adaptive_causality",
    "adaptive_documents",
    "adaptive_normalization",
    "adaptive_score",
    "adaptive_decompression",
    "log",
    "submission",
    "record",
)


# What a verdict on a folder of the field says.
HOLDS = "holds"
FAILS = "does not hold"
UNSTATED = "not stated"
UNCHECKED = "cannot be checked"
STATES = (HOLDS, FAILS, UNSTATED, UNCHECKED)


class Check(NamedTuple):
    """The verdict of a check: its name, whether it passed, and what was found on how much.

    `passed` is None for what is only said, or where nothing could be checked. Where there was no
    time to prove something, which refutes nothing, `unproven` says what would do.
    """

    name: str
    passed: bool | None
    figure: str
    unproven: str = ""

    def word(self) -> str:
        """The verdict in a table."""
        if self.unproven:
            return "NOT PROVEN"
        return {True: "PASS", False: "FAIL", None: "-"}[self.passed]

    def as_verdict(self) -> Verdict:
        """The same among verdicts on folders of the field."""
        state = {True: HOLDS, False: FAILS, None: UNCHECKED}[self.passed]
        return Verdict(self.name, state, self.told())

    def told(self) -> str:
        """What was found, and what would prove more."""
        return f"{self.figure}; {self.unproven}" if self.unproven else self.figure


class Verdict(NamedTuple):
    """What is found of one thing that a folder of the field claims: one of STATES, and why.

    The text of what does not hold has both figures and where they stand.
    """

    check: str
    state: str
    text: str


class Tally:
    """Comparisons made, and what was wrong."""

    def __init__(self):
        self.made = 0
        self.problems: list[str] = []

    def expect(self, holds, problem: str) -> None:
        """Count a comparison, and note the problem unless it holds."""
        self.made += 1
        if not holds:
            self.problems.append(problem)

    def equal(
        self, what: str, stated: float | None, found: float | None, tolerance: float = 0.0
    ) -> None:
        """Compare two statements of one number, which rounding may keep apart by `tolerance`."""
        if stated is None or found is None:
            self.expect(False, f"{what} is not stated")
            return
        problem = f"{what} is {stated:.10g} but also {found:.10g}"
        self.expect(abs(stated - found) <= tolerance, problem)

    def check(self, name: str) -> Check:
        """The verdict on all comparisons."""
        figure = "; ".join(self.problems) or f"{self.made} comparisons hold"
        return Check(name, not self.problems, figure)


def guarded(name: str, check: Callable[..., Check], *arguments) -> Check:
    """Return a check's verdict; what it cannot make sense of fails.

    A log that states a list where a number belongs is an example.
    """
    try:
        return check(*arguments)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return Check(name, False, f"cannot be made sense of: {described(error)}")


def print_table(checks: list[Check]) -> None:
    """Print a line for each check, with PASS, FAIL, NOT PROVEN or -."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        told = check.told()
        if check.passed is None and not check.unproven:
            told = f"not checked: {told}"
        print(f"{check.name:{width}}  {check.word()}  {told}")
