"""The script gives what tests/golden holds: losses, artifacts, lines, exit statuses."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import golden_runs


@pytest.fixture(scope="module")
def why_not_exact() -> str:
    """Why bits cannot be compared on this machine; empty where they can."""
    return golden_runs.why_not_exact(golden_runs.fingerprint_of_runs())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and shards, the recorded ones."""
    folder = tmp_path_factory.mktemp("golden") / "data"
    digests = golden_runs.make_data(folder)
    origin = golden_runs.recorded(golden_runs.ORIGIN)
    if digests != origin["data"]:
        ours = golden_runs.sentencepiece.__version__
        theirs = origin["fingerprint"]["sentencepiece"]
        assert ours != theirs, "the data is not what was recorded, with the same SentencePiece"
        pytest.skip(f"SentencePiece {ours} trains another tokenizer than {theirs} did")
    return folder


@pytest.mark.parametrize("name", golden_runs.RUNS)
def test_a_run_gives_what_was_recorded(name, data, tmp_path, why_not_exact):
    """To the bit on a machine with the recorded fingerprint, else within tolerances."""
    if why_not_exact:
        warnings.warn(f"golden run compared within tolerances: {why_not_exact}", stacklevel=1)
    found = golden_runs.record_run(name, golden_runs.SCRIPT, tmp_path / "run", data)
    differing = golden_runs.differences(name, found, exact=not why_not_exact)
    assert not differing, "\n".join(differing[:20])
