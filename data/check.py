"""Check a folder of token shards and their tokenizer before hours of training depend on them.

    python data/check.py data/datasets/fineweb10B_sp1024 [--tokenizer FILE] [--json FILE]

It prints a table (check; PASS, FAIL, or - for what is only said; what was found) and what each split holds.
The exit status is 0 if nothing fails, 1 if a check fails, 2 after one line for what cannot be checked. Memory
is bounded: a piece of the stream, the longest document, a hash of 16 bytes for each validation document. The
published FineWeb export (a folder named fineweb10B_*) was not made by data/prepare.py: what may differ there
(text that changes when it is encoded again, documents that are in both splits, no training shards) is said
and does not fail.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from processes import run
from shards import (
    BOS_ID,
    MOST_PIECES,
    BadInput,
    count_tokens,
    digest,
    lacks,
    open_tokenizer,
    read_shard,
    write_atomically,
)
from tqdm import tqdm

SPLITS = ("train", "val")
PIECE_TOKENS = 1 << 22  # of the stream in memory at once
BATCH_DOCUMENTS = 1000
SAMPLE_BYTES = 20_000_000  # of text that is encoded again
BAR_FROM = 50_000_000  # tokens to read, for which a progress bar is worth its line
# Text that any normalization but identity changes: a ligature, a fraction, a sign for a letter, spaces of
# other kinds, several of them, a tab, line ends, spaces at the end.
PROBE = "x ﬁ ½ Å \u00a0 \u3000 two  spaces\tand\r\nlines \n "
FINEWEB, FINEWEB_KNOWN = "fineweb10B_", "fineweb10B_sp1024"
# Of FineWeb's validation split with the tokenizer of 1,024 pieces: targets when the stream is cut to whole
# rows of 1,024, documents, and bytes of text (about).
FINEWEB_ROW, FINEWEB_TARGETS, FINEWEB_DOCUMENTS, FINEWEB_BYTES = (
    1024,
    62_021_632,
    50_000,
    151_080_000,
)
FINEWEB_TOLERANCE = 0.0005


class Check(NamedTuple):
    """One line of the table."""

    name: str
    passed: bool | None  # None: said, or not checked
    figure: str


@dataclass
class Counts:
    """What a split holds."""

    shards: int
    tokens: int
    documents: int
    bytes: int  # of text, by the tokenizer's pieces

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, self.tokens)


class Pieces:
    """A tokenizer and the bytes of text behind each id, which is what bits per byte are counted with."""

    def __init__(self, path: Path):
        self.tokenizer = tokenizer = open_tokenizer(path)
        self.path, self.size = path, tokenizer.vocab_size()
        strips = (
            tokenizer.decode([tokenizer.piece_to_id("▁")]) == ""
        )  # the space that begins a document
        self.bytes, self.silent, self.stripped, self.begins = (
            np.zeros(MOST_PIECES, dtype) for dtype in (np.int64, bool, bool, bool)
        )  # each (MOST_PIECES,)
        for i in range(min(self.size, MOST_PIECES)):
            piece = tokenizer.id_to_piece(i)
            self.begins[i] = tokenizer.is_control(i)
            self.silent[i] = self.begins[i] or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
            self.stripped[i] = strips and piece.startswith("▁")
            if not self.silent[i]:
                self.bytes[i] = 1 if tokenizer.is_byte(i) else len(piece.replace("▁", " ").encode())


class Scan:
    """A split read once: how often each id occurs, int64 (MOST_PIECES,), its first id, its bytes of text."""

    def __init__(self, paths: list[Path], pieces: Pieces, bar: tqdm):
        self.histogram, self.first, self.shards = np.zeros(MOST_PIECES, np.int64), None, len(paths)
        stripped, before = 0, np.empty(0, np.uint16)
        for piece in stream(paths, bar):
            self.first = int(piece[0]) if self.first is None else self.first
            self.histogram += np.bincount(piece, minlength=MOST_PIECES)
            if pieces.stripped.any():
                joined = np.concatenate([before, piece])
                stripped += np.count_nonzero(
                    pieces.begins[joined[:-1]] & pieces.stripped[joined[1:]]
                )
                before = piece[-1:].copy()
        self.bytes = int(self.histogram @ pieces.bytes) - stripped

    def counts(self) -> Counts:
        """What the split holds."""
        return Counts(
            self.shards, int(self.histogram.sum()), int(self.histogram[BOS_ID]), self.bytes
        )


# ---- What to check
def is_published(folder: Path) -> bool:
    """Whether its name is one of the FineWeb export."""
    return folder.name.startswith(FINEWEB)


def find_shards(folder: Path) -> dict[str, list[Path]]:
    """The shards of each split in order of their names; BadInput if the folder holds none."""
    if not folder.is_dir():
        raise BadInput(
            f"{folder} is not a folder: name a folder of shards, as for train_gpt.py's DATA_PATH"
        )
    shards = {split: sorted(folder.glob(f"*_{split}_*.bin")) for split in SPLITS}
    if not any(shards.values()):
        raise BadInput(
            f"{folder} holds no token shards (*_train_*.bin, *_val_*.bin): name another folder"
        )
    return shards


def read_manifest(folder: Path) -> tuple[str, dict]:
    """Name and content of manifest.json or meta.json, ("", {}) if there is neither. BadInput if damaged."""
    path = next(
        (folder / name for name in ("manifest.json", "meta.json") if (folder / name).is_file()),
        None,
    )
    if path is None:
        return "", {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as JSON: make it again, or remove it") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} is no JSON object: make it again, or remove it")
    return path.name, content


def find_tokenizer(folder: Path, given: Path | None, manifest: dict) -> Path:
    """The tokenizer: given, in the folder, of the manifest, or FineWeb's; BadInput if it is not there."""
    choices, named = [folder / "tokenizer.model"], entry(manifest, "tokenizer").get("file")
    if isinstance(named, str):
        choices.append(Path(os.path.abspath(folder / named)))
    if number := re.fullmatch(FINEWEB + r"sp(\d+)", folder.name):
        choices.append(folder.parent.parent / "tokenizers" / f"fineweb_{number[1]}_bpe.model")
    choices = [given] if given else choices
    for path in choices:
        if path.is_file():
            return path
    raise BadInput(f"no tokenizer at {' or '.join(map(str, choices))}: name it with --tokenizer")


