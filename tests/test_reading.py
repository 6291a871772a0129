"""Reading ahead: the order in windows, one read a chunk, bounded memory, a slow or failing disk."""

from __future__ import annotations

import errno
import signal
import struct
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

import train_gpt
from conftest import write_shard
from train_gpt import Clock, TrainingRows, UserError
from trainers import ManualClock, build_trainer

LENGTH = 8
# In tokens: chunks of 10 rows, and windows of at most 100 rows and a chunk. One of the shards is
# empty, and one has less than a chunk.
CHUNK = 80
WINDOW = 800
SHARD_SIZES = [2000, 0, 60, 3000, 1500]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch) -> None:
    """Windows of CHUNK and WINDOW, and nobody who still reads."""
    # A run that has ended may still read ahead, with what this test puts in place.
    for thread in threading.enumerate():
        if thread.name == "background":
            thread.join()
    monkeypatch.setattr(TrainingRows, "CHUNK_BYTES", 2 * CHUNK)
    monkeypatch.setattr(TrainingRows, "WINDOW_BYTES", 2 * WINDOW)


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    """Shards in which no token comes twice."""
    files = []
    ends = np.cumsum(SHARD_SIZES)
    for i, (size, end) in enumerate(zip(SHARD_SIZES, ends, strict=True)):
        files.append(write_shard(tmp_path / f"x_train_{i}.bin", np.arange(end - size, end)))
    return files


@pytest.fixture
def rows(shards) -> TrainingRows:
    """The shards' rows, none of which is read yet."""
    return TrainingRows(shards, LENGTH, 3, 65536)


def test_nothing_is_read_once_the_rows_are_closed(rows, monkeypatch):
    slow = threading.Event()
    read = train_gpt.read_tokens
    calls = []

    def waiting(path: Path, first: int, count: int) -> np.ndarray:
        if threading.current_thread().name == "background":
            calls.append(path)
            slow.wait(30)
        return read(path, first, count)

    monkeypatch.setattr(train_gpt, "read_tokens", waiting)
    rows.row(0)
    while not calls:
        time.sleep(0.001)
    closing = threading.Thread(target=rows.close)
    closing.start()
    while not rows.closed:
        time.sleep(0.001)
    slow.set()
    closing.join(30)
    # The one that had begun.
    assert len(calls) == 1 and rows.ahead.done() and not closing.is_alive()


class Reads:
    """Every read: the shard, its first token, how many; and the most tokens that were in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[tuple[Path, int, int]] = []
        self.alive = weakref.WeakSet()
        self.most_tokens = 0
        self.read = train_gpt.read_tokens
        monkeypatch.setattr(train_gpt, "read_tokens", self)

    def __call__(self, path: Path, first: int, count: int) -> np.ndarray:
        tokens = Tracked(self.read(path, first, count))
        self.calls.append((path, first, count))
        self.alive.add(tokens)
        self.most_tokens = max(self.most_tokens, sum(len(each) for each in self.alive))
        return tokens


class Tracked:
    """Tokens that a set can hold without keeping them."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, places: slice) -> np.ndarray:
        return self.tokens[places]


@pytest.fixture
def reads(monkeypatch) -> Reads:
    """What is read from now on."""
    return Reads(monkeypatch)


def starts_of(rows: TrainingRows, positions: range) -> np.ndarray:
    """The first tokens of the rows at these positions, which say where each row is."""
    return np.array([rows.row(position)[0] for position in positions])


def windows_of(rows: TrainingRows, epoch: int) -> list[range]:
    """The positions of each window of an epoch."""
    found = []
    position = epoch * rows.num_rows
    while position < (epoch + 1) * rows.num_rows:
        rows.row(position)
        found.append(rows.window.positions)
        position = rows.window.positions.stop
    return found


# ---- the order


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_data_that_fit_one_window_are_shuffled_fully(shards, epoch, monkeypatch):
    """The order of scripts that knew no windows, to the bit."""
    monkeypatch.setattr(TrainingRows, "WINDOW_BYTES", 2**26)
    rows = TrainingRows(shards[3:4], LENGTH, 3, 65536)
    generator = np.random.default_rng((3, epoch))
    offset = generator.integers(LENGTH)
    order = generator.permutation(rows.num_rows)
    found = starts_of(rows, range(epoch * rows.num_rows, (epoch + 1) * rows.num_rows))
    assert rows.num_windows == 1
    assert found.tolist() == (2060 + offset + order * LENGTH).tolist()


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_each_row_comes_once_an_epoch_whatever_its_window(rows, epoch):
    positions = range(epoch * rows.num_rows, (epoch + 1) * rows.num_rows)
    found = np.stack([rows.row(position) for position in positions])
    assert rows.num_windows > 5 and (np.diff(found) == 1).all()
    assert len(np.unique(found[:, :-1])) == found[:, :-1].size == rows.num_rows * LENGTH


