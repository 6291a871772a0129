"""What records/ablate.py is asked for: changes, seeds, the base, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ablate
import ablation_plan
import train_gpt
from ablation_plan import Ablation, Configuration, Reader, label_of, parse_seeds
from commands import BadInput
from conftest import ROOT
from standin import call, write_standin


@pytest.fixture(scope="module")
def standin(tmp_path_factory) -> Path:
    """The path of the quick script."""
    return write_standin(tmp_path_factory.mktemp("script") / "standin.py")


def labels_of(arguments: list[str], grid: bool) -> list[str]:
    """The changes that arguments stand for, as people type them."""
    return [label_of(changes) for changes in Reader(train_gpt).changes(arguments, grid)]


# ---- Arguments


@pytest.mark.parametrize(
    "arguments, labels",
    [
        (["BACKOUT_ENABLED=0"], ["BACKOUT_ENABLED=0"]),
        (["MEMORY_TOKENS=0,32"], ["MEMORY_TOKENS=0", "MEMORY_TOKENS=32"]),
        (["EMA_ENABLED=1 SWA_ENABLED=0"], ["SWA_ENABLED=0 EMA_ENABLED=1"]),
        (
            ["MATRIX_LR=2e-2,.03 MUON_WD=0"],
            ["MATRIX_LR=0.02 MUON_WD=0.0", "MATRIX_LR=0.03 MUON_WD=0.0"],
        ),
        ([], []),
    ],
)
def test_each_argument_is_a_change(arguments, labels):
    assert labels_of(arguments, grid=False) == labels


def test_a_grid_is_the_product_of_its_arguments():
    labels = ["MEMORY_TOKENS=0 QUANT=rows", "MEMORY_TOKENS=4 QUANT=rows"]
    assert labels_of(["QUANT=rows", "MEMORY_TOKENS=0,4"], grid=True) == labels
    assert labels_of([], grid=True) == []


def test_a_grid_has_each_setting_in_one_argument():
    with pytest.raises(BadInput, match="QUANT is in two arguments"):
        labels_of(["QUANT=rows", "QUANT=fit"], grid=True)


def test_a_grid_that_passes_through_the_base_leaves_that_point_to_the_base(standin, tmp_path):
    ablation = Ablation(
        standin, "ITERATIONS=8 MEMORY_TOKENS=4 DOCUMENT_ATTENTION=0", "tokens", tmp_path / "new"
    )
    found = ablation.configurations(["MEMORY_TOKENS=0,4", "SWA_ENABLED=0,1"], grid=True)
    assert [len(configuration.changes) for configuration in found] == [0, 2, 2, 2]


@pytest.mark.parametrize(
    "text, seeds", [("3", [1, 2, 3]), ("1337,42,7", [1337, 42, 7]), ("42,", [42])]
)
def test_seeds_are_a_number_or_a_list(text, seeds):
    assert parse_seeds(text) == seeds


def test_a_run_is_named_for_its_change():
    def slug(**changes: str) -> str:
        return Configuration(changes, {}, {}).slug

    assert slug() == "base"
    assert slug(BACKOUT_ENABLED="0") == "backout_enabled_0"
    assert slug(SWA_ENABLED="0", EMA_ENABLED="1") == "swa_enabled_0+ema_enabled_1"
    assert slug(DATA_PATH="a/b") != slug(DATA_PATH="a_b")
    assert "/" not in slug(DATA_PATH="a/b")


# ---- Equal runs


@pytest.mark.parametrize(
    "change, steps",
    [("TRAIN_BATCH_TOKENS=4096", 19200), ("PRESET=record", 100), ("QUANT=rows", 38400)],
)
def test_equal_tokens_scales_the_steps_to_the_batch(standin, tmp_path, change, steps):
    ablation = Ablation(standin, "ITERATIONS=38400", "tokens", tmp_path / "new")
    [_, changed] = ablation.configurations([change], grid=False)
    assert changed.settings["iterations"] == steps
    assert changed.settings["max_wallclock_seconds"] == 0


@pytest.mark.parametrize(
    "base, change, seconds, steps",
    [
        ("MAX_WALLCLOCK_SECONDS=60", "TRAIN_BATCH_TOKENS=4096", 60, 20000),
        ("", "PRESET=record", 150, 9000),
    ],
)
def test_equal_seconds_leaves_steps_alone_and_keeps_the_clock(
    standin, tmp_path, base, change, seconds, steps
):
    ablation = Ablation(standin, base, "seconds", tmp_path / "new")
    [_, changed] = ablation.configurations([change], grid=False)
    assert changed.settings["max_wallclock_seconds"] == seconds
    assert changed.settings["iterations"] == steps


def test_runs_have_equal_tokens_where_iterations_are_set(standin, tmp_path):
    assert Ablation(standin, "", None, tmp_path / "new").equal == "seconds"
    assert Ablation(standin, "ITERATIONS=4", None, tmp_path / "new").equal == "tokens"


# ---- Data and private names


def test_data_named_relative_to_here_is_found_from_a_runs_folder(standin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/fineweb", "mine"):
        Path(name).mkdir(parents=True)
    Path("data/fineweb.model").touch()
    monkeypatch.setattr(ablation_plan, "import_script", with_fineweb("data/fineweb"))

    ablation = Ablation(standin, "ITERATIONS=4", "tokens", Path("new"))
    assert ablation.base.variables["DATA_PATH"] == str(tmp_path / "data/fineweb")
    assert "TOKENIZER_PATH" not in ablation.base.variables

    Path("mine/tokenizer.model").touch()
    [_, changed] = ablation.configurations(["DATA_PATH=mine"], grid=False)
    assert changed.variables["DATA_PATH"] == changed.changes["DATA_PATH"] == str(tmp_path / "mine")
    assert "TOKENIZER_PATH" not in changed.variables

    # Then a run takes the demo corpus.
    shutil.rmtree("data/fineweb")
    base = "ITERATIONS=4 TOKENIZER_PATH=data/fineweb.model"
    ablation = Ablation(standin, base, "tokens", Path("new"))
    assert ablation.base.variables["TOKENIZER_PATH"] == str(tmp_path / "data/fineweb.model")
    assert "DATA_PATH" not in ablation.base.variables


def with_fineweb(folder: str):
    """import_script, but FineWeb is in another place."""
    original = ablation_plan.import_script

    def imported(path: Path):
        script = original(path)
        here = (Path(folder), "")
        script.find_fineweb = lambda vocab_size: here if here[0].is_dir() else None
        return script

    return imported


@pytest.mark.parametrize(
    "private, public",
    [
        ("data:{here}/run/x.bin", "data:run/x.bin"),
        (f"{ROOT}/train_gpt.py", "train_gpt.py"),
        ("no file '/home/some one/data/x'", "no file 'data/x'"),
        ("at /home/me/lib/x.py:3", "at x.py:3"),
        ('"C:\\\\Users\\\\me\\\\x.py"', '"x.py"'),
        ("at C:\\Users\\me\\x.py, line 3", "at x.py, line 3"),
        ("3/4 steps, ~/x, 2e-5/3", "3/4 steps, ~/x, 2e-5/3"),
    ],
)
def test_a_report_has_no_names_of_private_folders(standin, tmp_path, monkeypatch, private, public):
    monkeypatch.chdir(tmp_path)
    ablation = Ablation(standin, "ITERATIONS=4", "tokens", tmp_path / "new")
    ablation.known = [dict(DATA_PATH="/home/some one/data")]
    assert ablation.public(private.replace("{here}", str(tmp_path))) == public


# ---- What is refused before anything runs


@pytest.mark.parametrize(
    "change, message",
    [
        ("NUM_LAYER=1", "NUM_LAYER is not a setting; did you mean NUM_LAYERS?"),
        ("backout_enabled=0", "did you mean BACKOUT_ENABLED?"),
        ("FROBNICATE=1", "FROBNICATE is not a setting"),
        ("NUM_LAYERS=many", "NUM_LAYERS=many must be a whole number"),
        ("NUM_HEADS=5", "NUM_HEADS=5: settings: MODEL_DIM=128 must be"),
        ("NUM_LAYERS", "NUM_LAYERS: write NAME=value"),
        ("MEMORY_TOKENS=0,,4", "MEMORY_TOKENS: a value is empty"),
        ("", "an argument is empty"),
        ("QUANT=fit", "QUANT=fit is what the base has"),
        ("QUANT=rows,rows", "QUANT=rows is what QUANT=rows is"),
        ("QUANT=rows QUANT=fit", "QUANT is given twice"),
        ("SEED=3", "use --seeds"),
        ("RUN_ID=x", "every run has its own"),
        ("ITERATIONS=7", "ITERATIONS cannot change"),
        ("TRAIN_BATCH_TOKENS=6144", "1 of its steps of 6,144 tokens are not the base's 8,192"),
        ("MAX_WALLCLOCK_SECONDS=7", "MAX_WALLCLOCK_SECONDS cannot change"),
        ("DATA_PATH=/no/such", "DATA_PATH=/no/such is not a folder"),
        ("TOKENIZER_PATH=/no/such", "TOKENIZER_PATH=/no/such is not a file"),
    ],
)
def test_a_change_that_cannot_be_is_one_line_before_anything_runs(
    standin, tmp_path, change, message
):
    done = call(tmp_path, "--script", standin, "--base", "ITERATIONS=4", change)
    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--equal", "tokens"], "--equal tokens needs ITERATIONS"),
        (["--equal", "bytes"], "--help lists the options"),
        (["--luck"], "--help lists the options"),
        (["--base", "ITERATIONS=4 MAX_WALLCLOCK_SECONDS=9"], "leave it out"),
        (["--base", "ITERATIONS="], "ITERATIONS: a value is empty"),
        (["--base", "SEED=1"], "use --seeds"),
        (
            ["--equal", "seconds", "--base", "MAX_WALLCLOCK_SECONDS=0"],
            "MAX_WALLCLOCK_SECONDS above 0",
        ),
        (["--jobs", "0"], "--jobs 0 must be"),
        (["--seeds", "0"], "--seeds 0: write"),
        (["--seeds", "1,1"], "each once"),
        (["--seeds", "few"], "--seeds few"),
        (["--launcher", "/no/such -n1"], "there is no program /no/such"),
        (["--launcher", "'x"], "No closing quotation"),
        (["--script", "/no/such.py"], "no Python file"),
        (["--script", ROOT / "data/shards.py"], "has no settings_from"),
        (["--script", "{exits}"], "cannot be imported: SystemExit: 3"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(standin, tmp_path, arguments, message):
    exits = standin.with_name("exits.py")
    exits.write_text("raise SystemExit(3)")
    arguments = [exits if argument == "{exits}" else argument for argument in arguments]
    done = call(tmp_path, "--script", standin, *arguments)
    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line_before_anything_runs(standin, tmp_path, monkeypatch):
    find = ablate.importlib.util.find_spec

    def all_but_matplotlib(name, *more):
        return None if name == "matplotlib" else find(name, *more)

    monkeypatch.setattr(ablate.importlib.util, "find_spec", all_but_matplotlib)
    done = call(tmp_path, "--script", standin, "--base", "ITERATIONS=4")
    assert done.status == 2
    message = "error: matplotlib is not installed: pip install -r records/requirements.txt\n"
    assert done.err == message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, content, message",
    [("notes.txt", "mine", "no ablation's folder"), ("plan.json", "{", "plan.json is damaged")],
)
def test_a_folder_with_something_else_is_left_alone(standin, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    done = call(tmp_path, "--script", standin, "--base", "ITERATIONS=4", "--out", tmp_path)
    assert done.status == 2
    assert message in done.err
    assert (tmp_path / name).read_text() == content
