"""Whole runs through the command line, tiny: what they print, write and refuse."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt
from conftest import BOS, VOCAB_SIZE, write_shard
from runs import MACHINE, SCRIPT, TINY_RUN, Done, is_one_error, run
from train_gpt import ARTIFACT_NAME, OVER_CAP_NAME, Settings, open_shard

pytest_plugins = ["run_fixtures"]

SCORES = ("pre_quantization", "final_int6_roundtrip", "final_int6_sliding_window")

# ---- what a run prints and writes


def files_in(folder: Path) -> set[str]:
    """The paths of all files under a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_ends_well(first):
    assert first.status == 0, first.err
    kept = f"logs/first.{ARTIFACT_NAME}"
    assert files_in(first.folder) == {ARTIFACT_NAME, "logs/first.txt", "logs/first.json", kept}
    assert (first.folder / kept).read_bytes() == (first.folder / ARTIFACT_NAME).read_bytes()
    assert "warning" not in first.err


@pytest.mark.parametrize(
    "times, shape",
    [
        (4, r"step:(\d+)/30 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms"),
        (1, r"step:30/30 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} .*"),
        (1, r"Total submission size int6\+zstd: \d+ bytes"),
        (1, r"final_int6_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}"),
        (1, r"final_int6_sliding_window_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}"),
    ],
)
def test_lines_have_the_shape_of_the_field(first, times, shape):
    for text in (first.out, first.log()):
        assert len(re.findall(rf"^{shape}$", text, re.M)) == times


def logged_settings(log: str) -> dict:
    """All settings, as a run has logged them."""
    return json.loads(re.search(r"^settings:(\{.*\})$", log, re.M)[1])


def test_the_log_begins_with_the_source_and_has_every_setting(first):
    source = SCRIPT.read_text(encoding="utf-8")
    assert first.log().startswith(source)
    assert source[:200] not in first.out
    found = logged_settings(first.log())
    assert set(found) == set(Settings.__dataclass_fields__)
    for name, text in TINY_RUN.items():
        value = found[name.lower()]
        wanted = bool(int(text)) if isinstance(value, bool) else type(value)(text)
        assert wanted == value, name


def test_the_console_is_the_end_of_the_log(first):
    lines = first.log().splitlines()
    assert [line for line in first.out.splitlines() if line not in lines] == []


def test_the_results_agree_with_the_log(first):
    results = first.results()
    log = first.log()
    assert results["settings"] == logged_settings(log)
    assert results["seed"] == 1337
    assert results["world_size"] == 1
    assert results["device"] == "cpu"
    assert results["steps"] == 30
    assert results["tokens"] == 30 * 256
    assert results["versions"]["torch"] == torch.__version__
    assert results["step_avg_ms"] == pytest.approx(1000 * results["train_seconds"] / 30)
    assert f"step:30/30 train_loss:{results['train_loss']:.4f} " in log
    assert f"model_params:{results['parameters']} " in log
    assert results["parameters"] > 10_000
    assert results["eval_seconds"] > 0
    assert results["under_cap"] is True


def test_the_scores_of_the_results_are_those_of_the_log(first):
    results = first.results()
    log = first.log()
    for label in SCORES[1:]:
        score = results[label]
        exact = f"val_loss:{score['val_loss']:.8f} val_bpb:{score['val_bpb']:.8f}"
        assert f"{label}_exact {exact}\n" in log
        assert score["targets"] == results["pre_quantization"]["targets"] > 1000
    before = results["pre_quantization"]
    line = (
        f"step:30/30 val_loss:{before['val_loss']:.4f} val_bpb:{before['val_bpb']:.4f} "
        f"train_time:{1000 * results['train_seconds']:.0f}ms "
        f"step_avg:{results['step_avg_ms']:.2f}ms\n"
    )
    assert line in log
    assert abs(before["val_bpb"] - results["final_int6_roundtrip"]["val_bpb"]) < 0.02


def test_bytes_are_those_of_the_files(first):
    results = first.results()
    assert results["bytes_code"] == SCRIPT.stat().st_size
    assert results["bytes_model"] == (first.folder / ARTIFACT_NAME).stat().st_size
    assert results["bytes_total"] == results["bytes_code"] + results["bytes_model"]
    assert f"Total submission size int6+zstd: {results['bytes_total']} bytes\n" in first.out


