"""What the script chooses and says on machines that are not here: GPUs, systems, versions."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import signal
import subprocess
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

import train_gpt
from conftest import ROOT
from machines import NOT_ON_WINDOWS, NOT_ON_WINDOWS_FUNCTIONS, run_python
from runs import SCRIPT, TINY_RUN, Done, is_one_error
from train_gpt import Runtime, Settings, UserError

pytest_plugins = ["run_fixtures"]

# ---- systems that lack what Linux has

WINDOWS_SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}


def not_on_windows() -> list[str]:
    """Attributes of modules of the standard library that Windows lacks."""
    missing = list(NOT_ON_WINDOWS_FUNCTIONS)
    for item in signal.Signals:
        if item.name not in WINDOWS_SIGNALS:
            missing.append(f"signal.{item.name}")
    for name in ("alarm", "pause", "pthread_kill", "setitimer", "sigwait"):
        missing.append(f"signal.{name}")
    return missing


# Pages that the system gives while tensors of 32 MB, which glibc by itself never keeps, are filled.
COUNT_PAGES = """
import resource, torch, train_gpt
if {keeps}:
    train_gpt.keep_freed_memory()
pages = []
for _ in range(2):
    for _ in range(10):
        torch.zeros(8 << 20).fill_(1.0)
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(pages[1] - pages[0])
"""


def has_glibc(*version: int) -> bool:
    """Whether the C library is glibc, of this version or a newer one."""
    name, found = platform.libc_ver()
    return name == "glibc" and tuple(map(int, found.split("."))) >= version


@pytest.mark.skipif(not has_glibc(2, 35), reason="only since glibc 2.35 can so much be kept")
def test_freed_memory_is_kept():
    pages = {}
    for keeps in (False, True):
        done = run_python("-c", COUNT_PAGES.format(keeps=keeps), check=True)
        pages[keeps] = int(done.stdout)
    assert pages[True] < 100 < pages[False]


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_a_library_without_mallopt_is_left_alone(monkeypatch, error):
    def no_library(name):
        raise error

    monkeypatch.setattr(train_gpt.ctypes, "CDLL", no_library)
    train_gpt.keep_freed_memory()


def test_help_is_printed_where_windows_would_print_it(tmp_path):
    done = run_python(
        SCRIPT, "--help", modules=NOT_ON_WINDOWS, attributes=not_on_windows(), folder=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == train_gpt.help_text() + "\n"


def test_a_run_without_what_windows_lacks_has_the_same_scores(
    first, data_folder, tmp_path, monkeypatch
):
    # Where the module pwd is missing, a variable says who the user is, as torch wants to know.
    others = dict(OMP_NUM_THREADS="1", USERNAME="somebody")
    settings = dict(TINY_RUN, DATA_PATH=str(data_folder), **others)
    for name, text in settings.items():
        monkeypatch.setenv(name, text)
    ended = run_python(SCRIPT, modules=NOT_ON_WINDOWS, attributes=not_on_windows(), folder=tmp_path)
    done = Done(tmp_path, ended.returncode, ended.stdout, ended.stderr)
    assert done.scores() == first.scores()
    assert done.err == ""
    # Nobody counts memory there.
    assert done.results()["peak_memory_bytes"] == 0
    assert first.results()["peak_memory_bytes"] > 0


def test_a_run_needs_no_torch_with_ranks(first, data_folder, tmp_path, run_here, monkeypatch):
    """Some builds of torch come without its distributed part."""
    absent = types.SimpleNamespace(is_available=lambda: False)
    monkeypatch.setattr(train_gpt, "dist", absent)
    done = run_here(tmp_path, **TINY_RUN, DATA_PATH=str(data_folder))
    assert done.scores() == first.scores()


@pytest.mark.parametrize("platform, size", [("linux", 7 * 1024), ("darwin", 7)])
def test_the_peak_of_memory_is_in_bytes(monkeypatch, platform, size):
    usage = types.SimpleNamespace(ru_maxrss=7)
    counting = types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    monkeypatch.setattr(train_gpt, "resource", counting)
    monkeypatch.setattr(train_gpt, "sys", types.SimpleNamespace(platform=platform))
    assert Runtime().peak_memory_bytes() == size


def test_disk_is_claimed_where_nothing_can_reserve_it(tmp_path, monkeypatch):
    """As on macOS and Windows: by what is free."""
    monkeypatch.delattr(train_gpt.os, "posix_fallocate", raising=False)
    monkeypatch.chdir(tmp_path)
    free = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    train_gpt.claim_disk(1000)
    with pytest.raises(UserError, match="cannot write 1001 bytes into .*: No space left"):
        train_gpt.claim_disk(1001)
    assert [path.name for path in tmp_path.rglob("*")] == ["logs"]


@pytest.mark.parametrize("package", ["numpy", "sentencepiece", "torch", "zstandard"])
def test_a_missing_package_is_one_line(package, tmp_path):
    done = run_python(SCRIPT, modules=[package], folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (f"error: No module named '{package}': pip install -r requirements.txt\n")


# ---- versions of torch


@pytest.mark.parametrize("version", ["1.13.1", "2.1.2+cu121", "2.8.0+cu128"])
def test_a_torch_that_is_too_old_is_one_line(version, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    done = run_here(tmp_path)
    assert (done.status, done.out) == (2, "")
    assert done.err == f"error: torch {version} is too old: this script needs 2.9 or newer\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "version",
    [
        "2.9.0",
        "2.9.1+cu128",
        # As images of GPU vendors have it.
        "2.9.0a0+50eac811a6.nv25.09",
        "2.10.0",
        "2.11.0+cu130",
        "2.13.0+cpu",
        "2.14.0",
        "2.14.0.dev20261101",
        "3.0.0",
    ],
)
def test_a_torch_from_2_9_on_passes(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    train_gpt.check_torch_version()


@pytest.mark.parametrize("name", ["all_gather_single", "all_gather_into_tensor"])
def test_gathering_has_the_name_that_this_torch_gives_it(name, monkeypatch):
    calls = []

    def gather(whole: torch.Tensor, share: torch.Tensor, async_op: bool) -> str:
        calls.append((whole, share, async_op))
        return "handle"

    monkeypatch.setattr(train_gpt, "dist", types.SimpleNamespace(**{name: gather}))
    assert train_gpt.start_all_gather("whole", "share") == "handle"
    assert calls == [("whole", "share", True)]


@pytest.mark.parametrize(
    "capabilities, expected",
    [
        (None, ("float32", "no bfloat16 products here")),
        ({}, ("float32", "no bfloat16 products here")),
        ({"avx2": True, "avx512_bf16": False}, ("float32", "no bfloat16 products here")),
        ({"avx512_bf16": True}, ("bfloat16", "avx512_bf16")),
        ({"amx_bf16": True, "avx512_bf16": True}, ("bfloat16", "amx_bf16")),
    ],
    ids=str,
)
def test_the_type_on_a_cpu_follows_from_its_instructions(monkeypatch, capabilities, expected):
    """None: a torch that cannot tell."""
    fake = types.SimpleNamespace()
    if capabilities is not None:
        fake.get_capabilities = lambda: capabilities
    monkeypatch.setattr(torch, "cpu", fake)
    dtype, reason = train_gpt.choose_dtype(Settings(), torch.device("cpu"))
    assert (str(dtype), reason) == (f"torch.{expected[0]}", expected[1])


REQUIREMENTS = [
    "requirements.txt",
    "data/requirements.txt",
    "records/requirements.txt",
    "tests/requirements.txt",
]
# A stand-in for Python that makes environments with itself inside, and notes how it is called.
STAND_IN = """#!/bin/sh
echo "$@" >> calls
if [ "$2" = venv ]; then
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
fi
if [ "$2" = pytest ]; then
    exit 3
