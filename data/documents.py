"""Documents for data/prepare.py, as streams, so that nothing is too large: read from .txt, .md and .jsonl
files, these with .gz or .zst, folders of them and standard input; brought into normal form; sorted on disk,
each once."""

from __future__ import annotations

import collections
import contextlib
import functools
import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard
from commands import BadInput
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

LONGEST_DOCUMENT = 64 << 10  # bytes
LONGEST_LINE = 64 << 20  # bytes of a .jsonl
BLOCK = 1 << 20  # bytes read at a time
BUCKET = 64 << 20  # bytes of documents sorted in memory at a time
DOCUMENT_OVERHEAD = 200  # bytes of memory that a document takes beside its text
# SentencePiece writes a space as U+2581 and reads every U+2581 back as a space: it is the one character
# that does not survive (all of Unicode was tried), so documents carry an underscore in its place.
SPACE_SYMBOL, ITS_REPLACEMENT = "\u2581".encode(), b"_"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READABLE = re.compile(r"\.(txt|md|jsonl)(\.gz|\.zst)?$", re.IGNORECASE)


@dataclass
class Counts:
    """What happened to the input; the fields appear in the manifest."""

    files_read: int = 0
    files_skipped: int = 0  # in folders, of other kinds
    byte_order_marks: int = 0
    empty_documents: int = 0
    skipped_documents: int = 0  # not Unicode: a lone surrogate, written as an escape
    cuts: int = 0
    replaced_characters: int = 0
    duplicates: int = 0


# ---- Streams
class Piece(NamedTuple):
    start: int  # in bytes, from the beginning of the stream
    data: bytes
    cut: bool  # it ends where the limit asked for it


