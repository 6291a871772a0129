"""Settings: presets, errors that name everything at once, documents, and who reads what."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch

import field_settings
import settings_table
import train_gpt
from conftest import ROOT
from runs import is_one_error, run
from train_gpt import (
    ABSENT_SETTINGS,
    ALWAYS_ON,
    GPT,
    OTHER_NAMES,
    PRESETS,
    RELATED_SETTINGS,
    Runtime,
    Settings,
    UserError,
    choose_compilation,
    fields_of,
    foreign_settings,
    help_text,
    is_foreign_setting,
    mistyped_settings,
    settings_from,
    stored_parameters,
)

README = ROOT / "README.md"
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
NAMES = [field.name.upper() for field in fields_of()]

RECORD_DEFAULTS = """
    NUM_LAYERS=11 MODEL_DIM=512 VOCAB_SIZE=0 NUM_HEADS=8 NUM_KV_HEADS=4 QK_GAIN_INIT=5
    ROPE_DIMS=16 ROPE_BASE=10000 KEY_OFFSET_ENABLED=1 XSA_LAST_N=11 SPARSE_ATTN_GATE_ENABLED=1
    GATE_WINDOW=12 SPARSE_ATTN_GATE_SCALE=0.5 DOCUMENT_ATTENTION=1 MLP_MULT=4 NEGATIVE_SLOPE=0.5
    LN_SCALE=1
    SKIP_GATES_ENABLED=1 NUM_LOOPS=2 LOOP_START=3 LOOP_END=5 ENABLE_LOOPING_AT=0.35
    PARALLEL_START_LAYER=8 SMEAR_ENABLED=1 BIGRAM_VOCAB_SIZE=4096 BIGRAM_DIM=128
    MEMORY_TOKENS=0 BACKOUT_ENABLED=1 BACKOUT_LAMBDA_INIT=0.2 BACKOUT_LAYER=-1 TIE_EMBEDDINGS=1
    LOGIT_SOFTCAP=20 MTP_NUM_HEADS=0 MTP_LOSS_WEIGHT=0.2 TIED_EMBED_INIT_STD=0.005
    MATRIX_LR=0.026 MUON_MOMENTUM=0.97 MUON_MOMENTUM_WARMUP_START=0.92
    MUON_MOMENTUM_WARMUP_STEPS=1500 MUON_BACKEND_STEPS=5 MUON_ROW_NORMALIZE=1 MUON_WD=0.095
    TIED_EMBED_LR=0.03 EMBED_WD=0.085 SCALAR_LR=0.02 ADAM_WD=0.02 BETA1=0.9 BETA2=0.99
    ADAM_EPS=1e-8 ITERATIONS=9000 WARMDOWN_ITERS=9000 WARMDOWN_FRACTION=0.85 MIN_LR=0.1
    MAX_WALLCLOCK_SECONDS=600 GRAD_CLIP_NORM=0.3 TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048
    WARMUP_STEPS=20 SWA_ENABLED=0 SWA_EVERY=50 SWA_START_SCALE=0.2 EMA_ENABLED=1 EMA_SPAN=0.06
    EMA_EVERY=10 LATE_QAT_THRESHOLD=0.1 INT5_MLP=auto ZSTD_LEVEL=22 ARTIFACT_MAX_BYTES=16000000
    EVAL_STRIDE=64 EVAL_SEQ_LEN=2048 EVAL_BATCH_SEQS=256 VAL_LOSS_EVERY=0
"""

# What both entries did without or set otherwise than the record preset of today.
OF_MARCH = """
    QK_GAIN_INIT=1.5 KEY_OFFSET_ENABLED=0 XSA_LAST_N=0 SPARSE_ATTN_GATE_ENABLED=0
    DOCUMENT_ATTENTION=0 MLP_MULT=3 NEGATIVE_SLOPE=0 SKIP_GATES_ENABLED=0 NUM_LOOPS=0
    PARALLEL_START_LAYER=0 LOGIT_SOFTCAP=30 WARMDOWN_ITERS=3000
    WARMDOWN_FRACTION=0.6 MIN_LR=0 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500
    MUON_ROW_NORMALIZE=0 MUON_WD=0.04 EMBED_WD=0.04 ADAM_WD=0.04 BETA2=0.95 SWA_ENABLED=1
    EMA_SPAN=0
"""
# The public entries as variables over PRESET=record.
ENTRY_339 = """
    NUM_LAYERS=11 BIGRAM_VOCAB_SIZE=4096 MEMORY_TOKENS=0 ROPE_DIMS=0 LN_SCALE=0
    LATE_QAT_THRESHOLD=0 INT5_MLP=0 CODEC=zstd MATRIX_LR=0.025 SCALAR_LR=0.025
    TIED_EMBED_LR=0.035 MUON_MOMENTUM=0.99 EMA_ENABLED=0 ITERATIONS=9000 MAX_WALLCLOCK_SECONDS=600
    EVAL_STRIDE=64 BACKOUT_ENABLED=1 BACKOUT_LAMBDA_INIT=0.2 SWA_EVERY=200 SWA_START_SCALE=0.4
