"""Download the challenge's FineWeb export: token shards and their tokenizer, as train_gpt.py reads them.

    python data/download.py --variant sp1024 --train-shards 80

The export is the folder datasets/ of the Hugging Face dataset repository willdepueoai/parameter-golf, where a
manifest lists the variants. The validation split comes whole, of the training split come the first shards,
into data/datasets/fineweb10B_<variant>/ and data/tokenizers/. All files are of one commit of the repository.
Each is checked (size, SHA-256, header, tokens) before it takes its name, so after an interruption the same
command goes on with the first file that is missing; parts are not kept, as huggingface_hub 2.4.0 cannot go on
with them. Training shards beyond those asked for, where there are any, are checked and mended like the
others. manifest.json beside the shards notes the commit and the digests, for data/check.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any

from processes import run
from shards import (
    TRAINER,
    BadInput,
    command_to_train,
    count_tokens,
    digest,
    open_tokenizer,
    write_atomically,
)
from tqdm import tqdm

REPOSITORY = "willdepueoai/parameter-golf"
EXPORT = "datasets"  # the export's folder in the repository
PREFIX = "fineweb10B_"  # of a variant's name in the manifest
DEFAULT_VARIANT = "sp1024"  # what train_gpt.py uses if nothing is set
SPLITS = ("val", "train")
TIMEOUT = 30  # seconds without an answer
PATIENCE = 240  # seconds of waiting for the hub without a file in between
LONGEST_PAUSE = 60  # seconds between attempts, unless the hub asks for more
SPARE_BYTES = 100_000_000  # to be left free on the disk


class Busy(Exception):
    """The hub asks to come back later, after `wait` seconds if it says so."""

    def __init__(self, status: int, wait: int | None):
        super().__init__(
            f"the hub limits the rate (HTTP {status})"
            if status == 429
            else f"the hub has a passing fault (HTTP {status})"
        )
        self.wait = wait


class Damaged(BadInput):
    """A file that is not what the hub and its manifest say."""


@dataclass(frozen=True)
class Export:
    """What the hub's manifest says of one variant; None where it says nothing."""

    name: str  # fineweb10B_sp1024
    shards: dict[str, int]  # split -> number of shards
    tokens: dict[str, int | None]  # split -> number of tokens
    shard_size: int | None  # tokens of each shard but a split's last
    tokenizer: list[str]  # names of its files, the SentencePiece model first
    pieces: int | None

    def tokens_of(self, split: str, index: int) -> int | None:
        """The tokens that a shard must have, as far as the manifest says."""
        if self.shard_size is None or index < self.shards[split] - 1:
            return self.shard_size
        total = self.tokens[split]
        return None if total is None else total - index * self.shard_size


@dataclass(frozen=True)
class Target:
    """A file of the hub and where it goes. Bytes and SHA-256 are the hub's."""

    remote: str
    path: Path
    count: int | None = None  # of a shard's tokens, of a tokenizer's pieces, as far as it is known
    bytes: int = 0
    sha256: str | None = None


