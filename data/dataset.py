"""A data set is made of documents: a tokenizer, shards and a manifest, all of them or nothing.

data/prepare.py and data/demo_corpus.py say where the documents come from and where the data set
goes. What happens in between is the same: the documents are brought into normal form, arranged by
their SHA-256 and split; the tokenizer is trained on the training side; both sides are encoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from commands import BadInput, uninterrupted
from documents import Counts, Documents, arrange, normal_form
from files import clear, digest, ignore, own_folder, write_atomically
from manifest import read_object, table_of
from shards import ShardWriter
from tokenizer import (
    VOCABULARY_SIZES,
    Normalization,
    encode,
    normalize,
    open_tokenizer,
    train_tokenizer,
)
from workers import Workers

# Bytes of documents that a process encodes at a time.
CHUNK = 1 << 20
# The fraction of the bytes that is held out for validation.
HELD_OUT = 0.03
# Bytes: less makes the validation loss too noisy to compare runs.
MINIMUM_HELD_OUT = 200_000
# But a small text does not give more than this fraction for it.
MOST_HELD_OUT = 0.1
# The version of the manifest.
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What to build, and where."""

    # Of the data set: the shards are name_train_000000.bin and so on.
    name: str
    # The folder of the shards, absolute.
    folder: Path
    # Where the tokenizer goes, absolute: into that folder or elsewhere.
    tokenizer: Path
    vocabulary_size: int
    # Whether a new tokenizer writes capitals with operators.
    case_operators: bool
    # Stands for input and options: what is there of the same is not built again. None: it is
    # not known what the input is.
    inputs: str | None
    manifest: str = "manifest.json"
    held_out: float = HELD_OUT
    # The number of processes; with 1 everything is done in this one.
    jobs: int = 1
    # A tokenizer to use instead of a new one.
    given_tokenizer: Path | None = None
    # Whether it may change the text: the text that is left is then the one to score.
    normalized: bool = False
    # The packages whose versions decide the text.
    packages: tuple[str, ...] = ()
    counts: Counts = dataclasses.field(default_factory=Counts)
    # More entries of the manifest.
    more: dict = dataclasses.field(default_factory=dict)

    @property
    def tokenizer_inside(self) -> bool:
        """Whether the tokenizer goes into the folder of the shards."""
        return self.tokenizer.parent == self.folder


def build(plan: Plan, texts: Iterable[str], force: bool = False, replace: bool = False) -> None:
    """Build what is planned from these documents, unless it is there already (and not `force`).

    `replace` allows to replace what this command made of other input. Everything appears at once:
    what stops the build leaves all as it was. Raises BadInput or OSError.
    """
    started = time.monotonic()
    if plan.given_tokenizer is None and plan.vocabulary_size not in VOCABULARY_SIZES:
        limits = f"{VOCABULARY_SIZES.start} to {VOCABULARY_SIZES.stop - 1:,}"
        raise BadInput(f"the vocabulary size must be {limits}, not {plan.vocabulary_size}")
    # Before anything is written, so that what is there can be used where nothing can be written.
    if not force and is_complete(plan):
        print(f"{plan.folder} is already built (--force builds it again)")
        return
    workspace = plan.folder.with_name(f".{plan.folder.name}-partial")
    busy = f"{workspace.name}: another process is building this, waiting for it"
    with own_folder(workspace, busy, wait=True):
        if (workspace / "begun").exists() and (workspace / "finished").exists():
            # A process was killed while it published.
            with uninterrupted():
                publish(plan, workspace)
        clear(workspace)
        if not force and is_complete(plan):
            print(f"{plan.folder} has just been built by another process")
            return
        refuse_to_replace_others(plan, force or replace)
        manifest = write_dataset(plan, normal_form(texts, plan.counts), workspace)
        with uninterrupted():
            publish(plan, workspace)
    seconds = time.monotonic() - started
    print(f"{summary(manifest)}\n{plan.folder} ({seconds:.0f} s)")


# ---- Splitting
def split(documents: Documents, fraction: float) -> tuple[Documents, Documents]:
    """Split into (training, held out); BadInput if there are not two documents.

    Held out is the beginning: `fraction` of the bytes and at least 200 KB, but not for that more
    than a tenth; at least a document on each side.
    """
    if documents.count < 2:
        found = "only one document" if documents.count else "no text"
        raise BadInput(
            f"there is {found} in the input, and at least two documents are needed, one to hold "
            "out: give more text, or say with --separator TEXT where documents end"
        )
    at_least = min(MINIMUM_HELD_OUT, MOST_HELD_OUT * documents.size)
    wanted = max(fraction * documents.size, at_least)
    count = 0
    size = 0
    for text in documents:
        if size >= wanted or count == documents.count - 1:
            break
        count += 1
        size += len(text)
    held_out = dataclasses.replace(documents, count=count, size=size)
    return documents.after(held_out), held_out