"""
ENTRY_352 = """
    NUM_LAYERS=10 BIGRAM_VOCAB_SIZE=10240 MEMORY_TOKENS=64 BACKOUT_ENABLED=0 MTP_NUM_HEADS=2
    MTP_LOSS_WEIGHT=0.2 MATRIX_LR=0.04 SCALAR_LR=0.04 TIED_EMBED_LR=0.05 MUON_MOMENTUM=0.95
    TRAIN_BATCH_TOKENS=524288 ITERATIONS=20000 EMA_ENABLED=1 EMA_DECAY=0.997 EMA_EVERY=10
    LATE_QAT_THRESHOLD=0.1 INT5_MLP=1 CODEC=zstd EVAL_SEQ_LEN=1024 EVAL_STRIDE=128
    EVAL_BATCH_SEQS=256 VAL_LOSS_EVERY=1000
"""

# What is in everyone's environment, or is set for torch and its launcher: no setting, and nothing
# like one.
FOREIGN = """
    PATH HOME USER SHELL LANG LC_ALL TERM PWD OLDPWD SHLVL LOGNAME TMPDIR EDITOR DISPLAY HOSTNAME
    VIRTUAL_ENV PYTHONPATH PYTHONHASHSEED PYTHONUNBUFFERED CONDA_PREFIX CONDA_DEFAULT_ENV
    OMP_NUM_THREADS MKL_NUM_THREADS MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE
    LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE GROUP_WORLD_SIZE
    TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RESTART_COUNT TORCHELASTIC_ERROR_FILE
    TORCHELASTIC_USE_AGENT_STORE TORCH_NCCL_ASYNC_ERROR_HANDLING NCCL_DEBUG NCCL_IB_DISABLE
    NCCL_SOCKET_IFNAME CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING
    LD_LIBRARY_PATH LD_PRELOAD CC CXX CFLAGS PYTORCH_CUDA_ALLOC_CONF TORCH_COMPILE_DEBUG
    TORCHINDUCTOR_CACHE_DIR TORCH_LOGS TRITON_CACHE_DIR HF_HOME WANDB_MODE SLURM_JOB_ID SLURM_NODEID
    SLURM_NTASKS SSH_AUTH_SOCK XDG_RUNTIME_DIR DEBIAN_FRONTEND GIT_EDITOR MAIL PAGER _
"""


def environment_of(pairs: str) -> dict[str, str]:
    """NAME=value pairs between spaces as variables."""
    return dict(pair.split("=", 1) for pair in pairs.split())


def settings(pairs: str = "", stored: dict | None = None, **environment: str) -> Settings:
    """The settings of these variables, alone or over stored ones."""
    return settings_from({**environment_of(pairs), **environment}, stored)[0]


def problems(pairs: str) -> str:
    """What is said of variables that must be refused: one line."""
    with pytest.raises(UserError) as error:
        settings(pairs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- defaults and presets


@pytest.mark.parametrize("pair", RECORD_DEFAULTS.split())
def test_record_default(pair):
    name, value = pair.split("=")
    found = getattr(settings(PRESET="record"), name.lower())
    if isinstance(found, str):
        assert found == value
    else:
        assert float(found) == float(value)


def test_every_record_default_is_inside_its_own_limits():
    record = settings(PRESET="record")
    assert record == Settings(preset="record")


def test_pocket_has_a_block_with_two_lanes_and_the_features_that_help_it():
    pocket = settings(PRESET="pocket")
    assert pocket.parallel_start_layer < pocket.num_layers
    for feature in (
        "smear_enabled",
        "backout_enabled",
        "ln_scale",
        "tie_embeddings",
        "rope_dims",
        "bigram_vocab_size",
        "key_offset_enabled",
        "xsa_last_n",
        "sparse_attn_gate_enabled",
        "negative_slope",
        "skip_gates_enabled",
        "parallel_start_layer",
        "muon_row_normalize",
        "late_qat_threshold",
    ):
        assert getattr(pocket, feature), feature
    assert pocket.max_wallclock_seconds == 150


def test_an_average_that_is_asked_for_is_not_hidden_by_that_of_the_preset():
    assert settings("PRESET=record").ema_enabled
    assert not settings("PRESET=record SWA_ENABLED=1").ema_enabled
    assert settings("PRESET=record SWA_ENABLED=1 EMA_ENABLED=1").ema_enabled
    assert settings("PRESET=record EMA_DECAY=0.99").ema_span == 0
    assert settings("PRESET=record EMA_DECAY=0.99 EMA_SPAN=0.1").ema_span == 0.1


def test_preset_follows_the_device(monkeypatch):
    record_dim = Settings().model_dim
    pocket_dim = PRESETS["pocket"]["model_dim"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settings().model_dim == record_dim
    assert settings_from({})[1] == "preset:record (CUDA is there)"
    assert settings(DEVICE="cpu").model_dim == pocket_dim
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settings().model_dim == pocket_dim
    assert settings_from({})[1] == "preset:pocket (no CUDA)"
    assert settings(DEVICE="cuda").model_dim == record_dim


@pytest.mark.parametrize("preset", ["record", "pocket"])
def test_a_variable_wins_over_the_preset(preset):
    plain = settings(PRESET=preset)
    pairs = "MODEL_DIM=256 NUM_HEADS=4 MATRIX_LR=0.5 SWA_ENABLED=0 INT5_MLP=1"
    changed = settings(pairs, PRESET=preset)
    expected = dataclasses.replace(
        plain,
        model_dim=256,
        num_heads=4,
        matrix_lr=0.5,
        swa_enabled=False,
        int5_mlp="1",
        quant="rows",
    )
    assert changed == expected


@pytest.mark.parametrize(
    "preset, pairs", [("entry_339", ENTRY_339), ("entry_352", ENTRY_352)], ids=["339", "352"]
)
def test_the_preset_of_an_entry_is_its_variables(preset, pairs):
    as_variables = settings(f"VOCAB_SIZE=1024 {OF_MARCH} {pairs}", PRESET="record")
    as_preset = settings(PRESET=preset)
    assert dataclasses.replace(as_preset, preset="record") == as_variables
    assert settings_from({"PRESET": preset})[1] == f"preset:{preset} (asked for)"


@pytest.mark.parametrize(
    "preset, parameters, exported",
    [("entry_339", 27_092_058, 27_092_058), ("entry_352", 26_598_481, 25_549_905)],
)
def test_the_model_of_an_entry_has_its_parameters(preset, parameters, exported):
    """As published: #352's log counts 26,598,481, its MTP heads included."""
    entry = settings(PRESET=preset)
    with torch.device("meta"):
        model = GPT(entry, Runtime())
    stored = stored_parameters(model, entry.quant)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in stored.values()) == exported


