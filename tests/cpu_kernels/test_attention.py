"""Decode attention equals float64 attention for any shape, format, window and thread count."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels import attention, attention_kernels, compiling, simd
from cpu_kernels.attention import (
    BAD_BLOCK,
    BAD_LENGTH,
    CHUNK_TOKENS,
    FINE,
    MAX_SEGMENT_TOKENS,
    check_attention,
    decode_attention,
    decode_attention_links,
    merge_attention,
    num_segments,
    segment_tokens,
)
from cpu_kernels.calls import DONE, Chain, Link
from cpu_kernels.compiling import code_address
from cpu_kernels.formats import from_bfloat16_bits, to_bfloat16_bits
from cpu_kernels.scratch import Scratch

# 32-bit sums of up to 1300 products of order one: 1e-6 seen, times 4
_TOLERANCE = 4e-6


class Case:
    """Random sequences in a paged cache: blocks in random order, NaN where nothing may be read."""

    def __init__(
        self,
        context_lens: list[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        key_width: int = 32,
        value_width: int | None = None,
        block_size: int = 16,
        cache_format: str = "float32",
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        value_width = value_width or key_width
        num_seqs, max_blocks = len(context_lens), -(-max(context_lens) // block_size) + 1
        num_blocks = num_seqs * max_blocks
        self.context_lens = np.array(context_lens, np.int32)
        tables = rng.permutation(num_blocks).reshape(num_seqs, max_blocks).astype(np.int32)
        self.block_tables: NDArray[np.int32] = tables
        self.q = rng.standard_normal((num_seqs, heads, key_width)).astype(np.float32)
        self.caches = []
        self.exact = []
        for width in (key_width, value_width):
            shape = (num_blocks, kv_heads, block_size, width)
            values = np.full(shape, np.nan, np.float32)
            exact = []
            for seq, length in enumerate(context_lens):
                tokens = rng.standard_normal((length, kv_heads, width)).astype(np.float32)
                stored = _stored(tokens, cache_format)
                exact.append(_widened(stored).astype(np.float64))
                for t in range(length):
                    values[tables[seq, t // block_size], :, t % block_size] = _widened(stored[t])
                # beyond the end the table may hold anything
                tables[seq, -(-length // block_size) :] = 2**30
            self.caches.append(_stored(values, cache_format))
            self.exact.append(exact)
        self.scale = key_width**-0.5
        self.out_shape = (num_seqs, heads, value_width)
        self.sinks: NDArray[np.float32] | None = None
        self.scratch: Scratch | None = None

    def expected(self, window: int | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Attend in float64."""
        out, lse = np.empty(self.out_shape), np.empty(self.out_shape[:2])
        for seq, length in enumerate(self.context_lens):
            keys, values = (side[seq] for side in self.exact)
            first = 0 if window is None else max(0, length - window)
            group = self.q.shape[1] // keys.shape[1]
            for head in range(self.q.shape[1]):
                scores = keys[first:, head // group] @ self.q[seq, head].astype(np.float64)
                total = np.exp(scores * self.scale).sum()
                if self.sinks is not None:
                    total += np.exp(self.sinks[head].astype(np.float64))
                lse[seq, head] = np.log(total)
                weights = np.exp(scores * self.scale - lse[seq, head])
                out[seq, head] = weights @ values[first:, head // group]
        return out, lse

    def attend(
        self, window: int | None = None, num_threads: int = 1
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Run the kernel on NaN-filled outputs."""
        out, lse = self.outputs()
        decode_attention(**self.arguments(out, lse, window, num_threads))
        return out, lse

    def links(
        self,
        out: NDArray[np.float32],
        lse: NDArray[np.float32],
        window: int | None = None,
        num_threads: int = 1,
    ) -> tuple[Link, Link]:
        """What `attend` would run."""
        return decode_attention_links(**self.arguments(out, lse, window, num_threads))

    def outputs(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Arrays for the results, full of NaN."""
        out = np.full(self.out_shape, np.nan, np.float32)
        return out, np.full(self.out_shape[:2], np.nan, np.float32)

    def arguments(
        self,
        out: NDArray[np.float32],
        lse: NDArray[np.float32],
        window: int | None,
        num_threads: int,
    ) -> dict[str, Any]:
        """Of `decode_attention`."""
        return {
            "q": self.q,
            "key_cache": self.caches[0],
            "value_cache": self.caches[1],
            "block_tables": self.block_tables,
            "context_lens": self.context_lens,
            "scale": self.scale,
            "window": window,
            "num_threads": num_threads,
            "out": out,
            "lse": lse,
            "sinks": self.sinks,
            "scratch": self.scratch,
        }

    def assert_right(self, window: int | None = None, num_threads: int = 1) -> None:
        """Compare the kernel with float64."""
        for actual, expected in zip(
            self.attend(window, num_threads), self.expected(window), strict=True
        ):
            np.testing.assert_allclose(actual, expected, rtol=_TOLERANCE, atol=_TOLERANCE)


def _stored(values: NDArray[np.float32], cache_format: str) -> NDArray[Any]:
    if cache_format == "bfloat16":
        return to_bfloat16_bits(values)
    return values.astype(cache_format)


def _widened(stored: NDArray[Any]) -> NDArray[np.float32]:
    if stored.dtype == np.uint16:
        return from_bfloat16_bits(stored)
    return stored.astype(np.float32)


@pytest.mark.parametrize("cache_format", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("window", [None, 1, 100, 700])
def test_attention_equals_float64(cache_format: str, num_threads: int, window: int | None) -> None:
    """Contexts around a block, a chunk and a segment, each format, window and thread count."""
    case = Case([1, 33, 512, 767, 769, 1300], cache_format=cache_format)
    case.assert_right(window, num_threads)


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (4, 4), (4, 2), (6, 3), (6, 2), (14, 2), (8, 1), (20, 1)]
)
def test_attention_is_right_for_any_group(heads: int, kv_heads: int) -> None:
    """Groups of 1, 2, 3, 7, 8 and 20 query heads a KV head."""
    Case([5, 70], heads=heads, kv_heads=kv_heads).assert_right()


@pytest.mark.parametrize("cache_format", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("key_width", "value_width"), [(14, 14), (128, 128), (1, 3), (72, 80)])
def test_attention_is_right_for_any_width(
    cache_format: str, key_width: int, value_width: int
) -> None:
    """Widths that are no multiple of a vector, with values wider than keys."""
    case = Case([7, 40], key_width=key_width, value_width=value_width, cache_format=cache_format)
    case.assert_right()


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (16, 4), (20, 1)])
def test_sinks_take_part_in_the_softmax(heads: int, kv_heads: int, window: int | None) -> None:
    """A logit for each head, some far above all scores and some far below, window or not."""
    case = Case([1, 40, 513, 1300], heads=heads, kv_heads=kv_heads, cache_format="bfloat16")
    case.sinks = np.linspace(-20, 12, heads, dtype=np.float32)
    case.assert_right(window, 2)


