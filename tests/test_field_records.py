"""Folders of the field: what must be found in the made-up ones, and what must not be said."""

from __future__ import annotations

import json

import pytest

import audit
from checks import FAILS, HOLDS, UNCHECKED, UNSTATED
from field_folder import FIELD, Folder
from field_record import FieldRecord
from review import review

EXPECTED = json.loads((FIELD / "expected.json").read_text())
# What expected.json calls some checks.
CHECKS = {"one log for three seeds": "seeds", "seed": "seeds"}
# What else follows from what is wrong: another script has another size.
FOLLOWS = {"another_script_ran": {"code size"}}


@pytest.fixture
def folder(tmp_path) -> Folder:
    """A folder in which nothing is wrong."""
    return Folder(tmp_path)


# ---- The made-up folders
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_what_is_wrong_is_found_and_nothing_else(name):
    found = review(FieldRecord(FIELD / name))
    wanted = {CHECKS.get(check, check) for check in EXPECTED[name]["find"]}
    failures = {verdict.check for verdict in found.failures}
    assert failures - FOLLOWS.get(name, set()) == wanted, found.failures
    assert found.track == EXPECTED[name].get("track", "A")


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_exit_status_says_whether_something_does_not_hold(name, capsys):
    assert audit.main([str(FIELD / name)]) == int(bool(EXPECTED[name]["find"]))
    assert "Traceback" not in capsys.readouterr().err


def test_every_made_up_folder_is_expected_something_of():
    folders = {path.name for path in FIELD.iterdir() if path.is_dir()}
    assert folders == set(EXPECTED)


@pytest.mark.parametrize(
    "name, check, figures",
    [
        ("over_600_seconds", "training time", ("604.128", "train_seed42.log:", "600 s")),
        ("two_gpus", "hardware", ("8xH100", "submission.json hardware", "world_size 2", ".log:48")),
        ("over_the_cap_with_its_code", "code size", ("68,000", "train_seed42.log:", "789")),
        ("best_seed_as_mean", "mean", ("1.13651", "README.md:3", "1.1374")),
        (
            "score_and_parameters_of_another_run",
            "parameters",
            ("26,501,720 (submission.json blurb)", "21,778,504 (train.log:"),
        ),
    ],
)
def test_both_figures_are_quoted_with_their_places(name, check, figures):
    failures = review(FieldRecord(FIELD / name)).failures
    [found] = [verdict for verdict in failures if verdict.check == check]
    for figure in figures:
        assert figure in found.text, found


def test_a_difference_in_white_space_is_named_as_that():
    found = {
        verdict.check: verdict
        for verdict in review(FieldRecord(FIELD / "source_differs_by_final_newline")).verdicts
    }
    assert found["source"].state == HOLDS and "white space alone" in found["source"].text


# ---- What is missing is missing
def test_what_is_not_stated_is_not_wrong(folder):
    (folder.path / "submission.json").write_text('{"val_bpb": null, "seed_results": {"42": null}}')
    folder.readme("# Mine\n")
    states = {verdict.check: verdict.state for verdict in folder.review().verdicts}
    assert FAILS not in states.values()
    assert states["score"] == states["mean"] == states["README"] == UNSTATED


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "",
        '{"val_bpb": NaN}',
        '{"bytes_total": 1e400, "steps": Infinity, "val_loss": "inf"}',
        '{"artifact_bytes": %s}' % ("9" * 400),
    ],
)
def test_a_submission_that_cannot_be_read_is_no_failure(text, folder):
    (folder.path / "submission.json").write_text(text)
    assert folder.failures() == []


def test_a_submission_may_have_another_file_name(folder):
    """If one file alone has its fields; a table of results beside it has not."""
    described = json.dumps({**folder.stated, "val_bpb": 1.1376, "name": "mine"})
    (folder.path / "submission.json").unlink()
    (folder.path / "results.json").write_text('{"val_bpb": 9.0, "seed": 42}')
    (folder.path / "run_v2.json").write_text(described)
    found = folder.verdict("score")
    assert found.state == FAILS and "1.1376 (run_v2.json val_bpb)" in found.text
    (folder.path / "run_v3.json").write_text(described)
    assert "json" not in folder.verdict("score").text


def test_without_logs_nothing_is_accused(folder):
    for path in folder.path.glob("*.log"):
        path.unlink()
    assert folder.failures() == []
    assert folder.verdict("score").state == folder.verdict("seeds").state == UNCHECKED


