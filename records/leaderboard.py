"""The tables of records in records/README.md."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from challenge import CHALLENGE
from commands import BadInput, described
from field_record import FieldRecord
from files import write_atomically
from manifest import ROOT
from markdown_table import table
from review import review

RECORDS = ROOT / "records"
# The tables stand between these lines of README.md.
MARKERS = ("<!-- leaderboard -->", "<!-- /leaderboard -->")
REFUSED = ".refused"
HEAD = ["", "val_bpb", "record", "author", "date", "seeds", "bytes", "hardware", "p"]
# Those of track B are ranked apart, with what the same artifact scores as a fixed predictor.
ADAPTS = "Track B, which adapts while it scores; beside it the score of track A."
ADAPTS_HEAD = [*HEAD[:2], "track A", *HEAD[2:]]
LOGS_ONLY = "Logs only: without an artifact that can be audited, nothing of these is proven."
LOGS_HEAD = ["", "val_bpb", "record", "author", "date", "seeds", "bytes", "does not hold"]


def leaderboard(records: Path) -> str:
    """The tables of all record folders, one a track, the challenge's first.

    Links to the ablations of a track stand below its table.
    """
    tracks = sorted(
        {path.parts[-3] for path in published(records)},
        key=lambda name: (name != f"track_{CHALLENGE}", name),
    )
    if not tracks:
        return "No record yet.\n"
    lines = []
    for track in tracks:
        lines += track_lines(records / track)
    return "\n".join(lines)


def published(folder: Path, pattern: str = "track_*/*") -> list[Path]:
    """The files that describe records and ablations; what was put aside is none."""
    found = [
        *folder.glob(f"{pattern}/submission.json"),
        *folder.glob(f"{pattern}/ablation.json"),
    ]
    return sorted(path for path in found if not path.parent.name.endswith(REFUSED))


def track_lines(folder: Path) -> list[str]:
    """The lines of one track: its tables, best score first, and what stands below them."""
    ranked: dict[str, list] = dict(A=[], B=[])
    logs_only = []
    below = []
    for path in published(folder, "*"):
        if path.name != "submission.json":
            below.append(f"- ablation: {link(path)}")
            continue
        try:
            record = FieldRecord(path.parent)
            if record.can_be_proven:
                track, place = standing(path)
                ranked[track].append(place)
            else:
                logs_only.append(standing_by_logs(record))
        except BadInput as error:
            # One folder never stops the table.
            below.append(f"- not ranked: {folder_link(path)}: {error}")
    lines = [f"### Track {folder.name.removeprefix('track_')}", ""]
    if ranked["A"]:
        lines += table(HEAD, numbered(ranked["A"]))
    if ranked["B"]:
        lines += [ADAPTS, "", *table(ADAPTS_HEAD, numbered(ranked["B"]))]
    if logs_only:
        lines += [LOGS_ONLY, "", *table(LOGS_HEAD, numbered(logs_only))]
    if not any((ranked["A"], ranked["B"], logs_only)):
        lines += ["No record yet.", ""]
    if below:
        lines += [*below, ""]
    return lines


def numbered(ranked: list[tuple[float, list[str]]]) -> list[list[str]]:
    """The rows by score, the best first, each with its rank in front."""
    return [[str(rank), *row] for rank, (_, row) in enumerate(sorted(ranked), 1)]


def standing_by_logs(record: FieldRecord) -> tuple[float, list[str]]:
    """The score of a folder of the field, and its row of the table without the rank."""
    found = review(record)
    folder = record.folder
    stated = record.claims.stated
    score = math.inf if found.val_bpb is None else found.val_bpb
    row = [
        "-" if found.val_bpb is None else f"{found.val_bpb:.4f}",
        f"[{plain(stated.get('name') or folder.name)}]({'/'.join(folder.parts[-2:])}/)",
        plain(stated.get("author") or "-"),
        plain(stated.get("date") or "-"),
        str(found.seeds),
        "-" if found.bytes_total is None else f"{found.bytes_total:,}",
        ", ".join(verdict.check for verdict in found.failures) or "-",
    ]
    return score, row


def plain(value: object) -> str:
    """What somebody else wrote, as one cell of a table."""
    return " ".join(str(value).split()).translate(str.maketrans({"|": "\\|", "[": "(", "]": ")"}))


def link(path: Path) -> str:
    """The name in an ablation.json, with a link to its folder."""
    try:
        name = str(json.loads(path.read_text(encoding="utf-8"))["name"])
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{path} cannot be linked: {described(error)}") from None
    return f"[{name}]({folder_link(path)})"


def folder_link(path: Path) -> str:
    """The folder of a file as records/README.md links it."""
    return "/".join(path.parts[-3:-1]) + "/"


def standing(path: Path) -> tuple[str, tuple[float, list[str]]]:
    """A record's track of the field's two, A or B; its score, and its row without the rank."""
    try:
        stated = dict(json.loads(path.read_text(encoding="utf-8")))
        score = float(stated["val_bpb"])
        row = row_of(stated, folder_link(path))
        # Older records do not say that they are of track A.
        track = stated.get("evaluation_track", "A")
        if track == "B":
            row.insert(1, f"{float(stated['sliding_val_bpb']):.4f}")
        elif track != "A":
            raise ValueError(f"evaluation_track {track} is neither A nor B")
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{path} cannot be ranked: {described(error)}") from None
    return track, (score, [cell.replace("|", "\\|") for cell in row])


def row_of(stated: dict, folder: str) -> list[str]:
    """The row of a record in the table without the rank."""
    score = f"{float(stated['val_bpb']):.4f}"
    spread = stated.get("val_bpb_std")
    if spread is not None:
        score += f" ± {spread:.4f}"
    p_value = "-"
    beats = stated.get("beats")
    if beats and beats["p_value"] is not None:
        p_value = f"{beats['p_value']:.3g} against {beats['claimed']}"
    return [
        score,
        f"[{stated['name']}]({folder})",
        str(stated["author"]),
        str(stated["date"]),
        str(len(stated["seeds"])),
        f"{stated['bytes_total']:,}",
        str(stated.get("hardware", "-")),
        p_value,
    ]


def split_readme(records: Path) -> tuple[str, str]:
    """Return records/README.md before and behind the tables, markers included."""
    path = records / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    begin, end = MARKERS
    parts = re.fullmatch(rf"(.*{begin}\n).*({end}.*)", text, re.S)
    if not parts:
        raise BadInput(f"{path} has no lines {begin} and {end}: put them where the tables belong")
    return parts[1], parts[2]


def update_leaderboard(records: Path) -> None:
    """Write the tables into records/README.md, between the markers."""
    before, after = split_readme(records)
    text = f"{before}\n{leaderboard(records)}\n{after}"
    write_atomically(records / "README.md", text.encode())
