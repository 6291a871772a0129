"""Whole runs through the command line, tiny: what they print, write and refuse."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, VOCAB_SIZE

import train_gpt
from train_gpt import ARTIFACT_NAME, OVER_CAP_NAME, Settings

SCRIPT = ROOT / "train_gpt.py"
TINY_RUN = dict(
    PRESET="pocket",
    COMPILE="0",
    DTYPE="float32",
    DEVICE="cpu",
    VOCAB_SIZE=str(VOCAB_SIZE),
    NUM_LAYERS="3",
    MODEL_DIM="32",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    ROPE_DIMS="4",
    BIGRAM_VOCAB_SIZE="64",
    BIGRAM_DIM="8",
    MEMORY_TOKENS="4",
    TRAIN_SEQ_LEN="64",
    EVAL_SEQ_LEN="64",
    EVAL_STRIDE="32",
    TRAIN_BATCH_TOKENS="256",
    MICRO_BATCH_TOKENS="128",
    ITERATIONS="30",
    MAX_WALLCLOCK_SECONDS="0",
    WARMDOWN_ITERS="15",
    WARMUP_STEPS="1",
    SWA_EVERY="2",
    SWA_START_SCALE="0.5",
    LATE_QAT_THRESHOLD="0.3",
    TRAIN_LOG_EVERY="10",
)
MODEL_SETTINGS = {field.name.upper() for field in train_gpt.fields_of("model", "evaluation")}
NO_NETWORK = """
import socket
def blocked(*arguments, **named):
    raise AssertionError("the network was used")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = blocked
"""


def environment_with(**changes: str) -> dict[str, str]:
    names = {field.name.upper() for field in dataclasses.fields(Settings)}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        **changes,
    }


@dataclasses.dataclass
class Done:
    """A run that has ended: where, how, and what it said."""

    folder: Path
    status: int
    out: str
    err: str

    def results(self, run_id: str = "*") -> dict:
        return json.loads(next((self.folder / "logs").glob(f"{run_id}.json")).read_text())

    def log(self) -> str:
        return next((self.folder / "logs").glob("*.txt")).read_text(encoding="utf-8")

    def final_lines(self) -> list[str]:
        return [line for line in self.out.splitlines() if re.match(r"final_int6_\w+_exact ", line)]


def run(folder: Path, *, ranks: int = 0, **changes: str) -> Done:
    """Run the script in a folder as a user does: alone, or with this many ranks under torchrun."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks
        else []
    )
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT)],
        cwd=folder,
        timeout=240,
        env=environment_with(**changes),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    return Done(folder, done.returncode, done.stdout, done.stderr)