# ---- Writing
def write_dataset(plan: Plan, documents: Iterator[bytes], workspace: Path) -> dict:
    """Write the folder `finished` in the workspace and return the manifest.

    A tokenizer that does not go into that folder becomes `tokenizer.model` beside it.
    """
    finished = workspace / "finished"
    finished.mkdir()
    more = dict(plan.more)
    if plan.tokenizer_inside:
        model = finished / plan.tokenizer.name
    else:
        model = workspace / "tokenizer.model"
    with Workers(plan.jobs) as workers:
        if plan.normalized:
            # Before anything else: texts that become the same are one, on one side of the split.
            change = Normalization()
            documents = normalized(documents, plan, workers, change)
        training, held_out = split(arrange(documents, workspace, plan.counts), plan.held_out)
        if plan.normalized:
            more["normalized"] = dataclasses.asdict(change)
        write_tokenizer(plan, model, training, workers)
        train = write_shards(finished, f"{plan.name}_train", training, model, workers)
        val = write_shards(finished, f"{plan.name}_val", held_out, model, workers)
    files = {}
    for path in finished.iterdir():
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    manifest = {
        "format": FORMAT,
        "name": plan.name,
        "vocabulary_size": plan.vocabulary_size,
        "inputs": plan.inputs,
        "tokenizer": {
            "file": Path(os.path.relpath(plan.tokenizer, plan.folder)).as_posix(),
            "sha256": digest(model),
            "kind": "sentencepiece",
            "case_operators": open_tokenizer(model).case_operators,
        },
        "versions": versions((*plan.packages, "sentencepiece")),
        **dataclasses.asdict(plan.counts),
        **more,
        "train": train,
        "val": val,
        "files": files,
    }
    text = json.dumps(manifest, indent=2, sort_keys=True)
    (finished / plan.manifest).write_bytes(f"{text}\n".encode())
    return manifest


def normalized(
    documents: Iterable[bytes], plan: Plan, workers: Workers, change: Normalization
) -> Iterator[bytes]:
    """Yield documents as the given tokenizer normalizes them, and count what that changes."""
    function = functools.partial(normalize, plan.given_tokenizer)
    for texts, found in workers.map(function, chunks(documents)):
        change.add(found)
        for text in texts:
            if text and not text.isspace():
                yield text
            else:
                plan.counts.empty_documents += 1


def write_tokenizer(plan: Plan, path: Path, training: Documents, workers: Workers) -> None:
    """Write the tokenizer that is given, else one that a worker trains."""
    if plan.given_tokenizer is not None:
        shutil.copyfile(plan.given_tokenizer, path)
        return
    description = f"{plan.name}: training the tokenizer"
    train = functools.partial(
        train_tokenizer, plan.vocabulary_size, plan.case_operators, description
    )
    for model in workers.map(train, [training]):
        path.write_bytes(model)


def write_shards(
    folder: Path, name: str, documents: Documents, model: Path, workers: Workers
) -> dict[str, int]:
    """Encode documents into shards; return their counts for the manifest."""
    writer = ShardWriter(folder, name)
    with tqdm(desc=f"encoding {name}", total=documents.size, unit="B", unit_scale=True) as bar:
        for tokens in workers.map(functools.partial(encode, model), chunks(documents, bar.update)):
            writer.add(tokens)
    writer.close()
    return {"documents": documents.count, "bytes": documents.size, "tokens": writer.tokens}


def chunks(
    documents: Iterable[bytes], report: Callable[[int], object] = ignore
) -> Iterator[list[bytes]]:
    """Yield the documents in lists of about CHUNK bytes; `report` is told the bytes of each."""
    texts: list[bytes] = []
    size = 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= CHUNK:
            yield texts
            report(size)
            texts = []
            size = 0
    if texts:
        yield texts
        report(size)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Name the versions of Python and of these packages, where they are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


# ---- All or nothing
def manifest_there(plan: Plan) -> dict:
    """Read the manifest that is there; empty if there is none of this format."""
    try:
        manifest = read_object(plan.folder / plan.manifest)
    except BadInput:
        return {}
    return manifest if manifest.get("format") == FORMAT else {}


def is_complete(plan: Plan) -> bool:
    """Tell whether all that is planned is there (shards are compared by size)."""
    manifest = manifest_there(plan)
    if plan.inputs is None or manifest.get("inputs") != plan.inputs:
        return False
    try:
        for name, file in manifest["files"].items():
            if (plan.folder / name).stat().st_size != file["bytes"]:
                return False
        return digest(plan.tokenizer) == manifest["tokenizer"]["sha256"]
    except (OSError, KeyError, TypeError, AttributeError):
        # A file or an entry is not there.
        return False


