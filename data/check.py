"""Check a folder of token shards and their tokenizer before hours of training depend on them.

    python data/check.py data/datasets/fineweb10B_sp1024 [--tokenizer FILE] [--json FILE]

It prints a table (check; PASS, FAIL, or - for what is only said; what was found) and what each
split holds. The exit status is 0 if nothing fails, 1 if a check fails, 2 after one line for what
cannot be checked. Memory is bounded: a piece of the stream, the longest document, a hash of 16
bytes for each validation document. An export of FineWeb (a folder named fineweb10B_*, or one whose
manifest says so) was not made by data/prepare.py: what may differ there (some text that changes
when it is encoded again, some documents that are in both splits, no training shards) is said and
does not fail. It must have the validation split that is publicly known.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from commands import BadInput, Parser, command, packages_from

with packages_from("data/requirements.txt"):
    import numpy as np
    from tqdm import tqdm

    import fineweb
    from byte_files import compare_byte_files, match_byte_files
    from case_operators import is_rewritten
    from encoding import encode_again
    from files import digest, write_atomically
    from manifest import (
        Manifest,
        digest_of_tokenizer,
        find_tokenizer,
        read_manifest,
        table_of,
    )
    from scan import Counts, Pieces, Scan, hashes, whole_documents
    from shards import BOS_ID, NAME, count_tokens, shards_of
    from tokenizer import ByteTokenizer, Normalization, Tokenizer
    from verdicts import Check

SPLITS = ("train", "val")
BATCH_DOCUMENTS = 1000
# Bytes of text that is encoded again.
SAMPLE_BYTES = 20_000_000
# Tokens to read, for which a progress bar is worth its line.
BAR_FROM = 50_000_000
# Problems of a check that are named; more of them say nothing new.
MOST_NAMED = 3
# Of an export so many of the documents that are encoded again may have other ids, and so many of
# the validation documents may be in the training split too.
MOST_CHANGED = 0.25
MOST_SHARED = 0.01


# ---- What to check
@dataclass(frozen=True)
class Folder:
    """A folder of shards: its splits, its manifest, its tokenizer's file.

    `variant` is that of the export of FineWeb that it holds, None for other text.
    """

    path: Path
    shards: dict[str, list[Path]]
    manifest: Manifest
    tokenizer: Path
    variant: str | None

    @property
    def is_export(self) -> bool:
        """Whether it holds an export of FineWeb."""
        return self.variant is not None

    def there(self) -> dict[str, list[Path]]:
        """Return the splits that have shards."""
        return {split: paths for split, paths in self.shards.items() if paths}


def open_folder(path: Path, given: Path | None) -> Folder:
    """Return what is in a folder; BadInput if it holds no shards or has no tokenizer.

    `given` is the tokenizer that people name.
    """
    # Without links being followed: the folder's name and its neighbours say what it is.
    path = Path(os.path.abspath(path))
    shards = find_shards(path)
    manifest = read_manifest(path)
    variant = fineweb.variant_of(path.name, str(manifest.content.get("name")))
    return Folder(path, shards, manifest, find_tokenizer(path, given), variant)


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


def check_shards(folder: Folder) -> Check:
    """Check names, magic, version and size of every shard, and that no split is empty.

    A split must be of one data set, and that for validation whole. Missing training shards are
    only said.
    """
    problems = []
    notes = []
    tokens = 0
    for split, paths in folder.shards.items():
        found = 0
        for path in paths:
            try:
                found += count_tokens(path)
            except BadInput as error:
                problems.append(str(error))
        tokens += found
        if not paths:
            missing = f"there is no {split} split"
            if folder.is_export and split == "train":
                notes.append(missing)
            else:
                problems.append(missing)
        elif found == 0 and not problems:
            problems.append(f"the {split} split is empty")
        names = sorted({NAME.fullmatch(path.name)[1] for path in paths})
        if len(names) > 1:
            problems.append(
                f"{split} shards of {len(names)} data sets ({', '.join(names)}): give each a "
                "folder of its own"
            )
            continue
        gap = gap_of(split, paths)
        if gap and split == "val":
            problems.append(f"{gap}: a score would leave out its text; get or make it again")
        elif gap:
            notes.append(gap)
    files = sum(len(paths) for paths in folder.shards.values())
    right = f"{files} files, {tokens:,} tokens, sizes and headers right"
    return Check("shards", not problems, joined(problems, right, notes))


def gap_of(split: str, paths: list[Path]) -> str:
    """Say which numbers are missing among a split's shards; empty if none is.

    Those of the validation split begin at 0. Training shards may be some of many.
    """
    numbers = {int(NAME.fullmatch(path.name)[3]) for path in paths}
    if not numbers:
        return ""
    first = 0 if split == "val" else min(numbers)
    count = max(numbers) + 1 - first - len(numbers)
    if not count:
        return ""
    missing = next(number for number in range(first, max(numbers)) if number not in numbers)
    counted = "1 number is" if count == 1 else f"{count:,} numbers are"
    return f"{split} shard {missing} is not there ({counted} missing)"


def check_files(folder: Folder, bar: tqdm) -> Check:
    """Check sizes and digests of all files in the manifest, and that it lists every shard."""
    manifest = folder.manifest
    problems = []
    stated = manifest.table("tokenizer").get("sha256")
    if stated and stated != digest_of_tokenizer(folder.tokenizer):
        problems.append(f"{folder.tokenizer} has another SHA-256 than {manifest.name} says")
    files = manifest.table("files")
    if not files and not problems:
        said = f"{manifest.name} lists no files" if manifest.name else "there is none"
        return Check("manifest", None, said)
    for path in sorted(folder.path.glob("*_*_*.bin")):
        if files and path.name not in files:
            problems.append(f"{path.name} is not in {manifest.name}")
    for name in sorted(files):
        path = folder.path / name
        problems.extend(problems_of(path, name, table_of(files, name)))
        if path.is_file():
            bar.update(path.stat().st_size // 2)
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


def check_tokenizer(folder: Folder, pieces: Pieces) -> Check:
    """Check that it has what shards of any text need, and is of the kind that is stated.

    That it normalizes is only said.
    """
    tokenizer = pieces.tokenizer
    manifest = folder.manifest
    problems = [f"it needs {need}" for need in tokenizer.lacks()]
    notes = []
    stated = manifest.content.get("vocabulary_size") or pieces_by_name(folder)
    if stated and stated != pieces.size:
        problems.append(
            f"{pieces.size:,} pieces, but the data set is of {stated}: name its own with "
            "--tokenizer"
        )
    kind = manifest.table("tokenizer").get("kind")
    if kind not in (None, tokenizer.kind):
        problems.append(f"it is of kind {tokenizer.kind}, but {manifest.name} says {kind}")
    operators = manifest.table("tokenizer").get("case_operators")
    if operators not in (None, tokenizer.case_operators):
        has = "has" if tokenizer.case_operators else "has no"
        problems.append(
            f"{manifest.name} says case_operators {json.dumps(operators)}, but it {has} pieces "
            "for letter case: name the data set's own with --tokenizer"
        )
    if tokenizer.normalizes():
        notes.append("it normalizes: not every text comes back as it was")
    elif manifest.table("normalized"):
        problems.append(
            f"{manifest.name} says that it has normalized the text, but it changes none"
        )
    return Check("tokenizer", not problems, joined(problems, described_tokenizer(pieces), notes))


def pieces_by_name(folder: Folder) -> int | None:
    """Return the pieces that a folder's name tells: 8192 for fineweb10B_sp8192_more, or None."""
    number = re.search(r"_(?:sp|byte)(\d+)(?:_|$)", folder.path.name)
    return int(number[1]) if number else None


