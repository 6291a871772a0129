"""The reader of run logs: what each kind of line states, and what a whole log does."""

from __future__ import annotations

from pathlib import Path

import pytest

import run_logs
from run_logs import LABELS, Log

DIGEST = "0123456789abcdef" * 4
SLIDING = LABELS["sliding"]
# A line of each shape of our own logs and the values that it states, in the order of
# run_logs.SHAPES; and one of each shape of the field's logs, which follow them there.
LINES = [
    ("preset", "preset:pocket (no CUDA)", dict(name="pocket")),
    ("world_size", "world_size:8 (threads:4)", dict(processes="8", threads="4")),
    (
        "device",
        "device:cuda:0 (NVIDIA H100 80GB HBM3)",
        dict(kind="cuda:0", name="NVIDIA H100 80GB HBM3"),
    ),
    ("dtype", "dtype:bfloat16 (avx512_bf16)", dict(name="bfloat16")),
    (
        "settings",
        'settings:{"seed": 1, "resume": false}',
        dict(json='{"seed": 1, "resume": false}'),
    ),
    (
        "data",
        "data:data/my demo tokenizer:data/my demo/tokenizer.model sha256:182bcf01fb1fc2ca",
        dict(
            folder="data/my demo",
            tokenizer="data/my demo/tokenizer.model",
            sha256="182bcf01fb1fc2ca",
        ),
    ),
    ("resumed", "resumed at step:20 train_time:6580ms", dict(step="20")),
    (
        "step",
        "step:450/20000 train_loss:2.7918 train_time:145785ms step_avg:323.97ms",
        dict(
            step="450",
            iterations="20000",
            train_loss="2.7918",
            milliseconds="145785",
            average="323.97",
        ),
    ),
    (
        "step",
        "step:463/20000 val_loss:2.8890 val_bpb:1.8295 train_time:149983ms step_avg:323.94ms",
        dict(
            step="463",
            iterations="20000",
            val_loss="2.8890",
            val_bpb="1.8295",
            milliseconds="149983",
            average="323.94",
        ),
    ),
    ("stage", "stage:packing 1.5s", dict(name="packing", seconds="1.5")),
    (
        "throughput",
        "late_qat_steps:22 tokens:948224 tokens_per_second:6322",
        dict(late_qat_steps="22", tokens="948224", tokens_per_second="6322"),
    ),
    (
        "artifact",
        f"artifact:final_model.int6.ptz sha256:{DIGEST} quant:fit codec:rans",
        dict(sha256=DIGEST),
    ),
    ("model_bytes", "Serialized model int6+zstd: 3396207 bytes", dict(bytes="3396207")),
    ("code_bytes", "Code size: 109214 bytes", dict(bytes="109214")),
    ("total_bytes", "Total submission size int6+zstd: 3505421 bytes", dict(bytes="3505421")),
    ("eval_seconds", "eval_seconds:42.9 peak_memory:865083392", dict(seconds="42.9")),
    ("compliance", 'compliance:{"track": "A"}', dict(json='{"track": "A"}')),
    (
        "score",
        f"{SLIDING} val_loss:2.8638 val_bpb:1.8135 eval_time:26959ms targets:185745 bytes:423163",
        dict(
            label=SLIDING,
            val_loss="2.8638",
            val_bpb="1.8135",
            milliseconds="26959",
            targets="185745",
            bytes="423163",
        ),
    ),
    (
        "exact_score",
        f"{SLIDING}_exact val_loss:2.86377283 val_bpb:nan",
        dict(label=SLIDING, val_loss="2.86377283", val_bpb="nan"),
    ),
    ("error", "error: SEED=x is no whole number", dict(text="error: SEED=x is no whole number")),
]


