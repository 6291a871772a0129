"""The auditor of track B: an honest artifact that adapts passes, and each planted fault fails."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import audit_challenges
import audit_documents
import faulty_scripts
from adaptive_faults import CHEATS, FAULTS
from audit_adaptive_verdicts import affordable_chunks, documents_to_code, judge_evaluation
from audit_documents import off_by, side_by_side
from audit_processes import Processes
from audit_text import chunks_of, split_documents
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
    # As few batches of chunks as can be decoded; cheats are looked for in a few more.
    monkeypatch.setattr(audit_challenges, "MOST", 1)
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
    monkeypatch.setattr(audit_challenges, "MOST", audit_challenges.FEWEST)
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
