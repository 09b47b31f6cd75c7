"""The CPU kernels' layers give what the torch functions give, in float32 and in bfloat16."""

# T tokens, D hidden, S sequences

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hetero.model import attention, cpu_layers, head, mlp, moe
from hetero.model.attention import as_array
from hetero.model.batch import BatchTensors
from hetero.model.cpu_layers import as_tensor
from hetero.model.cpu_workspace import CpuKernels
from hetero.model.families import module_layout
from hetero.model.packed import PackedModule, pack_module
from hetero.model.rotary import rotary_frequencies, rotary_rows
from planner.model_spec import ModelSpec, Module
from tests.hetero.model.packed import checkpoint_tensors, packed
from tests.hetero.model.paged import (
    BLOCK_SIZE,
    Pages,
    empty_pages,
    make_batch,
    shuffled_tables,
)
from tests.tiny_models import TINY_MODELS, TINY_MOE_MODELS, tiny_model, tiny_spec

NUM_BLOCKS = 40
# The window of the tiny models is 7: below, far above and just above it.
LENGTHS = (3, 19, 8)
# Of the models with experts one has a dense layer, the first.
DENSE_MODELS = (*(name for name in TINY_MODELS if name not in TINY_MOE_MODELS), "qwen3-moe")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
every_thread_count = pytest.mark.parametrize("num_threads", [1, 2])


