"""data/download.py against a local stand-in of the hub, so that huggingface_hub's own code runs."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import re
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs

import pytest
import sentencepiece
from tqdm import tqdm

import check
import download
import hub as hub_module
import train_gpt
from conftest import ROOT, VOCAB_SIZE, write_shard

REPOSITORY = "owner/export"
COMMIT = "a" * 40
FOLDER = "datasets/datasets/fineweb10B_sp384"
SHARD = f"{FOLDER}/fineweb_val_000000.bin"
CASE_FOLDER = "datasets/datasets/fineweb10B_sp300_caseops"
ARGUMENTS = ["--repo", REPOSITORY, "--variant", "sp384", "--train-shards", "2"]
WHOLE = [
    "fineweb_384_bpe.model",
    "fineweb_384_bpe.vocab",
    "fineweb_train_000000.bin",
    "fineweb_train_000001.bin",
    "fineweb_val_000000.bin",
    "manifest.json",
]


class StandIn(http.server.ThreadingHTTPServer):
    """What download.py asks of the hub: commit, files' sizes and digests, files."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.repository = REPOSITORY
        # Whether every answer is the page of a login.
        self.pages = False
        # What was asked: (method, path, range).
        self.requests: list[tuple[str, str, str | None]] = []
        # A part of a path: the (status, headers) of its next answers.
        self.faults: dict[str, list[tuple[int, dict]]] = {}
        # A part of a path: what is called before the answer.
        self.before: dict[str, Callable[[], object]] = {}
        # A path: what is sent in its place, next and after that.
        self.served: dict[str, list[bytes]] = {}
        # A path: the number of bytes after which its next answer breaks off.
        self.torn: dict[str, int] = {}
        # The seconds that download.py has waited.
        self.waits: list[int] = []
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> list[str]:
        """The names of the files that were sent."""
        names = []
        for method, path, _ in self.requests:
            if method == "GET" and "resolve" in path:
                names.append(path.rsplit("/", 1)[-1])
        return names


class Answer(http.server.BaseHTTPRequestHandler):
    """One answer of the stand-in."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Write no log."""

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.requests.append((self.command, self.path, self.headers.get("Range")))
        for part, action in server.before.items():
            if part in self.path and self.command == "GET":
                action()
        for part, faults in server.faults.items():
            if part in self.path and faults:
                status, headers = faults.pop(0)
                self.send(status, b"{}", headers)
                return
        if server.pages:
            self.send(200, b"<!doctype html><title>Log in</title>")
            return
        repository = server.repository
        file = re.fullmatch(rf"/datasets/{repository}/resolve/{COMMIT}/(.*)", self.path)
        if self.path.startswith(f"/api/datasets/{repository}/paths-info/{COMMIT}"):
            self.send(200, json.dumps(self.paths_info(body)).encode())
        elif self.path.startswith(f"/api/datasets/{repository}/revision/main"):
            siblings = [{"rfilename": path} for path in server.files]
            info = {"id": repository, "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(info).encode())
        elif file and file[1] in server.files:
            self.send_file(file[1])
        elif file:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        elif f"/{repository}/" in self.path:
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})

    def paths_info(self, body: bytes) -> list[dict]:
        """What the hub says of the files that are asked for."""
        found = []
        for path in parse_qs(body.decode())["paths"]:
            content = self.server.files.get(path)
            if content is not None:
                sha256 = hashlib.sha256(content).hexdigest()
                size = len(content)
                lfs = {"oid": sha256, "size": size, "pointerSize": 130}
                entry = {"type": "file", "path": path, "size": size, "oid": "0" * 40, "lfs": lfs}
                found.append(entry)
        return found

    def send_file(self, path: str) -> None:
        """Send a file, or the part of it that is asked for."""
        server = self.server
        body = server.files[path]
        etag = hashlib.sha256(body).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if server.served.get(path):
            body = server.served[path].pop(0)
        whole = len(body)
        status = 200
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:
            status = 206
            body = body[int(start[1]) :]
            headers["Content-Range"] = f"bytes {start[1]}-{whole - 1}/{whole}"
        if self.command == "GET" and path in server.torn:
            headers["Content-Length"] = str(whole)
            body = body[: server.torn.pop(path)]
            self.close_connection = True
        self.send(status, body, headers)

    do_GET = answer
    do_HEAD = answer
    do_POST = answer


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> dict[str, bytes]:
    """The files of a repository with three training shards and one of validation, sp384."""
    scratch = tmp_path_factory.mktemp("export") / "shard"
    stats = {"files_train": 3, "files_val": 1, "tokens_train": 6700, "tokens_val": 900}
    stats |= {"docs_train": 3, "docs_val": 1}
    tokens = {"train_000000": 3000, "train_000001": 3000, "train_000002": 700, "val_000000": 900}
    files = {}
    for piece, (name, count) in enumerate(tokens.items(), start=5):
        shard = write_shard(scratch, [1] + [piece] * (count - 1))
        files[f"{FOLDER}/fineweb_{name}.bin"] = shard.read_bytes()
    model = (data_folder / "tokenizer.model").read_bytes()
    files["datasets/tokenizers/fineweb_384_bpe.model"] = model
    files["datasets/tokenizers/fineweb_384_bpe.vocab"] = b"<pad>\t0\n"
    tokenizer = {
        "name": "sp_bpe_384",
        "model_path": "tokenizers/fineweb_384_bpe.model",
        "vocab_path": "tokenizers/fineweb_384_bpe.vocab",
    }
    dataset = {
        "name": "fineweb10B_sp384",
        "tokenizer_name": "sp_bpe_384",
        "vocab_size": VOCAB_SIZE,
        "stats": stats,
    }
    no_model = {"name": "fineweb10B_char", "tokenizer_name": "characters", "stats": stats}
    manifest = {
        "shard_size": 3000,
        "tokenizers": [tokenizer, {"name": "characters", "path": "tokenizers/x.json"}],
        "datasets": [dataset, no_model],
    }
    files["datasets/manifest.json"] = json.dumps(manifest).encode()
    return files


