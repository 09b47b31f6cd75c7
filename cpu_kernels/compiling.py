"""Compiled functions by name: object code on disk, loaded in milliseconds and without numba.

A kernel module (`*_kernels.py`) holds *makers*: functions that return the `Source` of a kernel. It
is imported, and numba with it, only where the object code of a function is not on
disk for this processor and these sources. `HETERO_KERNEL_CACHE` names the folder; otherwise it is
`hetero/kernels` in the user's cache. Code is loaded from there, so a folder that another user may
write to is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from cpu_kernels.isa import isa

FOLDER_VARIABLE = "HETERO_KERNEL_CACHE"
# What kernels may call: everything else would be numba's own or Python's, which need not be loaded.
_LIBRARY_FUNCTIONS = frozenset({"memset", "memcpy", "memmove", "sched_yield"})
_MAGIC = b"hetero kernel 2\n"


@dataclass(frozen=True, slots=True)
class Source:
    """What a maker returns: a Python function that numba understands.

    All its arguments are 64-bit integers, addresses mostly; it returns and raises nothing.
    """

    function: Callable[..., None]
    num_arguments: int


_addresses: dict[tuple[Any, ...], int] = {}
# One thread compiles or loads at a time; the others wait for what it finds.
_loading = threading.RLock()
_listeners: list[Callable[[str], None]] = []


def _unlock() -> None:
    global _loading
    _loading = threading.RLock()


if hasattr(os, "register_at_fork"):  # a thread that held it is not in the child
    os.register_at_fork(after_in_child=_unlock)


def code_address(module: str, maker: str, *arguments: Any) -> int:
    """Return the address of the C function that `cpu_kernels.<module>.<maker>(*arguments)` makes.

    Parameters
    ----------
    module
        A module of this package; imported only if the function must be compiled.
    maker
        Its function that returns a `Source`.
    arguments
        Numbers, strings and booleans: they and the names are all that the code may depend on,
        beside the sources of this package and the processor.

    Examples
    --------
    >>> code_address("chain_kernels", "make_enter_chain") != 0
    True
    """
    key = (module, maker, *arguments)
    address = _addresses.get(key)
    if address is None:
        with _loading:
            address = _addresses.get(key)
            if address is None:
                address = _addresses[key] = _build(module, maker, arguments)
    return address


@contextlib.contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Tell `listener` the name of every function that is compiled meanwhile, before it is."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def cache_folder() -> Path | None:
    """Return the folder of object code, made if missing; None where none is safe to use."""
    named = os.environ.get(FOLDER_VARIABLE, "")
    if named:
        folder = Path(named)
    else:
        xdg, home = os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME", "")
        if not xdg.startswith("/") and not home:
            return None
        base = Path(xdg) if xdg.startswith("/") else Path(home) / ".cache"
        folder = base / "hetero" / "kernels"
    try:
        if not folder.exists():
            folder.parent.parent.mkdir(parents=True, exist_ok=True)
            for made in (folder.parent, folder):  # `mkdir(parents=True)` would let the umask choose
                made.mkdir(mode=0o700, exist_ok=True)
        facts = folder.stat()
    except OSError:
        return None
    is_ours = not hasattr(os, "geteuid") or facts.st_uid == os.geteuid()
    is_private = sys.platform == "win32" or not stat.S_IMODE(facts.st_mode) & 0o022
    return folder if stat.S_ISDIR(facts.st_mode) and is_ours and is_private else None


@cache
def code_stamp(module: str) -> str:
    """Return a hash of everything that the code of a kernel module's functions depends on.

    Examples
    --------
    >>> len(code_stamp("chain_kernels"))
    16
    """
    found = hashlib.sha256(_machine_facts())
    for name, text in sorted(_sources(module).items()):
        found.update(name.encode() + b"\0" + text)
    return found.hexdigest()[:16]


def _sources(module: str) -> dict[str, bytes]:
    """The texts of a module and of all modules of this package that it imports, directly or not."""
    texts: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = (Path(__file__).parent / f"{name}.py").read_bytes()
            waiting += [(a or b).decode() for a, b in _IMPORT.findall(texts[name])]
    return texts


_IMPORT = re.compile(rb"^\s*from cpu_kernels(?:\.(\w+) import| import (\w+))", re.MULTILINE)


@cache
def _machine_facts() -> bytes:
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know how to ask this processor
        features = {}
    facts = (
        version("numba"),
        version("llvmlite"),
        llvm.get_default_triple(),
        llvm.get_host_cpu_name(),
        ",".join(sorted(name for name, has in features.items() if has)),
        isa().level,
        isa().vendor,
        *(os.environ.get(name, "") for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")),
    )
    return "\0".join(facts).encode()


def _build(module: str, maker: str, arguments: tuple[Any, ...]) -> int:
    name = "-".join([module, maker, *map(str, arguments)])
    symbol = "hetero_" + hashlib.sha256(name.encode()).hexdigest()[:24]
    folder = cache_folder()
    file = None if folder is None else folder / f"{name}.{code_stamp(module)}.o"
    code = None if file is None else _read(file)
    if code is None:
        for listener in _listeners:
            listener(name)
        code = bytes(_machine().emit_object(_optimised(module, maker, arguments, symbol)))
        if file is not None:
            _write(file, code)
    return _load(code, symbol)


def assembly(module: str, maker: str, *arguments: Any) -> str:
    """Return the instructions of a function, compiled anew: which ones are there, for tests.

    Examples
    --------
    >>> "ret" in assembly("chain_kernels", "make_enter_chain")
    True
    """
    with _loading:
        code = _optimised(module, maker, arguments, "hetero_function")
        return str(_machine().emit_assembly(code))


def _optimised(module: str, maker: str, arguments: tuple[Any, ...], symbol: str) -> llvm.ModuleRef:
    """Return a module with a function under another name, everything else in it hidden."""
    made: Source = getattr(import_module(f"cpu_kernels.{module}"), maker)(*arguments)
    code = llvm.parse_assembly(_llvm_code(made, symbol))
    for function in code.functions:
        if not function.is_declaration and function.name != symbol:
            function.linkage = "internal"
    passes = llvm.create_pass_builder(
        _machine(), llvm.create_pipeline_tuning_options(speed_level=2)
    )
    passes.getModulePassManager().run(code, passes)
    called = {function.name for function in code.functions if function.is_declaration}
    for name in called - _LIBRARY_FUNCTIONS:
        if not name.startswith("llvm."):
            raise RuntimeError(f"{module}.{maker}{arguments} calls {name}, which needs numba")
    return code


def _llvm_code(made: Source, symbol: str) -> str:
    """Return a module in which `symbol` is the function by C's rules.

    numba's own rules give a status and take a place for a value and an error first; kernels raise
    nothing, so all three go.
    """
    from numba import types
    from numba.core import compiler, registry

    flags: Any = compiler.Flags()  # type: ignore[no-untyped-call]
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    target = registry.cpu_target
    found: Any = compiler.compile_extra(  # type: ignore[no-untyped-call]
        target.typing_context,
        target.target_context,
        made.function,
        (types.int64,) * made.num_arguments,
        types.void,
        flags,
        {},
    )
    arguments = ", ".join(f"i64 %a{index}" for index in range(made.num_arguments))
    return f"""{found.library.get_llvm_str()}