@pytest.mark.parametrize("preset", ["entry_339", "entry_352"])
@pytest.mark.parametrize(
    "pair, changes",
    [
        ("MUON_WD=0.1", dict(muon_wd=0.1)),
        ("MEMORY_TOKENS=32", dict(memory_tokens=32)),
        ("BACKOUT_ENABLED=1", dict(backout_enabled=True)),
        ("EMA_ENABLED=0", dict(ema_enabled=False)),
        ("EVAL_SEQ_LEN=4096", dict(eval_seq_len=4096)),
        ("CODEC=rans", dict(codec="rans")),
        # What the other one of these two settings must be follows from the one that is given.
        ("QUANT=fit", dict(quant="fit", int5_mlp="auto")),
        ("INT5_MLP=0", dict(int5_mlp="0")),
        ("INT5_MLP=1", dict(int5_mlp="1")),
        ("INT5_MLP=auto", dict(int5_mlp="auto")),
    ],
    ids=str,
)
def test_a_variable_wins_over_the_preset_of_an_entry(preset, pair, changes):
    plain = settings(PRESET=preset)
    assert settings(pair, PRESET=preset) == dataclasses.replace(plain, **changes)


@pytest.mark.parametrize("pair, quant", [("INT5_MLP=auto", "fit"), ("INT5_MLP=0", "rows")])
def test_int5_mlp_asks_for_the_entries_rows(pair, quant):
    assert settings(pair, PRESET="record").quant == quant


def test_int5_mlp_and_fitted_steps_contradict_each_other():
    assert settings(PRESET="record", INT5_MLP="1").quant == "rows"
    assert settings(PRESET="record", QUANT="rows").int5_mlp == "auto"
    for preset in ("record", "entry_339", "entry_352"):
        message = problems(f"PRESET={preset} QUANT=fit INT5_MLP=1")
        assert "INT5_MLP is for QUANT=rows" in message


def test_an_empty_variable_is_one_that_is_not_set():
    assert settings(PRESET="record", NUM_LAYERS="", DATA_PATH="") == settings(PRESET="record")


def test_derived_sizes_follow_from_the_settings():
    s = Settings()
    assert (s.head_dim, s.rotary_dims, s.mlp_hidden) == (64, 16, 2048)
    assert (s.num_visits, s.num_skips, s.middle_layer) == (17, 8, 5)
    assert s.visited_layers(0) == list(range(11))
    assert s.visited_layers(2) == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert (s.row_tokens, s.window_tokens, s.step_rows) == (2048, 2048, 384)
    s = settings(PRESET="entry_352")
    assert (s.row_tokens, s.window_tokens, s.step_rows) == (1984, 960, 256)
    assert dataclasses.replace(s, rope_dims=0).rotary_dims == s.head_dim
    assert dataclasses.replace(s, backout_layer=0).middle_layer == 0


# ---- types, ranges, combinations


