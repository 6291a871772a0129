"""Parameter golf in one file: train, average, quantize, pack, read back, score.
    python train_gpt.py                                     # two CPU cores or one GPU; brings its own data
    torchrun --standalone --nproc_per_node=8 train_gpt.py   # the record configuration on 8xH100
    ARTIFACT=final_model.int6.ptz python train_gpt.py       # score an artifact without training

Every setting is an environment variable (see --help): `BACKOUT_ENABLED=0 python train_gpt.py` is an ablation.
It reads as it runs: Settings, Runtime, Data, Score (bytes behind the tokens), Layers, GPT, Optimizers,
Artifact, Evaluate, Train, Main. Numbers such as #339 are pull requests of openai/parameter-golf."""
from __future__ import annotations
import collections, contextlib, dataclasses, datetime, difflib, functools, glob, hashlib, importlib, io
import json, math, os, resource, signal, struct, subprocess, sys, tempfile, time, traceback
from pathlib import Path
try:
    import numpy as np, sentencepiece, torch, zstandard
    import torch.distributed as dist, torch.nn.functional as F
    from torch import Tensor, nn
except ImportError as error:
    raise SystemExit(f"error: {error}: pip install -r requirements.txt") from None

# ---- Settings ----------------------------------------------------------------------------------------------
class UserError(Exception):
    """Something that the person at the keyboard can mend: main() prints its one line and exits with 2."""
def require(holds, problem: str, kind: type[Exception] = UserError) -> None:
    """Raise what says the problem, unless the condition holds."""
    if not holds: raise kind(problem)
def setting(group: str, default, help: str, low=None, high=None, choices: tuple[str, ...] = ()):
    """One setting; its environment variable is its name in capitals, the field's name where it has one."""
    meta = dict(group=group, help=help, low=low, high=high, choices=choices)
    return dataclasses.field(default=default, metadata=meta)
run_, model_, train_, pack_, eval_ = (functools.partial(setting, group) for group in (
    "run", "model", "training", "artifact", "evaluation"))
@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of a run. The defaults are PRESET=record; PRESETS has what another preset changes."""
    preset: str = run_("auto", "auto: record on CUDA, else pocket", choices=("auto", "record", "pocket"))
    run_id: str = run_("", "names the files in logs/; empty: date, time, process and seed")
    checkpoint_every: float = run_(0.0, "seconds between checkpoints in logs/; 0: none", 0.0)
    resume: bool = run_(False, "go on from the last checkpoint of RUN_ID, or else of the last run")
    artifact: str = run_("", "score this artifact instead of training a model")
    sample: str = run_("", "with ARTIFACT: continue this text instead of scoring")
    sample_tokens: int = run_(200, "most tokens that SAMPLE adds", 1)
    sample_temperature: float = run_(0.8, "of SAMPLE; 0 always takes the likeliest token", 0.0)
    data_path: str = run_("", "folder of the shards; empty: FineWeb's, or if that is absent the demo corpus")
    tokenizer_path: str = run_("", "SentencePiece model; empty: DATA_PATH/tokenizer.model, else FineWeb's")
    device: str = run_("auto", "auto: CUDA if there is a GPU", choices=("auto", "cuda", "cpu"))
    dtype: str = run_("auto", "auto: bfloat16 where it is fast", choices=("auto", "bfloat16", "float32"))
    attention: str = run_("auto", "auto: the fastest that is installed and fits the device",
                          choices=("auto", "flash3", "flash2", "sdpa", "blocked"))
    compile: str = run_("auto", "torch.compile; auto: if a compiler works", choices=("auto", "0", "1"))
    micro_batch_tokens: int = run_(0, "most positions of a training pass; 0: as many as the memory holds", 0)
    eval_batch_seqs: int = run_(256, "most windows of an evaluation pass, if the memory holds them", 1)
    train_log_every: int = run_(200, "steps between lines of the log; 0: first and last step", 0)
    num_layers: int = model_(11, "transformer blocks", 1, 256)
    model_dim: int = model_(512, "width of the residual stream", 2, 16384)
    vocab_size: int = model_(1024, "pieces of the tokenizer", 4, 65536)
    num_heads: int = model_(8, "query heads", 1, 1024)
    num_kv_heads: int = model_(4, "key and value heads (grouped-query attention)", 1, 1024)
    qk_gain_init: float = model_(1.5, "initial gain of each query head, after the norm", 0.0)
    rope_dims: int = model_(16, "rotated dimensions of each head; 0: all", 0)
    rope_base: float = model_(10000.0, "base of the rotary frequencies", 1.0)
    mlp_mult: float = model_(3.0, "hidden width of the MLP over MODEL_DIM", 0.01, 64)
    smear_enabled: bool = model_(True, "SmearGate: blend each embedding with the one before it")
    bigram_vocab_size: int = model_(4096, "rows of the BigramHash table; 0: off", 0, 1 << 24)
    bigram_dim: int = model_(128, "width of the BigramHash table", 1, 16384)
    memory_tokens: int = model_(64, "learned vectors in front of every row; 0: off", 0, 16384)
    backout_enabled: bool = model_(True, "at the end, subtract lambda times a middle block's output")
    backout_lambda_init: float = model_(0.2, "initial lambda of backout")
    backout_layer: int = model_(-1, "block that is backed out, from 0; -1: NUM_LAYERS // 2", -1)
    tie_embeddings: bool = model_(True, "use the embedding as the output matrix")
    logit_softcap: float = model_(30.0, "c in logits = c * tanh(logits / c)", 1e-3)
    ln_scale: bool = model_(True, "scale the norms of a block by 1 / sqrt(layer + 1)")
    train_seq_len: int = model_(2048, "positions of a training row, memory tokens included", 2, 1 << 20)
    seed: int = train_(1337, "decides the initial weights and the order of the data", 0, 2**63 - 1)
    tied_embed_init_std: float = train_(0.005, "initial deviation of a tied embedding", 0.0)
    mtp_num_heads: int = train_(0, "auxiliary heads that predict further ahead; never exported", 0)
    mtp_loss_weight: float = train_(0.2, "weight of their mean loss", 0.0)
    train_batch_tokens: int = train_(786432, "positions of a step over all ranks", 1)
    iterations: int = train_(9000, "most steps", 1)
    max_wallclock_seconds: float = train_(600.0, "training stops before this; 0: no limit", 0.0)
    warmdown_iters: int = train_(3000, "steps of linear decay to 0 at the end", 0)
    warmdown_fraction: float = train_(0.6, "most of a run that WARMDOWN_ITERS may take", 0.0, 1.0)
    warmup_steps: int = train_(20, "steps on synthetic tokens before the clock starts, then undone", 0)
    grad_clip_norm: float = train_(0.3, "largest norm of the gradient; 0: no clipping", 0.0)
    matrix_lr: float = train_(0.025, "learning rate of Muon", 0.0)
    muon_momentum: float = train_(0.99, "momentum of Muon after its warm-up", 0.0, 0.9999)
    muon_momentum_warmup_start: float = train_(0.92, "momentum of Muon at step 0", 0.0, 0.9999)
    muon_momentum_warmup_steps: int = train_(1500, "steps from the one to the other", 0)
    muon_backend_steps: int = train_(5, "Newton-Schulz iterations", 1, 100)
    muon_wd: float = train_(0.04, "decoupled weight decay of Muon", 0.0)
    tied_embed_lr: float = train_(0.035, "learning rate of a tied embedding, memory and bigram table", 0.0)
    embed_lr: float = train_(0.6, "learning rate of an embedding that is not tied", 0.0)
    head_lr: float = train_(0.008, "learning rate of an untied output matrix and of MTP heads", 0.0)
    scalar_lr: float = train_(0.025, "learning rate of vectors, gates and scalars", 0.0)
    adam_wd: float = train_(0.04, "weight decay of AdamW; memory tokens have none", 0.0)
    beta1: float = train_(0.9, "of AdamW", 0.0, 0.9999)
    beta2: float = train_(0.95, "of AdamW", 0.0, 0.9999)
    adam_eps: float = train_(1e-8, "of AdamW", 0.0)
    swa_enabled: bool = train_(True, "export the mean of the weights near the end")
    swa_every: int = train_(50, "steps between its samples", 1)
    swa_start_scale: float = train_(0.2, "SWA starts when the learning-rate scale falls below", 0.0)
    ema_enabled: bool = train_(False, "export an exponential average in place of SWA")
    ema_decay: float = train_(0.997, "its decay per step", 0.0, 1.0)
    ema_every: int = train_(10, "steps between its updates", 1)
    ema_start_scale: float = train_(0.5, "EMA starts when the learning-rate scale falls below", 0.0)
    late_qat_threshold: float = train_(0.1, "late QAT starts when the scale falls below; 0: never", 0.0, 1.0)
    val_loss_every: int = train_(0, "steps between validation passes during training; 0: none", 0)
    quant: str = pack_("fit", "fit: steps that spend the cap; rows: int6 rows", choices=("fit", "rows"))
    int5_mlp: str = pack_("auto", "QUANT=rows with an int5 MLP, or (0) without", choices=("auto", "0", "1"))
    codec: str = pack_("rans", "what codes are compressed with", choices=("rans", "zstd"))
    zstd_level: int = pack_(22, "compression level, of what is not in rANS", 1, 22)
    artifact_max_bytes: int = pack_(16_000_000, "cap on code + model", 1)
    eval_seq_len: int = eval_(2048, "positions of a sliding window, memory tokens included", 2, 1 << 20)
    eval_stride: int = eval_(64, "targets that each sliding window adds", 1)
# A CPU takes hundreds of steps, not 7,000: momentum forgets within 20, the average spans a few dozen.
PRESETS: dict[str, dict] = {
    "record": {}, "pocket": dict(
        model_dim=192, num_heads=3, num_kv_heads=1, bigram_vocab_size=2048, bigram_dim=64, memory_tokens=8,
        train_seq_len=256, train_batch_tokens=2048, micro_batch_tokens=2048, eval_seq_len=256, warmup_steps=2,
        eval_batch_seqs=32, iterations=20000, max_wallclock_seconds=150.0, warmdown_fraction=0.5, swa_every=5,
        train_log_every=50, muon_momentum=0.95, muon_momentum_warmup_start=0.85, matrix_lr=0.03,
        muon_momentum_warmup_steps=200, tied_embed_lr=0.04, scalar_lr=0.03, grad_clip_norm=1.0)}
def fields_of(*groups: str) -> list[dataclasses.Field]:  # of these groups, or all of them, in their order
    return [f for f in dataclasses.fields(Settings) if not groups or f.metadata["group"] in groups]
def parse_value(field: dataclasses.Field, text: str):
    """The typed value of an environment variable; ValueError says what would have been right."""
    meta, bools = field.metadata, {"0": False, "1": True, "false": False, "true": True}
    try:
        value = dict(bool=lambda x: bools[x.strip().lower()], int=int, float=float, str=str)[field.type](text)
    except (ValueError, KeyError):
        wanted = dict(bool="0 or 1", int="a whole number", float="a number")[field.type]
        raise ValueError(f"must be {wanted}") from None
    low, high, choices = meta["low"], math.inf if meta["high"] is None else meta["high"], meta["choices"]
    require(not choices or value in choices, f"must be one of {', '.join(choices)}", ValueError)
    require(field.type != "float" or math.isfinite(value), "must be finite", ValueError)
    limits = f"must be at least {low}" + f" and at most {high}" * (high < math.inf)
    require(low is None or low <= value <= high, limits, ValueError)
    return value
def combination_problems(s: Settings, trains: bool) -> list[str]:
    """What cannot work together, in a run that trains a model or in one that uses an artifact."""
    head_dim, made = s.model_dim // s.num_heads, Path("logs", f"{s.run_id}.{'json' if s.resume else 'txt'}")
    window, row = s.eval_seq_len - s.memory_tokens, s.train_seq_len - s.memory_tokens
    rules = [
        (s.model_dim % s.num_heads == 0, f"MODEL_DIM={s.model_dim} must be a multiple of NUM_HEADS"),
        (s.num_heads % s.num_kv_heads == 0, f"NUM_HEADS={s.num_heads} must be a multiple of NUM_KV_HEADS"),
        ((s.rope_dims or head_dim) % 2 == 0 and s.rope_dims <= head_dim,
         f"ROPE_DIMS={s.rope_dims} must be even and at most the {head_dim} dimensions of a head"),
        (s.backout_layer < s.num_layers, f"BACKOUT_LAYER={s.backout_layer} must be below NUM_LAYERS"),
        (int(s.mlp_mult * s.model_dim) > 0, f"MLP_MULT={s.mlp_mult} leaves the MLP no hidden units"),
        (row > 1 and window > 0, f"MEMORY_TOKENS={s.memory_tokens} leaves no room in TRAIN_ or EVAL_SEQ_LEN"),
        (not 0 < window < s.eval_stride, f"EVAL_STRIDE={s.eval_stride} exceeds a window's {window} tokens"),
        (not trains or s.train_batch_tokens % s.train_seq_len == 0,
         f"TRAIN_BATCH_TOKENS={s.train_batch_tokens} must be a multiple of TRAIN_SEQ_LEN={s.train_seq_len}"),
        (not trains or not 0 < s.micro_batch_tokens < s.train_seq_len,
         f"MICRO_BATCH_TOKENS={s.micro_batch_tokens} must hold a row of TRAIN_SEQ_LEN={s.train_seq_len}"),
        (s.quant == "rows" or s.int5_mlp == "auto", "INT5_MLP is for QUANT=rows"),
        (not trains or s.mtp_num_heads < max(row, 1), f"MTP_NUM_HEADS must be below {row}, a row's tokens"),
        (not s.sample or s.artifact, "SAMPLE needs ARTIFACT, the model that continues the text"),
        (not set(s.run_id) & set("/\\\0"), f"RUN_ID={s.run_id} must be a file name, not a path"),
        (not s.resume or not s.artifact, "RESUME goes on training; it cannot be set with ARTIFACT"),
        (not s.run_id or not made.exists(), f"RUN_ID={s.run_id} is taken: {made} exists; choose another")]
    return [problem for holds, problem in rules if not holds]
def mistyped_settings(environment) -> list[str]:
    """A warning for each variable that is no setting but looks like one (NUM_LAYER, LR_MATRIX)."""
    names = [field.name.upper() for field in fields_of()]
    forms = {form: name for name in names for form in ("_".join(sorted(name.split("_"))), name)}
    meant = {x: difflib.get_close_matches("_".join(sorted(x.split("_"))), forms, 1, cutoff=1.0) or
             difflib.get_close_matches(x, forms, 1, cutoff=0.88) for x in environment if x not in names}
    return [f"warning: {x} is not a setting; did you mean {forms[y[0]]}?" for x, y in meant.items() if y]
def settings_from(environment, stored: dict | None = None, resumes: bool = False) -> tuple[Settings, str]:
    """Settings from environment variables, and a line on the preset. A variable wins over `stored`, what an
    artifact says, but must not shape the model otherwise, and that over the preset. Of a run that `resumes`
    nothing stored can change. All problems at once."""
    given, problems, stored = {}, [], stored or {}
    for field in fields_of():
        text = environment.get(field.name.upper(), "")
        try:
            given.update({field.name: parse_value(field, text)} if text else {})
        except ValueError as error:
            problems.append(f"{field.name.upper()}={text} {error}")
    for name in [field.name for field in fields_of(*[] if resumes else ["model"]) if field.name in stored]:
        if given.get(name, stored[name]) != stored[name]:
            problems.append(f"{name.upper()}={given[name]} differs from the stored model's {stored[name]}")
    given.update({} if given.get("int5_mlp", "auto") == "auto" else {"quant": given.get("quant", "rows")})
    wanted, device = given.get("preset", "auto"), given.get("device", "auto")
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    preset = wanted if wanted in PRESETS else "record" if on_cuda else "pocket"
    settings = Settings(**{**PRESETS[preset], **stored, **given})
    problems += combination_problems(settings, trains=resumes or not stored)
    require(not problems, "settings: " + "; ".join(problems))
    return settings, f"preset:{preset} (" + (
        "asked for" if wanted in PRESETS else "CUDA is there" if on_cuda else "no CUDA") + ")"
def as_typed(value) -> str:  # a value as one would type it after `NAME=`
    return str(int(value)) if isinstance(value, bool) else str(value)
def help_text() -> str:  # what --help prints
    lines = ["usage: [SETTING=value ...] python train_gpt.py", "",
             "Settings are environment variables. Defaults are PRESET=record's; [what PRESET=pocket has]."]
    for group in dict.fromkeys(field.metadata["group"] for field in fields_of()):
        lines += ["", f"{group}:"]
        for field in fields_of(group):
            pocket = PRESETS["pocket"].get(field.name, field.default)
            default = as_typed(field.default) or "empty"
            default += f" [{as_typed(pocket)}]" * (pocket != field.default)
            choices = f" ({', '.join(field.metadata['choices'])})" * bool(field.metadata["choices"])
            lines += [f"  {field.name.upper()} {field.type} = {default}: {field.metadata['help']}{choices}"]
    return "\n".join(lines)

# ---- Runtime: all that depends on the machine, chosen once -------------------------------------------------
GPU_OPTIONS = dict(combo_kernels=True, max_autotune_gemm=True)  # kernels join; products take other work in
@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where this process runs and with what; `reasons` says how each choice was made."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    compiled: str = "no"  # "graph": whole functions, "blocks": the blocks one by one, or "no"
    reasons: tuple[str, ...] = ()
    control: object = None  # gloo group beside NCCL; None: the default group, which no one must keep alive
    def compile(self, function, unit: str):
        """The function as one compiled graph if this runtime compiles units of its kind, else as it is."""
        how = dict(fullgraph=True, dynamic=False, options=GPU_OPTIONS if self.device.type == "cuda" else None)
        return torch.compile(function, **how) if self.compiled == unit else function
    def sum_over_ranks(self, tensor: Tensor) -> Tensor:  # the tensor's sum over all ranks, in place
        if self.world_size > 1: dist.all_reduce(tensor)
        return tensor
    def gather(self, share: Tensor):
        """The shares of all ranks, one after the other, and a function that waits until they are there."""
        if self.world_size == 1: return share, lambda: None
        whole = share.new_empty(self.world_size * len(share), *share.shape[1:])
        return whole, dist.all_gather_single(whole, share, async_op=True).wait
    def from_main(self, value):
        """Rank 0's value on every rank. The hosts wait for each other, their devices do not."""
        box = [value]
        if self.world_size > 1: dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]
    def memory_bytes(self) -> float:  # memory to plan batches for: the GPU's, or 4 GB
        cuda = torch.cuda.get_device_properties(self.device) if self.device.type == "cuda" else None
        return cuda.total_memory if cuda else 4e9
    def synchronize(self) -> None:
        if self.device.type == "cuda": torch.cuda.synchronize(self.device)
    def peak_memory_bytes(self) -> int:  # the most allocated on a GPU, or resident on a CPU
        if self.device.type == "cuda": return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
