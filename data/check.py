"""Check a folder of token shards and their tokenizer before hours of training depend on them.

    python data/check.py data/datasets/fineweb10B_sp1024 [--tokenizer FILE] [--json FILE]

It prints a table (check; PASS, FAIL, or - for what is only said; what was found) and what each
split holds. The exit status is 0 if nothing fails, 1 if a check fails, 2 after one line for what
cannot be checked. Memory is bounded: a piece of the stream, the longest document, a hash of 16
bytes for each validation document. The published FineWeb export (a folder named fineweb10B_*) was
not made by data/prepare.py: what may differ there (text that changes when it is encoded again,
documents that are in both splits, no training shards) is said and does not fail.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from commands import BadInput, Parser, command, packages_from

with packages_from("data/requirements.txt"):
    import numpy as np
    from tqdm import tqdm

    from files import digest, write_atomically
    from manifest import FINEWEB_PREFIX, Manifest, find_tokenizer, read_manifest, table_of
    from scan import Counts, Pieces, Scan, hashes, whole_documents
    from shards import BOS_ID, count_tokens, shards_of
    from tokenizer import ByteTokenizer, Tokenizer
    from verdicts import Check

SPLITS = ("train", "val")
BATCH_DOCUMENTS = 1000
# Bytes of text that is encoded again.
SAMPLE_BYTES = 20_000_000
# Tokens to read, for which a progress bar is worth its line.
BAR_FROM = 50_000_000
# Problems of a check that are named; more of them say nothing new.
MOST_NAMED = 3
# Text that any normalization but identity changes: a ligature, a fraction, a sign for a letter,
# spaces of other kinds, several of them, a tab, line ends, spaces at the end.
PROBE = "x ﬁ ½ Å \u00a0 \u3000 two  spaces\tand\r\nlines \n "
# FineWeb's validation split with the tokenizer of 1,024 pieces: targets when the stream is cut to
# whole rows of 1,024, documents, and bytes of text (about).
FINEWEB_KNOWN = "fineweb10B_sp1024"
FINEWEB_ROW = 1024
FINEWEB_TARGETS = 62_021_632
FINEWEB_DOCUMENTS = 50_000
FINEWEB_BYTES = 151_080_000
FINEWEB_TOLERANCE = 0.0005


# ---- What to check
def is_published(folder: Path) -> bool:
    """Tell whether a folder's name is one of the FineWeb export."""
    return folder.name.startswith(FINEWEB_PREFIX)


def find_shards(folder: Path) -> dict[str, list[Path]]:
    """Return the shards of each split in order of their names; BadInput if there are none."""
    if not folder.is_dir():
        raise BadInput(
            f"{folder} is not a folder: name a folder of shards, as for train_gpt.py's DATA_PATH"
        )
    shards = {split: shards_of(folder, split) for split in SPLITS}
    if not any(shards.values()):
        raise BadInput(
            f"{folder} holds no token shards (*_train_*.bin, *_val_*.bin): name another folder"
        )
    return shards


# ---- The checks
def joined(problems: list[str], otherwise: str, notes: Iterable[str] = ()) -> str:
    """Return the first problems, or what is said without any, and the notes behind that."""
    return "; ".join([*(problems[:MOST_NAMED] or [otherwise]), *notes])


def check_shards(shards: dict[str, list[Path]], published: bool) -> Check:
    """Check magic, version and size of every shard, and that no split is empty.

    Gaps in the numbers are only said.
    """
    problems = []
    notes = []
    tokens = 0
    for split, paths in shards.items():
        found = 0
        for path in paths:
            try:
                found += count_tokens(path)
            except BadInput as error:
                problems.append(str(error))
        tokens += found
        if not paths:
            missing = f"there is no {split} split"
            if published and split == "train":
                notes.append(missing)
            else:
                problems.append(missing)
        elif found == 0 and not problems:
            problems.append(f"the {split} split is empty")
        notes.extend(gaps(split, paths))
    files = sum(len(paths) for paths in shards.values())
    right = f"{files} files, {tokens:,} tokens, sizes and headers right"
    return Check("shards", not problems, joined(problems, right, notes))


def gaps(split: str, paths: list[Path]) -> list[str]:
    """Say in one line, if any, which numbers are missing among a split's shards."""
    numbers = set()
    for path in paths:
        number = re.search(r"_(\d+)\.bin$", path.name)
        if number:
            numbers.add(int(number[1]))
    missing = sorted(set(range(max(numbers, default=-1) + 1)) - numbers)
    if not missing:
        return []
    return [f"{split} shard {missing[0]} is not there ({len(missing)} numbers are missing)"]


