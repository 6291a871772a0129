"""Download the challenge's FineWeb exports: token shards and their tokenizer, for train_gpt.py.

    python data/download.py --variant sp1024 --train-shards 80

An export is the folder datasets/ of a Hugging Face dataset repository, where a manifest lists the
variants; where there is none, the names of the files show them. The published ones are

    sp1024, byte260    willdepueoai/parameter-golf
    sp4096, sp8192     kevclark/parameter-golf (143 and 128 training shards)
    caseops            romeerp/parameter-golf-caseops-v1 (80 training shards)

and --repo names another repository. byte260 has bytes in the place of pieces. caseops, in full
sp8192_lossless_caps_caseops_v1_reserved, has operators in the place of capitals; beside its
validation shards are byte files, which say what each token is worth in bytes of the original text.

The validation split comes whole, of the training split come the first shards, into
data/datasets/fineweb10B_<variant>/ and data/tokenizers/. All files are of one commit of the
repository. Each is checked (size, SHA-256, header, tokens) before it takes its name, so after an
interruption the same command goes on with the first file that is missing; parts are not kept, as
huggingface_hub 2.4.0 cannot go on with them. A server that brings less than 10,000 bytes a second
ends it in one line, and so does the page of a captive portal. Training shards beyond those asked
for, where there are any, are checked and mended like the others. manifest.json beside the shards
notes the commit, the tokenizer, the tokens and the digests, for train_gpt.py and data/check.py, and
what of the validation split is still to come, without which neither lets training begin.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from commands import BadInput, Parser, command, packages_from, say

with packages_from("data/requirements.txt"):
    # Before hub: without tqdm, huggingface_hub prints a line of its own.
    import tqdm

    from files import clear, digest, ignore, own_folder, write_atomically
    from fineweb import LEAKED_SHARDS
    from hub import Damaged, Hub, Target
    from manifest import (
        CASE_OPERATOR_EXPORT,
        FINEWEB_PREFIX,
        ROOT,
        command_to_train,
        read_object,
    )
    from shards import byte_files_of, count_tokens, shards_of
    from tokenizer import open_tokenizer

# The published variants, and the dataset repository of each.
REPOSITORIES = {
    "sp1024": "willdepueoai/parameter-golf",
    "byte260": "willdepueoai/parameter-golf",
    "sp4096": "kevclark/parameter-golf",
    "sp8192": "kevclark/parameter-golf",
    CASE_OPERATOR_EXPORT: "romeerp/parameter-golf-caseops-v1",
}
# Of a variant that is not among them.
REPOSITORY = REPOSITORIES["sp1024"]
SHORT_NAMES = {"caseops": CASE_OPERATOR_EXPORT, "sp8192_caseops": CASE_OPERATOR_EXPORT}
# The export's folder in a repository, its manifest, and its shards.
EXPORT = "datasets"
HUB_MANIFEST = f"{EXPORT}/manifest.json"
SHARD = re.compile(rf"{EXPORT}/datasets/(\w+)/fineweb_(train|val)_(\d{{6}})\.bin")
# As the challenge's own command has it; the README says which one to take.
DEFAULT_VARIANT = "sp1024"
SPLITS = ("val", "train")
# Byte b is id b + 4. Such shards have no tokenizer's file that anybody needs.
BYTES = "byte260"
BYTE_IDS = 260
# Bytes to be left free on the disk.
SPARE_BYTES = 100_000_000


# ---- What a repository has
@dataclass(frozen=True)
class Export:
    """What is known of one variant before it is here; None where nothing is known."""

    # As fineweb10B_sp1024.
    name: str
    # The number of shards, of tokens and of documents of each split.
    shards: dict[str, int]
    tokens: dict[str, int | None]
    documents: dict[str, int | None]
    # The tokens of each shard but a split's last.
    shard_size: int | None
    # The names of the tokenizer's files, the SentencePiece model first; none for bytes.
    tokenizer: list[str]
    pieces: int | None
    # Whether there is a byte file beside each validation shard.
    byte_files: bool

    def tokens_of(self, split: str, index: int) -> int | None:
        """Return the tokens that a shard must have, as far as the manifest says."""
        if self.shard_size is None or index < self.shards[split] - 1:
            return self.shard_size
        total = self.tokens[split]
        if total is None:
            return None
        # An export that ends at a given number of shards counts its last document whole (#1729).
        return min(self.shard_size, total - index * self.shard_size)


def find_export(hub: Hub, variant: str, staging: Path) -> Export:
    """Return what a repository has of a variant; BadInput, naming all that it has, without it.

    The hub's manifest says it. Where there is none, or it lists no data sets, the names of the
    files do.
    """
    manifest = {}
    if HUB_MANIFEST in hub.files:
        no_bar = tqdm.tqdm(disable=True)
        manifest = read_hub_manifest(hub.fetch(HUB_MANIFEST, staging, no_bar))
    if not entries(manifest, "datasets"):
        manifest = manifest_of_files(hub.files)
    export = read_export(manifest, variant, hub)
    if "caseops" in variant and export.shards["train"] == LEAKED_SHARDS:
        raise BadInput(
            f"{hub.repository}: case-operator data with {LEAKED_SHARDS:,} training shards has "
            "40,000 validation documents among them (openai/parameter-golf, issue 2127), so a "
            f"score would be false: take {REPOSITORIES[CASE_OPERATOR_EXPORT]}"
        )
    return export


def read_hub_manifest(path: Path) -> dict:
    """Read the hub's manifest; BadInput if it is no JSON object."""
    try:
        return read_object(path)
    except BadInput as error:
        kind = "no JSON object"
        if path.read_bytes().lstrip().startswith(b"<"):
            kind = "a web page, no JSON object"
        raise BadInput(f"the hub's manifest.json is {kind}: check --repo and --revision") from error