FIELD_LINES = [
    ("ran seed", "lr:embed=0.035 batch:786432 wall:600s seed:1337", dict(seed="1337")),
    ("ran processes", "  world_size: 8", dict(count="8")),
    ("ran processes", "XSA:[0, 1] ws:8 gqa:8/8", dict(count="8")),
    (
        "gpu",
        "|   0  NVIDIA H100 80GB HBM3          On  |   00000000:08:00.0 Off |        0 |",
        dict(name="NVIDIA H100 80GB HBM3"),
    ),
    ("parameters", "model_params:21336136 (unique_layers:9 loops:1)", dict(count="21336136")),
    ("parameters", "params: 27,092,058", dict(count="27,092,058")),
    (
        "validation tokens",
        "val_loader:shards pattern=./data/fineweb_val_*.bin tokens:62021632",
        dict(count="62021632"),
    ),
    ("validation tokens", "val_tokens: 47851520", dict(count="47851520")),
    (
        "training data",
        "train_loader:dataset:fineweb10B_sp1024 train_shards:80",
        dict(name="fineweb10B_sp1024", shards="80"),
    ),
    ("training shards", "train_shards: 80", dict(shards="80")),
    (
        "training data",
        "WARNING: train_loader:subset dataset:fineweb10B_sp1024 train_shards:10/195 new epochs",
        dict(name="fineweb10B_sp1024", shards="10"),
    ),
    (
        "data folder",
        "  datasets_dir: ./data/fineweb10B_sp8192",
        dict(path="./data/fineweb10B_sp8192"),
    ),
    ("batch tokens", "train_batch_tokens:524288 train_seq_len:1024", dict(count="524288")),
    (
        "batch tokens",
        "lr:embed=0.035 matrix=0.025 scalar=0.025 batch:786432 wall:600s seed:1337",
        dict(count="786432"),
    ),
    ("time limit", "warmup_steps:20 max_wallclock_seconds:600.000", dict(seconds="600.000")),
    ("switched on", "  ttt_enabled: True", dict(name="ttt_enabled")),
    (
        "trained",
        "step:200/20000 train_loss:2.7703 train_time:11580ms step_avg:57.90ms lr_scale:1.0",
        dict(
            step="200",
            iterations="20000",
            train_loss="2.7703",
            milliseconds="11580",
            average="57.90",
        ),
    ),
    (
        "trained",
        "500/20000 train_loss: 2.5705 train_time: 0.8m tok/s: 8341171",
        dict(
            step="500",
            iterations="20000",
            train_loss="2.5705",
            minutes="0.8",
            tokens_per_second="8341171",
        ),
    ),
    (
        "validated",
        "step:9918/20000 val_loss:1.9878 val_bpb:1.1773 train_time:570065ms step_avg:57.48ms",
        dict(
            step="9918",
            iterations="20000",
            val_loss="1.9878",
            val_bpb="1.1773",
            milliseconds="570065",
            average="57.48",
        ),
    ),
    (
        "validated",
        "5001/20000 val_loss: 2.3466 val_bpb: 1.0722",
        dict(step="5001", iterations="20000", val_loss="2.3466", val_bpb="1.0722"),
    ),
    (
        "stopped",
        "stopping_early: wallclock_cap train_time: 599592ms step: 4945/20000",
        dict(milliseconds="599592", step="4945", iterations="20000"),
    ),
    (
        "packed bytes",
        "Serialized model quantized+pergroup: 15910335 bytes",
        dict(codec="quantized+pergroup", bytes="15910335"),
    ),
    ("packed bytes", "Compressed model: 15888496 bytes (zstd22)", dict(bytes="15888496")),
    (
        "packed bytes",
        "serialized_model_int8_zlib:7990030 bytes (payload:17189152 raw_pickle:17198601)",
        dict(codec="int8_zlib", bytes="7990030"),
    ),
    (
        "packed bytes",
        "Quantized+compressed (zstd): 13928995 bytes",
        dict(codec="zstd", bytes="13928995"),
    ),
    ("unpacked bytes", "Raw model: 77941028 bytes, Code: 50629 bytes", dict(bytes="77941028")),
    (
        "packed bytes",
        "Serialized zstd-22: 15886818 bytes  Total: 15930918 bytes",
        dict(codec="zstd-22", bytes="15886818"),
    ),
    (
        "total",
        "Serialized zstd-22: 15886818 bytes  Total: 15930918 bytes",
        dict(codec="zstd-22", bytes="15930918"),
    ),
    (
        "counted code",
        "Serialized model: 87413467 bytes  Code: 44100 bytes",
        dict(bytes="44100"),
    ),
    ("counted code", "Raw model: 77941028 bytes, Code: 50629 bytes", dict(bytes="50629")),
    ("unpacked bytes", "Serialized model: 67224983 bytes", dict(bytes="67224983")),
    (
        "counted code",
        "Code size (compressed): 37155 bytes",
        dict(kind="compressed", bytes="37155"),
    ),
    (
        "counted code",
        "code_size:56228 bytes total_submission_size:52625931 bytes",
        dict(bytes="56228"),
    ),
    (
        "total",
        "total_submission_size_int8_zlib:14236084 bytes",
        dict(codec="int8_zlib", bytes="14236084"),
    ),
    (
        "total",
        "Total submission size int8+zlib: 15863489 bytes",
        dict(codec="int8+zlib", bytes="15863489"),
    ),
    (
        "total without codec",
        "Total submission size: 15935368 bytes (15.94 MB)",
        dict(bytes="15935368"),
    ),
    (
        "scored",
        "final_int6_lzma_roundtrip(ttt_lora) val_loss:1.7146 val_bpb:1.0147 eval_time:2434054ms",
        dict(
            label="final_int6_lzma_roundtrip(ttt_lora)",
            val_loss="1.7146",
            val_bpb="1.0147",
            milliseconds="2434054",
        ),
    ),
    (
        "scored",
        "ttt_sliding:done val_loss=2.784788 val_bpb=1.078078 elapsed=344.8s",
        dict(label="ttt_sliding", val_loss="2.784788", val_bpb="1.078078", seconds="344.8"),
    ),
    ("score alone", "val_bpb = 1.09700744", dict(label="val_", val_bpb="1.09700744")),
    (
        "score alone",
        "final_int8_zlib_roundtrip_ppm_best boost_k:15.00 hits:631838 val_bpb:1.14132993 delta:0",
        dict(label="final_int8_zlib_roundtrip_ppm_best", val_bpb="1.14132993"),
    ),
    ("evaluation", "total_eval_time:540.1s", dict(seconds="540.1")),
    ("adapted", "ttt_sliding:start chunks=1238 ttt_lr=0.005", dict(how="ttt_sliding")),
    ("adapted", "ngram_cache: hits=7612859/7754688 (98.2%)", dict(how="ngram_cache")),
]