@pytest.mark.parametrize(
    "pair",
    [
        "NUM_LAYERS=many",
        "NUM_LAYERS=9.5",
        "NUM_LAYERS=1e1",
        "MATRIX_LR=fast",
        "MATRIX_LR=nan",
        "MATRIX_LR=inf",
        "SMEAR_ENABLED=maybe",
        "SMEAR_ENABLED=2",
        "NUM_LAYERS=0",
        "BETA1=1",
        "ZSTD_LEVEL=23",
        "SEED=-1",
        "INT5_MLP=2",
        "PRESET=huge",
        "DEVICE=tpu",
        "DTYPE=float16",
        "ATTENTION=flash9",
        "COMPILE=2",
        "EVAL_STRIDE=0",
        "ARTIFACT_MAX_BYTES=0",
        "LOGIT_SOFTCAP=0",
        "EMA_DECAY=1.1",
        "WARMDOWN_FRACTION=2",
        "MODEL_DIM=-8",
        pytest.param("SEED=" + "9" * 25, id="SEED=too-large-for-torch"),
        pytest.param("NUM_LAYERS=" + "9" * 400, id="NUM_LAYERS=400-digits"),
    ],
)
def test_a_bad_value_is_named(pair):
    # The pair comes second, since it may give another preset.
    assert pair in problems(f"PRESET=record {pair}")


@pytest.mark.parametrize(
    "text, value", [("1", True), ("0", False), ("true", True), ("False", False)]
)
def test_a_switch_takes_0_and_1(text, value):
    assert settings(PRESET="record", SMEAR_ENABLED=text).smear_enabled is value


@pytest.mark.parametrize(
    "pairs",
    [
        "MODEL_DIM=500 NUM_HEADS=8",
        "NUM_HEADS=8 NUM_KV_HEADS=3",
        "ROPE_DIMS=7",
        "ROPE_DIMS=66",
        # 63 dimensions of a head cannot all rotate in pairs.
        "ROPE_DIMS=0 MODEL_DIM=504 NUM_HEADS=8",
        "BACKOUT_LAYER=11",
        "MLP_MULT=0.01 MODEL_DIM=64 NUM_HEADS=8 ROPE_DIMS=8",
        "MEMORY_TOKENS=2047 DOCUMENT_ATTENTION=0",
        "MEMORY_TOKENS=64 DOCUMENT_ATTENTION=0 EVAL_SEQ_LEN=64",
        "MEMORY_TOKENS=1",
        "EVAL_STRIDE=2049",
        "EVAL_STRIDE=1985 MEMORY_TOKENS=64 DOCUMENT_ATTENTION=0",
        "TRAIN_BATCH_TOKENS=786433",
        "MICRO_BATCH_TOKENS=2047",
        "MTP_NUM_HEADS=2048",
        "SAMPLE=text",
        "RUN_ID=a/b",
    ],
)
def test_an_impossible_combination_is_refused(pairs):
    assert pairs.split("=")[0] in problems(f"PRESET=record {pairs}")


@pytest.mark.parametrize(
    "pairs",
    [
        "MODEL_DIM=504 NUM_HEADS=12",
        "ROPE_DIMS=62",
        "ROPE_DIMS=64 KEY_OFFSET_ENABLED=0",
        "BACKOUT_LAYER=10 PARALLEL_START_LAYER=0",
        "PARALLEL_START_LAYER=10",
        "LOOP_END=10 PARALLEL_START_LAYER=0",
        # A trunk that ends before has one lane.
        "NUM_LAYERS=8",
        "MEMORY_TOKENS=1984 EVAL_STRIDE=64 DOCUMENT_ATTENTION=0",
        "EVAL_STRIDE=1984 MEMORY_TOKENS=64 DOCUMENT_ATTENTION=0",
        "MICRO_BATCH_TOKENS=2048",
        "MTP_NUM_HEADS=2047",
        "SAMPLE=text ARTIFACT=file",
        "RUN_ID=a.b",
        "EVAL_STRIDE=2048",
    ],
)
def test_the_last_possible_combination_is_not(pairs):
    settings(f"PRESET=record {pairs}")


def test_a_taken_run_id_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings("PRESET=record RUN_ID=one")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/one.txt").touch()
    assert "RUN_ID=one" in problems("RUN_ID=one")


@pytest.mark.parametrize(
    "pairs",
    [
        "NUM_LAYERS=many MATRIX_LR=-1 INT5_MLP=maybe SMEAR_ENABLED=x ZSTD_LEVEL=0",
        "ROPE_DIMS=7 TRAIN_BATCH_TOKENS=100 SAMPLE=text RUN_ID=a/b EVAL_STRIDE=5000",
        "MATRIX_LR=fast SEED=-1 EVAL_STRIDE=5000 TRAIN_BATCH_TOKENS=100",
    ],
    ids=["values", "combinations", "both"],
)
def test_all_problems_come_at_once(pairs):
    message = problems(f"PRESET=record {pairs}")
    for name in environment_of(pairs):
        assert name in message


