"""The Hugging Face hub, as data/download.py asks it: with waits that end and errors in one line."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

# httpx2 is huggingface_hub's own client.
import httpx2
from huggingface_hub import DatasetInfo, HfApi, constants, errors, get_session
from huggingface_hub import logging as hub_logging
from huggingface_hub.utils import parse_ratelimit_headers
from tqdm import tqdm

from commands import BadInput, say

# Seconds without an answer.
TIMEOUT = 30
# Bytes a second that an answer must bring at least, over so many seconds; then it is asked again.
LEAST_RATE = 10_000
PACE_SECONDS = 30
# The same for a whole request, with its headers and whatever libraries do for it; then it is over.
WATCH_SECONDS = 60
# Seconds that a file may take, all attempts together, beside those that LEAST_RATE gives its size.
GRACE = 300
# Bytes after which the progress bar moves, where huggingface_hub itself would take 10 MB.
BAR_BYTES = 1 << 16
# Seconds of waiting for the hub without a file in between.
PATIENCE = 240
# Seconds between attempts, unless the hub asks for more.
LONGEST_PAUSE = 60


class Busy(Exception):
    """The hub has no time now; come back later, after `wait` seconds if it says so.

    `spent` are the seconds that it has cost already.
    """

    def __init__(self, reason: str, wait: int | None = None, spent: int = 0):
        super().__init__(f"the hub {reason}")
        self.wait = wait
        self.spent = spent


class Damaged(BadInput):
    """A file is not what the hub and its manifest say."""


@dataclass(frozen=True)
class Target:
    """A file of the hub and where it goes; bytes and SHA-256 are the hub's.

    `count` is the number of a shard's tokens or of a tokenizer's pieces, as far as it is known.
    """

    remote: str
    path: Path
    count: int | None = None
    bytes: int = 0
    sha256: str | None = None


# ---- What is not the hub
def kind_of(text: str) -> str:
    """Say what stands where JSON should: a page of a web site, or something else."""
    if text.lstrip().startswith("<"):
        return "a web page"
    return "something else"


def not_the_hub(place: str, kind: str) -> BadInput:
    """Return what it means that something else than the hub answers."""
    return BadInput(
        f"{place} answers with {kind} where the hub has JSON and files: a captive portal (log in "
        "to the network with a browser) or a proxy stands in between, or HF_ENDPOINT names another "
        "server"
    )


def refuse_page(response: httpx2.Response) -> None:
    """Raise BadInput for a page of a web site: the hub answers these requests with none."""
    kind = response.headers.get("Content-Type", "").lower()
    is_page = response.is_success and kind.startswith("text/html")
    # 511 is for captive portals.
    if is_page or response.status_code == 511:
        url = response.url
        raise not_the_hub(f"{url.scheme}://{url.netloc.decode()}", "a web page")


# ---- The rate's limits
def seconds_asked(headers: Mapping[str, str]) -> int | None:
    """Return how long a response asks to wait; None if it does not ask.

    It says so by Retry-After, in seconds or as a date, or by the hub's own RateLimit.
    """
    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return int(text)
    try:
        moment = parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError):
        # There is no such header, or it is neither.
        limit = parse_ratelimit_headers(headers)
        if limit and not limit.remaining:
            return limit.reset_in_seconds
        return None
    return max(0, round(moment - time.time()))


def raise_if_busy(response: httpx2.Response) -> None:
    """End a request before huggingface_hub starts waits of its own, which have no upper limit."""
    status = response.status_code
    if status in (408, 429) or status >= 500:
        reason = "limits the rate" if status == 429 else "has a passing fault"
        raise Busy(f"{reason} (HTTP {status})", seconds_asked(response.headers))


class Paced(httpx2.SyncByteStream):
    """The bytes of an answer; Busy if too few come, which no timeout sees while any come."""

    def __init__(self, stream: httpx2.SyncByteStream):
        self.stream = stream

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        began = time.monotonic()
        for part in self.stream:
            yield part
            size += len(part)
            seconds = time.monotonic() - began
            if seconds < PACE_SECONDS:
                continue
            if size < LEAST_RATE * seconds:
                raise Busy(f"sends less than {LEAST_RATE:,} bytes a second", spent=PACE_SECONDS)
            size = 0
            began = time.monotonic()

    def close(self) -> None:
        """End the answer."""
        self.stream.close()


def pace(response: httpx2.Response) -> None:
    """Let an answer end that comes too slowly."""
    response.stream = Paced(response.stream)


# ---- Requests that end
def in_background(request: Callable[[], Any]) -> Future:
    """Return what the request will return or raise, from a thread for which no exit waits."""
    future = Future()

    def work() -> None:
        try:
            future.set_result(request())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, name="request", daemon=True).start()
    return future


def watched(request: Callable[[], Any], bar: tqdm | None, deadline: float) -> Any:
    """Return the request's result; BadInput if it comes too slowly, or after the deadline.

    The bar says how many bytes have come; without one, the result is to come in WATCH_SECONDS. No
    timeout of a client sees a server that now and then sends a byte of its headers. The request
    itself cannot be stopped: it goes on in its thread until this process ends.
    """
    future = in_background(request)
    while True:
        before = 0 if bar is None else bar.n
        began = time.monotonic()
        try:
            return future.result(timeout=max(0.0, min(WATCH_SECONDS, deadline - began)))
        except TimeoutError:
            # It may be the request's own, or have come with the result.
            if future.done():
                return future.result()
        now = time.monotonic()
        come = 0 if bar is None else bar.n - before
        if now >= deadline or come < LEAST_RATE * (now - began):
            raise BadInput(
                f"the hub brings less than {LEAST_RATE:,} bytes a second ({come:,} in the last "
                f"{now - began:.0f} s): run the same command later or from another network; what "
                "is whole is kept"
            )


# ---- Progress
def report_to(bar: tqdm) -> type:
    """Return a class that huggingface_hub takes for a file's bar; it moves the bar of all files."""

    class FileProgress:
        """What huggingface_hub calls of a progress bar."""

        def __init__(self, *_: object, **__: object):
            pass

        def __enter__(self) -> FileProgress:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int = 1) -> None:
            """Move on by the bytes of the file."""
            bar.update(count)

        def update_transfer(self, *_: object, **__: object) -> None:
            """Ignore the bytes on the network, which Xet storage counts beside the file's."""

        set_postfix_str = update_transfer
        set_transfer_postfix_str = update_transfer

    return FileProgress


