"""Golden runs: tiny runs of the script, and what they gave when they were recorded.

    python tests/golden_runs.py                              # compare this checkout's script
    python tests/golden_runs.py --script other/train_gpt.py  # compare another one
    python tests/golden_runs.py --runs full resumed          # only these runs
    python tests/golden_runs.py --tolerant                   # losses within float32's noise
    python tests/golden_runs.py --record                     # write tests/golden/*.json anew

The records protect a refactoring: a change that is meant to leave the results as they are must meet
them to the bit. --record is for a commit that changes results on purpose, and for nothing else. Its
message says which bits change, where and why, and that the script before it met the records. Never
record to make a test pass that fails for a reason nobody has found.

Bits depend on the machine: on the versions of torch and of what packs, and on the instructions of
the CPU. The runs keep to one thread and AVX2, and the records hold a fingerprint: the versions, and
the digest of a numeric probe. Where the fingerprint is the recorded one, everything is compared to
the bit. Elsewhere counts and lines are compared exactly, losses and sizes within a tolerance, and
digests not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import zstandard

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"
GOLDEN = Path(__file__).resolve().parent / "golden"
ORIGIN = "recorded_on"  # tests/golden/recorded_on.json: the fingerprint, and digests of the data
VOCAB_SIZE = 384
BOS = 1

# These gave the same bits on one machine, so that the torch of the records may be any of them.
TORCH_OF_SAME_BITS = ("2.9.1", "2.11.0", "2.13.0")

# Tolerances for a machine that rounds sums otherwise, as parts of the loss. The runs of this table
# under AVX512, without vector instructions, with MKL's compatible kernels and with two threads were
# at most 7e-6 away in full precision. One in the last digit printed is 5e-5.
LOSS_TOLERANCE = 2e-4
# QUANT=fit under a cap amplifies that: steps are rounded to half octaves, of which some fall on the
# other side, and the search for the cap ends elsewhere. The same runs were at most 1e-4 away.
FIT_LOSS_TOLERANCE = 1e-3
# QUANT=fit ends anywhere within 0.04% below the budget, and a few codes of QUANT=rows are others.
BYTES_TOLERANCE = 0.02

# What is left of the caller's environment: no setting of the script, no rank of a launcher.
KEPT_VARIABLES = (
    "HOME",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "PATH",
    "SYSTEMROOT",
    "TEMP",
    "TMP",
    "TMPDIR",
    "USER",
    "USERNAME",
)
# One thread, and instructions that every x86 CPU of today has, so that bits agree on most machines.
FIXED_VARIABLES = dict(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    MKL_CBWR="AVX2",
    ATEN_CPU_CAPABILITY="avx2",
    ONEDNN_MAX_CPU_ISA="AVX2",
    PYTHONDONTWRITEBYTECODE="1",
    PYTHONIOENCODING="utf-8",
)


# ---- the table of runs


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of the script: its settings, its ranks, and what is done to the folder before it."""

    name: str
    settings: dict[str, str]
    ranks: int = 0
    # What the model may take: ARTIFACT_MAX_BYTES is this and the script's own size.
    model_bytes: int = 1_000_000
    # How far losses may be from the recorded ones where bits cannot be compared, as a part of them.
    tolerance: float = LOSS_TOLERANCE
    # Validation holds a token outside of the vocabulary, so that the run ends where it reads it.
    damaged_validation: bool = False
    # The console shows text that a model has written, which another machine may write differently.
    writes_text: bool = False