fi
"""


def call_on_torch(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Call tests/on_torch.sh of a copy of this repository's files, with a stand-in for Python."""
    root = folder / "a copy"
    for name in (*REQUIREMENTS, "tests/on_torch.sh"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    # This may be a test that the command itself runs.
    inherited = {name: text for name, text in os.environ.items() if name != "ON_TORCH_HOME"}
    return subprocess.run(
        ["bash", str(root / "tests/on_torch.sh"), *arguments],
        cwd=folder,
        env={**inherited, "PYTHON": str(python), "TMPDIR": str(folder), **environment},
        capture_output=True,
        text=True,
    )


def test_the_tests_run_under_another_torch(tmp_path):
    done = call_on_torch(tmp_path, "2.9.1")
    # What pytest says is what the command says.
    assert done.returncode == 3, done.stderr
    home = tmp_path / "on_torch-2.9.1"
    made, installed = (tmp_path / "calls").read_text().splitlines()
    assert made == f"-m venv {home}"
    assert installed.startswith("-m pip install ")
    assert " torch==2.9.1 -r " in installed
    tests = (tmp_path / "a copy/calls").read_text()
    assert tests == "-m pytest -q -n 2 --dist worksteal tests\n"
    wanted = (home / "requirements_without_torch.txt").read_text().splitlines()
    for name in REQUIREMENTS:
        for line in (ROOT / name).read_text().splitlines():
            # Lists that include others would bring the pinned torch.
            assert (line in wanted) == (not line.startswith(("torch==", "-"))), line


def test_an_environment_is_used_again_and_pytest_gets_the_other_arguments(tmp_path):
    home = tmp_path / "my home"
    for _ in range(2):
        done = call_on_torch(tmp_path, "2.11.0", "-q", "tests/x.py", ON_TORCH_HOME=str(home))
        assert done.returncode == 3, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.count("-m venv") == 1
    assert calls.count("-m pip install") == 2
    assert (tmp_path / "a copy/calls").read_text() == "-m pytest -q tests/x.py\n" * 2


@pytest.mark.parametrize("arguments, status", [((), 2), (("-q",), 2), (("--help",), 0)], ids=str)
def test_without_a_version_the_usage_is_said(tmp_path, arguments, status):
    done = call_on_torch(tmp_path, *arguments)
    assert done.returncode == status
    assert (done.stdout + done.stderr).startswith("usage: ")
    assert (done.stdout + done.stderr).count("\n") == 1
    assert not (tmp_path / "calls").exists()


# ---- GPUs of each generation

FLASH3 = "flash_attn_interface"
FLASH2 = "flash_attn"
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel ..."


@dataclasses.dataclass
class Machine:
    """A simulated machine: its GPUs, what is installed on it, and what of that was imported."""

    capability: tuple[int, int]
    installed: tuple[str, ...] = ()
    compiler_fails: Exception | None = None
    has_kernels: bool = True
    gpus: int = 1
    imported: list[str] = dataclasses.field(default_factory=list)
    chosen_gpus: list[int] = dataclasses.field(default_factory=list)

    def importable(self, name: str) -> bool:
        """In place of train_gpt.importable."""
        self.imported.append(name)
        return name in self.installed

    def compile(self, function: Callable, **_: object) -> Callable:
        """In place of torch.compile, which fails where its result is called."""

        def call(x: torch.Tensor) -> torch.Tensor:
            if self.compiler_fails is not None:
                raise self.compiler_fails
            return function(x)

        return call

    def zeros(self, *shape: int, device: torch.device) -> torch.Tensor:
        """In place of torch.zeros."""
        if not self.has_kernels:
            raise RuntimeError(NO_KERNEL)
        return torch.empty(shape).zero_()

    def ones(self, *shape: int, device: torch.device) -> torch.Tensor:
        """In place of torch.ones."""
        return torch.empty(shape).fill_(1.0)


@pytest.fixture
def simulate(monkeypatch) -> Callable[..., Machine]:
    """simulate(capability, ...): this machine is that one until the test ends."""
    precision = torch.get_float32_matmul_precision()

    def call(capability: tuple[int, int], **options: object) -> Machine:
        machine = Machine(capability, **options)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: machine.gpus)
        monkeypatch.setattr(torch.cuda, "set_device", machine.chosen_gpus.append)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(train_gpt, "importable", machine.importable)
        monkeypatch.setattr(torch, "compile", machine.compile)
        monkeypatch.setattr(torch, "zeros", machine.zeros)
        monkeypatch.setattr(torch, "ones", machine.ones)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        return machine

    yield call
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(
    "installed", [(), (FLASH2,), (FLASH3,), (FLASH2, FLASH3)], ids=lambda names: "+".join(names)
)
@pytest.mark.parametrize(
    "capability, dtype, choices",
    [
        # With neither package, with FlashAttention-2, with 3, with both.
        ((7, 0), "float32", ("sdpa", "sdpa", "sdpa", "sdpa")),
        ((7, 5), "float32", ("sdpa", "sdpa", "sdpa", "sdpa")),
        ((8, 0), "bfloat16", ("sdpa", "flash2", "sdpa", "flash2")),
        ((8, 9), "bfloat16", ("sdpa", "flash2", "sdpa", "flash2")),
        ((9, 0), "bfloat16", ("sdpa", "flash2", "flash3", "flash3")),
        ((10, 0), "bfloat16", ("sdpa", "flash2", "sdpa", "flash2")),
        ((12, 0), "bfloat16", ("sdpa", "flash2", "sdpa", "flash2")),
    ],
    ids=["sm_70", "sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120"],
)
def test_what_is_chosen_on_a_gpu(simulate, capability, dtype, choices, installed):
    machine = simulate(capability, installed=installed)
    runtime = train_gpt.start_runtime(Settings())
    assert runtime.device == torch.device("cuda", 0)
    assert runtime.dtype == getattr(torch, dtype)
    number = (FLASH2 in installed) + 2 * (FLASH3 in installed)
    assert runtime.attention == choices[number]
    assert runtime.compiled == "graph"
    assert machine.chosen_gpus == [0]
    # A package is not even imported on a GPU that it is not for.
    assert (FLASH3 in machine.imported) == (capability == (9, 0))
    assert (FLASH2 in machine.imported) == (capability >= (8, 0))