def test_a_log_that_is_named_and_not_here_is_missing(folder):
    folder.log(1337).unlink()
    folder.log(2024).unlink()
    folder.state(seeds=None, seed_results=None, val_bpb=1.1001)
    folder.readme("Run as in `train_main.log`\n")
    found = folder.verdict("score")
    assert found.state == UNCHECKED and "train_main.log, which README.md names" in found.text


def test_a_log_without_lines_and_binary_files_are_passed_over(folder):
    (folder.path / "empty.log").write_text("")
    (folder.path / "notes.txt").write_text("nothing that a run says\n")
    (folder.path / "odd.log").write_bytes(bytes(range(256)) * 10)
    assert folder.failures() == []


# ---- Scores
def test_a_claim_may_be_cut_or_rounded(folder):
    for value in (1.1374, 1.13741, 1.13742, 1.1374154):
        folder.state(val_bpb=value)
        assert folder.verdict("score").state == HOLDS, value
    folder.state(val_bpb=1.1376)
    assert folder.verdict("score").state == FAILS


def test_another_last_score_is_said_as_that(folder):
    folder.state(val_bpb=1.15839566, seeds=[42], seed_results=None)
    found = folder.verdict("score")
    assert found.state == HOLDS and "final_int6_roundtrip" in found.text
    assert "the last score of that log is 1.13739566 (final_int6_sliding_window" in found.text


def test_a_score_before_packing_is_none_of_the_artifact(folder):
    folder.add_to_logs("DIAGNOSTIC post_ema val_loss:1.9100 val_bpb:1.1312 eval_time:1ms", "peak")
    folder.state(val_bpb=1.1312, seed_results=None)
    found = folder.verdict("score")
    assert found.state == FAILS and "before packing" in found.text
    # In README.md alone such a score need not be that of the record.
    folder.state(val_bpb=None)
    folder.readme("# Mine\n\nval_bpb at stop: 1.1374\n\nval_bpb 1.1312\n")
    assert folder.verdict("score").state == UNCHECKED
    folder.state(val_bpb=1.1312)
    # A log that ends there proves neither.
    for path in folder.path.glob("*.log"):
        path.write_text(
            "\n".join(line for line in path.read_text().splitlines() if "final" not in line)
        )
    assert folder.verdict("score").state == UNCHECKED


def test_the_score_before_packing_is_none_of_a_packed_model(folder):
    """The logs end their training at 1.1494 and have a roundtrip of 1.15839566."""
    for value, state in (
        (1.1494, HOLDS),
        (1.14940, HOLDS),
        (1.15839566, FAILS),
        (1.1512, UNCHECKED),
    ):
        folder.state(pre_quant_val_bpb=value)
        assert folder.verdict("before packing").state == state, value
    folder.state(pre_quant_val_bpb=1.15839566)
    assert "of a packed model" in folder.verdict("before packing").text


def test_a_score_of_a_log_of_its_own_counts(folder):
    """An evaluation beside the training, whose log states bits a byte and nothing else."""
    for seed in (42, 1337, 2024):
        text = f"an evaluation\nval_bpb = {1.09 + seed / 1e6:.8f}\nLoop: 50.1s\n"
        (folder.path / f"ngram_eval_seed{seed}.log").write_text(text)
    results = {str(seed): dict(val_bpb=round(1.09 + seed / 1e6, 8)) for seed in (42, 1337, 2024)}
    folder.state(val_bpb=1.091134, val_loss=None, seed_results=results)
    folder.readme("Mean 1.09113 over 3 seeds\n")
    assert folder.failures() == []
    assert folder.verdict("score").state == folder.verdict("seed scores").state == HOLDS
    folder.state(val_bpb=1.0811)
    assert "score" in folder.failures()


@pytest.mark.parametrize(
    "results",
    [
        dict(seeds={"42": dict(val_bpb=1.13739566), "7": dict(val_bpb=9.0)}),
        dict(results=dict(seed_42=dict(val_bpb=1.13739566))),
        dict(results=dict(seeds={"42": dict(val_bpb=1.1374)}, mean_val_bpb=1.13742)),
        dict(runs=[dict(seed=42, sliding_bpb=1.13739566, pre_quant_bpb=9.0)]),
        dict(val_bpb_seeds={"42": 1.1374}),
        dict(seeds=[42, 1337], per_seed_val_bpb=["1.13739566", "1.13834324"]),
    ],
)
def test_scores_of_seeds_are_found_in_all_shapes(results, folder):
    folder.state(seeds=None, seed_results=None)
    folder.state(**results)
    assert folder.verdict("seed scores").state == HOLDS
    text = (folder.path / "submission.json").read_text()
    (folder.path / "submission.json").write_text(
        text.replace("1.1373", "1.1273").replace("1.1374,", "1.1274,").replace("1.1374}", "1.1274}")
    )
    assert folder.verdict("seed scores").state == FAILS


