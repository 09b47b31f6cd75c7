"""Fingerprint: which machine and which versions a measured profile belongs to."""

from __future__ import annotations

from typing import Literal

import msgspec

# State of transparent huge pages.
HugePages = Literal["always", "madvise", "never", "unknown"]


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which machine and which versions a measured profile belongs to.

    Attributes
    ----------
    instructions : str
        Level of vector instructions that kernels were compiled for.
    memory_bytes : int
        The tightest of installed memory and the limits of containers.
    num_numa_nodes : int, optional
        Nodes that have cores of the process; None where the system tells of none.
    pcie : str, optional
        Generation and width of the GPU's link, as "4.0 x16"; None without a GPU.
    torch, numba, hetero : str
        Versions; "not installed" where there is none.

    Notes
    -----
    "unknown" stands for what a system does not tell, and for what was not written down yet when
    the profile was made.
    """

    cpu: str
    instructions: str = "unknown"
    num_cores: int
    num_numa_nodes: int | None = None
    memory_bytes: int
    huge_pages: HugePages = "unknown"
    gpu: str | None
    gpu_uuid: str | None
    pcie: str | None = "unknown"
    driver: str | None
    torch: str
    numba: str
    hetero: str