def test_only_one_of_two_merged_parts_has_the_sinks() -> None:
    """The newest tokens with sinks and the older ones without make the whole with sinks."""
    case = Case([200])
    case.sinks = np.array([0.5, -1, 2, 3], np.float32)
    whole = case.expected(None)
    newest = case.attend(window=50)
    case.sinks = None
    case.context_lens -= 50
    older = case.attend()

    for actual, expected in zip(merge_attention(*older, *newest), whole, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=_TOLERANCE, atol=_TOLERANCE)


def test_scratch_is_used_again() -> None:
    """The same numbers come out of memory that earlier and larger calls have left."""
    small, large = Case([3, 40]), Case([1300, 600], seed=1)
    expected = small.attend()
    small.scratch = large.scratch = Scratch()
    small.assert_right()
    large.assert_right()
    num_bytes = large.scratch.num_bytes

    for actual, wanted in zip(small.attend(), expected, strict=True):
        assert np.array_equal(actual, wanted)
    assert large.scratch.num_bytes == num_bytes


@pytest.mark.parametrize("block_size", [1, 5, 16, 256])
def test_attention_is_right_for_any_block_size(block_size: int) -> None:
    """Blocks smaller and larger than the kernel's chunks, windows that start within one."""
    Case([600, 31], block_size=block_size).assert_right(window=539)


