"""Print the tables of all settings and of other entries' names, for a document: Markdown.

    python tests/settings_table.py

Each stands between two comments. test_settings.py compares them with the documents of DOCUMENTS.
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
OTHERS_BEGIN = "<!-- other names -->"
OTHERS_END = "<!-- /other names -->"


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


def other_names_table() -> str:
    """What names of other entries are here, with the comments around it."""
    names_of = {}
    for variable, name in train_gpt.OTHER_NAMES.items():
        names_of.setdefault(f"`{name.upper()}`", []).append(variable)
    for variable, purpose in train_gpt.RELATED_SETTINGS.items():
        names_of.setdefault(purpose, []).append(variable)
    names_of["always on"] = train_gpt.ALWAYS_ON.split()
    names_of["not here (a star: any end)"] = sorted(train_gpt.ABSENT_SETTINGS.split())

    lines = [OTHERS_BEGIN, "", "| here | in other entries |", "|---|---|"]
    for here, variables in names_of.items():
        names = ", ".join(f"`{variable}`" for variable in variables)
        lines.append(f"| {here} | {names} |")
    return "\n".join([*lines, "", OTHERS_END])


def table_in(text: str, begin: str = BEGIN, end: str = END) -> str | None:
    """What a document has between the comments, these included; None without a table."""
    first = text.find(begin)
    last = text.find(end)
    if first < 0 or last < first:
        return None
    return text[first : last + len(end)]


if __name__ == "__main__":
    print(settings_table())
    print()
    print(other_names_table())
