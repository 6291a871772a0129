"""data/demo_corpus.py: which docstrings become documents, and the corpus that is made of them.

It is built once, of parts of the installed packages.
"""

from __future__ import annotations

import gc
import json
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import check
import dataset
import demo_corpus
from case_operators import with_operators
from commands import BadInput
from conftest import ROOT
from corpora import read_documents

PARTS = {
    "python": "asyncio",
    "torch": "nn/modules",
    "numpy": "_core",
    "sympy": "sets",
    "networkx": "algorithms/flow",
}
FILES = ["demo_train_000000.bin", "demo_val_000000.bin", "meta.json", "tokenizer.model"]


@pytest.fixture(scope="module")
def docstrings() -> list[tuple[str, str]]:
    """What is found in a folder of each of the installed packages."""
    folders = {name: folder / PARTS[name] for name, folder in demo_corpus.source_folders().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_corpus, "source_folders", lambda: folders)
        return list(demo_corpus.installed_docstrings())


@pytest.fixture(scope="module")
def documents(docstrings) -> list[str]:
    """The documents that they make."""
    return list(demo_corpus.distinct(docstrings, Counter()))


@pytest.fixture(scope="module")
def corpus(docstrings, tmp_path_factory) -> Path:
    """The corpus of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_corpus, "installed_docstrings", lambda: docstrings)
        return demo_corpus.build(tmp_path_factory.mktemp("whole") / "demo")


@pytest.fixture
def few(monkeypatch, documents):
    """Only some documents, for builds that are quick."""
    pairs = [("python", text) for text in documents[:150]]
    monkeypatch.setattr(demo_corpus, "installed_docstrings", lambda: pairs)


def names(folder: Path) -> list[str]:
    """Return the names of what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


# ---- The corpus


def test_shards_decode_to_the_collected_documents(corpus, documents):
    shards = [corpus / f"demo_{name}_000000.bin" for name in ("train", "val")]
    found = read_documents(shards, corpus / "tokenizer.model")
    expected = [with_operators(document.replace("\u2581", "_")) for document in documents]
    assert sorted(found) == sorted(expected)


def test_collecting_leaves_the_garbage_collector_as_it_was(few):
    for was_enabled in (True, False):
        switch = gc.enable if was_enabled else gc.disable
        switch()
        try:
            assert len(list(demo_corpus.documents(Counter()))) == 150
            assert gc.isenabled() == was_enabled
        finally:
            gc.enable()


def test_documents_are_distinct_long_and_from_every_source(corpus, documents):
    meta = json.loads((corpus / "meta.json").read_text())
    assert len(documents) == len(set(documents)) == sum(meta["documents_by_source"].values()) > 500
    assert min(map(len, documents)) > demo_corpus.LONGEST_IGNORED_DOCUMENT
    assert set(meta["documents_by_source"]) == {"python", *demo_corpus.PACKAGES}


def test_known_docstrings_are_collected(documents):
    text = "\0".join(documents)
    # The docstring of torch.nn.Linear, and one that numpy attaches by add_newdoc.
    assert "Applies an affine linear transformation to the incoming data" in text
    assert "An array object represents a multidimensional, homogeneous array" in text


def test_check_passes_the_corpus_and_its_meta_names_no_folder(corpus):
    assert check.main([str(corpus)]) == 0
    text = (corpus / "meta.json").read_text()
    meta = json.loads(text)
    assert names(corpus) == sorted([*meta["files"], "meta.json"]) == FILES
    assert meta["tokenizer"]["file"] == "tokenizer.model"
    assert meta["versions"]["numpy"] == np.__version__
    assert meta["vocabulary_size"] == demo_corpus.DEFAULT_VOCABULARY_SIZE
    assert meta["tokenizer"]["case_operators"] is True
    assert "/" not in text


# ---- Collecting


def test_docstrings_of_all_kinds_are_found():
    source = b'''"""module"""
import torch
unused = "plain string"
class A:
    """class"""
    async def method(self):
        """method"""
        def inner():
            """inner"""
if torch:
    torch.add_docstr(torch.abs, r"""call {x}""".format(x="y"))
    sin = _add_docstr(torch.sin, "first " + "second")
add_newdoc("numpy", "ndarray", ("T", """attribute"""))
@add_docstr_all("decorator")
def g():
    "g" "h"
    return print("printed")
'''
    found = set(demo_corpus.docstrings(source)) - {""}
    documentation = {"module", "class", "method", "inner", "call {x}", "first ", "second"}
    documentation |= {"attribute", "gh"}
    assert found == documentation | {"y", "numpy", "ndarray", "T", "decorator"}


