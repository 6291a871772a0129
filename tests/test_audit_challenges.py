"""What the auditor draws of what was scored, to be coded and decoded, and how it judges that."""

from __future__ import annotations

import numpy as np

from audit_challenges import (
    FEWEST,
    FEWEST_WINDOWS,
    MOST,
    Challenge,
    draw_chunks,
    draw_windows,
    judge_challenges,
    judge_drawn,
    judge_size,
)
from audit_text import (
    BATCH,
    PART,
    drawn_documents,
    drawn_windows,
    sliding_windows,
    split_documents,
)

TEXT = np.array([1, 5, 6, 7, 1, 1, 8, 9, 10, 11, 1, 12], dtype=np.uint16)


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
    nats = [5 * np.log(2), 6 * np.log(2)]
    # 12 bits, 11 and 13.
    assert judge_size(nats, 100, b"\x10\x10") == judge_size(nats, 100, b"\x10\x20") == ""
    assert "11.0 bits, but were coded into 13" in judge_size(nats, 100, b"\x10\x08")
    assert judge_size([np.nan], 100, b"\x10")


def test_any_chunk_may_be_decoded_behind_what_stands_before_it():
    documents = split_documents(TEXT)
    scored = dict(rows=[[first, first, end, 1.0] for first, end in documents.tolist()])
    settings = dict(ttt_chunk_size=2, ttt_batch_size=2)
    generator = np.random.default_rng(0)
    found = []
    for _ in range(10):
        found += draw_chunks(TEXT, scored, settings, [1.0, 1.0], 1e9, generator)
    assert len(found) == 10 * MOST
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
    assert len(few) == FEWEST
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
    assert [len(challenge.rows) for challenge in few] == [FEWEST_WINDOWS]


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
