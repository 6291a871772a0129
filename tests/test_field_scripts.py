"""Scripts of others, read and never run: packed ones, files beside them, places to look at."""

from __future__ import annotations

import base64
import lzma
import random
import sys
import zlib

import pytest
import zstandard

import field_scripts
from checks import FAILS, HOLDS, UNCHECKED
from field_folder import Folder
from field_scripts import files_used, packs_itself, places, unpack

# Incompressible, so that what is packed is long.
FILLER = "".join(random.Random(1).choices("abcdefghijklmnop", k=3000))
SOURCE = f'import os\nSECRET = "{FILLER}"\nprint("ran")\n'.encode()


def wrapper(packed: bytes, encode: str = "b85encode") -> str:
    """A script that unpacks itself."""
    text = getattr(base64, encode)(packed).decode()
    return f"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode({text!r})))\n"


class FakeBrotli:
    """Stands for the module brotli, which need not be installed: it turns all bits over."""

    error = ValueError

    class Decompressor:
        @staticmethod
        def process(piece: bytes) -> bytes:
            return turned_over(piece)


def turned_over(data: bytes) -> bytes:
    """All bits turned over, which no other codec opens."""
    return bytes(255 - byte for byte in data)


RAW = [{"id": lzma.FILTER_LZMA2}]


@pytest.mark.parametrize(
    "packed, encode",
    [
        (lzma.compress(SOURCE), "b85encode"),
        (lzma.compress(SOURCE, lzma.FORMAT_RAW, filters=RAW), "b85encode"),
        (lzma.compress(SOURCE), "b64encode"),
        (zlib.compress(SOURCE), "b85encode"),
    ],
)
def test_a_script_that_unpacks_itself_is_read_inside(packed, encode, capfd):
    assert unpack(wrapper(packed, encode).encode()) == SOURCE
    assert "ran" not in capfd.readouterr().out


def test_brotli_and_zstd_are_opened(monkeypatch):
    monkeypatch.setitem(sys.modules, "brotli", FakeBrotli)
    for packed in (turned_over(SOURCE), zstandard.ZstdCompressor().compress(SOURCE)):
        assert unpack(wrapper(packed).encode()) == SOURCE
    monkeypatch.setattr(field_scripts, "LARGEST_SCRIPT", 100)
    assert unpack(wrapper(turned_over(SOURCE)).encode()) is None


@pytest.mark.parametrize("text", [SOURCE.decode(), "exec('1')", f"exec({FILLER!r})", "exec(", ""])
def test_what_is_not_packed_has_nothing_inside(text):
    assert unpack(text.encode()) is None


def test_a_script_may_count_its_code_compressed():
    assert packs_itself("size = len(lzma.compress(code.encode()))")
    assert not packs_itself("blob = lzma.compress(weights)")


def test_files_that_are_imported_compiled_or_opened_are_used(tmp_path):
    names = ("mixture.py", "unused.py", "pack/kernel.cu", "weights.npz", "bpe.model", "notes.md")
    beside = {name: tmp_path / name for name in names}
    text = (
        'import mixture\nload(sources=["pack/kernel.cu"])\nopen("weights.npz")\nopen("bpe.model")\n'
    )
    assert files_used(text, beside) == ["mixture.py", "pack/kernel.cu", "weights.npz"]
    assert files_used("not python (", beside) == []


def test_places_are_where_scoring_learns_opens_or_counts():
    text = (
        "class NgramTable:\n    pass\n"
        "def eval_ttt(model):\n    loss.backward()\n    optimizer.step()\n    open('x')\n"
        "def train():\n    loss.backward()\n"
    )
    assert places(text, "a.py") == [
        "a.py:1 NgramTable",
        "a.py:4 eval_ttt: backward()",
        "a.py:5 eval_ttt: step()",
        "a.py:6 eval_ttt: open()",
    ]


# ---- What follows for a folder
@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


def test_a_log_may_count_the_source_inside_of_a_packed_script(folder):
    """The total of the log is over the cap, that of what is shipped is not."""
    shipped = wrapper(lzma.compress(SOURCE))
    (folder.path / "train_gpt.py").write_text(shipped)
    for path in folder.path.glob("*.log"):
        text = path.read_text().partition("=" * 100 + "\n")[2]
        text = text.replace("Code size: 789", f"Code size: {len(SOURCE)}")
        model = 16_000_000 - len(SOURCE) + 1
        text = text.replace("15650000", str(model)).replace("15650789", str(16_000_001))
        path.write_text(text)
    assert len(shipped) < len(SOURCE)
    folder.state(bytes_total=16_000_000 - len(SOURCE) + 1 + len(shipped), seed_results=None)
    assert folder.verdict("code size").state == HOLDS
    assert folder.verdict("cap").state == HOLDS
    assert folder.failures() == []


def test_a_script_that_unpacks_in_an_unknown_way_is_no_other_script(folder):
    text = f"import odd\nexec(odd.decompress({FILLER.encode()!r}))\n"
    (folder.path / "train_gpt.py").write_text(text)
    for check in ("source", "code size"):
        found = folder.verdict(check)
        assert found.state == UNCHECKED and "not known here" in found.text
    assert folder.failures() == []


def test_without_brotli_what_it_packed_cannot_be_checked(folder, monkeypatch):
    script = folder.path / "train_gpt.py"
    packed = turned_over(script.read_bytes() + f"# {FILLER}\n".encode())
    script.write_text(f"import brotli\nexec(brotli.decompress({packed!r}))\n")
    monkeypatch.setitem(sys.modules, "brotli", None)
    for check in ("source", "code size"):
        found = folder.verdict(check)
        assert found.state == UNCHECKED and "brotli is not installed" in found.text
    assert folder.failures() == []
    # With it, the source is read: the one inside has a line more than that of the logs.
    monkeypatch.setitem(sys.modules, "brotli", FakeBrotli)
    found = folder.verdict("source")
    assert found.state == UNCHECKED and "only the beginning" in found.text


def test_code_that_is_counted_compressed_cannot_be_compared(folder):
    script = folder.path / "train_gpt.py"
    script.write_text(script.read_text() + "# len(brotli.compress(code))\n" * 100)
    for path in folder.path.glob("*.log"):
        path.write_text(path.read_text().partition("=" * 100 + "\n")[2])
    assert folder.verdict("code size").state == UNCHECKED
    script.write_text("# filler\n" * 500)
    assert folder.verdict("code size").state == FAILS


@pytest.mark.parametrize("change", ["crlf", "spaces", "newlines"])
def test_white_space_alone_is_no_other_script(change, folder):
    script = folder.path / "train_gpt.py"
    text = script.read_text()
    if change == "crlf":
        script.write_bytes(text.replace("\n", "\r\n").encode())
    else:
        script.write_text(text.replace("\n", " \n", 1) if change == "spaces" else text + "\n\n")
    found = folder.verdict("source")
    assert found.state == HOLDS and "white space alone" in found.text


def test_a_log_that_holds_the_beginning_of_the_script_shows_no_other(folder):
    script = folder.path / "train_gpt.py"
    script.write_text(script.read_text() + "more = 1\n")
    assert folder.verdict("source").state == UNCHECKED
