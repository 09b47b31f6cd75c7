"""Families: which checkpoint tensors make a module, and where each lies in its flat buffer."""

# D hidden, I feed-forward width, E experts, V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.model_spec import Dtype, ModelSpec, Module

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Every role but `down` of the experts starts on a multiple of this: 128 bytes of bfloat16, so that
# vector loads and the GPU's 16-byte accesses are aligned.
ALIGN_ELEMENTS = 64

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlot:
    """A checkpoint tensor, or a part of it, and the element of the flat buffer where it begins.

    Attributes
    ----------
    shape : tuple of int
        Of what is in the buffer.
    axis, begin : int
        Of a part: it has the rows (axis 0) or columns (axis 1) from `begin` on, as many as `shape`
        says.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    axis: int = 0
    begin: int = 0

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSpec:
    """What the model functions call `role`: a strided view of the flat buffer."""

    role: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleLayout:
    """One module as one flat buffer: a copy of the buffer is a copy of the module."""

    slots: tuple[TensorSlot, ...]
    views: tuple[ViewSpec, ...]
    num_elements: int


class _Packer:
    """Lays tensors one after another; mutable while a layout is built."""

    def __init__(self) -> None:
        self.slots: list[TensorSlot] = []
        self.views: list[ViewSpec] = []
        self.end = 0

    def align(self) -> None:
        self.end = -(-self.end // ALIGN_ELEMENTS) * ALIGN_ELEMENTS

    def append(self, name: str, *shape: int, axis: int = 0, begin: int = 0) -> None:
        slot = TensorSlot(name=name, shape=shape, offset=self.end, axis=axis, begin=begin)
        self.slots.append(slot)
        self.end += slot.num_elements

    def view(self, role: str, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.views.append(ViewSpec(role=role, offset=offset, shape=shape, stride=stride))

    def vector(self, role: str, *parts: tuple[str, int]) -> None:
        """A role of vectors joined end to end."""
        self.align()
        start = self.end
        for name, length in parts:
            self.append(name, length)
        self.view(role, start, (self.end - start,), (1,))

    def matrix(
        self, role: str, num_columns: int, *parts: tuple[str, int], axis: int = 0, begin: int = 0
    ) -> None:
        """A role of matrices of one width, their rows joined; of parts as `TensorSlot` has them."""
        self.align()
        start = self.end
        for name, num_rows in parts:
            self.append(name, num_rows, num_columns, axis=axis, begin=begin)
        shape = ((self.end - start) // num_columns, num_columns)
        self.view(role, start, shape, (num_columns, 1))

    def layout(self) -> ModuleLayout:
        self.align()
        return ModuleLayout(slots=tuple(self.slots), views=tuple(self.views), num_elements=self.end)


def module_layout(
    spec: ModelSpec,
    module: Module,
    layer: int | None = None,
    *,
    with_matrix: bool = True,
    experts: Sequence[int] | None = None,
    columns: range | None = None,
) -> ModuleLayout:
    """How a module is packed.

    `with_matrix=False` leaves the matrix of a tied head out; `experts` are those of the layer's
    that are in it, in this order, and `columns` those of a dense feed-forward: all where they are
    left out.
    """
    packer = _Packer()
    if module == "embedding":
        packer.matrix("weight", spec.hidden_size, (EMBEDDING, spec.vocab_size))
    elif module == "head":
        packer.vector("norm", ("model.norm.weight", spec.hidden_size))
        if with_matrix:
            name = EMBEDDING if spec.is_tied else HEAD
            packer.matrix("weight", spec.hidden_size, (name, spec.vocab_size))
    else:
        assert layer is not None, f"{module} lies inside a layer"
        if module == "experts":
            every = range(spec.layers[layer].num_experts)
            _experts(packer, spec, layer, every if experts is None else experts)
        elif module == "dense":
            _dense(packer, spec, layer, columns)
        else:
            pack = {"attention": _attention, "router": _router}[module]
            pack(packer, spec, layer)
    return packer.layout()


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model must hold."""
    return {
        slot.name: slot.shape
        for module, layer in _modules(spec)
        for slot in module_layout(spec, module, layer).slots
    }


def views(layout: ModuleLayout, flat: Tensor) -> dict[str, Tensor]:
    """The roles of a module as views of its flat buffer; nothing is copied."""
    start = flat.storage_offset()
    return {
        view.role: flat.as_strided(view.shape, view.stride, start + view.offset)
        for view in layout.views
    }


def _modules(spec: ModelSpec) -> Iterator[tuple[Module, int | None]]:
    yield "embedding", None
    for index, layer in enumerate(spec.layers):
        for module in layer.modules:
            yield module, index
    yield "head", None