def test_scores_of_other_runs_are_none_of_the_seeds(folder):
    folder.state(seed_results_pre_fix={"42": dict(val_bpb=9.0)}, baseline_seeds={"42": 8.0})
    assert folder.verdict("seed scores").state == HOLDS
    folder.state(seed_results=None)
    assert folder.verdict("seed scores").state == UNSTATED


def test_a_mean_of_the_readmes_seeds_is_none_of_the_logs_alone(folder):
    """One of the three logs is not here, and its score is far from the others'."""
    folder.log(2024).unlink()
    folder.state(val_bpb=1.1186, val_loss=None, seeds=None, seed_results=None)
    table = "| seed | val_bpb |\n|-|-|\n| 42 | 1.1374 |\n| 1337 | 1.1383 |\n| 2024 | 1.0801 |\n"
    folder.readme(f"# Mine\n\nval_bpb 1.1186 (3-seed mean)\n\n{table}")
    found = folder.verdict("score")
    assert found.state == UNCHECKED and "the mean of the seeds" in found.text
    folder.readme("# Mine\n\nval_bpb 1.1186 (3-seed mean)\n")
    assert "score" in folder.failures()


def test_a_model_that_was_packed_again_has_no_log_of_its_score(folder):
    folder.state(val_bpb=1.14001234, val_loss=1.9251, seeds=[42], seed_results=None)
    for seed in (1337, 2024):
        folder.log(seed).unlink()
    text = "# Mine\n\nThe run scored `1.13739566`{}; the submission scores `1.14001234`.\n"
    folder.readme(text.format(", and was repacked"))
    states = {verdict.check: verdict.state for verdict in folder.review().verdicts}
    assert states["score"] == states["loss"] == UNCHECKED
    folder.readme(text.format(""))
    assert "score" in folder.failures()


def test_one_seeds_score_that_nobody_calls_the_mean_is_none(folder):
    folder.state(val_bpb=1.13651)
    folder.readme("# Mine\n\nBest seed: val_bpb 1.13651 of three\n")
    assert folder.verdict("mean").state == UNSTATED
    assert folder.failures() == []


def test_the_mean_may_be_of_another_figure_of_the_seeds(folder):
    results = folder.stated["seed_results"]
    for value, seed in enumerate(results.values()):
        seed["ttt_bpb_final"] = 1.1201 + value / 100
    folder.state(val_bpb=1.1301, seed_results=results)
    folder.readme("Mean 1.1301 over 3 seeds\n")
    found = folder.verdict("mean")
    assert found.state == HOLDS and "ttt_bpb_final" in found.text


def test_the_score_of_the_readme_is_not_the_loss_beside_it(folder):
    folder.state(val_bpb=None, seed_results=None)
    for text in ("val_loss 1.92050001, val_bpb 1.13742", "**1.13742** BPB, three seeds"):
        folder.readme(f"# Mine\n\n{text}\n")
        found = folder.verdict("score")
        assert found.state == HOLDS and "1.13742 (README.md:3)" in found.text, text


def test_a_text_that_names_mean_and_best_calls_neither_the_other(folder):
    folder.state(val_bpb=1.13651)
    folder.readme("Seed 2024: 1.13651; mean over seeds: 1.13742\n")
    assert folder.failures() == []


def test_runs_that_are_planned_are_not_claimed(tmp_path):
    folder = Folder(tmp_path, "one_old_log")
    folder.readme("val_bpb 1.13834, one seed. Pending: the 3-seed mean\n")
    assert folder.failures() == []


def test_a_deviation_may_divide_by_n_or_not(folder):
    for value, state in ((0.000918, HOLDS), (0.00075, HOLDS), (0.0009, HOLDS), (0.0042, FAILS)):
        folder.state(val_bpb_std=value)
        assert folder.verdict("deviation").state == state, value


# ---- Seeds
def test_logs_of_other_runs_in_the_folder_are_not_the_records(folder):
    text = folder.log().read_text().replace("seed:42", "seed:7").replace("600012ms", "900012ms")
    (folder.path / "ablation_no_swa.log").write_text(text.replace("15650789", "17650789"))
    assert folder.failures() == []


def test_a_seed_without_a_log_cannot_be_checked(folder):
    folder.log(2024).unlink()
    found = folder.verdict("seeds")
    assert found.state == UNCHECKED and "2024" in found.text
    assert folder.failures() == []