def write_log(path: Path, *lines: str, source: str = "print('hello')\n") -> Log:
    path.write_text("\n".join([source + run_logs.SEPARATOR, *lines, ""]), encoding="utf-8")
    return Log(path)


OWN_SHAPES = run_logs.SHAPES[: len(LINES)]
FIELD_SHAPES = run_logs.SHAPES[len(LINES) :]


@pytest.mark.parametrize("row, line", list(zip(FIELD_SHAPES, FIELD_LINES, strict=True)))
def test_each_shape_of_the_field_finds_its_line(row, line):
    fact, text, values = line
    assert row.fact == fact and row.needle in text
    found = row.pattern.fullmatch(text).groupdict()
    assert {name: value for name, value in found.items() if value is not None} == values
    # No other row states the same fact of this line.
    same = [each for each in FIELD_SHAPES if each.fact == fact and each.pattern.fullmatch(text)]
    assert same == [row]


def test_a_line_of_source_states_nothing():
    lines = [
        'log0(f"model_params:{n_params}")',
        '    log(f"Total submission size {codec}: {total} bytes")',
        'log0(f"final_int8_zlib_roundtrip val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f}")',
        'seed = int(os.environ.get("SEED", 1337))',
        "max_wallclock_seconds = float(600.0)",
        "world_size = int(8)",
    ]
    for line in lines:
        assert not any(row.pattern.fullmatch(line) for row in FIELD_SHAPES), line


@pytest.mark.parametrize("row, line", list(zip(OWN_SHAPES, LINES, strict=True)))
def test_each_shape_finds_its_line_and_no_other(row, line):
    fact, text, values = line
    assert row.fact == fact
    assert row.pattern.fullmatch(text).groupdict() == values
    others = [other for _, other, _ in LINES if other != text]
    assert not row.pattern.search("\n".join(others))


@pytest.mark.parametrize(
    "line", ["ValueError: no", "torch.cuda.OutOfMemoryError: too much", "fine"]
)
def test_errors_on_a_console_are_found_at_the_beginning_of_a_line(line):
    found = run_logs.console_errors(f"Traceback\n  raise ValueError\n{line}\n")
    assert found == ([line] if line.startswith("ValueError") else [])


def test_a_log_states_what_its_lines_say(tmp_path):
    log = write_log(tmp_path / "a.txt", *(text for _, text, _ in LINES))
    assert log.source == "print('hello')\n"
    assert log.settings == dict(seed=1, resume=False)
    assert (log.preset, log.dtype, log.world_size, log.threads) == ("pocket", "bfloat16", 8, "4")
    assert log.device == ("cuda:0", "NVIDIA H100 80GB HBM3")
    assert log.data == ("data/my demo", "data/my demo/tokenizer.model", "182bcf01fb1fc2ca")
    assert log.resumed_at == [20]
    assert log.steps() == [[(450, 20000, 145785, 323.97), (463, 20000, 149983, 323.94)]]
    assert log.last_step == (463, 20000, 149983, 323.94)
    assert log.throughput == (22, 948224, 6322)
    assert (log.stage_seconds("packing"), log.stage_seconds("training")) == (1.5, None)
    assert log.artifact_sha256 == DIGEST
    assert (log.model_bytes, log.code_bytes, log.total_bytes) == (3396207, 109214, 3505421)
    assert (log.eval_seconds, log.pre_quantization_bpb) == (42.9, 1.8295)
    assert log.compliance == dict(track="A")
    score = log.score(SLIDING)
    assert (score.val_loss, score.rounded_val_loss, score.seconds) == (2.86377283, 2.8638, 26.959)
    assert (score.targets, score.bytes) == (185745, 423163)
    assert log.score(LABELS["roundtrip"]) is None


