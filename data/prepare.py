"""Anyone's text becomes a tokenizer and token shards for train_gpt.py.

    python data/prepare.py --name mytext --vocab-size 4096 PATH...

PATH is a .txt, .md or .jsonl file, one of these with .gz or .zst, a folder (all such files in it and
below, links followed, but not in hidden folders), or `-` for standard input. It writes, under data/ or
`--out`, tokenizers/mytext_4096_bpe.model and in datasets/mytext_sp4096 the shards mytext_train_000000.bin,
mytext_val_000000.bin and so on, with manifest.json; the last line it prints is the command that trains on
them. What happens to the text:

- A document is a file; a line of a .jsonl; with `--separator` what is between two separators. It is kept to
  the byte, but for a byte order mark at a file's beginning, for U+2581, which SentencePiece keeps for the
  space and which becomes "_", and for its length: over 64 KB it is cut behind a paragraph, else a line,
  else a word. The pieces are documents of their own, and can be on both sides of the split.
- Documents of nothing but white space and exact duplicates go. The rest are put in the order of their
  SHA-256, a shuffle that neither names nor order of the files can change. The first 3% of the bytes are
  held out.
- The tokenizer is byte-pair encoding that gives every text back unchanged, trained on the training side
  only, on its first 100 MB. Every document is encoded, decoded and compared.

Memory does not grow with the input: documents are sorted on disk (which takes about the text's size there,
beside the output, and the shards come on top), encoded in chunks and written as they come. The output
depends on the documents, the options and the version of SentencePiece alone, and appears all at once: a build
that is stopped leaves nothing, one that is killed leaves a hidden folder that the next one completes or
removes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import sentencepiece
import shards
from documents import Counts, Documents, Input, arrange, normal_form
from processes import Workers, clear, cores, own_workspace, run, uninterrupted
from shards import BOS_ID, MOST_PIECES, BadInput, command_to_train, open_tokenizer
from tqdm import tqdm

CHUNK = 1 << 20  # bytes of documents that a process encodes at a time
HELD_OUT = 0.03  # of the bytes
MINIMUM_HELD_OUT = 200_000  # bytes: less makes the validation loss too noisy to compare runs,
MOST_HELD_OUT = 0.1  # but a small text does not give more than this for it
TOKENIZER_SAMPLE = 100_000_000  # bytes
TOKENS_PER_SHARD = 100_000_000
# At least the special pieces, 256 bytes, the characters and some merges; at most what a uint16 can count.
VOCABULARY_SIZES = range(512, MOST_PIECES + 1)
FORMAT = 1  # of the manifest
TOKENIZER_OPTIONS = dict(
    model_type="bpe",
    hard_vocab_limit=True,
    pad_id=0,
    bos_id=BOS_ID,
    eos_id=2,
    unk_id=3,
    # These five neither change nor add to any text.
    byte_fallback=True,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    user_defined_symbols=["\n"],
    allow_whitespace_only_pieces=True,  # pieces of several spaces: 6% fewer tokens on indented text
    character_coverage=0.9995,  # of the text's characters; the rest go through their bytes
    num_threads=1,
    minloglevel=2,
)


@dataclass(frozen=True)
class Plan:
    """What to build, and where."""

    name: str  # of the shards: name_train_000000.bin
    folder: Path  # of the shards, absolute
    tokenizer: Path  # where it goes, absolute: into that folder or elsewhere
    vocabulary_size: int
    inputs: (
        str | None
    )  # stands for input and options: the same are not built again; None: they are not known
    manifest: str = "manifest.json"
    held_out: float = HELD_OUT  # of the bytes
    jobs: int = 1  # processes; 1: this one
    given_tokenizer: Path | None = None
    packages: tuple[str, ...] = ()  # whose versions decide the text
    counts: Counts = dataclasses.field(default_factory=Counts)
    more: dict = dataclasses.field(default_factory=dict)  # for the manifest

    @property
    def tokenizer_inside(self) -> bool:
        return self.tokenizer.parent == self.folder


def split(documents: Documents, fraction: float) -> tuple[Documents, Documents]:
    """Split into (training, held out). Held out is the beginning: `fraction` of the bytes and at least 200
    KB, but not for that more than a tenth; at least a document on each side. BadInput if there are not
    two."""
    if documents.count < 2:
        found = "only one document" if documents.count else "no text"
        raise BadInput(
            f"there is {found} in the input, and at least two documents are needed, one to hold "
            "out: give more text, or say with --separator TEXT where documents end"
        )
    wanted = max(fraction * documents.size, min(MINIMUM_HELD_OUT, MOST_HELD_OUT * documents.size))
    count = size = 0
    for text in documents:
        if size >= wanted or count == documents.count - 1:
            break
        count, size = count + 1, size + len(text)
    training = Documents(
        documents.path, 4 * count + size, documents.count - count, documents.size - size
    )
    return training, dataclasses.replace(documents, count=count, size=size)


# ---- The tokenizer
def sample_lines(documents: Documents) -> Iterator[bytes]:
    """The lines that the tokenizer is trained on; the newline is a piece of its own."""
    left = TOKENIZER_SAMPLE
    for text in documents:
        left -= len(text)
        if left < 0:
            return
        yield from filter(None, text.split(b"\n"))


def noting(items: Iterable, raised: list[BaseException]) -> Iterator:
    """The items; what is raised meanwhile is noted, too, as SentencePiece makes a RuntimeError of it."""
    try:
        yield from items
    except (Exception, KeyboardInterrupt) as error:
        raised.append(error)
        raise


def train_tokenizer(vocabulary_size: int, description: str, documents: Documents) -> bytes:
    """Train a byte-pair tokenizer and return SentencePiece's serialized model; BadInput, with what is
    possible, if the text does not allow for so many pieces."""
    lines = longest = 0
    for line in sample_lines(documents):
        lines, longest = lines + 1, max(longest, len(line))
    model, raised = io.BytesIO(), []
    bar = tqdm(sample_lines(documents), desc=description, total=lines, unit=" lines")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=noting(bar, raised),
            model_writer=model,
            vocab_size=vocabulary_size,
            max_sentence_length=max(longest, 10),  # it would drop longer ones; 10 is the least
            **TOKENIZER_OPTIONS,
        )
    except (RuntimeError, OSError) as error:
        if raised:
            raise raised[0] from None
        reason = explained(str(error))
        raise BadInput(
            f"cannot train a tokenizer of {vocabulary_size} pieces: {reason}"
        ) from error
    return model.getvalue()


def explained(reason: str) -> str:
    """Why SentencePiece trains no tokenizer, in one line, with what to do."""
    reason = " ".join(reason.split())
    if most := re.search(r"too high.*<= (\d+)", reason):
        return (
            f"this text has enough for at most {most[1]} (the least is {VOCABULARY_SIZES.start}): "
            "give more text or a smaller --vocab-size"
        )
    if least := re.search(r"smaller than required_chars.* vs (\d+)", reason):
        return f"the characters of this text alone need {least[1]}: give a larger --vocab-size"
    return reason


loaded = functools.lru_cache(maxsize=1)(open_tokenizer)  # once in each process


def encode(model: Path, texts: list[bytes]) -> np.ndarray:
    """Encode documents into one uint16 array (tokens,), each document's tokens after a BOS; BadInput,
    naming the document, if one does not decode to itself."""
    tokenizer = loaded(model)
    encoded = tokenizer.encode(texts, num_threads=1)
    for text, back in zip(texts, tokenizer.decode(encoded, num_threads=1)):
        if back.encode() != text:
            raise BadInput(
                f"the tokenizer changes the document that begins {text.decode()[:60]!r}: leave "
                "--tokenizer out to train one that changes none"
            )
    return np.concatenate([np.array([BOS_ID, *tokens], dtype="<u2") for tokens in encoded])


# ---- Writing
class ShardWriter:
    """Writes a stream of tokens as name_000000.bin and so on, TOKENS_PER_SHARD tokens in each but the
    last."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self.shards, self.tokens = folder, name, 0, 0
        self.file: BinaryIO | None = None

    def add(self, tokens: np.ndarray) -> None:
        """Append uint16 (count,), little-endian."""
        while len(tokens):
            if self.file is None:
                self.file = open(self.folder / f"{self.name}_{self.shards:06d}.bin", "wb")
                self.file.write(shards.header(0))
                self.shards += 1
            part = tokens[: self.shards * TOKENS_PER_SHARD - self.tokens]
            self.file.write(part.data)
            self.tokens += len(part)
            if self.tokens == self.shards * TOKENS_PER_SHARD:
                self.close()
            tokens = tokens[len(part) :]

    def close(self) -> None:
        """Complete the last shard: now its number of tokens is known."""
        if self.file is not None:
            self.file.seek(0)
            self.file.write(shards.header(self.tokens - (self.shards - 1) * TOKENS_PER_SHARD))
            self.file.close()
            self.file = None