@pytest.fixture
def hub(export: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A stand-in that huggingface_hub takes for the hub; waits take no time and are noted there."""
    server = StandIn(dict(export))
    monkeypatch.setattr(hub_module.time, "sleep", server.waits.append)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    # No token of the user's is sent to the stand-in. Only other processes read HF_HOME anew.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def case_export(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a repository of case-operator data: 1 training shard, 2 of validation."""
    scratch = tmp_path_factory.mktemp("export") / "shard"
    tokens = {"train_000000": 1000, "val_000000": 1000, "val_000001": 400}
    # The bytes of the original text, a number for each token.
    tokens |= {"val_bytes_000000": 1000, "val_bytes_000001": 400}
    files = {}
    for name, count in tokens.items():
        shard = write_shard(scratch, [1] + [5] * (count - 1))
        files[f"{CASE_FOLDER}/fineweb_{name}.bin"] = shard.read_bytes()
    model = io.BytesIO()
    words = [f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrst"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        user_defined_symbols=["\ue001", "\ue002", "\ue003", "\ue004"],
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    files["datasets/tokenizers/fineweb_300_bpe_caseops.model"] = model.getvalue()
    # Its exporter stopped after one shard, in the middle of a document.
    stats = {"files_train": 1, "files_val": 2, "tokens_train": 1007, "tokens_val": 1400}
    dataset = {
        "name": "fineweb10B_sp300_caseops",
        "tokenizer_name": "sp_bpe_300",
        "vocab_size": 300,
        "val_bytes_glob": "datasets/fineweb10B_sp300_caseops/fineweb_val_bytes_*.bin",
        "stats": stats,
    }
    tokenizer = {
        "name": "sp_bpe_300",
        "model_path": "tokenizers/fineweb_300_bpe_caseops.model",
    }
    manifest = {"shard_size": 1000, "tokenizers": [tokenizer], "datasets": [dataset]}
    files["datasets/manifest.json"] = json.dumps(manifest).encode()
    return files


def run_case(out: Path, *more: str) -> int:
    """Download the case-operator data."""
    arguments = ["--variant", "sp300_caseops", "--train-shards", "1", *more]
    return download.main(["--repo", REPOSITORY, "--out", str(out), *arguments])


def noted(out: Path, name: str) -> dict:
    """What the manifest beside the shards of a data set says."""
    return json.loads((out / "datasets" / name / "manifest.json").read_text())


def run(out: Path, *more: str) -> int:
    return download.main([*ARGUMENTS, "--out", str(out), *more])


def error_line(capsys: pytest.CaptureFixture) -> str:
    """The last line on standard error, which must be the only error there and no traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error:") for line in lines) == 1 and lines[-1].startswith("error:")
    return lines[-1]


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.rglob("*") if path.is_file())


def failed_checks(folder: Path, capsys) -> list[str]:
    """What check.py faults; the stand-in is a part of the challenge's validation split."""
    capsys.readouterr()
    check.main([str(folder)])
    return re.findall(r"^(.+?) +FAIL", capsys.readouterr().out, re.MULTILINE)


def test_the_files_arrive_as_they_are_and_nothing_else_is_left(
    hub, export, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    assert run(tmp_path / "out") == 0
    assert names(tmp_path / "out") == WHOLE
    for path, content in export.items():
        if "manifest" not in path and "000002" not in path:
            assert (tmp_path / "out" / path.removeprefix("datasets/")).read_bytes() == content
    said = capsys.readouterr().out
    assert failed_checks(tmp_path / "out/datasets/fineweb10B_sp384", capsys) == ["known split"]
    assert "val 900 tokens (shards: 1), train 6,000 tokens (shards: 2)" in said
    assert said.endswith(" torchrun --standalone --nproc_per_node=8 train_gpt.py\n")


def test_a_second_run_reads_all_and_fetches_no_file(hub, tmp_path, capsys):
    run(tmp_path)
    hub.requests.clear()
    capsys.readouterr()
    assert run(tmp_path) == 0
    assert hub.fetched() == ["manifest.json"]
    assert "checking" in capsys.readouterr().err


def test_more_shards_later_fetch_just_those(hub, tmp_path, capsys):
    run(tmp_path, "--train-shards", "0")
    assert failed_checks(tmp_path / "datasets/fineweb10B_sp384", capsys) == ["known split"]
    assert not list(tmp_path.rglob("*_train_*"))
    hub.requests.clear()
    assert run(tmp_path, "--train-shards", "1") == 0
    assert hub.fetched() == ["manifest.json", "fineweb_train_000000.bin"]


# With --train-shards 1 the second one is beyond those asked for.
@pytest.mark.parametrize("end, asked", [(b"", "2"), (b"\7\7", "2"), (b"\7\7", "1")])
def test_a_file_that_is_cut_or_another_is_fetched_again(hub, export, tmp_path, end, asked):
    run(tmp_path)
    cut = tmp_path / "datasets/fineweb10B_sp384/fineweb_train_000001.bin"
    cut.write_bytes(cut.read_bytes()[:-2] + end)
    hub.requests.clear()
    assert run(tmp_path, "--train-shards", asked) == 0
    assert hub.fetched() == ["manifest.json", cut.name]
    assert cut.read_bytes() == export[f"{FOLDER}/{cut.name}"]


def test_a_shard_that_the_revision_does_not_have_is_named(hub, tmp_path, capsys):
    run(tmp_path)
    folder = tmp_path / "datasets/fineweb10B_sp384"
    stray = (folder / "fineweb_train_000000.bin").rename(folder / "fineweb_train_000003.bin")
    capsys.readouterr()
    assert run(tmp_path) == 2
    assert f"{stray} is not of this revision" in error_line(capsys) and stray.exists()


def changed(content: bytes, start: int, new: bytes, end: int | None = None) -> bytes:
    """A content up to `end` in which these bytes stand from `start` on."""
    return (content[:start] + new + content[start + len(new) :])[:end]


# The last token is missing, the header is another's, the last token is another.
@pytest.mark.parametrize(
    "start, new, end", [(0, b"", -2), (0, bytes(8), None), (1024 + 2 * 899, b"\7\7", None)]
)
def test_a_file_that_comes_damaged_is_fetched_once_more(hub, export, tmp_path, start, new, end):
    # The answers to HEAD and GET.
    hub.served[SHARD] = [changed(export[SHARD], start, new, end)] * 2
    assert run(tmp_path) == 0
    assert hub.fetched().count("fineweb_val_000000.bin") == 2
    assert (tmp_path / SHARD.removeprefix("datasets/")).read_bytes() == export[SHARD]


@pytest.mark.parametrize(
    "tokens, end, reason",
    [(899, None, "899 tokens in its header"), (450, 1024 + 2 * 450, "but 900 are due")],
)
def test_a_shard_that_lies_on_the_hub_is_refused(
    hub, export, tmp_path, capsys, tokens, end, reason
):
    hub.files[SHARD] = changed(export[SHARD], 8, tokens.to_bytes(4, "little"), end)
    assert run(tmp_path) == 2
    line = error_line(capsys)
    assert "damaged twice" in line and reason in line
    assert not list(tmp_path.rglob("*.bin"))


def test_a_limited_rate_is_waited_for_as_long_as_the_hub_asks(hub, tmp_path, capsys):
    hub.faults = {
        "revision/main": [(503, {})],
        "train_000000": [(429, {"Retry-After": "7"})],
        "val_000000": [(429, {"RateLimit": '"api";r=0;t=11'})],
    }
    assert run(tmp_path) == 0
    assert hub.waits == [1, 11, 7]
    assert "limits the rate (HTTP 429): waiting 7 s" in capsys.readouterr().err


def test_a_rate_limited_for_ever_ends_in_one_line_and_what_is_whole_stays(hub, tmp_path, capsys):
    hub.faults = {"train_000001": [(429, {})] * 99}
    assert run(tmp_path) == 2
    assert "limits the rate (HTTP 429)" in error_line(capsys)
    assert 100 < sum(hub.waits) <= hub_module.PATIENCE
    assert names(tmp_path) == [name for name in WHOLE if "train_000001" not in name]


def test_a_wait_that_is_too_long_is_not_begun(hub, tmp_path, capsys):
    hub.faults = {"val_000000": [(429, {"Retry-After": "3600"})]}
    assert run(tmp_path) == 2
    assert "3600 s" in error_line(capsys) and hub.waits == []


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_download_goes_on_with_what_is_missing(hub, tmp_path, sent, status):
    asked = threading.Event()
    answer = threading.Event()

    def hold() -> None:
        asked.set()
        answer.wait()

    hub.before["train_000000"] = hold
    command = [sys.executable, ROOT / "data/download.py", *ARGUMENTS, "--out", tmp_path / "out"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not asked.wait(0.1):
        assert process.poll() is None
    process.send_signal(sent)
    said = process.communicate()[1]
    answer.set()
    assert process.returncode == status and "Traceback" not in said
    staging = tmp_path / "out/datasets/.download-sp384"
    assert staging.exists() == (sent == signal.SIGKILL)
    hub.before.clear()
    hub.requests.clear()
    assert run(tmp_path / "out") == 0
    assert hub.fetched() == [
        "manifest.json",
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
    ]
    assert names(tmp_path / "out") == WHOLE


def test_a_connection_that_breaks_off_is_taken_up_at_that_byte(hub, export, tmp_path, monkeypatch):
    path = f"{FOLDER}/fineweb_train_000000.bin"
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.torn[path] = 5000
    assert run(tmp_path) == 0
    asked = [part for method, place, part in hub.requests if path in place and method == "GET"]
    assert asked == [None, "bytes=5000-"]
    assert (tmp_path / path.removeprefix("datasets/")).read_bytes() == export[path]


def test_a_second_download_of_a_variant_waits_its_turn(hub, tmp_path, capsys):
    with download.staging_folder(tmp_path / "datasets/.download-sp384"):
        assert run(tmp_path) == 2
    assert "in use" in error_line(capsys)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["--variant", "sp999"],
            "--variant sp999 is not in owner/export, which has char, sp384; published are sp1024,",
        ),
        (
            ["--variant", "sp8192"],
            "which has char, sp384; kevclark/parameter-golf has it, so leave --repo out",
        ),
        (["--variant", "char"], "no SentencePiece model"),
        (["--variant", "../x"], "--variant a name such as sp1024"),
        (["--train-shards", "4"], "fineweb10B_sp384 has 3 training shards"),
        (["--train-shards", "-1"], "--train-shards must be 0 or more"),
        (["--repo", "other/name"], "no dataset repository other/name"),
        (["--repo", "a/b/c"], "--repo a/b/c: not the name of a repository"),
        (["--revision", "v9"], "no revision v9"),
    ],
)
def test_what_the_hub_does_not_have_is_said_in_one_line(hub, tmp_path, capsys, arguments, said):
    assert run(tmp_path, *arguments) == 2
    assert said in error_line(capsys) and hub.waits == []
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "manifest, said",
    [
        (b"<html>", "manifest.json is a web page"),
        (b"[]", "no JSON object"),
        (
            b'{"datasets": [7, {"name": "fineweb10B_sp384", "stats": null}]}',
            "does not say how many shards",
        ),
    ],
)
def test_a_manifest_that_says_nothing_is_refused(hub, tmp_path, capsys, manifest, said):
    hub.files["datasets/manifest.json"] = manifest
    assert run(tmp_path) == 2
    assert said in error_line(capsys)


