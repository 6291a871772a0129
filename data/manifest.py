"""Where data and tokenizer are, and what the manifest beside the shards says of them.

A folder of shards may have a manifest.json (of data/download.py and data/prepare.py) or a
meta.json (of the demo corpus). This module has the one rule by which commands find folder and
tokenizer; nothing is built.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from commands import BadInput
from files import digest
from shards import shards_of
from tokenizer import BYTE_TOKENIZER

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "train_gpt.py"
MANIFESTS = ("manifest.json", "meta.json")
# Paths as train_gpt.py has them, below its working folder or the repository; of the exports of the
# challenge's text the first that is there is used.
DATASETS = "data/datasets"
DEMO = "data/demo"
# How the challenge's exports are named: fineweb10B_sp1024 has a tokenizer of 1,024 pieces.
FINEWEB_PREFIX = "fineweb10B_"
CASE_OPERATOR_EXPORT = "sp8192_lossless_caps_caseops_v1_reserved"
FINEWEB_VARIANTS = (CASE_OPERATOR_EXPORT, "sp8192", "sp4096", "sp1024", "byte260")
FINEWEB = tuple(f"{DATASETS}/{FINEWEB_PREFIX}{variant}" for variant in FINEWEB_VARIANTS)
# Name, pieces and ending of a folder; the tokenizer's file has the same.
EXPORT = re.compile(r"(.+?)(?:10B)?_sp(\d+)(_\w+)?")


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
    BadInput if there is none, if the folder holds no validation shards, or if its manifest says
    that the tokenizer is another.
    """
    places = tuple(bases or default_bases())
    found = find_folder(folder, (stated[0], *FINEWEB, DEMO), places)
    if found is None:
        raise BadInput(
            f"no data: neither {DATASETS}/{FINEWEB_PREFIX}* nor {DEMO} is here; name a folder of "
            f"shards with --data, or run train_gpt.py once, which builds {DEMO}"
        )
    if not shards_of(found, "val"):
        raise BadInput(
            f"{found} is not a folder with validation shards (*_val_*.bin): check --data"
        )
    own = find_tokenizer(found, tokenizer, stated[1], places)
    sha256 = read_manifest(found).table("tokenizer").get("sha256")
    if sha256 not in (None, digest_of_tokenizer(own)):
        raise BadInput(
            f"{own} is not the tokenizer of {found}: its manifest has another SHA-256: check "
            "--data and --tokenizer"
        )
    return Data(found, own)


def digest_of_tokenizer(path: Path) -> str:
    """Return the SHA-256 of a tokenizer's file, or of what stands for that of bytes."""
    if path == BYTE_TOKENIZER:
        return hashlib.sha256(str(path).encode()).hexdigest()
    return digest(path)


def find_folder(
    given: Path | None,
    names: Iterable[str] = (*FINEWEB, DEMO),
    bases: Iterable[Path] | None = None,
) -> Path | None:
    """Return the given folder, else the first of these paths with validation shards; or None.

    Each path, if it is not empty, is looked for below each of the bases in turn. A download that
    was stopped leaves a folder without shards.
    """
    if given is not None:
        return given
    places = tuple(bases or default_bases())
    for name in names:
        for base in places:
            if name and any((base / name).glob("*_val_*.bin")):
                return base / name
    return None


def find_tokenizer(
    folder: Path,
    given: Path | None = None,
    stated: str = "",
    bases: Iterable[Path] | None = None,
) -> Path:
    """Return the tokenizer of the shards in a folder, as train_gpt.py finds it.

    It is the given one, else the one that a log states, if it is there below the bases, else what
    the folder's manifest names, else tokenizer.model in the folder, else, where the folder is named
    as the challenge's exports are, theirs. No other is taken in their place: with another tokenizer
    every figure would be false. BadInput, with where it was looked for, if it is not there.
    """
    if given is not None:
        path = given
    else:
        path = stated_tokenizer(stated, bases) or tokenizer_of(Path(os.path.abspath(folder)))
    if path != BYTE_TOKENIZER and not path.is_file():
        raise BadInput(f"{folder}: no tokenizer at {path}: name its own with --tokenizer")
    return path


def stated_tokenizer(stated: str, bases: Iterable[Path] | None) -> Path | None:
    """Return the tokenizer that a log states, if it is there below one of the bases."""
    if Path(stated) == BYTE_TOKENIZER:
        return BYTE_TOKENIZER
    for base in tuple(bases or default_bases()):
        if stated and (base / stated).is_file():
            return base / stated
    return None


def tokenizer_of(folder: Path) -> Path:
    """Return where the tokenizer of the shards in a folder is, by manifest and name."""
    manifest = read_manifest(folder)
    of_export = EXPORT.fullmatch(folder.name)
    if manifest.table("tokenizer").get("kind") == "bytes" or folder.name.endswith("_byte260"):
        return BYTE_TOKENIZER
    if manifest.tokenizer is not None:
        return Path(os.path.normpath(folder / manifest.tokenizer))
    if (folder / "tokenizer.model").is_file() or of_export is None:
        return folder / "tokenizer.model"
    name, pieces, more = of_export.groups(default="")
    return folder.parent.parent / "tokenizers" / f"{name}_{pieces}_bpe{more}.model"


# ---- What to do with them
def command_to_train(folder: Path, launcher: str = "python") -> str:
    """Return the command that trains on shards, as it works in the current folder.

    The manifest beside the shards says the rest.
    """
    shards = shlex.quote(path_from_here(folder))
    script = shlex.quote(path_from_here(TRAINER))
    return f"DATA_PATH={shards} {launcher} {script}"


def path_from_here(path: Path) -> str:
    """Return a path relative to the current folder if it is below it, else the absolute one."""
    path = path.resolve()
    here = Path.cwd()
    if path.is_relative_to(here):
        return str(path.relative_to(here))
    return str(path)