def test_names_that_count_the_logs_are_no_seeds(folder):
    for number, seed in enumerate((42, 1337, 2024), 1):
        folder.log(seed).rename(folder.path / f"run_seed{number}.log")
    folder.state(seeds=None, seed_results=None)
    folder.readme(
        "| seed | val_bpb |\n|-|-|\n| 42 | 1.1374 |\n| 1337 | 1.1383 |\n| 2024 | 1.1365 |\n"
    )
    assert folder.failures() == []
    folder.readme("Mean 1.13742 over 3 seeds\n")
    assert folder.verdict("seeds").state == UNCHECKED
    # Numbers that do not count up are seeds.
    (folder.path / "run_seed3.log").rename(folder.path / "run_seed7.log")
    assert folder.failures() == ["seeds"]


def test_one_log_for_several_seeds_is_found_unless_others_are_named(folder):
    folder.log(1337).unlink()
    folder.log(2024).unlink()
    assert folder.failures() == ["seeds"]
    folder.readme("Mean 1.13742; logs: `train_seed1337.log`, `train_seed2024.log`\n")
    assert folder.failures() == []
    assert "train_seed2024.log, which README.md names" in folder.verdict("seeds").text


def test_of_several_logs_of_a_seed_those_count_whose_mean_is_claimed(folder):
    text = folder.log(42).read_text().replace("1.13739566", "1.13919566")
    (folder.path / "train_a_first.log").write_text(text)
    folder.state(seeds=None, seed_results=None, val_loss=None)
    found = folder.verdict("score")
    assert found.state == HOLDS and "1.13739566" in found.text and "1.139195" not in found.text
    folder.state(val_bpb=1.13802)
    assert "1.139195" in folder.verdict("score").text
    folder.state(val_bpb=1.13901)
    assert folder.verdict("score").state == FAILS


def test_one_log_may_hold_all_runs(folder):
    text = ""
    for seed in (42, 1337, 2024):
        text += folder.log(seed).read_text().partition("=" * 100 + "\n")[2]
        folder.log(seed).unlink()
    (folder.path / "runs.log").write_text(text)
    assert folder.failures() == []
    folder.state(seed_results=None, seeds=None)
    found = folder.verdict("score")
    assert found.state == HOLDS and "of 3 runs" in found.text


def test_figures_of_a_run_that_was_stopped_are_found_in_its_log(folder):
    """The score is of one run, its steps and bytes of another one, whose log is here as well."""
    text = folder.log().read_text().partition("=" * 100 + "\n")[2]
    lines = [line for line in text.splitlines() if not line.startswith("final")]
    stopped = "\n".join(lines).replace("7012", "6606").replace("15650789", "15875110")
    (folder.path / "train_seed42_stopped.log").write_text(stopped)
    results = folder.stated["seed_results"]
    results["42"].update(steps=6606, artifact_bytes=15875110)
    folder.state(seed_results=results)
    assert folder.failures() == []


def test_a_seed_in_the_source_is_not_the_one_that_ran(folder):
    for path in [folder.path / "train_gpt.py", *folder.path.glob("*.log")]:
        path.write_text(path.read_text().replace("# filler line 0\n", "# run with seed: 5\n"))
    assert folder.verdict("seeds").state == HOLDS


def test_parameters_stand_in_objects_and_in_tables_of_several_runs(folder):
    folder.state(model=dict(total_params=26501720))
    assert "model.total_params" in folder.verdict("parameters").text
    folder.state(model=None)
    folder.readme(
        "| Metric | First | Mine |\n|-|-|-|\n| model_params | 17,059,912 | 26,501,720 |\n"
    )
    assert folder.verdict("parameters").state == HOLDS
    folder.readme("| Metric | Mine |\n|-|-|\n| model_params | 17,059,912 |\n")
    assert folder.failures() == ["parameters"]


def test_parameters_may_leave_out_what_is_not_exported(folder):
    folder.add_to_logs("mtp_num_heads:1 mtp_params:524288", "world_size")
    folder.state(model_params=26501720 - 524288)
    found = folder.verdict("parameters")
    assert found.state == HOLDS and "without 524,288" in found.text
    folder.state(model_params=26501720 - 524289)
    assert folder.failures() == ["parameters"]


# ---- Times and machine
def test_a_non_record_has_no_limit(tmp_path):
    folder = Folder(tmp_path, "over_600_seconds", track="non_record_16mb")
    folder.state(track=None)
    assert folder.failures() == []
    folder.state(compliance=dict(train_under_600s=True))
    assert folder.failures() == ["training time"]


def test_a_folder_without_a_track_has_the_limit_that_its_log_states(tmp_path):
    folder = Folder(tmp_path, "over_600_seconds", track="")
    folder.state(track=None)
    assert folder.failures() == ["training time"]
    folder.change_logs("max_wallclock_seconds:600.000", "max_wallclock_seconds:0.000")
    assert folder.verdict("training time").state == UNCHECKED