def test_a_file_that_the_manifest_lists_and_the_hub_lacks_is_named(hub, tmp_path, capsys):
    del hub.files[f"{FOLDER}/fineweb_train_000001.bin"]
    assert run(tmp_path) == 2
    assert "has no datasets/datasets/fineweb10B_sp384/fineweb_train_000001.bin" in error_line(
        capsys
    )


def test_the_tokenizers_size_is_the_variants_where_the_manifest_states_none(hub, tmp_path):
    manifest = hub.files["datasets/manifest.json"]
    hub.files["datasets/manifest.json"] = manifest.replace(b'"vocab_size"', b'"size"')
    assert run(tmp_path) == 0
    assert noted(tmp_path, "fineweb10B_sp384")["vocabulary_size"] == 384


def test_a_tokenizer_of_another_size_is_refused_before_a_shard_comes(hub, tmp_path, capsys):
    manifest = hub.files["datasets/manifest.json"]
    hub.files["datasets/manifest.json"] = manifest.replace(
        b'"vocab_size": 384', b'"vocab_size": 1024'
    )
    assert run(tmp_path) == 2
    assert "has 384 pieces, but 1,024 are due" in error_line(capsys)
    assert not any(name.endswith(".bin") for name in hub.fetched())


# ---- Variants and repositories
@pytest.mark.parametrize(
    "given, variant, repository",
    [
        ("sp1024", "sp1024", "willdepueoai/parameter-golf"),
        ("fineweb10B_sp1024", "sp1024", "willdepueoai/parameter-golf"),
        ("byte260", "byte260", "willdepueoai/parameter-golf"),
        ("sp4096", "sp4096", "kevclark/parameter-golf"),
        ("sp8192", "sp8192", "kevclark/parameter-golf"),
        ("caseops", download.CASE_OPERATOR_EXPORT, "romeerp/parameter-golf-caseops-v1"),
        (
            "fineweb10B_sp8192_caseops",
            download.CASE_OPERATOR_EXPORT,
            "romeerp/parameter-golf-caseops-v1",
        ),
        (
            download.CASE_OPERATOR_EXPORT,
            download.CASE_OPERATOR_EXPORT,
            "romeerp/parameter-golf-caseops-v1",
        ),
        ("sp999", "sp999", "willdepueoai/parameter-golf"),
    ],
)
def test_a_variant_has_its_names_and_its_repository(given, variant, repository):
    options = download.parse(["--variant", given])
    assert (options.variant, options.repo) == (variant, repository)
    assert download.parse(["--variant", given, "--repo", "a/b"]).repo == "a/b"