def test_targets_and_bytes_are_those_of_the_split(first, data_folder):
    tokens = train_gpt.load_validation(train_gpt.find_shards(data_folder, "val"), VOCAB_SIZE)
    tokenizer = train_gpt.load_tokenizer(data_folder / "tokenizer.model", VOCAB_SIZE)
    size = 0
    for document in np.split(tokens, np.flatnonzero(tokens == BOS)):
        size += len(tokenizer.decode(document.tolist()).encode())
    for label in SCORES:
        score = first.results()[label]
        assert (score["targets"], score["bytes"]) == (len(tokens) - 1, size)


def test_a_run_learns_averages_and_trains_on_quantized_weights(first):
    results = first.results()
    losses = [float(loss) for loss in re.findall(r"train_loss:(\S+)", first.out)]
    # The logarithm of 384 is 5.95.
    assert losses[0] > 5.8
    assert losses[-1] < losses[0] - 0.5
    assert results["exported"] == "swa"
    assert 0 < results["late_qat_steps"] < 10
    assert first.out.count("late_qat:on") == 1


# ---- the artifact of a run


def test_learning_while_scoring_is_a_score_of_its_own_behind_those_of_the_fixed_model(
    first, data_folder, tmp_path, run_here
):
    done = run_here(
        tmp_path,
        **MACHINE,
        DATA_PATH=str(data_folder),
        ARTIFACT=str(first.folder / ARTIFACT_NAME),
        RUN_ID="adaptive",
        TTT_ENABLED="1",
        TTT_CHUNK_SIZE="16",
    )
    assert done.status == 0, done.err
    results = done.results("adaptive")
    compliance = results["compliance"]
    assert compliance["track"] == "B" and "16 targets" in compliance["adaptation"]
    for label in SCORES[1:]:
        assert results[label]["val_bpb"] == first.results()[label]["val_bpb"]
    score = results["final_int6_ttt"]
    assert score["targets"] == results["final_int6_roundtrip"]["targets"]
    assert score["val_bpb"] < results["final_int6_sliding_window"]["val_bpb"]
    labels = re.findall(
        r"^(final_\w+)_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$", done.out, re.M
    )
    assert labels == [*SCORES[1:], "final_int6_ttt"]
    assert first.results()["compliance"]["track"] == "A"
    assert "adaptation" not in first.results()["compliance"]


def test_an_artifact_scores_the_same_without_any_setting_of_the_model(
    first, data_folder, tmp_path, run_here
):
    done = run_here(
        tmp_path,
        **MACHINE,
        DATA_PATH=str(data_folder),
        ARTIFACT=str(first.folder / ARTIFACT_NAME),
    )
    assert done.scores() == first.scores()
    assert "train_loss" not in done.out
    assert not (tmp_path / ARTIFACT_NAME).exists()
    for key in ("bytes_model", "bytes_total", "bytes_code"):
        assert done.results()[key] == first.results()[key]


@pytest.fixture
def artifact_alone(first, tmp_path, run_here, monkeypatch):
    """artifact_alone(**settings): a run with nothing but an artifact, where no corpus is built."""
    builder = lambda *_, **__: pytest.fail("a corpus was built")  # noqa: E731
    monkeypatch.setattr(subprocess, "run", builder)
    # The demo corpus of whoever runs the tests is not looked at.
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / SCRIPT.name))
    shutil.copy(SCRIPT, tmp_path)
    shutil.copy(first.folder / ARTIFACT_NAME, tmp_path)

    def call(**settings: str) -> Done:
        return run_here(tmp_path, **MACHINE, ARTIFACT=ARTIFACT_NAME, **settings)

    return call


def test_an_artifact_alone_finds_its_data_among_others(
    first, data_folder, tmp_path, artifact_alone
):
    name = data_folder.name
    # Another data set, and one of that name with another tokenizer.
    for folder in ("a_sp384", f"{name}_sp384"):
        shutil.copytree(data_folder, tmp_path / "data/datasets" / folder)
    note = json.dumps({"name": name})
    (tmp_path / f"data/datasets/{name}_sp384/manifest.json").write_text(note)
    model = tmp_path / f"data/datasets/{name}_sp384/tokenizer.model"
    model.write_bytes(model.read_bytes() + b"\x9a\x06\x00")
    done = artifact_alone()
    assert done.status == 2
    assert is_one_error(done.err, rf"are not here \(data/datasets/{name}_sp384 has another")
    shutil.copytree(data_folder, tmp_path / "data/datasets" / name)
    assert artifact_alone().scores() == first.scores()