def test_large_scores_do_not_overflow() -> None:
    """Scores of several hundred, far above log of the largest float32, give finite results."""
    case = Case([300])
    case.scale = 60.0
    out, _ = case.attend()

    keys, values = (side[0] for side in case.exact)
    best = (keys[:, 0] @ case.q[0, 0].astype(np.float64)).argmax()
    np.testing.assert_allclose(out[0, 0], values[best, 0], rtol=1e-4, atol=1e-4)


def test_nan_in_the_cache_is_not_hidden() -> None:
    """A key that is NaN makes the heads that read it NaN."""
    case = Case([40])
    case.caches[0][case.block_tables[0, 1], 0, 3] = np.nan
    out, lse = case.attend()

    assert np.isnan(out[0, :2]).all()
    assert np.isnan(lse[0, :2]).all()
    assert np.isfinite(out[0, 2:]).all()


def test_results_do_not_depend_on_threads_or_neighbours() -> None:
    """A sequence has the same bits alone or in a batch, on one thread, two or three."""
    case = Case([1300, 3, 700])
    batch = case.attend(num_threads=1)[0]

    for num_threads in (2, 3):
        assert np.array_equal(case.attend(num_threads=num_threads)[0], batch)
    case.q, case.block_tables = case.q[:1].copy(), case.block_tables[:1].copy()
    case.context_lens, case.out_shape = case.context_lens[:1].copy(), (1, *case.out_shape[1:])
    assert np.array_equal(case.attend()[0], batch[:1])