EVALUATION_TIMES = ("eval_time_s", "eval_seconds", "evaluation_time_seconds", "ttt_eval_time_sec")


@pytest.mark.parametrize("name", EVALUATION_TIMES)
def test_an_evaluation_time_is_a_pass_or_several_or_more(name, folder):
    """The logs have passes of 2.1 and 71.2 seconds, of which the second is claimed."""
    for value, state in ((71.2, HOLDS), (71, HOLDS), (73.3, HOLDS), (95.0, HOLDS), (61.0, FAILS)):
        folder.state(**{name: value})
        found = folder.verdict("evaluation time")
        assert found.state == state, value
    assert f"61.0 s (submission.json {name}), but 71.2 s (train_seed" in found.text


def test_an_evaluation_time_may_be_in_milliseconds_or_minutes(folder):
    for changes, state in (
        (dict(eval_time_ms=71_234), HOLDS),
        (dict(eval_time_ms=61_000), FAILS),
        (dict(eval_minutes=1.2), HOLDS),
        (dict(eval_minutes=0.5), FAILS),
        # Neither a limit nor a time without a unit says what was measured, nor is a pass all.
        (dict(eval_time_limit_s=1, eval_budget_seconds=1, eval_time=1), HOLDS),
        (dict(roundtrip_eval_time_s=1, ttt_time_s=1, train_eval_s=1, eval_s_per_step=1), HOLDS),
    ):
        folder.state(eval_time_ms=None, eval_minutes=None)
        folder.state(**changes)
        assert folder.verdict("evaluation time").state == state, changes


def test_an_evaluation_time_of_a_seed_is_compared_with_that_seeds_log(folder):
    results = folder.stated["seed_results"]
    results["2024"]["eval_time_s"] = 50.0
    folder.state(seed_results=results)
    found = folder.verdict("evaluation time")
    assert found.state == FAILS and "train_seed2024.log" in found.text
    folder.log(2024).unlink()
    assert folder.failures() == []


def test_an_evaluation_time_over_the_limit_is_found_where_no_log_times_it(folder):
    folder.state(eval_time_s=655.0)
    found = folder.verdict("evaluation time")
    assert found.state == FAILS and "655.0 s (submission.json eval_time_s), over" in found.text
    folder.state(hardware="1xH100")
    assert folder.verdict("evaluation time").state == UNCHECKED
    for path in folder.path.glob("*.log"):
        path.unlink()
    folder.state(eval_time_s=409, hardware="8xH100")
    found = folder.verdict("evaluation time")
    assert found.state == UNCHECKED and "no log times" in found.text


def test_all_passes_together_may_be_over_the_limit(folder):
    folder.change_logs("eval_time:2101ms", "eval_time:570000ms")
    folder.state(eval_time_s=641.2)
    found = folder.verdict("evaluation time")
    assert found.state == UNCHECKED and "all passes of" in found.text
    assert folder.failures() == []


def test_other_hardware_that_is_said_is_not_wrong(tmp_path):
    folder = Folder(tmp_path, "two_gpus")
    folder.state(hardware="2xH100 SXM (development); 8xH100 pending")
    assert folder.failures() == []


def test_a_log_of_another_machine_beside_the_claimed_one_is_none_of_the_record(folder):
    text = folder.log().read_text().replace("world_size:8", "world_size:1")
    text = text.replace("1.13739566", "1.43739566").replace("600012ms", "900012ms")
    (folder.path / "train_1gpu_seed42.log").write_text(text)
    assert folder.failures() == []


def test_the_gpus_that_the_machine_lists_count(folder):
    line = "|   0  NVIDIA {}          On  |   00000000:08:00.0 Off |                    0 |"
    folder.add_to_logs(line.format("H100 80GB HBM3"), "Running")
    assert folder.failures() == []
    folder.change_logs("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe")
    folder.state(hardware="8xH100_PCIe")
    assert folder.failures() == []
    folder.state(hardware="8xH100")
    folder.change_logs("NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB")
    assert folder.failures() == ["hardware"]


# ---- Text
LOADERS = (
    "train_loader:dataset:fineweb10B_sp1024 train_shards:80\n"
    "val_loader:shards pattern=./data/fineweb_val_*.bin tokens:{}"
)


def test_the_whole_split_and_its_bytes_hold(folder):
    folder.add_to_logs(LOADERS.format(62021632))
    assert folder.verdict("validation split").state == HOLDS
    found = folder.verdict("bytes of text")
    assert found.state == HOLDS and "151,0" in found.text


