"""Tests of data/demo_corpus.py. The whole corpus is built once; the rest use a small one, from networkx."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA_FOLDER))

import demo_corpus  # noqa: E402
from demo_corpus import DemoCorpusError  # noqa: E402

HOSTILE_TEXTS = [
    "",
    " ",
    "\n",
    "\n\n\n",
    "   three leading and trailing spaces   ",
    "runs of spaces:  2   3    4        8                16" + " " * 100,
    "def f():\n    if x:\n\treturn\t\ty  \n\n",
    "".join(map(chr, range(0x20))),
    "a\x00b\x7f\x85\r\n\r\u2028\u2029\u00a0\u200b\ufeff\ufffd",
    "e\u0301 \u00e9 \ufb01 \u2126 \u01c4",  # what normalization would change
    "\u6f22\u5b57\u3001\u304b\u306a \ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f469\u200d\U0001f680\U0001f1eb\U0001f1f7 \U0010ffff\uffff",
    "<s></s><unk><pad><0x41> <s> \u2585 \u2047",
]

BUILD_IN_A_PROCESS = """
import json, sys
from pathlib import Path
import demo_corpus
texts = json.loads(Path(sys.argv[1]).read_text())
demo_corpus.build(Path(sys.argv[2]), collection=demo_corpus.gather(map(tuple, texts)))
"""


@pytest.fixture(scope="module")
def collection():
    """The documents of all the installed packages."""
    return demo_corpus.collect_documents()


@pytest.fixture(scope="module")
def corpus(collection, tmp_path_factory):
    """The folder of the whole corpus."""
    return demo_corpus.build(tmp_path_factory.mktemp("whole") / "demo", collection=collection)


@pytest.fixture(scope="module")
def meta(corpus):
    return json.loads((corpus / "meta.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tokenizer.model"))


@pytest.fixture(scope="module")
def small_texts():
    """(source, docstring) pairs for a collection of about 1 MB."""
    folder = demo_corpus.source_folders()["networkx"] / "algorithms"
    paths = demo_corpus.python_files(folder)
    return [("networkx", text) for path in paths for text in demo_corpus.docstrings(path.read_bytes())]


@pytest.fixture(scope="module")
def small(small_texts):
    return demo_corpus.gather(small_texts)


def read_shard(path):
    """Return a shard's header (256,) and tokens, read independently of the module under test."""
    return np.fromfile(path, "<i4", count=256), np.fromfile(path, "<u2", offset=1024)


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decode_shard(path, tokenizer):
    _, tokens = read_shard(path)
    starts = np.flatnonzero(tokens == 1)
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