# ---- mistyped names


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("NUM_LAYER", "NUM_LAYERS"),
        ("NUM_LAYERS_", "NUM_LAYERS"),
        ("LR_MATRIX", "MATRIX_LR"),
        ("MATRIX_LRS", "MATRIX_LR"),
        ("LAYERS_NUM", "NUM_LAYERS"),
        ("MODELDIM", "MODEL_DIM"),
        ("EVAL_STRIDES", "EVAL_STRIDE"),
        ("WALLCLOCK_MAX_SECONDS", "MAX_WALLCLOCK_SECONDS"),
        ("TRAIN_TOKENS_BATCH", "TRAIN_BATCH_TOKENS"),
        ("LR_EMBED_TIED", "TIED_EMBED_LR"),
        ("BACKOUT_ENABLE", "BACKOUT_ENABLED"),
        ("MEMORY_TOKEN", "MEMORY_TOKENS"),
        ("SWA_ENABLE", "SWA_ENABLED"),
        ("ITERATION", "ITERATIONS"),
        ("DATAPATH", "DATA_PATH"),
        ("TRAIN_SEQLEN", "TRAIN_SEQ_LEN"),
    ],
)
def test_a_mistyped_name_gets_the_right_one(typed, meant):
    warnings = mistyped_settings({typed: "1", "PATH": "/bin"})
    assert warnings == [f"warning: {typed} is not a setting; did you mean {meant}?"]


def test_a_name_of_something_else_gets_no_warning():
    assert mistyped_settings(dict.fromkeys(FOREIGN.split() + NAMES, "1")) == []


# ---- names of other entries

# What is said of names of other entries, by beginning.
ANOTHER_NAME = "warning: another name here, ignored: "
OTHERWISE = "warning: set otherwise here, ignored: "
NOT_HERE = "warning: not here, ignored: "
# Variables of run commands that are for the machine.
OF_MACHINE = ("NCCL_", "PYTORCH_", "PYTHON")


def foreign(pairs: str) -> list[str]:
    """The warnings of a run with these variables."""
    return foreign_settings(environment_of(pairs), settings(pairs))


def test_no_name_of_other_entries_is_a_setting():
    absent = ABSENT_SETTINGS.split()
    tables = [*OTHER_NAMES, *RELATED_SETTINGS, *ALWAYS_ON.split(), *absent]
    assert len(tables) == len(set(tables))
    assert set(tables) & set(NAMES) == set()
    assert {name.upper() for name in OTHER_NAMES.values()} <= set(NAMES)
    beginnings = tuple(name[:-1] for name in absent if name.endswith("*"))
    assert [name for name in NAMES if name.startswith(beginnings)] == []


def test_a_setting_that_is_named_in_the_words_of_a_warning_exists():
    for words in RELATED_SETTINGS.values():
        for name in re.findall(r"[A-Z0-9]+_[A-Z0-9_]+", words):
            assert name in NAMES, words


def test_every_name_that_public_scripts_read_is_known():
    names = field_settings.NAMES_READ.split()
    assert len(names) > 309
    assert len(names) == len(set(names))
    settings = {field.name.upper() for field in train_gpt.fields_of()}
    unknown = [name for name in names if name not in settings and not is_foreign_setting(name)]
    assert unknown == []


def test_a_name_of_other_entries_is_no_mistyped_one():
    names = field_settings.NAMES_READ.split()
    assert mistyped_settings(dict.fromkeys(names, "1")) == []


def test_a_variable_of_something_else_is_no_name_of_other_entries():
    environment = dict.fromkeys(FOREIGN.split(), "1")
    assert [name for name in environment if is_foreign_setting(name)] == []
    assert foreign_settings(environment, Settings()) == []


@pytest.mark.parametrize("command", field_settings.COMMANDS)
def test_no_variable_of_a_public_run_command_is_ignored_without_a_word(command):
    pairs = field_settings.COMMANDS[command]
    # What the command asks for, without what ends the run.
    environment = environment_of(pairs)
    for name in ("QAT", "EVAL_STRIDE"):
        if environment.get(name) == "0":
            assert name in problems(f"PRESET=record {pairs}")
            del environment[name]
    said = " ".join(foreign_settings(environment, settings(PRESET="record", **environment)))
    for name, text in environment.items():
        if name in NAMES or name.startswith(OF_MACHINE):
            assert f" {name}=" not in said
            continue
        assert is_foreign_setting(name)
        done_anyway = name in OTHER_NAMES or name in ALWAYS_ON.split() or train_gpt.is_off(text)
        assert f" {name}={text}" in said or done_anyway, name


def test_what_is_not_here_is_named_in_one_line():
    pairs = "PRESET=record VE_DIM=128 MATRIX_CLIP_SIGMAS=12.85 TTT_EPOCHS=3 VAL_BATCH_SIZE=8"
    assert foreign(pairs) == [
        f"{NOT_HERE}MATRIX_CLIP_SIGMAS=12.85, TTT_EPOCHS=3, VAL_BATCH_SIZE=8, VE_DIM=128"
    ]


@pytest.mark.parametrize("text", ["0", "0.0", "false", "off", "None", ""])
def test_switching_off_what_is_not_here_needs_no_word(text):
    assert foreign(f"PRESET=record PHASED_TTT_ENABLED={text} VE_ENABLED={text}") == []


