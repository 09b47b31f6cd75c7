"""Who computes the products of each module on the CPU: the backend that a run is faster with."""

from __future__ import annotations

from planner.cost_model import Backends, CostModel
from planner.kernels import Backend
from planner.model_spec import ModelSpec, Module
from planner.step_graph import Op, OpKind
from planner.workload import DEFAULT_CHUNK_TOKENS, BatchShape, Workload, decode_shape

# Those that the engine has a path for, on weights that are not quantised: our kernels on packed
# weights, torch on rows.
_RUNNABLE: tuple[Backend, ...] = ("numba", "torch")
# Another backend than our kernels must win by this share, so that noise never changes the choice.
_MARGIN = 0.1
# The ops that a module's backend decides; the model has them in some layers, or in none.
_KINDS: dict[Module, tuple[OpKind, ...]] = {
    "attention": ("attention",),
    "dense": ("dense",),
    "router": ("router",),
    "experts": ("dispatch", "experts", "combine"),
    "head": ("head",),
}


def cpu_backends(spec: ModelSpec, costs: CostModel, wave: Workload) -> Backends:
    """Choose who computes each module wherever it runs on the CPU.

    A matrix lies in memory as one backend reads it, so the choice is for all steps: it has the
    smaller predicted seconds over the prefill and the decode of `wave`. Our kernels win ties within
    10 %. Rates are the profile's; a module is left out where it has those of one backend only.
    """
    modules = {module for layer in spec.layers for module in layer.modules} | {"head"}
    chosen: dict[Module, Backend] = {}
    for module in _KINDS:
        kind = spec.weight_kind(module)
        found = [each for each in costs.hardware.backends(kind) if each in _RUNNABLE]
        is_choice = found == list(_RUNNABLE) and kind not in ("int8", "int4")
        if module not in modules or not is_choice:
            continue
        seconds = {backend: _seconds(module, backend, spec, costs, wave) for backend in _RUNNABLE}
        is_faster = seconds["torch"] < (1 - _MARGIN) * seconds["numba"]
        chosen[module] = "torch" if is_faster else "numba"
    return chosen


def _seconds(
    module: Module, backend: Backend, spec: ModelSpec, costs: CostModel, wave: Workload
) -> float:
    """Seconds of a module's ops in all layers, over a run on the CPU."""
    prompt_tokens = wave.num_seqs * wave.prompt_len
    chunk_tokens = min(DEFAULT_CHUNK_TOKENS, prompt_tokens)
    num_chunks = prompt_tokens / chunk_tokens
    seqs_each = max(1, round(chunk_tokens / wave.prompt_len))
    steps: tuple[tuple[float, BatchShape], ...] = (
        (
            num_chunks,
            BatchShape(
                phase="prefill",
                num_tokens=chunk_tokens,
                num_seqs=seqs_each,
                num_past_tokens=0,
                num_logits=seqs_each,
            ),
        ),
        (wave.output_len - 1, decode_shape(wave.num_seqs, wave.prompt_len + wave.output_len / 2)),
    )
    layers: dict[int | None, int] = {None: 1}
    if module != "head":
        # layers of one shape cost the same
        first = {layer: index for index, layer in reversed(list(enumerate(spec.layers)))}
        layers = {
            first[layer]: spec.layers.count(layer)
            for layer in dict.fromkeys(spec.layers)
            if module in layer.modules
        }
    return sum(
        num_steps
        * num_layers
        * costs.op_cost(
            Op(index=0, kind=kind, lane="cpu", layer=layer, module=module),
            spec,
            shape,
            {module: backend},
        ).seconds
        for num_steps, shape in steps
        for layer, num_layers in layers.items()
        for kind in _KINDS[module]
    )