def refuse_to_replace_others(plan: Plan, replace: bool) -> None:
    """Raise BadInput if what this command did not make is in the way.

    Likewise, unless `replace`, for what it made of other input.
    """
    made = manifest_there(plan)
    if plan.folder.exists():
        refuse_folder(plan, made, replace)
    if plan.tokenizer.exists() and not plan.tokenizer_inside:
        refuse_tokenizer(plan, made)


def refuse_folder(plan: Plan, made: dict, replace: bool) -> None:
    """Raise BadInput unless a folder is what this command made, with the manifest `made`."""
    names = {path.name for path in plan.folder.iterdir()}
    own_names = {plan.manifest}
    if plan.tokenizer_inside:
        own_names.add(plan.tokenizer.name)
    shard = re.compile(rf"{re.escape(plan.name)}_(train|val)_\d{{6}}\.bin")
    foreign = {name for name in names - own_names if not shard.fullmatch(name)}
    if names and plan.manifest not in names:
        # Nothing says who made the rest.
        foreign = foreign or names
    if foreign:
        raise BadInput(
            f"{plan.folder} holds {min(foreign)}: not made by this command, left as it is: move "
            "it, or write elsewhere"
        )
    same = plan.inputs is not None and made.get("inputs") == plan.inputs
    if names and not same and not replace:
        raise BadInput(
            f"{plan.folder} exists, made of other input or with other options: --force replaces it"
        )


def refuse_tokenizer(plan: Plan, made: dict) -> None:
    """Raise BadInput unless a tokenizer is the given one or that of the manifest `made`."""
    own = [table_of(made, "tokenizer").get("sha256")]
    if plan.given_tokenizer is not None:
        own.append(digest(plan.given_tokenizer))
    if digest(plan.tokenizer) not in own:
        raise BadInput(
            f"{plan.tokenizer} exists and is not this data set's, left as it is: move it, or "
            "choose another name"
        )


def publish(plan: Plan, workspace: Path) -> None:
    """Put what is finished in its place; if that fails all is as it was.

    If it is killed on its way the next process goes on with it. At no moment there are shards
    beside a tokenizer that is not theirs.
    """
    begun = workspace / "begun"
    replaced = workspace / "replaced"
    # Whatever is done is undone, last things first, unless the end is reached.
    with contextlib.ExitStack() as undo:
        begun.touch()
        undo.callback(begun.unlink)
        if plan.folder.exists():
            os.rename(plan.folder, replaced)
        if replaced.exists():
            undo.callback(os.rename, replaced, plan.folder)
        if not plan.tokenizer_inside:
            put_tokenizer(plan.tokenizer, (workspace / "tokenizer.model").read_bytes(), undo)
        os.rename(workspace / "finished", plan.folder)
        undo.pop_all()


def put_tokenizer(place: Path, model: bytes, undo: contextlib.ExitStack) -> None:
    """Write a tokenizer, unless it is there, and add to `undo` what undoes that."""
    before = place.read_bytes() if place.exists() else None
    if before == model:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, model)
    if before is None:
        undo.callback(place.unlink)
    else:
        undo.callback(write_atomically, place, before)


# ---- What is said
def summary(manifest: dict) -> str:
    """Say what was built of what, in some lines."""
    train = manifest["train"]
    val = manifest["val"]
    documents = train["documents"] + val["documents"]
    megabytes = (train["bytes"] + val["bytes"]) / 1e6
    facts = [f"{manifest['name']}: {documents:,} documents", f"{megabytes:,.1f} MB"]
    for field in dataclasses.fields(Counts):
        count = manifest[field.name]
        if count:
            facts.append(f"{count:,} {field.name.replace('_', ' ')}")
    lines = [", ".join(facts), side_line("training", train), side_line("validation", val)]
    if "normalized" in manifest:
        change = Normalization(**manifest["normalized"])
        lines.append(
            f"normalized: {change}; the text that is left is the one to score, so its bits per "
            "byte are not those of the text as it was"
        )
    if val["bytes"] < MINIMUM_HELD_OUT:
        kilobytes = val["bytes"] / 1e3
        lines.append(f"note: {kilobytes:.0f} KB for validation are few: scores will be noisy")
    if manifest["cuts"]:
        lines.append("note: pieces of a document that was cut can be on both sides of the split")
    return "\n".join(lines)


def side_line(name: str, side: dict) -> str:
    """Say in one line what a side of the split has."""
    ratio = side["bytes"] / side["tokens"]
    return (
        f"{name}: {side['documents']:,} documents, {side['bytes'] / 1e6:,.3f} MB, "
        f"{side['tokens']:,} tokens, {ratio:.3f} bytes per token"
    )
