"""Where data and tokenizer are, and what the manifest beside the shards says of them.

A folder of shards may have a manifest.json (of data/download.py and data/prepare.py) or a
meta.json (of the demo corpus). This module has the one rule by which commands find folder and
tokenizer; nothing is built.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from commands import BadInput

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "train_gpt.py"
MANIFESTS = ("manifest.json", "meta.json")
# Paths as train_gpt.py has them, below its working folder or the repository.
FINEWEB = "data/datasets/fineweb10B_sp1024"
FINEWEB_TOKENIZER = "data/tokenizers/fineweb_1024_bpe.model"
DEMO = "data/demo"
# How the challenge's export names its data sets: fineweb10B_sp1024 has a tokenizer of 1,024 pieces.
FINEWEB_PREFIX = "fineweb10B_"


# ---- The manifest
@dataclass(frozen=True)
class Manifest:
    """A manifest's name, empty if there is none, and what is in it."""

    name: str = ""
    content: dict = field(default_factory=dict)

    def table(self, name: str) -> dict:
        """The table under a name, empty if there is none."""
        return table_of(self.content, name)

    @property
    def tokenizer(self) -> str | None:
        """The tokenizer's path, from the manifest's folder."""
        path = self.table("tokenizer").get("file")
        return path if isinstance(path, str) else None


def table_of(content: dict, name: str) -> dict:
    """The dictionary under a name of another, empty if there is none."""
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder of shards; BadInput if it is damaged."""
    for name in MANIFESTS:
        path = folder / name
        if path.is_file():
            return Manifest(name, read_object(path))
    return Manifest()


def read_object(path: Path) -> dict:
    """Read a file that holds a JSON object; BadInput if it does not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as JSON: make it again, or remove it") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} is no JSON object: make it again, or remove it")
    return content


# ---- The rule
class Data(NamedTuple):
    """The folder of the shards and the tokenizer's file."""

    folder: Path
    tokenizer: Path


def default_bases() -> tuple[Path, ...]:
    """Return the working folder and the repository: relative paths are looked for below them."""
    return (Path.cwd(), ROOT)


def find_data(
    folder: Path | None = None,
    tokenizer: Path | None = None,
    stated: tuple[str, str] = ("", ""),
    bases: Iterable[Path] | None = None,
) -> Data:
    """Find shards with a validation split, and their tokenizer: see find_folder and find_tokenizer.

    `folder` and `tokenizer` are what people ask for, `stated` are the paths that a run's log has.
    BadInput if there is none, or if the folder holds no validation shards.
    """
    places = tuple(bases or default_bases())
    found = find_folder(folder, (stated[0], FINEWEB, DEMO), places)
    if found is None:
        raise BadInput(
            f"no data: neither {FINEWEB} nor {DEMO} is here; name a folder of shards with "
            f"--data, or run train_gpt.py once, which builds {DEMO}"
        )
    if not list(found.glob("*_val_*.bin")):
        raise BadInput(
            f"{found} is not a folder with validation shards (*_val_*.bin): check --data"
        )
    return Data(found, find_tokenizer(found, tokenizer, stated[1], places))


def find_folder(
    given: Path | None,
    names: Iterable[str] = (FINEWEB, DEMO),
    bases: Iterable[Path] | None = None,
) -> Path | None:
    """Return the given folder, else the first of these paths that is one; None if none is.

    Each path, if it is not empty, is looked for below each of the bases in turn.
    """
    if given is not None:
        return given
    places = tuple(bases or default_bases())
    for name in names:
        for base in places:
            if name and (base / name).is_dir():
                return base / name
    return None


def find_tokenizer(
    folder: Path,
    given: Path | None = None,
    stated: str = "",
    bases: Iterable[Path] | None = None,
) -> Path:
    """Return the tokenizer of the shards in a folder, the given one if there is such.

    Else it is the first of these that is there:
    - the path that a log states, below the bases;
    - tokenizer.model in the folder;
    - what the folder's manifest names;
    - of a folder of the FineWeb export, its tokenizer in ../../tokenizers;
    - FineWeb's with 1,024 pieces, below the bases.

    BadInput, with where it was looked for, if there is none.
    """
    if given is not None:
        candidates = [given]
    else:
        places = tuple(bases or default_bases())
        candidates = [base / stated for base in places if stated]
        candidates.append(folder / "tokenizer.model")
        noted = read_manifest(folder).tokenizer
        if noted is not None:
            candidates.append(Path(os.path.abspath(folder / noted)))
        pieces = re.fullmatch(FINEWEB_PREFIX + r"sp(\d+)", folder.name)
        if pieces is not None:
            name = f"fineweb_{pieces[1]}_bpe.model"
            candidates.append(folder.parent.parent / "tokenizers" / name)
        candidates.extend(base / FINEWEB_TOKENIZER for base in places)
    for path in candidates:
        if path.is_file():
            return path
    places_said = " or ".join(str(path) for path in dict.fromkeys(candidates))
    raise BadInput(f"no tokenizer at {places_said}: name it with --tokenizer")


# ---- What to do with them
def command_to_train(
    folder: Path, tokenizer: Path | None, pieces: int, launcher: str = "python"
) -> str:
    """Return the command that trains on shards, as it works in the current folder.

    Shards of bytes have no tokenizer.
    """
    shards = shlex.quote(path_from_here(folder))
    script = shlex.quote(path_from_here(TRAINER))
    variables = f"DATA_PATH={shards} VOCAB_SIZE={pieces}"
    if tokenizer is not None:
        model = shlex.quote(path_from_here(tokenizer))
        variables = f"DATA_PATH={shards} TOKENIZER_PATH={model} VOCAB_SIZE={pieces}"
    return f"{variables} {launcher} {script}"


def path_from_here(path: Path) -> str:
    """Return a path relative to the current folder if it is below it, else the absolute one."""
    path = path.resolve()
    here = Path.cwd()
    if path.is_relative_to(here):
        return str(path.relative_to(here))
    return str(path)
