"""data/documents.py: a stream is split the same however it comes; which files are read."""

from __future__ import annotations

import os
import random

import pytest

import documents
from commands import BadInput
from documents import Counts, Input, Piece, arrange, normal_form, split_stream


# ---- Cutting
def test_a_long_document_is_cut_behind_paragraphs_lines_words_or_characters():
    line = "word " * 19 + "end\n"
    paragraph = line * 3 + "\n"
    for text, ends in ((paragraph * 300, "\n\n"), (line, "\n"), ("word ", " "), ("\u6f22", "")):
        data = (text * (300_000 // len(text.encode()))).encode()
        counts = Counts()
        found = list(normal_form([data.decode()], counts))
        assert b"".join(found) == data
        assert counts.cuts == len(found) - 1 >= 4
        for part in found[:-1]:
            assert len(part) <= 64 << 10 and part.decode().endswith(ends)


@pytest.mark.parametrize("separator", [b"", b"\n", b"ab", b"aab"])
def test_how_a_stream_comes_in_blocks_does_not_matter(separator):
    draw = random.Random(1)
    for _ in range(300):
        data = bytes(draw.choices(b"aab \n", k=draw.randrange(60)))
        places = [0, *sorted(draw.choices(range(len(data) + 1), k=draw.randrange(8))), len(data)]
        blocks = [data[a:b] for a, b in zip(places[:-1], places[1:], strict=True)]
        found = list(split_stream(iter(blocks), separator, 8))
        assert found == list(split_stream(iter([data]), separator, 8))
        for piece in found:
            assert data[piece.start :].startswith(piece.data) and len(piece.data) <= 8
        contents = [piece.data for piece in found]
        parts = data.split(separator) if separator else [data]
        assert b"".join(contents) == b"".join(parts)
        if separator and max(len(part) for part in parts) <= 8:
            # An empty part at the end is no document.
            assert contents == parts[: len(found)]


def test_a_document_as_long_as_the_limit_is_not_cut():
    found = list(split_stream(iter([b"x" * 8 + b";y"]), b";", 8))
    assert found == [Piece(0, b"x" * 8, False), Piece(9, b"y", False)]


# ---- Files
def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        list(Input([str(tmp_path)]).files(Counts()))


def test_links_to_folders_are_followed_and_a_circle_ends(tmp_path):
    for name in ("here/a.txt", "elsewhere/b.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "here")
    found = Input([str(tmp_path / "here")]).files(Counts())
    assert [name for _, name in found] == ["a.txt", "link/b.txt"]


def test_hidden_folders_and_files_of_other_kinds_are_left_out(tmp_path):
    for name in ("a.md", "b.py", "sub/c.JSONL.gz", ".git/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    counts = Counts()
    found = Input([str(tmp_path)]).files(counts)
    assert [name for _, name in found] == ["a.md", os.path.join("sub", "c.JSONL.gz")]
    assert counts.files_skipped == 1


def test_a_line_of_a_jsonl_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "x" * (2 << 20) + '"}')
    with pytest.raises(BadInput, match="in.jsonl, line 2: longer than 1 MB"):
        list(Input([str(path)]).texts(Counts(), "test"))


def test_an_input_is_known_by_its_files_and_how_they_are_read(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("some text")
    source = Input([str(path)])
    known = source.identity("name", 512)
    assert source.identity("name", 512) == known
    assert source.size() == 9
    others = [
        source.identity("name", 513),
        Input([str(path)], separator=b"x").identity("name", 512),
        Input([str(path)], text_field="body").identity("name", 512),
    ]
    path.write_text("other text")
    others.append(source.identity("name", 512))
    assert len({known, *others}) == 5
    assert Input([str(path), "-"]).identity("name", 512) is None
    assert Input([str(path), "-"]).size() is None


# ---- Arranging
def test_many_copies_of_one_document_do_not_split_its_bucket_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BUCKET", 300)
    counts = Counts()
    found = arrange([b"x" * 200, b"y" * 200] * 50, tmp_path, counts)
    assert len(list(found)) == 2 and counts.duplicates == 98
    assert list((tmp_path / "buckets").iterdir()) == []