@pytest.mark.parametrize(
    "pair, said",
    [
        ("MUON_WEIGHT_DECAY=0.04", "MUON_WD (now 0.095)"),
        ("MTP_HEADS=2", "MTP_NUM_HEADS (now 0)"),
        ("MTP_ENABLED=1", "MTP_NUM_HEADS (now 0)"),
        ("SLIDING_EVAL_STRIDE=32", "EVAL_STRIDE (now 64)"),
        ("BIGRAM_BUCKETS=10240", "BIGRAM_VOCAB_SIZE (now 4096)"),
        ("COMPRESSOR=brotli", "CODEC (now rans)"),
        ("SWA=1", "SWA_ENABLED (now 0)"),
        ("SMEAR=maybe", "SMEAR_ENABLED (now 1)"),
    ],
)
def test_another_name_for_a_setting_is_answered_with_the_name_here(pair, said):
    assert foreign(f"PRESET=record {pair}") == [f"{ANOTHER_NAME}{pair} is {said}"]


@pytest.mark.parametrize(
    "pairs",
    [
        "MUON_WEIGHT_DECAY=0.0950",
        "SMEAR_GATE_ENABLED=1 BIGRAM_HASH=1 EMA=1 SWA=0 LATE_QAT=1 MTP_HEADS=0 TORCH_COMPILE=1",
        "MUON_WEIGHT_DECAY=0.04 MUON_WD=0.04",
        "SMEAR=0 SMEAR_ENABLED=0 BIGRAM_HASH=0 BIGRAM_VOCAB_SIZE=0 EMA=0 EMA_ENABLED=0",
        "UNET_SKIPS=1 ORTHO_INIT=1 SLIDING_EVAL=1",
    ],
)
def test_another_name_for_what_the_run_does_anyway_needs_no_word(pairs):
    assert foreign(f"PRESET=record {pairs}") == []


@pytest.mark.parametrize("name", RELATED_SETTINGS)
def test_a_name_with_another_meaning_here_is_explained(name):
    assert foreign(f"PRESET=record {name}=0.5") == [
        f"{OTHERWISE}{name}=0.5 ({RELATED_SETTINGS[name]})"
    ]


@pytest.mark.parametrize(
    "pairs, said",
    [
        ("SMEAR=0", "SMEAR=0 is SMEAR_ENABLED here, which is 1: set that"),
        ("SMEAR_GATE_ENABLED=false", "SMEAR_ENABLED"),
        ("BIGRAM_HASH=0", "BIGRAM_VOCAB_SIZE here, which is 4096: set that"),
        ("BIGRAM_BUCKETS=0", "BIGRAM_VOCAB_SIZE"),
        ("EMA=0 EMA_ENABLED=1", "EMA_ENABLED"),
        ("SWA=0 SWA_ENABLED=1", "SWA_ENABLED"),
        ("BACKOUT=0", "BACKOUT_ENABLED"),
        ("QAT=0", "LATE_QAT_THRESHOLD"),
        ("MUON_WEIGHT_DECAY=0", "MUON_WD"),
        ("UNET_SKIPS=0", "UNET_SKIPS=0 switches off what is always on here: unset it"),
    ],
)
def test_a_name_that_switches_off_what_is_on_ends_the_run(pairs, said):
    assert said in problems(f"PRESET=record {pairs}")


def test_a_switch_of_the_model_must_not_contradict_an_artifact_one_of_training_may():
    """Which has the model that it has, however it was trained."""
    pairs = "PRESET=record ARTIFACT=a.ptz"
    assert settings(f"{pairs} SWA=0 QAT=0 MUON_WEIGHT_DECAY=0").artifact == "a.ptz"
    assert settings(f"{pairs} SMEAR=0", dict(smear_enabled=False)).smear_enabled is False
    assert "SMEAR=0" in problems(f"{pairs} SMEAR=0")


def test_a_run_that_would_leave_on_what_is_switched_off_writes_nothing(tmp_path):
    done = run(tmp_path, PRESET="pocket", DEVICE="cpu", SMEAR="0", BIGRAM_HASH="0", TTT_EPOCHS="3")
    assert done.status == 2
    assert is_one_error(done.err, "BIGRAM_HASH=0 is BIGRAM_VOCAB_SIZE .*SMEAR=0 is SMEAR_ENABLED")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", ["0", "1"])
def test_rank_0_warns_once_and_in_its_log(data_folder, tmp_path, monkeypatch, capsys, rank):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    environment = {"PRESET": "pocket", "DEVICE": "cpu", "RUN_ID": "one", "RANK": rank}
    environment["DATA_PATH"] = str(data_folder)
    names = {"VE_DIM": "4", "MTP_HEADS": "2", "DATA_DIR": "./data", "NUM_LAYER": "9"}
    monkeypatch.setattr(train_gpt, "start_runtime", lambda settings: Runtime(rank=int(rank)))
    monkeypatch.setattr(train_gpt, "train_and_score", lambda *arguments: None)
    train_gpt.start({**environment, **names})
    said = capsys.readouterr()
    warnings = [line for line in said.err.splitlines() if line.startswith("warning: ")]
    if rank == "1":
        assert warnings == []
        return
    assert len(warnings) == 4
    assert "warning: " not in said.out
    _, _, own_lines = (tmp_path / "logs/one.txt").read_text(encoding="utf-8").partition("=" * 100)
    assert [line for line in own_lines.splitlines() if line.startswith("warning: ")] == warnings


# ---- settings that an artifact brings


