"""records/ablate.py: what it runs and resumes, computes, writes and publishes."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import pytest
from scipy import stats

import ablation_outcomes
import ablation_plot
import ablation_report
import ablation_runs
from ablation_outcomes import Outcome, compare
from ablation_plan import ROOT, Ablation
from run_logs import Log
from standin import Done, call, write_standin
from tiny_runs import TINY

# Of the fixture `first`.
BASE = "NUM_LAYERS=11 PARALLEL_START_LAYER=0 ITERATIONS=400 VAL_LOSS_EVERY=9"


@pytest.fixture(scope="module")
def standin(tmp_path_factory) -> Path:
    """The path of the quick script."""
    return write_standin(tmp_path_factory.mktemp("script") / "standin.py")


@pytest.fixture(scope="module")
def first(standin, tmp_path_factory) -> Done:
    """Base, a worse change, one that fails, a group, another spread; three seeds of each."""
    return call(
        tmp_path_factory.mktemp("first"),
        "--script",
        standin,
        "--base",
        BASE,
        "NUM_LAYERS=10,13",
        "SWA_ENABLED=0 EMA_ENABLED=1",
        "MODEL_DIM=384",
    )


def outcomes_of(scores: dict[str, dict[int, float]]) -> list[Outcome]:
    """Finished runs with these scores, by label and seed."""
    found = []
    for label, group in scores.items():
        changes = {} if label == "base" else {"A": label}
        for seed, bpb in group.items():
            found.append(Outcome("x", changes, seed, "finished", val_bpb=bpb))
    return found


# ---- Statistics


def test_the_report_holds_what_scipy_says_of_the_runs(first):
    base = first.row("base")
    changed = first.row("MODEL_DIM=384")
    ours = list(changed["val_bpb"].values())
    theirs = list(base["val_bpb"].values())
    runs = [first.run(f"model_dim_384-seed{seed}") for seed in (1, 2, 3)]
    assert ours == [run["final_int6_sliding_window"]["val_bpb"] for run in runs]

    paired = stats.ttest_rel(ours, theirs)
    interval = [changed["paired_low"], changed["paired_high"]]
    assert interval == pytest.approx(list(paired.confidence_interval(0.95)))
    assert changed["p_paired"] == pytest.approx(paired.pvalue)
    assert changed["difference"] == pytest.approx(sum(ours) / 3 - sum(theirs) / 3)

    welch = stats.ttest_ind(ours, theirs, equal_var=False)
    interval = [changed["low"], changed["high"]]
    assert interval == pytest.approx(list(welch.confidence_interval(0.95)))
    assert changed["p_welch"] == pytest.approx(welch.pvalue)

    assert changed["deviation"] == pytest.approx(stats.tstd(ours))
    assert base["difference"] is None


def test_holm_adjusts_the_p_values_of_each_test_for_the_number_of_changes():
    base = {1: 1.0, 2: 2.0, 3: 3.0}
    small = {1: 1.1, 2: 2.1, 3: 3.2}
    large = {1: 5.1, 2: 6.1, 3: 7.1001}
    [_, small, large] = compare(outcomes_of(dict(base=base, small=small, large=large)))
    assert large.p_paired < small.p_paired
    assert large.p_paired_holm == pytest.approx(2 * large.p_paired)
    assert small.p_paired_holm == pytest.approx(small.p_paired)
    assert large.p_holm == pytest.approx(2 * large.p_welch)
    assert small.p_holm == pytest.approx(small.p_welch)


def test_only_seeds_that_both_have_are_compared():
    base = {1: 2.0, 2: 2.2, 3: 2.7}
    new = {2: 2.1, 3: 2.4, 4: 9.0}
    [_, row] = compare(outcomes_of(dict(base=base, new=new)))
    assert row.mean == pytest.approx(4.5)
    assert row.difference == pytest.approx(-0.2)
    assert row.p_paired == pytest.approx(stats.ttest_rel([2.1, 2.4], [2.2, 2.7]).pvalue)
    assert row.p_welch == pytest.approx(
        stats.ttest_ind([2.1, 2.4], [2.2, 2.7], equal_var=False).pvalue
    )
    assert (row.paired_low + row.paired_high) / 2 == pytest.approx(-0.2)
    assert (row.low + row.high) / 2 == pytest.approx(-0.2)


def test_the_table_leads_with_the_paired_difference():
    base = {1: 1.0, 2: 2.0, 3: 3.0}
    new = {1: 1.11, 2: 2.10, 3: 3.09}
    head, _, _, row, *_ = ablation_report.results_table(
        compare(outcomes_of(dict(base=base, new=new)))
    )
    assert head.startswith(
        "| change | difference | 95% interval (paired) | p (paired) | p (Holm) |"
    )
    # 0.1 and 0.01 * 4.303 / sqrt(3) on either side; Welch's interval holds 0.
    assert row.startswith("| A=new | +0.10000 | [+0.07516, +0.12484] | 0.0033 | 0.0033 | [-2.1")


def test_the_report_counts_the_effects_that_are_sure():
    base = {1: 1.0, 2: 2.0, 3: 3.0}
    by_pairs = {1: 1.1, 2: 2.1, 3: 3.11}
    by_chance = {1: 1.1, 2: 2.1, 3: 2.9}
    rows = compare(outcomes_of(dict(base=base, by_pairs=by_pairs, by_chance=by_chance)))
    text = "\n".join(ablation_report.explanation(rows))
    assert "2 changes are compared" in text
    assert "Sure at 95%: by pairs 1 of 2, by pairs and Holm 1, by Welch 0." in text


def test_one_seed_is_said_to_show_no_spread():
    rows = compare(outcomes_of(dict(base={1: 1.0}, new={1: 1.1})))
    assert rows[1].difference == pytest.approx(0.1)
    assert rows[1].paired_low is None
    assert "One seed shows no spread" in ablation_report.explanation(rows)[-1]
    assert ablation_plot.draw(rows, []).startswith(b"\x89PNG")


def test_a_score_of_another_text_is_not_compared(standin, tmp_path):
    done = call(
        tmp_path, "--script", standin, "--base", "ITERATIONS=4", "--seeds", "1", "VOCAB_SIZE=2048"
    )
    assert done.status == 1
    assert "another text" in done.report()["runs"][1]["error"]
    assert done.row("VOCAB_SIZE=2048")["mean"] is None


# ---- What is run and written


def test_all_seeds_of_a_change_are_run_seed_by_seed(first):
    slugs = ("base", "num_layers_10", "swa_enabled_0+ema_enabled_1", "model_dim_384")
    names = []
    for seed in (1, 2, 3):
        names += [f"{slug}-seed{seed}" for slug in slugs]
    ended = [first.run(name)["ended"] for name in names]
    assert ended == sorted(ended)
    finished = [run["name"] for run in first.report()["runs"] if run["status"] == "finished"]
    assert finished == names
    assert "0 of them have finished" in first.err
    assert "15/15 runs" in first.err


def test_a_run_that_fails_is_a_row_that_says_so(first):
    assert first.status == 1
    report = (first.ablation / "ablation.md").read_text()
    for text in (first.out, report):
        assert "| NUM_LAYERS=13 | - | - | - | - | - | - | failed | failed | failed | - |" in text
    assert (
        "- num_layers_13-seed2: ended with status 1: error: train_loss is nan at step 7 in "
        "logs/ablations/ablation/num_layers_13-seed2\n"
    ) in report


def test_a_run_that_is_killed_is_said_to_be(standin, tmp_path):
    done = call(
        tmp_path,
        "--script",
        standin,
        "--base",
        "ITERATIONS=4 PARALLEL_START_LAYER=0",
        "--seeds",
        "1",
        "NUM_LAYERS=14",
    )
    assert done.status == 1
    assert done.report()["runs"][1]["error"] == "ended by SIGKILL: at work"


def test_a_report_that_cannot_be_written_stops_no_run(standin, tmp_path, monkeypatch):
    arguments = ["--script", standin, "--base", "ITERATIONS=4", "--seeds", "1", "QUANT=rows"]

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(ablation_report, "write_atomically", fail)
        done = call(tmp_path, *arguments)
    assert done.status == 2
    assert "warning: no report could be written: OSError: disk full" in done.err
    assert done.err.endswith("error: disk full\n")
    assert done.run("quant_rows-seed1")

    monkeypatch.setattr(ablation_plot, "draw_curves", fail)
    done = call(tmp_path, *arguments)
    assert done.status == 2
    assert "error: the plot cannot be drawn: OSError: disk full" in done.err
    assert done.row("QUANT=rows")["mean"]


def test_the_report_names_what_it_was_made_with(first, standin):
    report = first.report()
    text = (first.ablation / "ablation.md").read_text()
    sha256 = hashlib.sha256(standin.read_bytes()).hexdigest()
    assert report["script_sha256"] == sha256
    base = dict(pair.split("=") for pair in BASE.split())
    assert report["base"] == dict(base, MAX_WALLCLOCK_SECONDS="0.0")
    for part in (
        sha256,
        BASE,
        "device:cpu",
        "torch 2.0",
        "1,000 targets, 2,000 bytes",
        "3 changes are compared",
        f"--base '{BASE}' NUM_LAYERS=10,13",
    ):
        assert part in text, part


def test_curves_are_over_tokens(first):
    [run, *_] = first.report()["runs"]
    assert run["val_curve"] == [[2048, 3 - 1 / 400], [409600, 2.5], [819200, 2.0]]
    assert run["train_curve"][-1] == [819200, 8.0]


def test_a_curve_of_differences_has_the_points_of_all_runs_of_common_seeds():
    curves = {
        ("base", 1): {10: 1.0, 20: 2.0, 30: 3.0},
        ("base", 2): {10: 2.0, 20: 3.0},
        ("A=1", 1): {10: 1.5, 20: 2.0, 30: 3.0},
        ("A=1", 2): {10: 2.1, 20: 4.0},
        ("A=1", 3): {10: 9.0},
    }
    found = ablation_plot.mean_difference(curves, "A=1")
    assert [tokens for tokens, _ in found] == [10, 20]
    assert [value for _, value in found] == pytest.approx([0.3, 0.5])


def test_the_plot_is_a_picture_and_artifacts_are_gone(first):
    assert (first.ablation / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert not list(first.ablation.rglob("*.ptz"))
    assert not list(first.ablation.rglob("*.partial"))


def test_settings_in_the_environment_are_the_bases(standin, tmp_path):
    done = call(
        tmp_path,
        "--script",
        standin,
        "--seeds",
        "1",
        ITERATIONS="4",
        MODEL_DIM="96",
        SEED="9",
        NUM_LAYER="7",
    )
    assert done.status == 0
    assert done.run("base-seed1")["settings"]["model_dim"] == 96
    assert done.run("base-seed1")["settings"]["seed"] == 1
    assert "warning: NUM_LAYER is not a setting; did you mean NUM_LAYERS?" in done.err


def test_without_iterations_runs_have_equal_seconds(standin, tmp_path):
    done = call(tmp_path, "--script", standin, "--seeds", "1", "BACKOUT_ENABLED=0")
    assert done.status == 0
    assert "--equal seconds: runs end by MAX_WALLCLOCK_SECONDS=150\n" in done.err
    assert len(done.report()["runs"]) == 2
    assert done.report()["equal"] == "seconds"


def test_a_real_run_of_train_gpt_is_read(data_folder, tmp_path):
    settings = {**TINY, "ITERATIONS": "4", "VAL_LOSS_EVERY": "2", "DATA_PATH": str(data_folder)}
    base = " ".join(f"{name}={value}" for name, value in settings.items())
    done = call(tmp_path, "--base", base, "--seeds", "1", OMP_NUM_THREADS="1")
    assert done.status == 0, done.err
    [run] = done.report()["runs"]
    assert run["val_bpb"] == done.row("base")["mean"]
    batch = int(TINY["TRAIN_BATCH_TOKENS"])
    assert [tokens for tokens, _ in run["val_curve"]] == [2 * batch, 4 * batch]
    assert run["train_curve"][-1][0] == 4 * batch
    assert run["steps"] == 4
    folder = data_folder.name
    assert run["data"].startswith(f"{folder} tokenizer:{folder}/tokenizer.model sha256:")
    assert run["val_bytes"] > 0
    assert run["bytes_total"] > 0
    log = Log(done.ablation / "base-seed1/logs/base-seed1.txt")
    score = log.score("final_int6_sliding_window")
    assert score.val_bpb == pytest.approx(run["val_bpb"], abs=1e-8)


# ---- What is resumed


def test_what_has_finished_is_not_run_again_and_the_rest_is(first, standin, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(first.folder, folder)
    done = call(
        folder,
        "--script",
        standin,
        "--base",
        BASE,
        "--seeds",
        "4",
        "NUM_LAYERS=10,13",
        "--keep-artifacts",
        STANDIN_MENDED="1",
    )
    assert done.status == 0
    assert "12 runs, 6 of them have finished before" in done.err
    for name in ("base-seed3", "num_layers_10-seed1"):
        assert done.run(name)["ended"] == first.run(name)["ended"]
    for name in ("base-seed4", "num_layers_13-seed1"):
        assert done.run(name)["ended"] > first.run("model_dim_384-seed3")["ended"]
    assert len(done.row("NUM_LAYERS=13")["val_bpb"]) == len(done.row("base")["val_bpb"]) == 4
    # Of the earlier call.
    assert len(done.row("MODEL_DIM=384")["val_bpb"]) == 3

    # Two of each of four, one and one run.
    kept = 2 * (4 + 1 + 1)
    assert len(list(folder.rglob("*.ptz"))) == kept
    call(folder, "--script", standin, "--base", BASE, "--seeds", "5,")
    assert len(list(folder.rglob("*.ptz"))) == kept


def test_the_plan_is_read_when_the_folder_is_ones_own(standin, tmp_path):
    late = Ablation(standin, "ITERATIONS=4", "tokens", tmp_path / "logs/ablations/ablation")
    call(tmp_path, "--script", standin, "--base", "ITERATIONS=4", "--seeds", "1", "QUANT=rows")
    with late.claim():
        assert late.known == [{}, {"QUANT": "rows"}]
        assert late.seeds == [1]
        assert not ablation_runs.unfinished([late.run(late.base, 1)], late)


def test_a_folder_takes_no_runs_of_another_script_or_base(first, standin, tmp_path):
    edited = tmp_path / "edited.py"
    edited.write_text(standin.read_text() + "# another\n")
    before = (first.ablation / "plan.json").read_text()
    for script, settings, message in (
        (edited, BASE, "another script_sha256"),
        (standin, BASE + " MODEL_DIM=96", "another base (MODEL_DIM=unset, not 96)"),
    ):
        done = call(first.folder, "--script", script, "--base", settings)
        assert done.status == 2
        assert message in done.err
        assert "use another --name" in done.err
    assert (first.ablation / "plan.json").read_text() == before


@pytest.mark.parametrize(
    "file, before, after, message",
    [
        ("base-seed2.json", '"seed": 2', '"seed": 5', "SEED is not as planned"),
        (
            "base-seed2.json",
            '"val_loss_every": 9',
            '"val_loss_every": 8',
            "VAL_LOSS_EVERY is not as planned",
        ),
        ("base-seed2.txt", "import", "import glob,", "its log begins with another script"),
        ("base-seed2.json", '"stages"', '"phases"', "KeyError: 'stages'"),
    ],
)
def test_a_finished_run_that_is_not_as_planned_is_neither_taken_nor_lost(
    first, standin, tmp_path, file, before, after, message
):
    shutil.copytree(first.ablation, tmp_path / "own")
    path = tmp_path / "own/base-seed2/logs" / file
    path.write_text(path.read_text().replace(before, after, 1))
    kept = path.read_text()
    done = call(tmp_path, "--script", standin, "--base", BASE, "--out", "own")
    assert done.status == 2
    assert message in done.err
    assert path.read_text() == kept


def test_a_folder_with_only_a_lock_is_taken(standin, tmp_path):
    (tmp_path / ".lock").touch()
    done = call(
        tmp_path, "--script", standin, "--base", "ITERATIONS=4", "--seeds", "1", "--out", tmp_path
    )
    assert done.status == 0, done.err


def test_two_do_not_work_in_one_folder(first, standin):
    other = Ablation(standin, BASE, "tokens", first.ablation)
    with other.claim():
        done = call(first.folder, "--script", standin, "--base", BASE, "--seeds", "9,")
    assert done.status == 2
    assert "is at work here" in done.err


# ---- What is published


def test_an_ablation_is_published_without_private_names(standin, tmp_path, monkeypatch):
    records = tmp_path / "records"
    data = tmp_path / "some one/data"
    for folder in (records, data):
        folder.mkdir(parents=True)
    (records / "README.md").write_text("<!-- leaderboard -->\n<!-- /leaderboard -->\n")
    monkeypatch.setattr(ablation_report, "RECORDS", records)
    target = records / "track_mine/2026-01-02_Ablation"
    arguments = [
        "--script",
        standin,
        "--base",
        "ITERATIONS=4 PARALLEL_START_LAYER=0",
        "--seeds",
        "1",
        "--name",
        "mine",
        "--publish",
        target,
        "NUM_LAYERS=10,13",
        "QUANT=rows",
    ]
    done = call(tmp_path / "run", *arguments, DATA_PATH=str(data))
    assert done.status == 1, done.err
    texts = {path.name: path.read_bytes() for path in target.iterdir()}
    assert set(texts) == {"README.md", "ablation.json", "ablation.png", "train_gpt.py"}
    assert texts["train_gpt.py"] == standin.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o755

    report = texts["README.md"].decode() + texts["ablation.json"].decode()
    assert "NUM_LAYERS=13" in report
    assert "DATA_PATH=data " in report
    assert "some one" not in report
    assert not re.search(r"(?<![\w.])/\w", report)
    assert str(tmp_path) not in report

    link = "- ablation: [mine](track_mine/2026-01-02_Ablation/)"
    assert link in (records / "README.md").read_text()
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    again = call(tmp_path / "run", *arguments, DATA_PATH=str(data))
    assert again.status == 2
    assert "exists already" in again.err
    assert again.err.count("\n") == 1


def test_an_outcome_without_figures_has_none():
    outcome = Outcome("x", {}, 1, ablation_outcomes.UNFINISHED)
    assert not outcome.finished
    assert outcome.label == "base"


def test_an_earlier_ablation_is_drawn_again_without_a_run(tmp_path):
    folder = ROOT / "records/track_pocket/2026-11-22_Ablation"
    done = call(tmp_path, "--redraw", folder, "--out", "plot.png")
    assert done.status == 0, done.err
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "| BACKOUT_ENABLED=0 | +0.00558 | [+0.00424, +0.00691] |" in done.out


@pytest.mark.parametrize("options", [("--out", "plot.png"), ()])
def test_what_cannot_be_drawn_is_said_in_one_line(options, tmp_path):
    done = call(tmp_path, "--redraw", tmp_path, *options)
    assert done.status == 2
    assert re.fullmatch(r"error: .*\n", done.err)
    assert list(tmp_path.iterdir()) == []