def _attention(packer: _Packer, spec: ModelSpec, layer: int) -> None:
    prefix = f"model.layers.{layer}"
    sizes = {"q": spec.q_size, "k": spec.kv_size, "v": spec.kv_size}
    of = f"{prefix}.self_attn"
    packer.vector("input_norm", (f"{prefix}.input_layernorm.weight", spec.hidden_size))
    qkv = [(f"{of}.{name}_proj.weight", size) for name, size in sizes.items()]
    packer.matrix("qkv", spec.hidden_size, *qkv)
    if spec.has_qkv_bias:
        packer.vector("qkv_bias", *((f"{of}.{name}_proj.bias", n) for name, n in sizes.items()))
    packer.matrix("o", spec.q_size, (f"{of}.o_proj.weight", spec.hidden_size))
    if spec.has_o_bias:
        packer.vector("o_bias", (f"{of}.o_proj.bias", spec.hidden_size))
    if spec.qk_norm != "none":
        is_full = spec.qk_norm == "full"
        packer.vector("q_norm", (f"{of}.q_norm.weight", spec.q_size if is_full else spec.head_dim))
        packer.vector("k_norm", (f"{of}.k_norm.weight", spec.kv_size if is_full else spec.head_dim))


def _post_attention_norm(packer: _Packer, spec: ModelSpec, layer: int) -> None:
    name = f"model.layers.{layer}.post_attention_layernorm.weight"
    packer.vector("norm", (name, spec.hidden_size))


def _router(packer: _Packer, spec: ModelSpec, layer: int) -> None:
    _post_attention_norm(packer, spec, layer)
    name = f"{_moe_prefix(spec, layer)}.gate.weight"
    packer.matrix("gate", spec.hidden_size, (name, spec.layers[layer].num_experts))


def expert_views(spec: ModelSpec, layer: int, experts_EN: Tensor) -> dict[str, Tensor]:
    """The roles of some experts of a layer, each in its row as `module_layout` puts it."""
    hidden, width = spec.hidden_size, spec.layers[layer].intermediate_size
    gate_up_size = 2 * width * hidden
    return {
        "gate_up": experts_EN[:, :gate_up_size].unflatten(1, (2 * width, hidden)),
        "down": experts_EN[:, gate_up_size : spec.expert_params(layer)].unflatten(
            1, (hidden, width)
        ),
    }


def _experts(packer: _Packer, spec: ModelSpec, layer: int, experts: Sequence[int]) -> None:
    hidden, width = spec.hidden_size, spec.layers[layer].intermediate_size
    is_mixtral = spec.architecture == "MixtralForCausalLM"
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    for expert in experts:
        prefix = f"{_moe_prefix(spec, layer)}.experts.{expert}"
        packer.append(f"{prefix}.{gate}.weight", width, hidden)
        packer.append(f"{prefix}.{up}.weight", width, hidden)
        packer.append(f"{prefix}.{down}.weight", hidden, width)
    # One expert is one range, so that an expert is one copy too: its matrices are contiguous, and
    # the step from expert to expert is the whole of it.
    stride = spec.expert_params(layer)
    packer.view("gate_up", 0, (len(experts), 2 * width, hidden), (stride, hidden, 1))
    packer.view("down", 2 * width * hidden, (len(experts), hidden, width), (stride, width, 1))


def _moe_prefix(spec: ModelSpec, layer: int) -> str:
    block = "block_sparse_moe" if spec.architecture == "MixtralForCausalLM" else "mlp"
    return f"model.layers.{layer}.{block}"


def _dense(packer: _Packer, spec: ModelSpec, layer: int, columns: range | None) -> None:
    """Some columns are rows of gate and up, and columns of down."""
    hidden, whole = spec.hidden_size, range(spec.layers[layer].intermediate_size)
    columns = columns or whole
    width, begin, of = len(columns), columns.start, f"model.layers.{layer}.mlp"
    _post_attention_norm(packer, spec, layer)
    gate_up = [(f"{of}.{name}_proj.weight", width) for name in ("gate", "up")]
    packer.matrix("gate_up", hidden, *gate_up, begin=begin)
    if spec.has_mlp_bias:
        packer.vector(
            "gate_up_bias", (f"{of}.gate_proj.bias", width), (f"{of}.up_proj.bias", width)
        )
    axis = 0 if columns == whole else 1  # all rows lie in the file as they are wanted
    packer.matrix("down", width, (f"{of}.down_proj.weight", hidden), axis=axis, begin=begin)
    if spec.has_mlp_bias:
        packer.vector("down_bias", (f"{of}.down_proj.bias", hidden))
