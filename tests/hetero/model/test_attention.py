"""Attention of one layer against transformers, over shuffled pages and ragged batches."""

# T tokens, D hidden

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hetero.model.attention import (
    AttentionKernel,
    AttentionStep,
    attention_layer,
    attention_output,
    attention_step,
    project,
)
from hetero.model.batch import BatchTensors
from hetero.model.cpu_layers import attend_projected, cpu_attention_step
from hetero.model.cpu_workspace import CpuKernels
from hetero.model.rotary import rotary_frequencies, rotary_rows
from planner.model_spec import ModelSpec
from tests.hetero.model.packed import checkpoint_tensors, packed
from tests.hetero.model.paged import (
    BLOCK_SIZE,
    Pages,
    empty_pages,
    make_batch,
    shuffled_tables,
)
from tests.tiny_models import TINY_MODELS, tiny_model, tiny_spec

NUM_BLOCKS = 40
KERNELS: tuple[AttentionKernel, ...] = ("numba", "torch")
# The window of the tiny models is 7, so sequences of 3, 19 and 8 lie below, far and just above it.
LENGTHS = (3, 19, 8)


class Layer:
    """One layer of a tiny model in both implementations."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, index: int = 1) -> None:
        self.model = tiny_model(name, dtype=dtype)
        self.spec: ModelSpec = tiny_spec(self.model)
        self.dtype = dtype
        self.window = self.spec.layers[index].window
        self.weights = packed(
            self.spec, checkpoint_tensors(self.model, self.spec), "attention", index
        )
        self.theirs = self.model.model.layers[index]

    def pages(self) -> Pages:
        return empty_pages(NUM_BLOCKS, self.spec.num_kv_heads, self.spec.head_dim, self.dtype)

    def run(
        self, x_TD: Tensor, pages: Pages, batch: BatchTensors, kernel: AttentionKernel
    ) -> Tensor:
        return self.attend(x_TD, pages, batch, self.step(batch, kernel))

    def step(self, batch: BatchTensors, kernel: AttentionKernel) -> AttentionStep:
        return attention_step(
            batch,
            dtype=self.dtype,
            block_size=BLOCK_SIZE,
            windows={layer.window for layer in self.spec.layers},
            kernel=kernel,
        )

    def attend(
        self, x_TD: Tensor, pages: Pages, batch: BatchTensors, step: AttentionStep
    ) -> Tensor:
        frequencies_F = rotary_frequencies(self.spec.rope, self.spec.head_dim, x_TD.device)
        return attention_layer(
            x_TD,
            self.weights,
            pages,
            *rotary_rows(batch.positions_T, frequencies_F, self.dtype),
            step,
            self.spec,
            window=self.window,
            num_threads=2,
        )

    def expected(self, x_TD: Tensor) -> Tensor:
        """transformers over one whole sequence."""
        num_tokens = len(x_TD)
        query, key = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)
        seen = key <= query
        if self.window is not None:
            seen &= query - key < self.window
        mask = torch.zeros(num_tokens, num_tokens).masked_fill(~seen, float("-inf"))
        rotary = self.model.model.rotary_emb(x_TD[None], torch.arange(num_tokens)[None])
        out, _ = self.theirs.self_attn(
            self.theirs.input_layernorm(x_TD)[None],
            position_embeddings=rotary,
            attention_mask=mask[None, None].to(self.dtype),
        )
        attended: Tensor = out[0]
        return x_TD + attended


def hidden_states(lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 60, generator=generator).to(dtype) for length in lengths]


def zeros(lengths: Sequence[int]) -> list[list[int]]:
    """Token ids, which attention does not read."""
    return [[0] * length for length in lengths]


def tables() -> Tensor:
    return shuffled_tables(len(LENGTHS), 6, num_blocks=NUM_BLOCKS, seed=1)


def prefill(layer: Layer, sequences: list[Tensor], pages: Pages, bounds: list[list[int]]) -> Tensor:
    """All tokens of all sequences, in chunks that end at each of `bounds` (a list a sequence)."""
    outputs: list[list[Tensor]] = [[] for _ in sequences]
    past = [0] * len(sequences)
    for ends in zip(*bounds, strict=True):
        chunks = [x[start:end] for x, start, end in zip(sequences, past, ends, strict=True)]
        batch = make_batch("prefill", zeros([len(c) for c in chunks]), past, tables())
        out = layer.run(torch.cat(chunks), pages, batch, "torch")
        for parts, piece in zip(outputs, torch.split(out, [len(c) for c in chunks]), strict=True):
            parts.append(piece)
        past = list(ends)
    return torch.cat([torch.cat(parts) for parts in outputs])


def decode(
    layer: Layer, sequences: list[Tensor], pages: Pages, num_steps: int, kernel: AttentionKernel
) -> Tensor:
    """The last `num_steps` tokens of every sequence one by one, after a prefill of the others."""
    prefill(layer, sequences, pages, [[len(x) - num_steps] for x in sequences])
    rows = []
    for step in range(num_steps, 0, -1):
        past = [len(x) - step for x in sequences]
        batch = make_batch("decode", zeros([1] * len(sequences)), past, tables())
        x_SD = torch.stack([x[at] for x, at in zip(sequences, past, strict=True)])
        rows.append(layer.run(x_SD, pages, batch, kernel))
    return torch.stack(rows, dim=1)


def distance(actual: Tensor, exact: Tensor) -> float:
    """Root of the mean squared difference."""
    return (actual.double() - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_prefill_of_a_ragged_batch_equals_transformers(name: str) -> None:
    """Each sequence of the batch gets what it gets alone."""
    layer, sequences = Layer(name), hidden_states(LENGTHS)
    actual = prefill(layer, sequences, layer.pages(), [[n] for n in LENGTHS])
    expected = torch.cat([layer.expected(x) for x in sequences])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_decode_equals_transformers(name: str, kernel: AttentionKernel) -> None:
    """Two steps after a prefill, for contexts below and above the window."""
    layer, sequences = Layer(name), hidden_states(LENGTHS)
    actual = decode(layer, sequences, layer.pages(), 2, kernel)
    expected = torch.stack([layer.expected(x)[-2:] for x in sequences])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "olmoe"])
def test_chunks_give_what_the_whole_prompt_gives(name: str) -> None:
    """Chunks that end inside blocks, on their edges and after one token, ragged."""
    layer, sequences = Layer(name), hidden_states(LENGTHS)
    whole_pages, chunked_pages = layer.pages(), layer.pages()
    whole = prefill(layer, sequences, whole_pages, [[n] for n in LENGTHS])
    chunks = [[1, 2, 3], [4, 17, 19], [5, 6, 8]]
    chunked = prefill(layer, sequences, chunked_pages, chunks)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chunked_pages.key, whole_pages.key, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chunked_pages.value, whole_pages.value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "olmoe"])
def test_bfloat16_rounds_as_little_as_transformers(name: str) -> None:
    """Distance to float32 arithmetic on the same weights: prefill and both decode kernels."""
    layer = Layer(name, torch.bfloat16)
    sequences = hidden_states(LENGTHS, torch.bfloat16)
    theirs = [layer.expected(x) for x in sequences]
    twin = Layer(name)
    twin.model.load_state_dict(layer.model.state_dict())
    exact = [twin.expected(x.float()) for x in sequences]
    limit = 1.5 * distance(torch.cat(theirs), torch.cat(exact))
    whole = prefill(layer, sequences, layer.pages(), [[n] for n in LENGTHS])
    assert distance(whole, torch.cat(exact)) <= limit
    for kernel in KERNELS:
        actual = decode(layer, sequences, layer.pages(), 2, kernel)
        assert distance(actual, torch.stack([out[-2:] for out in exact])) <= limit


def test_new_tokens_touch_only_their_own_slots() -> None:
    """Pages that belong to nobody, and slots past a sequence's end, stay as they were."""
    layer, sequences = Layer("llama"), hidden_states(LENGTHS)
    pages = layer.pages()
    prefill(layer, sequences, pages, [[n] for n in LENGTHS])
    written = (pages.key != 0).any(dim=3).any(dim=1)
    expected = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, dtype=torch.bool)
    for table, length in zip(tables().tolist(), LENGTHS, strict=True):
        for position in range(length):
            expected[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = True
    torch.testing.assert_close(written, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_window_forgets_older_tokens(kernel: AttentionKernel) -> None:
    """Garbage in every key and value that lies before the window changes nothing."""
    layer, sequences = Layer("mistral"), hidden_states(LENGTHS)
    pages = layer.pages()
    expected = decode(layer, sequences, pages, 1, kernel)
    position = 19 - 7 - 1  # the newest token that the last one of the second sequence cannot see
    for old in range(position + 1):
        block, offset = int(tables()[1, old // BLOCK_SIZE]), old % BLOCK_SIZE
        pages.key[block, :, offset] = 50.0
        pages.value[block, :, offset] = 50.0
    batch = make_batch("decode", zeros([1] * 3), [n - 1 for n in LENGTHS], tables())
    x_SD = torch.stack([x[-1] for x in sequences])
    actual = layer.run(x_SD, pages, batch, kernel)
    torch.testing.assert_close(actual, expected[:, 0], rtol=0, atol=0)


def test_step_reads_only_blocks_inside_the_window() -> None:
    """A window of 7 tokens over blocks of 4 needs 3 blocks at most, however long the context."""
    batch = make_batch("decode", zeros([1]), [63], shuffled_tables(1, 16, num_blocks=16, seed=0))
    step = attention_step(
        batch,
        dtype=torch.float32,
        block_size=BLOCK_SIZE,
        windows={None, 7},
        kernel="torch",
    )
    assert step.pages[None].blocks_SB.shape == (1, 16)
    assert step.pages[7].blocks_SB.shape == (1, 3)


def test_layers_of_a_decode_step_share_scratch() -> None:
    """Memory fresh from the system is zeroed page by page, which a step does once."""
    layer, sequences = Layer("llama"), hidden_states(LENGTHS)
    pages = layer.pages()
    prefill(layer, sequences, pages, [[len(x) - 1] for x in sequences])
    batch = make_batch("decode", zeros([1] * 3), [n - 1 for n in LENGTHS], tables())
    step = layer.step(batch, "numba")
    found = []
    for _ in range(2):
        layer.attend(torch.stack([x[-1] for x in sequences]), pages, batch, step)
        found.append((step.scratch.num_bytes, step.scratch.address(1)))
    assert found[0][0] > 0
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_parts_of_attention_on_two_devices_give_the_whole(
    name: str, dtype: torch.dtype
) -> None:
    """To the last bit, in the pages too: projected, attended by the CPU's kernels, and put out."""
    layer = Layer(name, dtype)
    sequences = hidden_states(LENGTHS, dtype)
    whole_pages, part_pages = layer.pages(), layer.pages()
    for pages in (whole_pages, part_pages):
        prefill(layer, sequences, pages, [[len(x) - 1] for x in sequences])
    x_TD = torch.stack([x[-1] for x in sequences])
    batch = make_batch("decode", zeros([1] * 3), [n - 1 for n in LENGTHS], tables())
    expected = layer.run(x_TD, whole_pages, batch, "numba")

    frequencies_F = rotary_frequencies(layer.spec.rope, layer.spec.head_dim, x_TD.device)
    kernels = CpuKernels(num_threads=2, inv_freq_F=frequencies_F.numpy())
    step = cpu_attention_step(batch, kernels, block_size=BLOCK_SIZE, windows={layer.window})
    rotation = rotary_rows(batch.positions_T, frequencies_F, dtype)
    qkv_THK = torch.cat(project(x_TD, layer.weights, *rotation, layer.spec), dim=1)
    attended = attend_projected(qkv_THK, part_pages, step, kernels, layer.spec, layer.window)
    actual = attention_output(attended, x_TD, layer.weights)

    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(part_pages.key, whole_pages.key, rtol=0, atol=0)
    torch.testing.assert_close(part_pages.value, whole_pages.value, rtol=0, atol=0)