def start_build(texts_path, output, hash_seed):
    environment = {**os.environ, "PYTHONPATH": str(DATA_FOLDER), "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", BUILD_IN_A_PROCESS, str(texts_path), str(output)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


# The whole corpus


def test_shards_decode_to_the_collected_documents(corpus, collection, tokenizer):
    training = decode_shard(corpus / "demo_train_000000.bin", tokenizer)
    validation = decode_shard(corpus / "demo_val_000000.bin", tokenizer)
    assert validation + training == collection.documents


def test_documents_are_many_distinct_long_and_from_every_source(collection):
    assert len(collection.documents) > 10_000
    assert len(set(collection.documents)) == len(collection.documents)
    assert min(map(len, collection.documents)) == demo_corpus.LONGEST_IGNORED_DOCUMENT + 1
    assert set(collection.counts["documents_by_source"]) == {"python", *demo_corpus.PACKAGES}


def test_known_docstrings_are_collected(collection):
    documents = "\0".join(collection.documents)
    assert "Applies an affine linear transformation to the incoming data" in documents  # torch.nn.Linear
    assert "matmul(input, other, *, out=None) -> Tensor" in documents  # through add_docstr
    assert "An array object represents a multidimensional, homogeneous array" in documents  # by add_newdoc


def test_shard_headers(corpus, meta):
    for name in ("train", "val"):
        header, tokens = read_shard(corpus / f"demo_{name}_000000.bin")
        assert header[:3].tolist() == [20240520, 1, len(tokens)]
        assert not header[3:].any()
        assert len(tokens) == meta[name]["tokens"]


def test_every_document_begins_with_bos_and_has_no_other_special_token(corpus, meta):
    for name in ("train", "val"):
        _, tokens = read_shard(corpus / f"demo_{name}_000000.bin")
        counts = np.bincount(tokens, minlength=1024)
        assert tokens[0] == 1
        assert counts[:4].tolist() == [0, meta[name]["documents"], 0, 0]
        assert len(counts) == 1024


def test_splits_are_disjoint_and_enough_is_held_out(collection, meta):
    training, validation = demo_corpus.split(collection.documents)
    held_out = sum(len(document.encode()) for document in validation)
    assert not set(training) & set(validation)
    assert len(training) + len(validation) == len(collection.documents)
    assert held_out >= 200_000
    assert 0.03 <= held_out / sum(len(document.encode()) for document in collection.documents) < 0.04
    assert meta["val"]["bytes"] == held_out


def test_meta_describes_the_files_and_names_no_folder(corpus, collection, meta):
    contents = read_files(corpus)
    described = {name: (file["bytes"], file["sha256"]) for name, file in meta["files"].items()}
    text = contents.pop("meta.json").decode()
    assert described == {name: (len(b), hashlib.sha256(b).hexdigest()) for name, b in contents.items()}
    assert sum(meta["documents_by_source"].values()) == len(collection.documents)
    assert meta["train"]["documents"] + meta["val"]["documents"] == len(collection.documents)
    assert meta["versions"]["numpy"] == np.__version__
    assert "/" not in text


# The tokenizer


def test_special_pieces(tokenizer):
    ids = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert ids == (0, 1, 2, 3)
    assert tokenizer.vocab_size() == 1024
    for piece in ("\u2581", "\n", "\u2581\u2581\u2581\u2581", "<0x00>", "<0xFF>"):
        assert tokenizer.id_to_piece(tokenizer.piece_to_id(piece)) == piece


def test_nothing_is_put_before_a_text(tokenizer):
    assert [tokenizer.id_to_piece(token) for token in tokenizer.encode("\na")] == ["\n", "a"]


def test_newline_is_in_no_other_piece(tokenizer):
    assert [i for i in range(1024) if "\n" in tokenizer.id_to_piece(i)] == [tokenizer.piece_to_id("\n")]


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=ascii)
def test_hostile_text_survives_the_tokenizer(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert not {0, 1, 2, 3} & set(tokens)


def test_a_document_that_does_not_survive_is_named(corpus):
    model = (corpus / "tokenizer.model").read_bytes()
    with pytest.raises(DemoCorpusError, match="begins 'before\u2581after'"):
        demo_corpus.encode_documents(model, ["fine", "before\u2581after"], "test")


def test_long_lines_are_not_dropped_from_training(small):
    document = " ".join(["\u203b\u203b"] * 10_000)  # far over SentencePiece's own limit of 4,192 bytes
    model = demo_corpus.train_tokenizer([*small.documents, document], 1024)
    trained = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert trained.piece_to_id("\u203b\u203b") != trained.unk_id()


def test_too_many_pieces_for_the_text_is_one_clear_line():
    with pytest.raises(DemoCorpusError, match="cannot train a tokenizer of 60000 pieces") as caught:
        demo_corpus.train_tokenizer(["hardly any text"], 60_000)
    assert "\n" not in str(caught.value)


# Collecting


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
    documentation = {"module", "class", "method", "inner", "call {x}", "first ", "second", "attribute", "gh"}
    assert found == documentation | {"y", "numpy", "ndarray", "T", "decorator"}


def test_gather_cleans_filters_and_deduplicates():
    body = "word " * 80
    texts = [
        ("one", f"\n    {body}\n        indented\n\n    "),
        ("two", f"\n{body}\n    indented"),
        ("two", "x" * 300),
        ("two", "x" * 301),
        ("two", "\ud800" + "y" * 400),
    ]
    gathered = demo_corpus.gather(texts)
    assert sorted(gathered.documents) == sorted([f"{body}\n    indented", "x" * 301])
    assert gathered.counts["documents_by_source"] == {"one": 1, "two": 1}
    assert gathered.counts["skipped_documents"] == 1


def test_space_symbols_are_replaced_and_counted():
    gathered = demo_corpus.gather([("one", "\u2581a\u2581b" + "c" * 300), ("one", "d" * 301)])
    assert "_a_b" + "c" * 300 in gathered.documents
    assert gathered.counts["replaced_characters"] == 2


def test_order_is_by_hash_and_not_by_file(small_texts, small):
    hashes = [hashlib.sha256(document.encode()).hexdigest() for document in small.documents]
    assert hashes == sorted(hashes)
    assert demo_corpus.gather(reversed(small_texts)).documents == small.documents


def test_tests_and_installed_packages_are_left_out(tmp_path):
    for name in ("a.py", "sub/b.py", "sub/data.txt", "sub/tests/c.py", "test/d.py", "site-packages/e/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert demo_corpus.python_files(tmp_path) == [tmp_path / "a.py", tmp_path / "sub/b.py"]


def test_a_missing_package_is_noted_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(demo_corpus, "PACKAGES", ("no_such_package", "numpy"))
    assert list(demo_corpus.source_folders()) == ["python", "numpy"]
    assert "no_such_package is not installed" in capsys.readouterr().err


def test_a_missing_standard_library_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "nowhere")})
    with pytest.raises(DemoCorpusError, match="standard library"):
        demo_corpus.source_folders()