def test_the_export_that_holds_validation_text_is_told(folder):
    folder.add_to_logs(
        "train_shards: 1499\n  datasets_dir: ./fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
    )
    found = folder.verdict("training shards")
    assert found.state == UNCHECKED and "#2127" in found.text
    folder.change_logs("train_shards: 1499", "train_shards: 80")
    assert folder.verdict("training shards").state == HOLDS


def test_a_part_of_the_split_is_found(folder):
    folder.add_to_logs(LOADERS.format(1048576))
    assert folder.failures() == ["validation split"]


def test_bytes_that_are_not_there_are_found(folder):
    """A table that counts each space twice: a sixth more bytes, and so many fewer bits a byte."""
    folder.add_to_logs(LOADERS.format(62021632))
    for path in folder.path.glob("*.log"):
        lines = []
        for line in path.read_text().splitlines():
            label, mark, rest = line.partition("val_bpb:")
            if mark and line.startswith("final"):
                figure, space, end = rest.partition(" ")
                line = f"{label}{mark}{float(figure) / 1.17:.8f}{space}{end}"
            lines.append(line)
        path.write_text("\n".join(lines))
    assert "bytes of text" in folder.failures()
    assert "+17" in folder.verdict("bytes of text").text


# ---- Bytes
def test_a_total_may_be_the_model_alone_the_largest_or_the_mean(folder):
    folder.change_logs("15650789", "15650785", 42)
    for value in (15650789, 15650785, 15650787, 15650788, 15650000, 15651000):
        # 15,650,787 and 15,650,788 are the mean, cut and rounded.
        folder.state(bytes_total=value, seed_results=None)
        assert folder.verdict("bytes").state == HOLDS, value
    folder.state(bytes_total=15640789)
    assert folder.failures() == ["bytes"]


def test_largest_and_mean_of_the_totals_have_names_of_their_own(folder):
    folder.change_logs("15650789", "15650785", 42)
    right = dict(artifact_bytes_max=15650789, artifact_bytes_mean=15650787.67)
    folder.state(bytes_total=None, seed_results=None, **right)
    assert "artifact_bytes_max" in folder.verdict("bytes").text
    assert folder.failures() == []
    for name, value in (("artifact_bytes_max", 15640789), ("artifact_bytes_mean", 15650700)):
        folder.state(**{**right, name: value})
        found = folder.verdict("bytes")
        assert found.state == FAILS and name in found.text
    folder.state(artifact_bytes_max=16_000_001, artifact_bytes_mean=None)
    assert "cap" in folder.failures()


def test_a_total_of_a_seed_without_a_log_is_that_of_its_claim(folder):
    results = folder.stated["seed_results"]
    results["2024"]["artifact_bytes"] = 15700001
    folder.state(seed_results=results, bytes_total=15700001)
    folder.log(2024).unlink()
    assert folder.failures() == []


def test_totals_over_the_cap_are_found_where_no_log_is(folder):
    results = folder.stated["seed_results"]
    results["2024"]["artifact_bytes"] = 16453242
    folder.state(seed_results=results)
    folder.log(2024).unlink()
    found = folder.verdict("cap")
    assert found.state == FAILS and "16,453,242 (submission.json seed_results.2024" in found.text


def test_of_several_packings_the_claimed_one_counts(folder):
    folder.add_to_logs("Total submission size int8+zlib: 17863489 bytes", "final_int6_roundtrip ")
    assert folder.failures() == []


def test_numbered_objects_that_are_no_seeds_are_none(folder):
    folder.state(seeds=None, seed_results=None, layers={"0": dict(width=1), "1": dict(width=2)})
    assert folder.verdict("seed scores").state == UNSTATED
    for seed in (1337, 2024):
        folder.log(seed).unlink()
    folder.state(val_bpb=1.13739566)
    folder.readme("# Mine\n")
    assert folder.failures() == []


def test_bytes_of_code_may_be_the_scripts_or_the_logs(folder):
    folder.state(bytes_code=789)
    assert folder.verdict("code claim").state == HOLDS
    folder.state(bytes_code=800)
    assert folder.failures() == ["code claim"]


def test_files_that_are_counted_are_no_more_code(folder):
    (folder.path / "kernel.cu").write_text("x" * 211)
    assert folder.failures() == ["files outside of the counted bytes"]
    folder.change_logs("Code size: 789 bytes", "Code size: 1000 bytes")
    assert folder.failures() == []


