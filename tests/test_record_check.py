"""What is computed again from a record's files: seeds, statistics, flags, claims, hardware."""

from __future__ import annotations

import copy
import json
import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy import stats

import challenge
import record_text
import run_logs
from checks import Check, guarded
from record_check import check_fields, check_files, check_seeds, check_statistics
from record_folder import log_paths
from tiny_record import COMMITTED

LOGS = [run_logs.Log(path) for path in log_paths(COMMITTED)]


@pytest.fixture
def stated() -> dict:
    """What a record states, to be doctored."""
    return json.loads((COMMITTED / "submission.json").read_text())


# ---- Files and fields
def test_a_record_has_all_files_and_fields(stated):
    assert [check.passed for check in check_files(COMMITTED)] == [True]
    found = check_fields(stated)
    assert found.passed and found.figure == "no github_id"


def test_missing_fields_are_named_and_some_must_be_there(stated):
    del stated["blurb"]
    assert check_fields(stated) == Check("fields", True, "no github_id, blurb")
    del stated["seeds"]
    assert check_fields(stated).passed is False


# ---- Figures
@pytest.mark.parametrize(
    "name, value",
    [
        ("train_seconds", 1.0),
        ("step_avg_ms", 0.01),
        ("eval_time_s", 99.5),
        ("roundtrip_val_bpb", 1.0),
        ("artifact_sha256", "00"),
        ("pre_quant_val_bpb", 1.0),
    ],
)
def test_what_a_seed_is_said_to_have_is_compared_with_its_log(name, value, stated):
    assert check_seeds(stated, LOGS).passed
    doctored = copy.deepcopy(stated)
    doctored["seed_results"]["2"][name] = value
    found = check_seeds(doctored, LOGS)
    assert found.passed is False and f"{name} of seed 2" in found.figure
    figure = stated["seed_results"]["2"][name]
    if isinstance(figure, float):
        # Fewer decimals.
        doctored["seed_results"]["2"][name] = round(figure, 2)
        assert check_seeds(doctored, LOGS).passed


def test_the_mean_before_quantization_is_compared(stated):
    stated["pre_quant_val_bpb"] = 1.0
    found = check_seeds(stated, LOGS)
    assert found.passed is False and found.figure.startswith("pre_quant_val_bpb is 1")


def test_logs_that_state_nothing_are_no_failure(stated, tmp_path):
    (tmp_path / "train_seed1.log").write_text("")
    log = run_logs.Log(tmp_path / "train_seed1.log")
    assert check_seeds(stated, [log]).passed is None


@pytest.mark.parametrize(
    "name, value, problem",
    [
        ("val_loss", 1.0, "val_loss is 1"),
        ("val_bpb_std", 0.1, "val_bpb_std is 0.1"),
        (
            "beats",
            dict(claimed=9.5, nats=1.0, p_value=0.001, holds=True),
            "nats of the claim is 1",
        ),
        ("track", "10min_16mb", "track 10min_16mb, but CPU run"),
        ("compliance", dict(three_seeds=False), "compliance three_seeds is wrong"),
        ("compliance", dict(challenge_hardware_and_text=True), "is wrong"),
        ("compliance", dict(no_ttt=False), "compliance no_ttt is wrong"),
        ("compliance", dict(train_under_600s=False), "is wrong"),
        ("evaluation_track", "B", "evaluation_track B, but the logs are of track A"),
        ("adaptation", "all of it", "adaptation is not what the logs state"),
        ("hardware", "8×NVIDIA H100 80GB HBM3", "hardware is CPU, 2 threads in the logs"),
        ("seed_results", {"1": {}}, "cannot be made sense of"),
    ],
)
def test_what_follows_from_the_seeds_is_computed_again(name, value, problem, stated):
    assert check_statistics(stated, LOGS).passed, check_statistics(stated, LOGS).figure
    stated[name] = value
    found = guarded("statistics", check_statistics, stated, LOGS)
    assert found.passed is False and problem in found.figure, found.figure


def test_a_deviation_may_divide_by_n(stated):
    bpbs = [result["val_bpb"] for result in stated["seed_results"].values()]
    stated["val_bpb_std"] = statistics.pstdev(bpbs)
    assert check_statistics(stated, LOGS).passed


def test_a_claim_that_holds_is_found_to_hold(stated):
    results = stated["seed_results"].values()
    bpbs, losses = ([result[name] for result in results] for name in ("val_bpb", "val_loss"))
    stated["beats"] = record_text.compare_with(3.0, bpbs, losses)._asdict()
    assert check_statistics(stated, LOGS).passed
    stated["beats"]["p_value"] *= 1.01
    assert "p of the claim" in check_statistics(stated, LOGS).figure