def described_tokenizer(pieces: Pieces) -> str:
    """Say what a tokenizer is."""
    size = f"{pieces.path.name}: {pieces.size:,} pieces, BOS {BOS_ID}"
    if isinstance(pieces.tokenizer, ByteTokenizer):
        return f"{size}, byte b is id b + {pieces.tokenizer.first}, no model file"
    if pieces.tokenizer.case_operators:
        size += ", operators for letter case"
    return f"{size}, ▁, 256 bytes"


def check_ids(scans: dict[str, Scan], pieces: Pieces) -> Check:
    """Check that ids are pieces, none padding or unknown, and that the splits have BOS.

    The validation split begins with it. Training shards may be some of many, cut anywhere.
    """
    problems = []
    notes = []
    for split, scan in scans.items():
        largest = int(np.flatnonzero(scan.histogram)[-1])
        if largest >= pieces.size:
            problems.append(
                f"id {largest} in {split}, but the tokenizer has {pieces.size:,} pieces"
            )
        if not scan.histogram[BOS_ID]:
            problems.append(
                f"{split} has no BOS ({BOS_ID}): its documents have no beginnings; make the "
                "shards again"
            )
        elif scan.first != BOS_ID and split == "train":
            notes.append(f"train begins with id {scan.first}, within a document")
        elif scan.first != BOS_ID:
            problems.append(
                f"{split} begins with id {scan.first}, not with BOS ({BOS_ID}): an earlier shard "
                "is not here, or was cut; get or make it again"
            )
        for name, piece in pieces.tokenizer.special.items():
            # A tokenizer without such a piece has -1.
            if piece >= 0 and scan.histogram[piece]:
                times = scan.histogram[piece]
                problems.append(f"{split} has {times:,} ids for {name} ({piece})")
    right = f"all below {pieces.size:,}, no padding, none unknown, each split begins with BOS"
    if notes:
        right = f"all below {pieces.size:,}, no padding, none unknown"
    return Check("ids", not problems, "; ".join([*(problems or [right]), *notes]))


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