def manifest_of_files(paths: Iterable[str]) -> dict:
    """Return what the names of the files show, in the form of the hub's manifest."""
    found: dict[str, dict[str, int]] = {}
    for path in paths:
        shard = SHARD.fullmatch(path)
        if shard:
            name, split, number = shard.groups()
            stats = found.setdefault(name, {"files_train": 0, "files_val": 0})
            key = f"files_{split}"
            stats[key] = max(stats[key], int(number) + 1)
    return {"datasets": [{"name": name, "stats": stats} for name, stats in found.items()]}


def whole_number(value: object) -> int | None:
    """Return the value if it is a whole number of at least 0."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return None


def entries(manifest: dict, key: str) -> dict[str, dict]:
    """Return the manifest's list under a key, by name, without what is no such entry."""
    listed = manifest.get(key)
    found = {}
    if isinstance(listed, list):
        for entry in listed:
            if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                found[entry["name"]] = entry
    return found


def read_export(manifest: dict, variant: str, hub: Hub) -> Export:
    """Read a variant in the hub's manifest; BadInput if it is absent."""
    name = FINEWEB_PREFIX + variant
    datasets = entries(manifest, "datasets")
    if name not in datasets:
        raise BadInput(absent(variant, datasets, hub.repository))
    dataset = datasets[name]
    shards = counted(dataset, "files")
    if None in shards.values() or not shards["val"]:
        raise BadInput(f"the hub's manifest does not say how many shards {name} has: check --repo")
    pieces = whole_number(dataset.get("vocab_size"))
    number = re.match(r"sp(\d+)(_|$)", variant)
    if not pieces and number:
        pieces = int(number[1])
    if variant == BYTES:
        pieces = BYTE_IDS
    beginning = f"{EXPORT}/datasets/{name}/fineweb_val_bytes_"
    byte_files = any(path.startswith(beginning) for path in hub.files)
    return Export(
        name=name,
        shards=shards,
        tokens=counted(dataset, "tokens"),
        documents=counted(dataset, "docs"),
        shard_size=whole_number(manifest.get("shard_size")),
        tokenizer=tokenizer_files(manifest, dataset, variant, hub.files),
        pieces=pieces or None,
        byte_files=byte_files or bool(dataset.get("val_bytes_glob")),
    )


