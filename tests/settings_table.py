"""Print the table of all settings, for a document: Markdown between two comments.

    python tests/settings_table.py

test_settings.py compares it with the documents of DOCUMENTS.
"""

from __future__ import annotations

import sys
from pathlib import Path

# As a command it does not find the script otherwise.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import train_gpt

# Where the table may stand.
DOCUMENTS = ("README.md", "records/settings.md")
BEGIN = "<!-- settings -->"
END = "<!-- /settings -->"


def default_text(value: object) -> str:
    """A default as one would type it."""
    return train_gpt.as_typed(value) or "(empty)"


def table_rows() -> list[list[str]]:
    """The cells of each row, the heading first."""
    rows = [["setting", "type", "record", "pocket", "what it does"]]
    for field in train_gpt.fields_of():
        # Only what the pocket preset changes is said in its column.
        pocket = ""
        if field.name in train_gpt.PRESETS["pocket"]:
            pocket = default_text(train_gpt.PRESETS["pocket"][field.name])
        purpose = field.metadata["help"]
        if field.metadata["choices"]:
            purpose += f" ({', '.join(field.metadata['choices'])})"
        name = f"`{field.name.upper()}`"
        rows.append([name, field.type, default_text(field.default), pocket, purpose])
    return rows


def settings_table() -> str:
    """The table with the comments around it, a line for each setting."""
    heading, *rows = [f"| {' | '.join(cells)} |" for cells in table_rows()]
    return "\n".join([BEGIN, "", heading, "|---|---|---|---|---|", *rows, "", END])


def table_in(text: str) -> str | None:
    """What a document has between the comments, these included; None without a table."""
    begin = text.find(BEGIN)
    end = text.find(END)
    if begin < 0 or end < begin:
        return None
    return text[begin : end + len(END)]


if __name__ == "__main__":
    print(settings_table())
