"""KernelCall: one call of a kernel, the work that it is, and the least seconds it can take."""

# H query heads, G KV heads, K head dim, D hidden, I expert width, E experts

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from planner.model_spec import DTYPE_BYTES, WeightKind, matrix_bytes

# What a sample is of and an op is made of:
#   read               all of `shape = (bytes,)`, and nothing else
#   linear             y = x W^T, `shape = (rows, columns)` of W, for `num_tokens` rows of x
#   experts            gate, up, activation and down, weighted: `shape = (experts with tokens, D,
#                      I)`, `num_tokens` for each of them
#   decode_attention   `shape = (H, G, K)`, one new token of each of `num_seqs`; `context` counts it
#   prefill_attention  `shape = (H, G, K)`, `num_tokens` new ones of a sequence after `context`
#   norm, rotary, residual, elementwise   `shape = (width,)` for `num_tokens` rows; rotary prepares
#                      queries and keys and writes the cache
#   route              the top k of `shape = (E, k)` for `num_tokens` rows
#   embed              the Python of looking up `num_tokens` rows, which are elements of their own
#   sample             a token of each of `num_seqs` rows of `shape = (vocabulary,)` logits
#                      with the Python around it
#   op                 what an op costs in Python beside its kernels
#   step               what a step costs beside its ops, by `num_seqs`
#   handover           one piece of work given to another lane and waited for
#   copy               `shape = (bytes,)` over the link
Kernel = Literal[
    "read",
    "linear",
    "experts",
    "decode_attention",
    "prefill_attention",
    "norm",
    "rotary",
    "residual",
    "elementwise",
    "route",
    "embed",
    "sample",
    "op",
    "step",
    "handover",
    "copy",
]
# Who computes: our kernels on packed weights, torch on rows, Intel's extension of torch; what the
# accelerator does with quantised panels.
Backend = Literal["numba", "torch", "ipex", "panels"]
# Those that may compute on a CPU.
BACKENDS: tuple[Backend, ...] = ("numba", "torch", "ipex")
Resource = Literal["compute", "memory", "dequant", "launch", "link"]
HostMemory = Literal["pinned", "pageable"]
# What calls of a kernel must share to be alike: query heads to a KV head, whether there is a past,
# the host's memory.
Family = float | bool | HostMemory | None

# Numbers of `shape` that each kernel has.
SHAPE_LENGTHS: dict[Kernel, int] = {
    "read": 1,
    "linear": 2,
    "experts": 3,
    "decode_attention": 3,
    "prefill_attention": 3,
    "norm": 1,
    "rotary": 1,
    "residual": 1,
    "elementwise": 1,
    "route": 2,
    "embed": 0,
    "sample": 1,
    "op": 0,
    "step": 0,
    "handover": 0,
    "copy": 1,
}


# Kernels whose rows are sequences; those of others are tokens, or bytes.
_BY_SEQS: frozenset[Kernel] = frozenset({"decode_attention", "sample", "step", "op", "handover"})


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCall:
    """One call of a kernel; the comment on `Kernel` says what its numbers mean.

    Counts may be fractions: means over a step, expected numbers of experts.
    """

    kernel: Kernel
    shape: tuple[float, ...] = ()
    format: WeightKind = "float32"
    backend: Backend = "numba"
    num_tokens: float = 1.0
    num_seqs: float = 1.0
    context: float = 0.0
    memory: HostMemory | None = None

    @property
    def count(self) -> float:
        """How many equal pieces the call is made of: its experts, or 1."""
        return self.shape[0] if self.kernel == "experts" else 1.0

    @property
    def axes(self) -> tuple[float, float]:
        """Where the call lies among samples of its kernel: by rows, and by size of a piece."""
        if self.kernel == "experts":
            return self.num_tokens, self.shape[1] * self.shape[2]
        if self.kernel == "decode_attention":
            return self.num_seqs, self.context * self.shape[1] * self.shape[2]
        if self.kernel == "prefill_attention":
            return self.num_tokens, self.shape[0] * self.shape[2]
        if self.kernel in _BY_SEQS:
            return self.num_seqs, self.shape[0] if self.shape else 1.0
        if self.kernel in ("read", "copy"):
            return self.shape[0], 1.0
        size = 1.0
        for number in self.shape:
            size *= number
        return self.num_tokens, size

    def with_rows(self, rows: float) -> KernelCall:
        """The same call for so many rows, the first of its `axes`."""
        if self.kernel in ("read", "copy"):
            return replace(self, shape=(rows,))
        is_by_seqs = self.kernel in _BY_SEQS
        return replace(self, num_seqs=rows) if is_by_seqs else replace(self, num_tokens=rows)

    @property
    def family(self) -> Family:
        """Calls of one family are interpolated between each other.

        What decode attention reaches of memory's rate depends on the query heads that share a KV
        head. A prompt whose past lies in the cache is another kernel than one that begins.
        """
        if self.kernel == "decode_attention":
            return self.shape[0] / self.shape[1]
        if self.kernel == "prefill_attention":
            return self.context > 0
        return self.memory

    @property
    def flops(self) -> float:
        """Floating point operations of products (2 per multiply-add)."""
        if self.kernel == "linear":
            return 2.0 * self.num_tokens * self.shape[0] * self.shape[1]
        if self.kernel == "experts":
            return 6.0 * self.num_tokens * self.shape[0] * self.shape[1] * self.shape[2]
        if self.kernel == "prefill_attention":
            # causal: 4 H K (c p + c (c + 1) / 2)
            pairs = self.num_tokens * (self.context + (self.num_tokens + 1) / 2)
            return 4.0 * self.shape[0] * self.shape[2] * pairs
        return 0.0

    @property
    def num_weights(self) -> float:
        """Weights that are read, each once."""
        if self.kernel == "linear":
            return self.shape[0] * self.shape[1]
        if self.kernel == "experts":
            return 3.0 * self.shape[0] * self.shape[1] * self.shape[2]
        return 0.0

    @property
    def bytes(self) -> float:
        """Bytes that come from memory whatever the caches hold: weights, keys and values."""
        if self.kernel in ("read", "copy"):
            return self.shape[0]
        if self.kernel == "linear":
            return matrix_bytes(self.format, int(self.shape[0]), int(self.shape[1]))
        if self.kernel == "experts":
            num, hidden, width = self.shape[0], int(self.shape[1]), int(self.shape[2])
            each = 2 * matrix_bytes(self.format, width, hidden)
            return num * (each + matrix_bytes(self.format, hidden, width))
        if self.kernel == "decode_attention":
            assert self.format != "int8" and self.format != "int4"
            kv_bytes = 2.0 * self.shape[1] * self.shape[2] * DTYPE_BYTES[self.format]
            return self.num_seqs * self.context * kv_bytes
        return 0.0

    @property
    def num_elements(self) -> float:
        """Elements of kernels that go over an array once, from cache to cache."""
        if self.kernel in ("norm", "rotary", "residual", "elementwise"):
            return self.num_tokens * self.shape[0]
        if self.kernel == "route":
            return self.num_tokens * self.shape[0]
        if self.kernel == "sample":
            return self.num_seqs * self.shape[0]
        return 0.0