def absent(variant: str, datasets: Iterable[str], repository: str) -> str:
    """Say that a repository lacks a variant, what it has, and what is elsewhere."""
    known = [name for name in sorted(datasets) if name.startswith(FINEWEB_PREFIX)]
    listed = ", ".join(name.removeprefix(FINEWEB_PREFIX) for name in known)
    advice = f"published are {', '.join(REPOSITORIES)}"
    if REPOSITORIES.get(variant, repository) != repository:
        advice = f"{REPOSITORIES[variant]} has it, so leave --repo out"
    return f"--variant {variant} is not in {repository}, which has {listed or 'none'}; {advice}"


def counted(dataset: dict, unit: str) -> dict[str, int | None]:
    """Return the number of files, tokens or docs of each split, as far as the manifest says."""
    stats = dataset.get("stats")
    if not isinstance(stats, dict):
        stats = {}
    return {split: whole_number(stats.get(f"{unit}_{split}")) for split in SPLITS}


def tokenizer_files(
    manifest: dict, dataset: dict, variant: str, files: Container[str]
) -> list[str]:
    """Return the names of a tokenizer's files, its SentencePiece model first; BadInput without.

    Where the manifest does not list the tokenizer, it is the one that is called like the data set.
    """
    if variant == BYTES:
        return []
    tokenizer = entries(manifest, "tokenizers").get(str(dataset.get("tokenizer_name")))
    paths = []
    if tokenizer is not None:
        paths = [tokenizer.get("model_path"), tokenizer.get("vocab_path")]
    else:
        called = re.sub(r"^sp(\d+)", r"fineweb_\1_bpe", variant)
        for name in (f"{called}.model", f"{called}.vocab"):
            if f"{EXPORT}/tokenizers/{name}" in files:
                paths.append(name)
    names = [PurePosixPath(path).name for path in paths if isinstance(path, str)]
    if not names or not names[0].endswith(".model"):
        raise BadInput(
            f"--variant {variant} has no SentencePiece model, which train_gpt.py needs: take "
            "another variant"
        )
    return names


# ---- Files here
def count_pieces(path: Path) -> int:
    """Return the pieces of a tokenizer; BadInput if the file is none."""
    return open_tokenizer(path).size


# What is counted in a file, by its ending, and how.
COUNTED = {".bin": (count_tokens, "tokens"), ".model": (count_pieces, "pieces")}


def verify(target: Target, path: Path, report: Callable[[int], object] = ignore) -> str:
    """Return the SHA-256 of a file; Damaged if it is not what the target says.

    `report` is told of the bytes that are read.
    """
    size = path.stat().st_size
    if size != target.bytes:
        raise Damaged(f"{path.name} has {size:,} bytes, but the hub says {target.bytes:,}")
    if path.suffix in COUNTED:
        count, unit = COUNTED[path.suffix]
        try:
            there = count(path)
        except BadInput as error:
            raise Damaged(str(error)) from error
        if target.count not in (None, there):
            raise Damaged(f"{path.name} has {there:,} {unit}, but {target.count:,} are due")
    found = digest(path, report)
    if target.sha256 not in (None, found):
        raise Damaged(f"{path.name} has another SHA-256 than the hub says")
    return found


def digests_here(targets: list[Target]) -> dict[Target, str]:
    """Return the SHA-256 of each file that is here already as the hub has it.

    All bytes are read: damage that leaves the size as it was shows in no other way.
    """
    here = [target for target in targets if target.path.is_file()]
    total = sum(target.path.stat().st_size for target in here)
    found = {}
    with tqdm.tqdm(
        desc="checking", total=total, unit="B", unit_scale=True, disable=not here, leave=False
    ) as bar:
        for target in here:
            with contextlib.suppress(Damaged):
                found[target] = verify(target, target.path, bar.update)
    return found


