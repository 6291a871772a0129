"""Documents as streams, so that no input is too large for the memory.

They are read from .txt, .md and .jsonl files, these with .gz or .zst, folders of them and standard
input; brought into normal form; and arranged on disk, each once, in the order of their SHA-256.
"""

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
from typing import BinaryIO, NamedTuple, NoReturn

import zstandard
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from commands import BadInput

# Bytes of a document.
LONGEST_DOCUMENT = 64 << 10
# Bytes of a line of a .jsonl.
LONGEST_LINE = 64 << 20
# Bytes read at a time; of a zstd file little, as each byte can stand for 30 KB.
BLOCK = 1 << 20
ZSTD_BLOCK = 4096
# Bytes of documents that are sorted in memory at a time.
BUCKET = 64 << 20
# Bytes of memory that a document takes beside its text.
DOCUMENT_OVERHEAD = 200
# Bytes of the length that stands before each document in a file.
LENGTH_BYTES = 4
# SentencePiece writes a space as U+2581 and reads every U+2581 back as a space: it is the one
# character that does not survive (all of Unicode was tried), so an underscore takes its place.
SPACE_SYMBOL = "\u2581".encode()
ITS_REPLACEMENT = b"_"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READABLE = re.compile(r"\.(txt|md|jsonl)(\.gz|\.zst)?$", re.IGNORECASE)
STANDARD_INPUT = "-"


@dataclass
class Counts:
    """What happened to the input; the fields appear in the manifest."""

    files_read: int = 0
    # In folders, of other kinds.
    files_skipped: int = 0
    byte_order_marks: int = 0
    empty_documents: int = 0
    # Not Unicode: a lone surrogate, written as an escape.
    skipped_documents: int = 0
    cuts: int = 0
    replaced_characters: int = 0
    duplicates: int = 0


# ---- Streams
class Piece(NamedTuple):
    """A part of a stream: where it begins there, in bytes, and whether the limit has cut it."""

    start: int
    data: bytes
    cut: bool


def split_stream(blocks: Iterator[bytes], separator: bytes, limit: int) -> Iterator[Piece]:
    """Split what the blocks hold at each separator (none, if empty).

    A part of more than `limit` bytes is split where cut_position says. How the stream is divided
    into blocks does not matter.
    """
    buffer = b""
    # Where the buffer begins in the stream, and where the next piece begins in the buffer.
    offset = 0
    start = 0
    # A separator whose piece is not too long ends within so many bytes.
    reach = limit + len(separator)
    ended = False
    while True:
        found = buffer.find(separator, start, start + reach) if separator else -1
        left = len(buffer) - start
        if found >= 0:
            yield Piece(offset + start, buffer[start:found], cut=False)
            start = found + len(separator)
        elif left <= reach and not ended:
            block = next(blocks, None)
            if block is None:
                ended = True
            else:
                buffer = buffer[start:] + block
                offset += start
                start = 0
        elif left > limit:
            end = cut_position(buffer, start, limit)
            yield Piece(offset + start, buffer[start:end], cut=True)
            start = end
        else:
            if left:
                yield Piece(offset + start, buffer[start:], cut=False)
            return