def choose_device(settings: Settings, local_rank: int) -> tuple[torch.device, str]:
    """CUDA if it is there, with the reason."""
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu"), "asked for" if settings.device == "cpu" else "no CUDA"
    require(torch.cuda.is_available(), "DEVICE=cuda: torch sees no GPU here")
    require(local_rank < torch.cuda.device_count(), f"no GPU for rank {local_rank}: lower --nproc_per_node")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank), torch.cuda.get_device_name(local_rank)
def choose_dtype(settings: Settings, device: torch.device) -> tuple[torch.dtype, str]:
    """bfloat16 where the hardware has instructions for its products, else float32, with the reason."""
    if settings.dtype != "auto": return getattr(torch, settings.dtype), "asked for"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    found = [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)]
    if device.type == "cuda":
        found = ["tensor cores"] * torch.cuda.is_bf16_supported(including_emulation=False)
    return (torch.bfloat16, found[0]) if found else (torch.float32, "no bfloat16 products here")
def importable(name: str) -> bool:  # whether it is there and works: built for another torch, it fails
    with contextlib.suppress(Exception): return bool(importlib.import_module(name))
def choose_attention(settings: Settings, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The fastest backend that works here, with the reason; UserError for a wish that cannot be met."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    half = device.type == "cuda" and dtype == torch.bfloat16
    obstacles = {
        "flash3": "needs bfloat16 on an H100 and the package flash_attn_interface" * (
            not half or capability[0] != 9 or not importable("flash_attn_interface")),
        "flash2": "needs bfloat16 on an Ampere or newer GPU and the package flash-attn" * (
            not half or capability < (8, 0) or not importable("flash_attn")),
        "sdpa": "is slower on a CPU" * (device.type != "cuda")}
    wish, obstacle = settings.attention, obstacles.get(settings.attention)
    require(not obstacle or wish == "sdpa", f"ATTENTION={wish} {obstacle}")
    if wish != "auto": return wish, "asked for"
    reason = "; ".join(f"{name} {why}" for name, why in obstacles.items() if why)
    return next((name for name, why in obstacles.items() if not why), "blocked"), reason or "the fastest"
def choose_compilation(settings: Settings, device: torch.device) -> tuple[str, str]:
    """What to compile, if a small function compiles: on a CPU one block, since all would take minutes."""
    if settings.compile == "0": return "no", "asked for"
    if settings.compile == "auto" and device.type == "cpu" and not settings.artifact and (
            settings.iterations < 100 or 0 < settings.max_wallclock_seconds < 30):
        return "no", "the run is too short to earn it back"
    try:
        unit = "graph" if device.type == "cuda" else "blocks"
        Runtime(device=device, compiled=unit).compile(torch.tanh, unit)(torch.ones(64, device=device))
        return unit, "a compiler works"
    except Exception as error:  # a missing compiler, header or library shows as one of many types
        reason = "torch.compile fails: " + " ".join(str(error).split())[:200]
        require(settings.compile != "1", f"COMPILE=1: {reason}")
        return "no", reason
def start_runtime(settings: Settings) -> Runtime:
    """Join the ranks that torchrun started, if any, and choose device, dtype, attention and compiler."""
    rank, world_size, local_rank = (int(os.environ.get(name, default))
                                    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    torch.set_float32_matmul_precision("high")
    device, device_reason = choose_device(settings, local_rank)
    dtype, dtype_reason = choose_dtype(settings, device)
    attention, attention_reason = choose_attention(settings, device, dtype)
    compiled, compile_reason = choose_compilation(settings, device)
    control = None
    if world_size > 1 and device.type == "cuda":  # ranks meet in `control` first, and wait but seconds here
        dist.init_process_group("nccl", device_id=device, timeout=datetime.timedelta(minutes=1))
        control = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=30))
    elif world_size > 1: dist.init_process_group("gloo")
    reasons = tuple(f"{name}:{value} ({why})" for name, value, why in (
        ("world_size", world_size, f"threads:{torch.get_num_threads()}"), ("device", device, device_reason),
        ("dtype", str(dtype).removeprefix("torch."), dtype_reason),
        ("attention", attention, attention_reason), ("compile", compiled, compile_reason)))
    return Runtime(rank, world_size, local_rank, device, dtype, attention, compiled, reasons, control)
class Log:
    """Rank 0's lines for the console and for logs/<run_id>.txt, which begins with this script's source."""
    def __init__(self, run_id: str, runtime: Runtime, resumes: bool = False):
        self.run_id, self.file = run_id, None
        if runtime.rank == 0:
            self.file = open(f"logs/{run_id}.txt", "a" if resumes else "x", encoding="utf-8", buffering=1)
            self(Path(__file__).read_text("utf-8") * (not self.file.tell()) + "=" * 100, console=False)
    def __call__(self, line: str, console: bool = True) -> None:
        for file in (self.file, sys.stdout)[:1 + console] if self.file else ():
            with contextlib.suppress(OSError): print(line, file=file, flush=True)  # not why a run should end
class StopSignals:
    """SIGTERM and Ctrl-C end a run at once, or, if they come while they are held, when they are let go."""
    number, held, since = 0, False, 0.0
    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, self.receive)
    def receive(self, number: int, frame) -> None:
        first, late = not self.number, time.monotonic() > self.since + 5
        if first: self.number, self.since = number, time.monotonic()
        if first or late: self.hold(first and self.held)  # launchers send it twice at once
    def hold(self, held: bool) -> None:
        self.held = held
        if self.number and not held: raise KeyboardInterrupt
STOP = StopSignals()
def claim_disk(size: float) -> None:
    """UserError if `size` bytes cannot be written here and in logs/, said before training, not after it."""
    for folder in (Path.cwd(), Path.cwd() / "logs"):
        try:
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                getattr(os, "posix_fallocate", lambda *_: None)(probe.fileno(), 0, int(size))
        except OSError as error:
            raise UserError(f"cannot write {size:.0f} bytes into {folder}: {error.strerror}") from None

# ---- Data: shards of uint16 tokens, and the order in which training sees them ------------------------------
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
FINEWEB, FINEWEB_TOKENIZER = (Path("data", x) for x in ("datasets/fineweb10B_sp1024",
                                                        "tokenizers/fineweb_1024_bpe.model"))