COMMON = dict(
    PRESET="pocket",
    DEVICE="cpu",
    DTYPE="float32",
    COMPILE="0",
    MAX_WALLCLOCK_SECONDS="0",
    TRAIN_LOG_EVERY="1",
    VOCAB_SIZE=str(VOCAB_SIZE),
    EVAL_BATCH_SEQS="8",
    WARMUP_STEPS="1",
    ZSTD_LEVEL="9",
)
# Everything that adds something to the model or the loss. Odd numbers of layers and rows; a step
# that does not divide into its micro-batches; windows of evaluation longer than training's rows.
EVERYTHING = dict(
    COMMON,
    NUM_LAYERS="5",
    MODEL_DIM="32",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    ROPE_DIMS="4",
    BIGRAM_VOCAB_SIZE="64",
    BIGRAM_DIM="8",
    MEMORY_TOKENS="4",
    DOCUMENT_ATTENTION="0",
    MTP_NUM_HEADS="2",
    TRAIN_SEQ_LEN="48",
    EVAL_SEQ_LEN="64",
    EVAL_STRIDE="20",
    TRAIN_BATCH_TOKENS="240",
    MICRO_BATCH_TOKENS="96",
    ITERATIONS="30",
    WARMDOWN_ITERS="27",
    WARMDOWN_FRACTION="0.9",
    MUON_MOMENTUM_WARMUP_STEPS="10",
    GRAD_CLIP_NORM="0.3",
    NUM_LOOPS="1",
    LOOP_START="1",
    LOOP_END="1",
    PARALLEL_START_LAYER="4",
    SWA_ENABLED="1",
    SWA_START_SCALE="0.6",
    SWA_EVERY="2",
    LATE_QAT_THRESHOLD="0.12",
    ATTENTION="sdpa",
)
# What adds a parameter or changes the model is off, so that a plain transformer remains.
NOTHING = dict(
    COMMON,
    NUM_LAYERS="2",
    MODEL_DIM="32",
    NUM_HEADS="2",
    NUM_KV_HEADS="2",
    ROPE_DIMS="0",
    BIGRAM_VOCAB_SIZE="0",
    MEMORY_TOKENS="0",
    DOCUMENT_ATTENTION="0",
    MTP_NUM_HEADS="0",
    SMEAR_ENABLED="0",
    BACKOUT_ENABLED="0",
    LN_SCALE="0",
    KEY_OFFSET_ENABLED="0",
    XSA_LAST_N="0",
    SPARSE_ATTN_GATE_ENABLED="0",
    NEGATIVE_SLOPE="0",
    SKIP_GATES_ENABLED="0",
    MUON_ROW_NORMALIZE="0",
    SPELLING_LR="0",
    MUON_BACKEND_STEPS="5",
    MUON_MOMENTUM="0.95",
    BETA2="0.95",
    MIN_LR="0",
    TRAIN_SEQ_LEN="32",
    EVAL_SEQ_LEN="24",
    EVAL_STRIDE="24",
    TRAIN_BATCH_TOKENS="128",
    ITERATIONS="12",
    WARMUP_STEPS="0",
    GRAD_CLIP_NORM="0",
    SWA_ENABLED="0",
    LATE_QAT_THRESHOLD="0",
)
# A checkpoint after every step; late QAT has begun where the run ends, since it reads damaged data.
STOPPED = dict(
    EVERYTHING,
    ATTENTION="blocked",
    MEMORY_TOKENS="0",
    DOCUMENT_ATTENTION="1",
    EMA_ENABLED="1",
    EMA_EVERY="1",
    EMA_DECAY="0.9",
    CHECKPOINT_EVERY="1e-9",
    VAL_LOSS_EVERY="29",
)
ARTIFACT = dict(COMMON, ARTIFACT="final_model.int6.ptz")
# A cap that binds: at about four bits a weight.
CAPPED: dict = dict(model_bytes=34_000, tolerance=FIT_LOSS_TOLERANCE)