def test_a_total_in_a_line_of_another_shape_is_one(folder):
    folder.state(bytes_total=15_886_378, seed_results=None)
    assert folder.failures() == ["bytes"]
    folder.add_to_logs("submission_with_its_table: 15,886,378 bytes (15.15 MB)", "peak")
    found = folder.verdict("bytes")
    assert found.state == HOLDS and "train_seed42.log:" in found.text


def test_a_total_may_have_code_that_nothing_counts(folder):
    (folder.path / "train_gpt.py").unlink()
    for path in folder.path.glob("*.log"):
        lines = path.read_text().partition("=" * 100 + "\n")[2].splitlines()
        kept = [line for line in lines if not line.startswith(("Code size", "Total"))]
        path.write_text("\n".join(kept))
    folder.state(bytes_total=15_699_999, seed_results=None)
    assert folder.verdict("bytes").state == UNCHECKED
    folder.state(bytes_total=16_900_000)
    assert "bytes" in folder.failures()


def test_a_script_for_readers_is_not_the_one_that_counts(folder):
    script = folder.path / "train_gpt.py"
    (folder.path / "train_gpt_human.py").write_text(script.read_text() + "# explained\n" * 99)
    assert folder.failures() == []
    script.unlink()
    assert folder.failures() == []
    assert "no script is here" in folder.verdict("code size").text


def test_code_of_scripts_that_are_not_here_may_be_counted(folder):
    (folder.path / "train_gpt.py").unlink()
    folder.state(bytes_code=1789)
    assert folder.failures() == ["code claim"]
    folder.readme("# Mine\n\nScored by `python score_it.py`\n")
    found = folder.verdict("code claim")
    assert found.state == UNCHECKED and "score_it.py, which README.md names" in found.text


def test_a_loss_that_is_bits_a_byte_is_named_as_that(folder):
    folder.state(val_loss=1.1374)
    found = folder.verdict("loss")
    assert found.state == FAILS and "it is bits a byte" in found.text


def test_a_readme_that_heads_with_the_mean_is_no_other(folder):
    folder.state(val_bpb=1.1365, val_loss=1.9190, mean_val_bpb=1.1374)
    folder.readme("# Mine\n\nval_bpb 1.1374\n")
    assert "mean_val_bpb" in folder.verdict("README").text
    assert folder.verdict("README").state == UNSTATED
    folder.state(mean_val_bpb=None)
    assert "the mean over the logs" in folder.verdict("README").text
    folder.readme("# Mine\n\nval_bpb 1.1294\n")
    assert folder.failures() == ["README"]


def test_a_readme_with_another_score_is_found(folder):
    folder.readme("# Mine\n\nval_bpb: 1.1274, three seeds\n")
    assert folder.failures() == ["README"]
    folder.readme("# Mine\n\nval_bpb of the baseline: 1.2244\n")
    assert folder.failures() == []


# ---- What folders of the field leave out, or explain
def test_a_comma_too_many_hides_no_claim(folder):
    text = json.dumps({**folder.stated, "val_bpb": 1.1376})
    (folder.path / "submission.json").write_text(text.removesuffix("}") + ",\n}")
    verdicts = {verdict.check: verdict.state for verdict in folder.review().verdicts}
    assert (verdicts["submission.json"], verdicts["score"]) == (UNCHECKED, FAILS)


def test_who_tells_of_the_mean_over_seeds_claims_the_time_of_each(folder):
    blurb = "It improves much. Mean sliding val_bpb=1.1374 across 3 seeds."
    folder.state(seeds=None, seed_results=None, val_bpb=1.13739566, blurb=blurb)
    folder.change_logs("train_time:600012ms", "train_time:603198ms", 1337)
    found = folder.verdict("training time")
    assert found.state == FAILS and "603.198 s (train_seed1337.log" in found.text


def test_steps_time_and_model_of_the_run_are_compared(folder):
    folder.state(step_stop=7012, wallclock_seconds=600.012, bytes_model_int6_zstd=15650000)
    assert folder.failures() == []
    folder.state(step_stop=4108, wallclock_seconds=580.012, bytes_model_int6_zstd=14518775)
    assert folder.failures() == ["steps", "training time", "bytes"]
    # A rounded figure, and the clock of all the program, may mean something else.
    folder.state(step_stop=7000, wallclock_seconds=895.187, bytes_model_int6_zstd=None)
    assert folder.failures() == []


def test_the_model_alone_is_no_total(folder):
    folder.change_logs("15650000", "15650123")
    folder.change_logs("15650789", "15650912")
    folder.state(bytes_total=15650912, seed_results=None)
    assert folder.verdict("bytes").state == HOLDS
    folder.state(bytes_total=15650123)
    found = folder.verdict("bytes")
    assert found.state == FAILS and "is the model alone" in found.text
    folder.state(bytes_total=None, artifact_bytes=15650123)
    assert folder.verdict("bytes").state == HOLDS


