"""Letter case as operators: text without the capitals A to Z, and back.

The rule is the field's, lossless_caps_v2 (openai/parameter-golf #1729), so that its tokenizer and
its export work here. A capital costs a tokenizer a second piece for the same word; an operator in
front of the word says it once for all words:

    TITLE     the next letter is a capital that begins a run     The    -> TITLE the
    ALL_CAPS  all letters of the run that follows are capitals   NASA   -> ALL_CAPS nasa
    CAP_NEXT  the next letter is a capital within a run          iPhone -> i CAP_NEXT phone
    ESCAPE    the next character is one of these four, as it stands in the text

A run is as many letters A to Z and a to z as there are. Nothing else changes, so there is a way
back for every text. train_gpt.py, which stands alone, has the same rule.
"""

from __future__ import annotations

import re

TITLE = "\ue001"
ALL_CAPS = "\ue002"
CAP_NEXT = "\ue003"
ESCAPE = "\ue004"
OPERATORS = (TITLE, ALL_CAPS, CAP_NEXT, ESCAPE)
# A run of letters with a capital in it, or an operator.
TO_REWRITE = re.compile(r"(?<![A-Za-z])[a-z]*+[A-Z][A-Za-z]*|[\ue001-\ue004]")
CAPITAL = re.compile("[A-Z]")
# An escaped operator, a run in capitals, one capital, or an operator that says nothing.
TO_UNDO = re.compile(
    r"\ue004([\ue001-\ue004])|\ue002([a-z]+)|[\ue001\ue003]([a-z])|[\ue001-\ue004]"
)
# Characters that no text has by itself, and their share above which text without capitals has been
# rewritten.
PRIVATE_USE = re.compile("[\ue000-\uf8ff]")
MOST_PRIVATE_USE = 0.005


def with_operators(text: str) -> str:
    """Return a text with operators in the place of capitals."""
    return TO_REWRITE.sub(rewritten, text)


def rewritten(match: re.Match) -> str:
    """Return what stands for a run of letters with a capital in it, or for an operator."""
    run = match[0]
    if run in OPERATORS:
        return ESCAPE + run
    first = run[0]
    rest = run[1:]
    if first.isupper() and (not rest or rest.islower()):
        return TITLE + run.lower()
    if run.isupper():
        return ALL_CAPS + run.lower()
    if first.isupper():
        first = TITLE + first.lower()
    return first + CAPITAL.sub(marked, rest)


def marked(match: re.Match) -> str:
    """Return what stands for a capital within a run of letters."""
    return CAP_NEXT + match[0].lower()


def without_operators(text: str) -> str:
    """Return the text that was rewritten.

    An operator with nothing to act on, which no text has after with_operators, is left out.
    """
    return TO_UNDO.sub(undone, text)


def is_rewritten(text: str) -> bool:
    """Tell whether decoded text has operators, of this rule or another, in the place of capitals.

    Then its tokenizer does not know them, and their bytes would count as text.
    """
    operators = len(PRIVATE_USE.findall(text))
    return operators > MOST_PRIVATE_USE * len(text) and CAPITAL.search(text) is None


def undone(match: re.Match) -> str:
    """Return what an operator and what it acts on stand for."""
    literal, run, letter = match.groups(default="")
    if literal:
        return literal
    return (run + letter).upper()