# ---- The hub
class Hub:
    """One dataset repository at one commit. The token is the one huggingface_hub finds."""

    def __init__(self, repository: str, revision: str):
        # What its warnings say of importance is said here.
        hub_logging.set_verbosity_error()
        constants.DOWNLOAD_CHUNK_SIZE = min(BAR_BYTES, constants.DOWNLOAD_CHUNK_SIZE)
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
        self.api = HfApi(endpoint=endpoint or None)
        self.repository = repository
        self.revision = revision
        # Seconds since the last file.
        self.waited = 0
        info = self.ask(self.find_revision)
        self.commit = info.sha
        # The paths of all files.
        self.files = {entry.rfilename for entry in info.siblings or ()}

    def find_revision(self) -> DatasetInfo:
        """Return the commit of the revision, and what is in it."""
        return self.api.dataset_info(self.repository, revision=self.revision, timeout=TIMEOUT)

    def ask(self, request: Callable[[], Any], bar: tqdm | None = None, size: int = 0) -> Any:
        """Return the request's result, which has `size` bytes that move the bar.

        While the hub is busy it is asked again, after at most PATIENCE seconds of waiting without
        a file in between. BadInput in one line for all else that goes wrong.
        """
        deadline = time.monotonic() + GRACE + size / LEAST_RATE
        pause = 1
        while True:
            prepare_session()
            try:
                return watched(request, bar, deadline)
            except Busy as error:
                reason = str(error)
                asked = error.wait or 0
                self.waited += error.spent
            except httpx2.TimeoutException:
                reason = f"the hub did not answer in {TIMEOUT} s"
                asked = 0
                self.waited += TIMEOUT
            except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
                raise self.explain(error) from error
            self.wait(reason, max(pause, asked))
            pause = min(2 * pause, LONGEST_PAUSE)

    def wait(self, reason: str, seconds: int) -> None:
        """Wait, saying so; BadInput if that is more than what PATIENCE leaves."""
        if self.waited + seconds > PATIENCE:
            raise BadInput(
                f"{reason}; {self.waited} s were waited, the next attempt is due in {seconds} s: "
                "run the same command later, it goes on from here"
            )
        say(f"{reason}: waiting {seconds} s")
        time.sleep(seconds)
        self.waited += seconds

    def explain(self, error: Exception) -> BadInput:
        """Return what a failed request means, in one line."""
        wrapper = isinstance(error, (errors.LocalEntryNotFoundError, ValueError))
        if wrapper and isinstance(error.__cause__, Exception):
            # It says "cannot find the file in the cache", and behind that is the reason.
            error = error.__cause__
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, json.JSONDecodeError):
            return not_the_hub(self.api.endpoint, kind_of(error.doc))
        if isinstance(error, errors.OfflineModeIsEnabled):
            return BadInput("HF_HUB_OFFLINE is set: unset it to download")
        if isinstance(error, errors.RevisionNotFoundError):
            return BadInput(f"{self.repository} has no revision {self.revision}: check --revision")
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return BadInput(
                f"{self.repository} holds no export, or not all of one ({reason}): check --repo"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return BadInput(
                f"the hub shows no dataset repository {self.repository}: check --repo, or if it "
                "is private or gated, run `hf auth login`"
            )
        if isinstance(error, errors.HFValidationError):
            return BadInput(
                f"--repo {self.repository}: not the name of a repository, which is owner/name"
            )
        if isinstance(error, errors.HfHubHTTPError):
            return BadInput(
                f"the hub refuses (HTTP {error.response.status_code}): check --repo, or run "
                "`hf auth login` with an account that may read it"
            )
        if isinstance(error, OSError) and error.errno:
            return BadInput(f"{error.filename or 'the disk'}: {error.strerror}")
        if isinstance(error, OSError) and "Consistency check" in reason:
            return Damaged(reason)
        return BadInput(
            f"cannot reach the hub at {self.api.endpoint} ({reason}): check the connection and "
            "run the same command again; what is whole is kept"
        )

    def describe(self, targets: list[Target]) -> list[Target]:
        """Return the targets with their bytes and SHA-256; BadInput if the hub lacks one."""
        paths = [target.remote for target in targets]

        def request() -> list:
            return self.api.get_paths_info(
                self.repository, paths, repo_type="dataset", revision=self.commit
            )

        # Folders have no size.
        files = {entry.path: entry for entry in self.ask(request) if hasattr(entry, "size")}
        missing = [path for path in paths if path not in files]
        if missing:
            raise BadInput(
                f"{self.repository} has no {missing[0]}, which belongs to the export "
                f"({len(missing)} files are missing): check --repo and --revision"
            )
        described = []
        for target in targets:
            file = files[target.remote]
            sha256 = file.lfs.sha256 if file.lfs else None
            described.append(replace(target, bytes=file.size, sha256=sha256))
        return described

    def fetch(
        self, remote: str, staging: Path, bar: tqdm, size: int = 0, again: bool = False
    ) -> Path:
        """Download a file of `size` bytes below the folder `staging`; the bar moves on by them.

        `again`: though huggingface_hub has it already.
        """
        before = bar.n

        def request() -> str:
            # Each attempt begins anew.
            bar.n = before
            return self.api.hf_hub_download(
                self.repository,
                remote,
                repo_type="dataset",
                revision=self.commit,
                local_dir=staging,
                force_download=again,
                tqdm_class=report_to(bar),
            )

        path = self.ask(request, bar, size)
        self.waited = 0
        return Path(path)


def prepare_session() -> None:
    """Make huggingface_hub's session, which may be a new one, end with Busy and TIMEOUT."""
    session = get_session()
    session.timeout = TIMEOUT
    hooks = session.event_hooks["response"]
    if raise_if_busy not in hooks:
        hooks.extend([refuse_page, raise_if_busy, pace])