def test_an_artifact_wins_over_the_preset_and_a_variable_over_its_evaluation():
    stored = dict(model_dim=128, num_heads=4, num_kv_heads=2, eval_stride=32, eval_seq_len=128)
    found = settings("PRESET=pocket ARTIFACT=a.ptz EVAL_STRIDE=16", stored)
    assert (found.model_dim, found.num_heads) == (128, 4)
    assert (found.eval_seq_len, found.eval_stride) == (128, 16)


def test_a_variable_must_not_contradict_an_artifact():
    stored = dict(model_dim=128, num_heads=4, num_kv_heads=2)
    pairs = "PRESET=pocket ARTIFACT=a.ptz"
    assert settings(f"{pairs} MODEL_DIM=128", stored).model_dim == 128
    with pytest.raises(UserError, match=r"MODEL_DIM.*128.*NUM_HEADS.*4"):
        settings(f"{pairs} MODEL_DIM=256 NUM_HEADS=8", stored)


def test_a_variable_must_not_contradict_a_checkpoint():
    """Of which more is stored than of an artifact's model."""
    stored = dict(iterations=30, matrix_lr=0.5)
    assert settings("PRESET=pocket ITERATIONS=30 TRAIN_LOG_EVERY=7", stored).matrix_lr == 0.5
    with pytest.raises(UserError, match="ITERATIONS=31 differs from the stored model's 30"):
        settings("PRESET=pocket ITERATIONS=31", stored)


# Neither length divides the pocket preset's batch; one is longer than its micro-batch.
@pytest.mark.parametrize("length", [96, 8192])
@pytest.mark.parametrize("preset", ["record", "pocket"])
def test_an_artifact_of_any_row_length_can_be_scored_under_any_preset(preset, length):
    pairs = f"PRESET={preset} ARTIFACT=a.ptz"
    assert settings(pairs, dict(train_seq_len=length)).train_seq_len == length


# ---- help and documents


def test_help_has_every_setting_with_type_and_default():
    lines = {}
    for line in help_text().splitlines():
        if re.match("  [A-Z0-9_]+ ", line):
            lines[line.split()[0]] = line
    assert sorted(lines) == sorted(NAMES)
    for field in fields_of():
        pattern = rf"  {field.name.upper()} {field.type} = (.*?)(?: \[(.*?)\])?: (\S.*)"
        shown = re.match(pattern, lines[field.name.upper()])
        assert shown, lines[field.name.upper()]
        record, pocket, _ = shown.groups()
        assert record == shown_default(field, field.default)
        assert (pocket or record) == shown_default(
            field, PRESETS["pocket"].get(field.name, field.default)
        )


def shown_default(field: dataclasses.Field, value: object) -> str:
    """How --help shows a default."""
    if field.type == "bool":
        return "1" if value else "0"
    return str(value) or "empty"


def test_a_document_has_the_table_of_settings():
    """`python tests/settings_table.py` prints it."""
    tables = []
    for name in settings_table.DOCUMENTS:
        path = ROOT / name
        if path.exists():
            table = settings_table.table_in(path.read_text(encoding="utf-8"))
            tables += [table] if table else []
    assert tables, f"no {settings_table.BEGIN} in any of {settings_table.DOCUMENTS}"
    for table in tables:
        assert table.splitlines() == settings_table.settings_table().splitlines()


def test_the_example_of_a_feature_in_the_readme_is_the_script_as_it_is():
    text = README.read_text(encoding="utf-8")
    section = text.partition("## Add a feature")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 5
    lines_of_script = "\n".join(line.strip() for line in SOURCE.splitlines())
    for block in blocks:
        lines = [line.strip() for line in block.strip().splitlines()]
        assert "\n".join(lines) in lines_of_script, block


def test_a_document_has_the_names_of_other_entries():
    text = (ROOT / "records/settings.md").read_text(encoding="utf-8")
    comments = settings_table.OTHERS_BEGIN, settings_table.OTHERS_END
    assert settings_table.table_in(text, *comments) == settings_table.other_names_table()


def test_the_table_of_settings_has_every_setting_and_its_defaults():
    rows = settings_table.table_rows()[1:]
    assert [row[0].strip("`") for row in rows] == NAMES
    for field, (_, kind, record, pocket, purpose) in zip(fields_of(), rows, strict=True):
        assert kind == field.type
        assert record.replace("(empty)", "empty") == shown_default(field, field.default)
        preset = PRESETS["pocket"].get(field.name)
        assert pocket == ("" if preset is None else shown_default(field, preset))
        assert purpose


