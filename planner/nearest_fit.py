"""What would fit where nothing does: less context, fewer sequences, smaller weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from msgspec.structs import replace

from planner.device import DeviceProfile
from planner.memory import available_bytes
from planner.model_spec import ModelSpec, Quantization
from planner.plan import Plan
from planner.question import Question
from planner.workload import Workload

Shortened = Literal["prompt_len", "output_len", "num_seqs"]
Change = Shortened | Literal["strategy", "quantization"]

# Searches until a length is near enough: to a 64th of what was asked for.
_MAX_HALVINGS = 6
# A context of less than this share of what was asked for answers another question.
_LEAST_SHARE = 1 / 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FittingChange:
    """A change with which a model fits, and how fast it would be.

    Attributes
    ----------
    change : Change
        What is other than asked for.
    options : str
        The command line's options that ask for it; `no --strategy` to leave that one out.
    workload : Workload
        What would be run.
    quantization : Quantization or None
        The weights' format where it is another.
    placement : str
        Name of the placement.
    ttft_s, tpot_s, e2e_s : float
        Predicted seconds, as in `planner.plan.Estimate`.
    decode_tokens_per_s : float
        Tokens of all sequences that run at once.
    """

    change: Change
    options: str
    workload: Workload
    quantization: Quantization | None
    placement: str
    ttft_s: float
    tpot_s: float
    e2e_s: float
    decode_tokens_per_s: float


def nearest_fits(question: Question) -> tuple[FittingChange, ...]:
    """Changes with which something fits; empty where none of them is enough.

    Where one strategy was asked for, any other comes first.

    Lengths and sequences are the most that fit, to a 64th of what was asked for, or of 64 times as
    many as fit where that is less, each found with few searches, none where the weights alone are
    too large; lengths are no less than a 16th of what was asked for. int8 and int4 are those of
    the command line, without a GPU whose rates of them are not known; where that alone is not
    enough, with fewer sequences or else shorter prompts as well.

    Parameters
    ----------
    question : Question
        What nothing fits.
    """
    found: list[FittingChange | None] = [_without_strategy(question)]
    if _weights_may_fit(question):
        found += [_shortened(question, each) for each in ("prompt_len", "output_len", "num_seqs")]
    found += [_quantised(question, kind) for kind in ("int8", "int4")]
    return tuple(each for each in found if each is not None)


def _without_strategy(question: Question) -> FittingChange | None:
    if question.strategy is None:
        return None
    plan = dataclasses.replace(question, strategy=None).plan()
    return _fitting("strategy", "no --strategy", plan, None) if plan.feasible else None


def _weights_may_fit(question: Question) -> bool:
    """No where not even both memories together hold every weight once."""
    limit = sum(available_bytes(question.hardware, device) for device in ("gpu", "cpu"))
    return question.spec.total_weight_bytes() <= limit


def _shortened(question: Question, change: Shortened) -> FittingChange | None:
    asked: int = getattr(question.workload, change)

    def plan_of(value: int) -> Plan:
        workload = replace(question.workload, **{change: value})
        return dataclasses.replace(question, workload=workload).plan()

    least = 1 if change == "num_seqs" else math.ceil(asked * _LEAST_SHARE)
    found = _most_that_fits(least, asked, plan_of)
    if found is None:
        return None
    value, plan = found
    return _fitting(change, f"--{change.replace('_', '-')} {value}", plan, None)


def _most_that_fits(
    least: int, asked: int, plan_of: Callable[[int], Plan]
) -> tuple[int, Plan] | None:
    """The largest number below the one that does not fit with which a plan does, nearly."""
    if asked == least:
        return None
    low, plan = least, plan_of(least)
    if not plan.feasible:
        return None
    high, num_halvings = asked, 0
    while high - low > 1 and num_halvings < _MAX_HALVINGS:
        middle = (low + high) // 2
        if high > low << _MAX_HALVINGS:
            middle = math.isqrt(low * high)  # of many orders of magnitude the order first
        else:
            num_halvings += 1
        tried = plan_of(middle)
        if tried.feasible:
            low, plan = middle, tried
        else:
            high = middle
    return low, plan


def _quantised(question: Question, kind: Quantization) -> FittingChange | None:
    spec = quantised(question.spec, kind)
    if spec is None:
        return None
    options, hardware = f"--quantization {kind}", question.hardware
    if hardware.gpu is not None and not _knows(hardware.gpu, spec):
        if question.strategy not in (None, "cpu"):
            return None
        options, hardware = f"{options} --accelerator none", hardware.without_gpu()
    changed = dataclasses.replace(question, spec=spec, hardware=hardware)
    if not (_weights_may_fit(changed) and _knows(hardware.cpu, spec)):
        return None
    plan = changed.plan()
    if plan.feasible:
        return _fitting("quantization", options, plan, kind)
    for change in ("num_seqs", "prompt_len"):
        found = _shortened(changed, change)
        if found is not None:
            return dataclasses.replace(
                found,
                change="quantization",
                options=f"{options} {found.options}",
                quantization=kind,
            )
    return None


def _knows(device: DeviceProfile, spec: ModelSpec) -> bool:
    """Does the profile know products of the model's formats? Some know no quantised ones."""
    kinds = {spec.weight_kind(module) for layer in spec.layers for module in layer.modules}
    return {*kinds, spec.weight_kind("head")} <= set(device.flop_per_s)


def quantised(spec: ModelSpec, kind: Quantization) -> ModelSpec | None:
    """A model in a format of fewer bits; None where it has no more bits than that.

    What stays as it is (embedding, routers, norms) becomes bfloat16 where it was float16, which a
    CPU does not compute with.
    """
    if spec.quantization in (kind, "int4"):
        return None
    dtype = "bfloat16" if spec.dtype == "float16" else spec.dtype
    return dataclasses.replace(spec, dtype=dtype, quantization=kind)


def _fitting(
    change: Change, options: str, plan: Plan, quantization: Quantization | None
) -> FittingChange:
    return FittingChange(
        change=change,
        options=options,
        workload=plan.workload,
        quantization=quantization,
        placement=plan.placement.name,
        ttft_s=plan.estimate.ttft_s,
        tpot_s=plan.estimate.tpot_s,
        e2e_s=plan.estimate.e2e_s,
        decode_tokens_per_s=plan.estimate.decode_tokens_per_s,
    )