def test_documents_are_cleaned_long_and_counted_once():
    body, by_source = "word " * 80, Counter()
    texts = [
        ("one", f"\n    {body}\n        indented\n\n    "),
        ("two", f"\n{body}\n    indented"),
        ("two", "x" * 300),
        ("two", "x" * 301),
    ]
    assert list(demo_corpus.distinct(texts, by_source)) == [f"{body}\n    indented", "x" * 301]
    assert by_source == {"one": 1, "two": 1}


def test_tests_and_installed_packages_are_left_out(tmp_path):
    kept = ["a.py", "sub/b.py"]
    left_out = ["sub/data.txt", "sub/tests/c.py", "test/d.py", "site-packages/e/f.py"]
    for name in kept + left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert demo_corpus.python_files(tmp_path) == [tmp_path / name for name in kept]


def test_a_file_that_cannot_be_parsed_is_left_out(monkeypatch, tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "fine.py").write_text('"""Fine."""')
    monkeypatch.setattr(demo_corpus, "source_folders", lambda: {"one": tmp_path})
    assert list(demo_corpus.installed_docstrings()) == [("one", "Fine.")]
    assert "broken.py" in capsys.readouterr().err


def test_a_missing_package_is_noted_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(demo_corpus, "PACKAGES", ("no_such_package", "numpy"))
    assert list(demo_corpus.source_folders()) == ["python", "numpy"]
    assert "no_such_package is not installed" in capsys.readouterr().err


def test_packages_are_located_without_importing_them():
    script = (
        "import sys, demo_corpus\n"
        "demo_corpus.source_folders()\n"
        "print({'torch', 'sympy', 'networkx'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "data", capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_missing_standard_library_is_an_error(monkeypatch):
    monkeypatch.setattr(demo_corpus.sysconfig, "get_paths", lambda: {"stdlib": "/nowhere"})
    with pytest.raises(BadInput, match="the standard library's sources are not at /nowhere"):
        demo_corpus.source_folders()


# ---- The folder


def test_a_corpus_is_built_again_only_for_a_reason(few, tmp_path, capsys):
    output = demo_corpus.build(tmp_path / "demo", 600)

    def rebuilt(size: int = 600, **options: bool) -> bool:
        before = output.stat().st_ino
        demo_corpus.build(output, size, **options)
        return output.stat().st_ino != before

    capsys.readouterr()
    assert not rebuilt()
    assert "already built" in capsys.readouterr().out
    assert rebuilt(force=True)
    assert rebuilt(601)
    (output / "demo_val_000000.bin").write_bytes(b"cut short")
    assert rebuilt(601)
    assert names(output) == FILES
    assert list(tmp_path.iterdir()) == [output]


def test_a_folder_that_is_not_a_corpus_is_not_replaced(few, tmp_path):
    (tmp_path / "tokenizer.model").write_text("precious")
    with pytest.raises(BadInput, match="tokenizer.model: not made by this command"):
        demo_corpus.build(tmp_path, force=True)
    assert (tmp_path / "tokenizer.model").read_text() == "precious"


def test_empty_folders_links_and_missing_parents_are_fine(few, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("link", "new/folder"):
        assert names(demo_corpus.build(tmp_path / name, 600)) == FILES
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "empty") == FILES


def test_a_complete_corpus_is_used_where_nothing_can_be_written(few, tmp_path, monkeypatch, capsys):
    output = demo_corpus.build(tmp_path / "demo", 600)

    def refuse(*arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(dataset, "own_folder", refuse)
    demo_corpus.build(output, 600)
    assert "already built" in capsys.readouterr().out


def test_no_network_is_needed(few, tmp_path, monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    assert names(demo_corpus.build(tmp_path / "demo", 600)) == FILES


# ---- The command


def test_command_builds_and_summarizes(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_corpus, "cores", lambda: 1)
    assert demo_corpus.main(["--output", str(tmp_path / "demo"), "--vocab-size", "700"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("demo: 150 documents, 0.")
    assert "training the tokenizer: 100%" in captured.err
    assert json.loads((tmp_path / "demo" / "meta.json").read_text())["vocabulary_size"] == 700