def test_a_script_that_cannot_train_is_not_accused(folder):
    (folder.path / "train_gpt.py").unlink()
    (folder.path / "probe.py").write_text("import os\n")
    assert folder.failures() == []
    assert folder.verdict("code size").state == folder.verdict("source").state == UNCHECKED


def test_of_variants_with_one_seed_the_claimed_one_is_the_run(folder):
    """Its score is that before packing: that is what is wrong, and not the others' code."""
    folder.change_logs("seed:2024", "seed:42", 2024)
    folder.change_logs("seed:1337", "seed:42", 1337)
    folder.change_logs("Code size: 789", "Code size: 991", 1337)
    for number, seed in enumerate((1337, 42, 2024)):
        folder.log(seed).rename(folder.path / f"variant_{number}.log")
    folder.state(seeds=None, seed_results=None, val_bpb=1.1485, val_loss=1.9390)
    folder.readme("# Mine\n")
    assert folder.failures() == ["score"]
    assert "before packing" in folder.verdict("score").text


def test_a_score_in_a_table_of_results_is_in_no_log_and_not_wrong(folder):
    folder.state(val_bpb=1.12345678, val_loss=None, seeds=None, seed_results=None)
    folder.readme("# Mine\n")
    assert folder.failures() == ["score"]
    (folder.path / "eval.csv").write_text("name,val_bpb\nmine,1.12345678\n")
    found = folder.verdict("score")
    assert found.state == UNCHECKED and "eval.csv" in found.text


def test_counts_that_the_readme_explains_are_not_wrong(folder):
    folder.state(bytes_total=15_555_555, seed_results=None)
    folder.change_logs("15650789", "16050789")
    folder.change_logs("15650000", "16050000")
    assert folder.failures() == ["bytes", "cap"]
    folder.readme("# Mine\n\nPacked again: 15,555,555 bytes; the logs have 16050789\n")
    assert folder.verdict("bytes").state == folder.verdict("cap").state == UNCHECKED


def test_code_that_is_counted_compressed_is_not_proven_over_the_cap(folder):
    script = folder.path / "train_gpt.py"
    script.write_text(script.read_text() + "# filler\n" * 50_000)
    for log in folder.path.glob("*.log"):
        lines = log.read_text().replace("Code size: 789", "Code size (compressed): 789")
        log.write_text(lines[lines.index("seed:") :])
    found = folder.verdict("cap")
    assert found.state == UNCHECKED and "compressed" in found.text


def test_scripts_of_seeds_may_differ_in_what_is_written_into_them(folder):
    folder.change_logs('"SEED", 1337', '"SEED", 2024', 2024)
    found = folder.verdict("source")
    assert found.state == UNCHECKED and "lines" in found.text
    folder.change_logs('"SEED", 1337', '"SEED", 2024', 42, 1337)
    assert folder.verdict("source").state == FAILS


def test_blank_lines_are_white_space(folder):
    script = folder.path / "train_gpt.py"
    script.write_text(script.read_text().replace("import os\n", "import os\n\n\n"))
    assert folder.failures() == []
    assert "white space alone" in folder.verdict("source").text


def test_training_and_evaluation_may_have_logs_of_their_own(folder):
    for seed in (42, 1337, 2024):
        lines = folder.log(seed).read_text().splitlines(keepends=True)
        scored = [line for line in lines if line.startswith(("seed:", "final_"))]
        (folder.path / f"eval_seed{seed}.log").write_text("".join(scored))
        folder.log(seed).write_text("".join(line for line in lines if line[:6] != "final_"))
    states = {verdict.check: verdict.state for verdict in folder.review().verdicts}
    assert FAILS not in states.values()
    for check in ("score", "training time", "bytes", "cap"):
        assert states[check] == HOLDS, check


def test_one_run_that_is_claimed_is_one_whatever_means_are_told(folder):
    folder.state(seeds=[42], seed_results=None, val_bpb=1.13739566, val_loss=1.9205)
    folder.readme("# Mine\n\nSeed 42: 1.13739566. The mean of 3 seeds was 1.13742\n")
    for seed in (1337, 2024):
        folder.log(seed).unlink()
    assert folder.failures() == []


@pytest.mark.parametrize("name", ["ppm_native_enabled", "ngram_tilt_enabled", "ttt_enabled"])
def test_what_adapts_is_of_track_b(name, folder):
    folder.add_to_logs(f"  {name}: True")
    assert folder.review().track == "B"