def check_text(folder: Folder, stated: int, pieces: Pieces, bar: tqdm) -> list[Check]:
    """Decode the validation split and compare its bytes with `stated`, those of the pieces.

    A sample of the documents, spread evenly, is encoded again.
    """
    tokenizer = pieces.tokenizer
    # One document in so many is encoded again.
    step = max(1, -(-stated // SAMPLE_BYTES))
    documents = 0
    decoded_bytes = 0
    rewritten = False
    sample = Sample()
    for found in whole_documents(folder.shards["val"], bar):
        for start in range(0, len(found), BATCH_DOCUMENTS):
            batch = []
            for document in found[start : start + BATCH_DOCUMENTS]:
                batch.append(document[~pieces.silent[document]].tolist())
            texts = tokenizer.decode(batch)
            decoded_bytes += sum(len(text.encode()) for text in texts)
            rewritten = rewritten or (documents == 0 and is_rewritten("".join(texts)))
            chosen = slice(-documents % step, None, step)
            sample.add(tokenizer, texts[chosen], batch[chosen])
            documents += len(batch)
    lossless = (
        f"{sample.same_text:,} of {sample.documents:,} documents ({sample.bytes:,} bytes) decode "
        f"to themselves, {sample.same_ids:,} encode to their ids"
    )
    counted = f"{stated:,} by the pieces, {decoded_bytes:,} decoded, val"
    if rewritten:
        counted += (
            "; capitals are rewritten as operators, which the tokenizer does not have as four "
            "pieces of their own: make the data again (data/prepare.py --case-operators)"
        )
    all_same = sample.same_text == sample.documents
    return [
        Check("bytes", decoded_bytes == stated and not rewritten, counted),
        Check("lossless", passed_or_said(all_same, folder.is_export), lossless),
    ]


def check_normalized(folder: Folder, pieces: Pieces) -> list[Check]:
    """Say what normalizing has changed of the original text, where the tokenizer normalizes.

    data/prepare.py notes it. An export has normalized text too, but nobody has noted its share.
    """
    stated = folder.manifest.table("normalized")
    if not stated:
        if folder.is_export or not pieces.tokenizer.normalizes():
            return []
        said = "not stated: the text is the original one, or what the tokenizer has left of it"
        return [Check("normalized", None, said)]
    try:
        change = str(Normalization(**stated))
    except (TypeError, ValueError):
        said = f"{folder.manifest.name} does not say what has changed: make the data again"
        return [Check("normalized", False, said)]
    if folder.is_export:
        change += ": not the challenge's text, but called so: give it a name of its own"
        return [Check("normalized", False, change)]
    change += "; a score on it is none of the original text's"
    return [Check("normalized", None, change)]


def passed_or_said(passed: bool, may_fail: bool) -> bool | None:
    """Return None for what does not pass, but may be so."""
    if may_fail and not passed:
        return None
    return passed


def check_byte_files(folder: Folder, pieces: Pieces, bar: tqdm) -> tuple[Check, int | None]:
    """Compare the byte files of the validation split, if there are any, with the pieces.

    Also returns the bytes of text that they count, None without any.
    """
    shards = folder.shards["val"]
    try:
        byte_files = match_byte_files(folder.path, shards)
        if not byte_files:
            said = "there are none: bytes are counted by the pieces"
            if pieces.tokenizer.case_operators:
                said += ", an operator for letter case as none"
            return Check("byte files", None, said), None
        found = compare_byte_files(byte_files, shards, pieces, bar)
    except BadInput as error:
        return Check("byte files", False, str(error)), None
    said = f"{len(byte_files)} with {found.tokens:,} sizes: {found}"
    if not found.agrees:
        said += ": not of these shards, get them again"
    return Check("byte files", found.agrees, said), found.bytes


def check_encoding(folder: Folder, pieces: Pieces) -> Check:
    """Check that documents of every shard, decoded and encoded again, have their ids.

    Of an export, whose tokenizer normalizes, a few may have others. Shards of another tokenizer
    with as many pieces look right in every other way.
    """
    samples = []
    for paths in folder.there().values():
        samples.extend(encode_again(paths, pieces))
    documents = sum(sample.documents for sample in samples)
    differing = [sample for sample in samples if sample.changed]
    if not differing:
        right = f"{documents:,} documents of {len(samples)} shards encode to their ids"
        return Check("encoding", True, right)
    changed = sum(sample.changed for sample in differing)
    foreign = [sample for sample in differing if sample.is_foreign]
    first = (foreign or differing)[0].first
    said = f"{changed:,} of {documents:,} documents encode to other ids, first {first}"
    if folder.is_export and not foreign and changed <= MOST_CHANGED * documents:
        return Check("encoding", None, f"{said}; normalizing makes a few")
    if len(foreign) < len(samples):
        said += f"; {len(foreign)} of {len(samples)} shards are of another tokenizer"
    return Check(
        "encoding",
        False,
        f"{said}: did another tokenizer make these shards? Name theirs with --tokenizer",
    )


def check_overlap(folder: Folder, pieces: Pieces, bar: tqdm) -> Check:
    """Look for exact duplicates of validation documents in the training split.

    An export has a few. Many are in the one that was public at first, which is known by the number
    of its shards.
    """
    shards = folder.shards
    if not shards["train"]:
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
    if pieces.tokenizer.case_operators and len(shards["train"]) == fineweb.LEAKED_SHARDS:
        figure += (
            f"; {fineweb.LEAKED_SHARDS:,} training shards with operators for letter case are the "
            "sign of the public export that holds 40,000 of them (openai/parameter-golf, issue "
            "2127)"
        )
    few = folder.is_export and len(met) <= MOST_SHARED * len(held_out)
    passed = passed_or_said(not met, few)
    if passed is False:
        figure += ": no score is valid after training on it; get or make other training shards"
    return Check("overlap", passed, figure)


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


def check_known(variant: str, val: Counts) -> Check:
    """Compare with what is publicly known of FineWeb's validation split."""
    passed = (
        fineweb.has_known_tokens(variant, val.tokens)
        and fineweb.has_known_bytes(val.bytes)
        and val.documents == fineweb.DOCUMENTS
    )
    tokens = f"{val.tokens:,} tokens"
    if variant in fineweb.VALIDATION_TOKENS:
        tokens += f", about {fineweb.VALIDATION_TOKENS[variant]:,} known"
    if variant == fineweb.EXACT_VARIANT:
        targets = fineweb.targets_in_rows(val.tokens)
        tokens = f"{targets:,} targets, {fineweb.EXACT_TARGETS:,} known"
    figure = (
        f"{tokens}; {val.documents:,} documents, {fineweb.DOCUMENTS:,}; {val.bytes:,} bytes, about "
        f"{fineweb.BYTES:,}"
    )
    if not passed:
        figure += ": no score on it is the challenge's; get the split again with data/download.py"
    return Check("known split", passed, figure)


def not_checked(reason: str, *names: str) -> list[Check]:
    """Return lines for checks that need what another has found wrong."""
    return [Check(name, None, f"not checked: {reason}") for name in names]


# ---- All of them
# The checks that read the tokens behind their ids, in the order of the table.
OF_CONTENT = ("bytes", "lossless", "byte files", "encoding", "overlap")


def check_folder(path: Path, given: Path | None) -> tuple[list[Check], dict[str, Counts]]:
    """Return all checks of a folder, and the counts of each split.

    `given` is the tokenizer that people name. BadInput for what cannot be checked.
    """
    folder = open_folder(path, given)
    passes = tokens_to_read(folder)
    with tqdm(
        total=passes, unit="token", unit_scale=True, disable=passes < BAR_FROM, leave=False
    ) as bar:
        of_shards = check_shards(folder)
        checks = [of_shards, check_files(folder, bar)]
        try:
            pieces = Pieces(folder.tokenizer)
        except BadInput as error:
            checks.append(Check("tokenizer", False, str(error)))
            reason = "there is no tokenizer"
        else:
            checks.append(check_tokenizer(folder, pieces))
            reason = ""
        if not of_shards.passed:
            reason = "shards are wrong"
        if reason:
            checks.extend(not_checked(reason, "ids", *OF_CONTENT))
            return checks, {}
        of_content, counts = check_content(folder, pieces, bar)
        return checks + of_content, counts


def tokens_to_read(folder: Folder) -> int:
    """Return how many tokens all checks together read, for the progress bar."""
    sizes = {}
    for split, paths in folder.shards.items():
        sizes[split] = sum(path.stat().st_size // 2 for path in paths)
    total = sum(sizes.values())
    # Both splits for the ids and for the overlap, the validation split for text and byte files.
    needed = 2 * total + 2 * sizes["val"]
    if folder.manifest.table("files"):
        needed += total
    return needed


def check_content(
    folder: Folder, pieces: Pieces, bar: tqdm
) -> tuple[list[Check], dict[str, Counts]]:
    """Return the checks that read tokens, and the counts of each split that is there."""
    scans = {split: Scan(paths, pieces, bar) for split, paths in folder.there().items()}
    counts = {split: scan.counts() for split, scan in scans.items()}
    ids = check_ids(scans, pieces)
    if not ids.passed:
        return [ids, *not_checked("its ids are wrong", *OF_CONTENT)], counts
    val = counts["val"]
    of_byte_files, byte_total = check_byte_files(folder, pieces, bar)
    checks = [
        ids,
        *check_text(folder, val.bytes, pieces, bar),
        *check_normalized(folder, pieces),
        of_byte_files,
        check_encoding(folder, pieces),
        check_overlap(folder, pieces, bar),
        check_counts(folder.manifest, counts),
    ]
    if folder.variant is not None:
        text_bytes = val.bytes if byte_total is None else byte_total
        checks.append(check_known(folder.variant, replace(val, bytes=text_bytes)))
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
        help="SentencePiece model, or byte260 [what the manifest names, or tokenizer.model there, "
        "or that of an export by the folder's name]",
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
