"""Fronts of caches: the first tokens of every sequence on the GPU, the others on the CPU, where a
plan's decode steps gain by attending on both at once."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from planner.candidate import Candidate
from planner.kv_blocks import num_blocks_for
from planner.placement import KV_BLOCK_TOKENS, MIXED, TierPlacement

# A decode tier with divided caches must gain this share of all seconds over one without.
_LEAST_GAIN = 0.01
# And is not tried where all caches take less of the GPU's memory, as the search does not either.
_LARGE_CACHES = 0.02
# Parts of the blocks that fit in fronts: every other one is tried, then those beside the best.
_PARTS = 16


def with_fronts(candidate: Candidate) -> Candidate:
    """A placement with the caches of all layers that the GPU attends in divided, if that is faster.

    Sequences are in one batch then, whatever they were in before; weights stay where they are. How
    much of each sequence is on the GPU is searched in sixteenths of what fits: with more of it the
    CPU waits for the GPU. Without tiers for smaller steps of decode, which would not fit to it.
    """
    if _most_gain(candidate) < _LEAST_GAIN:
        return candidate
    most = _most_blocks(candidate)
    tried: dict[int, Candidate] = {}

    def best_of(parts: Iterable[int]) -> int | None:
        for part in parts:
            num_blocks = part * most // _PARTS
            if num_blocks and part not in tried and part <= _PARTS:
                tried[part] = _divided(candidate, num_blocks)
        fitting = [part for part, trial in tried.items() if trial.lacking_bytes == 0]
        return min(fitting, key=lambda part: tried[part].times.e2e_s, default=None)

    first = best_of(range(2, _PARTS + 1, 2))
    if first is None:
        return candidate
    found = tried[best_of((first - 1, first + 1)) or first]
    is_worth_it = found.times.e2e_s <= (1.0 - _LEAST_GAIN) * candidate.times.e2e_s
    return found if is_worth_it else candidate


def _most_gain(candidate: Candidate) -> float:
    """Share of all seconds that attention in decode takes, with copies: no gain is greater."""
    if not _layers(candidate) or not _has_large_caches(candidate):
        return 0.0
    terms = candidate.terms("decode").terms
    share = (terms["attention"] + terms["transfer"]) / sum(terms.values())
    decode_s, prefill_s = (candidate.total_s(phase) for phase in ("decode", "prefill"))
    return share * decode_s / (decode_s + prefill_s)


def _has_large_caches(candidate: Candidate) -> bool:
    wave = candidate.wave
    spec, gpu, sequences = wave.spec, wave.costs.hardware.gpu, wave.sequences
    if gpu is None:
        return False
    each = sum(spec.kv_bytes_per_token(index) for index in range(spec.num_layers))
    kv_bytes = sequences.num_seqs * sequences.context_len * each
    return kv_bytes >= _LARGE_CACHES * gpu.memory_bytes


def _layers(candidate: Candidate) -> tuple[int, ...]:
    """Layers whose caches can be divided: a window would hide fronts, a state is no cache."""
    wave, tier = candidate.wave, candidate.placement.decode
    return tuple(
        index
        for index, (layer, where) in enumerate(zip(wave.spec.layers, tier.layers, strict=True))
        if layer.window is None and layer.attention is None and where.attention.device == "gpu"
    )


def _most_blocks(candidate: Candidate) -> int:
    """Blocks of a sequence that fit in a front, by halving: more of them need more on the GPU."""
    low, high = 0, num_blocks_for(candidate.wave.sequences.context_len)
    while low < high:
        middle = (low + high + 1) // 2
        if _divided(candidate, middle).lacking_on("gpu"):
            high = middle - 1
        else:
            low = middle
    return low


def _divided(candidate: Candidate, num_blocks: int) -> Candidate:
    """The same with so many blocks of every sequence on the GPU."""
    placement, divided = candidate.placement, frozenset(_layers(candidate))
    layers = tuple(
        replace(layer, kv_on_cpu=True, num_gpu_kv_tokens=num_blocks * KV_BLOCK_TOKENS)
        if index in divided
        else layer
        for index, layer in enumerate(placement.decode.layers)
    )
    decode = replace(placement.decode, strategy=MIXED, cut=0, num_second_seqs=0, layers=layers)
    smaller: tuple[TierPlacement, ...] = tuple(
        tier for tier in placement.smaller if tier.phase == "prefill"
    )
    return Candidate(replace(placement, decode=decode, smaller=smaller), candidate.wave)
