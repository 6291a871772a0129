"""Build the demo corpus: a small training and validation set for machines without FineWeb shards.

The text is the documentation inside the installed dependencies: the docstrings of Python's standard
library, torch, numpy, sympy and networkx, found by parsing their sources (nothing is imported, nothing is
downloaded). The output folder holds a SentencePiece tokenizer trained on the training split, both splits as
token shards, and `meta.json` with the counts. The same package versions give the same bytes.

    python data/demo_corpus.py [--output DIR] [--vocab-size N] [--force]
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import os
import platform
import re
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

DEFAULT_OUTPUT = Path(__file__).parent / "demo"
PACKAGES = ("torch", "numpy", "sympy", "networkx")
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
OWN_FILE = re.compile(r"demo_(train|val)_\d{6}\.bin|tokenizer\.model|meta\.json")

LONGEST_IGNORED_DOCUMENT = 300  # characters; shorter docstrings are mostly one-line summaries
HELD_OUT_FRACTION = 0.03  # of the bytes
MINIMUM_HELD_OUT_BYTES = 200_000  # less makes the validation loss too noisy to compare runs

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
TOKENS_PER_SHARD = 100_000_000
# At least the special pieces, 256 bytes, the characters and some merges; at most what a uint16 can count.
VOCABULARY_SIZES = range(512, 65_536 + 1)
# SentencePiece writes a space as U+2581 and reads every U+2581 back as a space: it is the one character
# that does not survive (all of Unicode was tried), so documents carry an underscore in its place.
SPACE_SYMBOL, SPACE_SYMBOL_REPLACEMENT = "\u2581", "_"
BOS_ID = 1
TOKENIZER_OPTIONS = {
    "model_type": "bpe",
    "hard_vocab_limit": True,
    "pad_id": 0,
    "bos_id": BOS_ID,
    "eos_id": 2,
    "unk_id": 3,
    # These five neither change nor add to any text.
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "user_defined_symbols": ["\n"],
    "allow_whitespace_only_pieces": True,  # pieces of several spaces: 6% fewer tokens on indented text
    "character_coverage": 0.9995,  # about 90 characters; the rest go through their bytes
    "num_threads": 1,
    "minloglevel": 2,
}


class DemoCorpusError(Exception):
    """The corpus cannot be built; the message says why, in one line."""


@dataclass(frozen=True)
class Collection:
    """Documents in the order of their SHA-256 (a shuffle that no file system can change) and their counts."""

    documents: list[str]
    counts: dict[str, object]  # as they appear in meta.json


def progress(items: Iterable, description: str, unit: str) -> tqdm:
    """Wrap `items` in a progress bar on standard error."""
    return tqdm(items, desc=f"demo corpus: {description}", unit=f" {unit}")


def source_folders() -> dict[str, Path]:
    """Locate each source of documents without importing it.

    Packages that are not installed are left out with a note; the standard library must be there.
    """
    folders = {"python": Path(sysconfig.get_paths()["stdlib"])}
    if not folders["python"].is_dir():
        raise DemoCorpusError(f"the standard library's sources are not at {folders['python']}")
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            print(f"demo corpus: {package} is not installed and is left out", file=sys.stderr)
        else:
            folders[package] = Path(spec.origin).parent
    return folders


def python_files(folder: Path) -> list[Path]:
    """List the Python sources under `folder`, leaving out tests and packages installed inside it."""
    paths = (path for path in folder.rglob("*.py") if path.is_file())
    return sorted(path for path in paths if not EXCLUDED_FOLDERS.intersection(path.relative_to(folder).parts))


def docstrings(source: bytes) -> Iterator[str]:
    """Yield each docstring in a module's source, as written.

    Compiled functions get theirs from calls such as `add_docstr(torch.abs, "...")` or `add_newdoc(...)`, so
    the string constants in the arguments of such calls count too (of a template, the raw template). Raises
    SyntaxError or ValueError if this Python cannot parse the source.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sources' invalid escapes are not the user's concern
        pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node, clean=False) or ""
        elif isinstance(node, ast.Call) and sets_docstring(node):
            constants = (inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant))
            yield from (constant for constant in constants if isinstance(constant, str))
        # Docstrings are in statements and in calls: not entering other expressions saves a third of the time.
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call) or not isinstance(child, ast.expr):
                pending.append(child)