def chunks(documents: Documents, bar: tqdm) -> Iterator[list[bytes]]:
    """Documents in lists of about CHUNK bytes."""
    texts, size = [], 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= CHUNK:
            yield texts
            bar.update(size)
            texts, size = [], 0
    if texts:
        yield texts
        bar.update(size)


def write_shards(
    folder: Path, name: str, documents: Documents, model: Path, workers: Workers
) -> dict[str, int]:
    """Encode documents into shards; return their counts for the manifest."""
    writer = ShardWriter(folder, name)
    with tqdm(desc=f"encoding {name}", total=documents.size, unit="B", unit_scale=True) as bar:
        for tokens in workers.map(functools.partial(encode, model), chunks(documents, bar)):
            writer.add(tokens)
    writer.close()
    return {"documents": documents.count, "bytes": documents.size, "tokens": writer.tokens}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Name the versions of Python and of these packages, where installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write_dataset(plan: Plan, documents: Iterator[bytes], workspace: Path) -> dict:
    """Write the folder `finished` and, unless it goes there, `tokenizer.model`; return the manifest."""
    finished = workspace / "finished"
    finished.mkdir()
    training, held_out = split(arrange(documents, workspace, plan.counts), plan.held_out)
    model = (
        finished / plan.tokenizer.name if plan.tokenizer_inside else workspace / "tokenizer.model"
    )
    with Workers(plan.jobs) as workers:
        if plan.given_tokenizer:
            shutil.copyfile(plan.given_tokenizer, model)
        else:
            description = f"{plan.name}: training the tokenizer"
            train = functools.partial(train_tokenizer, plan.vocabulary_size, description)
            model.write_bytes(next(workers.map(train, [training])))
        sides = {
            side: write_shards(finished, f"{plan.name}_{side}", part, model, workers)
            for side, part in (("train", training), ("val", held_out))
        }
    tokenizer = {
        "file": os.path.relpath(plan.tokenizer, plan.folder),
        "sha256": shards.digest(model),
    }
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": shards.digest(path)}
        for path in finished.iterdir()
    }
    manifest = {
        "format": FORMAT,
        "name": plan.name,
        "vocabulary_size": plan.vocabulary_size,
        "inputs": plan.inputs,
        "tokenizer": tokenizer,
        "versions": versions((*plan.packages, "sentencepiece")),
        **dataclasses.asdict(plan.counts),
        **plan.more,
        **sides,
        "files": files,
    }
    (finished / plan.manifest).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return manifest


