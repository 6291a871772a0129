"""The auditor of track B: an honest artifact that adapts passes, and each planted fault fails."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import audit_adaptive_verdicts
import audit_documents
import faulty_scripts
from adaptive_faults import CHEATS, FAULTS
from audit_adaptive_verdicts import (
    Challenge,
    affordable_chunks,
    documents_to_code,
    draw_chunks,
    draw_windows,
    judge_challenges,
    judge_drawn,
    judge_evaluation,
    judge_size,
)
from audit_documents import off_by, side_by_side
from audit_processes import Processes
from audit_text import (
    BATCH,
    PART,
    chunks_of,
    drawn_documents,
    drawn_windows,
    sliding_windows,
    split_documents,
)
from audit_verdicts import ADAPTIVE_CHECKS
from checks import Check
from faulty_scripts import faulty_script
from run_logs import LABELS, Log
from tiny_record import Record, honest_record

ROWS = {
    "adaptive targets",
    "adaptive causality",
    "adaptive documents",
    "adaptive sums",
    "adaptive score",
    "adaptive decompression",
}
TEXT = np.array([1, 5, 6, 7, 1, 1, 8, 9, 10, 11, 1, 12], dtype=np.uint16)


@pytest.fixture(scope="module")
def honest(data_folder) -> Record:
    return honest_record(data_folder, adapts=True)


@pytest.fixture
def record(honest, tmp_path, monkeypatch) -> Record:
    """A copy of the honest record, to be doctored; workers run in this process."""
    monkeypatch.setattr(Processes, "wait_for", faulty_scripts.answer_here)
    monkeypatch.setattr(audit_adaptive_verdicts, "MOST", audit_adaptive_verdicts.FEWEST)
    return Record(Path(shutil.copytree(honest.folder, tmp_path / "record")), honest.data)


def test_an_honest_record_of_track_b_passes_every_check(record):
    asked = "alone,log,submission,record," + ",".join(sorted(ADAPTIVE_CHECKS))
    found = record.audit("--only", asked)
    assert found.status == 0, found
    assert set(found.verdicts.values()) == {"PASS", "-"} and set(found.verdicts) > ROWS
    told = re.search(r"adaptive decompression .*; \d+ documents, ([\d.]+) bpb without", found.out)
    scored = re.search(r"adaptive decompression .* scored ([\d.]+) ", found.out)
    assert float(scored[1]) < float(told[1]), "learning shows in what was decoded"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, record):
    planted, asked, expected = FAULTS[fault]
    record.script.write_text(faulty_script(planted), encoding="utf-8")
    found = record.audit("--only", asked)
    failed = {name for name, verdict in found.verdicts.items() if verdict == "FAIL"}
    assert failed == expected and len(found.verdicts) == len(asked.split(",")), found
    # It is caught, it does not just break.
    assert "Error" not in found.out, found


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_script_that_was_made_to_pass_is_caught(cheat, record, monkeypatch):
    # It may put another function there.
    monkeypatch.setattr(audit_documents, "nats_of", audit_documents.nats_of)
    planted, asked, expected = CHEATS[cheat]
    record.script.write_text(faulty_script(planted), encoding="utf-8")
    assert record.failed(*asked.split(","), whole="adaptive_decompression" not in asked) == expected


def test_a_better_adaptive_score_in_the_log_is_caught(record):
    """0.01 are taken off, with all that follows from it, in the log and everywhere."""
    label = LABELS["ttt"]
    claimed = Log(record.log).score(label)
    bpb = claimed.val_bpb - 0.01
    loss = claimed.val_loss * bpb / claimed.val_bpb
    lines = record.lines()
    for name, digits in ((label, 4), (f"{label}_exact", 8)):
        stated = f"{name} val_loss:{loss:.{digits}f} val_bpb:{bpb:.{digits}f}"
        lines, times = re.subn(rf"^{name} val_loss:\S+ val_bpb:\S+", stated, lines, flags=re.M)
        assert times == 1
    record.write_log(lines)
    record.write()
    asked = ("adaptive_targets", "adaptive_score", "log", "submission")
    assert record.failed(*asked, whole=True) == {"adaptive score"}


def test_rounding_to_bfloat16_does_not_make_nats_lower_on_average():
    def judged(nats: float) -> Check:
        scored = dict(rows=[[4, 4, 104, nats], [200, 200, 300, 50.0]], off=0.0, wrong=[], tried=3)
        check = Check("adaptive score", True, "own 1.0")
        return judge_evaluation(check, scored, {4: 200.0, 200: 50.0}, bfloat16=True)

    assert judged(199.7).passed and judged(200.9).passed
    assert "have 0.9000 nats less" in judged(199.1).figure and judged(199.1).passed is False


# ---- What was scored, against what is decoded
def test_what_counts_is_what_was_drawn():
    drawn = drawn_documents(TEXT, seed=3)[:, [0, 0, 1]]
    assert sorted(drawn[:, 1:].tolist()) == split_documents(TEXT).tolist()
    windows = drawn_windows(11, window=4, stride=3, seed=3)
    assert sorted(windows.tolist()) == sliding_windows(11, 4, 3).tolist()

    def judged(rows: np.ndarray, count: int = 4, nats: float = 1.0, parts=(0.25, 0.75)) -> str:
        rows = [[*row, nats] for row in rows.tolist()]
        scored = dict(rows=rows, windows=count, by_part=[parts] * len(rows))
        return judge_drawn(scored, drawn, "documents")

    # Within a few batches they are sorted by length.
    assert judged(drawn) == judged(drawn[::-1]) == judged(drawn[:3]) == ""
    for others in (drawn[1:], drawn[[0, 0]], drawn[:1] + 1):
        assert "not those that were drawn" in judged(others)
    assert "there are 3 documents of 4" in judged(drawn[:3], count=3)
    assert "there are 0.9000 nats, but (0.25, 0.75) in parts" in judged(drawn, nats=0.9)
    assert "in parts" in judged(drawn, parts=(-1.0, 2.0))


def test_a_coded_file_is_no_larger_than_its_nats_say():
    nats = [1000 * np.log(2), 600 * np.log(2)]
    assert judge_size(nats, 100, 201) == judge_size(nats, 100, 199) == ""
    assert "200.0 bytes, but it was coded into 204" in judge_size(nats, 100, 204)
    assert judge_size([np.nan], 100, 204)


def test_any_chunk_may_be_decoded_behind_what_stands_before_it():
    documents = split_documents(TEXT)
    scored = dict(rows=[[first, first, end, 1.0] for first, end in documents.tolist()])
    settings = dict(ttt_chunk_size=2, ttt_batch_size=2)
    generator = np.random.default_rng(0)
    found = []
    for _ in range(10):
        found += draw_chunks(TEXT, scored, settings, [1.0, 1.0], 1e9, generator)
    assert len(found) == 10 * audit_adaptive_verdicts.MOST
    for challenge in found:
        for row, part, span in zip(challenge.rows, challenge.parts, challenge.spans, strict=True):
            first, end = documents[row]
            begin = first + 2 * part
            assert span.tolist() == [first, begin, min(begin + 2, end)]
        # The decoder is not told where a document ends.
        assert challenge.most == [2] * len(challenge.rows) and len(set(challenge.known)) == 1
    # All chunks of all documents but the last one, behind which there is no BOS.
    drawn = {(challenge.rows[0], challenge.parts[0]) for challenge in found}
    assert drawn == {(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)}
    few = draw_chunks(TEXT, scored, settings, [1.0, 1.0], 1.0, generator)
    assert len(few) == audit_adaptive_verdicts.FEWEST
    without = dict(rows=[[0, 0, 3, 1.0]])
    assert draw_chunks(TEXT[:4], without, settings, [1.0, 1.0], 1e9, generator) == []


def test_any_part_of_any_window_may_be_decoded():
    """The first window has more parts than the others; a last part may be shorter."""
    windows = sliding_windows(60, window=16, stride=6)
    scored = dict(rows=[[*row, 1.0] for row in windows.tolist()])
    generator = np.random.default_rng(0)
    found = set()
    for _ in range(50):
        challenges = draw_windows(scored, 1.0, 1e9, generator)
        # Each of them once.
        assert sorted(row for each in challenges for row in each.rows) == list(range(len(windows)))
        for challenge in challenges:
            assert len(challenge.rows) <= BATCH and challenge.most == challenge.counts
            spans = map(tuple, challenge.spans.tolist())
            found.update(zip(challenge.rows, challenge.parts, spans, strict=True))
    expected = set()
    for row, (start, first, end) in enumerate(windows.tolist()):
        for part, begin in enumerate(range(first, end, PART)):
            expected.add((row, part, (start, begin, min(begin + PART, end))))
    assert found == expected
    few = draw_windows(scored, 1.0, 1.0, generator)
    assert [len(challenge.rows) for challenge in few] == [audit_adaptive_verdicts.FEWEST_WINDOWS]


def test_a_part_that_is_decoded_stands_behind_what_is_known():
    spans = np.array([[5, 7, 9], [0, 2, 4]])
    challenge = Challenge([2, 0], [1, 1], spans, most=[2, 2])
    assert challenge.before(TEXT).tolist() == [1, 8, 9, 1, 5, 6]
    assert challenge.targets(TEXT) == [[10, 11], [7, 1]]
    assert challenge.text(TEXT).tolist() == [1, 8, 9, 10, 11, 1, 5, 6, 7, 1]
    assert (challenge.known, challenge.counts) == ([2, 2], [2, 2])
    rows = [[0, 0, 4, 3.0], [4, 4, 5, 1.0], [5, 5, 10, 5.0]]
    scored = dict(rows=rows, by_part=[[1.0, 2.0], [1.0], [1.0, 3.0, 1.0]])

    def judged(nats: list[float], bfloat16: bool = False) -> str:
        return judge_challenges([challenge], [nats], scored, bfloat16)

    assert judged([3.0, 2.0001]) == ""
    told = judged([3.0, 2.1])
    assert told.startswith("part 1 of what begins at target 0 has 2.0000 nats, but 2.1000")
    # Rounding moves one part, but not all of them downwards.
    assert judged([3.5, 1.6], bfloat16=True) == judged([3.4, 2.1], bfloat16=True) == ""
    assert "have 0.6000 nats less" in judged([3.3, 2.3], bfloat16=True)


# ---- Documents
def test_documents_are_a_bos_and_what_follows():
    """Their targets are the tokens behind the BOS, and the next BOS, if there is one."""
    found = split_documents(TEXT)
    assert found.tolist() == [[0, 4], [4, 5], [5, 10], [10, 11]]
    assert chunks_of(found, 2).tolist() == [2, 1, 3, 1]
    assert split_documents(TEXT[:5]).tolist() == [[0, 4]]


def test_documents_side_by_side_hold_each_target_once():
    rows = side_by_side(TEXT, split_documents(TEXT)[[2, 0]], rows=3, chunk=2)
    assert rows.inputs.tolist() == [[1, 8, 9, 10, 11, 0], [1, 5, 6, 7, 0, 0], [0] * 6]
    assert rows.targets.tolist() == [[8, 9, 10, 11, 1, 0], [5, 6, 7, 1, 0, 0], [0] * 6]
    assert rows.is_scored.sum(1).tolist() == [5, 4, 0]


@pytest.mark.parametrize(
    "shares, off",
    [([0.25, 0.75], 0.0), ([0.5, 0.75], 0.25), ([-0.25, 1.25], 0.25), ([np.nan, 1], np.inf)],
)
def test_probabilities_are_none_below_zero_and_sum_to_one(shares, off):
    assert off_by(np.array([[0.5, 0.5], shares], dtype=np.float32)) == off


def test_documents_that_show_what_was_learnt_are_decoded_first():
    """Of three chunks or more, as far as there is the time, and whole."""
    lengths = [3, 8, 30, 9, 2, 7, 100]
    text = np.concatenate([[1, *[7] * (length - 1)] for length in lengths]).astype(np.uint16)
    settings = dict(ttt_chunk_size=2, ttt_batch_size=4)

    def drawn(seconds: float) -> list[int]:
        generator = np.random.default_rng(0)
        found = documents_to_code(text, settings, [1.0, 1.0], seconds, generator)
        return sorted((found[:, 1] - found[:, 0]).tolist())

    # Two predictions a chunk; the last document is not followed by a BOS.
    assert drawn(10.0) == [3, 7, 8, 9]
    assert drawn(30.0) == [7, 8, 9, 30]
    assert drawn(0.1) == [2]


def test_longer_documents_take_more_time_for_each_chunk():
    assert affordable_chunks(10, 4, [1.0, 1.0], 45.0) == 4
    assert affordable_chunks(10, 4, [1.0, 3.0], 65.0) == 3
    assert affordable_chunks(10, 4, [1.0, 1.0], 1.0) == 1
    assert affordable_chunks(1 << 10, 1 << 4, [1.0, 1.0], 1e9) == 4


@pytest.mark.parametrize(
    "changes, word",
    [
        ({}, ""),
        (dict(off=0.01), "sums over the vocabulary are 0.01 from 1"),
        (dict(wrong=[7], difference=0.5), "predictions differ by 0.5 at 1 of 3 places"),
        (dict(rows=[[4, 4, 9, 20.0]]), "the document at token 4 has 20.0000 nats, but 21.0000"),
    ],
)
def test_an_evaluation_is_what_its_parts_are(changes, word):
    scored = dict(rows=[[4, 4, 9, 21.0], [9, 9, 12, 5.0]], off=0.0, wrong=[], tried=3)
    check = Check("adaptive score", None, "known too little", unproven="--minutes 9 would do")
    found = judge_evaluation(check, {**scored, **changes}, {4: 21.0})
    if word:
        assert found.passed is False and word in found.figure and not found.unproven
    else:
        assert found.passed is None and found.unproven
        assert found.figure.endswith("with other text behind, 1 of 1 decoded documents among them")
