"""The Hugging Face hub, as data/download.py asks it: with waits that end and errors in one line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

# httpx2 is huggingface_hub's own client.
import httpx2
from huggingface_hub import DatasetInfo, HfApi, errors, get_session
from huggingface_hub import logging as hub_logging
from huggingface_hub.utils import parse_ratelimit_headers
from tqdm import tqdm

from commands import BadInput, say

# Seconds without an answer.
TIMEOUT = 30
# Bytes a second that an answer must bring at least, over so many seconds.
LEAST_RATE = 1000
PACE_SECONDS = 30
# Seconds of waiting for the hub without a file in between.
PATIENCE = 240
# Seconds between attempts, unless the hub asks for more.
LONGEST_PAUSE = 60


class Busy(Exception):
    """The hub has no time now; come back later, after `wait` seconds if it says so."""

    def __init__(self, reason: str, wait: int | None = None):
        super().__init__(f"the hub {reason}")
        self.wait = wait


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


def kind_of(text: str) -> str:
    """Say what stands where JSON should: a page of a web site, or something else."""
    if text.lstrip().startswith("<"):
        return "a web page"
    return "something else"


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
                raise Busy(f"sends less than {LEAST_RATE:,} bytes a second")
            size = 0
            began = time.monotonic()

    def close(self) -> None:
        """End the answer."""
        self.stream.close()


def pace(response: httpx2.Response) -> None:
    """Let an answer end that comes too slowly."""
    response.stream = Paced(response.stream)


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

    def ask(self, request: Callable[[], Any]) -> Any:
        """Return the request's result.

        While the hub is busy it is asked again, after at most PATIENCE seconds of waiting without
        a file in between. BadInput in one line for all else that goes wrong.
        """
        pause = 1
        while True:
            prepare_session()
            try:
                return request()
            except Busy as error:
                reason = str(error)
                asked = error.wait or 0
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
            return BadInput(
                f"{self.api.endpoint} answers with {kind_of(error.doc)} where the hub has JSON: a "
                "login or a proxy stands in between, or HF_ENDPOINT names another server"
            )
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

    def fetch(self, remote: str, staging: Path, bar: tqdm, again: bool = False) -> Path:
        """Download a file below the folder `staging`; the bar moves on by its bytes.

        `again`: though huggingface_hub has it already.
        """

        def request() -> str:
            return self.api.hf_hub_download(
                self.repository,
                remote,
                repo_type="dataset",
                revision=self.commit,
                local_dir=staging,
                force_download=again,
                tqdm_class=report_to(bar),
            )

        path = self.ask(request)
        self.waited = 0
        return Path(path)


def prepare_session() -> None:
    """Make huggingface_hub's session, which may be a new one, end with Busy and TIMEOUT."""
    session = get_session()
    session.timeout = TIMEOUT
    hooks = session.event_hooks["response"]
    if raise_if_busy not in hooks:
        hooks.extend([raise_if_busy, pace])
