"""Checks of everything hetero needs from the machine: OK, WARN or FAIL, each with a fix."""

from __future__ import annotations

import math
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

from cpu_kernels.amx import why_no_tiles
from cpu_kernels.formats import WeightKind
from cpu_kernels.isa import ENVIRONMENT_VARIABLE, Isa, isa
from cpu_kernels.numa import numa_note
from cpu_kernels.threads import available_cores, physical_cores
from hetero.errors import EnvironmentProblemError
from hetero.measure.fingerprint import (
    HUGE_PAGES_FILE,
    cpu_flags,
    cpu_model,
    huge_pages,
    nvidia_gpus,
    package_version,
)
from hetero.measure.memory_limit import (
    available_memory_bytes,
    cgroup_memory,
    memory_limit_bytes,
)
from hetero.measure.store import (
    PROFILE_FILE,
    CacheNotWritableError,
    private_folder,
    stored_profile,
    why_foreign,
)
from planner.errors import ProfileError
from planner.kernel_table import KernelTable
from planner.kernels import BACKENDS, Backend, KernelCall

Status = Literal["ok", "warn", "fail"]

_MIN_PYTHON = (3, 11)
_MIN_TORCH = (2, 8)
_IPEX = "intel-extension-for-pytorch"
# Instruction sets that torch's products and our kernels choose between, best last.
_ISA = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)
_PRODUCT_KINDS: tuple[WeightKind, ...] = ("bfloat16", "float32", "int8", "int4")
# A step of decode and a chunk of a prompt.
_COMPARED_TOKENS = (1, 256)
_LOW_DISK_BYTES = 1 << 30
_LOW_MEMORY_BYTES = 4 << 30
_PINNED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of `hetero doctor`; `fix` is what to do where the status is not ok."""

    name: str
    status: Status
    text: str
    fix: str | None = None


def check_environment(cache_dir: Path) -> tuple[Check, ...]:
    """Look at everything once; measures nothing and writes nothing but the cache folder."""
    return (
        check_python(),
        *check_torch(),
        check_numba(),
        check_cpu(),
        check_instructions(),
        check_cores(),
        check_memory(),
        check_memlock(),
        check_huge_pages(),
        check_gpu(),
        check_ipex(package_version(_IPEX), package_version("torch")),
        check_products(cache_dir),
        check_cache(cache_dir),
        check_stored_profile(cache_dir),
        check_shipped_model(),
    )


def check_python() -> Check:
    version = platform.python_version()
    if sys.version_info < _MIN_PYTHON:
        return Check(
            name="python",
            status="fail",
            text=f"{version}, older than {'.'.join(map(str, _MIN_PYTHON))}",
            fix="install Python 3.11 or newer",
        )
    return Check(name="python", status="ok", text=f"{version}, {platform.system()}")


def check_torch() -> tuple[Check, ...]:
    """The version, and whether it loads: a wheel for another CPU or libc fails only then."""
    version = package_version("torch")
    fix = "pip install 'torch>=2.8'"
    if version is None:
        return (Check(name="torch", status="fail", text="not installed", fix=fix),)
    try:
        import torch
    except (ImportError, OSError) as error:
        return (
            Check(name="torch", status="fail", text=f"{version} does not load: {error}", fix=fix),
        )
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    capability = torch.backends.cpu.get_cpu_capability()
    text = f"{version}, {build}, CPU kernels for {capability}"
    if numbers < _MIN_TORCH:
        return (Check(name="torch", status="fail", text=f"{text}, older than 2.8", fix=fix),)
    return (Check(name="torch", status="ok", text=text),)


def check_numba() -> Check:
    version = package_version("numba")
    if version is None:
        return Check(
            name="numba", status="fail", text="not installed", fix="pip install 'numba>=0.68'"
        )
    try:
        import numba  # noqa: F401
    except (ImportError, OSError) as error:
        return Check(
            name="numba",
            status="fail",
            text=f"{version} does not load: {error}",
            fix="pip install --upgrade numba numpy",
        )
    return Check(name="numba", status="ok", text=version)


def check_cpu() -> Check:
    flags = cpu_flags()
    found = [name for name in _ISA if name in flags]
    text = f"{cpu_model()}; {', '.join(found) or 'no vector instructions reported'}"
    if flags and not flags & {"avx2", "asimd"}:
        return Check(
            name="cpu",
            status="warn",
            text=f"{text}: without AVX2 products are several times slower",
            fix="use a machine with AVX2, or a virtual machine that passes the CPU's flags on",
        )
    return Check(name="cpu", status="ok", text=text)


def check_instructions(find: Callable[[], Isa] = isa) -> Check:
    """What our kernels are compiled for, and what they could be."""
    try:
        found = find()
    except (ImportError, OSError) as error:
        return Check(
            name="instructions",
            status="fail",
            text=f"unknown, as llvmlite does not load: {error}",
            fix="pip install --upgrade numba llvmlite",
        )
    reason = why_no_tiles() if found.level == "amx" else None
    if reason is not None:
        return Check(
            name="instructions",
            status="warn",
            text=f"{found.level}; {reason}",
            fix="update the kernel to 5.16 or newer, or let the container use AMX",
        )
    if not found.is_lowered:
        return Check(name="instructions", status="ok", text=found.level)
    return Check(
        name="instructions",
        status="warn",
        text=f"{found.level}, lowered from {found.highest} by {ENVIRONMENT_VARIABLE}",
        fix=f"unset {ENVIRONMENT_VARIABLE}, if it is not set on purpose",
    )


def check_cores() -> Check:
    physical, logical = physical_cores(), available_cores()
    text = f"{physical} physical of {logical} logical cores usable"
    note = numa_note()
    return Check(name="cores", status="ok", text=text if note is None else f"{text}; {note}")


def check_memory() -> Check:
    limit, available = memory_limit_bytes(), available_memory_bytes()
    groups = cgroup_memory()
    text = f"{limit / 1e9:.1f} GB, {available / 1e9:.1f} GB available"
    if any(group.limit_bytes == limit for group in groups):
        text += ", limited by a cgroup"
    if available < _LOW_MEMORY_BYTES:
        return Check(
            name="memory",
            status="warn",
            text=text,
            fix="close other programs or raise the container's memory limit",
        )
    return Check(name="memory", status="ok", text=text)


def check_memlock() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check(name="memlock", status="ok", text="unlimited")
    text = f"{soft / 1e6:.0f} MB of locked memory"
    if nvidia_gpus() and soft < _PINNED_BYTES:
        return Check(
            name="memlock",
            status="warn",
            text=f"{text}: pinning weights for fast copies may be refused",
            fix="ulimit -l unlimited (docker: --ulimit memlock=-1)",
        )
    return Check(name="memlock", status="ok", text=f"{text}; only a GPU would need more")


def check_huge_pages(file: Path = HUGE_PAGES_FILE) -> Check:
    mode = huge_pages(file)
    if mode == "unknown":
        return Check(name="huge pages", status="ok", text="not offered by this system")
    if mode == "never":
        return Check(
            name="huge pages",
            status="warn",
            text="transparent huge pages are off: filling memory is several times slower",
            fix=f"echo madvise | sudo tee {file}",
        )
    return Check(name="huge pages", status="ok", text=f"transparent huge pages: {mode}")


def check_gpu() -> Check:
    gpus = nvidia_gpus()
    if not gpus:
        return Check(name="gpu", status="ok", text="no NVIDIA GPU: CPU only")
    gpu = gpus[0]
    memory = "" if gpu.memory_bytes is None else f", {gpu.memory_bytes / 1e9:.1f} GB"
    text = f"{gpu.name}{memory}, driver {gpu.driver}"
    if len(gpus) > 1:
        text += f" (first of {len(gpus)}, one is used)"
    fix = "pip install torch --index-url https://download.pytorch.org/whl/cu128"
    try:
        import torch
    except (ImportError, OSError):
        return Check(name="gpu", status="warn", text=f"{text}; torch does not load", fix=fix)
    if torch.version.cuda is None:
        return Check(
            name="gpu", status="warn", text=f"{text}; torch is built without CUDA", fix=fix
        )
    if not torch.cuda.is_available():
        return Check(
            name="gpu",
            status="fail",
            text=f"{text}; torch for CUDA {torch.version.cuda} cannot use it",
            fix="update the driver, or install a torch for an older CUDA",
        )
    return Check(name="gpu", status="ok", text=text)


def check_ipex(ipex: str | None, torch: str | None) -> Check:
    """Read from metadata only: importing it beside another torch prints to stdout and raises."""
    if ipex is None:
        return Check(name="ipex", status="ok", text="not installed, not needed")
    text = f"ipex {ipex} installed"
    if torch is None or ipex.split(".")[:2] != torch.split(".")[:2]:
        return Check(
            name="ipex",
            status="warn",
            text=f"{text} but torch is {torch or 'not installed'}: not used",
            fix=f"pip uninstall {_IPEX} (the project was archived in 2026-03)",
        )
    return Check(name="ipex", status="ok", text=f"{text}, matches torch {torch}")


def check_products(cache_dir: Path) -> Check:
    """Who multiplies on the CPU, each tried on a small matrix, and which of them is fastest where.

    Our kernels are what the engine runs on; another must be a tenth faster by the profile.
    """
    try:
        from hetero.model.products import available_backends
    except (ImportError, OSError) as error:
        return Check(
            name="products",
            status="fail",
            text=f"unknown, as torch or numba does not load: {error}",
            fix="pip install --upgrade torch numba",
        )
    reasons = {kind: available_backends(kind) for kind in _PRODUCT_KINDS}
    by_backend = {
        backend: {kind: found[backend] for kind, found in reasons.items()} for backend in BACKENDS
    }
    texts = [_products_text(backend, found) for backend, found in by_backend.items()]
    texts += _chosen_texts(cache_dir)
    if any(by_backend["numba"].values()):
        return Check(
            name="products",
            status="fail",
            text="; ".join(texts),
            fix="pip install --upgrade numba llvmlite; if that changes nothing, please report it",
        )
    return Check(name="products", status="ok", text="; ".join(texts))


def _products_text(backend: Backend, why_not: dict[WeightKind, str | None]) -> str:
    """`torch 2.13.0 available`, `ipex not installed`, `torch 2.13.0 available, but int4: ...`."""
    lacking = {kind: reason for kind, reason in why_not.items() if reason is not None}
    reasons = list(dict.fromkeys(lacking.values()))
    if len(lacking) == len(why_not) and len(reasons) == 1:
        return f"{backend} {reasons[0]}"
    version = package_version(_IPEX if backend == "ipex" else backend)
    text = f"{backend} {version} available"
    parts = (f"{kind}: {reason}" for kind, reason in lacking.items())
    return text if not lacking else f"{text}, but {', '.join(parts)}"


def _chosen_texts(cache_dir: Path) -> list[str]:
    """How torch compares with our kernels at few and at many tokens, by the stored profile."""
    try:
        profile = stored_profile(cache_dir)
    except (ProfileError, EnvironmentProblemError):
        return []  # their own checks say so
    if profile is None or why_foreign(profile) is not None:
        return []
    table = KernelTable(profile.cpu, profile.samples, "cpu", profile.cpu_by_threads)
    texts = []
    for kind in _PRODUCT_KINDS:
        if not {"numba", "torch"} <= set(profile.backends(kind)):
            continue
        shapes = (
            sample.shape
            for sample in profile.samples
            if (sample.lane, sample.kernel, sample.format) == ("cpu", "linear", kind)
        )
        call = KernelCall(kernel="linear", shape=max(shapes, key=math.prod), format=kind)
        few, many = (
            table.estimate(replace(call, num_tokens=tokens)).seconds
            / table.estimate(replace(call, num_tokens=tokens, backend="torch")).seconds
            for tokens in _COMPARED_TOKENS
        )
        texts.append(
            f"{kind}: torch has {few:.1f}x the rate of numba at {_COMPARED_TOKENS[0]} token, "
            f"{many:.1f}x at {_COMPARED_TOKENS[1]}"
        )
    return texts


def check_cache(cache_dir: Path) -> Check:
    try:
        private_folder(cache_dir)
        with tempfile.TemporaryFile(dir=cache_dir):
            pass
    except (CacheNotWritableError, OSError) as error:
        return Check(
            name="cache",
            status="warn",
            text=f"{cache_dir} cannot be written: {error}; profiles and kernels are made each time",
            fix="set XDG_CACHE_HOME to a folder that you can write to",
        )
    except EnvironmentProblemError as error:
        return Check(
            name="cache",
            status="fail",
            text=str(error),
            fix="set XDG_CACHE_HOME to a folder of your own",
        )
    free = shutil.disk_usage(cache_dir).free
    text = f"{cache_dir}, {free / 1e9:.1f} GB free"
    if free < _LOW_DISK_BYTES:
        return Check(name="cache", status="warn", text=text, fix="free some disk space")
    return Check(name="cache", status="ok", text=text)


def check_stored_profile(cache_dir: Path) -> Check:
    fix = "hetero profile"
    try:
        profile = stored_profile(cache_dir)
    except ProfileError as error:
        return Check(name="profile", status="warn", text=str(error), fix=fix)
    if profile is None:
        return Check(
            name="profile", status="ok", text="none stored: the first plan measures for 10 s"
        )
    foreign = why_foreign(profile)
    if foreign is not None:
        return Check(name="profile", status="warn", text=f"not used: {foreign}", fix=fix)
    text = f"{cache_dir / PROFILE_FILE}, measured {profile.measured_at}"
    if profile.notes or profile.confidence == "low":
        doubts = ("low confidence",) if profile.confidence == "low" else ()
        text = "; ".join((text, *doubts, *profile.notes))
        return Check(name="profile", status="warn", text=text, fix=f"{fix}, with nothing else on")
    return Check(name="profile", status="ok", text=text)


def check_shipped_model() -> Check:
    folder = resources.files("hetero") / "demo_model"
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if not any(file.name.endswith(".safetensors") for file in folder.iterdir()):
        missing.append("*.safetensors")
    if missing:
        return Check(
            name="model",
            status="warn",
            text=f"the model that ships lacks {', '.join(missing)}",
            fix="pip install --force-reinstall --no-deps hetero",
        )
    return Check(name="model", status="ok", text="the model that ships is complete")