define void @{symbol}({arguments}) {{
  %value = alloca ptr
  %error = alloca ptr
  %status = call i32 @"{found.fndesc.llvm_func_name}"(ptr %value, ptr %error, {arguments})
  ret void
}}
"""


@cache
def _machine() -> llvm.TargetMachine:
    """The processor as numba sees it: what `HETERO_ISA` or numba's own variables leave of it."""
    from numba.core import registry

    machine: llvm.TargetMachine = registry.cpu_target.target_context.codegen()._tm
    return machine


@cache
def _engine() -> llvm.ExecutionEngine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    # Never given back: threads may still run its code while the process ends.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
    return engine


def _load(code: bytes, symbol: str) -> int:
    engine = _engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return int(engine.get_function_address(symbol))


def _read(file: Path) -> bytes | None:
    """Return the object code of a file; None if it is not there or not whole."""
    try:
        stored = file.read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + 32
    code = stored[start:]
    is_whole = stored[: len(_MAGIC)] == _MAGIC
    is_whole = is_whole and hashlib.sha256(code).digest() == stored[len(_MAGIC) : start]
    return code if is_whole else None


def _write(file: Path, code: bytes) -> None:
    """Keep object code; another process may write the same at this moment, or the disk be full."""
    with (
        contextlib.suppress(OSError),
        tempfile.NamedTemporaryFile(
            dir=file.parent, prefix=f".{file.name[:40]}.", delete=False
        ) as part,
    ):
        try:
            part.write(_MAGIC + hashlib.sha256(code).digest() + code)
            part.flush()
            os.replace(part.name, file)
        except BaseException:
            os.unlink(part.name)
            raise
    _forget_old(file)


def _forget_old(file: Path) -> None:
    """Remove what other versions have left behind a month ago."""
    for other in file.parent.glob(f"{file.name.rsplit('.', 2)[0]}.*.o"):
        with contextlib.suppress(OSError):
            if other != file and time.time() - other.stat().st_mtime > 30 * 86400:
                other.unlink()