def reasons(runtime: Runtime) -> dict[str, str]:
    """Why each choice was made, by its name."""
    found = {}
    for line in runtime.reasons:
        choice, _, reason = line.partition(" (")
        found[choice.partition(":")[0]] = reason.removesuffix(")")
    return found


NO_FLASH3 = "flash3 needs bfloat16 on an H100 and the package flash_attn_interface"
NO_FLASH2 = "flash2 needs bfloat16 on an Ampere or newer GPU and the package flash-attn"


@pytest.mark.parametrize(
    "capability, installed, dtype, attention",
    [
        ((7, 5), (FLASH2, FLASH3), "no bfloat16 products here", f"{NO_FLASH3}; {NO_FLASH2}"),
        ((8, 0), (FLASH2, FLASH3), "tensor cores", NO_FLASH3),
        ((9, 0), (FLASH2, FLASH3), "tensor cores", "the fastest"),
        ((9, 0), (), "tensor cores", f"{NO_FLASH3}; {NO_FLASH2}"),
        ((12, 0), (FLASH2, FLASH3), "tensor cores", NO_FLASH3),
    ],
    ids=["sm_75", "sm_80", "sm_90", "sm_90-plain", "sm_120"],
)
def test_the_reasons_are_said(simulate, capability, installed, dtype, attention):
    simulate(capability, installed=installed)
    found = reasons(train_gpt.start_runtime(Settings()))
    assert found["device"] == "Some GPU"
    assert found["dtype"] == dtype
    assert found["attention"] == attention
    assert found["compile"] == "a compiler works"


