"""Tables of results in README.md: read where they are plain, and held against logs and json."""

from __future__ import annotations

import pytest

from checks import FAILS, HOLDS, UNCHECKED, UNSTATED
from field_folder import Folder
from readme_tables import cell_of, cells_by_seed, quantity_of

TABLE = """# Mine

## Results

| Seed | Steps | ms/step | **val_bpb** | Artifact |
|:-----|------:|---------|-------------|----------|
| 42   | 7,012 | 85.57ms | **1.1374**  | 15,650,789 ✅ |
| 1337 | 7012  | 85.6    | **1.1383**  | 15,650,789 |
| 2024 | 7,012 | -       | 1.13651 (best) | 15.65 MB |
| **Mean** | | | **1.1379** | |
"""


@pytest.fixture
def folder(tmp_path) -> Folder:
    """A folder in which nothing is wrong, with a table of results."""
    folder = Folder(tmp_path)
    folder.readme(TABLE)
    return folder


def test_a_table_whose_figures_are_those_of_the_logs_holds(folder):
    found = folder.verdict("README tables")
    assert found.state == HOLDS and found.text.startswith("9 figures")
    assert folder.failures() == []


@pytest.mark.parametrize(
    "right, wrong, told",
    [
        ("| 42   | 7,012", "| 42   | 7,112", "7,112 (README.md:7, Steps of seed 42), but 7,012 ("),
        ("85.57ms", "75.57ms", "ms/step of seed 42), but 85.6 ms by train_seed42.log"),
        ("**1.1374**", "**1.1354**", "1.1354 (README.md:7, val_bpb of seed 42), but 1.13739566 ("),
        ("15,650,789 ✅", "15,550,789", "Artifact of seed 42), but 15,650,789 (train_seed42.log:"),
    ],
)
def test_a_figure_that_its_log_contradicts_is_found_with_both_places(right, wrong, told, folder):
    assert right in TABLE
    folder.readme(TABLE.replace(right, wrong))
    found = folder.verdict("README tables")
    assert found.state == FAILS and told in found.text


def test_figures_may_be_rounded_and_of_any_pass_of_the_log(folder):
    for figure in ("1.137", "1.14", "1.13739566", "1.1584"):
        folder.readme(TABLE.replace("**1.1374**", figure))
        assert folder.verdict("README tables").state == HOLDS, figure
    folder.readme(TABLE.replace("7,012", "7,000").replace("15,650,789", "15,651,000"))
    assert folder.verdict("README tables").state == HOLDS


@pytest.mark.parametrize(
    "heading",
    [
        "Δ bpb",
        "EMA bpb",
        "val_bpb of PR #549",
        "TTT bpb",
        "tilted bpb",
        "bpb gain",
        "baseline bpb",
        "std bpb",
    ],
)
def test_a_column_that_is_not_plain_says_nothing(heading, folder):
    """A difference, another run, a pass that the log does not have, or one that nobody knows."""
    text = TABLE.replace("**val_bpb**", heading).replace("1.1374", "1.0374")
    folder.readme(text.replace("| **Mean** | | | **1.1379** | |\n", ""))
    assert folder.failures() == []


def test_a_pass_that_the_heading_names_is_the_one_that_is_quoted(folder):
    folder.readme(TABLE.replace("**val_bpb**", "Roundtrip bpb").replace("1.1374", "1.1174"))
    found = folder.verdict("README tables")
    assert found.state == FAILS and "but 1.15839566 (final_int6_roundtrip" in found.text


@pytest.mark.parametrize(
    "heading, label",
    [
        ("Pre-quant bpb", "step 7012"),
        ("val_bpb (raw)", "step 7012"),
        ("Post-EMA bpb", "post_ema"),
        ("Sliding bpb", "final_int6_sliding_window"),
        ("Pre-TTT bpb", "final_int6_"),
        ("bpb", "final_int6_"),
    ],
)
def test_a_heading_names_the_pass_that_a_figure_is_held_against(heading, label, folder):
    folder.add_to_logs("DIAGNOSTIC post_ema val_loss:1.9300 val_bpb:1.1431 eval_time:1ms", "peak")
    text = TABLE.replace("| **Mean** | | | **1.1379** | |\n", "").replace("**val_bpb**", heading)
    folder.readme(text.replace("1.1374", "1.1954"))
    found = folder.verdict("README tables")
    assert found.state == FAILS and f"({label}" in found.text.replace("DIAGNOSTIC ", "")


@pytest.mark.parametrize(
    "title", ["## Ablations", "## Comparison", "## Earlier runs", "The baseline, seed by seed:"]
)
def test_a_table_of_other_runs_says_nothing(title, folder):
    folder.readme(TABLE.replace("## Results", title).replace("1.1374", "1.0374"))
    assert folder.failures() == []


def test_a_table_with_several_rows_of_a_seed_says_nothing(folder):
    folder.readme(TABLE.replace("| 1337 |", "| 42 |").replace("1.1374", "1.0374"))
    assert folder.verdict("README tables").state == UNSTATED


def test_a_table_in_a_block_of_code_or_without_a_rule_says_nothing():
    assert cells_by_seed(f"```\n{TABLE}```\n".splitlines()) == []
    assert cells_by_seed(["| Seed | val_bpb |", "text"]) == []


def test_seeds_may_be_columns(folder):
    text = "| | Seed 42 | Seed 1337 |\n|--|--|--|\n| val_bpb | 1.1374 | 1.1383 |\n"
    text += "| steps | 7012 | 7012 |\n"
    folder.readme(text)
    assert folder.verdict("README tables").text.startswith("4 figures")
    folder.readme(text.replace("1.1383", "1.1283"))
    found = folder.verdict("README tables")
    assert found.state == FAILS and "val_bpb of seed 1337" in found.text