@pytest.fixture
def run_here(monkeypatch, tmp_path, capsys):
    """The same in this process, for what needs no process of its own."""

    def call(**changes: str) -> Done:
        for name in [name for name in os.environ if name.lower() in Settings.__dataclass_fields__]:
            monkeypatch.delenv(name)
        for name, value in changes.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["train_gpt.py"])
        monkeypatch.chdir(tmp_path)
        precision = torch.get_float32_matmul_precision()
        status = train_gpt.main()
        torch.set_float32_matmul_precision(precision)
        return Done(tmp_path, status, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def first(data_folder, tmp_path_factory) -> Done:
    """A run that may not use the network."""
    folder, block = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("block")
    (block / "sitecustomize.py").write_text(NO_NETWORK)
    return run(
        folder, **TINY_RUN, DATA_PATH=str(data_folder), RUN_ID="first", PYTHONPATH=str(block)
    )


# ---- what a run prints and writes


def test_a_run_ends_well(first):
    assert first.status == 0, first.err
    names = {
        str(path.relative_to(first.folder)) for path in first.folder.rglob("*") if path.is_file()
    }
    assert names == {
        ARTIFACT_NAME,
        "logs/first.txt",
        "logs/first.json",
        f"logs/first.{ARTIFACT_NAME}",
    }
    kept, artifact = first.folder / f"logs/first.{ARTIFACT_NAME}", first.folder / ARTIFACT_NAME
    assert kept.read_bytes() == artifact.read_bytes()
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


def test_the_log_begins_with_the_source_and_has_every_setting(first):
    assert first.log().startswith(SCRIPT.read_text(encoding="utf-8"))
    assert SCRIPT.read_text(encoding="utf-8")[:200] not in first.out
    found = json.loads(re.search(r"^settings:(\{.*\})$", first.log(), re.M)[1])
    assert set(found) == set(Settings.__dataclass_fields__)
    for name, value in TINY_RUN.items():
        assert type(found[name.lower()])(value) == found[name.lower()], name


def test_the_console_is_the_end_of_the_log(first):
    lines = first.log().splitlines()
    assert [line for line in first.out.splitlines() if line not in lines] == []


def test_the_results_agree_with_the_log(first):
    results, log = first.results(), first.log()
    assert results["settings"] == json.loads(re.search(r"^settings:(\{.*\})$", log, re.M)[1])
    assert [results[key] for key in ("seed", "world_size", "device", "steps")] == [
        1337,
        1,
        "cpu",
        30,
    ]
    assert results["tokens"] == 30 * 256 and results["versions"]["torch"] == torch.__version__
    assert results["step_avg_ms"] == pytest.approx(1000 * results["train_seconds"] / 30)
    assert f"step:30/30 train_loss:{results['train_loss']:.4f} " in log
    assert f"model_params:{results['parameters']} " in log and results["parameters"] > 10_000
    for label in ("final_int6_roundtrip", "final_int6_sliding_window"):
        score = results[label]
        assert (
            f"{label}_exact val_loss:{score['val_loss']:.8f} val_bpb:{score['val_bpb']:.8f}\n"
            in log
        )
        assert score["targets"] == results["pre_quantization"]["targets"] > 1000
    before = results["pre_quantization"]
    assert (
        f"step:30/30 val_loss:{before['val_loss']:.4f} val_bpb:{before['val_bpb']:.4f} "
        f"train_time:{1000 * results['train_seconds']:.0f}ms step_avg:{results['step_avg_ms']:.2f}ms\n"
        in log
    )
    assert abs(before["val_bpb"] - results["final_int6_roundtrip"]["val_bpb"]) < 0.02
    assert results["eval_seconds"] > 0 and results["under_cap"] is True


def test_bytes_are_those_of_the_files(first):
    results = first.results()
    assert results["bytes_code"] == SCRIPT.stat().st_size
    assert results["bytes_model"] == (first.folder / ARTIFACT_NAME).stat().st_size
    assert results["bytes_total"] == results["bytes_code"] + results["bytes_model"]
    assert f"Total submission size int6+zstd: {results['bytes_total']} bytes\n" in first.out


def test_targets_and_bytes_are_those_of_the_split(first, data_folder):
    tokens = train_gpt.load_validation(train_gpt.find_shards(data_folder, "val"), VOCAB_SIZE)
    tokenizer = train_gpt.load_tokenizer(data_folder / "tokenizer.model", VOCAB_SIZE)
    starts = (tokens == 1).nonzero()[0].tolist() + [len(tokens)]
    size = sum(
        len(tokenizer.decode(tokens[a:b].tolist()).encode()) for a, b in zip(starts, starts[1:])
    )
    for label in ("pre_quantization", "final_int6_roundtrip", "final_int6_sliding_window"):
        assert (first.results()[label]["targets"], first.results()[label]["bytes"]) == (
            len(tokens) - 1,
            size,
        )


def test_a_run_learns_averages_and_trains_on_quantized_weights(first):
    results = first.results()
    losses = [float(loss) for loss in re.findall(r"train_loss:(\S+)", first.out)]
    assert losses[0] > 5.8 and losses[-1] < losses[0] - 0.5  # log(384) = 5.95
    assert results["exported"] == "swa" and 0 < results["late_qat_steps"] < 10
    assert first.out.count("late_qat:on") == 1


# ---- the artifact of a run


def test_an_artifact_scores_the_same_without_any_setting_of_the_model(first, data_folder, tmp_path):
    kept = {name: value for name, value in TINY_RUN.items() if name not in MODEL_SETTINGS}
    for name in ("TRAIN_BATCH_TOKENS", "MICRO_BATCH_TOKENS"):
        kept.pop(name)
    done = run(
        tmp_path, **kept, DATA_PATH=str(data_folder), ARTIFACT=str(first.folder / ARTIFACT_NAME)
    )
    assert done.status == 0, done.err
    assert done.final_lines() == first.final_lines() and len(done.final_lines()) == 2
    assert "train_loss" not in done.out and not (tmp_path / ARTIFACT_NAME).exists()
    for key in ("bytes_model", "bytes_total", "bytes_code"):
        assert done.results()[key] == first.results()[key]


def test_sample_continues_a_text(first, data_folder, run_here, tmp_path):
    (tmp_path / "data").mkdir()  # neither split is needed for this
    shutil.copy(data_folder / "tokenizer.model", tmp_path / "data")
    options = dict(
        ARTIFACT=str(first.folder / ARTIFACT_NAME),
        DATA_PATH=str(tmp_path / "data"),
        DEVICE="cpu",
        DTYPE="float32",
        COMPILE="0",
        SAMPLE="Return the number  of",
        SAMPLE_TOKENS="80",
    )
    texts = []
    for i, changes in enumerate(
        ({}, {}, {"SEED": "5"}, {"SAMPLE_TEMPERATURE": "0", "SAMPLE_TOKENS": "3"})
    ):
        done = run_here(**{"SEED": "1", **options, **changes}, RUN_ID=str(i))
        assert done.status == 0, done.err
        texts.append(done.out[done.out.rindex("Return the number  of") :])
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) > len(texts[3]) > len("Return the number  of\n")