# One test each. The steps of a run share a folder, one after the other.
RUNS: dict[str, tuple[Step, ...]] = {
    # Every feature, SWA, late QAT, and a cap that binds; then its artifact in other processes.
    "full": (
        Step("train", dict(EVERYTHING, VAL_LOSS_EVERY="10"), **CAPPED),
        Step("evaluate", ARTIFACT, **CAPPED),
        Step("sample", dict(ARTIFACT, SAMPLE="the ", SAMPLE_TOKENS="20"), writes_text=True),
    ),
    # The same on two ranks, of which the second has fewer rows.
    "two_ranks": (Step("train", EVERYTHING, ranks=2, **CAPPED),),
    # Stopped within late QAT and resumed; EMA; attention in blocks, within documents, at growing
    # lengths.
    "resumed": (
        Step("stopped", STOPPED, **CAPPED, damaged_validation=True),
        Step("resumed", dict(STOPPED, RESUME="1"), **CAPPED),
    ),
    # Untied embeddings, no clipping; an artifact of rows, with an int5 MLP and rANS.
    "rows_int5": (
        Step(
            "train",
            dict(
                EVERYTHING,
                QUANT="rows",
                INT5_MLP="1",
                TIE_EMBEDDINGS="0",
                GRAD_CLIP_NORM="0",
                ATTENTION="blocked",
                ITERATIONS="20",
                LATE_QAT_THRESHOLD="0.2",
            ),
        ),
    ),
    # A plain transformer; QUANT=fit with zstd, and a cap that does not bind.
    "nothing": (Step("train", dict(NOTHING, CODEC="zstd")),),
    # The preset's own model for a few steps; an artifact of rows, with int6 throughout and zstd.
    "pocket": (
        Step(
            "train",
            dict(
                COMMON,
                TRAIN_BATCH_TOKENS="256",
                ITERATIONS="3",
                WARMUP_STEPS="0",
                QUANT="rows",
                INT5_MLP="0",
                CODEC="zstd",
                ZSTD_LEVEL="1",
                EVAL_STRIDE="248",
            ),
            model_bytes=10_000_000,
        ),
    ),
}


# ---- data


def synthetic_documents(count: int, seed: int) -> list[str]:
    """Texts of made-up words, the same under every Python.

    They hold numbers, line ends, letters of two bytes and a rare one that is left to byte pieces.
    """
    draw = random.Random(seed).random
    syllables = [
        consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in ("a", "e", "i", "o", "ü")
    ]
    words = []
    for _ in range(200):
        length = 1 + int(3 * draw())
        words.append("".join(syllables[int(len(syllables) * draw())] for _ in range(length)))
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(40 + int(80 * draw())):
            # Low numbers are much likelier, as with words of a language.
            parts.append(words[int(len(words) * draw() ** 3)])
            kind = draw()
            if kind < 0.03:
                parts.append(str(int(1000 * draw())))
            elif kind < 0.06:
                parts.append("the")
            elif kind < 0.09:
                parts[-1] += ".\n"
            elif kind < 0.1:
                parts.append("→")
        texts.append(" ".join(parts))
    return texts


def shard_of(tokens: list[int]) -> bytes:
    """A shard in the field's format: 256 int32 of header, then uint16 tokens, all little-endian."""
    header = struct.pack("<3i", 20240520, 1, len(tokens)).ljust(256 * 4, b"\0")
    return header + np.asarray(tokens, dtype="<u2").tobytes()


