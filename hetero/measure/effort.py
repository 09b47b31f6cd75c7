"""Effort: which calls of which kernels are measured, and how long each is repeated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cpu_kernels.experts import expert_bytes
from hetero.measure.attention import AttentionCase, Heads, heads_of
from hetero.measure.experts import ExpertShape
from hetero.measure.linear import Shape, model_shapes
from hetero.model.products import weight_format
from planner.kernels import Backend
from planner.model_spec import Dtype, ModelSpec, WeightKind

_KINDS: tuple[WeightKind, ...] = ("bfloat16", "int8", "int4", "float32")
_TORCH_DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductCase:
    """A product, or experts where `num_experts` is given, each with so many tokens."""

    kind: WeightKind
    shape: tuple[int, int]
    num_tokens: int
    backend: Backend = "numba"
    num_experts: int | None = None

    @property
    def flops(self) -> float:
        """FLOPs of a call."""
        matrices = 1 if self.num_experts is None else 3 * self.num_experts
        return 2.0 * self.num_tokens * self.shape[0] * self.shape[1] * matrices


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What is measured.

    Attributes
    ----------
    budget_s : float
        Seconds that a call is repeated for, at least three times.
    settling_s : float
        Seconds that disturbed calls are measured again for.
    max_flops : float
        Calls of more are left out: their utilisation is that of smaller ones.
    shapes, expert_shapes, heads : tuple
        Of products, experts and attention.
    """

    budget_s: float
    settling_s: float
    max_flops: float
    kinds: tuple[WeightKind, ...] = _KINDS
    tokens: tuple[int, ...]
    torch_tokens: tuple[int, ...]
    gpu_tokens: tuple[int, ...]
    shapes: tuple[Shape, ...]
    torch_shapes: tuple[Shape, ...]
    expert_shapes: tuple[ExpertShape, ...]
    dense_shapes: tuple[ExpertShape, ...]
    expert_tokens: tuple[int, ...]
    heads: tuple[Heads, ...]
    kv_dtypes: tuple[Dtype, ...] = ("bfloat16",)
    contexts: tuple[int, ...]
    num_seqs: tuple[int, ...]
    prompts: tuple[tuple[int, int], ...]  # (new tokens, past)
    widths: tuple[int, ...]
    rows: tuple[int, ...]
    vocabularies: tuple[int, ...]
    copy_bytes: tuple[int, ...]
    has_all_thread_counts: bool = False

    @property
    def widths_and_rows(self) -> list[tuple[int, int]]:
        """Sizes that kernels between products are measured at."""
        return [(width, count) for width in self.widths for count in self.rows]

    def products(self, backend: Backend, kinds: tuple[WeightKind, ...]) -> list[ProductCase]:
        """Dense products on a backend of the CPU."""
        is_own = backend == "numba"
        shapes = self.shapes if is_own else self.torch_shapes
        found = [
            ProductCase(kind=kind, shape=shape, num_tokens=count, backend=backend)
            for kind in kinds
            for shape in dict.fromkeys(shapes)
            for count in (self.tokens if is_own else self.torch_tokens)
        ]
        return [case for case in found if case.flops <= self.max_flops]

    def experts(self, kinds: tuple[WeightKind, ...], max_bytes: int) -> list[ProductCase]:
        """Experts of our kernels; a dense feed-forward is one expert that has all tokens.

        Fewer experts, or a part of one, where they are more than so many bytes.
        """
        found = [
            # more tokens to an expert are measured on fewer of them
            _fitting(kind, shape, count, 16 if count <= 32 else 4, max_bytes)
            for kind in kinds
            for shape in self.expert_shapes
            for count in (self.expert_tokens if kind != "float32" else self.expert_tokens[::2])
        ]
        found += [
            _fitting(kind, shape, count, 1, max_bytes)
            for kind in kinds
            for shape in self.dense_shapes
            for count in self.tokens
        ]
        return [case for case in found if case.flops <= 2 * self.max_flops]

    def torch_experts(
        self, kind: WeightKind, tokens: tuple[int, ...], max_bytes: int
    ) -> list[ProductCase]:
        """Experts of torch, eight or so many as are not more than so many bytes."""
        return [
            _fitting(kind, shape, count, 8, max_bytes)
            for shape in self.expert_shapes
            for count in tokens
        ]

    def decode_cases(self, max_kv_bytes: int) -> list[AttentionCase]:
        """Decode attention whose cache is not more than so many bytes."""
        found = [
            AttentionCase(heads=heads, dtype=dtype, num_seqs=count, context=context - 1)
            for heads in self.heads
            for dtype in self.kv_dtypes
            for count in self.num_seqs
            for context in self.contexts
        ]
        return [case for case in found if case.kv_bytes <= max_kv_bytes]

    def prefill_cases(self, max_kv_bytes: int) -> list[AttentionCase]:
        """Prefill attention of one sequence whose cache is not more than so many bytes."""
        found = [
            AttentionCase(heads=heads, dtype=dtype, context=past, num_tokens=count)
            # what prefill reaches depends on the width of all queries
            for heads in {heads[0] * heads[2]: heads for heads in self.heads}.values()
            for dtype in self.kv_dtypes[:1]
            for count, past in self.prompts
        ]
        found = [case for case in found if case.kv_bytes <= max_kv_bytes]
        return [case for case in found if case.prefill_flops <= self.max_flops]

    def for_model(self, spec: ModelSpec, max_elements: int) -> Effort:
        """A model's own products, experts and heads, in all formats that it can run in.

        A CPU has float32 in the place of float16: `hetero.planning.spec_as_run`.
        """
        if spec.dtype == "float16":
            spec = replace(spec, dtype="float32")
        kinds: set[WeightKind] = {spec.dtype, "int8", "int4"}
        experts: list[ExpertShape] = []
        dense: list[ExpertShape] = []
        for index, layer in enumerate(spec.layers):
            shape = (spec.hidden_size, round(spec.gated_size(index)))
            if not shape[1]:  # an attention that no feed-forward follows
                continue
            (experts if layer.is_moe else dense).append(shape)
        return replace(
            self,
            kinds=tuple(kind for kind in _KINDS if kind in kinds),
            shapes=model_shapes(spec, max_elements=max_elements),
            torch_shapes=model_shapes(spec, max_elements=max_elements),
            expert_shapes=tuple(dict.fromkeys(experts)),
            dense_shapes=tuple(dict.fromkeys(dense)),
            heads=(heads_of(spec),),
            kv_dtypes=(spec.dtype,),
            widths=(spec.hidden_size,),
            vocabularies=(spec.vocab_size,),
        )


