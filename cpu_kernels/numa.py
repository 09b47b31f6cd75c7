"""Memory over several NUMA nodes: weights lie page by page on all of them, not on the loader's.

A page lies on the node of the thread that touches it first. Weights that one thread packs would all
lie on its node, whose memory then serves the cores of every node, while theirs is idle.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cpu_kernels.threads import core_list

_NODES = Path("/sys/devices/system/node")
# The numbers of get_mempolicy and set_mempolicy.
_CALLS = {"x86_64": (239, 238), "aarch64": (236, 237)}
_DEFAULT, _INTERLEAVE = 0, 3  # MPOL_DEFAULT, MPOL_INTERLEAVE
_WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)

# A system call: number, then arguments; the answer is negative where it is refused.
SystemCall = Callable[..., int]


def _system_call(*arguments: object) -> int:
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    answer: int = call(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    return answer


def nodes_in_use(root: Path = _NODES) -> tuple[int, ...]:
    """Return the NUMA nodes that have cores of this process; none where the system tells of none.

    Parameters
    ----------
    root
        The folder of the nodes in sysfs.

    Examples
    --------
    >>> nodes_in_use(Path("/nowhere"))
    ()
    """
    if sys.platform != "linux":
        return ()
    cores = os.sched_getaffinity(os.getpid())  # the process's: this thread may be pinned
    found = []
    for folder in root.glob("node[0-9]*"):
        try:
            theirs = core_list((folder / "cpulist").read_text())
        except OSError:  # a container may hide it
            continue
        if not cores.isdisjoint(theirs):
            found.append(int(folder.name.removeprefix("node")))
    return tuple(sorted(found))


@contextlib.contextmanager
def interleaved_memory(
    root: Path = _NODES, system_call: SystemCall = _system_call
) -> Iterator[bool]:
    """Spread memory that the calling thread touches first over the nodes in use, page by page.

    The policy is the thread's and of threads that it starts meanwhile, not of those that run
    already: what is packed by the pool's threads lies on their nodes. A policy that the user set
    (numactl) is left as it is.

    Parameters
    ----------
    root
        The folder of the nodes in sysfs.
    system_call
        What makes system calls.

    Yields
    ------
    bool
        Whether memory is spread by this call: False on one node, outside Linux on x86-64 and
        AArch64, where there is another policy, and where the system refuses (many containers).

    Examples
    --------
    >>> with interleaved_memory() as is_interleaved:
    ...     isinstance(is_interleaved, bool)
    True
    """
    nodes = nodes_in_use(root)
    numbers = _CALLS.get(platform.machine())
    if len(nodes) < 2 or numbers is None:
        yield False
        return
    get_policy, set_policy = numbers
    policy = ctypes.c_int(-1)
    asked = system_call(get_policy, ctypes.byref(policy), None, 0, None, 0)
    if asked < 0 or policy.value != _DEFAULT:
        yield False
        return
    mask = _mask(nodes)
    # The system reads one bit less than it is told of.
    is_set = system_call(set_policy, _INTERLEAVE, mask, len(mask) * _WORD_BITS + 1) >= 0
    try:
        yield is_set
    finally:
        if is_set:
            system_call(set_policy, _DEFAULT, None, 0)


def _mask(nodes: Sequence[int]) -> ctypes.Array[ctypes.c_ulong]:
    """A bit for each node."""
    words = (ctypes.c_ulong * (max(nodes) // _WORD_BITS + 1))()
    for node in nodes:
        words[node // _WORD_BITS] |= 1 << (node % _WORD_BITS)
    return words


def numa_note(root: Path = _NODES, system_call: SystemCall = _system_call) -> str | None:
    """Return how memory is used on a machine of several nodes, for a person to read.

    Returns
    -------
    str or None
        None where the process has cores of one node.

    Examples
    --------
    >>> numa_note(Path("/nowhere")) is None
    True
    """
    nodes = nodes_in_use(root)
    if len(nodes) < 2:
        return None
    with interleaved_memory(root, system_call) as is_interleaved:
        if is_interleaved:
            return f"memory on {len(nodes)} nodes: packed weights are spread over all of them"
    return (
        f"memory on {len(nodes)} nodes: this process may not spread weights over them, or has a "
        "policy of its own (numactl)"
    )
