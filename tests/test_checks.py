"""Verdicts and their table."""

from __future__ import annotations

import pytest

from checks import Check, Tally, guarded, print_table


def test_a_tally_counts_comparisons_and_names_what_is_wrong():
    tally = Tally()
    tally.equal("steps", 3, 3)
    tally.equal("loss", 1.00004, 1.0, tolerance=5e-5)
    assert tally.check("log") == Check("log", True, "2 comparisons hold")
    tally.equal("bytes", 3, 4)
    tally.equal("targets", None, 4)
    tally.expect(False, "no line")
    problems = "bytes is 3 but also 4; targets is not stated; no line"
    assert tally.check("log") == Check("log", False, problems)


@pytest.mark.parametrize("error", [ZeroDivisionError, AttributeError, KeyError, TypeError])
def test_what_a_check_cannot_make_sense_of_fails(error):
    def check(word: str) -> Check:
        raise error(word)

    found = guarded("log", check, "odd")
    assert found.name == "log" and found.passed is False and "odd" in found.figure


def test_the_table_shows_each_verdict(capsys):
    print_table([Check("size", True, "1"), Check("a long name", False, "2"), Check("x", None, "3")])
    assert capsys.readouterr().out.splitlines() == [
        "size         PASS  1",
        "a long name  FAIL  2",
        "x            -  not checked: 3",
    ]