def _fitting(
    kind: WeightKind, shape: ExpertShape, num_tokens: int, num_experts: int, max_bytes: int
) -> ProductCase:
    """The experts, or half as many until they fit, and then half of the only one."""
    stored = weight_format("bfloat16" if kind == "float16" else kind)  # of the same size
    hidden, width = shape
    while num_experts * expert_bytes(stored, hidden, width) > max_bytes and num_experts * width > 1:
        if num_experts > 1:
            num_experts //= 2
        else:
            width //= 2
    return ProductCase(
        kind=kind, shape=(hidden, width), num_tokens=num_tokens, num_experts=num_experts
    )


# Prices on two cores, kernels compiled: quick about 8 s, full about 80 s.
QUICK = Effort(
    budget_s=0.012,
    settling_s=0.4,
    max_flops=6e9,
    tokens=(1, 16, 64, 512),
    torch_tokens=(1, 256),
    gpu_tokens=(1, 16, 64, 512),
    shapes=((64, 1024), (1024, 1024), (2048, 2048)),
    torch_shapes=((2048, 2048),),
    expert_shapes=((2048, 768),),
    dense_shapes=((1024, 4096),),
    expert_tokens=(1, 4, 16, 64),
    heads=((32, 8, 128),),
    contexts=(128, 2048),
    num_seqs=(1, 4),
    prompts=((32, 0), (512, 0), (256, 512)),
    widths=(1024,),
    rows=(1, 16, 512),
    vocabularies=(32768,),
    copy_bytes=(4 << 10, 1 << 20, 64 << 20),
)
FULL = Effort(
    budget_s=0.04,
    settling_s=14.0,
    max_flops=36e9,
    tokens=(1, 4, 16, 64, 128, 512, 2048),
    torch_tokens=(1, 4, 16, 64, 512),
    gpu_tokens=(1, 4, 16, 64, 128, 256, 512, 2048),
    shapes=((64, 1024), (512, 1024), (2048, 1024), (2048, 4096), (32768, 1024)),
    torch_shapes=((512, 1024), (2048, 2048), (16384, 1024)),
    expert_shapes=((1024, 512), (2048, 768)),
    dense_shapes=((1024, 4096), (2048, 8192)),
    expert_tokens=(1, 2, 4, 8, 16, 64, 256, 512),
    heads=((32, 8, 128), (16, 16, 128), (16, 8, 64), (32, 4, 128)),
    contexts=(128, 512, 2048, 8192),
    num_seqs=(1, 4, 16),
    prompts=((32, 0), (128, 0), (512, 0), (2048, 0), (128, 512), (512, 2048), (2048, 2048)),
    widths=(1024, 4096),
    rows=(1, 4, 16, 64, 512, 2048),
    vocabularies=(32768, 151936),
    copy_bytes=(4 << 10, 64 << 10, 1 << 20, 8 << 20, 64 << 20, 256 << 20),
    has_all_thread_counts=True,
)