class Twins:
    """A tiny model's modules as torch has them and as the kernels do."""

    def __init__(self, name: str, dtype: torch.dtype = FLOAT32, num_threads: int = 2) -> None:
        model = tiny_model(name, dtype=dtype)
        self.dtype = dtype
        self.spec: ModelSpec = tiny_spec(model)
        self.tensors = checkpoint_tensors(model, self.spec)
        inv_freq_F = rotary_frequencies(self.spec.rope, self.spec.head_dim, torch.device("cpu"))
        self.inv_freq_F = inv_freq_F
        self.kernels = CpuKernels(num_threads=num_threads, inv_freq_F=inv_freq_F.numpy())

    def torch(self, module: Module, layer: int | None = 1) -> dict[str, Tensor]:
        return packed(self.spec, self.tensors, module, layer)

    def exact(self, module: Module, layer: int | None = 1) -> dict[str, Tensor]:
        """The same weights for arithmetic in float32."""
        return {role: weight.float() for role, weight in self.torch(module, layer).items()}

    def packed(self, module: Module, layer: int | None = 1) -> PackedModule:
        layout = module_layout(self.spec, module, layer)
        return pack_module(
            self.spec, module, layout, lambda slot: as_array(self.tensors[slot.name]), num_threads=2
        )

    def random(self, num_tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(num_tokens)
        return torch.randn(num_tokens, 60, generator=generator).to(self.dtype)


def assert_no_worse(actual: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Float32: equal but for the order of sums. bfloat16: as near to float32 as torch is."""
    if theirs.dtype == exact.dtype == FLOAT32:
        torch.testing.assert_close(actual, theirs, rtol=1e-5, atol=1e-5)
        return

    def distance(values: Tensor) -> float:
        return (values.double() - exact).square().mean().sqrt().item()

    assert distance(actual) <= 1.5 * distance(theirs)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", DENSE_MODELS)
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_dense_layers_are_those_of_torch(name: str, dtype: torch.dtype, num_tokens: int) -> None:
    """With biases and without; layers of experts have none."""
    twins = Twins(name, dtype)
    x_TD, eps = twins.random(num_tokens), twins.spec.norm_eps

    out = cpu_layers.dense_layer(
        as_array(x_TD), twins.packed("dense", 0), twins.kernels, twins.spec
    )

    theirs = mlp.dense_layer(x_TD, twins.torch("dense", 0), eps)
    exact = mlp.dense_layer(x_TD.float(), twins.exact("dense", 0), eps)
    assert as_tensor(out).dtype == dtype
    assert_no_worse(as_tensor(out), theirs, exact)


def torch_experts(twins: Twins, routing: moe.Routing, weights: dict[str, Tensor]) -> Tensor:
    return moe.experts(moe.dispatch(routing, 5), weights, method="loop")


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", TINY_MOE_MODELS)
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_expert_layers_are_those_of_torch(name: str, dtype: torch.dtype, num_tokens: int) -> None:
    """Routing, experts and the sum with the residual, each on what torch routed."""
    twins = Twins(name, dtype)
    spec, layer = twins.spec, twins.spec.layers[1]
    x_TD, top_k = twins.random(num_tokens), layer.num_experts_per_token
    options: dict[str, Any] = {
        "norm_eps": spec.norm_eps,
        "top_k": top_k,
        "norm_topk_prob": spec.norm_topk_prob,
    }
    theirs = moe.route(x_TD, twins.torch("router"), **options)

    found = cpu_layers.route_layer(
        as_array(x_TD), twins.packed("router"), twins.kernels, spec, top_k
    )
    ours = cpu_layers.CpuRouting.of(theirs)
    y_TD = cpu_layers.experts_layer(ours, twins.packed("experts"), twins.kernels)
    out = cpu_layers.combine(as_array(x_TD), y_TD, twins.kernels)

    def scores(routing: moe.Routing) -> Tensor:
        weights_Tk = routing.expert_weights_Tk.float()
        return torch.zeros(num_tokens, 5).scatter(1, routing.expert_ids_Tk, weights_Tk)

    # bfloat16: torch rounds its logits, 2**-8 of values of order 1
    tolerance, rounding = (1e-5, 2.0**-21) if dtype == FLOAT32 else (2e-2, 2.0**-7)
    # another order of one sum: a rounding or two, which bfloat16 hides but at a tie
    torch.testing.assert_close(found.tensors().normed_TD, theirs.normed_TD, rtol=rounding, atol=0)
    torch.testing.assert_close(
        scores(found.tensors()), scores(theirs), rtol=tolerance, atol=tolerance
    )
    exact_routing = moe.Routing(
        normed_TD=theirs.normed_TD.float(),
        expert_ids_Tk=theirs.expert_ids_Tk,
        expert_weights_Tk=theirs.expert_weights_Tk.float(),
    )
    assert_no_worse(
        as_tensor(out),
        moe.combine(x_TD, torch_experts(twins, theirs, twins.torch("experts"))),
        moe.combine(x_TD.float(), torch_experts(twins, exact_routing, twins.exact("experts"))),
    )


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "olmoe"])
def test_the_head_is_that_of_torch(name: str, dtype: torch.dtype) -> None:
    """Logits in float32, which torch rounds to the model's format before."""
    twins = Twins(name, dtype)
    x_LD, eps = twins.random(4), twins.spec.norm_eps

    logits = cpu_layers.head_layer(as_array(x_LD), twins.packed("head", None), twins.kernels, eps)

    theirs = head.head(x_LD, twins.torch("head", None), eps)
    assert logits.dtype == FLOAT32
    if dtype == FLOAT32:
        torch.testing.assert_close(logits, theirs, rtol=1e-5, atol=1e-5)
    else:
        exact = head.head(x_LD.float(), twins.exact("head", None), eps)
        assert_no_worse(logits.double(), theirs.to(dtype), exact)


class Attention:
    """One attention layer, by torch in a format, or by the kernels."""

    def __init__(self, twins: Twins, *, by: str) -> None:
        spec = twins.spec
        self.twins, self.by = twins, by
        self.dtype = FLOAT32 if by == "exact" else twins.dtype
        self.window = spec.layers[1].window
        self.pages: Pages = empty_pages(NUM_BLOCKS, spec.num_kv_heads, spec.head_dim, self.dtype)
        self.weights = twins.exact("attention") if by == "exact" else twins.torch("attention")
        self.packed = twins.packed("attention")

    def run(self, x_TD: Tensor, batch: BatchTensors) -> Tensor:
        spec, kernels = self.twins.spec, self.twins.kernels
        windows = {layer.window for layer in spec.layers}
        if self.by == "kernels":
            step = cpu_layers.cpu_attention_step(
                batch, kernels, block_size=BLOCK_SIZE, windows=windows
            )
            out = cpu_layers.attention_layer(
                as_array(x_TD), self.packed, self.pages, step, kernels, spec, self.window
            )
            return as_tensor(out)
        return attention.attention_layer(
            x_TD.to(self.dtype),
            self.weights,
            self.pages,
            *rotary_rows(batch.positions_T, self.twins.inv_freq_F, self.dtype),
            attention.attention_step(
                batch,
                dtype=self.dtype,
                block_size=BLOCK_SIZE,
                windows=windows,
                kernel="torch",
            ),
            spec,
            window=self.window,
            num_threads=1,
        )

    def prefill_and_decode(self) -> list[Tensor]:
        """Prompts in two chunks, the second of one token for one sequence, then two steps."""
        tables = shuffled_tables(len(LENGTHS), 6, num_blocks=NUM_BLOCKS, seed=1)
        sequences = [self.twins.random(length) for length in LENGTHS]
        outputs = []
        past = [0] * len(LENGTHS)
        for ends in ([1, 11, 5], [n - 2 for n in LENGTHS]):
            ends = [max(a, b) for a, b in zip(past, ends, strict=True)]
            chosen = [i for i in range(len(LENGTHS)) if ends[i] > past[i]]
            batch = make_batch(
                "prefill",
                [[0] * (ends[i] - past[i]) for i in chosen],
                [past[i] for i in chosen],
                tables[chosen],
            )
            x_TD = torch.cat([sequences[i][past[i] : ends[i]] for i in chosen])
            outputs.append(self.run(x_TD, batch))
            past = list(ends)
        for _ in range(2):
            batch = make_batch("decode", [[0]] * len(LENGTHS), past, tables)
            x_TD = torch.stack([x[at] for x, at in zip(sequences, past, strict=True)])
            outputs.append(self.run(x_TD, batch))
            past = [at + 1 for at in past]
        return outputs


@every_thread_count
@pytest.mark.parametrize("name", TINY_MODELS)
def test_attention_is_that_of_torch(name: str, num_threads: int) -> None:
    """Chunked prompts and decode steps over shuffled pages: outputs, keys and values."""
    twins = Twins(name, num_threads=num_threads)
    ours, theirs = Attention(twins, by="kernels"), Attention(twins, by="torch")

    outputs = ours.prefill_and_decode()

    for actual, expected in zip(outputs, theirs.prefill_and_decode(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pages.key, theirs.pages.key, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pages.value, theirs.pages.value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_attention_in_bfloat16_is_no_worse_than_that_of_torch(name: str) -> None:
    """Nearer to float32 arithmetic on the same weights, or nearly as near."""
    twins = Twins(name, BFLOAT16)

    ours, theirs, exact = (
        torch.cat(Attention(twins, by=by).prefill_and_decode())
        for by in ("kernels", "torch", "exact")
    )

    assert_no_worse(ours, theirs, exact)


def test_arrays_and_tensors_are_the_same_memory() -> None:
    """bfloat16 as its bits and back; float32 as it is."""
    for dtype in (FLOAT32, BFLOAT16):
        tensor = torch.zeros(3, dtype=dtype)
        again = as_tensor(as_array(tensor))
        tensor[1] = 2
        assert again.dtype == dtype
        assert again.tolist() == [0, 2, 0]