def test_windows_have_about_one_size_and_are_in_turn(rows):
    for epoch in range(3):
        windows = windows_of(rows, epoch)
        assert len(windows) == rows.num_windows
        assert [w.start for w in windows[1:]] == [w.stop for w in windows[:-1]]
        sizes = [len(window) for window in windows]
        assert sum(sizes) == rows.num_rows and max(sizes) <= (WINDOW + CHUNK) // LENGTH
        assert min(sizes) > rows.num_rows / rows.num_windows - CHUNK / LENGTH


def test_a_window_has_chunks_from_everywhere_and_its_rows_at_random(rows):
    everywhere = 0
    for window in windows_of(rows, 0):
        starts = starts_of(rows, window)
        everywhere += set(np.digitize(starts, [2000, 2060, 5060])) >= {0, 2, 3}
        # Neither neighbours, nor in the order of the file.
        assert (np.diff(starts) == LENGTH).mean() < 0.1
        assert abs(np.corrcoef(np.arange(len(starts)), starts)[0, 1]) < 0.4
    assert everywhere > rows.num_windows / 2


def test_each_epoch_deals_the_chunks_anew(rows):
    first = set(starts_of(rows, windows_of(rows, 0)[0]) // CHUNK)
    second = set(starts_of(rows, windows_of(rows, 1)[0]) // CHUNK)
    assert len(first & second) < len(first) / 2


def test_a_row_depends_on_its_position_alone(rows, shards):
    """So a run goes on with the row at which it was stopped."""
    positions = range(2 * rows.num_rows)
    expected = [rows.row(position).tolist() for position in positions]
    other = TrainingRows(shards, LENGTH, 4, 65536)
    assert [other.row(position).tolist() for position in positions] != expected
    for start in (1, 99, rows.num_rows - 1, rows.num_rows, rows.num_rows + 250):
        resumed = TrainingRows(shards, LENGTH, 3, 65536)
        found = [resumed.row(position).tolist() for position in range(start, start + 150)]
        assert found == expected[start : start + 150]
    # From a window to one far behind it, and back.
    for position in reversed(positions[::37]):
        assert rows.row(position).tolist() == expected[position]


# ---- reads


def test_a_chunk_is_one_read_and_is_read_once_an_epoch(rows, reads):
    for position in range(rows.num_rows):
        rows.row(position)
    rows.settle()
    # The last was that of the first window of the next epoch.
    calls = reads.calls[: len(rows.chunks)]
    assert len(set(calls)) == len(calls)
    assert sum(count - 1 for _, _, count in calls) == rows.num_rows * LENGTH
    # All but the last of a shard are of one size.
    short = [path for path, _, count in calls if count != CHUNK + 1]
    assert len(set(short)) == len(short)


def test_two_windows_are_in_memory_at_most(rows, reads):
    for position in range(3 * rows.num_rows):
        rows.row(position)
    rows.settle()
    chunks_of_window = (WINDOW + CHUNK) // CHUNK + len(SHARD_SIZES)
    assert WINDOW < reads.most_tokens <= 2 * (WINDOW + CHUNK + chunks_of_window)


def test_ranks_that_jump_over_each_others_rows_find_the_next_window_read(rows, reads):
    """A rank has 4 of the 32 rows of a step."""
    for step in range(2 * rows.num_rows // 32):
        for position in range(32 * step + 28, 32 * step + 32):
            rows.row(position)
    rows.settle()
    # All that was read is two epochs and a window, so nothing was read in vain.
    assert len(reads.calls) <= 2 * len(rows.chunks) + (WINDOW + CHUNK) // CHUNK + len(SHARD_SIZES)


def test_nothing_is_read_before_the_clock_runs(data_folder, reads, monkeypatch):
    read_at_start = []
    start = Clock.start

    def watched(clock: Clock) -> None:
        read_at_start.append(len(reads.calls))
        start(clock)

    monkeypatch.setattr(Clock, "start", watched)
    trainer = build_trainer(data_folder, iterations=2)
    trainer.warm_up()
    trainer.run(None)
    trainer.data.settle()
    assert read_at_start == [0] and reads.calls


def test_what_is_read_ahead_is_on_the_clock_when_validation_stops_it(data_folder, monkeypatch):
    read = train_gpt.read_tokens
    done = []

    def slow(path: Path, first: int, count: int) -> np.ndarray:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.01)
        return read(path, first, count)

    monkeypatch.setattr(train_gpt, "read_tokens", slow)
    trainer = build_trainer(data_folder, iterations=3, val_loss_every=1)
    trainer.run(lambda steps, seconds: done.append(trainer.data.ahead.done()))
    assert done == [True] * 3


# ---- a slow disk


class SlowDisk:
    """A disk that takes 10 ms to find what it reads and then reads 100 MB/s, on a manual clock.

    What is read in the background passes no time until somebody waits for it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: ManualClock):
        self.clock = clock
        self.busy = 0.0
        self.zeros = np.zeros(2**20, dtype="<u2")
        monkeypatch.setattr(train_gpt, "read_tokens", self.read_tokens)
        monkeypatch.setattr(train_gpt, "in_background", self.in_background)

    def read_tokens(self, path: Path, first: int, count: int) -> np.ndarray:
        """Zeros."""
        seconds = 0.010 + 2 * count / 100e6
        self.busy += seconds
        self.clock.now += seconds
        return self.zeros[:count]

    def in_background(self, function, argument):
        """Something like a future: the caller's clock stands still until it asks for the result."""
        started = self.clock.now
        value = function(argument)
        ends_at = self.clock.now
        self.clock.now = started
        clock = self.clock

        class Result:
            def result(self):
                clock.now = max(clock.now, ends_at)
                return value

        return Result()


def test_a_step_waits_for_a_slow_disk_less_than_one_percent_of_ten_minutes(tmp_path, monkeypatch):
    """Steps of 384 rows of 2,048 tokens and 90 ms; two shards of 100M tokens, which repeat."""
    monkeypatch.setattr(TrainingRows, "CHUNK_BYTES", 2**20)
    monkeypatch.setattr(TrainingRows, "WINDOW_BYTES", 2**26)
    files = []
    for i in range(2):
        files.append(tmp_path / f"x_train_{i}.bin")
        with open(files[-1], "wb") as file:
            file.write(struct.pack("<3i", 20240520, 1, 100_000_000))
            file.truncate(1024 + 200_000_000)
    clock = ManualClock(monkeypatch)
    disk = SlowDisk(monkeypatch, clock)
    rows = TrainingRows(files, 2048, 1337, 1024)
    started = clock.now
    steps = 0
    while clock.now - started < 600:
        # The first and the last row of a rank's 48.
        rows.row(384 * steps)
        rows.row(384 * steps + 47)
        clock.now += 0.090
        steps += 1
    passed = clock.now - started
    assert steps > 6600
    assert passed == pytest.approx(0.090 * steps + rows.waited)
    # The disk had work for a third of the time; only the first window was waited for.
    assert disk.busy > 0.25 * passed
    assert rows.waited == pytest.approx(1.4, abs=0.2)
    assert rows.waited < 0.01 * passed


# ---- a failing disk


def test_a_shard_that_is_cut_short_while_training_goes_on_is_named(rows, shards):
    for path in shards:
        with open(path, "r+b") as file:
            file.truncate(1024 + 2)
    with pytest.raises(UserError, match=r"x_train_\d.bin: damaged: shorter") as error:
        rows.row(0)
    assert "\n" not in str(error.value)


def test_an_error_while_reading_ahead_ends_the_step_that_needs_the_rows(
    data_folder, reads, monkeypatch
):
    """The first window is good; every later read fails."""
    trainer = build_trainer(data_folder, iterations=1000)
    first_window = int((trainer.data.epoch.window_of_chunk == 0).sum())
    read = reads.read

    def failing(path: Path, first: int, count: int) -> np.ndarray:
        if len(reads.calls) < first_window:
            return read(path, first, count)
        with monkeypatch.context() as patch:
            patch.setattr(train_gpt, "open", no_disk, raising=False)
            return read(path, first, count)

    def no_disk(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    reads.read = failing
    with pytest.raises(UserError, match=r"x_train_000000.bin: Input/output error$"):
        trainer.run(None)
    steps = len(trainer.data.epoch.order[: trainer.data.epoch.window_ends[0]]) // 4
    assert trainer.steps == steps > 0


def test_a_token_outside_the_vocabulary_is_found_in_rows_that_were_read_ahead(tmp_path):
    tokens = np.full(5000, 5)
    tokens[3000:3010] = 64
    rows = TrainingRows([write_shard(tmp_path / "x_train_0.bin", tokens)], LENGTH, 0, 64)
    with pytest.raises(UserError, match="x_train_0.bin.*token 64.*VOCAB_SIZE=64"):
        for position in range(rows.num_rows):
            rows.row(position)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to a thread")
def test_ctrl_c_ends_the_wait_for_a_disk_that_hangs_and_no_exit_waits_for_it(rows, monkeypatch):
    is_needed = threading.Event()
    stopped = threading.Event()
    readers = []
    read = train_gpt.read_tokens

    def hanging(path: Path, first: int, count: int) -> np.ndarray:
        if threading.current_thread() is not threading.main_thread():
            readers.append(threading.current_thread())
            is_needed.wait()
            # More than once: Python may miss a signal in the moment in which it begins to wait.
            while not stopped.wait(0.05):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return read(path, first, count)

    def receive(number: int, frame: object) -> None:
        if not stopped.is_set():
            stopped.set()
            raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt, "read_tokens", hanging)
    rows.row(0)
    handler = signal.signal(signal.SIGINT, receive)
    try:
        with pytest.raises(KeyboardInterrupt):
            is_needed.set()
            rows.row(rows.window.positions.stop)
        rows.settle()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert readers[0].daemon