def sets_docstring(call: ast.Call) -> bool:
    """Tell whether the called function's name says that it attaches a docstring to an object."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return "docstr" in name or "newdoc" in name


def installed_docstrings() -> Iterator[tuple[str, str]]:
    """Yield (source name, docstring as written) for every docstring under `source_folders()`."""
    for source, folder in source_folders().items():
        for path in progress(python_files(folder), f"reading {source}", "files"):
            try:
                found = list(docstrings(path.read_bytes()))
            except (SyntaxError, ValueError, RecursionError) as error:
                tqdm.write(f"demo corpus: left out {path}, which cannot be parsed: {error}", file=sys.stderr)
                continue
            yield from ((source, text) for text in found)


def gather(sourced_texts: Iterable[tuple[str, str]]) -> Collection:
    """Clean, filter and deduplicate (source name, docstring) pairs; the first source of a text keeps it."""
    source_by_document: dict[str, str] = {}
    counts = {"replaced_characters": 0, "skipped_documents": 0}
    for source, text in sourced_texts:
        cleaned = inspect.cleandoc(text).strip()
        document = cleaned.replace(SPACE_SYMBOL, SPACE_SYMBOL_REPLACEMENT)
        if len(document) <= LONGEST_IGNORED_DOCUMENT or document in source_by_document:
            continue
        try:
            document.encode()
        except UnicodeEncodeError:  # a lone surrogate, written as an escape in the source
            counts["skipped_documents"] += 1
            continue
        source_by_document[document] = source
        counts["replaced_characters"] += cleaned.count(SPACE_SYMBOL)
    documents = sorted(source_by_document, key=lambda document: hashlib.sha256(document.encode()).digest())
    return Collection(documents, {**counts, "documents_by_source": Counter(source_by_document.values())})


def collect_documents() -> Collection:
    """Collect the documents of the installed packages.

    The garbage collector rests meanwhile: syntax trees have no cycles, but looking for them would take a
    third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return gather(installed_docstrings())
    finally:
        if was_enabled:
            gc.enable()


def count_bytes(documents: Iterable[str]) -> int:
    """Count the UTF-8 bytes of `documents`."""
    return sum(len(document.encode()) for document in documents)


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Split documents, given in the order of their hashes, into (training, held out).

    Held out are those with the smallest hashes: 3% of the bytes and at least 200 KB. Raises DemoCorpusError
    if that would leave less than half of the bytes for training.
    """
    total = count_bytes(documents)
    wanted = max(MINIMUM_HELD_OUT_BYTES, HELD_OUT_FRACTION * total)
    if wanted > total / 2:
        raise DemoCorpusError(f"only {total:,} bytes of documents were found: too few to hold some out")
    held_out = 0
    count = 0
    while held_out < wanted:
        held_out += count_bytes([documents[count]])
        count += 1
    return documents[count:], documents[:count]


def train_tokenizer(documents: list[str], vocabulary_size: int) -> bytes:
    """Train a byte-pair tokenizer and return SentencePiece's serialized model.

    It sees the text line by line, because the newline is a piece of its own. Raises DemoCorpusError if the
    text does not allow for `vocabulary_size` pieces.
    """
    lines = [line for document in documents for line in document.split("\n") if line]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(progress(lines, "training the tokenizer", "lines")),
            model_writer=model,
            vocab_size=vocabulary_size,
            max_sentence_length=max(len(line.encode()) for line in lines),  # it would drop longer ones
            **TOKENIZER_OPTIONS,
        )
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())  # in one line
        raise DemoCorpusError(f"cannot train a tokenizer of {vocabulary_size} pieces: {reason}") from error
    return model.getvalue()


def encode_documents(model: bytes, documents: list[str], description: str) -> np.ndarray:
    """Encode documents into one uint16 array (tokens,), each document's tokens after a BOS.

    Raises DemoCorpusError, naming the document, if one does not decode to itself.
    """
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    encoded = []
    for document in progress(documents, description, "documents"):
        tokens = tokenizer.encode(document)
        if tokenizer.decode(tokens) != document:
            raise DemoCorpusError(f"the tokenizer changes the document that begins {document[:60]!r}")
        encoded.append(np.array([BOS_ID, *tokens], dtype=np.uint16))
    return np.concatenate(encoded)


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens (count,) as uint16 after 256 int32 (magic, version, count, zeros), all little-endian."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def write_shards(folder: Path, name: str, tokens: np.ndarray, shard_size: int = TOKENS_PER_SHARD) -> None:
    """Write tokens (count,) as `name`_000000.bin and so on, each of at most `shard_size` tokens."""
    for index, start in enumerate(range(0, len(tokens), shard_size)):
        write_shard(folder / f"{name}_{index:06d}.bin", tokens[start : start + shard_size])


def versions() -> dict[str, str]:
    """Name the versions that together decide every byte of the corpus, of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, "sentencepiece"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def describe_file(path: Path) -> dict:
    """Return a file's size in bytes and its SHA-256."""
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_corpus(folder: Path, collection: Collection, vocabulary_size: int) -> dict:
    """Write every file of the corpus into the empty `folder`; return what `meta.json` holds."""
    training, validation = split(collection.documents)
    model = train_tokenizer(training, vocabulary_size)
    (folder / "tokenizer.model").write_bytes(model)
    meta = {"vocabulary_size": vocabulary_size, "versions": versions(), **collection.counts}
    for name, documents in (("train", training), ("val", validation)):
        tokens = encode_documents(model, documents, f"encoding {name}")
        write_shards(folder, f"demo_{name}", tokens)
        meta[name] = {"documents": len(documents), "bytes": count_bytes(documents), "tokens": len(tokens)}
    meta["files"] = {path.name: describe_file(path) for path in folder.iterdir()}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")
    return meta