def bring(hub: Hub, target: Target, staging: Path, bar: tqdm.tqdm) -> str:
    """Download a file, verify it and give it its name; return its SHA-256.

    If it is damaged it is fetched once more.
    """
    done = bar.n
    try:
        found = verify(target, hub.fetch(target.remote, staging, bar, target.bytes))
    except Damaged as error:
        say(f"{error}: fetching it once more")
        bar.n = done
        found = bring_again(hub, target, staging, bar)
    os.replace(staging / target.remote, target.path)
    # Whatever attempts that failed have added.
    bar.n = done + target.bytes
    return found


def bring_again(hub: Hub, target: Target, staging: Path, bar: tqdm.tqdm) -> str:
    """Download and verify a file that came damaged; BadInput if it does so again."""
    staged = staging / target.remote
    staged.unlink(missing_ok=True)
    try:
        return verify(target, hub.fetch(target.remote, staging, bar, target.bytes, again=True))
    except Damaged as error:
        staged.unlink(missing_ok=True)
        raise BadInput(
            f"{target.remote} came damaged twice ({error}): tell those who keep the repository, "
            "or take another --revision"
        ) from error


class Notes:
    """The manifest.json beside the shards: of which commit they are, their digests and tokens.

    It lists all files of the validation split from the beginning, so that training misses what an
    interrupted download has not brought.
    """

    def __init__(
        self, folder: Path, export: Export, facts: dict[str, object], missing: list[Target]
    ):
        self.path = folder / "manifest.json"
        self.export = export
        self.facts = facts
        if not export.tokenizer:
            self.facts["tokenizer"] = {"kind": "bytes"}
        # What is here, and what of the validation split is still to come.
        self.files: dict[str, dict] = {}
        self.due: dict[str, dict] = {}
        for target in missing:
            if "_val_" in target.path.name:
                self.due[target.path.name] = {"bytes": target.bytes, "sha256": target.sha256}

    def add(self, path: Path, sha256: str) -> None:
        """Note the digest of a file that is here; of the tokenizer's model, what it is, too."""
        if path.parent == self.path.parent:
            self.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256}
        elif path.suffix == ".model":
            tokenizer = open_tokenizer(path)
            self.facts["tokenizer"] = {
                "file": Path(os.path.relpath(path, self.path.parent)).as_posix(),
                "sha256": sha256,
                "kind": "sentencepiece",
                "case_operators": tokenizer.case_operators,
            }
            self.facts["vocabulary_size"] = tokenizer.size

    def sizes(self) -> dict[str, dict[str, int]]:
        """Return the tokens of each split, and its documents where it is whole and they are known.

        Of a validation split that is not whole yet nothing is said: its tokens would pass for all.
        """
        found = {}
        for split in SPLITS:
            shards = [
                path for path in shards_of(self.path.parent, split) if path.name in self.files
            ]
            whole = len(shards) == self.export.shards[split]
            if split == "val" and not whole:
                continue
            found[split] = {"tokens": sum(count_tokens(path) for path in shards)}
            documents = self.export.documents[split]
            if whole and documents is not None:
                found[split]["documents"] = documents
        return found

    def write(self) -> None:
        """Write the file: all of it or nothing."""
        files = {**self.due, **self.files}
        content = {"format": 1, **self.facts, **self.sizes(), "files": files}
        text = json.dumps(content, indent=2, sort_keys=True)
        write_atomically(self.path, f"{text}\n".encode())


