"""What is publicly known of the challenge's text, FineWeb, and of its exports."""

from __future__ import annotations

from manifest import CASE_OPERATOR_EXPORT, FINEWEB_PREFIX

# The validation split, whatever the tokenizer: documents, and bytes of text (about: tokenizers
# that normalize change some).
DOCUMENTS = 50_000
BYTES = 151_080_000
BYTES_TOLERANCE = 0.005
# Its tokens by variant, known to four digits.
VALIDATION_TOKENS = {
    CASE_OPERATOR_EXPORT: 47_850_000,
    "sp8192": 40_540_000,
    "sp1024": 62_022_000,
    "byte260": 151_130_000,
}
TOKENS_TOLERANCE = 0.001
# Of sp1024 the targets are known exactly, when the stream is cut to whole rows of 1,024.
EXACT_VARIANT = "sp1024"
EXACT_ROW = 1024
EXACT_TARGETS = 62_021_632
# The export of case operators that its script wrote at first has so many training shards. They
# hold 40,000 of the validation documents (issue #2127).
LEAKED_SHARDS = 1499


def variant_of(*names: str) -> str | None:
    """Return the variant that the first of these names with FineWeb's prefix tells, or None."""
    for name in names:
        if name.startswith(FINEWEB_PREFIX):
            return name.removeprefix(FINEWEB_PREFIX)
    return None


def targets_in_rows(tokens: int) -> int:
    """Return the targets of a stream of this many tokens when it is cut to whole rows."""
    return (tokens - 1) // EXACT_ROW * EXACT_ROW


def has_known_tokens(variant: str, tokens: int) -> bool:
    """Tell whether a validation split has the tokens that are known of a variant, if they are."""
    if variant == EXACT_VARIANT:
        return targets_in_rows(tokens) == EXACT_TARGETS
    known = VALIDATION_TOKENS.get(variant, tokens)
    return abs(tokens - known) <= TOKENS_TOLERANCE * known


def has_known_bytes(size: int) -> bool:
    """Tell whether a text has about as many bytes as the challenge's validation text."""
    return abs(size / BYTES - 1) <= BYTES_TOLERANCE