# ---- All or nothing
def read_manifest(plan: Plan) -> dict:
    """The manifest that is there; empty if there is none of this format."""
    try:
        manifest = json.loads((plan.folder / plan.manifest).read_text())
        return manifest if manifest["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def is_complete(plan: Plan) -> bool:
    """Tell whether all that is planned is there (shards are compared by size)."""
    try:
        manifest = read_manifest(plan)
        files = manifest["files"].items()
        whole = all((plan.folder / name).stat().st_size == file["bytes"] for name, file in files)
        same = plan.inputs is not None and manifest["inputs"] == plan.inputs
        return whole and same and shards.digest(plan.tokenizer) == manifest["tokenizer"]["sha256"]
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def refuse_to_replace_others(plan: Plan, replace: bool) -> None:
    """BadInput if what this command did not make is in the way or, unless `replace`, what it made of other
    input."""
    made = read_manifest(plan)
    if plan.folder.exists():
        names = {path.name for path in plan.folder.iterdir()}
        own = re.compile(rf"{re.escape(plan.name)}_(train|val)_\d{{6}}\.bin")
        foreign = {name for name in names if not own.fullmatch(name)} - {plan.manifest}
        foreign -= {plan.tokenizer.name} if plan.tokenizer_inside else set()
        if foreign or (names and plan.manifest not in names):
            raise BadInput(
                f"{plan.folder} holds {min(foreign or names)}: not made by this command, "
                "left as it is: move it, or write elsewhere"
            )
        if names and not replace and (plan.inputs is None or made.get("inputs") != plan.inputs):
            raise BadInput(
                f"{plan.folder} exists, made of other input or with other options: "
                "--force replaces it"
            )
    if plan.tokenizer.exists() and not plan.tokenizer_inside:
        allowed = [shards.digest(plan.given_tokenizer)] if plan.given_tokenizer else []
        if shards.digest(plan.tokenizer) not in (*allowed, made.get("tokenizer", {}).get("sha256")):
            raise BadInput(
                f"{plan.tokenizer} exists and is not this data set's, left as it is: move it, "
                "or choose another name"
            )


def put_tokenizer(place: Path, model: bytes, undo: contextlib.ExitStack) -> None:
    """Write a tokenizer, unless it is there, with what undoes that."""
    before = place.read_bytes() if place.exists() else None
    if before != model:
        place.parent.mkdir(parents=True, exist_ok=True)
        shards.write_atomically(place, model)
        if before is None:
            undo.callback(place.unlink)
        else:
            undo.callback(shards.write_atomically, place, before)


def publish(plan: Plan, workspace: Path) -> None:
    """Put what is finished in its place; if that fails all is as it was. If it was killed on its way the
    next process goes on with it. At no moment there are shards beside a tokenizer that is not theirs."""
    replaced = workspace / "replaced"
    with contextlib.ExitStack() as undo:
        (workspace / "begun").touch()
        undo.callback((workspace / "begun").unlink)
        if plan.folder.exists():
            os.rename(plan.folder, replaced)
        if replaced.exists():
            undo.callback(os.rename, replaced, plan.folder)
        if not plan.tokenizer_inside:
            put_tokenizer(plan.tokenizer, (workspace / "tokenizer.model").read_bytes(), undo)
        os.rename(workspace / "finished", plan.folder)
        undo.pop_all()


def build(plan: Plan, texts: Iterable[str], force: bool = False, replace: bool = False) -> None:
    """Build what is planned from these documents, unless it is there already (and not `force`).

    `replace` allows to replace what this command made of other input. Everything appears at once: what
    stops the build leaves all as it was. Raises BadInput or OSError.
    """
    started = time.monotonic()
    if plan.vocabulary_size not in VOCABULARY_SIZES and not plan.given_tokenizer:
        limits = f"{VOCABULARY_SIZES.start} to {VOCABULARY_SIZES.stop - 1:,}"
        raise BadInput(f"the vocabulary size must be {limits}, not {plan.vocabulary_size}")
    if not force and is_complete(plan):  # also where nothing can be written
        print(f"{plan.folder} is already built (--force builds it again)")
        return
    with own_workspace(plan.folder) as workspace:
        if (workspace / "begun").exists() and (workspace / "finished").exists():
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
    print(f"{summary(manifest)}\n{plan.folder} ({time.monotonic() - started:.0f} s)")


# ---- The command
def summary(manifest: dict) -> str:
    """Say what was built of what, in some lines."""
    train, val = manifest["train"], manifest["val"]
    happened = [
        (manifest[field.name], field.name.replace("_", " ")) for field in dataclasses.fields(Counts)
    ]
    lines = [
        f"{manifest['name']}: {train['documents'] + val['documents']:,} documents, "
        f"{(train['bytes'] + val['bytes']) / 1e6:,.1f} MB"
        + "".join(f", {count:,} {name}" for count, name in happened if count)
    ]
    for name, side in (("training", train), ("validation", val)):
        lines.append(
            f"{name}: {side['documents']:,} documents, {side['bytes'] / 1e6:,.3f} MB, "
            f"{side['tokens']:,} tokens, {side['bytes'] / side['tokens']:.3f} bytes per token"
        )
    if val["bytes"] < MINIMUM_HELD_OUT:
        lines.append(
            f"note: {val['bytes'] / 1e3:.0f} KB for validation are few: scores will be noisy"
        )
    if manifest["cuts"]:
        lines.append("note: pieces of a document that was cut can be on both sides of the split")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="files, folders, or - for standard input")
    add("--name", required=True, help="of the data set: letters, digits and . _ -")
    add("--vocab-size", type=int, metavar="N", help="pieces of the tokenizer [1024]")
    add("--out", type=Path, default=Path(__file__).parent, metavar="FOLDER", help="[%(default)s]")
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="a SentencePiece model to use instead of a new one",
    )
    add(
        "--separator", default="", metavar="TEXT", help=r"between documents of a text file, as \n\n"
    )
    add(
        "--text-field",
        default="text",
        metavar="NAME",
        help="of the objects in .jsonl [%(default)s]",
    )
    add(
        "--format",
        choices=("text", "jsonl"),
        default="text",
        help="of standard input [%(default)s]",
    )
    add(
        "--held-out",
        type=float,
        default=HELD_OUT,
        metavar="FRACTION",
        help="for validation [%(default)s]; of a small text up to a tenth, but not over 200 KB for that",
    )
    add("--jobs", type=int, default=cores(), metavar="N", help="processes [%(default)s, the cores]")
    add("--force", action="store_true", help="build it even if it is there, and replace what is")
    return parser.parse_intermixed_args(arguments)