# ---- The download
def list_targets(export: Export, out: Path, train_shards: int) -> list[Target]:
    """Return the files that shall be here; BadInput if the hub has fewer training shards.

    They are the tokenizer, the whole validation split with its byte files, the first training
    shards, and those that are here beyond them.
    """
    there = export.shards["train"]
    if train_shards > there:
        raise BadInput(f"--train-shards {train_shards}: {export.name} has {there} training shards")
    targets = []
    for name in export.tokenizer:
        remote = f"{EXPORT}/tokenizers/{name}"
        targets.append(Target(remote, out / "tokenizers" / name, export.pieces))
    wanted = {"val": export.shards["val"], "train": train_shards}
    for split, total in export.shards.items():
        for index in range(total):
            name = f"datasets/{export.name}/fineweb_{split}_{index:06d}.bin"
            path = out / name
            if index < wanted[split] or path.exists():
                targets.append(Target(f"{EXPORT}/{name}", path, export.tokens_of(split, index)))
    if export.byte_files:
        for index in range(export.shards["val"]):
            name = f"datasets/{export.name}/fineweb_val_bytes_{index:06d}.bin"
            tokens = export.tokens_of("val", index)
            targets.append(Target(f"{EXPORT}/{name}", out / name, tokens))
    refuse_foreign_shards(out / "datasets" / export.name, targets)
    return targets


def refuse_foreign_shards(folder: Path, targets: list[Target]) -> None:
    """Raise BadInput if the folder has shards or byte files that are not among the targets."""
    paths = {target.path for target in targets}
    here = [*shards_of(folder, "val"), *shards_of(folder, "train"), *byte_files_of(folder)]
    foreign = [path for path in here if path not in paths]
    if foreign:
        raise BadInput(
            f"{min(foreign)} is not of this revision, but training would use it: move it"
        )


def refuse_uneven_byte_files(targets: list[Target]) -> None:
    """Raise BadInput if a byte file of the hub has not one number for each token of its shard.

    Both have the same header and two bytes a number, so they have the same size.
    """
    sizes = {target.path.name: target.bytes for target in targets}
    for name, size in sizes.items():
        if "_val_bytes_" not in name:
            continue
        shard = name.replace("_val_bytes_", "_val_")
        if size != sizes[shard]:
            raise BadInput(
                f"{name} has {size:,} bytes on the hub, but {shard} has {sizes[shard]:,}, so they "
                "do not belong together: tell those who keep the repository, or take another "
                "--revision"
            )


def require_space(missing: list[Target], out: Path) -> None:
    """Raise BadInput if the disk has no room for the files."""
    needed = sum(target.bytes for target in missing)
    free = shutil.disk_usage(out).free
    if needed + SPARE_BYTES > free:
        raise BadInput(
            f"{needed / 1e9:.1f} GB are to come, but {out} has {free / 1e9:.1f} GB free: make "
            "room, ask for fewer --train-shards or give another --out"
        )


def bring_all(hub: Hub, missing: list[Target], staging: Path, notes: Notes) -> None:
    """Download what is missing, with one progress bar over all bytes."""
    total = sum(target.bytes for target in missing)
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, disable=not missing) as bar:
        for number, target in enumerate(missing, start=1):
            bar.set_description(f"file {number} of {len(missing)}")
            notes.add(target.path, bring(hub, target, staging, bar))
            notes.write()


def staging_folder(path: Path) -> contextlib.AbstractContextManager[Path]:
    """Make a folder for files that are not whole yet; one command at a time has it."""
    return own_folder(
        path, f"{path} is in use: another download of this variant goes on, wait for it"
    )