# ---- The manifest
def whole_number(value: object) -> int | None:
    """The value if it is a whole number of at least 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def entries(manifest: dict, key: str) -> dict[str, dict]:
    """The manifest's list under a key, by name, without what is no such entry."""
    found = manifest.get(key)
    dictionaries = (
        [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    )
    return {entry["name"]: entry for entry in dictionaries if isinstance(entry.get("name"), str)}


def read_export(path: Path, variant: str) -> Export:
    """A variant in the hub's manifest; BadInput, with the variants that there are, if it is not there."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        datasets, tokenizers = entries(manifest, "datasets"), entries(manifest, "tokenizers")
    except (ValueError, AttributeError) as error:
        raise BadInput(
            "the hub's manifest.json is no JSON object: check --repo and --revision"
        ) from error
    name = PREFIX + variant
    if name not in datasets:
        known = ", ".join(sorted(x.removeprefix(PREFIX) for x in datasets if x.startswith(PREFIX)))
        raise BadInput(
            f"--variant {variant} is not in the hub's manifest, which lists {known or 'none'}"
        )
    dataset, stats = datasets[name], datasets[name].get("stats")
    stats = stats if isinstance(stats, dict) else {}
    shards = {split: whole_number(stats.get(f"files_{split}")) for split in SPLITS}
    if None in shards.values() or not shards["val"]:
        raise BadInput(f"the hub's manifest does not say how many shards {name} has: check --repo")
    tokenizer = tokenizers.get(str(dataset.get("tokenizer_name")), {})
    paths = map(tokenizer.get, ("model_path", "vocab_path"))
    files = [PurePosixPath(path).name for path in paths if isinstance(path, str)]
    if not files or not files[0].endswith(".model"):
        raise BadInput(
            f"--variant {variant} has no SentencePiece model, which train_gpt.py needs: "
            "take another variant"
        )
    number = re.fullmatch(r"sp(\d+)", variant)
    return Export(
        name,
        shards,
        {split: whole_number(stats.get(f"tokens_{split}")) for split in SPLITS},
        whole_number(manifest.get("shard_size")),
        files,
        whole_number(dataset.get("vocab_size")) or (int(number[1]) if number else None),
    )


# ---- The hub
def seconds_asked(headers) -> int | None:
    """How long a response asks to wait: Retry-After in seconds or as a date, or the hub's own RateLimit."""
    from huggingface_hub.utils import parse_ratelimit_headers

    text, limit = headers.get("Retry-After", "").strip(), parse_ratelimit_headers(headers)
    if text.isdigit():
        return int(text)
    try:
        return max(0, round(parsedate_to_datetime(text).timestamp() - time.time()))
    except (ValueError, TypeError):  # there is no such header, or it is neither
        return limit.reset_in_seconds if limit and not limit.remaining else None


def raise_if_busy(response) -> None:
    """Ends a request before huggingface_hub starts waits of its own, which have no upper limit."""
    if response.status_code in (408, 429) or response.status_code >= 500:
        raise Busy(response.status_code, seconds_asked(response.headers))


def report_to(bar: tqdm) -> type:
    """A class that huggingface_hub takes for a file's progress bar; it moves `bar`, the one of all files."""

    class FileProgress:
        def __init__(self, *_: object, **__: object):
            pass

        def __enter__(self) -> FileProgress:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int = 1) -> None:
            bar.update(count)

        def update_transfer(self, *_: object, **__: object) -> None:
            """Bytes on the network, which Xet storage counts beside those of the file; shown nowhere."""

        set_postfix_str = set_transfer_postfix_str = update_transfer

    return FileProgress


class Hub:
    """One dataset repository at one commit. The token is the one huggingface_hub finds."""

    def __init__(self, repository: str, revision: str):
        from huggingface_hub import HfApi, logging

        logging.set_verbosity_error()  # its warnings; what matters is said here
        self.api = HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None)
        self.repository, self.revision, self.waited = repository, revision, 0
        info = self.ask(
            lambda: self.api.dataset_info(repository, revision=revision, timeout=TIMEOUT)
        )
        self.commit = info.sha

    def ask(self, request: Callable[[], Any]) -> Any:
        """The request's result. Waits and asks again while the hub is busy, for PATIENCE seconds without a
        file in between; BadInput in one line for all else that goes wrong."""
        import httpx2  # huggingface_hub's own client
        from huggingface_hub import get_session

        pause = 1
        while True:
            session = get_session()
            session.timeout = TIMEOUT
            if raise_if_busy not in session.event_hooks["response"]:
                session.event_hooks["response"].append(raise_if_busy)
            try:
                return request()
            except Busy as error:
                reason, asked = str(error), error.wait or 0
            except httpx2.TimeoutException:
                reason, asked = f"the hub did not answer in {TIMEOUT} s", 0
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
        tqdm.write(f"{reason}: waiting {seconds} s", file=sys.stderr)
        time.sleep(seconds)
        self.waited += seconds

    def explain(self, error: Exception) -> BadInput:
        """What a failed request means, in one line."""
        from huggingface_hub import errors

        wrapper = isinstance(error, (errors.LocalEntryNotFoundError, ValueError))
        if wrapper and isinstance(error.__cause__, Exception):
            error = error.__cause__  # what is behind "cannot find the file in the cache"
        reason = " ".join(str(error).split()) or type(error).__name__
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
            f"cannot reach the hub at {self.api.endpoint} ({reason}): check the connection "
            "and run the same command again; what is whole is kept"
        )

    def describe(self, targets: list[Target]) -> list[Target]:
        """The targets with their bytes and SHA-256; BadInput if the repository has not all of them."""
        paths = [target.remote for target in targets]
        found = self.ask(
            lambda: self.api.get_paths_info(
                self.repository, paths, repo_type="dataset", revision=self.commit
            )
        )
        files = {file.path: file for file in found if hasattr(file, "size")}  # others are folders
        missing = [path for path in paths if path not in files]
        if missing:
            raise BadInput(
                f"{self.repository} has no {missing[0]}, which its manifest lists "
                f"({len(missing)} files are missing): check --repo and --revision"
            )
        return [
            replace(target, bytes=file.size, sha256=file.lfs.sha256 if file.lfs else None)
            for target in targets
            for file in (files[target.remote],)
        ]

    def fetch(self, remote: str, staging: Path, bar: tqdm, again: bool = False) -> Path:
        """Download a file below the folder `staging`; `again`: though huggingface_hub has it. `bar` moves on
        by its bytes."""
        path = self.ask(
            lambda: self.api.hf_hub_download(
                self.repository,
                remote,
                repo_type="dataset",
                revision=self.commit,
                local_dir=staging,
                force_download=again,
                tqdm_class=report_to(bar),
            )
        )
        self.waited = 0
        return Path(path)


