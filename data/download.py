"""Download the challenge's FineWeb export: token shards and their tokenizer, for train_gpt.py.

    python data/download.py --variant sp1024 --train-shards 80

The export is the folder datasets/ of the Hugging Face dataset repository
willdepueoai/parameter-golf, where a manifest lists the variants. The validation split comes whole,
of the training split come the first shards, into data/datasets/fineweb10B_<variant>/ and
data/tokenizers/. All files are of one commit of the repository. Each is checked (size, SHA-256,
header, tokens) before it takes its name, so after an interruption the same command goes on with the
first file that is missing; parts are not kept, as huggingface_hub 2.4.0 cannot go on with them.
Training shards beyond those asked for, where there are any, are checked and mended like the others.
manifest.json beside the shards notes the commit and the digests, for data/check.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from commands import BadInput, Parser, command, packages_from, say

with packages_from("data/requirements.txt"):
    # Before hub: without tqdm, huggingface_hub prints a line of its own.
    import tqdm

    from files import clear, digest, ignore, own_folder, write_atomically
    from hub import Damaged, Hub, Target
    from manifest import FINEWEB_PREFIX, ROOT, command_to_train, read_object
    from shards import count_tokens
    from tokenizer import open_tokenizer

REPOSITORY = "willdepueoai/parameter-golf"
# The export's folder in the repository.
EXPORT = "datasets"
# What train_gpt.py uses if nothing is set.
DEFAULT_VARIANT = "sp1024"
SPLITS = ("val", "train")
# Bytes to be left free on the disk.
SPARE_BYTES = 100_000_000


# ---- The hub's manifest
@dataclass(frozen=True)
class Export:
    """What the hub's manifest says of one variant; None where it says nothing."""

    # As fineweb10B_sp1024.
    name: str
    # The number of shards and of tokens of each split.
    shards: dict[str, int]
    tokens: dict[str, int | None]
    # The tokens of each shard but a split's last.
    shard_size: int | None
    # The names of the tokenizer's files, the SentencePiece model first, and its pieces.
    tokenizer: list[str]
    pieces: int | None

    def tokens_of(self, split: str, index: int) -> int | None:
        """Return the tokens that a shard must have, as far as the manifest says."""
        if self.shard_size is None or index < self.shards[split] - 1:
            return self.shard_size
        total = self.tokens[split]
        if total is None:
            return None
        return total - index * self.shard_size


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


def read_export(path: Path, variant: str) -> Export:
    """Read a variant in the hub's manifest; BadInput, naming all that it lists, if it is absent."""
    try:
        manifest = read_object(path)
    except BadInput as error:
        raise BadInput(
            "the hub's manifest.json is no JSON object: check --repo and --revision"
        ) from error
    datasets = entries(manifest, "datasets")
    name = FINEWEB_PREFIX + variant
    if name not in datasets:
        known = [other for other in sorted(datasets) if other.startswith(FINEWEB_PREFIX)]
        listed = ", ".join(other.removeprefix(FINEWEB_PREFIX) for other in known)
        raise BadInput(
            f"--variant {variant} is not in the hub's manifest, which lists {listed or 'none'}"
        )
    dataset = datasets[name]
    shards, tokens = read_stats(dataset, name)
    pieces = whole_number(dataset.get("vocab_size"))
    number = re.fullmatch(r"sp(\d+)", variant)
    if not pieces and number:
        pieces = int(number[1])
    return Export(
        name=name,
        shards=shards,
        tokens=tokens,
        shard_size=whole_number(manifest.get("shard_size")),
        tokenizer=tokenizer_files(manifest, dataset, variant),
        pieces=pieces or None,
    )


def read_stats(dataset: dict, name: str) -> tuple[dict[str, int], dict[str, int | None]]:
    """Return the number of shards and of tokens of each split; BadInput without the former."""
    stats = dataset.get("stats")
    if not isinstance(stats, dict):
        stats = {}
    shards = {split: whole_number(stats.get(f"files_{split}")) for split in SPLITS}
    tokens = {split: whole_number(stats.get(f"tokens_{split}")) for split in SPLITS}
    if None in shards.values() or not shards["val"]:
        raise BadInput(f"the hub's manifest does not say how many shards {name} has: check --repo")
    return shards, tokens


def tokenizer_files(manifest: dict, dataset: dict, variant: str) -> list[str]:
    """Return the names of a tokenizer's files, its SentencePiece model first; BadInput without."""
    tokenizers = entries(manifest, "tokenizers")
    tokenizer = tokenizers.get(str(dataset.get("tokenizer_name")), {})
    files = []
    for key in ("model_path", "vocab_path"):
        path = tokenizer.get(key)
        if isinstance(path, str):
            files.append(PurePosixPath(path).name)
    if not files or not files[0].endswith(".model"):
        raise BadInput(
            f"--variant {variant} has no SentencePiece model, which train_gpt.py needs: take "
            "another variant"
        )
    return files