# ---- Claims
def test_the_p_value_is_that_of_the_t_test_in_nats():
    bpbs = [1.120, 1.122, 1.121]
    losses = [1.8900, 1.8934, 1.8917]
    per_bpb = sum(losses) / sum(bpbs)
    limit = 1.1364 * per_bpb - 0.005
    mean = sum(losses) / 3
    t = (mean - limit) / (statistics.stdev(losses) / math.sqrt(3))
    claim = record_text.compare_with(1.1364, bpbs, losses)
    assert claim.p_value == pytest.approx(stats.t.cdf(t, 2), rel=1e-9) and claim.holds
    assert claim.nats == pytest.approx(1.1364 * per_bpb - mean)
    # Student's t with two degrees of freedom has this distribution function.
    assert claim.p_value == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), rel=1e-6)


@pytest.mark.parametrize("lead, holds", [(0.0049, False), (0.0056, True)])
def test_a_lead_of_less_than_five_thousandths_of_a_nat_is_none(lead, holds):
    claim = record_text.compare_with(1.0 + lead / 1.89, [1.0] * 3, [1.8900, 1.8901, 1.8899])
    assert claim.holds is holds and (claim.p_value > 0.5) is not holds


def test_one_seed_has_no_p_value():
    claim = record_text.compare_with(2.0, [1.0], [1.7])
    assert claim.p_value is None and claim.holds is False


def test_a_build_is_no_version_of_a_package():
    assert record_text.requirements_of({"torch": "2.1.0+cpu", "python": "3.11"}) == (
        "# Python 3.11\ntorch==2.1.0  # ran as 2.1.0+cpu\n"
    )


# ---- Hardware
@pytest.mark.parametrize(
    "lines, named",
    [
        (
            "world_size:8 (threads:4)\ndevice:cuda:0 (NVIDIA H100 80GB HBM3)",
            "8×NVIDIA H100 80GB HBM3",
        ),
        ("world_size:1 (threads:2)\ndevice:cpu (no CUDA)", "CPU, 2 threads"),
        (
            "world_size:2 (threads:1)\ndevice:cpu (asked for)",
            "CPU, 1 threads in each of 2 processes",
        ),
        ("nothing", "UNKNOWN, unknown threads"),
    ],
)
def test_the_hardware_is_what_the_log_says(lines, named, tmp_path: Path):
    (tmp_path / "a.txt").write_text(f"{run_logs.SEPARATOR}\n{lines}\n")
    log = run_logs.Log(tmp_path / "a.txt")
    assert challenge.hardware(log) == named
    foreign = any("hardware" in reason for reason in challenge.foreign_to_challenge(log))
    assert foreign is ("H100" not in named)


# ---- The challenge's text
WHOLE = dict(
    validation_split="whole", validation_documents=50_000, data_warnings=["training shards missing"]
)


class StatedLog:
    """A log that states nothing but the bytes that were scored, and what data they were of."""

    def __init__(self, size: int, **compliance):
        self.size = size
        self.compliance = compliance or None

    def score(self, label: str) -> SimpleNamespace:
        """The bytes of any pass."""
        return SimpleNamespace(bytes=self.size)


@pytest.mark.parametrize(
    "size, stated, said",
    [
        (151_080_000, {}, None),
        (151_500_000, WHOLE, None),
        (24_000_000, {}, "a text of 24,000,000 bytes"),
        (151_080_000, {**WHOLE, "validation_documents": 49_999}, "Scored on 49,999 documents"),
        (
            151_080_000,
            {**WHOLE, "validation_split": "part: 9660000 of 47850000 tokens"},
            r"a part of the validation split \(9660000 of 47850000 tokens\)",
        ),
        (
            151_080_000,
            {
                **WHOLE,
                "data_warnings": [
                    "1499 training shards with case operators: the public export of which 40,000 "
                    "validation documents are among the training documents (issue #2127)"
                ],
            },
            "Trained on validation text: 1499 training shards",
        ),
        (
            151_080_000,
            {**WHOLE, "data_warnings": ["the text is normalized (1 of 9 documents)"]},
            r"Its log says: the text is normalized \(1 of 9 documents\)",
        ),
    ],
)
def test_only_the_whole_text_is_the_challenges(size, stated, said):
    reasons = challenge.foreign_text(StatedLog(size, **stated))
    if said is None:
        assert reasons == []
    else:
        [reason] = reasons
        assert re.search(said, reason)