# ---- Files here
def count_pieces(path: Path) -> int:
    """The pieces of a tokenizer; BadInput if the file is none."""
    return open_tokenizer(path).vocab_size()


COUNTED = {".bin": (count_tokens, "tokens"), ".model": (count_pieces, "pieces")}


def verify(target: Target, path: Path, report: Callable[[int], object] = lambda size: None) -> str:
    """The SHA-256 of a file, whose bytes `report` is told of; Damaged if it is not what the target says."""
    size = path.stat().st_size
    if size != target.bytes:
        raise Damaged(f"{path.name} has {size:,} bytes, but the hub says {target.bytes:,}")
    if path.suffix in COUNTED:
        count, unit = COUNTED[path.suffix]
        try:
            there = count(path)
        except BadInput as error:
            raise Damaged(str(error)) from error
        if target.count not in (None, there):
            raise Damaged(f"{path.name} has {there:,} {unit}, but {target.count:,} are due")
    found = digest(path, report)
    if target.sha256 not in (None, found):
        raise Damaged(f"{path.name} has another SHA-256 than the hub says")
    return found


def digests_here(targets: list[Target]) -> dict[Target, str]:
    """The SHA-256 of each file that is here already as the hub has it. All bytes are read: damage that leaves
    the size as it was shows in no other way."""
    here, found = [target for target in targets if target.path.is_file()], {}
    total = sum(target.path.stat().st_size for target in here)
    with tqdm(
        desc="checking", total=total, unit="B", unit_scale=True, disable=not here, leave=False
    ) as bar:
        for target in here:
            with suppress(Damaged):
                found[target] = verify(target, target.path, bar.update)
    return found


def bring(hub: Hub, target: Target, staging: Path, bar: tqdm) -> str:
    """Download a file, verify it and give it its name; once more if it is damaged. Returns its SHA-256."""
    for again in (False, True):
        done = bar.n
        staged = staging / target.remote
        try:
            found = verify(target, hub.fetch(target.remote, staging, bar, again))
            break
        except Damaged as error:
            staged.unlink(missing_ok=True)
            bar.n = done
            if again:
                raise BadInput(
                    f"{target.remote} came damaged twice ({error}): tell those who keep the "
                    "repository, or take another --revision"
                ) from error
            tqdm.write(f"{error}: fetching it once more", file=sys.stderr)
    os.replace(staged, target.path)
    bar.n = done + target.bytes  # whatever attempts that failed have added
    return found


class Notes:
    """manifest.json beside the shards: of which commit they are, and their digests."""

    def __init__(self, folder: Path, facts: dict[str, object]):
        self.path, self.facts, self.files = folder / "manifest.json", facts, {}

    def add(self, path: Path, sha256: str) -> None:
        """Note the digest of a file that is here; of the tokenizer's model, where it is too."""
        if path.parent == self.path.parent:
            self.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256}
        elif path.suffix == ".model":
            place = Path(os.path.relpath(path, self.path.parent)).as_posix()
            self.facts["tokenizer"] = {"file": place, "sha256": sha256}

    def write(self) -> None:
        """Write the file: all of it or nothing."""
        text = json.dumps(
            {"format": 1, **self.facts, "files": self.files}, indent=2, sort_keys=True
        )
        write_atomically(self.path, f"{text}\n".encode())


@contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """An empty folder for files that are not whole yet, gone afterwards; one command at a time has it."""
    from filelock import FileLock, Timeout  # huggingface_hub's own

    path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path / "lock", timeout=0):
            for left in path.iterdir():  # by a run that was killed
                if left.is_dir():
                    shutil.rmtree(left)
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
    except Timeout as error:
        raise BadInput(
            f"{path} is in use: another download of this variant goes on, wait for it"
        ) from error