def make_data(folder: Path) -> dict[str, str]:
    """Write tokenizer and shards into a folder; the digest of each file, by its name."""
    texts = synthetic_documents(150, seed=12)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.splitlines() if line]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=0.9995,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["\n"],
        pad_id=0,
        bos_id=BOS,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    encoded = [[BOS, *tokenizer.encode(text)] for text in texts]
    files = {
        "tokenizer.model": model.getvalue(),
        "x_train_000000.bin": shard_of([token for ids in encoded[:80] for token in ids]),
        "x_train_000001.bin": shard_of([token for ids in encoded[80:140] for token in ids]),
        "x_val_000000.bin": shard_of([token for ids in encoded[140:] for token in ids]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


@contextlib.contextmanager
def damaged_validation(data: Path):
    """While it lasts, the validation shard holds a token that is outside of the vocabulary."""
    path = data / "x_val_000000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + b"\xff\xff")
    try:
        yield
    finally:
        path.write_bytes(whole)


# ---- the machine


def probe() -> str:
    """The digest of what this machine computes, of the kinds of work that a run does."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    generator = torch.Generator().manual_seed(5)
    digest = hashlib.sha256()

    def random_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def add(*tensors: torch.Tensor) -> None:
        for tensor in tensors:
            digest.update(tensor.detach().contiguous().numpy().tobytes())

    for rows, inner, columns in (
        (5, 7, 3),
        (64, 32, 96),
        (96, 32, 384),
        (240, 192, 576),
        (33, 65, 17),
    ):
        left = random_tensor(rows, inner).requires_grad_()
        right = random_tensor(columns, inner).requires_grad_()
        product = torch.nn.functional.linear(left, right)
        product.square().mean().backward()
        add(product, left.grad, right.grad)
    batch = random_tensor(3, 32, 96)
    add(torch.bmm(batch, batch.transpose(1, 2)))
    add(torch.baddbmm(batch, torch.bmm(batch, batch.transpose(1, 2)), batch, beta=0.3, alpha=-4.0))
    for size in (8, 32, 192):
        matrix = random_tensor(size, 2 * size).double()
        gram = matrix @ matrix.T + torch.eye(size, dtype=torch.float64)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        add(inverse, torch.linalg.cholesky(inverse, upper=True).float())
        add(torch.nn.init.orthogonal_(torch.empty(size, 2 * size), generator=generator))
    numbers = random_tensor(7, 1001)
    for function in (torch.tanh, torch.exp, torch.sigmoid, torch.sqrt, torch.rsqrt, torch.cos):
        add(function(numbers.abs() + 0.1))
    add(torch.softmax(numbers, -1), torch.log2(numbers.abs()), torch.exp2(numbers))
    add(numbers.norm(), numbers.norm(dim=1), numbers.sum(), numbers.double().sum(), numbers.mean(1))
    add(torch.nn.functional.rms_norm(numbers, (1001,)))
    states = random_tensor(2, 4, 48, 8).requires_grad_()
    attended = torch.nn.functional.scaled_dot_product_attention(
        states, states, states, is_causal=True
    )
    attended.square().sum().backward()
    add(attended, states.grad)
    losses = torch.nn.functional.cross_entropy(numbers, torch.arange(7), reduction="none")
    add(losses)
    weight = torch.nn.Parameter(random_tensor(33, 17))
    weight.grad = random_tensor(33, 17)
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.04, fused=True)
    for _ in range(3):
        optimizer.step()
    add(weight)
    table = random_tensor(64, 8).requires_grad_()
    looked_up = torch.nn.functional.embedding(torch.arange(200) ** 2 % 64, table)
    looked_up.square().sum().backward()
    add(table.grad)
    digest.update(np.log2(np.abs(numbers.numpy()) + 1e-3).tobytes())
    digest.update(np.abs(numbers.numpy()).mean(1).tobytes())
    return digest.hexdigest()


def fingerprint() -> dict[str, str]:
    """What bits depend on: versions, and what this process computes."""
    return dict(
        # A build for GPUs or for CPUs alone: the probe tells whether it matters.
        torch=torch.__version__.partition("+")[0],
        numpy=np.__version__,
        sentencepiece=sentencepiece.__version__,
        zstandard=zstandard.__version__,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        probe=probe(),
    )


def environment_of(settings: dict[str, str]) -> dict[str, str]:
    """The environment of a run: the settings, and nothing of the caller's that could change it."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return {**kept, **FIXED_VARIABLES, **settings}


def fingerprint_of_runs() -> dict[str, str]:
    """The fingerprint under the environment that the runs have, from a process of its own."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--fingerprint"],
        env=environment_of({}),
        capture_output=True,
        check=True,
        encoding="utf-8",
    )
    return json.loads(done.stdout.splitlines()[-1])


# ---- a run and what is kept of it

# What depends on time, on the script's size or on memory; what stands for it.
MASKS = (
    (r"\b(train_time|step_avg|eval_time):\d+(\.\d+)?ms", r"\1:#ms"),
    (r"^(stage:\w+) \d+\.\ds$", r"\1 #s"),
    (r"\bleft:\d+s\b", "left:#s"),
    (r"\b(eval_seconds|peak_memory|tokens_per_second):\d+(\.\d+)?", r"\1:#"),
    (r"^(Code size|Total submission size int6\+zstd): \d+ bytes", r"\1: # bytes"),
)
MASKED_COMPLIANCE = ("train_seconds", "eval_seconds")


def masked(line: str, data: Path) -> str:
    """A line of the log or the console without what differs from one run to the next."""
    line = line.replace(str(data), "<data>")
    for pattern, replacement in MASKS:
        line = re.sub(pattern, replacement, line)
    if line.startswith("compliance:"):
        compliance = json.loads(line.removeprefix("compliance:"))
        for name in MASKED_COMPLIANCE:
            if compliance[name] is not None:
                compliance[name] = "#"
        line = "compliance:" + json.dumps(compliance)
    return line


def log_after_settings(path: Path) -> list[str]:
    """The lines of a log's last run after its settings, which change when settings are added."""
    lines = path.read_text(encoding="utf-8").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("settings:{")]
    return lines[starts[-1] + 1 :]


def load_script(path: Path):
    """The script as a module, under a name of its own."""
    name = "golden_script"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def digest_of_weights(script, path: Path) -> str:
    """SHA-256 of the float32 values that the script reads from an artifact, without their names."""
    _, weights = script.read_artifact(path.read_bytes(), path.name)
    digest = hashlib.sha256()
    for weight in weights.values():
        digest.update(weight.contiguous().numpy().tobytes())
    return digest.hexdigest()


RESULTS = (
    "parameters",
    "steps",
    "tokens",
    "train_loss",
    "late_qat_steps",
    "exported",
    "resumed_at",
    "under_cap",
    "bytes_model",
    "artifact_sha256",
)
SCORES = ("pre_quantization", "final_int6_roundtrip", "final_int6_sliding_window")
SCORE_PARTS = ("val_loss", "val_bpb", "targets", "bytes")


def results_kept(results: dict) -> dict:
    """What is compared of logs/<run_id>.json."""
    kept = {name: results[name] for name in RESULTS if name in results}
    for name in SCORES:
        if name in results:
            kept[name] = {part: results[name][part] for part in SCORE_PARTS}
    return kept


def call_script(
    script_path: Path, step: Step, folder: Path, data: Path
) -> subprocess.CompletedProcess:
    """Run one step in its folder to its end."""
    launcher = []
    if step.ranks:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={step.ranks}"]
    settings = dict(
        step.settings,
        DATA_PATH=str(data),
        ARTIFACT_MAX_BYTES=str(step.model_bytes + script_path.stat().st_size),
    )
    if "RUN_ID" not in settings:
        settings["RUN_ID"] = "golden" if "ARTIFACT" not in settings else step.name
    damage = damaged_validation(data) if step.damaged_validation else contextlib.nullcontext()
    with damage:
        return subprocess.run(
            [sys.executable, *launcher, str(script_path)],
            cwd=folder,
            env=environment_of(settings),
            capture_output=True,
            encoding="utf-8",
            timeout=900,
        )


def record_step(script_path: Path, script, step: Step, folder: Path, data: Path) -> dict:
    """Run one step; what is kept of it, as it is in the JSON file."""
    done = call_script(script_path, step, folder, data)
    run_id = "golden" if "ARTIFACT" not in step.settings else step.name
    # torch 2.9 lets gloo tell on the console that ranks have met.
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    console = [masked(line, data) for line in lines]
    kept: dict = dict(status=done.returncode)
    # Warnings of torch and of its launcher are not the script's.
    kept["errors"] = [
        masked(line, data)
        for line in done.stderr.splitlines()
        if line.startswith(("error:", "warning:", "Traceback"))
    ]
    results_path = folder / f"logs/{run_id}.json"
    if results_path.is_file():
        kept["results"] = results_kept(json.loads(results_path.read_text(encoding="utf-8")))
    artifact = folder / f"logs/{run_id}.final_model.int6.ptz"
    if artifact.is_file():
        kept["artifact_sha256"] = hashlib.sha256(artifact.read_bytes()).hexdigest()
        kept["weights_sha256"] = digest_of_weights(script, artifact)
    kept["files"] = sorted(
        str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file()
    )
    kept["console"] = console
    log_path = folder / f"logs/{run_id}.txt"
    if log_path.is_file():
        log = [masked(line, data) for line in log_after_settings(log_path)]
        kept["log"] = f"the last {len(log)} lines of the console"
        if log != console[len(console) - len(log) :]:
            kept["log"] = log
    return kept


def record_run(name: str, script_path: Path, folder: Path, data: Path) -> dict:
    """Run all steps of one of RUNS in a folder; what is kept of each, by its name."""
    script = load_script(script_path)
    folder.mkdir(parents=True)
    steps = {}
    for step in RUNS[name]:
        steps[step.name] = record_step(script_path, script, step, folder, data)
    return steps


# ---- comparison

MEASURED = re.compile(r"\b(train_loss|val_loss|val_bpb|bpb):(\d+\.\d+)")
HEXADECIMAL = re.compile(r"\b[0-9a-f]{16,64}\b")
SIZE_LINE = re.compile(r"^(Serialized model int6\+zstd): \d+ bytes")
DIGESTS = ("artifact_sha256", "weights_sha256")


def skeleton(line: str) -> str:
    """A line without what differs on another machine."""
    line = MEASURED.sub(r"\1:#", line)
    line = HEXADECIMAL.sub("#", line)
    return SIZE_LINE.sub(r"\1: # bytes", line)


def near(expected: float, found: float, tolerance: float) -> bool:
    """Whether a loss is within a tolerance, 0 for none, that is a part of it."""
    return abs(found - expected) <= tolerance * abs(expected)


def same_line(expected, found, tolerance: float) -> bool:
    """Whether two lines are equal, or near enough in what they measure."""
    if expected == found:
        return True
    if not tolerance or not isinstance(expected, str) or skeleton(expected) != skeleton(found):
        return False
    pairs = zip(MEASURED.findall(expected), MEASURED.findall(found), strict=True)
    return all(near(float(wanted), float(value), tolerance) for (_, wanted), (_, value) in pairs)


def differing_lines(where: str, expected: list, found: list, tolerance: float) -> list[str]:
    """What differs in lines, each of the differences as one text."""
    problems = []
    matcher = difflib.SequenceMatcher(
        a=[skeleton(str(line)) for line in expected],
        b=[skeleton(str(line)) for line in found],
        autojunk=False,
    )
    for kind, start, end, found_start, found_end in matcher.get_opcodes():
        if kind != "equal":
            for line in expected[start:end]:
                problems.append(f"{where} lacks {line!r}")
            for line in found[found_start:found_end]:
                problems.append(f"{where} has {line!r}")
            continue
        pairs = zip(expected[start:end], found[found_start:found_end], strict=True)
        for wanted, line in pairs:
            if not same_line(wanted, line, tolerance):
                problems.append(f"{where}: {line!r} instead of {wanted!r}")
    return problems


def differing_values(where: str, expected, found, tolerance: float) -> list[str]:
    """What differs in values of the results, each of the differences as one text."""
    if isinstance(expected, dict) and isinstance(found, dict):
        problems = []
        for key in [*expected, *[key for key in found if key not in expected]]:
            if tolerance and key in DIGESTS:
                continue
            inner = f"{where} {key}"
            problems += differing_values(inner, expected.get(key), found.get(key), tolerance)
        return problems
    if isinstance(expected, list) and isinstance(found, list):
        return differing_lines(where, expected, found, tolerance)
    if expected == found:
        return []
    problem = f"{where}: {found!r} instead of {expected!r}"
    if isinstance(expected, float) and isinstance(found, float):
        if near(expected, found, tolerance):
            return []
        problem += f" ({found - expected:+.1e})"
    is_size = where.endswith(" bytes_model") and isinstance(found, int)
    if tolerance and is_size and abs(found - expected) <= BYTES_TOLERANCE * expected:
        return []
    return [problem]


def differences(name: str, found: dict, exact: bool) -> list[str]:
    """What a run gives otherwise than the recorded one, each as one text, the shortest first."""
    problems = []
    for step in RUNS[name]:
        wanted = dict(recorded(name)[step.name])
        given = dict(found[step.name])
        if not exact and step.writes_text:
            # One token that falls otherwise changes all that follow.
            for key in ("console", "log"):
                wanted.pop(key)
                given.pop(key, None)
        tolerance = 0.0 if exact else step.tolerance
        problems += differing_values(step.name, wanted, given, tolerance)
    return sorted(problems, key=len)


def recorded(name: str) -> dict:
    """A file of tests/golden."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def why_not_exact(here: dict[str, str]) -> str:
    """Why bits cannot be compared under this fingerprint; empty if they can."""
    there = recorded(ORIGIN)["fingerprint"]
    reasons = []
    for name, value in there.items():
        both = (here[name], value)
        same = here[name] == value
        if name == "torch":
            same = same or all(version in TORCH_OF_SAME_BITS for version in both)
        if not same:
            reasons.append(f"{name} {here[name][:12]} instead of {value[:12]}")
    return ", ".join(reasons)


def write_json(name: str, content: dict) -> None:
    GOLDEN.mkdir(exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (GOLDEN / f"{name}.json").write_text(text, encoding="utf-8")


# ---- command


def compare_all(names: list[str], script: Path, tolerant: bool, work: Path) -> int:
    """Print what differs, run by run; exit status 1 if something does."""
    reason = why_not_exact(fingerprint_of_runs())
    if tolerant:
        reason = "--tolerant"
    how = f"within tolerances ({reason})" if reason else "to the bit"
    print(f"comparing {script} {how}", flush=True)
    digests = make_data(work / "data")
    problems = differing_values("data", recorded(ORIGIN)["data"], digests, tolerance=0.0)
    for problem in problems:
        print(problem)
    for name in names:
        found = record_run(name, script, work / name, work / "data")
        differing = differences(name, found, exact=not reason)
        print(f"{name}: " + (f"{len(differing)} differences" if differing else "same"), flush=True)
        for problem in differing:
            print(f"    {problem}")
        problems += differing
    return 1 if problems else 0


def record_all(names: list[str], script: Path, work: Path) -> int:
    """Write the records of these runs, and where they were made."""
    digests = make_data(work / "data")
    write_json(ORIGIN, dict(fingerprint=fingerprint_of_runs(), data=digests))
    for name in names:
        write_json(name, record_run(name, script, work / name, work / "data"))
        print(f"recorded {name}", flush=True)
    return 0


def main() -> int:
    """Exit status 0, or 1 if a run differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", type=Path, default=SCRIPT, help="the train_gpt.py to run")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="only these")
    parser.add_argument("--tolerant", action="store_true", help="losses within float32's noise")
    parser.add_argument("--record", action="store_true", help="write the records anew")
    parser.add_argument(
        "--fingerprint", action="store_true", help="print this process's fingerprint"
    )
    arguments = parser.parse_args()
    if arguments.fingerprint:
        print(json.dumps(fingerprint()))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        script = arguments.script.resolve()
        if arguments.record:
            return record_all(arguments.runs, script, Path(folder))
        return compare_all(arguments.runs, script, arguments.tolerant, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