# ---- Files here
def count_pieces(path: Path) -> int:
    """Return the pieces of a tokenizer; BadInput if the file is none."""
    return open_tokenizer(path).vocab_size()


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
        found = verify(target, hub.fetch(target.remote, staging, bar))
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
        return verify(target, hub.fetch(target.remote, staging, bar, again=True))
    except Damaged as error:
        staged.unlink(missing_ok=True)
        raise BadInput(
            f"{target.remote} came damaged twice ({error}): tell those who keep the repository, "
            "or take another --revision"
        ) from error


class Notes:
    """The manifest.json beside the shards: of which commit they are, and their digests."""

    def __init__(self, folder: Path, facts: dict[str, object]):
        self.path = folder / "manifest.json"
        self.facts = facts
        self.files: dict[str, dict] = {}

    def add(self, path: Path, sha256: str) -> None:
        """Note the digest of a file that is here; of the tokenizer's model, where it is too."""
        if path.parent == self.path.parent:
            self.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256}
        elif path.suffix == ".model":
            place = Path(os.path.relpath(path, self.path.parent)).as_posix()
            self.facts["tokenizer"] = {"file": place, "sha256": sha256}

    def write(self) -> None:
        """Write the file: all of it or nothing."""
        content = {"format": 1, **self.facts, "files": self.files}
        text = json.dumps(content, indent=2, sort_keys=True)
        write_atomically(self.path, f"{text}\n".encode())


# ---- The download
def list_targets(export: Export, out: Path, train_shards: int) -> list[Target]:
    """Return the files that shall be here; BadInput if the hub has fewer training shards.

    They are the tokenizer, the whole validation split, the first training shards, and those that
    are here beyond them.
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
    refuse_foreign_shards(out / "datasets" / export.name, targets)
    return targets


def refuse_foreign_shards(folder: Path, targets: list[Target]) -> None:
    """Raise BadInput if the folder has shards that are not among the targets."""
    paths = {target.path for target in targets}
    foreign = [path for split in SPLITS for path in shards_of(folder, split) if path not in paths]
    if foreign:
        raise BadInput(
            f"{min(foreign)} is not of this revision, but training would use it: move it"
        )


def shards_of(folder: Path, split: str) -> list[Path]:
    """Return the shards of a split that are here."""
    return sorted(folder.glob(f"*_{split}_*.bin"))


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
        no_bar = tqdm.tqdm(disable=True)
        export = read_export(hub.fetch(f"{EXPORT}/manifest.json", staging, no_bar), variant)
        folder = out / "datasets" / export.name
        targets = hub.describe(list_targets(export, out, train_shards))
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
        notes = Notes(folder, facts)
        for target, sha256 in here.items():
            notes.add(target.path, sha256)
        notes.write()
        bring_all(hub, missing, staging, notes)
    summarize(folder, targets[0].path, train_shards)


def summarize(folder: Path, tokenizer: Path, asked: int) -> None:
    """Say what the folder holds, and what to run next."""
    pieces = count_pieces(tokenizer)
    shards = {split: shards_of(folder, split) for split in SPLITS}
    held = []
    for split, paths in shards.items():
        tokens = sum(count_tokens(path) for path in paths)
        held.append(f"{split} {tokens:,} tokens (shards: {len(paths)})")
    print(f"{folder}: {', '.join(held)}; {tokenizer}: {pieces:,} pieces")
    more = len(shards["train"]) - asked
    if more > 0:
        print(
            f"note: {more} training shards more than asked for are here, and training uses all "
            "of them"
        )
    launcher = "torchrun --standalone --nproc_per_node=8"
    training = command_to_train(folder, tokenizer, pieces, launcher)
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
    parser.add_argument(
        "--variant", default=DEFAULT_VARIANT, help="tokenizer of the shards [%(default)s]"
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
    parser.add_argument("--repo", default=REPOSITORY, help="dataset repository [%(default)s]")
    parser.add_argument("--revision", default="main", help="branch, tag or commit [%(default)s]")
    options = parser.parse_args(arguments)
    if options.train_shards < 0 or not re.fullmatch(r"\w+", options.variant):
        raise BadInput("--train-shards must be 0 or more, and --variant a name such as sp1024")
    return options


@command(stopped="interrupted: nothing half done is left")
def main(arguments: list[str] | None = None) -> None:
    """Download what the options ask for, and say what to run next."""
    options = parse(arguments)
    hub = Hub(options.repo, options.revision)
    download(hub, options.variant, options.train_shards, options.out)


if __name__ == "__main__":
    sys.exit(main())