@pytest.mark.parametrize(
    "path",
    [README, ROOT / "data/README.md", *sorted((ROOT / "records").rglob("*.md"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_commands_of_a_document_use_known_names(path):
    known = {*NAMES, *FOREIGN.split()}
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S):
        for name in re.findall(r"(?<![\w$-])([A-Z][A-Z0-9_]+)=", block):
            assert name in known, name


def test_the_links_of_the_readme_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    anchors = set()
    for heading in re.findall(r"^#+ .*", text, re.M):
        words = re.sub(r"[^\w -]", "", heading.strip("# ").lower())
        anchors.add("#" + words.replace(" ", "-"))
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / link.partition("#")[0]).exists(), link


# ---- the file


def is_settings(node: ast.AST) -> bool:
    """Whether an expression is an object of class Settings, going by its name."""
    if isinstance(node, ast.Name):
        return node.id in ("s", "settings")
    return isinstance(node, ast.Attribute) and node.attr == "settings"


def attributes_read(nodes: list[ast.AST], is_owner) -> set[str]:
    """The attributes that are read of objects that `is_owner` accepts."""
    found = set()
    for top in nodes:
        for node in ast.walk(top):
            if isinstance(node, ast.Attribute) and is_owner(node.value):
                found.add(node.attr)
    return found


def strings_given_to_calls(nodes: list[ast.AST]) -> set[str]:
    """All strings among the arguments of calls, such as Role("adamw", "head_lr", ...)."""
    found = set()
    for top in nodes:
        for node in ast.walk(top):
            if isinstance(node, ast.Call):
                values = [*node.args, *(keyword.value for keyword in node.keywords)]
                found |= {value.value for value in values if isinstance(value, ast.Constant)}
    return found


def test_every_setting_is_read():
    declared = [node for node in TREE.body if getattr(node, "name", "") == "Settings"]
    rest = [node for node in TREE.body if node not in declared]
    properties = [node for node in declared[0].body if isinstance(node, ast.FunctionDef)]
    read = attributes_read(rest, is_settings) | strings_given_to_calls(rest)
    for function in properties:
        assert function.name in read, f"nobody reads Settings.{function.name}"
    read |= attributes_read(
        properties, lambda node: isinstance(node, ast.Name) and node.id == "self"
    )
    assert [field.name for field in fields_of() if field.name not in read] == []


def test_only_settings_from_reads_the_environment():
    users = set()
    for function in ast.walk(TREE):
        if isinstance(function, ast.FunctionDef):
            names = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
            if names & {"environ", "getenv"}:
                users.add(function.name)
    assert users <= {"start_runtime", "main"}
    # The launcher's variables are no settings.
    [start_runtime] = [node for node in TREE.body if getattr(node, "name", "") == "start_runtime"]
    strings = {node.value for node in ast.walk(start_runtime) if isinstance(node, ast.Constant)}
    assert strings & set(NAMES) == set()
    assert strings >= {"RANK", "WORLD_SIZE", "LOCAL_RANK"}


def test_the_file_imports_only_what_a_submission_may():
    names = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    allowed = {"torch", "numpy", "sentencepiece", "zstandard", "flash_attn", "flash_attn_interface"}
    packages = {name.split(".")[0] for name in names}
    assert packages - set(sys.stdlib_module_names) <= allowed


def test_importing_the_file_does_nothing(tmp_path):
    code = (
        "import sys, threading, torch; state = torch.get_rng_state(); import train_gpt\n"
        "assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()\n"
        "assert torch.equal(state, torch.get_rng_state()) and threading.active_count() == 1\n"
        "assert torch.get_default_dtype() is torch.float32\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "NUM_LAYERS": "nonsense",
        "ARTIFACT": "absent",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---- when a compiler is worth its time


@pytest.mark.parametrize(
    "changes", [dict(iterations=99), dict(max_wallclock_seconds=29.0)], ids=str
)
def test_a_run_too_short_to_earn_it_back_is_not_compiled_on_a_cpu(monkeypatch, changes):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    cpu = torch.device("cpu")
    compiled, reason = choose_compilation(Settings(**changes), cpu)
    assert compiled == "no"
    assert "too short" in reason
    assert choose_compilation(Settings(**changes, compile="1"), cpu)[0] == "blocks"
    assert choose_compilation(Settings(**changes, artifact="scores.ptz"), cpu)[0] == "blocks"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(max_wallclock_seconds=0.0),
        dict(iterations=100, max_wallclock_seconds=30.0),
    ],
    ids=str,
)
def test_a_longer_run_is_compiled(monkeypatch, changes):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert choose_compilation(Settings(**changes), torch.device("cpu"))[0] == "blocks"


def test_the_settings_of_a_checkpoint_are_all_but_the_runs():
    """What RESUME=1 takes from a checkpoint: not what another machine would set otherwise."""
    kept = {field.name for field in fields_of("model", "training", "artifact", "evaluation")}
    assert {"seed", "iterations", "max_wallclock_seconds", "quant", "eval_stride"} <= kept
    own = {"micro_batch_tokens", "eval_batch_seqs", "device", "data_path", "resume"}
    assert not kept & {*own, "train_log_every"}
    assert train_gpt.settings_from({"CHECKPOINT_EVERY": "0.5"})[0].checkpoint_every == 0.5


def test_a_stored_vocabulary_does_not_follow_other_data():
    """0 is the default, so it says nothing against what an artifact has."""
    stored = dict(vocab_size=640)
    assert settings("PRESET=pocket ARTIFACT=a.ptz VOCAB_SIZE=0", stored).vocab_size == 640
    with pytest.raises(UserError, match="VOCAB_SIZE=1024 differs from the stored model's 640"):
        settings("PRESET=pocket ARTIFACT=a.ptz VOCAB_SIZE=1024", stored)