def test_a_published_variant_is_asked_for_where_it_is_published(hub, tmp_path, capsys):
    hub.repository = "kevclark/parameter-golf"
    assert download.main(["--variant", "fineweb10B_sp8192", "--out", str(tmp_path)]) == 2
    # The stand-in has no shards of it.
    assert "sp8192 is not in kevclark/parameter-golf" in error_line(capsys)


def test_the_manifest_says_tokenizer_tokens_and_documents(hub, export, tmp_path):
    run(tmp_path)
    said = noted(tmp_path, "fineweb10B_sp384")
    model = export["datasets/tokenizers/fineweb_384_bpe.model"]
    assert said["tokenizer"] == {
        "file": "../../tokenizers/fineweb_384_bpe.model",
        "sha256": hashlib.sha256(model).hexdigest(),
        "kind": "sentencepiece",
        "case_operators": False,
    }
    assert said["val"] == {"tokens": 900, "documents": 1}
    # The third training shard is not here.
    assert said["train"] == {"tokens": 6000}
    run(tmp_path, "--train-shards", "3")
    assert noted(tmp_path, "fineweb10B_sp384")["train"] == {"tokens": 6700, "documents": 3}


def test_shards_of_bytes_have_no_tokenizer(hub, export, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = "datasets/datasets/fineweb10B_byte260"
    manifest = json.loads(export["datasets/manifest.json"])
    of_bytes = {
        "name": "fineweb10B_byte260",
        "tokenizer_name": "characters",
        "stats": {"files_train": 1, "files_val": 1},
    }
    manifest["datasets"].append(of_bytes)
    hub.files["datasets/manifest.json"] = json.dumps(manifest).encode()
    for split in ("train", "val"):
        path = f"{folder}/fineweb_{split}_000000.bin"
        hub.files[path] = export[f"{FOLDER}/fineweb_train_000000.bin"]
    assert run(tmp_path, "--variant", "byte260", "--train-shards", "1") == 0
    said = noted(tmp_path, "fineweb10B_byte260")
    assert said["tokenizer"] == {"kind": "bytes"} and said["vocabulary_size"] == 260
    assert not (tmp_path / "tokenizers").exists()
    command = capsys.readouterr().out.splitlines()[-1]
    assert "fineweb10B_byte260" in command and "TOKENIZER_PATH" not in command


@pytest.mark.parametrize("manifest", ["the challenge's", "another", "none"])
def test_case_operator_data_comes_with_its_byte_files(hub, case_export, tmp_path, capsys, manifest):
    hub.files = dict(case_export)
    if manifest == "another":
        hub.files["datasets/manifest.json"] = b'{"made": "by hand"}'
    if manifest == "none":
        del hub.files["datasets/manifest.json"]
    assert run_case(tmp_path) == 0
    for path, content in case_export.items():
        if "manifest" not in path:
            assert (tmp_path / path.removeprefix("datasets/")).read_bytes() == content
    said = noted(tmp_path, "fineweb10B_sp300_caseops")
    assert said["tokenizer"]["case_operators"] is True
    assert said["val"]["tokens"] == 1400 and said["train"]["tokens"] == 1000
    assert "fineweb_val_bytes_000001.bin" in said["files"]
    printed = capsys.readouterr().out
    assert "val 1,400 tokens (shards: 2)" in printed
    assert "bytes of the original text (files: 2)" in printed


def test_a_byte_file_that_is_damaged_is_fetched_again(hub, case_export, tmp_path):
    hub.files = dict(case_export)
    run_case(tmp_path)
    damaged = tmp_path / "datasets/fineweb10B_sp300_caseops/fineweb_val_bytes_000001.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"\7\7")
    hub.requests.clear()
    assert run_case(tmp_path) == 0
    assert hub.fetched() == ["manifest.json", damaged.name]


def test_a_byte_file_of_another_length_than_its_shard_is_refused(
    hub, case_export, tmp_path, capsys
):
    hub.files = dict(case_export)
    of_the_first = f"{CASE_FOLDER}/fineweb_val_bytes_000000.bin"
    of_the_second = f"{CASE_FOLDER}/fineweb_val_bytes_000001.bin"
    hub.files[of_the_second] = hub.files[of_the_first]
    assert run_case(tmp_path) == 2
    line = error_line(capsys)
    assert "fineweb_val_bytes_000001.bin has 3,024 bytes on the hub" in line
    assert "fineweb_val_000001.bin has 1,824" in line
    assert hub.fetched() == ["manifest.json"]


def test_byte_files_are_there_for_all_validation_shards_or_for_none(
    hub, case_export, tmp_path, capsys
):
    hub.files = dict(case_export)
    del hub.files["datasets/manifest.json"]
    del hub.files[f"{CASE_FOLDER}/fineweb_val_bytes_000000.bin"]
    assert run_case(tmp_path) == 2
    assert "has no datasets/datasets/fineweb10B_sp300_caseops/fineweb_val_bytes_000000" in (
        error_line(capsys)
    )
    del hub.files[f"{CASE_FOLDER}/fineweb_val_bytes_000001.bin"]
    assert run_case(tmp_path) == 0
    assert not list(tmp_path.rglob("*_val_bytes_*"))


def test_a_byte_file_that_the_revision_does_not_have_is_named(hub, tmp_path, capsys):
    run(tmp_path)
    folder = tmp_path / "datasets/fineweb10B_sp384"
    stray = folder / "fineweb_val_bytes_000000.bin"
    stray.write_bytes((folder / "fineweb_val_000000.bin").read_bytes())
    capsys.readouterr()
    assert run(tmp_path) == 2
    assert f"{stray} is not of this revision" in error_line(capsys)


@pytest.mark.parametrize("has_manifest", [True, False])
def test_the_export_that_holds_validation_documents_is_refused(
    hub, case_export, tmp_path, capsys, has_manifest
):
    hub.files = dict(case_export)
    manifest = case_export["datasets/manifest.json"]
    hub.files["datasets/manifest.json"] = manifest.replace(
        b'"files_train": 1,', b'"files_train": 1499,'
    )
    if not has_manifest:
        del hub.files["datasets/manifest.json"]
        hub.files[f"{CASE_FOLDER}/fineweb_train_001498.bin"] = b""
    assert run_case(tmp_path) == 2
    line = error_line(capsys)
    assert "40,000 validation documents" in line and "issue 2127" in line
    assert not list(tmp_path.rglob("*.bin"))


def test_a_repository_without_a_manifest_is_read_by_its_files(hub, tmp_path, capsys):
    del hub.files["datasets/manifest.json"]
    assert run(tmp_path, "--variant", "sp999") == 2
    assert "which has sp384; published are" in error_line(capsys)
    assert run(tmp_path) == 0
    assert names(tmp_path) == WHOLE


def test_a_repository_without_an_export_has_none(hub, tmp_path, capsys):
    hub.files = {"README.md": b"nothing"}
    assert run(tmp_path) == 2
    assert "sp384 is not in owner/export, which has none" in error_line(capsys)


def test_a_split_that_is_not_whole_yet_is_not_stated(hub, case_export, tmp_path, capsys):
    hub.files = dict(case_export)
    hub.faults = {"val_000001": [(429, {})] * 99}
    assert run_case(tmp_path) == 2
    said = noted(tmp_path, "fineweb10B_sp300_caseops")
    assert "fineweb_val_000000.bin" in said["files"] and "val" not in said
    # Training is told what to wait for.
    content = case_export[f"{CASE_FOLDER}/fineweb_val_bytes_000001.bin"]
    digest = hashlib.sha256(content).hexdigest()
    due = {"bytes": len(content), "sha256": digest}
    assert said["files"]["fineweb_val_bytes_000001.bin"] == due
    folder = tmp_path / "datasets/fineweb10B_sp300_caseops"
    message = "fineweb_val_000001.bin: is not here, but the manifest lists it"
    with pytest.raises(train_gpt.UserError, match=message):
        shards = train_gpt.find_shards(folder, "val")
        train_gpt.check_files(said, folder, [], shards)
    assert "manifest" in failed_checks(folder, capsys)


# ---- Whatever else goes wrong
def test_a_full_disk_is_said_before_anything_is_fetched(hub, tmp_path, capsys, monkeypatch):
    usage = download.shutil.disk_usage(tmp_path)._replace(free=download.SPARE_BYTES + 1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    assert run(tmp_path) == 2
    assert "make room" in error_line(capsys) and hub.fetched() == ["manifest.json"]


def test_a_page_in_the_place_of_an_answer_is_named(hub, tmp_path, capsys):
    hub.pages = True
    assert run(tmp_path) == 2
    line = error_line(capsys)
    assert f"{hub.url} answers with a web page where the hub has JSON and files" in line
    assert "captive portal" in line and hub.waits == []


# The network's login comes up before the commit is asked for, and before a file.
@pytest.mark.parametrize("place", ["revision/main", "train_000000"])
@pytest.mark.parametrize("status", [200, 511])
def test_a_captive_portal_is_named_at_once(hub, tmp_path, capsys, place, status):
    hub.faults = {place: [(status, {"Content-Type": "text/html; charset=utf-8"})] * 9}
    assert run(tmp_path) == 2
    line = error_line(capsys)
    assert f"{hub.url} answers with a web page" in line and "captive portal" in line
    assert hub.waits == [] and not list(tmp_path.rglob("*_train_*"))


def test_a_file_that_drips_ends_in_one_line(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hub_module, "PACE_SECONDS", 0)
    monkeypatch.setattr(hub_module, "LEAST_RATE", 1)
    # From this file on no answer is fast enough.
    hub.before["train_000000"] = lambda: setattr(hub_module, "LEAST_RATE", 10**15)
    assert run(tmp_path) == 2
    assert "the hub sends less than 1,000,000,000,000,000 bytes a second" in error_line(capsys)
    assert 100 < sum(hub.waits) <= hub_module.PATIENCE
    assert names(tmp_path) == [name for name in WHOLE if "train" not in name]


def test_a_drip_costs_the_patience_that_it_takes(hub, tmp_path, capsys, monkeypatch):
    client = hub_module.Hub(REPOSITORY, "main")
    attempts = []

    def drip() -> None:
        attempts.append(1)
        raise hub_module.Busy("drips", spent=30)

    with pytest.raises(hub_module.BadInput, match="drips; 211 s were waited"):
        client.ask(drip)
    assert len(attempts) == 6 and hub.waits == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("place", ["revision/main", "train_000000"])
def test_a_request_that_no_timeout_sees_ends_in_one_line(hub, tmp_path, capsys, monkeypatch, place):
    """As a server that sends a byte of its headers now and then."""
    monkeypatch.setattr(hub_module, "WATCH_SECONDS", 0.3)
    hold = threading.Event()
    hub.before[place] = hold.wait
    assert run(tmp_path) == 2
    hold.set()
    assert "the hub brings less than 10,000 bytes a second (" in error_line(capsys)
    assert hub.waits == [] and not list((tmp_path / "datasets").glob("fineweb*/*train*"))


def test_a_request_that_moves_has_until_its_deadline(monkeypatch):
    monkeypatch.setattr(hub_module, "WATCH_SECONDS", 0.01)
    # However busy the machine is.
    monkeypatch.setattr(hub_module, "LEAST_RATE", 0)
    bar = types.SimpleNamespace(n=0)
    ended = threading.Event()

    def move() -> str:
        while not ended.wait(0.001):
            bar.n += 10**6
        return "all"

    began = hub_module.time.monotonic()
    with pytest.raises(hub_module.BadInput, match="run the same command later"):
        hub_module.watched(move, bar, began + 0.3)
    assert 0.3 <= hub_module.time.monotonic() - began < 10
    threading.Timer(0.2, ended.set).start()
    assert hub_module.watched(move, bar, began + 600) == "all"


def test_a_file_has_the_time_that_the_least_rate_gives_its_size(hub, tmp_path, monkeypatch):
    deadlines = []

    def note(request: Callable, bar: tqdm, deadline: float) -> str:
        deadlines.append(deadline - hub_module.time.monotonic())
        return "path"

    client = hub_module.Hub(REPOSITORY, "main")
    monkeypatch.setattr(hub_module, "watched", note)
    for size in (0, 124_000_000):
        client.fetch(SHARD, tmp_path, tqdm(disable=True), size)
    assert 0 <= 300 - deadlines[0] < 60 and 0 <= 300 + 12_400 - deadlines[1] < 60


def test_the_bar_moves_long_before_a_file_is_here(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10 << 20)
    monkeypatch.setattr(hub_module, "BAR_BYTES", 1000)
    moves = []
    with tqdm(disable=True) as bar:
        bar.update = moves.append
        hub_module.Hub(REPOSITORY, "main").fetch(SHARD, tmp_path, bar)
    assert moves == [1000, 1000, 824]


def test_no_network_is_one_line_at_once(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert run(tmp_path) == 2
    assert "cannot reach the hub at http://127.0.0.1:9" in error_line(capsys) and hub.waits == []


def test_bytes_counted_for_xet_storage_move_the_bar_once(capsys):
    progress = pytest.importorskip("huggingface_hub.utils._xet_progress_reporting")
    report = types.SimpleNamespace(
        total_bytes=100,
        total_bytes_completed=60,
        total_bytes_completion_rate=1.0,
        total_transfer_bytes_completed=40,
        total_transfer_bytes_completion_rate=1.0,
    )
    with tqdm(total=100) as bar:
        with progress.XetDownloadProgressReporter(
            reconstruction_desc="x",
            total=100,
            log_level=30,
            tqdm_class=hub_module.report_to(bar),
        ) as reporter:
            reporter.update_progress(report)
        assert bar.n == 60


def test_the_bar_ends_at_the_sum_of_the_files_though_one_came_twice(hub, export, tmp_path, capsys):
    hub.served[SHARD] = [export[SHARD][:-2]] * 2
    assert run(tmp_path) == 0
    done, total = re.findall(r"([\d.]+k)/([\d.]+k)", capsys.readouterr().err)[-1]
    assert done == total
