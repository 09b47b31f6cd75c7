"""Memory limits from fake cgroup trees, version 1 and 2."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from hetero.measure.memory_limit import (
    available_memory_bytes,
    cgroup_memory,
    memory_limit_bytes,
)

V1_NO_LIMIT = "9223372036854771712\n"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


@pytest.fixture
def proc_cgroup(tmp_path: Path) -> Path:
    return tmp_path / "proc_self_cgroup"


def test_v2_limit_of_a_parent_binds(root: Path, proc_cgroup: Path) -> None:
    """The tightest limit wins, wherever it is on the way to the root."""
    proc_cgroup.write_text("0::/a/b\n")
    write(root / "a" / "b", memory__max="3000000\n", memory__current="0\n")
    write(root / "a", memory__max="2000000\n", memory__current="0\n")
    assert memory_limit_bytes(proc_cgroup=proc_cgroup, cgroup_root=root) == 2000000


def test_v2_word_max_is_no_limit(root: Path, proc_cgroup: Path) -> None:
    """`max` leaves the installed memory."""
    proc_cgroup.write_text("0::/a\n")
    write(root / "a", memory__max="max\n")
    installed = psutil.virtual_memory().total
    assert memory_limit_bytes(proc_cgroup=proc_cgroup, cgroup_root=root) == installed


def test_v1_limit_binds(root: Path, proc_cgroup: Path) -> None:
    """The memory hierarchy counts, the others do not."""
    proc_cgroup.write_text("8:pids:/x\n4:memory:/docker/1\n0::/\n")
    write(root / "memory" / "docker" / "1", memory__limit_in_bytes="5000000\n")
    write(root / "memory", memory__limit_in_bytes=V1_NO_LIMIT)
    write(root / "pids" / "x", memory__limit_in_bytes="1\n")
    assert memory_limit_bytes(proc_cgroup=proc_cgroup, cgroup_root=root) == 5000000


def test_v1_largest_number_is_no_limit(root: Path, proc_cgroup: Path) -> None:
    """The kernel's number for "none" is not a limit."""
    proc_cgroup.write_text("4:memory:/a\n")
    write(root / "memory" / "a", memory__limit_in_bytes=V1_NO_LIMIT)
    assert cgroup_memory(proc_cgroup=proc_cgroup, cgroup_root=root) == ()


def test_limit_at_the_mount_of_a_container_binds(root: Path, proc_cgroup: Path) -> None:
    """A path of the host that does not exist inside does not hide the container's own limit."""
    proc_cgroup.write_text("0::/../../host/path\n")
    write(root, memory__max="7000000\n")
    assert memory_limit_bytes(proc_cgroup=proc_cgroup, cgroup_root=root) == 7000000


def test_file_cache_counts_as_available(root: Path, proc_cgroup: Path) -> None:
    """5 MB limit, 4 MB used, 3 MB of it cache: 5 - (4 - 3) = 4 MB are left."""
    proc_cgroup.write_text("0::/a\n")
    write(
        root / "a",
        memory__max="5000000\n",
        memory__current="4000000\n",
        memory__stat="anon 1000000\ninactive_file 3000000\n",
    )
    assert available_memory_bytes(proc_cgroup=proc_cgroup, cgroup_root=root) == 4000000


def test_v1_file_cache_counts_as_available(root: Path, proc_cgroup: Path) -> None:
    """As above with the file names of version 1."""
    proc_cgroup.write_text("3:cpu,memory:/a\n")
    write(
        root / "cpu,memory" / "a",
        memory__limit_in_bytes="5000000\n",
        memory__usage_in_bytes="4000000\n",
        memory__stat="inactive_file 1\ntotal_inactive_file 3000000\n",
    )
    assert available_memory_bytes(proc_cgroup=proc_cgroup, cgroup_root=root) == 4000000


def test_system_without_cgroups_has_its_installed_memory(tmp_path: Path) -> None:
    """No /proc/self/cgroup, no limit."""
    missing = tmp_path / "none"
    installed = psutil.virtual_memory().total
    assert memory_limit_bytes(proc_cgroup=missing, cgroup_root=missing) == installed
    assert 0 < available_memory_bytes(proc_cgroup=missing, cgroup_root=missing) <= installed