def test_an_artifact_alone_says_which_data_it_wants(data_folder, tmp_path, artifact_alone):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/demo_corpus.py").touch()
    sha256 = train_gpt.digest_of(data_folder / "tokenizer.model")[:16]
    words = f"not here: {data_folder.name}, {VOCAB_SIZE} pieces, sha256 of the tokenizer {sha256}"
    assert is_one_error(artifact_alone().err, f"{words}: set DATA_PATH to them")
    assert is_one_error(artifact_alone(SAMPLE="x").err, words)


@pytest.mark.parametrize(
    "name, command",
    [
        ("demo", "data/demo_corpus.py --vocab-size 600 --output data/demo_sp600"),
        ("fineweb10B_sp1024", "data/download.py --variant fineweb10B_sp1024 --train-shards 0"),
    ],
)
def test_what_brings_the_data_of_an_artifact_is_said(name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / SCRIPT.name))
    artifact = {"data": name, "tokenizer": "ab" * 32, "case_operators": True}
    words = f"{name}, 600 pieces and case operators, sha256 of the tokenizer {'ab' * 8}: .*"
    with pytest.raises(train_gpt.UserError, match=words + command):
        train_gpt.find_data_of(artifact, 600)


def test_an_artifact_that_is_scored_has_no_time_of_training(first, data_folder, tmp_path, run_here):
    artifact = str(first.folder / ARTIFACT_NAME)
    done = run_here(tmp_path, **MACHINE, DATA_PATH=str(data_folder), ARTIFACT=artifact)
    block = done.results()["compliance"]
    assert block["train_under_600s"] is None
    assert block["train_seconds"] is None
    assert block["resumed_at"] is None
    assert block["eval_under_600s"] is True
    assert block["validation_opened"] == "after packing"


def test_sample_continues_a_text(first, data_folder, run_here, tmp_path):
    # Neither split is needed for this.
    (tmp_path / "data").mkdir()
    shutil.copy(data_folder / "tokenizer.model", tmp_path / "data")
    options = dict(
        MACHINE,
        ARTIFACT=str(first.folder / ARTIFACT_NAME),
        DATA_PATH=str(tmp_path / "data"),
        SAMPLE="Return the number  of",
        SAMPLE_TOKENS="80",
        SEED="1",
    )
    texts = []
    for changes in (
        dict(RUN_ID="one"),
        dict(RUN_ID="again"),
        dict(RUN_ID="seed", SEED="5"),
        dict(RUN_ID="short", SAMPLE_TEMPERATURE="0", SAMPLE_TOKENS="3"),
    ):
        done = run_here(tmp_path, **{**options, **changes})
        assert done.status == 0, done.err
        texts.append(done.out[done.out.rindex("Return the number  of") :])
    one, again, seed, short = texts
    assert one == again
    assert one != seed
    assert len(one) > len(short) > len("Return the number  of\n")


def test_a_sample_needs_the_tokenizer_of_the_artifact(first, data_folder, run_here, tmp_path):
    # An unknown empty field leaves the pieces as they are.
    model = (data_folder / "tokenizer.model").read_bytes() + b"\x9a\x06\x00"
    (tmp_path / "other.model").write_bytes(model)
    done = run_here(
        tmp_path,
        **MACHINE,
        ARTIFACT=str(first.folder / ARTIFACT_NAME),
        DATA_PATH=str(data_folder),
        SAMPLE="x",
        TOKENIZER_PATH=str(tmp_path / "other.model"),
    )
    assert done.status == 2
    assert is_one_error(done.err, "tokenizer")


