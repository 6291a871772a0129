"""Logs of any script: source and lines told apart, scores, clocks and bytes of all shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from field_logs import FieldLog, find_source
from tiny_record import COMMITTED

RULE = "=" * 100
SOURCE = '''"""Mine.

Code size: 1 bytes
"""
import os

def main():
    print(f"seed:{seed}")

if __name__ == "__main__":
    main()
'''
RUN = """world_size:8 grad_accum_steps:1
seed:42
step:10/20 train_loss:2.5000 train_time:1000ms step_avg:100.00ms
step:20/20 val_loss:2.0000 val_bpb:1.2000 train_time:2000ms step_avg:100.00ms
"""


@pytest.fixture
def read(tmp_path):
    """Reads a text as a log."""

    def read(text: str, name: str = "train.log") -> FieldLog:
        path = tmp_path / name
        path.write_text(text, newline="")
        return FieldLog(path, name)

    return read


# ---- Source
@pytest.mark.parametrize(
    "text",
    [
        f"{SOURCE}{RULE}\nRunning Python 3.12\n{RULE}\n{RUN}",
        f"{SOURCE}\n{RUN}",
        f"Hyperparameters:\n  seed: 42\n{RULE}\n{SOURCE}{RULE}\n{RUN}",
        f"{RUN}{RULE}\n{SOURCE}",
        f"{SOURCE}{RULE}\n{RUN}".replace("\n", "\r\n"),
    ],
)
def test_the_source_is_apart_from_the_runs_lines(text, read):
    log = read(text)
    assert log.source.strip() == SOURCE.strip()
    assert log.code_bytes == {} and log.seed == 42
    assert log.training[0] == 2.0 and log.steps[0] == 20
    assert "train_time:2000ms" in log.lines[log.training[1] - 1]


def test_a_log_without_source_has_none(read):
    log = read(f"W0319 torch/distributed/run.py:766]\n{RUN}")
    assert log.source == "" and list(log.source_lines) == []


def test_a_line_of_python_in_a_run_makes_no_source(read):
    log = read(f"{RUN}import torch\nUserWarning: no\n{RUN}")
    assert log.source == "" and log.seed == 42


def test_what_is_left_of_an_older_log_behind_a_run_is_source_and_a_run(read):
    helpers = "".join(f"def helper_{number}():\n    pass\n" for number in range(25))
    log = read(f"{RUN})\n{helpers}{SOURCE}{RULE}\nRunning Python\n{RULE}\n{RUN}")
    assert "def main" in log.source and "world_size" not in log.source
    assert (log.seed, log.steps[0], log.code_bytes) == (42, 20, {})


def test_where_a_source_without_a_line_behind_it_ends():
    lines = [*SOURCE.splitlines(), "step:1/2 train_loss:1.0 train_time:1ms step_avg:1.00ms"]
    source, numbers = find_source(lines)
    assert source == SOURCE and list(numbers) == list(range(1, len(lines)))


# ---- Scores
def test_an_exact_line_takes_the_place_of_its_rounded_one(read):
    log = read(
        "final_int6_roundtrip val_loss:1.9375 val_bpb:1.1475 eval_time:3789ms\n"
        "final_int6_roundtrip_exact val_loss:1.93747968 val_bpb:1.14748460\n"
        "quantized_ttt_phased val_loss:2.31115900 val_bpb:1.05610947 eval_time:540111ms\n"
        "total_eval_time:540.1s\n"
    )
    first, last = log.finals
    assert (first.val_bpb, first.decimals, first.seconds) == (1.1474846, 8, 3.789)
    assert (last.label, last.seconds, last.line) == ("quantized_ttt_phased", 540.111, 3)
    assert log.last("evaluation").values["seconds"] == "540.1"


@pytest.mark.parametrize(
    "label, packed",
    [
        ("diagnostic pre-quantization post-ema", False),
        ("DIAGNOSTIC post_swa", False),
        ("pre_quant_eval", False),
        ("post_train_ema decay:0.997000", False),
        ("selected_final_weights:ema", False),
        ("diagnostic quantized", True),
        ("final_int8_zlib_roundtrip", True),
        ("legal_ttt", True),
        ("quantized_sliding_window", True),
        ("final_ttt_lora", True),
    ],
)
def test_a_label_says_whether_the_artifact_was_scored(label, packed, read):
    [scored] = read(f"{label} val_loss:1.9230 val_bpb:1.1389 eval_time:2008ms\n").scores
    assert scored.packed is packed


@pytest.mark.parametrize(
    "line",
    [
        "step:20/20 val_loss:2.0000 val_bpb:1.2000 train_time:2000ms step_avg:100.00ms",
        "4945/20000 val_loss: 2.3574 val_bpb: 1.0769",
        "  sliding_eval [ 99.1%] 120032/121136 windows running_bpb=1.170649",
        "  ttt_chunk [474/474] bpb=1.051535 time=336.0s",
        "final_int6_roundtrip val_loss:nan val_bpb:nan",
        'log(f"final val_loss:{loss:.4f} val_bpb:{bpb:.4f}")',
    ],
)
def test_what_is_no_score_of_a_model(line, read):
    assert read(f"{line}\n").finals == []


def test_settings_may_stand_between_label_and_score(read):
    [scored] = read(
        "final_sliding_eval_exact stride:64 val_loss:1.95946000 val_bpb:1.1605\n"
    ).finals
    assert (scored.label, scored.val_bpb) == ("final_sliding_eval", 1.1605)


@pytest.mark.parametrize(
    "prefix", ["[rank0]: ", "2026-03-20 12:00:00,123 - INFO ", "[2026-03-20 12:00:00] ", "\x1b[32m"]
)
def test_what_a_logger_puts_before_a_line_is_left_out(prefix, read):
    text = "\n".join(f"{prefix}{line}" for line in RUN.splitlines())
    log = read(text)
    assert log.seed == 42 and log.training[0] == 2.0


def test_a_log_in_two_bytes_a_character_is_read(tmp_path):
    path = tmp_path / "train.log"
    path.write_bytes(RUN.encode("utf-16"))
    assert FieldLog(path, "train.log").steps[0] == 20


def test_a_score_under_another_name_is_one_score(read):
    log = read(
        "legal_ttt_exact val_loss:0.71526352 val_bpb:1.03190713 eval_time:0ms\n"
        "final_int6_sliding_window_exact val_loss:0.71526352 val_bpb:1.03190713 eval_time:0ms\n"
        "ppm_native:total_pass_time:189.8s\n"
    )
    assert [(each.label, each.seconds) for each in log.finals] == [("legal_ttt", None)]
    assert log.last("evaluation").values["seconds"] == "189.8"


def test_the_time_of_a_pass_may_be_called_time(read):
    [scored] = read("final_sliding_window val_loss:1.9846 val_bpb:1.1754 time:75294ms\n").scores
    assert scored.seconds == 75.294


def test_a_clock_that_goes_back_while_steps_go_on_is_seen(read):
    line = "step:{}/9 train_loss:2.0 train_time:{}ms step_avg:1.00ms\n"
    read_lines = lambda *pairs: read("".join(line.format(*pair) for pair in pairs))  # noqa: E731
    before, after = read_lines((1, 10), (2, 20), (2, 7), (3, 9)).clock_goes_back
    assert (before.line, after.line) == (2, 3)
    # Another run of its own begins at the first step again.
    assert read_lines((1, 10), (2, 20), (1, 7), (2, 14)).clock_goes_back is None


def test_a_validation_in_training_is_before_packing(read):
    [scored] = read(RUN).before_packing
    assert (scored.label, scored.val_bpb, scored.packed) == ("step 20", 1.2, False)


# ---- Seeds
@pytest.mark.parametrize(
    "text, name, seed",
    [
        ("lr:embed=0.035 wall:600s seed:1337\n", "a.log", 1337),
        ("Hyperparameters:\n  seed: 0\n", "train_seed7.log", 0),
        ("nothing\n", "train_seed7.log", 7),
        ("nothing\n", "runs/train_s42.log", 42),
        ("nothing\n", "train.log", None),
        ("seed:1\nseed:2\n", "train_seed1.log", None),
    ],
)
def test_the_seed_is_that_of_the_lines_else_of_the_name(text, name, seed, read):
    log = read(text, Path(name).name)
    log.name = name
    assert log.seed == seed


# ---- Bytes
def test_a_total_of_the_model_before_packing_is_none(read):
    raw = "Serialized model: 98437419 bytes\nCode size: 76945 bytes\n"
    assert read(f"{raw}Total submission size: 98514364 bytes\n").total_bytes is None
    log = read(
        f"{raw}Total submission size: 98514364 bytes\nTotal submission size: 15912380 bytes\n"
    )
    assert log.total_bytes == (15912380, 4)
    log = read(
        "Total submission size raw: 99999 bytes\nTotal submission size int6+zstd22: 77777 bytes\n"
    )
    assert log.total_bytes == (77777, 2)
    # Some leave the unit away; a total in MB is none in bytes.
    assert read("Total submission size quant+zstd: 15844924\n").total_bytes == (15844924, 1)
    assert read("Total submission size: 15.94 MB\n").total_bytes is None


def test_sizes_may_stand_two_in_a_line(read):
    log = read(
        "Serialized model: 87413467 bytes  Code: 44100 bytes\n"
        "Serialized zstd-22: 15886818 bytes  Total: 15930918 bytes\n"
    )
    assert log.total_bytes == (15930918, 2)
    assert log.count("packed bytes", "bytes") == (15886818, 2)
    assert log.code_bytes == {"": (44100, 1)}


def test_code_has_a_count_for_each_kind(read):
    log = read("Code size (uncompressed): 157868 bytes\nCode size (compressed): 31999 bytes\n")
    assert log.code_bytes == {"uncompressed": (157868, 1), "compressed": (31999, 2)}


# ---- Curves
def test_a_curve_has_steps_seconds_and_tokens(read):
    log = read(
        "  train_batch_tokens: 1000000\n"
        "500/20000 train_loss: 2.5705 train_time: 0.8m tok/s: 10000000\n"
        "600/20000 val_loss: 2.3466 val_bpb: 1.0722\n"
        "stopping_early: wallclock_cap train_time: 61672ms step: 600/20000\n"
    )
    assert log.curve("train_loss") == [(500, 2.5705, 50.0, 500_000_000)]
    assert log.curve("val_bpb") == [(600, 1.0722, 61.672, 600_000_000)]
    assert read(RUN).curve("val_loss") == [(20, 2.0, 2.0, None)]


def test_our_own_logs_are_read_as_well():
    log = FieldLog(COMMITTED / "train_seed1.log", "train_seed1.log")
    assert log.is_own and log.seed == 1 and log.source.startswith('"""')
    assert [scored.label for scored in log.finals] == [
        "final_int6_roundtrip",
        "final_int6_sliding_window",
    ]
    [point] = log.curve("val_bpb")
    assert point.tokens == point.step * log.own_settings["train_batch_tokens"]