def test_a_log_without_lines_states_nothing(tmp_path):
    log = write_log(tmp_path / "a.txt")
    assert (log.preset, log.dtype, log.world_size) == ("record", "auto", 1)
    assert log.threads == "unknown"
    assert log.settings == {} and log.steps() == [[]] and log.resumed_at == []
    assert log.curve("val_bpb") == []
    facts = "device data last_step throughput artifact_sha256 model_bytes code_bytes total_bytes"
    for name in f"{facts} eval_seconds pre_quantization_bpb compliance".split():
        assert getattr(log, name) is None, name


def test_only_the_lines_behind_the_separator_are_the_runs(tmp_path):
    source = "print('''\nCode size: 1 bytes\n''')\n"
    log = write_log(tmp_path / "a.txt", "Code size: 2 bytes", source=source)
    assert log.code_bytes == 2
    (tmp_path / "b.txt").write_text("Code size: 3 bytes\n")
    assert Log(tmp_path / "b.txt").code_bytes is None
    assert Log(tmp_path / "b.txt").parts == []
    assert Log(tmp_path / "b.txt", with_source=False).code_bytes == 3


def test_a_resumed_run_has_parts_and_the_last_statement_counts(tmp_path):
    line = "step:{}/30 train_loss:1.0 train_time:{}ms step_avg:1.00ms"
    lines = ["settings:{}", line.format(20, 20), run_logs.SEPARATOR, 'settings:{"seed": 2}']
    log = write_log(tmp_path / "a.txt", *lines, "resumed at step:10", line.format(30, 30))
    assert [[step.step for step in part] for part in log.steps()] == [[20], [30]]
    assert log.settings == dict(seed=2) and log.resumed_at == [10]


def test_a_curve_has_each_step_once_and_in_order(tmp_path):
    end = "train_time:1ms step_avg:1.00ms"
    lines = [f"step:{step}/9 train_loss:{loss} {end}" for step, loss in ((2, 1.0), (4, 0.5))]
    again = [f"step:{step}/9 train_loss:{loss} {end}" for step, loss in ((4, 0.6), (3, 0.7))]
    log = write_log(tmp_path / "a.txt", *lines, *again, f"step:4/9 val_loss:2 val_bpb:1 {end}")
    assert log.curve("train_loss") == [(2, 1.0), (3, 0.7), (4, 0.6)]
    assert log.curve("val_bpb") == [(4, 1.0)]


@pytest.mark.parametrize(
    "line", ["compliance:[1]", "compliance:{", "settings:{{}", "eval_seconds:soon peak_memory:1"]
)
def test_lines_that_make_no_sense_state_nothing(line, tmp_path):
    log = write_log(tmp_path / "a.txt", line)
    assert log.settings == {} and log.eval_seconds is None
    if line.startswith("compliance"):
        with pytest.raises(ValueError):
            _ = log.compliance


def test_progress_is_read_from_the_end_of_a_log_that_grows(tmp_path):
    path = tmp_path / "a.txt"
    assert run_logs.progress(path) is None
    step = "step:{}/30 train_loss:1.0 train_time:{}ms step_avg:1.00ms"
    write_log(path, *(step.format(i, i) for i in range(25)), "step:25/30 trai")
    assert run_logs.progress(path) == "24/30"


def test_the_machines_settings_and_the_seed_are_no_configuration(tmp_path):
    first = write_log(tmp_path / "a.txt", 'settings:{"seed": 1, "compile": true, "muon_wd": 0.1}')
    second = write_log(tmp_path / "b.txt", 'settings:{"seed": 2, "run_id": "x", "muon_wd": 0.1}')
    third = write_log(tmp_path / "c.txt", 'settings:{"seed": 2, "muon_wd": 0.2, "ema_every": 1}')
    assert run_logs.configuration(first) == dict(muon_wd=0.1)
    assert run_logs.differing_settings(first, second) == []
    assert run_logs.differing_settings(first, third) == ["ema_every", "muon_wd"]
