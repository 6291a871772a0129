"""data/download.py against a local stand-in of the hub, so that huggingface_hub's own code runs."""

from __future__ import annotations

import hashlib
import http.server
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
from tqdm import tqdm

import check
import download
import hub as hub_module
from conftest import ROOT, VOCAB_SIZE, write_shard

REPOSITORY = "owner/export"
COMMIT = "a" * 40
FOLDER = "datasets/datasets/fineweb10B_sp384"
SHARD = f"{FOLDER}/fineweb_val_000000.bin"
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
        file = re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/{COMMIT}/(.*)", self.path)
        if self.path.startswith(f"/api/datasets/{REPOSITORY}/paths-info/{COMMIT}"):
            self.send(200, json.dumps(self.paths_info(body)).encode())
        elif self.path.startswith(f"/api/datasets/{REPOSITORY}/revision/main"):
            self.send(200, json.dumps({"id": REPOSITORY, "sha": COMMIT}).encode())
        elif file and file[1] in server.files:
            self.send_file(file[1])
        elif file:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        elif f"/{REPOSITORY}/" in self.path:
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
    of_bytes = {"name": "fineweb10B_byte260", "tokenizer_name": "pure_byte", "stats": stats}
    manifest = {
        "shard_size": 3000,
        "tokenizers": [tokenizer, {"name": "pure_byte", "path": "tokenizers/x.json"}],
        "datasets": [dataset, of_bytes],
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


def run(out: Path, *more: str) -> int:
    return download.main([*ARGUMENTS, "--out", str(out), *more])


def error_line(capsys: pytest.CaptureFixture) -> str:
    """The last line on standard error, which must be the only error there and no traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error:") for line in lines) == 1 and lines[-1].startswith("error:")
    return lines[-1]


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.rglob("*") if path.is_file())


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
    assert check.main([str(tmp_path / "out/datasets/fineweb10B_sp384")]) == 0
    assert "val 900 tokens (shards: 1), train 6,000 tokens (shards: 2)" in said
    assert said.endswith(" VOCAB_SIZE=384 torchrun --standalone --nproc_per_node=8 train_gpt.py\n")


def test_a_second_run_reads_all_and_fetches_no_file(hub, tmp_path, capsys):
    run(tmp_path)
    hub.requests.clear()
    capsys.readouterr()
    assert run(tmp_path) == 0
    assert hub.fetched() == ["manifest.json"]
    assert "checking" in capsys.readouterr().err


def test_more_shards_later_fetch_just_those(hub, tmp_path):
    run(tmp_path, "--train-shards", "0")
    assert check.main([str(tmp_path / "datasets/fineweb10B_sp384")]) == 0
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
            "--variant sp999 is not in the hub's manifest, which lists byte260, sp384",
        ),
        (["--variant", "byte260"], "no SentencePiece model"),
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
        (b"<html>", "no JSON object"),
        (b"[]", "no JSON object"),
        (b"{}", "which lists none"),
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
    noted = json.loads((tmp_path / "datasets/fineweb10B_sp384/manifest.json").read_text())
    assert noted["vocabulary_size"] == 384


def test_a_tokenizer_of_another_size_is_refused_before_a_shard_comes(hub, tmp_path, capsys):
    manifest = hub.files["datasets/manifest.json"]
    hub.files["datasets/manifest.json"] = manifest.replace(
        b'"vocab_size": 384', b'"vocab_size": 1024'
    )
    assert run(tmp_path) == 2
    assert "has 384 pieces, but 1,024 are due" in error_line(capsys)
    assert not any(name.endswith(".bin") for name in hub.fetched())


def test_a_full_disk_is_said_before_anything_is_fetched(hub, tmp_path, capsys, monkeypatch):
    usage = download.shutil.disk_usage(tmp_path)._replace(free=download.SPARE_BYTES + 1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    assert run(tmp_path) == 2
    assert "make room" in error_line(capsys) and hub.fetched() == ["manifest.json"]


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
