"""FlexGen's policy search: the shares of a block by a linear programme, blocks by enumeration."""

from __future__ import annotations

from dataclasses import replace

from planner.flexgen import (
    Block,
    FlexGenMachine,
    OptShape,
    Policy,
    Shares,
    decode_lanes_s,
    free_bytes,
    prefill_lanes_s,
)
from planner.small_lp import minimize

_NUM_SHARES = 5
# Seconds, in the order of `Shares`, that decide between shares that are as fast.
_TIE_COSTS = (1e-9, 2e-9, 1e-9, 2e-9, 1e-9)


def best_shares(block: Block) -> Policy | None:
    """The shares with which a block is fastest and fits; None where none fit.

    FlexGen's linear programme, solved exactly: seconds and bytes are affine in the shares, so that
    their coefficients are differences of the formulas above. Of equally fast shares those with
    least on the disk, then on the GPU.

    Examples
    --------
    >>> from planner.flexgen import T4
    >>> opt_30b = OptShape(num_layers=48, hidden_size=7168, ffn_size=28672, num_heads=56)
    >>> policy = best_shares(Block(model=opt_30b, machine=T4, prompt_len=512, output_len=32,
    ...     gpu_batch_size=48, num_gpu_batches=3))
    >>> round(policy.shares.gpu_weights, 4), round(policy.tokens_per_s, 3)
    (0.087, 6.974)
    """
    at_none = _bounded(block, _shares((0.0,) * _NUM_SHARES))
    at_units = [
        _bounded(block, _shares(tuple(float(i == j) for j in range(_NUM_SHARES))))
        for i in range(_NUM_SHARES)
    ]
    rows: list[list[float]] = []
    limits: list[float] = []
    for index, value in enumerate(at_none):
        prefill = -1.0 if index < 3 else 0.0
        decode = -1.0 if 3 <= index < 7 else 0.0
        rows.append([*(unit[index] - value for unit in at_units), prefill, decode])
        limits.append(-value)
    for parts in ((1, 1, 0, 0, 0), (0, 0, 1, 1, 0), (0, 0, 0, 0, 1)):
        rows.append([*map(float, parts), 0.0, 0.0])
        limits.append(1.0)

    num_layers = block.model.num_layers
    step_costs = [float(num_layers), float(num_layers * (block.output_len - 1))]
    found = minimize([*_TIE_COSTS, *step_costs], rows, limits)
    return None if found is None else Policy(block=block, shares=_shares(found[:_NUM_SHARES]))


def _bounded(block: Block, shares: Shares) -> tuple[float, ...]:
    """3 at most a layer's prefill time, 4 at most its decode time, 5 at most 0."""
    lanes_s = (*prefill_lanes_s(block, shares), *decode_lanes_s(block, shares))
    return (*lanes_s, *(-each for each in free_bytes(block, shares)))


def _shares(values: tuple[float, ...]) -> Shares:
    gpu_weights, disk_weights, gpu_cache, disk_cache, gpu_hidden = values
    return Shares(
        gpu_weights=gpu_weights,
        disk_weights=disk_weights,
        gpu_cache=gpu_cache,
        disk_cache=disk_cache,
        gpu_hidden=gpu_hidden,
    )


def search_policy(
    model: OptShape,
    machine: FlexGenMachine,
    prompt_len: int,
    output_len: int,
    weight_bits: int = 16,
) -> Policy | None:
    """FlexGen's outer search: the fastest of the blocks that it tries; None where none fits.

    GPU batches of 1, 2, 3, 4, 8, 16, ... until one does not fit; of each, more and more of them
    until they do not fit or are slower.
    """
    best: Policy | None = None
    batch = Block(
        model=model,
        machine=machine,
        prompt_len=prompt_len,
        output_len=output_len,
        gpu_batch_size=1,
        num_gpu_batches=1,
        weight_bits=weight_bits,
    )
    while (found := best_shares(batch)) is not None:
        fastest = _best_of_batches(found)
        if best is None or fastest.tokens_per_s > best.tokens_per_s:
            best = fastest
        size = batch.gpu_batch_size
        batch = replace(batch, gpu_batch_size=size + 1 if size < 4 else size * 2)
    return best


def _best_of_batches(first: Policy) -> Policy:
    best = first
    while True:
        more = replace(best.block, num_gpu_batches=best.block.num_gpu_batches + 1)
        found = best_shares(more)
        if found is None or found.tokens_per_s < best.tokens_per_s:
            return best
        best = found