def test_packages_are_located_without_importing_them():
    script = (
        "import sys, demo_corpus; demo_corpus.source_folders(); "
        "assert not {'torch', 'sympy', 'networkx'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(DATA_FOLDER)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_a_file_that_cannot_be_parsed_is_left_out(monkeypatch, tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "fine.py").write_text('"""Fine."""')
    monkeypatch.setattr(demo_corpus, "source_folders", lambda: {"one": tmp_path})
    assert list(demo_corpus.installed_docstrings()) == [("one", "Fine.")]
    assert "broken.py" in capsys.readouterr().err


def test_too_little_text_cannot_be_split():
    with pytest.raises(DemoCorpusError, match="only 399,000 bytes"):
        demo_corpus.split(["x" * 1000] * 399)


def test_split_holds_out_at_least_200_kilobytes(small):
    training, validation = demo_corpus.split(small.documents)
    assert demo_corpus.count_bytes(validation) >= 200_000 > demo_corpus.count_bytes(validation[:-1])
    assert demo_corpus.count_bytes(training) > demo_corpus.count_bytes(validation)


# Writing


def test_tokens_are_spread_over_shards(tmp_path):
    tokens = np.arange(65_526, 65_536, dtype=np.uint16)
    demo_corpus.write_shards(tmp_path, "demo_train", tokens, shard_size=4)
    shards = [read_shard(tmp_path / f"demo_train_{index:06d}.bin") for index in range(3)]
    assert [header[2] for header, _ in shards] == [4, 4, 2]
    assert np.concatenate([part for _, part in shards]).tolist() == tokens.tolist()
    assert len(list(tmp_path.iterdir())) == 3


def test_builds_in_different_processes_give_equal_bytes(small_texts, tmp_path):
    for name, texts in (("a", small_texts), ("b", small_texts[::-1])):
        (tmp_path / f"{name}.json").write_text(json.dumps(texts))
    processes = [start_build(tmp_path / f"{name}.json", tmp_path / name, seed) for name, seed in ("a1", "b2")]
    assert [(process.communicate()[1][-300:], process.returncode)[1] for process in processes] == [0, 0]
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")
    assert set(read_files(tmp_path / "a")) == {
        "demo_train_000000.bin", "demo_val_000000.bin", "tokenizer.model", "meta.json"
    }  # fmt: skip


def test_simultaneous_builds_of_one_folder_both_succeed(small_texts, small, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(small_texts))
    processes = [start_build(tmp_path / "texts.json", tmp_path / "demo", seed) for seed in "12"]
    assert [(process.communicate()[1][-300:], process.returncode)[1] for process in processes] == [0, 0]
    assert demo_corpus.is_complete(tmp_path / "demo", 1024)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "texts.json"]


def test_a_corpus_that_appears_during_the_build_is_kept(small, tmp_path, monkeypatch):
    output = tmp_path / "demo"
    write_corpus = demo_corpus.write_corpus

    def write_after_the_winner(*arguments):
        monkeypatch.setattr(demo_corpus, "write_corpus", write_corpus)
        demo_corpus.build(output, collection=small)
        (output / "winner").touch()
        return write_corpus(*arguments)

    monkeypatch.setattr(demo_corpus, "write_corpus", write_after_the_winner)
    demo_corpus.build(output, collection=small)
    assert (output / "winner").exists()
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("force", [False, True])
def test_the_loser_of_the_race_uses_the_winners_corpus(small, tmp_path, monkeypatch, force):
    output = tmp_path / "demo"
    rename = os.rename

    def rename_after_the_winner(source, target):
        monkeypatch.setattr(os, "rename", rename)
        demo_corpus.build(output, collection=small)
        (output / "winner").touch()
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_after_the_winner)
    demo_corpus.build(output, force=force, collection=small)
    assert (output / "winner").exists()
    assert list(tmp_path.iterdir()) == [output]


def test_an_interrupted_build_leaves_nothing(small, tmp_path, monkeypatch):
    def interrupt(path, tokens):
        assert (path.parent / "tokenizer.model").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_corpus, "write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo_corpus.build(tmp_path / "demo", collection=small)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_rebuild_leaves_the_old_corpus(small, tmp_path, monkeypatch):
    output = demo_corpus.build(tmp_path / "demo", collection=small)
    before = read_files(output)

    def interrupt(path, tokens):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_corpus, "write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo_corpus.build(output, force=True, collection=small)
    assert read_files(output) == before
    assert list(tmp_path.iterdir()) == [output]


def test_an_existing_corpus_is_rebuilt_only_for_a_reason(small, tmp_path, capsys):
    output = demo_corpus.build(tmp_path / "demo", collection=small)

    def was_rebuilt(**options):
        inode = (output / "tokenizer.model").stat().st_ino
        modified = (output / "tokenizer.model").stat().st_mtime_ns
        demo_corpus.build(output, collection=small, **options)
        after = (output / "tokenizer.model").stat()
        return (after.st_ino, after.st_mtime_ns) != (inode, modified)

    capsys.readouterr()
    assert not was_rebuilt()
    assert "already built" in capsys.readouterr().out
    assert was_rebuilt(force=True)
    assert was_rebuilt(vocabulary_size=600)
    (output / "demo_val_000000.bin").write_bytes(b"cut short")
    assert was_rebuilt(vocabulary_size=600)
    assert demo_corpus.is_complete(output, 600)
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("name", ["thesis.txt", "tokenizer.model"])
def test_a_folder_that_is_not_a_corpus_is_not_replaced(small, tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(DemoCorpusError, match=f"{name}: not a demo corpus"):
        demo_corpus.build(tmp_path, force=True, collection=small)
    assert (tmp_path / name).read_text() == "precious"


def test_a_corpus_with_other_files_beside_it_is_not_replaced(small, tmp_path):
    output = demo_corpus.build(tmp_path / "demo", collection=small)
    (output / "thesis.txt").write_text("precious")
    with pytest.raises(DemoCorpusError, match="thesis.txt: not a demo corpus"):
        demo_corpus.build(output, force=True, collection=small)
    assert (output / "thesis.txt").read_text() == "precious"


def test_an_empty_folder_and_missing_parents_are_fine(small, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert demo_corpus.is_complete(demo_corpus.build(empty, collection=small), 1024)
    assert demo_corpus.is_complete(demo_corpus.build(tmp_path / "new" / "folder", collection=small), 1024)


def test_no_network_is_needed(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    folders = {"networkx": demo_corpus.source_folders()["networkx"]}
    monkeypatch.setattr(demo_corpus, "source_folders", lambda: folders)
    assert demo_corpus.is_complete(demo_corpus.build(tmp_path / "demo"), 1024)


# The command


def test_command_builds_and_summarizes(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_corpus, "collect_documents", lambda: small)
    assert demo_corpus.main(["--output", str(tmp_path / "demo"), "--vocab-size", "700"]) == 0
    assert demo_corpus.is_complete(tmp_path / "demo", 700)
    captured = capsys.readouterr()
    assert captured.out.startswith(f"demo corpus: {len(small.documents):,} documents, 1.")
    assert captured.out.count("\n") == 1
    assert "training the tokenizer: 100%" in captured.err


@pytest.mark.parametrize("size", ["511", "65537", "-1"])
def test_command_reports_an_error_in_one_line(tmp_path, capsys, size):
    assert demo_corpus.main(["--output", str(tmp_path / "demo"), "--vocab-size", size]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"demo corpus: the vocabulary size must be 512 to 65,536, not {size}\n"
    assert captured.out == ""


def test_command_reports_an_interrupt(tmp_path, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_corpus, "collect_documents", interrupt)
    assert demo_corpus.main(["--output", str(tmp_path / "demo")]) == 1
    assert capsys.readouterr().err == "demo corpus: interrupted, nothing was written\n"
    assert list(tmp_path.iterdir()) == []