def check_files(folder: Path, manifest: Manifest, tokenizer: Path, bar: tqdm) -> Check:
    """Check sizes and digests of all files in the manifest, and that it lists every shard."""
    files = manifest.table("files")
    if not files:
        said = f"{manifest.name} lists no files" if manifest.name else "there is none"
        return Check("manifest", None, said)
    problems = []
    for path in sorted(folder.glob("*_*_*.bin")):
        if path.name not in files:
            problems.append(f"{path.name} is not in {manifest.name}")
    for name in sorted(files):
        problems.extend(problems_of(folder / name, name, table_of(files, name)))
        if (folder / name).is_file():
            bar.update((folder / name).stat().st_size // 2)
    stated = manifest.table("tokenizer").get("sha256")
    if stated and stated != digest(tokenizer):
        problems.append(f"{tokenizer} has another SHA-256 than {manifest.name} says")
    right = f"{len(files)} files as {manifest.name} says"
    return Check("manifest", not problems, joined(problems, right))


def problems_of(path: Path, name: str, stated: dict) -> list[str]:
    """Say in one line, if anything, how a file differs from what is stated of it."""
    if not path.is_file():
        return [f"{name} is not there"]
    size = path.stat().st_size
    if size != stated.get("bytes"):
        return [f"{name} has {size:,} bytes, not {stated.get('bytes')}"]
    if digest(path) != stated.get("sha256"):
        return [f"{name} has another SHA-256"]
    return []


def check_tokenizer(pieces: Pieces, folder: Path, manifest: Manifest) -> Check:
    """Check that it has what shards of any text need, and the data set's size.

    That it normalizes is only said.
    """
    problems = [f"it needs {need}" for need in pieces.tokenizer.lacks()]
    notes = []
    stated = manifest.content.get("vocabulary_size")
    number = re.search(r"_sp(\d+)$", folder.name)
    if not stated and number:
        stated = int(number[1])
    if stated and stated != pieces.size:
        problems.append(f"{pieces.size} pieces, but the data set is of {stated}")
    if pieces.tokenizer.decode(pieces.tokenizer.encode([PROBE])) != [PROBE]:
        notes.append("it normalizes: not every text comes back as it was")
    right = f"{pieces.path.name}: {pieces.size:,} pieces, BOS {BOS_ID}, ▁, 256 bytes"
    return Check("tokenizer", not problems, "; ".join([*(problems or [right]), *notes]))


def check_ids(scans: dict[str, Scan], pieces: Pieces) -> Check:
    """Check that ids are pieces, none padding or unknown, and that each split begins with BOS."""
    problems = []
    for split, scan in scans.items():
        largest = int(np.flatnonzero(scan.histogram)[-1])
        if largest >= pieces.size:
            problems.append(
                f"id {largest} in {split}, but the tokenizer has {pieces.size:,} pieces"
            )
        if scan.first != BOS_ID:
            problems.append(f"{split} begins with id {scan.first}, not with BOS ({BOS_ID})")
        for name, piece in pieces.tokenizer.special.items():
            # A tokenizer without such a piece has -1.
            if piece >= 0 and scan.histogram[piece]:
                times = scan.histogram[piece]
                problems.append(f"{split} has {times:,} ids for {name} ({piece})")
    right = f"all below {pieces.size:,}, no padding, none unknown, each split begins with BOS"
    return Check("ids", not problems, "; ".join(problems or [right]))


@dataclass
class Sample:
    """What became of documents that were encoded again."""

    documents: int = 0
    bytes: int = 0
    same_text: int = 0
    same_ids: int = 0

    def add(
        self,
        tokenizer: Tokenizer | ByteTokenizer,
        texts: list[str],
        ids: list[list[int]],
    ) -> None:
        """Encode the texts of documents again and compare with their ids and with themselves."""
        encoded = tokenizer.encode(texts)
        decoded = tokenizer.decode(encoded)
        for text, new_text in zip(texts, decoded, strict=True):
            self.documents += 1
            self.bytes += len(text.encode())
            if new_text == text:
                self.same_text += 1
        for old_ids, new_ids in zip(ids, encoded, strict=True):
            if new_ids == old_ids:
                self.same_ids += 1


def check_text(
    paths: list[Path], stated: int, pieces: Pieces, published: bool, bar: tqdm
) -> list[Check]:
    """Decode the validation split and compare its bytes with `stated`, those of the pieces.

    A sample of the documents, spread evenly, is encoded again.
    """
    tokenizer = pieces.tokenizer
    # One document in so many is encoded again.
    step = max(1, -(-stated // SAMPLE_BYTES))
    documents = 0
    decoded_bytes = 0
    sample = Sample()
    for found in whole_documents(paths, bar):
        for start in range(0, len(found), BATCH_DOCUMENTS):
            batch = []
            for document in found[start : start + BATCH_DOCUMENTS]:
                batch.append(document[~pieces.silent[document]].tolist())
            texts = tokenizer.decode(batch)
            decoded_bytes += sum(len(text.encode()) for text in texts)
            chosen = slice(-documents % step, None, step)
            sample.add(tokenizer, texts[chosen], batch[chosen])
            documents += len(batch)
    lossless = (
        f"{sample.same_text:,} of {sample.documents:,} documents ({sample.bytes:,} bytes) decode "
        f"to themselves, {sample.same_ids:,} encode to their ids"
    )
    if sample.same_ids < sample.documents / 2:
        lossless += ": did another tokenizer make these shards?"
    counted = f"{stated:,} by the pieces, {decoded_bytes:,} decoded, val"
    all_same = sample.same_text == sample.documents
    return [
        Check("bytes", decoded_bytes == stated, counted),
        Check("lossless", passed_or_said(all_same, published), lossless),
    ]


def passed_or_said(passed: bool, published: bool) -> bool | None:
    """Return None for what does not pass, but may be so in the published export."""
    if published and not passed:
        return None
    return passed


def check_overlap(shards: dict[str, list[Path]], published: bool, bar: tqdm) -> Check:
    """Look for exact duplicates of validation documents in the training split."""
    if "train" not in shards:
        return Check("overlap", None, "there is no train split")
    held_out: set[bytes] = set()
    for documents in whole_documents(shards["val"], bar):
        held_out.update(hashes(documents))
    met: set[bytes] = set()
    times = 0
    total = 0
    for documents in whole_documents(shards["train"], bar):
        twice = [found for found in hashes(documents) if found in held_out]
        met.update(twice)
        times += len(twice)
        total += len(documents)
    figure = (
        f"{len(met):,} of {len(held_out):,} validation documents are among {total:,} for training"
    )
    if met:
        figure += f", {times:,} times"
    return Check("overlap", passed_or_said(not met, published), figure)


def check_counts(manifest: Manifest, counts: dict[str, Counts]) -> Check:
    """Compare documents, bytes and tokens with what the manifest states."""
    if not any(manifest.table(split) for split in SPLITS):
        return Check("counts", None, "stated nowhere")
    problems = []
    for split, found in counts.items():
        for key, stated in manifest.table(split).items():
            if key not in ("documents", "bytes", "tokens"):
                continue
            value = getattr(found, key)
            if stated != value:
                problems.append(f"{split}: {value:,} {key}, but {manifest.name} says {stated}")
    return Check("counts", not problems, "; ".join(problems or [f"as {manifest.name} says"]))


def check_known(val: Counts) -> Check:
    """Compare with the published figures of FineWeb's validation split with 1,024 pieces."""
    targets = (val.tokens - 1) // FINEWEB_ROW * FINEWEB_ROW
    passed = (
        targets == FINEWEB_TARGETS
        and val.documents == FINEWEB_DOCUMENTS
        and abs(val.bytes / FINEWEB_BYTES - 1) <= FINEWEB_TOLERANCE
    )
    figure = (
        f"{targets:,} targets, {FINEWEB_TARGETS:,} known; {val.documents:,} documents, "
        f"{FINEWEB_DOCUMENTS:,}; {val.bytes:,} bytes, about {FINEWEB_BYTES:,}"
    )
    return Check("known split", passed, figure)


def not_checked(reason: str, *names: str) -> list[Check]:
    """Return lines for checks that need what another has found wrong."""
    return [Check(name, None, f"not checked: {reason}") for name in names]


# ---- All of them
def check_folder(folder: Path, given: Path | None) -> tuple[list[Check], dict[str, Counts]]:
    """Return all checks of a folder, and the counts of each split.

    `given` is the tokenizer that people name. BadInput for what cannot be checked.
    """
    # Without links being followed: the folder's name and its neighbours say what it is.
    folder = Path(os.path.abspath(folder))
    shards = find_shards(folder)
    manifest = read_manifest(folder)
    tokenizer = find_tokenizer(folder, given)
    passes = tokens_to_read(shards, bool(manifest.table("files")))
    with tqdm(
        total=passes, unit="token", unit_scale=True, disable=passes < BAR_FROM, leave=False
    ) as bar:
        of_shards = check_shards(shards, is_published(folder))
        checks = [of_shards, check_files(folder, manifest, tokenizer, bar)]
        try:
            pieces = Pieces(tokenizer)
        except BadInput as error:
            checks.append(Check("tokenizer", False, str(error)))
            reason = "there is no tokenizer"
        else:
            checks.append(check_tokenizer(pieces, folder, manifest))
            reason = ""
        if not of_shards.passed:
            reason = "shards are wrong"
        if reason:
            checks.extend(not_checked(reason, "ids", "bytes", "lossless", "overlap"))
            return checks, {}
        of_content, counts = check_content(shards, pieces, manifest, folder, bar)
        return checks + of_content, counts


def tokens_to_read(shards: dict[str, list[Path]], digests: bool) -> int:
    """Return how many tokens all checks together read, for the progress bar."""
    sizes = {}
    for split, paths in shards.items():
        sizes[split] = sum(path.stat().st_size // 2 for path in paths)
    total = sum(sizes.values())
    # Both splits for the ids and for the overlap, the validation split for the text.
    needed = 2 * total + sizes["val"]
    if digests:
        needed += total
    return needed


def check_content(
    shards: dict[str, list[Path]], pieces: Pieces, manifest: Manifest, folder: Path, bar: tqdm
) -> tuple[list[Check], dict[str, Counts]]:
    """Return the checks that read tokens, and the counts of each split that is there."""
    published = is_published(folder)
    there = {split: paths for split, paths in shards.items() if paths}
    scans = {split: Scan(paths, pieces, bar) for split, paths in there.items()}
    counts = {split: scan.counts() for split, scan in scans.items()}
    ids = check_ids(scans, pieces)
    if not ids.passed:
        return [ids, *not_checked("its ids are wrong", "bytes", "lossless", "overlap")], counts
    checks = [
        ids,
        *check_text(there["val"], counts["val"].bytes, pieces, published, bar),
        check_overlap(there, published, bar),
        check_counts(manifest, counts),
    ]
    if folder.name == FINEWEB_KNOWN:
        checks.append(check_known(counts["val"]))
    return checks, counts


# ---- The command
def table(checks: list[Check], counts: dict[str, Counts]) -> str:
    """Return the checks and the counts as text."""
    width = max(len(check.name) for check in checks)
    words = {True: "PASS", False: "FAIL", None: "-"}
    lines = []
    for check in checks:
        lines.append(f"{check.name:{width}}  {words[check.passed]:4}  {check.figure}")
    if counts:
        lines.append("")
        lines.append(
            f"{'split':5}  shards {'tokens':>15} {'documents':>11} {'bytes':>15} bytes/token"
        )
    for split, found in counts.items():
        lines.append(
            f"{split:5} {found.shards:7,} {found.tokens:15,} {found.documents:11,} "
            f"{found.bytes:15,} {found.bytes_per_token:11.4f}"
        )
    return "\n".join(lines)


def as_json(checks: list[Check], counts: dict[str, Counts]) -> bytes:
    """Return the same for programs."""
    splits = {}
    for split, found in counts.items():
        splits[split] = {**asdict(found), "bytes_per_token": found.bytes_per_token}
    content = {"checks": [check._asdict() for check in checks], "counts": splits}
    return f"{json.dumps(content, indent=1)}\n".encode()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    return parser.parse_args(arguments)


@command(stopped="interrupted: nothing half done is left")
def main(arguments: list[str] | None = None) -> int:
    """Check a folder and print what was found; return the exit status."""
    options = parse(arguments)
    if options.json and not options.json.resolve().parent.is_dir():
        raise BadInput(f"--json {options.json}: its folder does not exist")
    checks, counts = check_folder(options.folder, options.tokenizer)
    print(table(checks, counts))
    if options.json:
        write_atomically(options.json, as_json(checks, counts))
    failed = [check for check in checks if check.passed is False]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