def entry(table: dict, name: str) -> dict:
    """The table under a name of a manifest, empty if there is none."""
    found = table.get(name)
    return found if isinstance(found, dict) else {}


# ---- Reading
def stream(paths: list[Path], bar: tqdm) -> Iterator[np.ndarray]:
    """The tokens of a split, uint16 (at most PIECE_TOKENS,), piece by piece and none empty."""
    for path in paths:
        shard = read_shard(path)
        for start in range(0, len(shard), PIECE_TOKENS):
            piece = np.asarray(shard[start : start + PIECE_TOKENS])
            yield piece
            bar.update(len(piece))


def whole_documents(paths: list[Path], bar: tqdm) -> Iterator[list[np.ndarray]]:
    """The documents of a split, each with its BOS, a list for each piece of the stream. A document may go on
    in the next shard. The split begins with BOS."""
    rest: list[np.ndarray] = []
    for piece in stream(paths, bar):
        begins = np.flatnonzero(piece == BOS_ID)
        if len(begins):
            joined = np.concatenate([*rest, piece[: begins[-1]]])
            yield np.split(joined, np.flatnonzero(joined == BOS_ID)[1:]) if len(joined) else []
            rest, piece = [], piece[begins[-1] :]
        rest.append(piece)
    if rest:
        yield [np.concatenate(rest)]


def hashes(documents: list[np.ndarray]) -> list[bytes]:
    """16 bytes for each document that depend on all of its tokens."""
    return [hashlib.blake2b(document.data, digest_size=16).digest() for document in documents]