DAMAGES = {
    "cut": lambda data: data[:-1],
    "changed": lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_artifact_is_refused(first, data_folder, run_here, tmp_path, damage):
    data = (first.folder / ARTIFACT_NAME).read_bytes()
    (tmp_path / "bad.ptz").write_bytes(DAMAGES[damage](data))
    done = run_here(tmp_path, ARTIFACT="bad.ptz", DATA_PATH=str(data_folder))
    assert done.status == 2
    assert is_one_error(done.err, r"bad\.ptz: ")
    assert not (tmp_path / "logs").exists()


def test_a_setting_that_contradicts_the_artifact_is_refused(first, data_folder, run_here, tmp_path):
    artifact = str(first.folder / ARTIFACT_NAME)
    done = run_here(tmp_path, ARTIFACT=artifact, DATA_PATH=str(data_folder), NUM_LAYERS="4")
    assert done.status == 2
    assert is_one_error(done.err, "NUM_LAYERS=4 differs from the stored model's 3")


# ---- the same run again, with other seeds, ranks and a compiler


def test_the_same_run_gives_the_same_bytes_and_a_mistyped_variable_a_warning(
    first, data_folder, run_here, tmp_path
):
    """In another process than the first run's."""
    mistyped = dict(NUM_LAYER="9", LR_MATRIX="1")
    again = run_here(tmp_path, **TINY_RUN, DATA_PATH=str(data_folder), **mistyped)
    assert again.scores() == first.scores()
    assert (tmp_path / ARTIFACT_NAME).read_bytes() == (first.folder / ARTIFACT_NAME).read_bytes()
    losses = re.findall(r"(?:train|val)_loss:\S+", again.out)
    assert losses == re.findall(r"(?:train|val)_loss:\S+", first.out)
    assert len(losses) == 9
    assert "NUM_LAYER is not a setting; did you mean NUM_LAYERS?" in again.err
    assert "LR_MATRIX is not a setting; did you mean MATRIX_LR?" in again.err


def test_over_the_cap_nothing_is_called_final(first, data_folder, run_here, tmp_path):
    """With another seed, whose losses are others."""
    changes = dict(TINY_RUN, ARTIFACT_MAX_BYTES="1000", SEED="2")
    done = run_here(tmp_path, **changes, DATA_PATH=str(data_folder))
    assert done.status == 2
    assert not done.score_lines()
    assert not (tmp_path / ARTIFACT_NAME).exists()
    results = done.results()
    assert results["under_cap"] is False
    assert not [key for key in results if key.startswith("final_")]
    assert results["bytes_model"] == (tmp_path / OVER_CAP_NAME).stat().st_size
    assert f"{results['bytes_total'] - 1000} bytes over the cap" in done.err
    assert "quant:fit" in re.search(r"artifact:.*", done.out)[0]
    assert results["train_loss"] != first.results()["train_loss"]
    # No step is left to make coarser: all codes are zero.
    _, weights = train_gpt.read_artifact((tmp_path / OVER_CAP_NAME).read_bytes(), "a")
    assert not any(weight.any() for name, weight in weights.items() if ".mlp." in name)


def test_two_ranks_score_like_one(first, two_ranks):
    ours = two_ranks.results()
    theirs = first.results()
    assert len(two_ranks.scores()) == 2
    assert ours["world_size"] == 2
    assert ours["steps"] == 30
    assert ours["tokens"] == theirs["tokens"]
    for label in SCORES:
        assert abs(ours[label]["val_bpb"] - theirs[label]["val_bpb"]) < 1e-3
        assert ours[label]["targets"] == theirs[label]["targets"]
        assert ours[label]["bytes"] == theirs[label]["bytes"]
    assert len(list((two_ranks.folder / "logs").glob("*.txt"))) == 1
    # The launcher's own variables look like no setting.
    assert "is not a setting" not in two_ranks.err


def write_periodic_data(folder: Path, tokenizer: Path) -> None:
    """Shards of twelve tokens over and over, which a few steps learn: the same on every machine."""
    folder.mkdir()
    shutil.copy(tokenizer, folder / "tokenizer.model")
    # Bytes of control characters, which have no other pieces.
    tokens = 20 + np.arange(6000) % 12
    tokens[0] = BOS
    write_shard(folder / "x_train_000000.bin", tokens)
    write_shard(folder / "x_val_000000.bin", tokens[:500])


def test_late_qat_fires_when_compiled(data_folder, tmp_path, run_here):
    """The compiled run with late QAT has the losses of the eager one with it, not without it.

    The cap leaves about a bit and a half a weight, so that late QAT moves the loss by a tenth.
    """
    if not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    write_periodic_data(tmp_path / "data", data_folder / "tokenizer.model")
    options = dict(
        TINY_RUN,
        NUM_LAYERS="2",
        ITERATIONS="12",
        WARMDOWN_ITERS="12",
        WARMDOWN_FRACTION="1",
        LATE_QAT_THRESHOLD="0.2",
        MICRO_BATCH_TOKENS="256",
        EVAL_STRIDE="60",
        ARTIFACT_MAX_BYTES=str(SCRIPT.stat().st_size + 6000),
        DATA_PATH=str(tmp_path / "data"),
    )
    done = run(tmp_path, **{**options, "COMPILE": "1"}, RUN_ID="compiled")
    assert len(done.scores()) == 2
    assert run_here(tmp_path, **options, RUN_ID="eager").status == 0
    without_qat = {**options, "LATE_QAT_THRESHOLD": "0"}
    assert run_here(tmp_path, **without_qat, RUN_ID="without").status == 0

    compiled = done.results("compiled")
    eager = done.results("eager")
    without = done.results("without")
    assert any("compile:blocks" in line for line in compiled["runtime"])
    assert compiled["late_qat_steps"] == eager["late_qat_steps"] == 2
    assert without["late_qat_steps"] == 0
    effect = abs(without["train_loss"] - eager["train_loss"])
    difference = abs(compiled["train_loss"] - eager["train_loss"])
    assert effect > 0.05
    assert difference < 0.1 * effect


# ---- what is refused


def test_the_command_line_refuses_with_one_line_before_anything_is_made(tmp_path):
    done = run(tmp_path, **{**TINY_RUN, "NUM_LAYERS": "many", "ZSTD_LEVEL": "99"})
    assert done.status == 2
    assert is_one_error(done.err, "NUM_LAYERS=many.*ZSTD_LEVEL=99")
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(MODEL_DIM="33"), "MODEL_DIM=33"),
        (dict(ARTIFACT="absent.ptz"), "absent.ptz"),
        (dict(SAMPLE="text"), "SAMPLE"),
        (dict(DEVICE="cuda"), "torch sees no GPU here"),
        (dict(ATTENTION="flash3"), "flash3"),
        (dict(VOCAB_SIZE="1024"), "tokenizer.model"),
        (dict(TOKENIZER_PATH="absent.model"), "absent.model"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_in_one_line(
    changes, word, data_folder, run_here, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run_here(tmp_path, **{**TINY_RUN, "DATA_PATH": str(data_folder), **changes})
    assert done.status == 2
    assert is_one_error(done.err, word)
    assert not list(tmp_path.glob("*.ptz"))


def test_an_argument_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(train_gpt, "STOP", train_gpt.StopSignals())
    monkeypatch.setattr(train_gpt.STOP, "install", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--num-layers=9"])
    assert train_gpt.main() == 2
    assert is_one_error(capsys.readouterr().err, "--num-layers=9")


@pytest.mark.parametrize("kind", ["absent", "file", "empty"])
def test_a_wrong_data_path_is_never_the_demo_corpus(kind, run_here, tmp_path, monkeypatch):
    path = tmp_path / "elsewhere"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.touch()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a corpus was built"))
    done = run_here(tmp_path, **TINY_RUN, DATA_PATH=str(path), TOKENIZER_PATH="")
    assert done.status == 2
    assert is_one_error(done.err, "")
    assert "demo" not in done.out + done.err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_found_before_training(split, data_folder, run_here, tmp_path):
    shutil.copytree(data_folder, tmp_path / "data")
    (tmp_path / f"data/x_{split}_000000.bin").unlink()
    done = run_here(tmp_path, **TINY_RUN, DATA_PATH="data")
    assert done.status == 2
    assert is_one_error(done.err, f"no {split} shards")
    assert "train_loss" not in done.out


def test_a_taken_run_id_is_refused_and_nothing_is_overwritten(data_folder, run_here, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/mine.txt").write_text("an earlier run")
    done = run_here(tmp_path, **TINY_RUN, DATA_PATH=str(data_folder), RUN_ID="mine")
    assert done.status == 2
    assert is_one_error(done.err, "RUN_ID=mine")
    assert files_in(tmp_path) == {"logs/mine.txt"}
    assert (tmp_path / "logs/mine.txt").read_text() == "an earlier run"


def damaged_data(data_folder: Path, folder: Path) -> Path:
    """Data of which all but the content of a training shard is right."""
    shutil.copytree(data_folder, folder)
    tokens = open_shard(folder / "x_train_000000.bin").copy()
    # Bytes in the place of pieces, which no encoding of text gives.
    write_shard(folder / "x_train_000000.bin", np.where(tokens > 300, 100, tokens))
    return folder


@pytest.mark.parametrize(
    "settings, word",
    [
        (dict(DATA_PATH="nowhere"), "nowhere is not a folder"),
        # This is seen while the shards are opened, the last thing before the first step.
        (dict(DATA_PATH="damaged"), "did not make this shard"),
        (dict(ARTIFACT="mine.ptz"), "data of this ARTIFACT are not here"),
        (dict(ARTIFACT="mine.ptz", DATA_PATH="damaged", TOKENIZER_PATH="t"), "tokenizer"),
    ],
    ids=["data", "training", "artifact", "tokenizer"],
)
def test_a_run_that_failed_before_it_began_leaves_its_run_id_free(
    settings, word, first, data_folder, run_here, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "train_gpt.py"))
    shutil.copy(SCRIPT, tmp_path)
    damaged_data(data_folder, tmp_path / "damaged")
    shutil.copy(first.folder / ARTIFACT_NAME, tmp_path / "mine.ptz")
    model = (data_folder / "tokenizer.model").read_bytes()
    (tmp_path / "t").write_bytes(model + b"\x9a\x06\x00")
    of_model = TINY_RUN if "ARTIFACT" not in settings else MACHINE
    done = run_here(tmp_path, **of_model, **settings, RUN_ID="mine")
    assert done.status == 2
    assert is_one_error(done.err, word)
    assert list((tmp_path / "logs").iterdir()) == []


def test_a_run_that_failed_after_it_began_keeps_its_log(data_folder, run_here, tmp_path):
    shutil.copytree(data_folder, tmp_path / "data")
    write_shard(tmp_path / "data/x_val_000000.bin", [BOS, 60000])
    settings = {**TINY_RUN, "ITERATIONS": "1", "RUN_ID": "mine", "DATA_PATH": "data"}
    assert run_here(tmp_path, **settings).status == 2
    assert "step:1/1 train_loss:" in (tmp_path / "logs/mine.txt").read_text(encoding="utf-8")
    assert is_one_error(run_here(tmp_path, **settings).err, "RUN_ID=mine is taken")


def test_a_run_that_goes_on_keeps_its_log_when_it_fails(data_folder, run_here, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/mine.txt").write_text("an earlier part\n")
    done = run_here(tmp_path, **TINY_RUN, DATA_PATH="nowhere", RUN_ID="mine", RESUME="1")
    assert done.status == 2
    assert (tmp_path / "logs/mine.txt").read_text().startswith("an earlier part\n")


def test_validation_is_not_opened_before_the_artifact_is_written(data_folder, run_here, tmp_path):
    shutil.copytree(data_folder, tmp_path / "data")
    # Sizes, header and first token are right, which is all that is looked at before.
    write_shard(tmp_path / "data/x_val_000000.bin", [BOS, 60000])
    done = run_here(tmp_path, **{**TINY_RUN, "ITERATIONS": "3"}, DATA_PATH="data")
    assert "step:3/30" not in done.out
    assert "step:3/3 train_loss:" in done.out
    assert "Total submission size" in done.out
    assert (tmp_path / ARTIFACT_NAME).stat().st_size > 1000
    assert done.status == 2
    assert is_one_error(done.err, r"x_val_000000\.bin")
    assert not done.score_lines()


def test_passes_during_training_are_said(data_folder, run_here, tmp_path):
    changes = dict(TINY_RUN, VAL_LOSS_EVERY="2", ITERATIONS="3")
    done = run_here(tmp_path, **changes, DATA_PATH=str(data_folder))
    assert done.status == 0, done.err
    assert done.results()["compliance"]["validation_opened"] == "during training"
