"""Settings: the mission's defaults, errors that name everything at once, and the shape of the file itself."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train_gpt
from train_gpt import (
    GPT,
    PRESETS,
    Runtime,
    Settings,
    UserError,
    choose_compilation,
    fields_of,
    help_text,
    mistyped_settings,
    settings_from,
    stored_parameters,
)

README = ROOT / "README.md"
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
NAMES = [field.name.upper() for field in dataclasses.fields(Settings)]

RECORD_DEFAULTS = [
    "NUM_LAYERS=11",
    "MODEL_DIM=512",
    "VOCAB_SIZE=1024",
    "NUM_HEADS=8",
    "NUM_KV_HEADS=4",
    "QK_GAIN_INIT=1.5",
    "ROPE_DIMS=16",
    "ROPE_BASE=10000",
    "MLP_MULT=3",
    "SMEAR_ENABLED=1",
    "BIGRAM_VOCAB_SIZE=4096",
    "BIGRAM_DIM=128",
    "MEMORY_TOKENS=64",
    "BACKOUT_ENABLED=1",
    "BACKOUT_LAMBDA_INIT=0.2",
    "BACKOUT_LAYER=-1",
    "TIE_EMBEDDINGS=1",
    "LOGIT_SOFTCAP=30",
    "LN_SCALE=1",
    "MTP_NUM_HEADS=0",
    "MTP_LOSS_WEIGHT=0.2",
    "TIED_EMBED_INIT_STD=0.005",
    "MATRIX_LR=0.025",
    "MUON_MOMENTUM=0.99",
    "MUON_MOMENTUM_WARMUP_START=0.92",
    "MUON_MOMENTUM_WARMUP_STEPS=1500",
    "MUON_BACKEND_STEPS=5",
    "MUON_WD=0.04",
    "TIED_EMBED_LR=0.035",
    "SCALAR_LR=0.025",
    "ADAM_WD=0.04",
    "BETA1=0.9",
    "BETA2=0.95",
    "ADAM_EPS=1e-8",
    "ITERATIONS=9000",
    "WARMDOWN_ITERS=3000",
    "MAX_WALLCLOCK_SECONDS=600",
    "GRAD_CLIP_NORM=0.3",
    "TRAIN_BATCH_TOKENS=786432",
    "TRAIN_SEQ_LEN=2048",
    "WARMUP_STEPS=20",
    "SWA_ENABLED=1",
    "SWA_EVERY=50",
    "SWA_START_SCALE=0.2",
    "EMA_ENABLED=0",
    "EMA_DECAY=0.997",
    "EMA_EVERY=10",
    "LATE_QAT_THRESHOLD=0.1",
    "INT5_MLP=auto",
    "ZSTD_LEVEL=22",
    "ARTIFACT_MAX_BYTES=16000000",
    "EVAL_STRIDE=64",
    "EVAL_SEQ_LEN=2048",
    "EVAL_BATCH_SEQS=256",
    "VAL_LOSS_EVERY=0",
]

# What is in everyone's environment, or is set for torch and its launcher: no setting, and nothing like one.
FOREIGN = [
    "PATH",
    "HOME",
    "USER",
    "SHELL",
    "LANG",
    "LC_ALL",
    "TERM",
    "PWD",
    "OLDPWD",
    "SHLVL",
    "LOGNAME",
    "TMPDIR",
    "EDITOR",
    "DISPLAY",
    "HOSTNAME",
    "VIRTUAL_ENV",
    "PYTHONPATH",
    "PYTHONHASHSEED",
    "PYTHONUNBUFFERED",
    "CONDA_PREFIX",
    "CONDA_DEFAULT_ENV",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_NAME",
    "ROLE_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_ERROR_FILE",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "CC",
    "CXX",
    "CFLAGS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_COMPILE_DEBUG",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_LOGS",
    "TRITON_CACHE_DIR",
    "HF_HOME",
    "WANDB_MODE",
    "SLURM_JOB_ID",
    "SLURM_NODEID",
    "SLURM_NTASKS",
    "SSH_AUTH_SOCK",
    "XDG_RUNTIME_DIR",
    "DEBIAN_FRONTEND",
    "GIT_EDITOR",
    "MAIL",
    "PAGER",
    "_",
]


def settings(*pairs: str, stored: dict | None = None, **environment: str) -> Settings:
    return settings_from({**dict(pair.split("=", 1) for pair in pairs), **environment}, stored)[0]


def problems(*pairs: str) -> str:
    with pytest.raises(UserError) as error:
        settings(*pairs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- defaults and presets


@pytest.mark.parametrize("pair", RECORD_DEFAULTS)
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


def test_pocket_keeps_eleven_layers_and_every_feature():
    pocket = settings(PRESET="pocket")
    assert pocket.num_layers == 11
    for feature in (
        "smear_enabled",
        "backout_enabled",
        "swa_enabled",
        "ln_scale",
        "tie_embeddings",
        "rope_dims",
        "bigram_vocab_size",
        "memory_tokens",
        "late_qat_threshold",
    ):
        assert getattr(pocket, feature), feature
    assert pocket.max_wallclock_seconds == 150 and pocket.muon_momentum == 0.95


def test_preset_follows_the_device(monkeypatch):
    monkeypatch.setattr(train_gpt.torch.cuda, "is_available", lambda: True)
    assert settings().model_dim == 512 and "record" in settings_from({})[1]
    assert settings(DEVICE="cpu").model_dim == PRESETS["pocket"]["model_dim"]
    monkeypatch.setattr(train_gpt.torch.cuda, "is_available", lambda: False)
    assert (
        settings().model_dim == PRESETS["pocket"]["model_dim"] and "pocket" in settings_from({})[1]
    )


@pytest.mark.parametrize("preset", ["record", "pocket"])
def test_a_variable_wins_over_the_preset(preset):
    plain = settings(PRESET=preset)
    changed = settings(
        "MODEL_DIM=256",
        "NUM_HEADS=4",
        "MATRIX_LR=0.5",
        "SWA_ENABLED=0",
        "INT5_MLP=1",
        PRESET=preset,
    )
    assert (changed.model_dim, changed.num_heads, changed.matrix_lr) == (256, 4, 0.5)
    assert changed.swa_enabled is False and changed.int5_mlp == "1"
    same = dataclasses.replace(
        changed,
        model_dim=plain.model_dim,
        num_heads=plain.num_heads,
        matrix_lr=plain.matrix_lr,
        swa_enabled=True,
        int5_mlp="auto",
        quant="fit",
    )
    assert same == plain


def test_int5_mlp_asks_for_the_entries_rows():
    assert [settings(PRESET="record", INT5_MLP=x).quant for x in ("auto", "0", "1")] == [
        "fit",
        "rows",
        "rows",
    ]
    assert settings(PRESET="record", QUANT="rows").int5_mlp == "auto"
    with pytest.raises(UserError, match="INT5_MLP is for QUANT=rows"):
        settings(PRESET="record", QUANT="fit", INT5_MLP="1")


def test_an_empty_variable_is_one_that_is_not_set():
    assert settings(PRESET="record", NUM_LAYERS="", DATA_PATH="") == settings(PRESET="record")


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
    assert pair in problems("PRESET=record", pair)


@pytest.mark.parametrize(
    "text, value", [("1", True), ("0", False), ("true", True), ("False", False)]
)
def test_a_switch_takes_0_and_1(text, value):
    assert settings(PRESET="record", SMEAR_ENABLED=text).smear_enabled is value


IMPOSSIBLE = [
    ("MODEL_DIM=500", "NUM_HEADS=8"),
    ("NUM_HEADS=8", "NUM_KV_HEADS=3"),
    ("ROPE_DIMS=7",),
    ("ROPE_DIMS=66",),
    (
        "ROPE_DIMS=0",
        "MODEL_DIM=504",
        "NUM_HEADS=8",
    ),  # 63 dimensions a head cannot all rotate in pairs
    ("BACKOUT_LAYER=11",),
    ("MLP_MULT=0.01", "MODEL_DIM=64", "NUM_HEADS=8", "ROPE_DIMS=8"),
    ("MEMORY_TOKENS=2047",),
    ("MEMORY_TOKENS=64", "EVAL_SEQ_LEN=64"),
    ("EVAL_STRIDE=1985",),
    ("TRAIN_BATCH_TOKENS=786433",),
    ("MICRO_BATCH_TOKENS=2047",),
    ("MTP_NUM_HEADS=1984",),
    ("SAMPLE=text",),
    ("RUN_ID=a/b",),
]


@pytest.mark.parametrize("pairs", IMPOSSIBLE, ids=" ".join)
def test_an_impossible_combination_is_refused(pairs):
    assert pairs[0].split("=")[0] in problems("PRESET=record", *pairs)


@pytest.mark.parametrize(
    "pairs",
    [
        ("MODEL_DIM=504", "NUM_HEADS=12"),
        ("ROPE_DIMS=64",),
        ("BACKOUT_LAYER=10",),
        ("MEMORY_TOKENS=1984", "EVAL_STRIDE=64"),
        ("EVAL_STRIDE=1984",),
        ("MICRO_BATCH_TOKENS=2048",),
        ("MTP_NUM_HEADS=1983",),
        ("SAMPLE=text", "ARTIFACT=file"),
        ("RUN_ID=a.b",),
        ("MEMORY_TOKENS=0", "EVAL_STRIDE=2048"),
    ],
    ids=" ".join,
)
def test_the_last_possible_combination_is_not(pairs):
    settings("PRESET=record", *pairs)


def test_a_taken_run_id_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings("PRESET=record", "RUN_ID=one")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/one.txt").touch()
    assert "RUN_ID=one" in problems("RUN_ID=one")


@pytest.mark.parametrize(
    "pairs",
    [
        ("NUM_LAYERS=many", "MATRIX_LR=-1", "INT5_MLP=maybe", "SMEAR_ENABLED=x", "ZSTD_LEVEL=0"),
        ("ROPE_DIMS=7", "TRAIN_BATCH_TOKENS=100", "SAMPLE=text", "RUN_ID=a/b", "EVAL_STRIDE=5000"),
        ("MATRIX_LR=fast", "SEED=-1", "EVAL_STRIDE=5000", "TRAIN_BATCH_TOKENS=100"),
    ],
    ids=["values", "combinations", "both"],
)
def test_all_problems_come_at_once(pairs):
    message = problems("PRESET=record", *pairs)
    assert [pair for pair in pairs if pair.split("=")[0] not in message] == []


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
    assert len(warnings) == 1 and f"{typed} " in warnings[0] and f"mean {meant}?" in warnings[0]


def test_a_name_of_something_else_gets_no_warning():
    assert mistyped_settings(dict.fromkeys(FOREIGN + NAMES, "1")) == []


# ---- settings that an artifact brings


def test_an_artifact_wins_over_the_preset_and_a_variable_over_its_evaluation():
    stored = dict(model_dim=64, num_heads=4, num_kv_heads=2, eval_stride=32, eval_seq_len=128)
    found = settings(stored=stored, PRESET="pocket", EVAL_STRIDE="16")
    assert (found.model_dim, found.num_heads, found.eval_seq_len, found.eval_stride) == (
        64,
        4,
        128,
        16,
    )


def test_a_variable_must_not_contradict_an_artifact():
    stored = dict(model_dim=64, num_heads=4, num_kv_heads=2)
    assert settings(stored=stored, PRESET="pocket", MODEL_DIM="64").model_dim == 64
    with pytest.raises(UserError, match=r"MODEL_DIM.*64.*NUM_HEADS.*4"):
        settings(stored=stored, PRESET="pocket", MODEL_DIM="128", NUM_HEADS="8")


@pytest.mark.parametrize("preset", ["record", "pocket"])
def test_an_artifact_of_any_row_length_can_be_scored_under_any_preset(preset):
    for length in (
        96,
        8192,
    ):  # neither divides the pocket preset's batch; one is longer than its micro-batch
        assert settings(stored=dict(train_seq_len=length), PRESET=preset).train_seq_len == length


# ---- help, README, and what reads the settings


def test_help_has_every_setting_with_type_and_default():
    lines = {
        line.split()[0]: line
        for line in help_text().splitlines()
        if re.match("  [A-Z0-9_]+ ", line)
    }
    assert sorted(lines) == sorted(NAMES)
    for field in dataclasses.fields(Settings):
        line, pocket = lines[field.name.upper()], PRESETS["pocket"].get(field.name, field.default)
        shown = re.match(
            rf"  {field.name.upper()} {field.type} = (.*?)(?: \[(.*?)\])?: (\S.*)", line
        )
        assert shown, line
        for text, value in ((shown[1], field.default), (shown[2] or shown[1], pocket)):
            assert text == (str(int(value)) if field.type == "bool" else str(value) or "empty"), (
                line
            )


def is_settings(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Name)
        and node.id in ("s", "settings")
        or isinstance(node, ast.Attribute)
        and node.attr == "settings"
    )


def test_every_setting_is_read():
    rest = [node for node in TREE.body if getattr(node, "name", "") != "Settings"]
    nodes = [node for top in rest for node in ast.walk(top)]
    read = {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and is_settings(node.value)
    }
    for call in (
        node for node in nodes if isinstance(node, ast.Call)
    ):  # Role("adamw", "head_lr", ...)
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        read |= {value.value for value in values if isinstance(value, ast.Constant)}
    assert [field.name for field in fields_of() if field.name not in read] == []


def test_only_settings_from_reads_the_environment():
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    users = {
        function.name
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert users <= {"start_runtime", "main"}
    function = next(function for function in functions if function.name == "start_runtime")
    strings = {node.value for node in ast.walk(function) if isinstance(node, ast.Constant)}
    assert strings & set(NAMES) == set() and launcher <= strings


@pytest.fixture(scope="module")
def readme() -> str:
    path = README
    if not path.exists():
        pytest.skip("no README.md")
    return path.read_text(encoding="utf-8")


def test_the_readme_table_has_every_setting_and_its_default(readme):
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in readme.splitlines()
        if re.match(r"\s*\|\s*`[A-Z0-9_]+`\s*\|", line)
    ]
    shown = {row[0].strip("`"): [cell.strip("`") for cell in row[1:]] for row in rows}
    assert sorted(shown) == sorted(NAMES)
    for field in dataclasses.fields(Settings):
        value = str(int(field.default)) if field.type == "bool" else str(field.default)
        cells = shown[field.name.upper()]
        assert (value or "empty") in cells or (value == "" and "" in cells), (field.name, cells)


@pytest.mark.parametrize(
    "path",
    [README, *sorted((ROOT / "records").rglob("*.md"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_commands_of_a_document_use_known_names(path):
    known = {*NAMES, *FOREIGN}
    for block in re.findall(
        r"^```[^\n]*\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S
    ):
        for name in re.findall(r"(?<![\w$-])([A-Z][A-Z0-9_]+)=", block):
            assert name in known, name


def test_the_readme_is_short_and_its_links_lead_somewhere(readme):
    assert len(readme.splitlines()) < 300
    headings = {
        re.sub(r"[^\w -]", "", line.strip("# ").lower()).replace(" ", "-")
        for line in re.findall(r"^#+ .*", readme, re.M)
    }
    for link in re.findall(r"\]\(([^)]+)\)", readme):
        if not link.startswith("https://"):
            assert link[1:] in headings if link.startswith("#") else (ROOT / link).exists(), link


# ---- the file


def test_the_file_is_short_and_narrow_and_so_are_its_functions():
    assert len(SOURCE.splitlines()) <= 1500  # the field's own ceiling
    wide = [number for number, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 110]
    assert wide == []
    long = [
        node.name
        for node in ast.walk(TREE)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno >= 100
    ]
    assert long == []


def test_the_file_imports_only_what_a_submission_may():
    names = {
        alias.name
        for node in ast.walk(TREE)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    allowed = {"torch", "numpy", "sentencepiece", "zstandard", "flash_attn", "flash_attn_interface"}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) <= allowed


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


@pytest.mark.parametrize(
    "entry, parameters, exported",
    [("#339", 27_092_058, 27_092_058), ("#352", 26_598_481, 25_549_905)],
)
def test_the_readme_lines_of_the_entries_build_their_models(entry, parameters, exported):
    """#352's published log counts 26,598,481, its MTP heads included."""
    readme = README.read_text(encoding="utf-8")
    block = readme[readme.index(f"[{entry}]") :].split("```")[1]
    environment = dict(re.findall(r"([A-Z0-9_]+)=(\S+)", block))
    settings, _ = settings_from({"PRESET": "record", **environment})
    with torch.device("meta"):
        model = GPT(settings, Runtime())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in stored_parameters(model).values()) == exported
    assert f"{parameters:,}" in readme


def test_a_run_too_short_to_earn_it_back_is_not_compiled_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    cpu = torch.device("cpu")
    for changes in (dict(iterations=99), dict(max_wallclock_seconds=29.0)):
        compiled, reason = choose_compilation(Settings(**changes), cpu)
        assert compiled == "no" and "too short" in reason
        assert choose_compilation(Settings(**changes, compile="1"), cpu)[0] == "blocks"
        assert choose_compilation(Settings(**changes, artifact="scores.ptz"), cpu)[0] == "blocks"
    for changes in (
        dict(),
        dict(max_wallclock_seconds=0.0),
        dict(iterations=100, max_wallclock_seconds=30.0),
    ):
        assert choose_compilation(Settings(**changes), cpu)[0] == "blocks"