def cut_position(buffer: bytes, start: int, limit: int) -> int:
    """Where to end a document that begins at `start` and is longer than `limit`: behind the last paragraph,
    else line, else word in the second half of what it may have, else behind a whole character."""
    end = start + limit
    for mark in (b"\n\n", b"\n", b" "):
        if (found := buffer.rfind(mark, start + limit // 2, end)) >= 0:
            return found + len(mark)
    while (
        end > start + limit - 4 and buffer[end] & 0xC0 == 0x80
    ):  # the next byte continues a character
        end -= 1
    return end


def split_stream(blocks: Iterator[bytes], separator: bytes, limit: int) -> Iterator[Piece]:
    """Split what these blocks hold at each separator (none, if empty) and, where a part has more than
    `limit` bytes, where cut_position says. How the stream is divided into blocks does not matter."""
    buffer, start, dropped, reach, ended = b"", 0, 0, limit + len(separator), False
    while True:
        found = buffer.find(separator, start, start + reach) if separator else -1
        left = len(buffer) - start
        if found >= 0:
            yield Piece(dropped + start, buffer[start:found], False)
            start = found + len(separator)
        elif not ended and left <= reach:
            block = next(blocks, None)
            ended = block is None
            buffer, start, dropped = buffer[start:] + (block or b""), 0, dropped + start
        elif left > limit:
            end = cut_position(buffer, start, limit)
            yield Piece(dropped + start, buffer[start:end], True)
            start = end
        else:
            if left:
                yield Piece(dropped + start, buffer[start:], False)
            return


def unzstd(file: BinaryIO) -> Iterator[bytes]:
    """The content of a zstd file of any number of frames; EOFError if the last one is cut short, which the
    library's own reader takes for the end."""
    frame = None
    while packed := file.read(4096):  # little, as each byte can stand for 30 KB
        while packed:
            if frame is None or frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(packed)
            packed = frame.unused_data
    if frame is None or not frame.eof:
        raise EOFError("it ends too early")


def unpacked(file: BinaryIO, path: str) -> Iterator[bytes]:
    """A file's content in blocks; BadInput if it cannot be unpacked."""
    try:
        if path.lower().endswith(".zst"):
            yield from unzstd(file)
        else:
            content = (
                gzip.GzipFile(fileobj=file, mode="rb") if path.lower().endswith(".gz") else file
            )
            yield from iter(functools.partial(content.read, BLOCK), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise BadInput(f"{path}: cut short or damaged ({error}): get or make it again") from error


def decoded(piece: Piece, where: str, counts: Counts) -> str:
    """A piece's text, without a byte order mark where the stream begins; BadInput if it is not UTF-8
    text."""
    data, start = piece.data, piece.start
    if start == 0 and data.startswith(BYTE_ORDER_MARK):
        data, start = data[len(BYTE_ORDER_MARK) :], len(BYTE_ORDER_MARK)
        counts.byte_order_marks += 1
    wrong = "zero byte"
    position = data.find(0)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        wrong, position = error.reason, error.start
    if position >= 0:
        raise BadInput(
            f"{where}: not UTF-8 text: {wrong} at byte {start + position:,}: "
            "leave the file out or convert it"
        )
    return text


def field_of(line: str, field: str, where: str) -> str:
    """The text in a line of a .jsonl; BadInput if there is none."""
    try:
        text = json.loads(line)[field]
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON: {getattr(error, 'msg', error)}") from error
    except (KeyError, TypeError, IndexError):
        text = None
    if not isinstance(text, str):
        raise BadInput(
            f"{where}: no text in a field {field!r}: --text-field NAME says which one has it"
        )
    return text


# ---- Documents
def fail(error: OSError) -> None:
    raise error  # os.walk passes over what cannot be listed


@dataclass(frozen=True)
class Input:
    """The files of a command line, and how they are read."""

    paths: list[str]
    separator: bytes = b""
    text_field: str = "text"
    stdin_format: str = "text"

    def files(self, counts: Counts) -> Iterator[tuple[str, str]]:
        """(path, name below the argument) of each file, in a fixed order; BadInput for what cannot be
        read."""
        for path in self.paths:
            if os.path.isdir(path):
                met = set()
                for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
                    if (real := os.path.realpath(folder)) in met:  # links may lead in a circle
                        folders.clear()
                        continue
                    met.add(real)
                    folders[:] = sorted(name for name in folders if not name.startswith("."))
                    found = [os.path.join(folder, name) for name in sorted(names)]
                    usable = [
                        file for file in found if READABLE.search(file) and os.path.isfile(file)
                    ]
                    counts.files_skipped += len(found) - len(usable)
                    yield from ((file, os.path.relpath(file, path)) for file in usable)
            elif path == "-" and sys.stdin is None:
                raise BadInput(
                    "-: standard input is closed: give it something to read, or name files"
                )
            elif path != "-" and not os.path.exists(path):
                raise BadInput(f"{path}: no such file or folder")
            elif path != "-" and not READABLE.search(path):
                raise BadInput(
                    f"{path}: neither .txt, .md nor .jsonl, nor one of these with .gz or .zst: "
                    "rename it, or give its text as standard input, with - for the path"
                )
            else:
                yield path, os.path.basename(path)

    def identity(self, *options: object) -> tuple[str | None, int | None]:
        """(a digest of the files' names, sizes and times, of how they are read and of `options`; their
        bytes in all); None for both with standard input."""
        found, size = hashlib.sha256(repr((self.separator, self.text_field, *options)).encode()), 0
        for path, name in self.files(Counts()):
            if path == "-":
                return None, None
            status = os.stat(path)
            found.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
            size += status.st_size
        return found.hexdigest(), size

    def texts(self, counts: Counts, description: str) -> Iterator[str]:
        """Every document as it is in the files; BadInput for a file that is not text, or damaged."""
        with tqdm(desc=description, total=self.identity()[1], unit="B", unit_scale=True) as bar:
            for path, name in self.files(counts):
                counts.files_read += 1
                with (
                    contextlib.nullcontext(sys.stdin.buffer)
                    if path == "-"
                    else open(path, "rb") as file
                ):
                    blocks = unpacked(CallbackIOWrapper(bar.update, file, "read"), path)
                    where = "standard input" if path == "-" else path
                    kind = self.stdin_format if path == "-" else READABLE.search(name)[1].lower()
                    yield from (self.of_jsonl if kind == "jsonl" else self.of_text)(
                        blocks, where, counts
                    )

    def of_text(self, blocks: Iterator[bytes], where: str, counts: Counts) -> Iterator[str]:
        for piece in split_stream(blocks, self.separator, LONGEST_DOCUMENT):
            counts.cuts += piece.cut
            yield decoded(piece, where, counts)

    def of_jsonl(self, blocks: Iterator[bytes], where: str, counts: Counts) -> Iterator[str]:
        for number, piece in enumerate(split_stream(blocks, b"\n", LONGEST_LINE), start=1):
            line = f"{where}, line {number}"
            if piece.cut:
                raise BadInput(
                    f"{line}: longer than {LONGEST_LINE >> 20} MB: "
                    "put each document on a line of its own"
                )
            text = decoded(piece, line, counts)
            if text.strip():
                yield field_of(text, self.text_field, line)


def normal_form(texts: Iterable[str], counts: Counts) -> Iterator[bytes]:
    """The documents as they are tokenized, in UTF-8: not too long, not empty, without U+2581."""
    for text in texts:
        try:
            data = text.encode()
        except UnicodeEncodeError:
            counts.skipped_documents += 1
            continue
        if not text or text.isspace():
            counts.empty_documents += 1
            continue
        for piece in split_stream(iter([data]), b"", LONGEST_DOCUMENT):
            counts.cuts += piece.cut
            counts.replaced_characters += piece.data.count(SPACE_SYMBOL)
            yield piece.data.replace(SPACE_SYMBOL, ITS_REPLACEMENT)


# ---- Sorting
@dataclass(frozen=True)
class Documents:
    """Documents in a file, each behind its length as four bytes, little-endian."""

    path: Path
    start: int  # in the file
    count: int
    size: int  # bytes of text

    def __iter__(self) -> Iterator[bytes]:
        with open(self.path, "rb", buffering=BLOCK) as file:
            file.seek(self.start)
            for _ in range(self.count):
                yield file.read(int.from_bytes(file.read(4), "little"))


def record(text: bytes) -> bytes:
    """A document as it is in a file."""
    return len(text).to_bytes(4, "little") + text


def spill(documents: Iterable[bytes], bucket: Path) -> list[Documents]:
    """Spread documents over 16 files by the next hexadecimal digit of their SHA-256, in its order. A file's
    name is a letter and then the digits that its documents share."""
    digits = "0123456789abcdef"
    place = len(bucket.name) - 1
    paths = [bucket.with_name(bucket.name + digit) for digit in digits]
    counts, sizes = collections.Counter(), collections.Counter()
    with contextlib.ExitStack() as opened:
        files = {
            digit: opened.enter_context(open(path, "wb")) for digit, path in zip(digits, paths)
        }
        for text in documents:
            digit = hashlib.sha256(text).hexdigest()[place]
            files[digit].write(record(text))
            counts[digit] += 1
            sizes[digit] += len(text)
    return [Documents(path, 0, counts[digit], sizes[digit]) for digit, path in zip(digits, paths)]


def in_order(bucket: Documents) -> Iterator[bytes]:
    """A bucket's documents, each once, in the order of their SHA-256; its file is removed. If they do not
    fit in memory they are spread over smaller buckets first."""
    texts: dict[bytes, bytes] = {}
    size = 0
    for text in bucket:
        key = hashlib.sha256(text).digest()
        if key not in texts:
            texts[key] = text
            size += len(text) + DOCUMENT_OVERHEAD
        if size > BUCKET and len(texts) > 1:
            del texts
            smaller = spill(bucket, bucket.path)
            bucket.path.unlink()
            for part in smaller:
                yield from in_order(part)
            return
    bucket.path.unlink()
    yield from (texts[key] for key in sorted(texts))


def arrange(documents: Iterable[bytes], workspace: Path, counts: Counts) -> Documents:
    """Write each document once, in the order of their SHA-256, to one file in the workspace."""
    (workspace / "buckets").mkdir()
    buckets = spill(documents, workspace / "buckets" / "b")
    path, count, size = workspace / "documents", 0, 0
    with open(path, "wb") as file:
        for bucket in buckets:
            for text in in_order(bucket):
                file.write(record(text))
                count, size = count + 1, size + len(text)
    counts.duplicates += sum(bucket.count for bucket in buckets) - count
    return Documents(path, 0, count, size)