# ---- The checks
def check_shards(shards: dict[str, list[Path]], published: bool) -> Check:
    """Magic, version and size of every shard; no split is empty. Gaps in the numbers are said."""
    problems, notes, tokens = [], [], 0
    for split, paths in shards.items():
        found = 0
        for path in paths:
            try:
                found += count_tokens(path)
            except BadInput as error:
                problems.append(str(error))
        if paths and not found and not problems:
            problems.append(f"the {split} split is empty")
        if not paths:
            (notes if published and split == "train" else problems).append(
                f"there is no {split} split"
            )
        tokens += found
        numbers = [
            int(match[1]) for path in paths if (match := re.search(r"_(\d+)\.bin$", path.name))
        ]
        missing = sorted(set(range(max(numbers, default=-1) + 1)) - set(numbers))
        if missing:
            notes.append(
                f"{split} shard {missing[0]} is not there ({len(missing)} numbers are missing)"
            )
    said = f"{sum(map(len, shards.values()))} files, {tokens:,} tokens, sizes and headers right"
    return Check("shards", not problems, "; ".join([*(problems[:3] or [said]), *notes]))


def check_files(folder: Path, name: str, manifest: dict, tokenizer: Path, bar: tqdm) -> Check:
    """Sizes and digests of all files in the manifest, and that it lists every shard."""
    files = entry(manifest, "files")
    if not files:
        return Check("manifest", None, f"{name} lists no files" if name else "there is none")
    problems = [
        f"{path.name} is not in {name}"
        for path in sorted(folder.glob("*_*_*.bin"))
        if path.name not in files
    ]
    for file in sorted(files):
        path, stated = folder / file, entry(files, file)
        if not path.is_file():
            problems.append(f"{file} is not there")
        elif path.stat().st_size != stated.get("bytes"):
            problems.append(f"{file} has {path.stat().st_size:,} bytes, not {stated.get('bytes')}")
        elif digest(path) != stated.get("sha256"):
            problems.append(f"{file} has another SHA-256")
        bar.update(path.stat().st_size // 2 if path.is_file() else 0)
    stated = entry(manifest, "tokenizer").get("sha256")
    if stated and stated != digest(tokenizer):
        problems.append(f"{tokenizer} has another SHA-256 than {name} says")
    return Check(
        "manifest", not problems, "; ".join(problems[:3]) or f"{len(files)} files as {name} says"
    )


def check_tokenizer(pieces: Pieces, folder: Path, manifest: dict) -> Check:
    """It has what shards of any text need and the data set's size. That it normalizes is said."""
    tokenizer = pieces.tokenizer
    problems, notes = [f"it needs {need}" for need in lacks(tokenizer)], []
    number = re.search(r"_sp(\d+)$", folder.name)
    stated = manifest.get("vocabulary_size") or (int(number[1]) if number else None)
    if stated not in (None, pieces.size):
        problems.append(f"{pieces.size} pieces, but the data set is of {stated}")
    if tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
        notes.append("it normalizes: not every text comes back as it was")
    said = f"{pieces.path.name}: {pieces.size:,} pieces, BOS {BOS_ID}, ▁, 256 bytes"
    return Check("tokenizer", not problems, "; ".join([*(problems or [said]), *notes]))


def check_ids(scans: dict[str, Scan], pieces: Pieces) -> Check:
    """Every id is a piece, each split begins with BOS, and none is padding or unknown."""
    problems, tokenizer = [], pieces.tokenizer
    for split, scan in scans.items():
        largest = int(np.flatnonzero(scan.histogram)[-1])
        if largest >= pieces.size:
            problems.append(
                f"id {largest} in {split}, but the tokenizer has {pieces.size:,} pieces"
            )
        if scan.first != BOS_ID:
            problems.append(f"{split} begins with id {scan.first}, not with BOS ({BOS_ID})")
        for name, wrong in (("padding", tokenizer.pad_id()), ("unknown", tokenizer.unk_id())):
            if wrong >= 0 and scan.histogram[wrong]:
                problems.append(f"{split} has {scan.histogram[wrong]:,} ids for {name} ({wrong})")
    said = f"all below {pieces.size:,}, no padding, none unknown, each split begins with BOS"
    return Check("ids", not problems, "; ".join(problems) or said)


def check_text(
    paths: list[Path], stated: int, pieces: Pieces, published: bool, bar: tqdm
) -> list[Check]:
    """Decode the validation split: its bytes against `stated`, those of the pieces; encode a sample again."""
    tokenizer, step = pieces.tokenizer, -(-stated // SAMPLE_BYTES) or 1
    decoded = documents = sampled = kept = same = size = 0
    for found in whole_documents(paths, bar):
        for start in range(0, len(found), BATCH_DOCUMENTS):
            batch = [
                part[~pieces.silent[part]].tolist()
                for part in found[start : start + BATCH_DOCUMENTS]
            ]
            texts = tokenizer.decode(batch)
            decoded += sum(len(text.encode()) for text in texts)
            chosen = slice(-documents % step, None, step)
            documents += len(batch)
            again = tokenizer.encode(texts[chosen])
            sampled += len(again)
            size += sum(len(text.encode()) for text in texts[chosen])
            kept += sum(map(str.__eq__, tokenizer.decode(again), texts[chosen]))
            same += sum(map(list.__eq__, again, batch[chosen]))
    lossless = (
        f"{kept:,} of {sampled:,} documents ({size:,} bytes) decode to themselves, "
        f"{same:,} encode to their ids"
    )
    if same < sampled / 2:
        lossless += ": did another tokenizer make these shards?"
    return [
        Check("bytes", decoded == stated, f"{stated:,} by the pieces, {decoded:,} decoded, val"),
        Check("lossless", kept == sampled or (None if published else False), lossless),
    ]


def check_overlap(shards: dict[str, list[Path]], published: bool, bar: tqdm) -> Check:
    """Exact duplicates of validation documents in the training split."""
    if "train" not in shards:
        return Check("overlap", None, "there is no train split")
    held_out = {
        found for documents in whole_documents(shards["val"], bar) for found in hashes(documents)
    }
    met: set[bytes] = set()
    times = total = 0
    for documents in whole_documents(shards["train"], bar):
        twice = [found for found in hashes(documents) if found in held_out]
        met.update(twice)
        times, total = times + len(twice), total + len(documents)
    figure = (
        f"{len(met):,} of {len(held_out):,} validation documents are among {total:,} for training"
    )
    figure += f", {times:,} times" * bool(met)
    return Check("overlap", not met or (None if published else False), figure)


def check_counts(name: str, manifest: dict, counts: dict[str, Counts]) -> Check:
    """Documents, bytes and tokens as the manifest states them."""
    stated = {split: entry(manifest, split) for split in SPLITS}
    if not any(stated.values()):
        return Check("counts", None, "stated nowhere")
    problems = [
        f"{split}: {getattr(counts[split], key):,} {key}, but {name} says {value}"
        for split in counts
        for key, value in stated[split].items()
        if key in ("documents", "bytes", "tokens") and value != getattr(counts[split], key)
    ]
    return Check("counts", not problems, "; ".join(problems) or f"as {name} says")


def check_known(val: Counts) -> Check:
    """The published figures of FineWeb's validation split with 1,024 pieces."""
    targets = (val.tokens - 1) // FINEWEB_ROW * FINEWEB_ROW
    passed = (
        targets == FINEWEB_TARGETS
        and val.documents == FINEWEB_DOCUMENTS
        and abs(val.bytes / FINEWEB_BYTES - 1) <= FINEWEB_TOLERANCE
    )
    return Check(
        "known split",
        passed,
        f"{targets:,} targets, {FINEWEB_TARGETS:,} known; {val.documents:,} "
        f"documents, {FINEWEB_DOCUMENTS:,}; {val.bytes:,} bytes, about {FINEWEB_BYTES:,}",
    )


# ---- The command
def load(path: Path) -> Pieces | Check:
    """The tokenizer, or the check that it fails."""
    try:
        return Pieces(path)
    except BadInput as error:
        return Check("tokenizer", False, str(error))


def check_content(
    shards: dict[str, list[Path]],
    pieces: Pieces,
    name: str,
    manifest: dict,
    folder: Path,
    bar: tqdm,
) -> tuple[list[Check], dict[str, Counts]]:
    """The checks that read tokens, and the counts of each split that is there."""
    published, shards = (
        is_published(folder),
        {split: paths for split, paths in shards.items() if paths},
    )
    scans = {split: Scan(paths, pieces, bar) for split, paths in shards.items()}
    counts = {split: scan.counts() for split, scan in scans.items()}
    ids = check_ids(scans, pieces)
    if not ids.passed:
        return [ids, *not_checked("its ids are wrong", "bytes", "lossless", "overlap")], counts
    checks = [
        ids,
        *check_text(shards["val"], counts["val"].bytes, pieces, published, bar),
        check_overlap(shards, published, bar),
        check_counts(name, manifest, counts),
    ]
    return checks + [check_known(counts["val"])] * (folder.name == FINEWEB_KNOWN), counts


def not_checked(reason: str, *names: str) -> list[Check]:
    """Lines for checks that need what another has found wrong."""
    return [Check(name, None, f"not checked: {reason}") for name in names]


def check(folder: Path, given: Path | None) -> tuple[list[Check], dict[str, Counts]]:
    """All checks of a folder, and the counts of each split; BadInput for what cannot be checked."""
    folder = Path(os.path.abspath(folder))
    shards, (name, manifest) = find_shards(folder), read_manifest(folder)
    tokenizer = find_tokenizer(folder, given, manifest)
    size = sum(path.stat().st_size // 2 for paths in shards.values() for path in paths)
    val = sum(path.stat().st_size // 2 for path in shards["val"])
    passes = 2 * size + val + size * bool(entry(manifest, "files"))  # ids, overlap; text; digests
    with tqdm(
        total=passes, unit="token", unit_scale=True, disable=passes < BAR_FROM, leave=False
    ) as bar:
        checks = [
            check_shards(shards, is_published(folder)),
            check_files(folder, name, manifest, tokenizer, bar),
        ]
        pieces = load(tokenizer)
        found = pieces if isinstance(pieces, Check) else check_tokenizer(pieces, folder, manifest)
        reason = "" if checks[0].passed else "shards are wrong"
        if isinstance(pieces, Check) or reason:
            more = not_checked(
                reason or "there is no tokenizer", "ids", "bytes", "lossless", "overlap"
            )
            return [*checks, found, *more], {}
        more, counts = check_content(shards, pieces, name, manifest, folder, bar)
        return [*checks, found, *more], counts


def table(checks: list[Check], counts: dict[str, Counts]) -> str:
    """The checks and the counts as text."""
    width, word = max(len(check.name) for check in checks), {True: "PASS", False: "FAIL", None: "-"}
    lines = [f"{check.name:{width}}  {word[check.passed]:4}  {check.figure}" for check in checks]
    if counts:
        lines += [
            "",
            f"{'split':5}  shards {'tokens':>15} {'documents':>11} {'bytes':>15} bytes/token",
        ]
    lines += [
        f"{split:5} {found.shards:7,} {found.tokens:15,} {found.documents:11,} {found.bytes:15,} "
        f"{found.bytes_per_token:11.4f}"
        for split, found in counts.items()
    ]
    return "\n".join(lines)


def as_json(checks: list[Check], counts: dict[str, Counts]) -> bytes:
    """The same for programs."""
    splits = {
        split: {**asdict(found), "bytes_per_token": found.bytes_per_token}
        for split, found in counts.items()
    }
    content = {"checks": [check._asdict() for check in checks], "counts": splits}
    return f"{json.dumps(content, indent=1)}\n".encode()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="shards, as train_gpt.py's DATA_PATH")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="SentencePiece model [tokenizer.model there, or the manifest's, or FineWeb's]",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the table and the counts there"
    )
    options = parser.parse_args(arguments)

    def command() -> int:
        if options.json and not options.json.resolve().parent.is_dir():
            raise BadInput(f"--json {options.json}: its folder does not exist")
        checks, counts = check(options.folder, options.tokenizer)
        print(table(checks, counts))
        if options.json:
            write_atomically(options.json, as_json(checks, counts))
        return int(any(check.passed is False for check in checks))

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