def plan_of(options: argparse.Namespace, source: Input) -> Plan:
    """Check the options; BadInput for what cannot be."""
    name, size = options.name, 1024 if options.vocab_size is None else options.vocab_size
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) or re.search(
        "_(train|val)_", f"{name}_"
    ):
        raise BadInput(
            f"--name {name!r}: letters, digits and . _ - only, and neither _train nor _val, "
            "which are the splits"
        )
    if not 0 < options.held_out <= 0.5 or options.jobs < 1:
        raise BadInput("--held-out is over 0 and at most 0.5, and --jobs at least 1")
    if options.tokenizer:
        given = open_tokenizer(options.tokenizer)
        if missing := shards.lacks(given):
            raise BadInput(
                f"{options.tokenizer}: it needs {' and '.join(missing)}: leave --tokenizer out "
                "to train one"
            )
        size = given.vocab_size()
        if options.vocab_size not in (None, size):
            raise BadInput(
                f"{options.tokenizer} has {size} pieces, not {options.vocab_size}: "
                "leave --vocab-size out"
            )
    root = options.out.resolve()
    given = options.tokenizer and shards.digest(options.tokenizer)
    return Plan(
        name,
        (root / "datasets" / f"{name}_sp{size}").resolve(),
        (root / "tokenizers").resolve() / f"{name}_{size}_bpe.model",
        size,
        source.identity(name, size, given, options.held_out)[0],
        held_out=options.held_out,
        jobs=options.jobs,
        given_tokenizer=options.tokenizer,
    )


def prepare(options: argparse.Namespace) -> None:
    """Build the data set that the options ask for and say how to train on it."""
    escapes = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}
    try:
        separator = re.sub(
            r"\\[nrt\\]", lambda found: escapes[found[0]], options.separator
        ).encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"--separator {options.separator!r}: not UTF-8") from error
    source = Input(options.paths, separator, options.text_field, options.format)
    plan = plan_of(options, source)
    build(
        plan,
        source.texts(plan.counts, f"{plan.name}: reading"),
        options.force,
        replace=options.force,
    )
    print(f"to train on it: {command_to_train(plan.folder, plan.tokenizer, plan.vocabulary_size)}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parse(arguments)
    return run(lambda: prepare(options))


if __name__ == "__main__":
    sys.exit(main())