BOS, IGNORED = 1, -1  # begins every document; a target that does not count
def open_shard(path: Path) -> np.ndarray:
    """A shard's tokens, memory-mapped, uint16 (tokens,); UserError if it is damaged."""
    start, size = 4 * SHARD_HEADER_INTS, path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    known = size >= start and tuple(header[:2]) == (SHARD_MAGIC, SHARD_VERSION)
    require(known, f"{path}: no token shard: magic {SHARD_MAGIC}, version {SHARD_VERSION} are not there")
    require(size == start + 2 * int(header[2]), f"{path}: damaged: {size} bytes, but {header[2]} tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=start) if header[2] else np.empty(0, dtype="<u2")
def checked(tokens: np.ndarray, vocab_size: int, path: Path) -> np.ndarray:
    """The tokens; UserError if one is outside of the vocabulary."""
    largest = tokens.max(initial=0)
    require(largest < vocab_size, f"{path}: token {largest} is outside of VOCAB_SIZE={vocab_size}")
    return tokens
def find_shards(folder: Path, split: str) -> list[Path]:
    """The files of a split in order of name, not opened; UserError where there are none."""
    files = sorted(folder.glob(f"*_{split}_*.bin"))
    require(files, f"{folder}: no {split} shards (*_{split}_*.bin)")
    return files
class TrainingRows:
    """Rows of `length + 1` tokens in an order that SEED draws, each epoch anew and cut at another offset."""
    def __init__(self, files: list[Path], length: int, seed: int, vocab_size: int):
        self.files, self.length, self.seed, self.vocab_size = files, length, seed, vocab_size
        self.shards = [open_shard(path) for path in files]
        self.ends = np.cumsum([max(0, (len(shard) - length) // length) for shard in self.shards])
        self.rows, self.epoch = int(self.ends[-1]), -1
        require(self.rows, f"{files[0].parent}: the training split is empty or below two rows of {length}")
    def row(self, position: int) -> np.ndarray:
        """The row at a position of the endless training order, int64 (length + 1,)."""
        epoch, index = divmod(position, self.rows)
        if epoch != self.epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self.epoch, self.offset = epoch, int(generator.integers(self.length))
            self.order = generator.permutation(self.rows)
        shard = int(np.searchsorted(self.ends, row := int(self.order[index]), side="right"))
        start = self.offset + (row - int(self.ends[shard - 1] if shard else 0)) * self.length
        tokens = self.shards[shard][start:start + self.length + 1].astype(np.int64)
        return checked(tokens, self.vocab_size, self.files[shard])
class BatchPlan:
    """How the rows of a step, the same for every world size, fall on ranks and micro-batches.
    Each rank makes `micro_steps` passes of `rows` rows; rows with ignored targets fill the last."""
    def __init__(self, s: Settings, runtime: Runtime):
        self.rank, self.step_rows = runtime.rank, s.train_batch_tokens // s.train_seq_len
        self.rank_rows = -(-self.step_rows // runtime.world_size)
        fits = 0.015 * runtime.memory_bytes() / (runtime.dtype.itemsize * s.num_layers * s.model_dim)  # about
        self.micro_steps = -(-self.rank_rows // max(1, int(s.micro_batch_tokens or fits) // s.train_seq_len))
        self.rows = -(-self.rank_rows // self.micro_steps)
    def batch(self, data: TrainingRows, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one forward pass, int64 (rows, length) each."""
        tokens = np.zeros((self.rows, data.length + 1), dtype=np.int64)
        real = range(micro_step * self.rows, min((micro_step + 1) * self.rows, self.rank_rows,
                                                 self.step_rows - self.rank * self.rank_rows))
        for place, row in enumerate(real):
            tokens[place] = data.row(step * self.step_rows + self.rank * self.rank_rows + row)
        targets = tokens[:, 1:].copy()
        targets[len(real):] = IGNORED
        return torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])), torch.from_numpy(targets)
def load_validation(files: list[Path], vocab_size: int) -> np.ndarray:  # the whole split, uint16 (tokens,)
    tokens = np.concatenate([checked(open_shard(path), vocab_size, path) for path in files])
    require(len(tokens) > 1, f"{files[0].parent}: the validation split is empty")
    return tokens
def find_data(settings: Settings, runtime: Runtime, log: Log) -> tuple[Path, Path]:
    """The folder of shards and the tokenizer; builds the demo corpus if none is named and FineWeb absent."""
    folder = Path(settings.data_path or FINEWEB)
    require(folder.is_dir() or not settings.data_path, f"DATA_PATH={folder} is not a folder")
    if not folder.is_dir():
        builders = [root / "data/demo_corpus.py" for root in (Path(), Path(__file__).resolve().parent)]
        builder = next(filter(Path.is_file, builders), None)
        require(builder, f"no data: set DATA_PATH; neither {FINEWEB} nor data/demo_corpus.py exists")
        folder = builder.parent / "demo"
        log(f"data: DATA_PATH is not set and {FINEWEB} is absent: using the demo corpus, {folder}")
        command = [sys.executable, str(builder), "--output", str(folder)]
        require(runtime.local_rank or not subprocess.run(command).returncode, f"{builder} failed, see above")
        if runtime.world_size > 1: dist.barrier(group=runtime.control)
    beside = folder / "tokenizer.model"
    tokenizer = Path(settings.tokenizer_path or (beside if beside.is_file() else FINEWEB_TOKENIZER))
    require(tokenizer.is_file(), f"TOKENIZER_PATH={tokenizer} is not a file")
    return folder, tokenizer

# ---- Score: bytes of text behind the tokens ----------------------------------------------------------------
def load_tokenizer(path: Path, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model; UserError if it is none, has another size, or cannot be counted exactly."""
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        raise UserError(f"{path}: not a SentencePiece model ({' '.join(str(error).split())})") from None
    require(len(tokenizer) == vocab_size, f"{path}: {len(tokenizer)} pieces, but VOCAB_SIZE={vocab_size}")
    spaced = tokenizer.piece_to_id("▁") != tokenizer.unk_id()
    require(spaced, f"{path}: no piece ▁ of its own: a space would count as three bytes (#897)")
    return tokenizer
class ByteTable:
    """Bytes of text behind each token, as many as decoding gives: of a piece in UTF-8, with ▁ as one space;
    one of a byte piece. Where decoding drops a space before a document, a ▁ that begins it counts none."""
    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        ids = range(tokenizer.vocab_size())
        pieces = [tokenizer.id_to_piece(i) for i in ids]
        silent = [tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i) for i in ids]
        self.bytes = np.array([0 if silent[i] else 1 if tokenizer.is_byte(i) else
                               len(pieces[i].replace("▁", " ").encode()) for i in ids], dtype=np.int64)
        strips = tokenizer.decode([tokenizer.piece_to_id("▁")]) == ""
        self.stripped = np.array([strips and piece.startswith("▁") for piece in pieces])
        self.begins = np.array([tokenizer.is_control(i) for i in ids])
    def count(self, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Bytes of each target, int64, in the arguments' shape."""
        return self.bytes[targets] - (self.stripped[targets] & self.begins[previous])

# ---- Layers ------------------------------------------------------------------------------------------------
def attend_flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func
    out = flash_attn_func(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out  # versions differ in whether the row sums come with it
def attend_flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func
    return flash_attn_func(q, k, v, causal=True)
def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.dtype == torch.float32:  # CUDA's kernel that saves memory in float32 takes no grouped queries
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
def attend_blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain products, for CPUs: each block of queries with just the keys up to its end; a compiler fuses the
    rest. Queries that share a key head become rows; weights are normalized after their product."""
    shape = batch, length, heads, dim = q.shape
    shared, block = heads // k.size(2), max(128, -(-length // 8))
    q = (q * dim ** -0.5).view(batch, length, -1, shared, dim).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    k, v = (x.transpose(1, 2).reshape(-1, length, dim) for x in (k, v))
    places = torch.arange(length, dtype=torch.int32, device=q.device)
    future = torch.where(places <= places[:, None], 0.0, -math.inf)[:, None]
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = torch.bmm(q[:, start * shared:end * shared], k[:, :end].transpose(1, 2))
        scores = scores.view(len(q), -1, shared, end).float() + future[start:end, :, :end]
        weights = (scores - scores.detach().amax(-1, keepdim=True)).exp().to(v.dtype).view(len(q), -1, end)
        out = torch.bmm(weights, v[:, :end]).float() / weights.float().sum(-1, keepdim=True)
        outputs.append(out.to(v.dtype))
    return torch.cat(outputs, 1).view(batch, -1, length, shared, dim).transpose(1, 2).reshape(shape)
# Causal attention: q (batch, length, heads, dim), k and v (batch, length, kv_heads, dim) -> like q.
ATTENTION = dict(flash3=attend_flash3, flash2=attend_flash2, sdpa=attend_sdpa, blocked=attend_blocked)
def norm(x: Tensor) -> Tensor:  # RMSNorm without weights over the last dimension, in x's dtype
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)
def linear(x: Tensor, weight: Tensor) -> Tensor:  # x @ weight.T in x's dtype; weights are kept in float32
    return F.linear(x, weight.to(x.dtype))
def orthogonal(rows: int, columns: int, gain: float = 1.0) -> nn.Parameter:
    """A matrix with orthonormal rows or columns, whichever are fewer, times gain."""
    return nn.Parameter(nn.init.orthogonal_(torch.empty(rows, columns), gain=gain))
def vector(*shape: int, value: float) -> nn.Parameter:  # a parameter that starts as a constant
    return nn.Parameter(torch.full(shape, value))
class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021) on the first `dims` of each head; the rest knows no position (#315).
    Beyond the training length the base is rescaled (NTK-aware): far positions turn like known ones."""
    def __init__(self, dims: int, base: float, train_length: int, longest: int):
        super().__init__()
        self.dims, self.train_length = dims, train_length
        for name, length in (("near", train_length), ("far", max(longest, train_length))):
            rescaled = base * (length / train_length) ** (dims / max(dims - 2, 1))
            frequencies = rescaled ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
            angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)[:, None, :]
            self.register_buffer(name, torch.stack((angles.cos(), angles.sin())), persistent=False)
    def forward(self, x: Tensor) -> Tensor:  # x (batch, length, heads, dim) -> x, rotated
        length, half = x.size(1), self.dims // 2
        cos, sin = (self.near if length <= self.train_length else self.far)[:, :length].to(x.dtype)
        first, second, still = x.split((half, half, x.size(-1) - self.dims), dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos, still), dim=-1)
class Attention(nn.Module):
    """Causal grouped-query attention with normalized queries and keys and a learned gain per query head."""
    ROLES = dict(query="attention", key="attention", value="attention", out="attention", gain="vector")
    def __init__(self, s: Settings, attend):
        super().__init__()
        self.attend, self.head_dim = attend, s.model_dim // s.num_heads
        self.query = orthogonal(s.model_dim, s.model_dim)
        self.key, self.value = (orthogonal(s.num_kv_heads * self.head_dim, s.model_dim) for _ in range(2))
        self.out = orthogonal(s.model_dim, s.model_dim, gain=(2 * s.num_layers) ** -0.5)
        self.gain = vector(s.num_heads, value=s.qk_gain_init)
    def forward(self, x: Tensor, rotary: Rotary, scale: Tensor) -> Tensor:
        heads = linear(x, torch.cat((self.query, self.key, self.value))).unflatten(-1, (-1, self.head_dim))
        queries, keys = len(self.gain), len(self.key) // self.head_dim
        both, v = heads.split((queries + keys, keys), dim=-2)
        gain = torch.cat((self.gain, self.gain.new_ones(keys))).expand(both.shape[:-1])  # a small gradient
        q, k = rotary(norm(both) * gain[..., None]).to(x.dtype).split((queries, keys), dim=-2)
        return linear(self.attend(q, k, v).flatten(2), scale[:, None] * self.out)
class SquaredReLU(torch.autograd.Function):
    """relu(x) ** 2 (So et al. 2021). The way back needs the result, which the next product keeps, not x."""
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(result := x.relu().square())
        return result
    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0].sqrt()
class MLP(nn.Module):
    """Two matrices around a squared ReLU (So et al. 2021)."""
    ROLES = dict(up="mlp", down="mlp")
    def __init__(self, s: Settings):
        super().__init__()
        hidden = int(s.mlp_mult * s.model_dim)
        self.up = orthogonal(hidden, s.model_dim)
        self.down = orthogonal(s.model_dim, hidden, gain=(2 * s.num_layers) ** -0.5)
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return linear(SquaredReLU.apply(linear(x, self.up)), scale[:, None] * self.down)
class Block(nn.Module):
    """Mix stream and embedding; then attention and MLP, each normed before and scaled per channel after."""
    ROLES = dict(mix="vector", attention_scale="vector", mlp_scale="vector")
    def __init__(self, s: Settings, layer: int, attend):
        super().__init__()
        self.attention, self.mlp = Attention(s, attend), MLP(s)
        self.mix = nn.Parameter(torch.stack([torch.ones(s.model_dim), torch.zeros(s.model_dim)]))
        self.attention_scale, self.mlp_scale = vector(s.model_dim, value=1.0), vector(s.model_dim, value=1.0)
        scale = (layer + 1) ** -0.5 if s.ln_scale else 1.0  # a tensor: all blocks share their compiled code
        self.register_buffer("norm_scale", torch.tensor(scale), persistent=False)
    def forward(self, x: Tensor, embedding: Tensor, rotary: Rotary) -> Tensor:
        """x and embedding (batch, length, dim) -> x after the block."""
        x = self.mix[0].to(x.dtype) * x + self.mix[1].to(x.dtype) * embedding
        x = x + self.attention(norm(x) * self.norm_scale, rotary, self.attention_scale)
        return x + self.mlp(norm(x) * self.norm_scale, self.mlp_scale)  # to scale weights costs least
class SmearGate(nn.Module):
    """Blend each embedding with the one before it, through a learned gate for each channel (#162).
    Shut at BOS, so that no document sees the one before it (#1851), and at a row's first token."""
    ROLES = dict(gate="vector")
    def __init__(self, dim: int):
        super().__init__()
        self.gate = vector(dim, value=0.0)  # half open
    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (batch, length, dim) and its tokens (batch, length) -> x, blended."""
        before = torch.cat((x[:, :1], x[:, :-1]), dim=1)
        return x + torch.sigmoid(self.gate).to(x.dtype) * (tokens != BOS)[..., None] * (before - x)
class BigramHash(nn.Module):
    """A small embedding of the hashed (previous, current) pair, projected to the width, at first 0 (#162)."""
    ROLES = dict(table="bigram_table", projection="bigram_projection", scale="vector")
    def __init__(self, s: Settings):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(s.bigram_vocab_size, s.bigram_dim))  # unused rows pack well
        self.projection = orthogonal(s.model_dim, s.bigram_dim)
        self.scale = vector(value=0.05)
    def bucket(self, tokens: Tensor) -> Tensor:  # the table's row for each, int64; token 0 stands before all
        mixed = F.pad(tokens[:, :-1], (1, 0)) * 0x9E3779B1 + tokens * 0x85EBCA77
        return ((mixed ^ (mixed >> 17)) & 0x7FFFFFFF) % self.table.size(0)
    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """What to add to the embeddings, (batch, length, model_dim)."""
        rows = F.embedding(self.bucket(tokens), self.table).to(dtype)
        return linear(rows, self.projection) * self.scale.to(dtype)
def softcapped_logits(states: Tensor, output: Tensor, softcap: float) -> Tensor:
    """Score of every piece, float32 (..., vocabulary), squeezed into (-softcap, softcap) (Gemma 2, 2024)."""
    return softcap * torch.tanh(linear(states, output).float() / softcap)
def softcapped_losses(states: Tensor, output: Tensor, softcap: float, targets: Tensor) -> Tensor:
    """Nats for each target, float32, in targets' shape; 0 where it is IGNORED."""
    logits = softcapped_logits(states, output, softcap).flatten(0, -2)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape)

# ---- GPT ---------------------------------------------------------------------------------------------------
class GPT(nn.Module):
    """A U-Net of blocks: the first half pushes its outputs, the second pops them in reverse. Memory tokens
    (#352) stand before each row, predict nothing, and in training take its first tokens' places."""
    ROLES = dict(embedding="embedding", head="head", memory="memory", skip_scales="vector", backout="vector",
                 mtp_heads="mtp_head")
    def __init__(self, s: Settings, runtime: Runtime):
        super().__init__()
        self.dtype, self.softcap, self.mtp_weight = runtime.dtype, s.logit_softcap, s.mtp_loss_weight
        self.run_block = runtime.compile(Block.forward, "blocks")
        self.losses = runtime.compile(softcapped_losses, "blocks")
        self.embedding = nn.Parameter(torch.randn(s.vocab_size, s.model_dim) *
                                      (s.tied_embed_init_std if s.tie_embeddings else 1.0))
        self.head = None if s.tie_embeddings else nn.Parameter(torch.zeros(s.vocab_size, s.model_dim))
        rope_dims, self.pushing = s.rope_dims or s.model_dim // s.num_heads, s.num_layers // 2
        self.rotary = Rotary(rope_dims, s.rope_base, s.train_seq_len, s.eval_seq_len)
        self.blocks = nn.ModuleList(Block(s, i, ATTENTION[runtime.attention]) for i in range(s.num_layers))
        self.skip_scales = vector(self.pushing, s.model_dim, value=1.0) if self.pushing else None
        self.bigram = BigramHash(s) if s.bigram_vocab_size else None
        self.smear = SmearGate(s.model_dim) if s.smear_enabled else None
        self.memory_tokens, k, ahead = s.memory_tokens, s.memory_tokens, s.mtp_num_heads
        self.memory = nn.Parameter(0.02 * torch.randn(k, s.model_dim)) if k else None
        self.backout_layer = s.num_layers // 2 if s.backout_layer < 0 else s.backout_layer
        self.backout = vector(value=s.backout_lambda_init) if s.backout_enabled else None
        self.mtp_heads = nn.Parameter(torch.zeros(ahead, s.vocab_size, s.model_dim)) if ahead else None
    def roles(self) -> dict[str, str]:  # the role of every parameter, by its name: a key of the table ROLES
        return {f"{prefix}.{name}".lstrip("."): module.ROLES[name] for prefix, module in self.named_modules()
                for name, _ in module.named_parameters(recurse=False)}
    def embed(self, tokens: Tensor) -> Tensor:
        """Memory tokens, then the tokens': int64 (batch, length) -> (batch, memory + length, dim)."""
        x = F.embedding(tokens, self.embedding).to(self.dtype)
        if self.bigram is not None: x = x + self.bigram(tokens, self.dtype)
        x = norm(x)
        if self.smear is not None: x = self.smear(x, tokens)
        if self.memory is not None:
            x = torch.cat((norm(self.memory.to(self.dtype)).expand(len(tokens), -1, -1), x), dim=1)
        return x
    def hidden(self, tokens: Tensor) -> Tensor:
        """Final states, normed: int64 (batch, length) -> (batch, length, dim)."""
        embedding = self.embed(tokens)
        x = embedding.view_as(embedding)  # another name, or the first block would be compiled by itself
        pushed = []
        for layer, block in enumerate(self.blocks):
            if layer >= self.pushing and pushed:
                x = x + self.skip_scales[layer - self.pushing].to(x.dtype) * pushed.pop()
            x = self.run_block(block, x, embedding, self.rotary)
            if layer < self.pushing: pushed.append(x)
            if layer == self.backout_layer: middle = x
        if self.backout is not None: x = x - self.backout.to(x.dtype) * middle  # #339
        return norm(x[:, self.memory_tokens:])
    output = property(lambda self: self.embedding if self.head is None else self.head)  # (vocabulary, dim)
    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next piece, float32 (batch, length, vocabulary), for int64 (batch, length)."""
        return softcapped_logits(self.hidden(tokens), self.output, self.softcap)
    def token_losses(self, tokens: Tensor, targets: Tensor, places: Tensor | None = None) -> Tensor:
        """Nats, float32 like targets: after each token, int64 (batch, length), or at `places`, (batch, n)."""
        hidden = self.hidden(tokens)
        hidden = hidden if places is None else torch.take_along_dim(hidden, places[..., None], dim=1)
        return self.losses(hidden, self.output, self.softcap, targets)
    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Training loss of rows, int64 (rows, train_seq_len) each, summed over the targets that count.
        Returns what to minimise and, without gradient, its part that predicts the next token."""
        tokens, targets = tokens[:, self.memory_tokens:], targets[:, self.memory_tokens:]
        hidden = self.hidden(tokens)
        loss = objective = self.losses(hidden, self.output, self.softcap, targets).sum()
        for i, head in enumerate(() if self.mtp_heads is None else self.mtp_heads, 1):
            ahead = F.pad(targets[:, i:], (0, i), value=IGNORED)  # one shape, one graph for all heads
            weight = self.mtp_weight / len(self.mtp_heads)
            objective = objective + weight * self.losses(hidden, head, self.softcap, ahead).sum()
        return objective, loss.detach()

# ---- Optimizers --------------------------------------------------------------------------------------------
# How parameters of a kind are trained and stored (None: not exported); `lr` and `decay` name settings.
Role = collections.namedtuple("Role", "optimizer lr decay stored")
ROLES = {
    "attention": Role("muon", "matrix_lr", "muon_wd", "int6"),
    "mlp": Role("muon", "matrix_lr", "muon_wd", "mlp"),
    "bigram_projection": Role("muon", "matrix_lr", "muon_wd", "int6"),
    "bigram_table": Role("adamw", "tied_embed_lr", "adam_wd", "int6"),
    "embedding": Role("adamw", "embed_lr", "adam_wd", "fit"),  # tied_embed_lr where it is tied
    "head": Role("adamw", "head_lr", "adam_wd", "fit"),
    "memory": Role("adamw", "tied_embed_lr", None, "fit"),
    "vector": Role("adamw", "scalar_lr", "adam_wd", "fp16"),
    "mtp_head": Role("adamw", "head_lr", "adam_wd", None)}
def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Nearly orthogonal matrices: wide (n, rows, columns) -> same, in dtype (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
def wide(matrix: Tensor) -> Tensor:  # the matrix, transposed if it has more rows than columns
    return matrix.T if matrix.size(0) > matrix.size(1) else matrix
class Muon:
    """Nesterov momentum, orthogonalised, with decoupled decay (Jordan et al. 2024), on all matrices of a
    shape together, tall ones transposed. A rank has the momentum of its share and gathers all updates."""
    def __init__(self, parameters: list[nn.Parameter], settings: Settings, runtime: Runtime):
        self.settings, self.runtime, self.groups = settings, runtime, []
        shapes = collections.defaultdict(list)
        for parameter in parameters: shapes[min(parameter.shape), max(parameter.shape)].append(parameter)
        for shape, members in shapes.items():
            share = -(-len(members) // runtime.world_size)
            mine = members[runtime.rank * share:(runtime.rank + 1) * share]
            factors = [max(1.0, parameter.size(0) / parameter.size(1)) ** 0.5 for parameter in members]
            self.groups.append((members, mine, torch.zeros(share, *shape, device=runtime.device),
                                torch.tensor(factors, device=runtime.device)[:, None, None]))
    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        """One update of every matrix. What ranks gather of one shape travels while they work on the next."""
        s, dtype, under_way = self.settings, self.runtime.dtype, []
        for members, mine, velocity, _ in self.groups:
            updates = torch.zeros_like(velocity, dtype=dtype)
            if mine:
                gradients = torch.stack([wide(parameter.grad) for parameter in mine])
                velocity[:len(mine)].lerp_(gradients, 1 - momentum)
                gradients.lerp_(velocity[:len(mine)], momentum)
                updates[:len(mine)] = newton_schulz(gradients, s.muon_backend_steps, dtype)
            under_way.append(self.runtime.gather(updates))
        for (members, _, _, factors), (updates, wait) in zip(self.groups, under_way):
            wait()
            torch._foreach_mul_(members, 1 - lr * s.muon_wd)
            torch._foreach_sub_([wide(parameter) for parameter in members],
                                list(updates[:len(members)] * (lr * factors)))
    def momenta(self) -> list[Tensor]:
        """The momentum of all matrices of each shape, (members, rows, columns), on every rank."""
        under_way = [self.runtime.gather(velocity) for _, _, velocity, _ in self.groups]
        for _, wait in under_way: wait()
        return [whole[:len(members)].clone() for (members, *_), (whole, _) in zip(self.groups, under_way)]
    def load(self, momenta: list[Tensor]) -> None:
        for (_, mine, velocity, _), whole in zip(self.groups, momenta):
            velocity[:len(mine)] = whole[self.runtime.rank * len(velocity):][:len(mine)]
def flat_gradients(parameters: list[nn.Parameter]) -> Tensor:
    """One float32 buffer that all gradients are views of: zeroed, summed over ranks and clipped at once."""
    sizes = [-(-parameter.numel() // 64) * 64 for parameter in parameters]  # each begins on a cache line
    buffer = torch.zeros(sum(sizes), device=parameters[0].device)
    for parameter, view in zip(parameters, buffer.split(sizes)):
        parameter.grad = view[:parameter.numel()].view_as(parameter)
    return buffer
class Optimizer:
    """Muon and AdamW on the parameters that the table ROLES gives them."""
    def __init__(self, model: GPT, settings: Settings, runtime: Runtime):
        s, members, matrices, groups = settings, collections.defaultdict(list), [], []
        for name, kind in model.roles().items(): members[kind].append(model.get_parameter(name))
        for kind, parameters in members.items():
            role = ROLES[kind]
            lr = "tied_embed_lr" if kind == "embedding" and s.tie_embeddings else role.lr
            group = dict(params=parameters, kind=kind, base_lr=getattr(s, lr),
                         weight_decay=getattr(s, role.decay) if role.decay else 0.0)
            if role.optimizer == "adamw": groups.append(group)
            else: matrices += parameters
        self.settings, self.gradients = settings, flat_gradients(list(model.parameters()))
        self.muon = Muon(matrices, settings, runtime)
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=(s.beta1, s.beta2), eps=s.adam_eps, fused=True)
    def step(self, step: int, scale: float) -> None:
        """Clip and apply the summed gradients of `step`, at `scale` times the learning rates; zero them."""
        s, gradients = self.settings, self.gradients
        if s.grad_clip_norm: gradients.mul_((s.grad_clip_norm / (gradients.norm() + 1e-6)).clamp(max=1.0))
        warm = min(1.0, step / s.muon_momentum_warmup_steps) if s.muon_momentum_warmup_steps else 1.0
        momentum = (1 - warm) * s.muon_momentum_warmup_start + warm * s.muon_momentum
        self.muon.step(s.matrix_lr * scale, momentum)
        for group in self.adamw.param_groups: group["lr"] = group["base_lr"] * scale
        self.adamw.step()
        gradients.zero_()
def progress_at(s: Settings, step: int, seconds: float, reserve: float = 0.0) -> float:
    """Share of the run that is over before `step`; 1 if less is left for it than the mean or `reserve`."""
    by_clock = 0.0
    if s.max_wallclock_seconds and step:
        fits = seconds + max(seconds / step, reserve) <= s.max_wallclock_seconds
        by_clock = seconds / s.max_wallclock_seconds if fits else 1.0
    return min(1.0, max(step / s.iterations, by_clock))
def scale_at(s: Settings, step: int, progress: float) -> float:
    """Learning-rate factor: 1, then linear to 0 over the warmdown, whether steps or clock end the run."""
    total = step / progress if progress else s.iterations
    warmdown = min(s.warmdown_iters, s.warmdown_fraction * total)
    return min(1.0, (total - step) / warmdown) if warmdown else 1.0
class WeightAverage:
    """Mean (SWA, Izmailov et al. 2018) or exponential average (EMA) of weights, in float32. The n-th sample
    moves it by 1/n, or (1-d)/(1-d^n): at first 1, so that initial weights are never part of it."""
    def __init__(self, s: Settings):
        self.name = "ema" if s.ema_enabled else "swa" if s.swa_enabled else "none"
        swa, decay = (s.swa_every, s.swa_start_scale, 1.0), s.ema_decay ** s.ema_every
        ema = (s.ema_every, s.ema_start_scale, decay)
        self.every, self.start_scale, self.decay = ema if s.ema_enabled else swa
        self.samples, self.weights = 0, []
    def after_step(self, step: int, scale: float, parameters: list[nn.Parameter]) -> None:
        """Take a sample if `step` steps are done and it is time for one."""
        if self.name == "none" or scale >= self.start_scale or step % self.every: return
        self.samples += 1
        self.weights = self.weights or [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        rate = 1 / self.samples if self.decay == 1.0 else (1 - self.decay) / (1 - self.decay ** self.samples)
        torch._foreach_lerp_(self.weights, [p.detach() for p in parameters], rate)
    def load_into(self, parameters: list[nn.Parameter]) -> str:
        """Replace the parameters by their average, if there is one; says what is exported."""
        if not self.samples:
            self.name = "last step"
            return "weights: the last step's (no average was taken)"
        torch._foreach_copy_([p.detach() for p in parameters], self.weights)
        return f"weights: {self.name} of {self.samples} samples"

# ---- Artifact: codes behind an entropy coder, float16, and all that a reader needs but the tokenizer -------
INT5, INT6, INT13 = 15, 31, 4095  # largest codes; symmetric, so that zero stays zero
ARTIFACT_NAME, OVER_CAP_NAME = "final_model.int6.ptz", "over_the_cap.int6.ptz"
ARTIFACT_MAGIC, ARTIFACT_FORMAT, MOST_BYTES = b"GOLF", 2, 1 << 28  # the last: what a reader unpacks at once
ARTIFACT_HEADER = struct.Struct("<4sBBQQ16s")  # magic, format, codec, sizes of part 1 and its frame, SHA-256
Grid = dict[str, tuple[Tensor, Tensor]]  # of a coded matrix: weight (i, j) has the step rows[i] * columns[j]
def stored_parameters(model: GPT, *kinds: str) -> dict[str, nn.Parameter]:
    """The parameters that an artifact holds, in its order, or those that ROLES stores as one of `kinds`."""
    return {name: model.get_parameter(name) for name, role in model.roles().items()
            if ROLES[role].stored in (kinds or ("mlp", "int6", "fit", "fp16"))}
def coded_parameters(model: GPT, quant: str) -> dict[str, nn.Parameter]:
    """The matrices that become codes; the rest stays float16."""
    return stored_parameters(model, "mlp", "int6", *["fit"] * (quant == "fit"))
def quantize(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The nearest codes, whole numbers in float32 (rows, columns)."""
    step = rows[:, None] * columns
    return torch.where(step > 0, weight / step, 0.0).round().clamp(-INT13, INT13)
def dequantize(codes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What the model computes with, float32 (rows, columns)."""
    return codes.float() * (rows[:, None] * columns)
def fake_quantize(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The weight as it will be read back; gradients pass straight through (Bengio et al. 2013)."""
    return weight + (dequantize(quantize(weight, rows, columns), rows, columns) - weight).detach()
def row_grid(model: GPT, s: Settings) -> Grid:
    """The entries' steps: each row's largest value over 31, or 15 in an int5 MLP; rounded up, not to clip."""
    narrow = stored_parameters(model, "mlp") if s.int5_mlp == "1" else ()
    return {name: ((w.detach().abs().amax(1) / (INT5 if name in narrow else INT6) + 2**-25).half().float(),
                   torch.ones_like(w[0])) for name, w in coded_parameters(model, s.quant).items()}
class Fit:
    """QUANT=fit: steps in inverse proportion to the root of what an error costs, so that each weight does the
    same harm, times one multiplier that the cap decides. An error E costs about the sum over rows of
    rows[i] * E[i] @ columns @ E[i], the Fisher information with rows and columns as if independent (Martens
    and Grosse 2015), sampled from the changes of the gradient between the last training steps, which have no
    mean: no pass, no data, and its time is training time. Columns are rounded in turn; later ones make up for
    errors of earlier ones (GPTQ, Frantar et al. 2022): 1 / factor[j, j]² of the cost of column j is left."""
    START_SCALE, DAMPING = 0.2, 0.05  # learning-rate scale of the first sample; what is added, over the mean
    def __init__(self, weights: dict[str, nn.Parameter]):
        self.parameters, self.before, self.samples, self.steps, self.factors = weights.values(), [], 0, {}, {}
        self.weights = {name: w.detach() for name, w in weights.items()}
        self.rows = [torch.zeros_like(w[:, 0]) for w in weights.values()]
        self.columns = [w.new_zeros(w.size(1), w.size(1)) for w in weights.values()]
    def observe(self) -> None:  # take a sample of the gradients, which all ranks share
        gradients = [w.grad for w in self.parameters]
        for i, change in enumerate(torch._foreach_sub(gradients, self.before) if self.before else ()):
            self.rows[i] += change.square().sum(1)
            self.columns[i].addmm_(change.T, change)
        self.samples += bool(self.before)
        self.before = [gradient.clone() for gradient in gradients]
    def finish(self) -> None:
        """Steps and factors from the samples; without any, equal steps and no feedback."""
        for (name, weight), rows, columns in zip(self.weights.items(), self.rows, self.columns):
            if not rows.sum() > 0:
                rows, columns = torch.ones_like(rows), torch.eye(len(columns), device=columns.device)
            rows = (rows + self.DAMPING * rows.mean()) / columns.size(1)
            columns = (columns / columns.diagonal().mean()).double()
            columns.diagonal().add_(self.DAMPING)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(columns))
            self.factors[name] = torch.linalg.cholesky(inverse, upper=True).float()
            columns = half_octaves(self.factors[name].diagonal())
            finest = half_octaves((weight.abs() / columns).amax(1) / (0.7 * INT13)).clamp(min=2.0 ** -20)
            self.steps[name] = half_octaves(rows.rsqrt()), columns, finest
    def octaves(self, size: float) -> float:
        """About the multiplier's logarithm at which all codes take `size` bytes, but no more than seven bits
        each, after which nothing is gained. A weight of one step takes three bits."""
        logs = torch.cat([(weight / (rows[:, None] * columns)).abs().log2().flatten()
                          for weight, (rows, columns, _) in zip(self.weights.values(), self.steps.values())])
        return float(logs.nan_to_num(0.0, 0.0, -20.0).mean()) + 3 - min(7.0, 8 * size / len(logs))
    def grid(self, octaves: float) -> Grid:
        """The steps as float16 holds them; none so fine that a code would exceed INT13."""
        return {name: (torch.maximum((rows * 2.0 ** octaves).clamp(max=6e4), finest).half().float(), columns)
                for name, (rows, columns, finest) in self.steps.items()}
    def codes(self, grid: Grid) -> dict[str, Tensor]:
        return {name: round_with_feedback(weight, *grid[name], self.factors[name])
                for name, weight in self.weights.items()}
def half_octaves(x: Tensor) -> Tensor:  # the nearest powers of √2: few values, so they pack well
    return torch.exp2((2 * x.log2()).round() / 2)
def round_with_feedback(weight: Tensor, rows: Tensor, columns: Tensor, factor: Tensor) -> Tensor:
    """Codes (rows, columns), one column after the other; `factor` (columns, columns) is the upper Cholesky
    factor of the inverse of the columns' costs. Corrections reach columns 64 and more ahead at once."""
    weight = weight.T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty_like(weight)
    for start in range(0, len(weight), 64):
        end = min(start + 64, len(weight))
        errors = torch.empty_like(weight[start:end])
        for j in range(start, end):
            codes[j] = quantize(weight[j, :, None], rows, columns[j])[:, 0]
            errors[j - start] = (weight[j] - codes[j] * (rows * columns[j])) / factor[j, j]
            weight[j + 1:end] -= torch.outer(factor[j, j + 1:end], errors[j - start])
        weight[end:] -= factor[start:end, end:].T @ errors
    return codes.T
LANES, SHARE_BITS, CONTEXTS, ALPHABET = 256, 15, 48, 2 * INT13 + 2  # of the rANS coder
MASK, SHIFT, WORD, LOWEST = (np.uint64(x) for x in ((1 << SHARE_BITS) - 1, SHARE_BITS, 32, 1 << 31))
def levels_of(codes: np.ndarray) -> np.ndarray:
    """Half octaves of the mean size of a matrix's columns, and of its rows' over the matrix's, int8."""
    size = np.abs(codes).astype(np.float32) + 1e-3
    return np.rint(2 * np.log2(np.append(size.mean(1) / size.mean(), size.mean(0)))).astype(np.int8)
def contexts_of(levels: list[np.ndarray], shapes: list[tuple[int, int]]) -> np.ndarray:
    """The table that each code is coded with, uint8: by the size that its row and column let expect."""
    sums = (level[:m, None].astype(np.int16) + level[m:] for level, (m, n) in zip(levels, shapes))
    return np.concatenate([(x + 16).clip(0, CONTEXTS - 1).astype(np.uint8).ravel() for x in sums])
def encode_rans(matrices: list[np.ndarray], compress) -> bytes:
    """Codes near their entropy: an asymmetric numeral system (Duda 2013) on LANES states in turn, each code
    with the shares of 2 ** SHARE_BITS that codes have in its context."""
    levels = [levels_of(codes) for codes in matrices]
    contexts = contexts_of(levels, [codes.shape for codes in matrices])
    symbols = np.concatenate([codes.ravel() for codes in matrices]) + np.int16(INT13)
    counts = np.bincount(contexts.astype(np.int32) * ALPHABET + symbols, minlength=CONTEXTS * ALPHABET)
    counts = counts.reshape(CONTEXTS, ALPHABET)
    total, whole = counts.sum(1, keepdims=True).clip(min=1), 1 << SHARE_BITS
    rare = (counts > 0) & (counts * whole < 2 * total)  # these may need a share that is rounded up to one
    shares = np.maximum(counts * (whole - rare.sum(1, keepdims=True)) // total, counts > 0)
    shares[np.arange(CONTEXTS), shares.argmax(1)] += counts.any(1) * whole - shares.sum(1)
    ends, states, words = np.cumsum(shares, 1), np.full(LANES, LOWEST), []
    for start in reversed(range(0, len(symbols), LANES)):
        pick = contexts[start:start + LANES], symbols[start:start + LANES]
        share, end = shares[pick].astype(np.uint64), ends[pick].astype(np.uint64)
        state = states[:len(share)]
        full = state >> (np.uint64(63) - SHIFT) >= share
        words.append(state[full].astype("<u4"))
        state[full] >>= WORD
        turns, rest = np.divmod(state, share)
        state[:] = (turns << SHIFT) + rest + end - share
    side = compress(b"".join([*levels, shares.astype("<u2")]))
    return b"".join([struct.pack("<I", len(side)), side, states.astype("<u8"), *words[::-1]])
def decode_rans(data: memoryview, shapes: list[tuple[int, int]]) -> np.ndarray:
    """What encode_rans was given, int16, flat; ValueError for what it cannot have made."""
    at, sizes = 4 + struct.unpack_from("<I", data)[0], [m + n for m, n in shapes]
    side = unzstd(data[4:at], sum(sizes) + 2 * CONTEXTS * ALPHABET)
    levels = np.split(np.frombuffer(side, dtype=np.int8)[:sum(sizes)], np.cumsum(sizes)[:-1])
    shares = np.frombuffer(side[sum(sizes):], dtype="<u2").reshape(CONTEXTS, ALPHABET).astype(np.uint64)
    contexts, used = contexts_of(levels, shapes), shares.any(1)
    holds = (shares.sum(1)[used] == MASK + 1).all() and used[contexts].all()
    require(holds, "its tables of shares do not add up", ValueError)
    symbols, begins = np.zeros((CONTEXTS, 1 << SHARE_BITS), dtype=np.int16), np.cumsum(shares, 1) - shares
    for context in np.flatnonzero(used):
        symbols[context] = np.repeat(np.arange(ALPHABET), shares[context].astype(np.int64))
    states = np.frombuffer(data[at:at + 8 * LANES], dtype="<u8").astype(np.uint64)
    words, read = np.frombuffer(data[at + 8 * LANES:], dtype="<u4"), 0
    codes = np.empty(len(contexts), dtype=np.int16)
    for start in range(0, len(codes), LANES):
        context = contexts[start:start + LANES]
        state = states[:len(context)]
        slot = state & MASK
        symbol = codes[start:start + LANES] = symbols[context, slot]
        state[:] = shares[context, symbol] * (state >> SHIFT) + slot - begins[context, symbol]
        low = np.flatnonzero(state < LOWEST)
        state[low] = state[low] << WORD | words[read:read + len(low)]
        read += len(low)
    require(read == len(words) and (states == LOWEST).all(), "its codes end elsewhere", ValueError)
    return codes - np.int16(INT13)
def unzstd(data: memoryview, size: int) -> memoryview:
    """What a zstd frame holds, which must be `size` bytes; ValueError for any other."""
    holds = size <= MOST_BYTES and zstandard.get_frame_parameters(data).content_size == size
    require(holds, f"{size} bytes are not what it holds", ValueError)
    return memoryview(zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False))
def join_planes(planes: memoryview, dtype: str) -> np.ndarray:
    """Numbers of two bytes, of which all low ones come first, then all high ones."""
    return np.ascontiguousarray(np.frombuffer(planes, dtype=np.uint8).reshape(2, -1).T).view(dtype).ravel()
def split_planes(numbers: list[np.ndarray], dtype: str) -> bytes:
    """What join_planes is given: the high bytes are alike, and pack better by themselves."""
    together = np.concatenate([part.ravel() for part in numbers]).astype(dtype).view(np.uint8)
    return together[::2].tobytes() + together[1::2].tobytes()
# encode(codes, int16 (rows, columns) each, compress) -> bytes; decode(bytes, shapes) -> int16 (all codes,)
CODECS = dict(rans=(encode_rans, decode_rans), zstd=(
    lambda matrices, compress: compress(split_planes([codes + np.int16(128) for codes in matrices], "<i2")),
    lambda data, shapes: join_planes(unzstd(data, 2 * sum(m * n for m, n in shapes)), "<i2") - np.int16(128)))
def pack(model: GPT, codes: dict[str, Tensor], grid: Grid, manifest: dict, settings: Settings) -> bytes:
    """The artifact: header; compressed, the manifest and float16s (steps of coded matrices); the codes."""
    halves, compress = [], zstandard.ZstdCompressor(level=settings.zstd_level).compress
    for name, parameter in stored_parameters(model).items():
        numbers = torch.cat(grid[name]) if name in grid else parameter.detach()
        halves.append(numbers.half().cpu().numpy())
        require(np.isfinite(halves[-1]).all(), f"{name} is beyond float16: it has diverged; none was written")
    text = json.dumps({**manifest, "quant": settings.quant}, sort_keys=True).encode()
    first = struct.pack("<I", len(text)) + text + split_planes(halves, "<f2")
    matrices = [matrix.to(torch.int16).cpu().numpy() for matrix in codes.values()]
    packed, codec = compress(first), list(CODECS).index(settings.codec)
    body = packed + CODECS[settings.codec][0](matrices, compress)
    return ARTIFACT_HEADER.pack(ARTIFACT_MAGIC, ARTIFACT_FORMAT, codec, len(first), len(packed),
                                hashlib.sha256(body).digest()[:16]) + body
def pack_under_cap(model: GPT, settings: Settings, manifest: dict, budget: int, fit: Fit | None) -> bytes:
    """The artifact of QUANT=rows; with `fit` the largest of at most `budget` bytes, or the smallest. It tries
    multipliers until less than 0.04% of the budget is left, or weights have all bits that are of use."""
    if fit is None:
        grid = row_grid(model, settings)
        codes = {name: quantize(model.get_parameter(name).detach(), *steps) for name, steps in grid.items()}
        return pack(model, codes, grid, manifest, settings)
    budget, tried = max(budget, 1), {}
    finest, octaves = fit.octaves(math.inf), fit.octaves(budget)
    while octaves not in tried and len(tried) < 12:
        grid = fit.grid(octaves)
        tried[octaves] = pack(model, fit.codes(grid), grid, manifest, settings)
        excess = len(tried[octaves]) - 0.9998 * budget
        if abs(excess) <= 0.0002 * budget: break
        over, under = ([at for at in tried if (len(tried[at]) > budget) == large] for large in (True, False))
        if over and under:
            pair = max(over), min(under)
            octaves = float(np.interp(-0.9998 * budget, [-len(tried[at]) for at in pair], pair))
        else:  # a bit for each weight and octave, and less where many are zero
            octaves += 2 ** len(tried) * (fit.octaves(0.45 * budget) - fit.octaves(budget)) * excess / budget
            octaves = min(max(octaves, finest), finest + 30)
    sizes = {len(data): data for data in tried.values()}
    return sizes[max((size for size in sizes if size <= budget), default=min(sizes))]
def write_atomically(path: Path, *parts: bytes) -> None:  # all of the file or none of it
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
def read_artifact(data: bytes, name: str) -> tuple[dict, dict[str, Tensor]]:
    """Manifest and weights, float32 by name; UserError if an artifact is not whole, unchanged and of this
    format, or forged: memory and time are bounded by its size, and nothing in it is executed."""
    require(len(data) >= ARTIFACT_HEADER.size and data.startswith(ARTIFACT_MAGIC),
            f"{name}: not an artifact of this script")
    _, version, codec, size, packed, digest = ARTIFACT_HEADER.unpack_from(data)
    body = memoryview(data)[ARTIFACT_HEADER.size:]
    require(version == ARTIFACT_FORMAT and codec < len(CODECS),
            f"{name}: format {version} with codec {codec}, which this script does not read")
    require(hashlib.sha256(body).digest()[:16] == digest, f"{name}: damaged: its checksum does not match")
    try:
        first, codes = unzstd(body[:packed], size), body[packed:]
        end = 4 + struct.unpack_from("<I", first)[0]
        manifest = json.loads(bytes(first[4:end]))
        known = {field.name: field for field in fields_of("model", "evaluation")}
        settings = {key: parse_value(known[key], as_typed(x)) for key, x in manifest["settings"].items()}
        problems = combination_problems(Settings(**settings), trains=False)
        require(not problems, "; ".join(problems), ValueError)
        known = manifest["quant"] in ("fit", "rows") and isinstance(manifest["tokenizer"], str)
        require(known, "quant or tokenizer is of no known kind", TypeError)
        with torch.device("meta"): model = GPT(Settings(**settings), Runtime())  # shapes without memory
        parameters, coded = stored_parameters(model), coded_parameters(model, manifest["quant"])
        sizes = [sum(p.shape) if key in coded else p.numel() for key, p in parameters.items()]
        shapes = [tuple(p.shape) for p in coded.values()]
        numbers, weights = (len(first) - end) / 2, sum(map(math.prod, shapes))
        require(numbers == sum(sizes) and weights <= 64 * len(codes) + (1 << 20),
                "its numbers do not fit the model that its settings describe", ValueError)
        numbers = join_planes(first[end:], "<f2").astype(np.float32)
        require(np.isfinite(numbers).all(), "some of its numbers are not finite", ValueError)
        halves, decode = torch.from_numpy(numbers).split(sizes), list(CODECS.values())[codec][1]
        matrices = iter(torch.from_numpy(decode(codes, shapes).copy()).split([*map(math.prod, shapes)]))
        return {**manifest, "settings": settings}, {
            key: dequantize(next(matrices).view(p.shape), *half.split(tuple(p.shape))) if key in coded
            else half.view(p.shape) for (key, p), half in zip(parameters.items(), halves)}
    except (struct.error, zstandard.ZstdError, ArithmeticError, AttributeError, LookupError, RuntimeError,
            TypeError, ValueError) as error:
        raise UserError(f"{name}: damaged: {' '.join(str(error).split())}") from None

# ---- Evaluate ----------------------------------------------------------------------------------------------
Score = collections.namedtuple("Score", "val_loss val_bpb targets bytes seconds")  # nats, bits a byte
def plan_windows(targets: int, window: int, stride: int) -> np.ndarray:
    """Rows (start of a window, first of its places that is scored, how many are), int64 (rows, 3). Target i,
    the token i + 1, is predicted at token i. The first window scores all its targets, `stride` a row, each
    later one ends `stride` targets on, the last with the last target. Each target is scored once."""
    ends = np.append(np.arange(stride, window, stride), np.arange(window, targets + stride, stride))
    ends = np.unique(ends.clip(max=targets))
    begins, starts = np.append(0, ends[:-1]), np.maximum(ends - window, 0)
    return np.stack([starts, begins - starts, ends - begins], axis=1)
class Evaluator:
    """Scores models: `plain`, in windows of the training length that do not overlap, or `sliding`."""
    def __init__(self, settings: Settings, runtime: Runtime, table: ByteTable, log: Log):
        self.runtime, self.table, self.log = runtime, table, log
        s, length = settings, max(settings.train_seq_len, settings.eval_seq_len)
        scores = 12 * s.num_heads * length if runtime.attention == "blocked" else 0
        row_bytes = length * (32 * runtime.dtype.itemsize * s.model_dim + 12 * s.vocab_size + scores)  # about
        self.batch = min(s.eval_batch_seqs, max(1, int(0.3 * runtime.memory_bytes() / row_bytes)))
        self.token_losses = runtime.compile(GPT.token_losses, "graph")
        self.passes = dict(plain=(s.train_seq_len - s.memory_tokens,) * 2,
                           sliding=(s.eval_seq_len - s.memory_tokens, s.eval_stride))
    @torch.no_grad()
    def warm_up(self, model: GPT) -> None:
        """Compile the forward passes on synthetic tokens, outside of any clock."""
        for window, stride in self.passes.values():
            self.token_losses(model, *(torch.zeros(self.batch, n, device=self.runtime.device).long()
                                       for n in (window, stride, stride)))
    @torch.no_grad()
    def score(self, model: GPT, tokens: np.ndarray, name: str) -> Score:
        """Score all targets of uint16 (tokens,). Each rank takes a run of windows; all get the result."""
        started, targets, (window, stride) = time.perf_counter(), len(tokens) - 1, self.passes[name]
        plan = plan_windows(targets, window, stride)
        share = np.array_split(plan, self.runtime.world_size)[self.runtime.rank]
        tokens = np.pad(tokens, (0, window))
        totals = torch.zeros(3, dtype=torch.float64, device=self.runtime.device)  # nats, bytes, targets
        for at in range(0, len(share), self.batch):
            rows = share[np.arange(at, at + self.batch).clip(max=len(share) - 1)]  # filled up by repeats
            starts, firsts, counts = rows.T[:, :, None]
            counts[len(share) - at:] = 0
            places = np.minimum(firsts + np.arange(stride), window - 1)
            inputs, before, wanted = (tokens[starts + x].astype(np.int64)
                                      for x in (np.arange(window), places, places + 1))
            scored = np.arange(stride) < counts
            totals[1] += int((self.table.count(before, wanted) * scored).sum())
            totals[2] += int(scored.sum())
            inputs, wanted, places, scored = (torch.from_numpy(array).to(self.runtime.device)
                                              for array in (inputs, wanted, places, scored))
            totals[0] += (self.token_losses(model, inputs, wanted, places).double() * scored).sum()
            done = min(at + self.batch, len(share)) / len(share)
            if name == "sliding" and int(10 * done) > int(10 * at / len(share)):
                passed, bpb = time.perf_counter() - started, bits_per_byte(totals)
                self.log(f"sliding_window {100 * done:.0f}% bpb:{bpb:.4f} left:{passed / done - passed:.0f}s")
        totals = self.runtime.sum_over_ranks(totals)
        nats, size, count, seconds = *totals.tolist(), time.perf_counter() - started
        require(count == targets and math.isfinite(nats),
                f"evaluation failed: {count:.0f} of {targets} targets scored, loss {nats / count}")
        return Score(nats / count, bits_per_byte(totals), int(count), int(size), seconds)
def bits_per_byte(totals: Tensor) -> float:  # of float64 (nats, bytes, targets): bits over bytes
    return float(totals[0] / math.log(2) / totals[1])

# ---- Train -------------------------------------------------------------------------------------------------
def training_loss(model: GPT, coded: dict[str, Tensor], grid: Grid | None, tokens: Tensor,
                  targets: Tensor) -> tuple[Tensor, Tensor]:
    """GPT.forward; with a grid for the coded weights, on what will be read back of them (late QAT). Whether
    there is a grid is part of a graph's signature, so compilation cannot fold QAT away (#1032)."""
    if grid is None: return model(tokens, targets)
    weights = {name: fake_quantize(weight, *grid[name]) for name, weight in coded.items()}
    return torch.func.functional_call(model, weights, (tokens, targets))
class Clock:
    """Seconds of training, rank 0's, and whether a rank must stop, so that all decay and stop alike."""
    def __init__(self, runtime: Runtime):
        self.runtime, self.events, self.seconds, self.stopped = runtime, collections.deque(), 0.0, 0
        self.in_flight = 2 if runtime.device.type == "cuda" else 0  # steps that the host may be ahead
    def start(self) -> None:
        self.runtime.synchronize()
        self.started = time.perf_counter()
    def read(self) -> float:
        """The seconds so far. Holds a host back that is far ahead of its GPU, or it would time launches."""
        if self.runtime.device.type == "cuda":
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
            if len(self.events) > self.in_flight: self.events.popleft().synchronize()
        passed = 0.0 if self.runtime.rank else time.perf_counter() - self.started
        both = torch.tensor([passed, STOP.number], dtype=torch.float64)
        if self.runtime.world_size > 1: dist.all_reduce(both, dist.ReduceOp.MAX, group=self.runtime.control)
        self.stopped = int(both[1])
        STOP.number = STOP.number or self.stopped
        return self.seconds + float(both[0])
    def pause(self) -> float:  # stop counting; the seconds so far
        self.runtime.synchronize()
        self.seconds += self.runtime.from_main(time.perf_counter() - self.started)
        return self.seconds
class Trainer:
    """Everything that a training step touches."""
    def __init__(self, model: GPT, settings: Settings, runtime: Runtime, log: Log, data: TrainingRows,
                 code_bytes: int):
        self.model, self.settings, self.runtime, self.log, self.data = model, settings, runtime, log, data
        self.code_bytes, self.loss = code_bytes, runtime.compile(training_loss, "graph")
        self.plan, self.clock = BatchPlan(settings, runtime), Clock(runtime)
        self.average, self.optimizer = WeightAverage(settings), Optimizer(model, settings, runtime)
        self.stored = list(stored_parameters(model).values())
        self.coded, self.grid = coded_parameters(model, settings.quant), None
        self.fit = Fit(self.coded) if settings.quant == "fit" else None
        self.targets_per_step = self.plan.step_rows * (settings.train_seq_len - settings.memory_tokens)
        self.steps, self.qat_steps, self.epoch, self.resumed_at = 0, 0, 0, []
        self.train_loss, self.losses, self.reserve = math.nan, [], 0.0
    def parts(self) -> dict[str, tuple]:
        """What has a state that the next steps depend on, with its names; each is the same on every rank."""
        return dict(trainer=(self, "steps qat_steps epoch resumed_at train_loss reserve grid"),
                    clock=(self.clock, "seconds"), average=(self.average, "samples weights"),
                    fit=(self.fit, "before samples rows columns" * (self.fit is not None)))
    def state(self) -> dict:
        """What a checkpoint holds, for any number of ranks: a row of data depends on its position alone."""
        parts = {part: {name: getattr(owner, name) for name in names.split()}
                 for part, (owner, names) in self.parts().items()}
        weights = [p.detach().clone() for p in self.model.parameters()]
        return dict(parts, weights=weights, random=torch.get_rng_state(),
                    muon=self.optimizer.muon.momenta(), adamw=self.optimizer.adamw.state_dict())
    def load(self, state: dict) -> None:
        for part, (owner, names) in self.parts().items():
            for name in names.split(): setattr(owner, name, state[part][name])
        torch._foreach_copy_([p.detach() for p in self.model.parameters()], state["weights"])
        self.optimizer.muon.load(state["muon"])
        self.optimizer.adamw.load_state_dict(state["adamw"])
        torch.set_rng_state(state["random"].cpu())
    def forward_backward(self, tokens: Tensor, targets: Tensor, grid: Grid | None) -> Tensor:
        """Add a micro-batch to the gradients; its share of the step's mean loss, on the device."""
        if self.runtime.device.type == "cuda":
            device = self.runtime.device
            tokens, targets = (x.pin_memory().to(device, non_blocking=True) for x in (tokens, targets))
        objective, loss = self.loss(self.model, self.coded, grid, tokens, targets)
        (objective / self.targets_per_step).backward()
        return loss / self.targets_per_step
    def warm_up(self) -> None:
        """Run every training graph on synthetic tokens, then put all that it changed back."""
        s, state = self.settings, self.state()
        tokens = (torch.arange(self.plan.rows * s.train_seq_len) % s.vocab_size).view(self.plan.rows, -1)
        for grid in (None, row_grid(self.model, s)) if s.late_qat_threshold else (None,):
            for step in range(s.warmup_steps):
                self.forward_backward(tokens, tokens.clone(), grid)
                self.runtime.from_main(None)  # one may compile for longer than the others' GPUs would wait
                self.optimizer.step(step, 1.0)
        self.load(state)
    def step(self, scale: float) -> Tensor:
        """One optimizer step; this rank's share of its mean loss, on the device."""
        s = self.settings
        if self.grid is None and scale < s.late_qat_threshold:
            self.grid = row_grid(self.model, s)
            if self.fit is not None:  # by estimate, the steps that the artifact will have
                self.fit.finish()
                self.grid = self.fit.grid(self.fit.octaves(s.artifact_max_bytes - self.code_bytes))
            self.log(f"late_qat:on step:{self.steps} scale:{scale:.4f} quant:{s.quant}")
        self.qat_steps += self.grid is not None
        loss = sum(self.forward_backward(*self.plan.batch(self.data, self.steps, micro_step), self.grid)
                   for micro_step in range(self.plan.micro_steps))
        self.runtime.sum_over_ranks(self.optimizer.gradients)
        if self.fit is not None and scale < Fit.START_SCALE: self.fit.observe()
        self.optimizer.step(self.steps, scale)
        self.steps += 1
        self.average.after_step(self.steps, scale, self.stored)
        return loss
    def run(self, validate, save=None) -> None:
        """Train to the end of the schedule. Calls `validate(steps, seconds)` where VAL_LOSS_EVERY says so,
        `save(state)` where CHECKPOINT_EVERY does, at the end, and before a signal ends the run."""
        s, seconds, saved = self.settings, self.clock.seconds, self.clock.seconds
        STOP.hold(s.checkpoint_every > 0)
        self.clock.start()
        progress = progress_at(s, self.steps, seconds, self.reserve)
        while progress < 1.0 and not self.clock.stopped:
            self.losses.append(self.step(scale_at(s, self.steps, progress)))
            before, seconds = seconds, self.clock.read()
            self.reserve = min(seconds - before, 2 * seconds / self.steps) * (1 + self.clock.in_flight)
            progress = progress_at(s, self.steps, seconds, self.reserve)
            if self.steps == 1 or progress == 1.0 or s.train_log_every and not self.steps % s.train_log_every:
                self.report(seconds)
            if s.val_loss_every and self.steps % s.val_loss_every == 0:
                validate(self.steps, self.clock.pause())
                self.clock.start()
            due = progress == 1.0 or self.clock.stopped or seconds - saved >= s.checkpoint_every
            if s.checkpoint_every and due:
                self.check_losses()
                saved = self.clock.pause()
                self.clock.start()  # to write takes training time too
                save(self.state())
                progress = progress_at(s, self.steps, seconds := self.clock.read(), self.reserve)
                if progress == 1.0: self.clock.start()  # what was written last, was written after training
        self.clock.pause()
        STOP.hold(False)
    def check_losses(self) -> None:
        """UserError for the first loss that is no number. Waits for the device."""
        losses = self.runtime.sum_over_ranks(torch.stack(self.losses)).tolist() if self.losses else []
        self.losses = []
        for step, loss in enumerate(losses, self.steps - len(losses) + 1):
            require(math.isfinite(loss), f"train_loss is {loss} at step {step}; the last good one was "
                    f"{self.train_loss:.4f}: it has diverged; lower the learning rates or GRAD_CLIP_NORM")
            self.train_loss = loss
    def report(self, seconds: float) -> None:  # the field's line for a step, and a new epoch
        self.check_losses()
        self.log(f"step:{self.steps}/{self.settings.iterations} train_loss:{self.train_loss:.4f} "
                 f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / self.steps:.2f}ms")
        before, self.epoch = self.epoch, (self.steps * self.plan.step_rows - 1) // self.data.rows
        if self.epoch > before:
            self.log(f"data: epoch {self.epoch + 1}: the rows repeat, in a new order and cut at other places")

# ---- Main --------------------------------------------------------------------------------------------------
def build_model(settings: Settings, runtime: Runtime) -> GPT:
    """A model on the device with the initial weights that SEED gives."""
    torch.manual_seed(settings.seed)
    return GPT(settings, runtime).to(runtime.device)
def checkpoints_of(run_id: str, more: str = "") -> list[Path]:
    """Its checkpoints, newest first: 32 bytes of SHA-256, then a state of Trainer and the run's identity."""
    return sorted(Path("logs").glob(f"{glob.escape(run_id)}.step{'?' * 8}.checkpoint{more}"), reverse=True)
def find_checkpoint(run_id: str) -> tuple[str, bytes]:
    """The run that RESUME=1 means, and its newest checkpoint that is whole, or nothing if it has none."""
    if not run_id:
        newest = max(Path("logs").glob("*.step*.checkpoint"), key=os.path.getmtime, default=None)
        require(newest, "RESUME=1: there is no checkpoint in logs/; with RUN_ID a run would start")
        run_id = newest.name.rpartition(".step")[0]
    for path in checkpoints_of(run_id):
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() == data[:32]: return run_id, data[32:]
        print(f"warning: {path} is cut short or damaged; the one before it is used", file=sys.stderr)
    require(not checkpoints_of(run_id), f"RESUME=1: no checkpoint of {run_id} is whole; take a new RUN_ID")
    return run_id, b""
def read_checkpoint(data: bytes, device: torch.device) -> dict:  # plain values and tensors, no code
    return torch.load(io.BytesIO(data), map_location=device, weights_only=True) if data else {}
class Run:
    """One run of the script: data, log, the time of each stage, and the results so far."""
    def __init__(self, settings: Settings, runtime: Runtime, log: Log):
        self.settings, self.runtime, self.log = settings, runtime, log
        self.code_bytes, self.validation, self.opened = Path(__file__).stat().st_size, None, "never"
        versions = {m.__name__: m.__version__ for m in (torch, np, sentencepiece, zstandard)}
        self.results: dict = dict(
            run_id=log.run_id, seed=settings.seed, settings=dataclasses.asdict(settings), stages={},
            runtime=runtime.reasons, versions=dict(versions, python=sys.version.split()[0]),
            device=str(runtime.device), world_size=runtime.world_size, bytes_code=self.code_bytes)
        folder, path = self.stage("data", find_data, settings, runtime, log)
        self.tokenizer = load_tokenizer(path, settings.vocab_size)
        self.tokenizer_digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.train_files = [] if settings.artifact else find_shards(folder, "train")
        self.val_files = [] if settings.sample else find_shards(folder, "val")
        self.evaluator = Evaluator(settings, runtime, ByteTable(self.tokenizer), log)
        self.identity = dict(  # what a checkpoint shares with a run that goes on from it
            settings={f.name: getattr(settings, f.name) for f in fields_of() if f.metadata["group"] != "run"},
            script=hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), tokenizer=self.tokenizer_digest,
            data=[[path.name, path.stat().st_size] for path in self.train_files])
        log(f"data:{folder} tokenizer:{path} sha256:{self.tokenizer_digest[:16]}")
    def stage(self, name: str, function, *arguments):  # call a function when all hosts are here, and time it
        _, started = self.runtime.from_main(None), time.perf_counter()
        value = function(*arguments)
        self.runtime.synchronize()
        self.results["stages"][name] = time.perf_counter() - started
        self.log(f"stage:{name} {self.results['stages'][name]:.1f}s")
        return value
    def score(self, model: GPT, name: str) -> Score:
        """Score a model. The first call opens the validation shards: after packing, or for VAL_LOSS_EVERY."""
        if self.validation is None:
            self.validation = load_validation(self.val_files, self.settings.vocab_size)
            early = 0 < self.settings.val_loss_every <= self.results.get("steps", 1 << 62)  # or before RESUME
            self.opened = "during training" if early and not self.settings.artifact else "after packing"
            self.log(f"val_loader:shards:{len(self.val_files)} tokens:{len(self.validation)}")
        return self.evaluator.score(model, self.validation, name)
    def validate(self, model: GPT, steps: int, seconds: float) -> Score:
        """A plain pass during training or after it, in the field's line."""
        score, ms = self.score(model, "plain"), 1000 * seconds
        self.log(f"step:{steps}/{self.settings.iterations} val_loss:{score.val_loss:.4f} "
                 f"val_bpb:{score.val_bpb:.4f} train_time:{ms:.0f}ms step_avg:{ms / steps:.2f}ms")
        return score
    def save_checkpoint(self, state: dict) -> None:
        """Write what RESUME=1 goes on from, and keep the one before. A full disk does not end the run."""
        if self.runtime.rank: return
        name, file = f"{self.log.run_id}.step{state['trainer']['steps']:08}.checkpoint", io.BytesIO()
        torch.save({**state, **self.identity}, file)
        try:
            write_atomically(Path("logs", name), hashlib.sha256(file.getbuffer()).digest(), file.getbuffer())
            for old in checkpoints_of(self.log.run_id)[2:]: old.unlink()
            self.log(f"checkpoint:{name}")
        except OSError as error:
            self.log(f"warning: {name} was not written: {error.strerror}")
    def train(self, checkpoint: bytes) -> tuple[GPT, Fit | None]:
        """A model trained on the training split, with the weights to export, and how to fit steps to it."""
        s, runtime, log = self.settings, self.runtime, self.log
        data = self.stage("opening", TrainingRows, self.train_files, s.train_seq_len, s.seed, s.vocab_size)
        model = build_model(s, runtime)
        trainer = Trainer(model, s, runtime, log, data, self.code_bytes)
        parameters = sum(p.numel() for p in model.parameters())
        log(f"model_params:{parameters} seed:{s.seed} average:{trainer.average.name}")
        log(f"train_loader:shards:{len(data.files)} rows:{data.rows} step_rows:{trainer.plan.step_rows} "
            f"micro_batch:{trainer.plan.rows}x{s.train_seq_len} grad_accum_steps:{trainer.plan.micro_steps}")
        if s.checkpoint_every and not runtime.rank: claim_disk(72 * parameters)  # of the three largest, about
        self.stage("warmup_training", trainer.warm_up)
        self.stage("warmup_evaluation", self.evaluator.warm_up, model)
        trainer.clock.seconds = runtime.from_main(self.results["stages"]["opening"])  # reads training data
        state = read_checkpoint(checkpoint, runtime.device)
        changed = [name for name, value in self.identity.items() if state and state[name] != value]
        require(not changed, f"RESUME=1: not the {', '.join(changed)} with which the checkpoint was made")
        if state:
            trainer.load(state)
            trainer.resumed_at.append(trainer.steps)
            log(f"resumed at step:{trainer.steps} train_time:{1000 * trainer.clock.seconds:.0f}ms")
        self.stage("training", trainer.run, functools.partial(self.validate, model), self.save_checkpoint)
        log(trainer.average.load_into(trainer.stored))
        seconds, tokens = trainer.clock.seconds, trainer.steps * s.train_batch_tokens
        log(f"late_qat_steps:{trainer.qat_steps} tokens:{tokens} tokens_per_second:{tokens / seconds:.0f}")
        self.results.update(
            parameters=parameters, steps=trainer.steps, tokens=tokens, train_seconds=seconds,
            step_avg_ms=1000 * seconds / trainer.steps, train_loss=trainer.train_loss,
            late_qat_steps=trainer.qat_steps, exported=trainer.average.name, resumed_at=trainer.resumed_at)
        return model, trainer.fit
    def write_artifact(self, model: GPT, fit: Fit | None) -> bytes:
        """Pack the model, write it, read it back from disk. One that is over the cap gets another name."""
        s, data = self.settings, None
        if fit is not None: fit.finish()
        if self.runtime.rank == 0:
            stored = {f.name: getattr(s, f.name) for f in fields_of("model", "evaluation")}
            manifest = dict(settings=stored, tokenizer=self.tokenizer_digest)
            packed = pack_under_cap(model, s, manifest, s.artifact_max_bytes - self.code_bytes, fit)
            fits = len(packed) + self.code_bytes <= s.artifact_max_bytes
            path = Path(ARTIFACT_NAME if fits else OVER_CAP_NAME)
            write_atomically(Path("logs", f"{self.log.run_id}.{path.name}"), packed)  # for keeps
            write_atomically(path, packed)
            data = path.read_bytes()
            scheme = f"gradient_changes:{fit.samples}" if fit else f"int5_mlp:{s.int5_mlp}"
            self.log(f"artifact:{path} sha256:{hashlib.sha256(data).hexdigest()} quant:{s.quant} "
                     f"codec:{s.codec} {scheme}")
        data = self.runtime.from_main(data)
        self.count_bytes(data)
        return data
    def count_bytes(self, data: bytes) -> None:
        """Put the submission's size into results and log; UserError if it is over the cap."""
        total, cap = len(data) + self.code_bytes, self.settings.artifact_max_bytes
        self.results.update(bytes_model=len(data), bytes_total=total, under_cap=total <= cap,
                            artifact_sha256=hashlib.sha256(data).hexdigest())
        self.log(f"Serialized model int6+zstd: {len(data)} bytes\nCode size: {self.code_bytes} bytes\n"
                 f"Total submission size int6+zstd: {total} bytes")  # the field's words, whatever QUANT is
        if total > cap: self.finish()
        require(total <= cap, f"{total - cap} bytes over the cap: no score ({OVER_CAP_NAME}); use QUANT=fit "
                "or a smaller model")
    def score_artifact(self, model: GPT) -> None:
        """Score a model that was read from an artifact, plain and sliding. Both are final, or neither is."""
        for label, kind in (("final_int6_roundtrip", "plain"), ("final_int6_sliding_window", "sliding")):
            self.results[label] = self.stage(label, self.score, model, kind)._asdict()
        self.finish()
    def read_model(self, manifest: dict, weights: dict[str, Tensor], runtime: Runtime) -> GPT:
        """A fresh model with an artifact's weights; UserError if it was made with another tokenizer."""
        theirs, ours = manifest["tokenizer"], self.tokenizer_digest
        require(theirs == ours, f"tokenizer {ours[:9]} is not the artifact's, {theirs[:9]}: TOKENIZER_PATH")
        model = build_model(self.settings, runtime)
        model.load_state_dict(weights, strict=False)  # MTP heads are not in it
        return model
    def finish(self) -> None:
        """What was checked, the scores, and all results for programs. Evaluation's clock has all passes over
        the validation text after training; packing, which reads no data, is on neither clock."""
        results, stages = self.results, self.results["stages"]
        scores = {name: Score(**score) for name, score in results.items() if name.startswith("final_")}
        results["eval_seconds"] = sum(stages.get(name, 0.0) for name in (
            "pre_quantization", "reading", "final_int6_roundtrip", "final_int6_sliding_window"))
        results["peak_memory_bytes"] = self.runtime.peak_memory_bytes()
        results["compliance"] = dict(
            track="A", validation_opened=self.opened, artifact_sha256=results["artifact_sha256"],
            **{key: [getattr(score, key) for score in scores.values()] for key in ("targets", "bytes")},
            **{name: results.get(name) for name in ("train_seconds", "eval_seconds", "resumed_at")},
            train_under_600s=results["train_seconds"] <= 600 if "train_seconds" in results else None,
            eval_under_600s=results["eval_seconds"] <= 600 if scores else None,
            artifact_under_16mb=results["bytes_total"] <= 16_000_000)
        self.log(f"eval_seconds:{results['eval_seconds']:.1f} peak_memory:{results['peak_memory_bytes']}\n"
                 f"compliance:{json.dumps(results['compliance'])}")
        for label, score in scores.items():
            self.log(f"{label} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} "
                     f"eval_time:{1000 * score.seconds:.0f}ms targets:{score.targets} bytes:{score.bytes}\n"
                     f"{label}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")
        if self.runtime.rank == 0:
            write_atomically(Path("logs", f"{self.log.run_id}.json"), json.dumps(results, indent=1).encode())
            for done in checkpoints_of(self.log.run_id, "*"): done.unlink()
def train_and_score(run: Run, checkpoint: bytes) -> None:  # train, average, quantize, pack, read back, score
    model, fit = run.train(checkpoint)
    data = run.stage("packing", run.write_artifact, model, fit)
    at = run.results["steps"], run.results["train_seconds"]
    run.results["pre_quantization"] = run.stage("pre_quantization", run.validate, model, *at)._asdict()
    read = run.stage("reading", lambda: run.read_model(*read_artifact(data, ARTIFACT_NAME), run.runtime))
    run.score_artifact(read)
def score_existing(run: Run, data: bytes, *content) -> None:
    """Score an artifact, with the manifest and weights in it, that an earlier run has made."""
    run.count_bytes(data)
    model = run.stage("reading", run.read_model, *content, run.runtime)
    run.stage("warmup_evaluation", run.evaluator.warm_up, model)
    run.score_artifact(model)
@torch.no_grad()
def continue_text(run: Run, *content) -> None:
    """Print SAMPLE and what the model writes after it, not compiled, since the length grows."""
    s = run.settings
    model = run.read_model(*content, dataclasses.replace(run.runtime, compiled="no"))
    generator = torch.Generator().manual_seed(s.seed)
    ids = [BOS, *run.tokenizer.encode(s.sample)]
    for _ in range(s.sample_tokens):
        context = torch.tensor([ids[-(s.train_seq_len - s.memory_tokens):]], device=run.runtime.device)
        shares = torch.softmax(model.logits(context)[0, -1].cpu() / max(s.sample_temperature, 1e-6), -1)
        ids.append(int(torch.multinomial(shares, 1, generator=generator)))
        if ids[-1] == BOS: break  # the document has ended
    run.log(run.tokenizer.decode(ids))
def start(environment) -> None:
    """Settings, runtime, log, then what the settings ask for."""
    for warning in mistyped_settings(environment) if environment.get("RANK", "0") == "0" else ():
        print(warning, file=sys.stderr)
    artifact, content, stored, checkpoint = environment.get("ARTIFACT", ""), (), {}, b""
    if artifact:
        require(Path(artifact).is_file(), f"ARTIFACT={artifact} is not a file")
        data = Path(artifact).read_bytes()
        content = read_artifact(data, artifact)
        stored = content[0]["settings"]
    elif environment.get("RESUME", "").strip().lower() in ("1", "true"):
        run_id, checkpoint = find_checkpoint(environment.get("RUN_ID", ""))
        state = read_checkpoint(checkpoint, torch.device("cpu"))
        stored = {name: value for name, value in state.get("settings", {}).items() if hasattr(Settings, name)}
        stored["run_id"] = run_id
    settings, preset_line = settings_from(environment, stored, resumes=not artifact)
    runtime = start_runtime(settings)
    default_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-seed{settings.seed}"
    if runtime.rank == 0: claim_disk(min(settings.artifact_max_bytes, MOST_BYTES))
    log = Log(runtime.from_main(settings.run_id or default_id), runtime, settings.resume)
    log("\n".join((preset_line, *runtime.reasons)))
    log(f"settings:{json.dumps(dataclasses.asdict(settings))}", console=False)
    run = Run(settings, runtime, log)
    if not artifact: train_and_score(run, checkpoint)
    elif settings.sample: continue_text(run, *content)
    else: score_existing(run, data, *content)
    if runtime.world_size > 1: dist.barrier(group=runtime.control)  # rank 0 serves the others: leave together
def main() -> int:
    """Exit status 0; 2 after one line that says what to mend; 128 + the signal that ended it; 1 for a bug."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        return 0
    STOP.install()
    try:
        require(not sys.argv[1:], f"{sys.argv[1:]}: settings are environment variables, see --help")
        start(os.environ)
        if dist.is_initialized(): dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        print(f"error: stopped by {signal.Signals(STOP.number).name}; RESUME=1 goes on from the last "
              "checkpoint, if CHECKPOINT_EVERY had one written", file=sys.stderr)
        return 128 + STOP.number
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1

if __name__ == "__main__":
    (os._exit if "RANK" in os.environ else sys.exit)(main())  # gloo may abort an interpreter that ends