def test_calls_from_two_threads_at_once_do_not_disturb_each_other() -> None:
    """One caller with two threads and one with a single thread, as beside an accelerator thread."""
    cases = [Case([900, 80], seed=1), Case([1200, 20], seed=2)]
    expected = [case.attend()[0] for case in cases]
    wrong: list[int] = []

    def repeat(number: int, num_threads: int) -> None:
        for _ in range(50):
            if not np.array_equal(
                cases[number].attend(num_threads=num_threads)[0], expected[number]
            ):
                wrong.append(number)

    callers = [threading.Thread(target=repeat, args=(number, 2 - number)) for number in (0, 1)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    assert wrong == []


def test_first_calls_from_two_threads_share_one_compilation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both get the same code, so that neither's can be dropped while it runs."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv(compiling.FOLDER_VARIABLE, str(tmp_path))
    addresses: list[int] = []
    compiled: list[str] = []

    def first_call() -> None:
        # few others take 8 heads of float16 together: most likely nothing is loaded yet
        addresses.append(code_address("attention_kernels", "make_attend", "float16", 8))

    callers = [threading.Thread(target=first_call) for _ in range(2)]
    with compiling.listening(compiled.append):
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()

    assert compiled in ([], ["attention_kernels-make_attend-float16-8"])
    assert len(addresses) == 2 and addresses[0] == addresses[1] != 0


def test_links_run_again_follow_contexts_and_blocks() -> None:
    """Built for one token, run for more: the lengths and the table are read at each run."""
    case = Case([1300, 3, 700])
    lens, tables = case.context_lens.copy(), case.block_tables.copy()
    expected = []
    for step in range(4):
        case.context_lens[:] = np.maximum(lens - [9 * step, 0, 300 * step // 3], 1)
        expected.append(case.attend())
    case.context_lens[:] = 1
    case.block_tables[:, 1:] = 2**30
    out, lse = case.outputs()
    links = case.links(out, lse, num_threads=2)
    chain = Chain(links, num_threads=2)
    chain.run()
    check_attention(links)
    case.block_tables[:] = tables

    for step in (3, 1, 1, 0, 2):
        case.context_lens[:] = np.maximum(lens - [9 * step, 0, 300 * step // 3], 1)
        out[:], lse[:] = np.nan, np.nan
        chain.run()

        check_attention(links)
        for actual, wanted in zip((out, lse), expected[step], strict=True):
            np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_links_of_several_layers_run_as_one_chain(num_threads: int) -> None:
    """They share scratch, one reads what another wrote, and all give the bits of single calls."""
    first, other = Case([1300, 40, 600], seed=1), Case([90, 513, 2], seed=2, kv_heads=1)
    out, lse = first.outputs()
    decode_attention(**first.arguments(out, lse, None, 1))
    second = Case([1300, 40, 600], seed=3, cache_format="bfloat16")
    second.q = out
    wanted = [*first.attend(), *other.attend(100), *second.attend()]
    first.scratch = other.scratch = second.scratch = Scratch()
    actual = [*first.outputs(), *other.outputs(), *second.outputs()]
    second.q = actual[0]
    links = [
        *first.links(actual[0], actual[1], num_threads=num_threads),
        *other.links(actual[2], actual[3], 100, num_threads),
        *second.links(actual[4], actual[5], num_threads=num_threads),
    ]
    chain = Chain(links, num_threads=num_threads)

    for _ in range(20):
        for array in actual:
            array[:] = np.nan
        chain.run()
        for found, expected in zip(actual, wanted, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_addresses_of_links_may_be_exchanged() -> None:
    """Queries, both sides of the cache, and both outputs."""
    case, other = Case([70, 5]), Case([70, 5], seed=1)
    other.block_tables = case.block_tables = case.block_tables.clip(max=0)
    case.context_lens[:] = other.context_lens[:] = 3
    wanted = other.attend()
    links = case.links(*case.outputs())
    out, lse = other.outputs()
    call = links[1].call

    call.q, call.out, call.lse = other.q.ctypes.data, out.ctypes.data, lse.ctypes.data
    call.key_cache, call.value_cache = (cache.ctypes.data for cache in other.caches)
    Chain(links, num_threads=1).run()

    np.testing.assert_array_equal(out, wanted[0])
    np.testing.assert_array_equal(lse, wanted[1])


def test_a_chain_leaves_out_what_it_may_not_read() -> None:
    """A length or a block that is none writes nothing and is named; the next run is right."""
    case = Case([20, 33], block_size=16)
    out, lse = case.outputs()
    links = case.links(out, lse)
    chain = Chain(links, num_threads=1)
    for length in (0, -5, 65, 2**31 - 1):
        case.context_lens[1] = length
        chain.run()
        assert links[0].call.state == BAD_LENGTH
        with pytest.raises(ValueError, match=f"{max(length, 20)} but must be 1 to 64"):
            check_attention(links)
    case.context_lens[1] = 33
    right = case.block_tables[1, 2]
    for number in (-1, 8, 2**31 - 1, -(2**31)):
        case.block_tables[1, 2] = number
        chain.run()
        assert links[0].call.state == BAD_BLOCK
        with pytest.raises(ValueError, match=f"block {number} for sequence 1 .* 8 blocks"):
            check_attention(links)
    assert np.isnan(out).all() and np.isnan(lse).all()
    case.block_tables[1, 2] = right
    chain.run()

    assert links[0].call.state == FINE
    check_attention(links)
    for actual, expected in zip((out, lse), case.attend(), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_blocks_before_the_window_may_be_anything() -> None:
    """They are not read, so that a cache may have given them away; the first one read may not."""
    case = Case([100], block_size=16)
    expected = case.attend(window=20)[0]
    case.block_tables[0, :5] = -1

    np.testing.assert_array_equal(case.attend(window=20)[0], expected)
    with pytest.raises(ValueError, match="block -1 for sequence 0 but the cache has 8 blocks"):
        case.attend(window=21)


def test_the_driver_knows_the_vectors_of_the_kernels() -> None:
    """It sizes scratch without numba, which the module of the vectors needs."""
    assert attention.num_lanes() == simd.LANES
    assert simd.TILE**2 == attention.TILE_TOKENS


def test_attention_runs_without_numba_once_it_is_compiled() -> None:
    """Object code is on disk: numba takes longer to import than a step."""
    script = """
import sys
import numpy as np
from cpu_kernels.attention import decode_attention
cache = np.ones((2, 1, 16, 8), np.float32)
out, lse = np.empty((1, 2, 8), np.float32), np.empty((1, 2), np.float32)
decode_attention(np.zeros((1, 2, 8), np.float32), cache, cache, np.array([[1]], np.int32),
    np.array([3], np.int32), scale=1.0, window=None, num_threads=1, out=out, lse=lse)
assert np.allclose(out, 1) and np.allclose(lse, np.log(3)), (out, lse)
print("numba" in sys.modules)
"""
    for _ in range(2):
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert result.stderr == ""

    assert result.stdout == "False\n"


def test_read_only_queries_are_accepted() -> None:
    """An array that may not be written to is read."""
    case = Case([20])
    case.q.flags.writeable = False
    case.assert_right()


def test_no_sequences_is_no_work() -> None:
    """An empty batch returns without touching anything."""
    case = Case([3])
    case.q, case.block_tables = case.q[:0], case.block_tables[:0]
    case.context_lens, case.out_shape = case.context_lens[:0], (0, *case.out_shape[1:])

    assert case.attend()[0].shape == (0, 4, 32)


def test_the_kernel_is_right_in_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same functions, not compiled, over the Python twins of the vector operations."""
    case = Case([3, 37], key_width=20, value_width=18, heads=3, kv_heads=1, cache_format="bfloat16")
    case.sinks = np.array([-1, 0, 1], np.float32)
    out, lse = case.outputs()
    plan, attend = case.links(out, lse)
    call = attend.call
    names = [name for name, value in vars(attention_kernels).items() if hasattr(value, "py_func")]
    for name in names:
        monkeypatch.setattr(attention_kernels, name, getattr(attention_kernels, name).py_func)
    unclaimed, finished = itertools.count(), []
    monkeypatch.setattr(attention_kernels, "claim_item", lambda address: next(unclaimed))
    monkeypatch.setattr(attention_kernels, "finish_item", lambda *item: finished.append(item))
    integers = _array(np.int64, call.integers, call.rows_at + attention.WORKER_ROWS)
    kernels: Any = attention_kernels

    kernels._plan(plan.call, call, case.context_lens, case.block_tables.reshape(-1), integers)
    assert plan.call.state == FINE
    with np.errstate(all="ignore"):  # stale scratch in the padding of a last tile
        kernels._attend(
            7,
            call,
            next(unclaimed),
            0,
            case.q.reshape(-1),
            case.caches[0].reshape(-1),
            case.caches[1].reshape(-1),
            case.block_tables.reshape(-1),
            case.context_lens,
            case.sinks,
            out.reshape(-1),
            lse.reshape(-1),
            _array(np.float32, call.floats, call.workers_at + call.worker_size),
            integers,
            _array(np.uint16, call.tails, 32 * 64),
            (0,) * 4,
        )

    assert len(names) >= 7
    assert finished == [(7, DONE)] * (call.num_items - 1)
    for actual, expected in zip((out, lse), case.expected(None), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=_TOLERANCE, atol=_TOLERANCE)


def _array(dtype: type[Any], address: int, size: int) -> NDArray[Any]:
    memory = (ctypes.c_uint8 * (size * np.dtype(dtype).itemsize)).from_address(address)
    found: NDArray[Any] = np.ctypeslib.as_array(memory).view(dtype)
    return found


def test_scoring_asks_for_nothing_where_nothing_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """With wide keys it would go past a worker's rows: lines of no width are a row each.

    As Python, where the array of rows ends after those that may be read.
    """
    num_heads, width = simd.LANES, 256
    scores_at = num_heads * width + width * 32
    floats = np.ones(scores_at + 32 * num_heads, np.float32)
    kernels: Any = attention_kernels
    monkeypatch.setattr(kernels, "_ask_for_line", kernels._ask_for_line.py_func)

    kernels._score_chunk.py_func(
        floats,
        0,
        num_heads * width,
        32,
        width,
        scores_at,
        np.ones(width, np.float32),
        np.zeros(17, np.int64),
        0,
        0,
        (0,) * num_heads,
    )

    np.testing.assert_array_equal(floats[scores_at:], width)


@pytest.mark.parametrize("x", [1.0, 0.75, 1.25, np.pi, 512.0, 3e7, np.float32(2) ** 40])
def test_logarithms_need_no_library(x: float) -> None:
    """Of numbers as sums of weights are; NaN stays, and infinity ends."""
    kernels: Any = attention_kernels
    for one in (np.float32(x), np.nextafter(np.float32(x), np.float32(2))):
        actual = kernels._log2(one)
        np.testing.assert_allclose(actual, np.log2(np.float64(one)), rtol=1e-10, atol=1e-12)
    assert np.isnan(kernels._log2(np.float32(np.nan)))
    assert not np.isfinite(kernels._log2(np.float32(np.inf)))


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names an x86-64 CPU")
def test_the_kernel_needs_no_particular_x86_cpu() -> None:
    """Compiled for a CPU with SSE2 only, the results are the same within rounding."""
    script = (
        "import numpy as np; from tests.cpu_kernels.test_attention import Case\n"
        "Case([5, 40], key_width=20, value_width=18, cache_format='bfloat16').assert_right()"
    )
    environment = os.environ | {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )

    assert result.stderr == ""
    assert result.returncode == 0


def test_wrong_arguments_are_named() -> None:
    """Shapes, formats, layouts and ranges that do not fit raise with what was given."""
    case = Case([20])
    case.q = case.q[:, :3].copy()
    with pytest.raises(ValueError, match=r"out is float32 \(1, 4, 32\).*\(1, 3, 32\)"):
        case.attend()
    case = Case([20])
    case.caches[0] = case.caches[0].astype(np.float64)
    with pytest.raises(ValueError, match="keys are float64"):
        case.attend()
    case = Case([20])
    case.caches[1] = case.caches[1].transpose(0, 2, 1, 3)
    with pytest.raises(ValueError, match="cache is float32"):
        case.attend()
    case = Case([20])
    case.context_lens[0] = 100
    with pytest.raises(ValueError, match=r"100 .* 1 to 48"):
        case.attend()
    case.context_lens[0] = 0
    with pytest.raises(ValueError, match=r"0 to 0 but must be 1 to 48"):
        case.attend()
    case = Case([20])
    with pytest.raises(ValueError, match="window is 0"):
        case.attend(window=0)
    case = Case([20])
    with pytest.raises(ValueError, match="num_threads 0"):
        case.attend(num_threads=0)
    case = Case([20])
    case.caches = [cache.astype(">f4") for cache in case.caches]
    with pytest.raises(ValueError, match="keys are >f4"):
        case.attend()
    case = Case([20])
    case.block_tables = case.block_tables.reshape(-1)
    with pytest.raises(ValueError, match=r"block_tables is int32 \(3,\).*\(1, 3\)"):
        case.attend()
    case = Case([20])
    case.caches = [cache[:, :0] for cache in case.caches]
    with pytest.raises(ValueError, match="4 query heads do not divide by 0 KV heads"):
        case.attend()
    case = Case([20])
    case.block_tables[0, 1] = 3
    with pytest.raises(ValueError, match="block 3 for sequence 0 but the cache has 3 blocks"):
        case.attend()


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=3), st.integers(1, 89), st.integers(0, 1000)
)
@settings(max_examples=25, deadline=None)
def test_merging_two_parts_equals_the_whole(lengths: list[int], cut: int, seed: int) -> None:
    """The last `cut` tokens by a window, the rest by a shorter context, merged; both may be all."""
    case = Case(lengths, seed=seed)
    whole = case.attend()
    newest = case.attend(window=cut)
    older_out, older_lse = np.full_like(whole[0], np.nan), np.full_like(whole[1], -np.inf)
    rest = case.context_lens - cut
    case.context_lens = np.maximum(rest, 1).astype(np.int32)
    out, lse = case.attend()
    older_out[rest > 0], older_lse[rest > 0] = out[rest > 0], lse[rest > 0]

    merged = merge_attention(older_out, older_lse, *newest)

    for actual, expected in zip(merged, whole, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=_TOLERANCE, atol=_TOLERANCE)


def test_merging_nothing_with_nothing_is_nothing() -> None:
    """Two empty sides give zeros and -inf, without a warning."""
    empty = np.full((2, 3), np.nan, np.float32), np.full(2, -np.inf, np.float32)

    out, lse = merge_attention(*empty, *empty)

    assert not out.any()
    assert np.isneginf(lse).all()
    assert out.dtype == lse.dtype == np.float32


def test_segments_are_whole_chunks_that_hold_every_token_and_none_is_empty() -> None:
    """Up to 8 of one length; a longer context never has fewer, which the size of scratch needs."""
    before = 0
    for length in (*range(1, 4200), 5000, 32768, 131072):
        count = num_segments(length, 1 << 40)
        size = segment_tokens(length, count)
        assert size % CHUNK_TOKENS == 0 and size <= MAX_SEGMENT_TOKENS
        assert (count - 1) * size < length <= count * size
        assert count >= before
        before = count
        assert num_segments(131072, length) == count
