"""The script of a record folder of the field, read and never run: source, files, places."""

from __future__ import annotations

import ast
import base64
import binascii
import contextlib
import functools
import importlib
import lzma
import re
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# Bytes that an unpacked script may have: nobody fills the memory with one.
LARGEST_SCRIPT = 8 << 20
# A packed script has a literal of so many characters.
SHORTEST_PACKED = 500
# So many packed bytes are opened at once by what has no limit of its own.
PIECE = 256
# Codecs that scripts are packed with, and that need not be installed.
OPTIONAL_CODECS = ("brotli", "zstandard")
SCORING = re.compile(r"eval|valid|val_|ttt|test_time|score|slot|ngram|n_gram|ppm|adapt", re.I)
PACKS_CODE = re.compile(
    r"(?:lzma|zlib|brotli|zstd\w*)\.\w*compress\w*\([^\n]*(?:code|source|script|src|__file__)"
)
TABLES = re.compile(r"n_?gram|ppm|cache.*(?:hash|count)|suffix", re.I)
OPENERS = {"open", "load", "fromfile", "memmap", "read_bytes", "read_text", "urlopen", "torch_load"}
LEARNING = {"backward", "step"}
# What a script reads that is no code: shards, tokenizers, its own output.
DATA_SUFFIXES = {".bin", ".model", ".vocab", ".json", ".txt", ".log", ".md", ".png", ".csv", ".yml"}
# What compiles when it is loaded.
NATIVE_SUFFIXES = {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".so", ".rs", ".pyx"}


def unpack(source: bytes) -> bytes | None:
    """The source inside of a script that unpacks itself; None if it does not.

    Nothing is run: its longest literals are decoded and decompressed.
    """
    text = source.decode("utf-8", errors="replace")
    if "exec" not in text:
        return None
    literals = [node.value for node in ast.walk(tree_of(text)) if isinstance(node, ast.Constant)]
    literals = [value for value in literals if isinstance(value, (str, bytes))]
    for literal in sorted(literals, key=len, reverse=True)[:2]:
        if len(literal) < SHORTEST_PACKED:
            break
        for packed in decoded(literal):
            found = decompressed(packed)
            if found is not None:
                return found
    return None


def decoded(literal: str | bytes) -> list[bytes]:
    """The bytes that a literal may stand for."""
    if isinstance(literal, str):
        try:
            literal = literal.encode("latin-1")
        except UnicodeEncodeError:
            return []
    found = [literal]
    for decode in (base64.b85decode, base64.b64decode, base64.a85decode):
        with contextlib.suppress(ValueError, binascii.Error):
            found.append(decode(literal))
    return found


def decompressed(packed: bytes) -> bytes | None:
    """The Python that bytes hold after lzma, zlib, brotli or zstd; None for anything else.

    The last two are tried if they are installed.
    """
    raw = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
    openers: list[Callable[[], bytes]] = [
        lambda: lzma.LZMADecompressor().decompress(packed, LARGEST_SCRIPT),
        lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=raw).decompress(
            packed, LARGEST_SCRIPT
        ),
        lambda: zlib.decompressobj().decompress(packed, LARGEST_SCRIPT),
        lambda: zlib.decompressobj(31).decompress(packed, LARGEST_SCRIPT),
    ]
    errors = [lzma.LZMAError, zlib.error, EOFError, ValueError]
    brotli = installed("brotli")
    if brotli is not None:
        openers.append(lambda: open_brotli(brotli, packed))
        errors.append(brotli.error)
    zstandard = installed("zstandard")
    if zstandard is not None:
        reader = zstandard.ZstdDecompressor().stream_reader
        openers.append(lambda: reader(packed).read(LARGEST_SCRIPT))
        errors.append(zstandard.ZstdError)
    for opener in openers:
        with contextlib.suppress(*errors):
            found = opener()
            if b"import" in found:
                return found
    return None


def installed(name: str) -> ModuleType | None:
    """A package that need not be there; None if it is not."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def open_brotli(brotli: ModuleType, packed: bytes) -> bytes:
    """What bytes hold after brotli; ValueError if it is more than a script may have."""
    opener = brotli.Decompressor()
    found = bytearray()
    for start in range(0, len(packed), PIECE):
        found += opener.process(packed[start : start + PIECE])
        if len(found) > LARGEST_SCRIPT:
            raise ValueError("too large for a script")
    return bytes(found)


def missing_codec(text: str) -> str | None:
    """The codec that would open a script that unpacks itself, if it is not installed."""
    if not unpacks(text):
        return None
    for name in OPTIONAL_CODECS:
        if re.search(rf"\b{name}\b", text) and installed(name) is None:
            return name
    return None


def packs_itself(text: str) -> bool:
    """Whether a script counts its code compressed."""
    return PACKS_CODE.search(text) is not None


def unpacks(text: str) -> bool:
    """Whether a script runs what it has decompressed."""
    return re.search(r"\bexec\(|runpy|importlib", text) is not None and "decompress" in text


@functools.lru_cache(maxsize=2)
def tree_of(text: str) -> ast.Module:
    """A script as a tree; an empty one if it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def files_used(text: str, beside: dict[str, Path]) -> list[str]:
    """The files of a folder that a script imports, compiles or opens, by their names in it.

    Data, tokenizers and texts are not meant: code and weights are.
    """
    words = set()
    for node in ast.walk(tree_of(text)):
        if isinstance(node, ast.Import):
            words.update(f"{alias.name.replace('.', '/')}.py" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            words.add(f"{node.module.replace('.', '/')}.py")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(node.value.rsplit("/", 1)[-1])
    found = []
    for name, path in beside.items():
        if path.suffix.lower() in DATA_SUFFIXES:
            continue
        if name in words or path.name in words and path.suffix != ".py":
            found.append(name)
    return found


def places(text: str, name: str) -> list[str]:
    """Where a script does what a reader of its evaluation should look at."""
    found = []
    tree = tree_of(text)
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if TABLES.search(function.name):
            found.append((function.lineno, f"{name}:{function.lineno} {function.name}"))
        if isinstance(function, ast.ClassDef) or not SCORING.search(function.name):
            continue
        for node in ast.walk(function):
            called = name_of_call(node)
            if called in LEARNING or called in OPENERS:
                found.append((node.lineno, f"{name}:{node.lineno} {function.name}: {called}()"))
    return [text for _, text in sorted(set(found))]


def name_of_call(node: ast.AST) -> str | None:
    """The last name of what is called, such as step of optimizer.step()."""
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    if isinstance(node.func, ast.Name):
        return node.func.id
    return None