def test_a_sample_needs_the_tokenizer_of_the_artifact(first, data_folder, run_here, tmp_path):
    model = (data_folder / "tokenizer.model").read_bytes()
    (tmp_path / "other.model").write_bytes(
        model + b"\x9a\x06\x00"
    )  # an unknown empty field: the same pieces
    done = run_here(
        ARTIFACT=str(first.folder / ARTIFACT_NAME),
        DATA_PATH=str(data_folder),
        SAMPLE="x",
        COMPILE="0",
        TOKENIZER_PATH=str(tmp_path / "other.model"),
    )
    assert done.status == 2 and "tokenizer" in done.err and len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data[:500] + b"\0" + data[501:], lambda data: b""],
)
def test_a_damaged_artifact_is_refused(first, data_folder, run_here, tmp_path, damage):
    (tmp_path / "bad.ptz").write_bytes(damage((first.folder / ARTIFACT_NAME).read_bytes()))
    done = run_here(ARTIFACT="bad.ptz", DATA_PATH=str(data_folder))
    assert done.status == 2 and re.fullmatch(r"error: bad\.ptz: .*\n", done.err)
    assert not (tmp_path / "logs").exists()


def test_a_setting_that_contradicts_the_artifact_is_refused(first, data_folder, run_here):
    done = run_here(
        ARTIFACT=str(first.folder / ARTIFACT_NAME), DATA_PATH=str(data_folder), NUM_LAYERS="4"
    )
    assert done.status == 2 and "NUM_LAYERS" in done.err and "3" in done.err


# ---- the same run again, with other seeds, ranks and a compiler