@pytest.mark.parametrize(
    "capability, changes, words",
    [
        ((7, 5), dict(attention="flash2"), "ATTENTION=flash2 needs bfloat16 on an Ampere"),
        ((7, 5), dict(attention="flash3", dtype="bfloat16"), "ATTENTION=flash3 needs"),
        ((8, 0), dict(attention="flash3"), "ATTENTION=flash3 needs bfloat16 on an H100"),
        ((12, 0), dict(attention="flash3"), "ATTENTION=flash3 needs bfloat16 on an H100"),
        ((9, 0), dict(attention="flash3", dtype="float32"), "ATTENTION=flash3 needs bfloat16"),
        ((9, 0), dict(attention="flash2", dtype="float32"), "ATTENTION=flash2 needs bfloat16"),
    ],
    ids=str,
)
def test_an_impossible_wish_is_refused(simulate, capability, changes, words):
    simulate(capability, installed=(FLASH2, FLASH3))
    with pytest.raises(UserError, match=words):
        train_gpt.start_runtime(Settings(**changes))


@pytest.mark.parametrize("name", ["flash2", "flash3"])
def test_a_wish_for_a_package_that_is_missing_is_refused(simulate, name):
    simulate((9, 0))
    with pytest.raises(UserError, match=f"ATTENTION={name} needs .* and the package"):
        train_gpt.start_runtime(Settings(attention=name))