def cut_position(buffer: bytes, start: int, limit: int) -> int:
    """Return where to end a document that begins at `start` and is longer than `limit`.

    That is behind the last paragraph, else line, else word in the second half of what it may have,
    else behind a whole character.
    """
    end = start + limit
    for mark in (b"\n\n", b"\n", b" "):
        found = buffer.rfind(mark, start + limit // 2, end)
        if found >= 0:
            return found + len(mark)
    # A character has at most four bytes; all but the first are 10xxxxxx.
    earliest = end - 4
    while end > earliest and buffer[end] & 0xC0 == 0x80:
        end -= 1
    return end


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Open a file, or standard input, which is not closed at the end."""
    if path == STANDARD_INPUT:
        yield sys.stdin.buffer
    else:
        with open(path, "rb") as file:
            yield file


def unpacked(file: BinaryIO, path: str) -> Iterator[bytes]:
    """Yield a file's content in blocks; BadInput if it cannot be unpacked."""
    ending = path.lower()
    try:
        if ending.endswith(".zst"):
            yield from unzstd(file)
        elif ending.endswith(".gz"):
            yield from blocks_of(gzip.GzipFile(fileobj=file, mode="rb"))
        else:
            yield from blocks_of(file)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise BadInput(f"{path}: cut short or damaged ({error}): get or make it again") from error


def blocks_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield what an open file holds, BLOCK bytes at a time."""
    return iter(functools.partial(file.read, BLOCK), b"")


def unzstd(file: BinaryIO) -> Iterator[bytes]:
    """Yield the content of a zstd file of any number of frames.

    EOFError if the last one is cut short, which the library's own reader takes for the end.
    """
    frame = None
    for block in iter(functools.partial(file.read, ZSTD_BLOCK), b""):
        packed = block
        while packed:
            if frame is None or frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(packed)
            packed = frame.unused_data
    if frame is None or not frame.eof:
        raise EOFError("it ends too early")


def decoded(piece: Piece, where: str, counts: Counts) -> str:
    """Return a piece's text; BadInput if it is not UTF-8 text.

    A byte order mark where the stream begins is left out.
    """
    data = piece.data
    start = piece.start
    if start == 0 and data.startswith(BYTE_ORDER_MARK):
        data = data[len(BYTE_ORDER_MARK) :]
        start = len(BYTE_ORDER_MARK)
        counts.byte_order_marks += 1
    problem = "zero byte"
    position = data.find(0)
    text = ""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        problem = error.reason
        position = error.start
    if position >= 0:
        raise BadInput(
            f"{where}: not UTF-8 text: {problem} at byte {start + position:,}: leave the file out "
            "or convert it"
        )
    return text


def field_of(line: str, field: str, where: str) -> str:
    """Return the text in a field of a line of a .jsonl; BadInput if there is none."""
    try:
        text = json.loads(line)[field]
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise BadInput(f"{where}: not JSON: {reason}") from error
    except (KeyError, TypeError, IndexError):
        text = None
    if not isinstance(text, str):
        raise BadInput(
            f"{where}: no text in a field {field!r}: --text-field NAME says which one has it"
        )
    return text


# ---- Documents
@dataclass(frozen=True)
class Input:
    """The files of a command line, and how they are read."""

    paths: list[str]
    separator: bytes = b""
    text_field: str = "text"
    stdin_format: str = "text"

    def files(self, counts: Counts) -> Iterator[tuple[str, str]]:
        """Yield (path, name below the argument) of each file, in a fixed order.

        BadInput for what cannot be read.
        """
        for path in self.paths:
            if os.path.isdir(path):
                for file in files_in(path, counts):
                    yield file, os.path.relpath(file, path)
            else:
                require_readable(path)
                yield path, os.path.basename(path)

    def identity(self, *options: object) -> str | None:
        """Return a digest of the files' names, sizes and times, of how they are read and `options`.

        None with standard input, of which nothing is known.
        """
        told = repr((self.separator, self.text_field, *options))
        found = hashlib.sha256(told.encode())
        for path, name in self.files(Counts()):
            if path == STANDARD_INPUT:
                return None
            status = os.stat(path)
            found.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
        return found.hexdigest()

    def size(self) -> int | None:
        """Return the bytes of all files; None with standard input."""
        size = 0
        for path, _ in self.files(Counts()):
            if path == STANDARD_INPUT:
                return None
            size += os.stat(path).st_size
        return size

    def texts(self, counts: Counts, description: str) -> Iterator[str]:
        """Yield every document as it is in the files.

        The progress bar shows `description`. BadInput for a file that is not text, or damaged.
        """
        with tqdm(desc=description, total=self.size(), unit="B", unit_scale=True) as bar:
            for path, name in self.files(counts):
                counts.files_read += 1
                if path == STANDARD_INPUT:
                    where = "standard input"
                    kind = self.stdin_format
                else:
                    where = path
                    kind = READABLE.search(name)[1].lower()
                with opened(path) as file:
                    blocks = unpacked(CallbackIOWrapper(bar.update, file, "read"), path)
                    if kind == "jsonl":
                        yield from self.of_jsonl(blocks, where, counts)
                    else:
                        yield from self.of_text(blocks, where, counts)

    def of_text(self, blocks: Iterator[bytes], where: str, counts: Counts) -> Iterator[str]:
        """Yield the documents of a text file."""
        for piece in split_stream(blocks, self.separator, LONGEST_DOCUMENT):
            counts.cuts += piece.cut
            yield decoded(piece, where, counts)

    def of_jsonl(self, blocks: Iterator[bytes], where: str, counts: Counts) -> Iterator[str]:
        """Yield the documents of a .jsonl."""
        for number, piece in enumerate(split_stream(blocks, b"\n", LONGEST_LINE), start=1):
            line = f"{where}, line {number}"
            if piece.cut:
                raise BadInput(
                    f"{line}: longer than {LONGEST_LINE >> 20} MB: put each document on a line of "
                    "its own"
                )
            text = decoded(piece, line, counts)
            if text.strip():
                yield field_of(text, self.text_field, line)


def files_in(path: str, counts: Counts) -> Iterator[str]:
    """Yield the files below a folder that can be read, in the order of their names.

    Links are followed; hidden folders are left out; files of other kinds are counted.
    """
    met = set()
    for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in met:
            # Links may lead in a circle.
            folders.clear()
            continue
        met.add(real)
        # What os.walk goes on with.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = os.path.join(folder, name)
            if READABLE.search(name) and os.path.isfile(file):
                yield file
            else:
                counts.files_skipped += 1


def fail(error: OSError) -> NoReturn:
    """Raise what os.walk would pass over: that a folder cannot be listed."""
    raise error


def require_readable(path: str) -> None:
    """Raise BadInput unless this is the name of a file that can be read, or standard input."""
    if path == STANDARD_INPUT:
        if sys.stdin is None:
            raise BadInput("-: standard input is closed: give it something to read, or name files")
    elif not os.path.exists(path):
        raise BadInput(f"{path}: no such file or folder")
    elif not READABLE.search(path):
        raise BadInput(
            f"{path}: neither .txt, .md nor .jsonl, nor one of these with .gz or .zst: rename it, "
            "or give its text as standard input, with - for the path"
        )


def normal_form(texts: Iterable[str], counts: Counts) -> Iterator[bytes]:
    """Yield the documents as they are tokenized, in UTF-8: not too long, not empty, no U+2581."""
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


# ---- Arranging
@dataclass(frozen=True)
class Documents:
    """Documents in a file, each behind its length: `count` of them, with `size` bytes of text."""

    path: Path
    # Where they begin in the file.
    start: int
    count: int
    size: int

    def __iter__(self) -> Iterator[bytes]:
        with open(self.path, "rb", buffering=BLOCK) as file:
            file.seek(self.start)
            for _ in range(self.count):
                length = int.from_bytes(file.read(LENGTH_BYTES), "little")
                yield file.read(length)

    def after(self, first: Documents) -> Documents:
        """Return the documents behind the first ones."""
        return Documents(
            self.path,
            self.start + LENGTH_BYTES * first.count + first.size,
            self.count - first.count,
            self.size - first.size,
        )


def record(text: bytes) -> bytes:
    """Return a document as it is in a file."""
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def arrange(documents: Iterable[bytes], workspace: Path, counts: Counts) -> Documents:
    """Write each document once, in the order of their SHA-256, to one file in the workspace."""
    folder = workspace / "buckets"
    folder.mkdir()
    buckets = spill(documents, folder / "b")
    path = workspace / "documents"
    count = 0
    size = 0
    with open(path, "wb") as file:
        for bucket in buckets:
            for text in in_order(bucket):
                file.write(record(text))
                count += 1
                size += len(text)
    counts.duplicates += sum(bucket.count for bucket in buckets) - count
    return Documents(path, 0, count, size)


def spill(documents: Iterable[bytes], bucket: Path) -> list[Documents]:
    """Spread documents over 16 files by the next hexadecimal digit of their SHA-256, in its order.

    A file's name is a letter and then the digits that its documents share.
    """
    place = len(bucket.name) - 1
    paths = {digit: bucket.with_name(bucket.name + digit) for digit in "0123456789abcdef"}
    counts = collections.Counter()
    sizes = collections.Counter()
    with contextlib.ExitStack() as files_open:
        files = {}
        for digit, path in paths.items():
            files[digit] = files_open.enter_context(open(path, "wb"))
        for text in documents:
            digit = hashlib.sha256(text).hexdigest()[place]
            files[digit].write(record(text))
            counts[digit] += 1
            sizes[digit] += len(text)
    return [Documents(path, 0, counts[digit], sizes[digit]) for digit, path in paths.items()]


def in_order(bucket: Documents) -> Iterator[bytes]:
    """Yield a bucket's documents, each once, in the order of their SHA-256; its file is removed.

    If they do not fit in memory they are spread over smaller buckets first.
    """
    texts: dict[bytes, bytes] = {}
    size = 0
    for text in bucket:
        key = hashlib.sha256(text).digest()
        if key not in texts:
            texts[key] = text
            size += len(text) + DOCUMENT_OVERHEAD
        if size > BUCKET and len(texts) > 1:
            # The memory is needed for the smaller ones.
            del texts
            smaller = spill(bucket, bucket.path)
            bucket.path.unlink()
            for part in smaller:
                yield from in_order(part)
            return
    bucket.path.unlink()
    for key in sorted(texts):
        yield texts[key]
