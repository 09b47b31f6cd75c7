"""How much memory this process may use: installed memory and every cgroup limit above it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_PROC_CGROUP = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
# File names of the limit, of the use, and of the key of memory.stat that holds reclaimable cache.
_V2_FILES = ("memory.max", "memory.current", "inactive_file")
_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupMemory:
    """One limit on the way from this process's cgroup to the root; `used_bytes` without cache."""

    folder: Path
    limit_bytes: int
    used_bytes: int


def memory_limit_bytes(
    *, proc_cgroup: Path = _PROC_CGROUP, cgroup_root: Path = _CGROUP_ROOT
) -> int:
    """The tightest of installed memory and all cgroup limits (v1 and v2).

    Returns
    -------
    int
        Bytes that this process could use if nothing else ran.
    """
    total = int(psutil.virtual_memory().total)
    limits = cgroup_memory(proc_cgroup=proc_cgroup, cgroup_root=cgroup_root)
    return min([total, *(limit.limit_bytes for limit in limits)])


def available_memory_bytes(
    *, proc_cgroup: Path = _PROC_CGROUP, cgroup_root: Path = _CGROUP_ROOT
) -> int:
    """Bytes that can be allocated now: the tightest of free memory and of what each cgroup leaves.

    Memory that the kernel can take back (file caches) counts as available, as in MemAvailable.
    """
    available = int(psutil.virtual_memory().available)
    limits = cgroup_memory(proc_cgroup=proc_cgroup, cgroup_root=cgroup_root)
    left = (max(0, limit.limit_bytes - limit.used_bytes) for limit in limits)
    return min([available, *left])


def cgroup_memory(
    *, proc_cgroup: Path = _PROC_CGROUP, cgroup_root: Path = _CGROUP_ROOT
) -> tuple[CgroupMemory, ...]:
    """Every memory limit that binds this process, own cgroup first; none outside Linux."""
    limits = []
    for folder, files in _folders(proc_cgroup, cgroup_root):
        limit = _number(folder / files[0])
        # v1 writes the largest number of pages for "none", v2 the word "max"
        if limit is None or limit >= 1 << 62:
            continue
        used = _number(folder / files[1]) or 0
        cache = _stat(folder / "memory.stat", files[2])
        limits.append(
            CgroupMemory(folder=folder, limit_bytes=limit, used_bytes=max(0, used - cache))
        )
    return tuple(limits)


def _folders(proc_cgroup: Path, cgroup_root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders from this process's cgroup up to the root, of each hierarchy that limits memory.

    A line of /proc/self/cgroup is `0::/a/b` (v2) or `4:memory:/a/b` (v1). Inside a container the
    path may be that of the host and not exist here: the container's own limits then lie at the
    root of the mount.
    """
    try:
        lines = proc_cgroup.read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        parts = [part for part in path.split("/") if part not in ("", "..", ".")]
        if not controllers:
            # beside v1 hierarchies the v2 one is mounted at `unified` and limits no memory
            roots, files = [cgroup_root, cgroup_root / "unified"], _V2_FILES
        elif "memory" in controllers.split(","):
            roots, files = [cgroup_root / "memory", cgroup_root / controllers], _V1_FILES
        else:
            continue
        for root in dict.fromkeys(roots):
            for depth in range(len(parts), -1, -1):
                folder = root.joinpath(*parts[:depth])
                if (folder / files[0]).is_file():
                    yield folder, files


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat(file: Path, key: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(values.get(key, "0"))