def download(hub: Hub, variant: str, train_shards: int, out: Path) -> None:
    """Bring a variant's files below the folder `out`; BadInput or OSError.

    What is whole is kept.
    """
    with staging_folder(out / "datasets" / f".download-{variant}") as staging:
        # Parts of a download that was killed are of no use.
        clear(staging)
        export = find_export(hub, variant, staging)
        folder = out / "datasets" / export.name
        targets = hub.describe(list_targets(export, out, train_shards))
        refuse_uneven_byte_files(targets)
        for target in targets:
            target.path.parent.mkdir(parents=True, exist_ok=True)
        here = digests_here(targets)
        missing = [target for target in targets if target not in here]
        gigabytes = sum(target.bytes for target in missing) / 1e9
        print(
            f"{export.name} of {hub.repository} at {hub.commit[:12]}: {len(here)} of "
            f"{len(targets)} files are here, {gigabytes:.2f} GB to come"
        )
        require_space(missing, out)
        facts = {
            "name": export.name,
            "repository": hub.repository,
            "revision": hub.commit,
            "vocabulary_size": export.pieces,
        }
        notes = Notes(folder, export, facts, missing)
        for target, sha256 in here.items():
            notes.add(target.path, sha256)
        notes.write()
        bring_all(hub, missing, staging, notes)
    tokenizer = None
    if export.tokenizer:
        tokenizer = out / "tokenizers" / export.tokenizer[0]
    summarize(folder, tokenizer, train_shards)


def summarize(folder: Path, tokenizer: Path | None, asked: int) -> None:
    """Say what the folder holds, and what to run next; without a tokenizer it holds bytes."""
    encoded = f"bytes as {BYTE_IDS} ids"
    if tokenizer is not None:
        encoded = f"{tokenizer}: {count_pieces(tokenizer):,} pieces"
    shards = {split: shards_of(folder, split) for split in SPLITS}
    held = []
    for split, paths in shards.items():
        tokens = sum(count_tokens(path) for path in paths)
        held.append(f"{split} {tokens:,} tokens (shards: {len(paths)})")
    byte_files = byte_files_of(folder)
    if byte_files:
        held.append(f"bytes of the original text (files: {len(byte_files)})")
    print(f"{folder}: {', '.join(held)}; {encoded}")
    more = len(shards["train"]) - asked
    if more > 0:
        print(
            f"note: {more} training shards more than asked for are here, and training uses all "
            "of them"
        )
    launcher = "torchrun --standalone --nproc_per_node=8"
    training = command_to_train(folder, launcher)
    if shards["train"]:
        print(f"next: {training}")
    else:
        print(
            "there are no training shards; next, to score a model: "
            f"ARTIFACT=final_model.int6.ptz {training}"
        )


# ---- The command
def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; BadInput for what cannot be."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    published = ", ".join([*REPOSITORIES, *SHORT_NAMES])
    parser.add_argument(
        "--variant",
        default=DEFAULT_VARIANT,
        help=f"tokenizer of the shards: {published}, or another that --repo has [%(default)s]",
    )
    parser.add_argument(
        "--train-shards",
        type=int,
        default=80,
        metavar="N",
        help="the first N training shards, 0 for none [%(default)s]",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "data",
        metavar="FOLDER",
        help="where datasets/ and tokenizers/ are [data/ of the repository]",
    )
    parser.add_argument("--repo", help="dataset repository [where the variant is published]")
    parser.add_argument("--revision", default="main", help="branch, tag or commit [%(default)s]")
    options = parser.parse_args(arguments)
    if options.train_shards < 0 or not re.fullmatch(r"\w+", options.variant):
        raise BadInput("--train-shards must be 0 or more, and --variant a name such as sp1024")
    options.variant = options.variant.removeprefix(FINEWEB_PREFIX)
    options.variant = SHORT_NAMES.get(options.variant, options.variant)
    if options.repo is None:
        options.repo = REPOSITORIES.get(options.variant, REPOSITORY)
    return options


@command(stopped="interrupted: nothing half done is left")
def main(arguments: list[str] | None = None) -> None:
    """Download what the options ask for, and say what to run next."""
    options = parse(arguments)
    hub = Hub(options.repo, options.revision)
    download(hub, options.variant, options.train_shards, options.out)


if __name__ == "__main__":
    sys.exit(main())