def test_the_same_run_gives_the_same_bytes_and_a_mistyped_variable_a_warning(
    first, data_folder, tmp_path
):
    again = run(tmp_path, **TINY_RUN, DATA_PATH=str(data_folder), NUM_LAYER="9", LR_MATRIX="1")
    assert again.status == 0, again.err
    assert (tmp_path / ARTIFACT_NAME).read_bytes() == (first.folder / ARTIFACT_NAME).read_bytes()
    assert again.final_lines() == first.final_lines()
    losses = [re.findall(r"(?:train|val)_loss:\S+", done.out) for done in (first, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 9
    assert "NUM_LAYER is not a setting; did you mean NUM_LAYERS?" in again.err
    assert "LR_MATRIX is not a setting; did you mean MATRIX_LR?" in again.err


def test_over_the_cap_nothing_is_called_final(first, data_folder, tmp_path):
    """With another seed, whose losses are others."""
    done = run(
        tmp_path, **{**TINY_RUN, "ARTIFACT_MAX_BYTES": "1000"}, SEED="2", DATA_PATH=str(data_folder)
    )
    assert done.status != 0 and "final_" not in done.out and not (tmp_path / ARTIFACT_NAME).exists()
    results = done.results()
    assert results["under_cap"] is False and "bytes over the cap" in done.err
    assert not [key for key in results if key.startswith("final_")]
    size = (tmp_path / OVER_CAP_NAME).stat().st_size
    assert results["bytes_model"] == size and str(results["bytes_total"] - 1000) in done.err
    assert "quant:fit" in re.search(r"artifact:.*", done.out)[0]
    # no step is left to make coarser: all codes are zero
    _, weights = train_gpt.read_artifact((tmp_path / OVER_CAP_NAME).read_bytes(), "a")
    assert not any(weight.any() for name, weight in weights.items() if ".mlp." in name)
    assert results["train_loss"] != first.results()["train_loss"]


def test_two_ranks_score_like_one(first, data_folder, tmp_path):
    done = run(tmp_path, ranks=2, **TINY_RUN, DATA_PATH=str(data_folder))
    assert done.status == 0, done.err
    ours, theirs = done.results(), first.results()
    assert (ours["world_size"], ours["steps"], ours["tokens"]) == (2, 30, theirs["tokens"])
    for label in ("pre_quantization", "final_int6_roundtrip", "final_int6_sliding_window"):
        assert abs(ours[label]["val_bpb"] - theirs[label]["val_bpb"]) < 1e-3
        assert [ours[label][key] == theirs[label][key] for key in ("targets", "bytes")] == [
            True,
            True,
        ]
    assert len(done.final_lines()) == 2 and len(list((tmp_path / "logs").glob("*.txt"))) == 1
    assert "is not a setting" not in done.err  # torchrun's own variables look like none


def test_late_qat_fires_when_compiled(data_folder, tmp_path, run_here):
    """The compiled run with QAT has the losses of the eager one with QAT, not of the eager one without."""
    if not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    options = {
        **TINY_RUN,
        "NUM_LAYERS": "2",
        "ITERATIONS": "12",
        "WARMDOWN_ITERS": "12",
        "MATRIX_LR": "0.1",
        "WARMDOWN_FRACTION": "1",
        "LATE_QAT_THRESHOLD": "0.2",
        "INT5_MLP": "1",
        "MICRO_BATCH_TOKENS": "256",
        "DATA_PATH": str(data_folder),
    }
    done = run(tmp_path, **{**options, "COMPILE": "1"}, RUN_ID="compiled")
    assert done.status == 0 and len(done.final_lines()) == 2, done.err
    assert run_here(**options, RUN_ID="eager").status == 0
    assert run_here(**{**options, "LATE_QAT_THRESHOLD": "0"}, RUN_ID="without").status == 0
    compiled, eager, without = (done.results(name) for name in ("compiled", "eager", "without"))
    assert any("compile:blocks" in line for line in compiled["runtime"])
    assert (
        compiled["late_qat_steps"] == eager["late_qat_steps"] == 2
        and without["late_qat_steps"] == 0
    )
    effect = abs(
        without["train_loss"] - eager["train_loss"]
    )  # after more steps, flipped codes add up to more
    difference = abs(compiled["train_loss"] - eager["train_loss"])
    assert effect > 2e-4 and difference < 0.2 * effect


# ---- what is refused


def test_the_command_line_refuses_with_one_line_before_anything_is_made(tmp_path):
    done = run(tmp_path, **{**TINY_RUN, "NUM_LAYERS": "many", "ZSTD_LEVEL": "99"})
    assert done.status == 2 and re.fullmatch(
        r"error: .*NUM_LAYERS=many.*ZSTD_LEVEL=99.*\n", done.err
    )
    assert done.out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(MODEL_DIM="33"), "MODEL_DIM=33"),
        (dict(ARTIFACT="absent.ptz"), "absent.ptz"),
        (dict(SAMPLE="text"), "SAMPLE"),
        (dict(DEVICE="cuda"), "CUDA|GPU"),
        (dict(ATTENTION="flash3"), "flash3"),
        (dict(VOCAB_SIZE="1024"), "tokenizer.model"),
        (dict(TOKENIZER_PATH="absent.model"), "absent.model"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(changes, word, data_folder, run_here):
    if "DEVICE" in changes and torch.cuda.is_available():
        pytest.skip("has a GPU")
    done = run_here(**{**TINY_RUN, "DATA_PATH": str(data_folder), **changes})
    assert done.status == 2 and re.fullmatch(rf"error: .*({word}).*\n", done.err)
    assert not list(done.folder.glob("*.ptz"))


def test_an_argument_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--num-layers=9"])
    assert train_gpt.main() == 2 and "--num-layers=9" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["absent", "file", "empty"])
def test_a_wrong_data_path_is_never_the_demo_corpus(kind, run_here, tmp_path, monkeypatch):
    path = tmp_path / "elsewhere"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.touch()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a corpus was built"))
    done = run_here(**TINY_RUN, DATA_PATH=str(path), TOKENIZER_PATH="")
    assert done.status == 2 and re.fullmatch(r"error: .*\n", done.err)
    assert "demo" not in done.out + done.err and not (tmp_path / "data").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_found_before_training(split, data_folder, run_here, tmp_path):
    shutil.copytree(data_folder, tmp_path / "data")
    (tmp_path / f"data/x_{split}_000000.bin").unlink()
    done = run_here(**TINY_RUN, DATA_PATH="data")
    assert done.status == 2 and f"no {split} shards" in done.err and "train_loss" not in done.out


def test_a_taken_run_id_is_refused_and_nothing_is_overwritten(data_folder, run_here, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/mine.txt").write_text("an earlier run")
    done = run_here(**TINY_RUN, DATA_PATH=str(data_folder), RUN_ID="mine")
    assert done.status == 2 and "RUN_ID=mine" in done.err
    files = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert files == {"mine.txt": "an earlier run"}


def test_validation_is_not_opened_before_the_artifact_is_written(data_folder, run_here, tmp_path):
    shutil.copytree(data_folder, tmp_path / "data")
    (tmp_path / "data/x_val_000000.bin").write_bytes(b"damaged")
    done = run_here(**{**TINY_RUN, "ITERATIONS": "3"}, DATA_PATH="data")
    assert "step:3/30" not in done.out and "step:3/3 train_loss:" in done.out
    assert "Total submission size" in done.out and (tmp_path / ARTIFACT_NAME).stat().st_size > 1000
    assert done.status == 2 and re.fullmatch(r"error: .*x_val_000000\.bin.*\n", done.err)
    assert "final_" not in done.out.replace(ARTIFACT_NAME, "")
