"""Where llama.cpp, FlexGen and Accelerate would put a model, as placements."""

# What our executor does better than a rival, overlap above all, its placement is priced with: the
# comparison is of where things are put, not of who runs them.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from planner.device import DeviceProfile
from planner.hardware import HardwareProfile
from planner.memory import available_bytes, needs
from planner.model_spec import ModelSpec
from planner.placement import (
    ON_CPU,
    ON_GPU,
    STREAMED,
    Device,
    LayerPlacement,
    ModulePlacement,
    Placement,
    TierPlacement,
)
from planner.workload import DEFAULT_CHUNK_TOKENS, PHASES, Phase, Workload

# llama.cpp's: bytes of the card that --fit leaves free, tokens of a step (-ub), and from how many
# on weights on the CPU are copied to the GPU for their products.
_LLAMA_MARGIN_BYTES = 1 << 30
_LLAMA_STEP_TOKENS = 512
_LLAMA_OFFLOAD_TOKENS = 32
_PERCENT = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """A rival's placement, or why it has none."""

    placement: Placement | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A model on a machine, for sequences that run at once."""

    spec: ModelSpec
    hardware: HardwareProfile
    workload: Workload

    @property
    def gpu(self) -> DeviceProfile:
        assert self.hardware.gpu is not None
        return self.hardware.gpu

    def why_too_large(
        self, placement: Placement, device: Device, budget_bytes: int | None = None
    ) -> str:
        """What a placement needs more than a device has; empty where it fits.

        The budget is ours where it is left out.
        """
        need = needs(self.spec, placement, self.workload, self.hardware).get(device)
        if need is None:  # a machine without a GPU, and a placement that uses none
            return ""
        limit = need.available_bytes if budget_bytes is None else budget_bytes
        if need.needed_bytes <= limit:
            return ""
        return (
            f"needs {need.needed_bytes / 1e9:.2f} GB on the {device}, "
            f"{limit / 1e9:.2f} GB available"
        )

    def most_that_fits(
        self, high: int, at: Callable[[int], Placement], gpu_bytes: int | None = None
    ) -> Rival:
        """The placement with the largest number, 0 to `high`, that the GPU has room for.

        The more is on the GPU the less is on the CPU, so that no smaller one fits if this does not.
        """
        low = -1
        if not self.why_too_large(at(high), "gpu", gpu_bytes):
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            if self.why_too_large(at(middle), "gpu", gpu_bytes):
                high = middle
            else:
                low = middle
        found = at(max(0, low))
        reason = self.why_too_large(found, "gpu", gpu_bytes) or self.why_too_large(found, "cpu")
        return Rival(placement=None if reason else found, reason=reason)


def llama_fit(asked: Asked) -> Rival:
    """llama.cpp with `--fit`, its default since pull request 16653: by memory alone.

    Everything on the GPU where that fits. Otherwise all tensors but the experts are there, and the
    experts of as many layers as fit, the first ones; the others are on the CPU. Where not even that
    fits, layers without their experts go to the GPU back to front. 1 GiB of the card stays free, or
    as much as a plan leaves free where that is more.
    The head goes with the last layer, token embeddings stay on the CPU. Weights on the CPU are
    copied to the GPU for the products of steps of 32 tokens or more (GGML_OP_OFFLOAD_MIN_BATCH).

    Differences: its context is the workload's, which llama.cpp could lower; the last layer that
    does not fit whole is not divided by tensors (gate and down); copies are double-buffered and
    overlap with computing, and bring all experts of a layer where llama.cpp brings those that are
    chosen; llama.cpp reads what the CPU's memory does not hold from disk. Buffers for compute are
    ours.
    """
    spec = asked.spec
    moe = [index for index, layer in enumerate(spec.layers) if layer.is_moe]
    all_layers = frozenset(range(spec.num_layers))
    budget = max(0, asked.gpu.memory_bytes - asked.gpu.reserved_bytes - _LLAMA_MARGIN_BYTES)
    # never more than a plan may use: both place the model in the same memory
    budget = min(budget, available_bytes(asked.hardware, "gpu"))

    def with_experts(count: int) -> Placement:
        return _llama_placement(asked, all_layers, frozenset(moe[:count]))

    def last_layers(count: int) -> Placement:
        last = frozenset(range(spec.num_layers - count, spec.num_layers))
        return _llama_placement(asked, last, frozenset())

    if moe and not asked.why_too_large(with_experts(0), "gpu", budget):
        return asked.most_that_fits(len(moe), with_experts, budget)
    return asked.most_that_fits(spec.num_layers, last_layers, budget)


def _llama_placement(asked: Asked, dense: frozenset[int], whole: frozenset[int]) -> Placement:
    """Layers that are on the GPU but for their experts, and those whose experts are there too."""
    spec, workload = asked.spec, asked.workload
    num_tokens = min(_LLAMA_STEP_TOKENS, workload.num_seqs * workload.prompt_len)

    def tier(phase: Phase) -> TierPlacement:
        rows = num_tokens if phase == "prefill" else workload.num_seqs
        elsewhere = STREAMED if rows >= _LLAMA_OFFLOAD_TOKENS else ON_CPU
        layers = []
        for index, layer in enumerate(spec.layers):
            where = ON_GPU if index in dense else ON_CPU
            is_whole = index in whole if layer.is_moe else index in dense
            layers.append(
                LayerPlacement(
                    attention=where,
                    router=where if layer.is_moe else None,
                    ffn=ON_GPU if is_whole else elsewhere,
                )
            )
        return TierPlacement(
            phase=phase,
            strategy="llama-fit",
            cut=sum(layer.ffn.lives == "cpu" for layer in layers),
            max_num_tokens=_LLAMA_STEP_TOKENS,
            embedding=ON_CPU,
            layers=tuple(layers),
            head=ON_GPU if dense else ON_CPU,
        )

    return Placement(prefill=tier("prefill"), decode=tier("decode"))


def flexgen(asked: Asked) -> Rival:
    """FlexGen (Sheng et al. 2023): a percentage of the weights resident, the others streamed.

    The largest whole percentage that fits, evenly in each kind of module: of attention and dense
    feed-forward every so many layers, of experts so many of each layer. The KV cache is on the GPU
    where it fits with any share, else on the CPU, which then computes scores and values in decode.

    Differences: the share is found by memory, where FlexGen solves a linear program over its cost
    model (and over the block of batches, which is the workload's here); FlexGen divides by tensors
    within a layer; attention of other kinds than the ordinary one is on the CPU whole, in both
    phases; nothing is on disk or compressed.
    """
    kv: Device = "gpu"
    if asked.why_too_large(_flexgen_placement(asked, 0, "gpu"), "gpu"):
        kv = "cpu"
    return asked.most_that_fits(_PERCENT, lambda share: _flexgen_placement(asked, share, kv))


def _flexgen_placement(asked: Asked, percent: int, kv: Device) -> Placement:
    spec, is_on_cpu = asked.spec, kv == "cpu"
    seen = dict.fromkeys(spec.layers, 0)
    layers = []
    for layer in spec.layers:
        # The place among the layers of its kind: resident where the share passes a whole number.
        place = seen[layer]
        seen[layer] += 1
        is_resident = (place + 1) * percent // _PERCENT > place * percent // _PERCENT
        where = ON_GPU if is_resident else STREAMED
        is_ordinary = layer.attention is None
        layers.append(
            LayerPlacement(
                attention=where if is_ordinary or not is_on_cpu else ON_CPU,
                kv_on_cpu=is_on_cpu and is_ordinary,
                router=where if layer.is_moe else None,
                ffn=_streamed_but(layer.num_experts * percent // _PERCENT, layer.num_experts)
                if layer.is_moe
                else where,
            )
        )
    return _of_both("flexgen", _PERCENT - percent, ON_CPU, tuple(layers))


def _streamed_but(num_resident: int, num_experts: int) -> ModulePlacement:
    """Experts that are streamed, but for those that are resident."""
    if num_resident == num_experts:
        return ON_GPU
    return replace(STREAMED, num_resident=num_resident)


def accelerate(asked: Asked) -> Rival:
    """Accelerate's `infer_auto_device_map`: modules in order until the GPU is full, then streamed.

    The embedding, then whole layers from the first on; those behind are copied to the GPU for each
    use. Attention and its KV cache are always on the GPU.

    Differences: Accelerate fills by the weights alone and runs out of memory later, here caches and
    activations count; the head, which is last in its order, is resident, as ours is not streamed;
    copies are double-buffered from pinned memory and overlap with computing, where its hooks copy
    before each module and wait; prompts are computed in steps of 2048 tokens, not all at once.
    """
    spec = asked.spec

    def at(num_resident: int) -> Placement:
        return _accelerate_placement(spec, num_resident)

    return asked.most_that_fits(spec.num_layers, at)


def _accelerate_placement(spec: ModelSpec, num_resident: int) -> Placement:
    layers = []
    for index, layer in enumerate(spec.layers):
        where = ON_GPU if index < num_resident else STREAMED
        router = where if layer.is_moe else None
        layers.append(LayerPlacement(attention=where, ffn=where, router=router))
    return _of_both("accelerate", spec.num_layers - num_resident, ON_GPU, tuple(layers))


def _of_both(
    name: str, cut: int, embedding: ModulePlacement, layers: tuple[LayerPlacement, ...]
) -> Placement:
    """The same layers in both phases, the head on the GPU."""
    in_prefill = tuple(replace(layer, kv_on_cpu=False) for layer in layers)
    prefill, decode = (
        TierPlacement(
            phase=phase,
            strategy=name,
            cut=cut,
            max_num_tokens=DEFAULT_CHUNK_TOKENS,
            embedding=embedding,
            layers=layers if phase == "decode" else in_prefill,
            head=ON_GPU,
        )
        for phase in PHASES
    )
    return Placement(prefill=prefill, decode=decode)


# The rules by name, each of a model on a machine with an accelerator.
ENGINES: dict[str, Callable[[Asked], Rival]] = {
    "llama-fit": llama_fit,
    "flexgen": flexgen,
    "accelerate": accelerate,
}