# ---- The command
def list_targets(export: Export, out: Path, train_shards: int) -> list[Target]:
    """The tokenizer, the whole validation split, the first training shards and those that are here beyond
    them. BadInput if there are fewer."""
    there = export.shards["train"]
    if train_shards > there:
        raise BadInput(f"--train-shards {train_shards}: {export.name} has {there} training shards")
    targets = [
        Target(f"{EXPORT}/tokenizers/{name}", out / "tokenizers" / name, export.pieces)
        for name in export.tokenizer
    ]
    wanted = {"val": export.shards["val"], "train": train_shards}
    for split, total in export.shards.items():
        for index in range(total):
            name = f"datasets/{export.name}/fineweb_{split}_{index:06d}.bin"
            if index < wanted[split] or (out / name).exists():
                targets.append(
                    Target(f"{EXPORT}/{name}", out / name, export.tokens_of(split, index))
                )
    folder = out / "datasets" / export.name
    shards = {path for split in SPLITS for path in folder.glob(f"*_{split}_*.bin")}
    if foreign := shards - {target.path for target in targets}:
        raise BadInput(
            f"{min(foreign)} is not of this revision, but training would use it: move it"
        )
    return targets


def require_space(missing: list[Target], out: Path) -> None:
    """BadInput if the disk has no room for the files."""
    needed, free = sum(target.bytes for target in missing), shutil.disk_usage(out).free
    if needed + SPARE_BYTES > free:
        raise BadInput(
            f"{needed / 1e9:.1f} GB are to come, but {out} has {free / 1e9:.1f} GB free: make "
            "room, ask for fewer --train-shards or give another --out"
        )


def bring_all(hub: Hub, missing: list[Target], staging: Path, notes: Notes) -> None:
    """Download what is missing, with one progress bar over all bytes."""
    total = sum(target.bytes for target in missing)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not missing) as bar:
        for count, target in enumerate(missing, 1):
            bar.set_description(f"file {count} of {len(missing)}")
            notes.add(target.path, bring(hub, target, staging, bar))
            notes.write()


def download(hub: Hub, variant: str, train_shards: int, out: Path) -> None:
    """Bring a variant's files below the folder `out`. Raises BadInput or OSError; what is whole is kept."""
    with staging_folder(out / "datasets" / f".download-{variant}") as staging:
        manifest = hub.fetch(f"{EXPORT}/manifest.json", staging, tqdm(disable=True))
        export = read_export(manifest, variant)
        folder = out / "datasets" / export.name
        targets = hub.describe(list_targets(export, out, train_shards))
        for target in targets:
            target.path.parent.mkdir(parents=True, exist_ok=True)
        notes = Notes(
            folder,
            {
                "name": export.name,
                "repository": hub.repository,
                "revision": hub.commit,
                "vocabulary_size": export.pieces,
            },
        )
        here = digests_here(targets)
        missing = [target for target in targets if target not in here]
        to_come = sum(target.bytes for target in missing) / 1e9
        print(
            f"{export.name} of {hub.repository} at {hub.commit[:12]}: {len(targets) - len(missing)} of "
            f"{len(targets)} files are here, {to_come:.2f} GB to come"
        )
        require_space(missing, out)
        for target, sha256 in here.items():
            notes.add(target.path, sha256)
        notes.write()
        bring_all(hub, missing, staging, notes)
    summarize(folder, targets[0].path, train_shards)


def summarize(folder: Path, tokenizer: Path, asked: int) -> None:
    """Say what the folder holds, and what to run next."""
    pieces = count_pieces(tokenizer)
    shards = {split: sorted(folder.glob(f"*_{split}_*.bin")) for split in SPLITS}
    held = ", ".join(
        f"{split} {sum(map(count_tokens, paths)):,} tokens (shards: {len(paths)})"
        for split, paths in shards.items()
    )
    print(f"{folder}: {held}; {tokenizer}: {pieces:,} pieces")
    if (more := len(shards["train"]) - asked) > 0:
        print(
            f"note: {more} training shards more than asked for are here, and training uses all of them"
        )
    command = command_to_train(
        folder, tokenizer, pieces, "torchrun --standalone --nproc_per_node=8"
    )
    print(
        f"next: {command}"
        if shards["train"]
        else f"there are no training shards; next, to score a model: ARTIFACT=final_model.int6.ptz {command}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--variant", default=DEFAULT_VARIANT, help="tokenizer of the shards [%(default)s]"
    )
    parser.add_argument(
        "--train-shards",
        type=int,
        default=80,
        metavar="N",
        help="the first N training shards, 0 for none [%(default)s]",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=TRAINER.parent / "data",
        metavar="FOLDER",
        help="where datasets/ and tokenizers/ are [data/ of the repository]",
    )
    parser.add_argument("--repo", default=REPOSITORY, help="dataset repository [%(default)s]")
    parser.add_argument("--revision", default="main", help="branch, tag or commit [%(default)s]")
    options = parser.parse_args(arguments)

    def command() -> None:
        if options.train_shards < 0 or not re.fullmatch(r"\w+", options.variant):
            raise BadInput("--train-shards must be 0 or more, and --variant a name such as sp1024")
        download(
            Hub(options.repo, options.revision), options.variant, options.train_shards, options.out
        )

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