@pytest.mark.parametrize(
    "capability, changes, dtype, attention",
    [
        ((7, 5), dict(dtype="bfloat16"), torch.bfloat16, "sdpa"),
        ((9, 0), dict(dtype="float32"), torch.float32, "sdpa"),
        ((9, 0), dict(attention="sdpa"), torch.bfloat16, "sdpa"),
        ((9, 0), dict(attention="flash2"), torch.bfloat16, "flash2"),
        ((7, 5), dict(attention="blocked"), torch.float32, "blocked"),
    ],
    ids=str,
)
def test_a_possible_wish_is_granted(simulate, capability, changes, dtype, attention):
    simulate(capability, installed=(FLASH2, FLASH3))
    runtime = train_gpt.start_runtime(Settings(**changes))
    assert (runtime.dtype, runtime.attention) == (dtype, attention)
    for name in changes:
        assert reasons(runtime)[name] == "asked for"


def test_a_package_counts_only_if_its_import_works(tmp_path, monkeypatch):
    """One that was built for another torch fails in some way or other."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "works_here.py").write_text("")
    (tmp_path / "other_torch.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    (tmp_path / "other_cuda.py").write_text("raise RuntimeError('libcudart.so.12')")
    assert train_gpt.importable("works_here")
    for name in ("other_torch", "other_cuda", "never_installed"):
        assert not train_gpt.importable(name)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("GPU is too old for the triton\ncompiler"),
        ImportError("cannot import name 'triton_key'"),
        FileNotFoundError(2, "No such file or directory", "gcc"),
        AssertionError("Python.h is missing"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_where_the_compiler_fails_the_run_goes_on_without(simulate, error):
    simulate((7, 0), compiler_fails=error)
    runtime = train_gpt.start_runtime(Settings())
    assert runtime.compiled == "no"
    said = " ".join(str(error).split())
    assert reasons(runtime)["compile"] == f"torch.compile fails: {said}"
    with pytest.raises(UserError, match="COMPILE=1: torch.compile fails: "):
        train_gpt.start_runtime(Settings(compile="1"))
    assert train_gpt.start_runtime(Settings(compile="0")).compiled == "no"


def test_a_torch_without_kernels_for_the_gpu_is_one_line(simulate, tmp_path, run_here):
    simulate((12, 0), has_kernels=False)
    done = run_here(tmp_path)
    assert (done.status, done.out) == (2, "")
    assert is_one_error(
        done.err,
        r"this torch cannot compute on Some GPU \(sm_120\): CUDA error: no kernel image is "
        "available .*; install a build of torch for this GPU, or use DEVICE=cpu",
    )
    assert list(tmp_path.iterdir()) == []
    assert train_gpt.start_runtime(Settings(device="cpu")).device == torch.device("cpu")


def test_each_rank_has_a_gpu_of_its_own(simulate, monkeypatch):
    machine = simulate((9, 0), gpus=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train_gpt.start_runtime(Settings()).device == torch.device("cuda", 1)
    assert machine.chosen_gpus == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="no GPU for rank 2: lower --nproc_per_node"):
        train_gpt.start_runtime(Settings())


def test_without_a_gpu_the_cpu_is_chosen_unless_one_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_gpt.choose_device(Settings(), 0) == (torch.device("cpu"), "no CUDA")
    assert train_gpt.choose_device(Settings(device="cpu"), 0)[1] == "asked for"
    with pytest.raises(UserError, match="DEVICE=cuda: torch sees no GPU here"):
        train_gpt.choose_device(Settings(device="cuda"), 0)


def test_attention_on_a_cpu_is_in_blocks(monkeypatch):
    """No package is imported for it."""
    monkeypatch.setattr(train_gpt, "importable", lambda name: pytest.fail(f"{name} was imported"))
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        attention, reason = train_gpt.choose_attention(Settings(), cpu, dtype)
        assert attention == "blocked"
        assert reason == f"{NO_FLASH3}; {NO_FLASH2}; sdpa is slower on a CPU"
    with pytest.raises(UserError, match="ATTENTION=flash2 needs"):
        train_gpt.choose_attention(Settings(attention="flash2"), cpu, torch.bfloat16)