def test_a_table_of_metrics_is_of_the_only_run(folder):
    text = "| Metric | Value |\n|-|-|\n| Roundtrip BPB | {} |\n| Steps | 7,012 |\n| Notes | 5 |\n"
    folder.state(seeds=[42], seed_results=None, val_bpb=1.13739566, val_loss=1.9205)
    for seed in (1337, 2024):
        folder.log(seed).unlink()
    folder.readme(text.format("1.1584"))
    assert folder.verdict("README tables").text.startswith("2 figures")
    folder.readme(text.format("1.0584"))
    found = folder.verdict("README tables")
    assert found.state == FAILS and "1.0584 (README.md:3, Roundtrip BPB), but 1.158" in found.text
    # With several logs it is not said of which of them it is.
    (folder.path / "other.log").write_text(folder.log().read_text().replace("seed:42", "seed:7"))
    assert folder.verdict("README tables").state == UNSTATED


def test_a_seed_without_a_log_is_held_against_submission_json(folder):
    folder.log(1337).unlink()
    folder.readme(TABLE.replace("1.1383", "1.1283").replace("1.1379", "1.1328"))
    found = folder.verdict("README tables")
    assert found.state == FAILS
    assert "1.1283 (README.md:8, val_bpb of seed 1337), but 1.138" in found.text
    assert "seed_results.1337" in found.text
    # Of bytes one may be the model alone.
    folder.readme(TABLE.replace("| 15,650,789 |", "| 15,650,000 |"))
    assert folder.failures() == []
    folder.readme(TABLE.replace("| 15,650,789 |", "| 14,650,000 |"))
    assert folder.failures() == ["README tables"]
    folder.state(seed_results=None)
    assert folder.failures() == []


def test_the_mean_of_a_column_is_that_of_its_seeds(folder):
    table = TABLE.replace("1.13651 (best)", "1.1365").replace("1.1379", "1.1374")
    folder.readme(table)
    assert folder.verdict("README tables").state == HOLDS
    for mean, state in (("1.1375", HOLDS), ("1.13741", HOLDS), ("1.1365", FAILS)):
        folder.readme(table.replace("**1.1374** | |", f"{mean} | |"))
        assert folder.verdict("README tables").state == state, mean
    # With a row of another name it is not known what the mean is of.
    other = table.replace("| 42   |", "| 7 again | - | - | 1.1 | - |\n| 42   |")
    folder.readme(other.replace("**1.1374** | |", "1.1365 | |"))
    assert folder.verdict("README tables").state == HOLDS
    # The mean of more seeds than the table shows is another one.
    folder.readme(table.replace("**1.1374** | |", "1.1365 | |").replace("**Mean**", "5-seed mean"))
    assert folder.verdict("README tables").state == HOLDS


def test_a_log_that_is_named_and_not_here_may_have_the_figure(folder):
    folder.readme(TABLE.replace("1.1374", "1.0374") + "\nRuns: `train_main.log`\n")
    assert folder.verdict("README tables").state == UNCHECKED
    assert folder.failures() == []


def test_times_are_held_against_logs_if_they_have_a_unit(folder):
    text = "| seed | train time | eval time |\n|-|-|-|\n| 42 | {} | {} |\n"
    for training, evaluation, state in (
        ("600s", "71.2 s", HOLDS),
        ("600012 ms", "80s", HOLDS),
        ("612s", "73.3s", HOLDS),
        ("580s", "71.2s", FAILS),
        ("600s", "51s", FAILS),
        ("580", "51", UNSTATED),
    ):
        folder.readme(text.format(training, evaluation))
        assert folder.verdict("README tables").state == state, (training, evaluation)


@pytest.mark.parametrize(
    "text, figure",
    [
        ("1.1374", (1.1374, 4, "")),
        ("15,650,789 bytes", (15650789, 0, "bytes")),
        ("15,650,789 B (97.8%)", (15650789, 0, "b")),
        ("83.4 ms", (83.4, 1, "ms")),
        ("~409s", None),
        ("1.13 ± 0.01", None),
        ("—", None),
        ("", None),
        ("-0.0026", None),
        ("1.08 (best)", None),
    ],
)
def test_a_cell_has_one_exact_figure_or_none(text, figure):
    cell = cell_of(42, "val_bpb", text, 7)
    assert (cell and (cell.figure.value, cell.figure.decimals, cell.unit)) == figure


@pytest.mark.parametrize(
    "heading, quantity",
    [
        ("Post-TTT bpb", "score"),
        ("Sliding BPP", "score"),
        ("val_loss (nats)", "loss"),
        ("step_avg", "pace"),
        ("Training steps", "steps"),
        ("Artifact bytes", "bytes"),
        ("Total size", "bytes"),
        ("bytes_total", "bytes"),
        ("Submission size (bytes)", "bytes"),
        ("eval time (s)", "evaluation time"),
        ("train_time", "training time"),
        ("TTT gain", None),
        ("TTT time", None),
        ("Warmdown steps", None),
        ("Total params", None),
        ("Total tokens", None),
        ("Model bytes", None),
        ("Artifact size (MB)", None),
        ("Notes", None),
    ],
)
def test_a_heading_says_what_a_column_has(heading, quantity):
    assert quantity_of(cell_of(1, heading, "1", 1)) == quantity