def is_complete(folder: Path, vocabulary_size: int) -> bool:
    """Tell whether `folder` holds a whole corpus of this vocabulary size (files are compared by size)."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        files = meta["files"].items()
        sizes_match = all((folder / name).stat().st_size == file["bytes"] for name, file in files)
        return sizes_match and meta["vocabulary_size"] == vocabulary_size
    except (OSError, ValueError, KeyError, TypeError):  # no such file, or not what write_corpus writes
        return False


def refuse_to_replace_others(folder: Path) -> None:
    """Raise DemoCorpusError if the existing `folder` holds anything but a demo corpus, whole or damaged."""
    names = {path.name for path in folder.iterdir()}
    foreign = {name for name in names if not OWN_FILE.fullmatch(name)}
    if foreign or (names and "meta.json" not in names):
        raise DemoCorpusError(f"{folder} holds {min(foreign or names)}: not a demo corpus, left as it is")


def publish(finished: Path, output: Path, vocabulary_size: int, force: bool) -> None:
    """Rename the folder `finished` to `output`, unless another process put its own corpus there first."""
    if output.exists() and (force or not is_complete(output, vocabulary_size)):
        with suppress(FileNotFoundError):  # another process has just moved it
            os.rename(output, finished.with_name("replaced"))
    try:
        os.rename(finished, output)
    except OSError:  # as a rename cannot replace a folder with files in it
        if not is_complete(output, vocabulary_size):
            raise


def build(
    output: Path, vocabulary_size: int = 1024, force: bool = False, collection: Collection | None = None
) -> Path:
    """Build the corpus in the folder `output` and return it; do nothing if it is there (unless `force`).

    `collection` replaces the documents of the installed packages. The files appear all at once: an
    interrupted build leaves `output` as it was. Raises DemoCorpusError or OSError.
    """
    started = time.monotonic()
    if vocabulary_size not in VOCABULARY_SIZES:
        limits = f"{VOCABULARY_SIZES.start} to {VOCABULARY_SIZES.stop - 1:,}"
        raise DemoCorpusError(f"the vocabulary size must be {limits}, not {vocabulary_size}")
    if is_complete(output, vocabulary_size) and not force:
        print(f"demo corpus: {output} is already built (--force builds it again)")
        return output
    target = output.resolve()  # of a symbolic link, the folder it points to is replaced
    if target.exists():
        refuse_to_replace_others(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as workspace:
        finished = Path(workspace, "corpus")
        finished.mkdir()
        meta = write_corpus(finished, collection or collect_documents(), vocabulary_size)
        publish(finished, target, vocabulary_size, force)
    print(f"{summary(meta)} -> {output} ({time.monotonic() - started:.0f} s)")
    return output


def summary(meta: dict) -> str:
    """Say in one line what a corpus holds."""
    train, val = meta["train"], meta["val"]
    return (
        f"demo corpus: {train['documents'] + val['documents']:,} documents, "
        f"{(train['bytes'] + val['bytes']) / 1e6:.1f} MB, {train['tokens'] / 1e6:.1f}M training tokens, "
        f"{val['tokens'] / 1e3:.0f}K validation tokens, {meta['replaced_characters']} replaced characters"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description="Build the demo corpus from the installed docstrings.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="[%(default)s]")
    parser.add_argument("--vocab-size", type=int, default=1024, metavar="N", help="pieces [%(default)s]")
    parser.add_argument("--force", action="store_true", help="build even if the corpus is already there")
    options = parser.parse_args(arguments)
    try:
        build(options.output, options.vocab_size, options.force)
    except (DemoCorpusError, OSError) as error:
        print(f"demo corpus: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo corpus: interrupted, nothing was written", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
