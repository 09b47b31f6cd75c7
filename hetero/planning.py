"""From a model, a machine and what may be used of it to a plan that can be run; no torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as spec_replace
from pathlib import Path
from typing import Literal, get_args

from hetero.errors import EnvironmentProblemError, MemoryBudgetError, PlanMismatchError, UsageError
from hetero.measure.store import find_profile, load_or_measure, why_foreign
from hetero.model_lookup import ModelSource, read_model_spec
from planner.calibration import NO_CORRECTIONS, Corrections
from planner.errors import PlannerError
from planner.hardware import (
    EMULATED_LINK_BYTES_PER_S,
    AcceleratorName,
    HardwareProfile,
    Resources,
)
from planner.memory import needs
from planner.model_spec import Dtype, ModelSpec, Quantization
from planner.placement import check_matches
from planner.plan import Plan
from planner.rivals import RivalName, rival_names
from planner.search import profile_fingerprint, search
from planner.what_if import what_if, what_if_keys
from planner.workload import Objective, Workload

# A quarter of the host's memory is enough to rehearse a plan.
_EMULATED_MEMORY_SHARE = 0.25


# Sequences of a step that share each weight read; beyond this little is gained on a CPU.
MAX_NUM_SEQS = 16

_PLAN_AGAIN = "plan again with: hetero plan"

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def spec_as_run(
    source: ModelSource,
    dtype: DtypeName,
    hardware: HardwareProfile,
    say: Callable[[str], None] | None = None,
    quantization: Quantization | None = None,
    plan: Plan | None = None,
) -> ModelSpec:
    """The shapes of a model in the format in which it will run; `auto` is the checkpoint's own.

    A plan has its own format, which is taken where none is asked for. float16 becomes float32 where
    the CPU does all the work: it has no float16 arithmetic of any speed (70 times slower than
    bfloat16 where it was measured).

    Raises
    ------
    UsageError
        Quantised weights on a machine whose GPU may be used.
    PlanMismatchError
        The plan is for another model, or for another format than the one that is asked for.
    """
    if plan is not None:
        planned = _planned_spec(plan, read_model_spec(source))
        kind = quantization or planned.quantization
        if dtype != "auto" or kind != planned.quantization:
            kept_dtype = planned.dtype if dtype == "auto" else dtype
            _check_format(plan, planned, spec_as_run(source, kept_dtype, hardware, say, kind))
        return planned
    spec = read_model_spec(source, None if dtype == "auto" else dtype)
    if quantization is not None:
        if hardware.gpu is not None:
            raise UsageError(
                f"{quantization} weights run on the CPU only so far; use --accelerator none "
                "(accelerator='none'), or leave the quantization out"
            )
        if spec.dtype != "float16":
            return spec_replace(spec, quantization=quantization)
        if say is not None:
            say(
                f"warning: what {quantization} leaves of float16 weights (embedding, routers, "
                "norms) runs as bfloat16, which has fewer digits; --dtype float32 keeps them"
            )
        return spec_replace(spec, dtype="bfloat16", quantization=quantization)
    if dtype == "auto" and spec.dtype == "float16" and hardware.gpu is None:
        if say is not None:
            say(
                "warning: float16 weights run as float32 on this CPU, in twice the memory; "
                "bfloat16 (--dtype) keeps the size and loses digits"
            )
        return spec_replace(spec, dtype="float32")
    return spec


def assumed_note(spec: ModelSpec, hardware: HardwareProfile) -> str | None:
    """What to say of rates that a profile lacks and the planner assumes; None where it has all."""
    if hardware.provenance == "datasheet" or not hardware.samples:
        return None
    kinds = {spec.weight_kind(module) for layer in spec.layers for module in layer.modules}
    kinds.add(spec.weight_kind("head"))
    lacking = " and ".join(sorted(kind for kind in kinds if not hardware.backends(kind)))
    if not lacking:
        return None
    return (
        f"{hardware.name} has no samples of {lacking} products; they are assumed from others, and "
        "so is the predicted speed; hetero profile measures them"
    )


def resources_asked(
    plan: Plan | None,
    accelerator: AcceleratorName,
    gpu_mem_gb: float | None = None,
    cpu_mem_gb: float | None = None,
    link_gb_per_s: float | None = None,
) -> Resources:
    """What may be used: as asked, or as a plan says, which decides it alone.

    Raises
    ------
    UsageError
        A budget that is not a positive number, or one that contradicts the plan.
    """
    asked = Resources(
        accelerator=accelerator,
        gpu_bytes=_bytes_of("gpu_mem_gb", gpu_mem_gb),
        cpu_bytes=_bytes_of("cpu_mem_gb", cpu_mem_gb),
        link_bytes_per_s=_bytes_of("link_gb_per_s", link_gb_per_s),
    )
    if plan is None:
        return asked
    if accelerator not in ("auto", plan.resources.accelerator):
        raise UsageError(
            f"accelerator is {accelerator} but the plan is for {plan.resources.accelerator}; "
            "leave it out or plan again"
        )
    if asked != Resources(accelerator=accelerator):
        raise UsageError("memory budgets and link rate are part of the plan: leave them out")
    return plan.resources


def _bytes_of(name: str, gigabytes: float | None) -> int | None:
    """Bytes of a budget in units of 1e9 bytes."""
    if gigabytes is None:
        return None
    if not 0 < gigabytes < 1e9:
        raise UsageError(f"{name} is {gigabytes} but must be a positive number of gigabytes")
    return int(gigabytes * 1e9)


def base_profile(
    name: str | None,
    cache_dir: Path,
    progress: Callable[[str], None] | None = None,
    *,
    allow_foreign: bool = False,
) -> HardwareProfile:
    """A named or stored profile, or this machine's own, measured quickly if it has none.

    Raises
    ------
    UsageError
        There is no such profile, or it was measured on another machine.
    """
    if name is None:
        return load_or_measure(cache_dir, progress=progress)[0]
    try:
        profile = find_profile(name)
    except PlannerError as error:
        raise UsageError(str(error)) from None
    check_own_profile(profile, progress, allow_foreign=allow_foreign)
    return profile


def check_own_profile(
    profile: HardwareProfile,
    progress: Callable[[str], None] | None = None,
    *,
    allow_foreign: bool = False,
) -> None:
    """Refuse a profile that was measured on another machine, or warn of it where it is allowed.

    A reference machine, from a datasheet, is another one for all to see.

    Raises
    ------
    UsageError
        Names the first difference, and how to go on. What is wrong is the profile that was asked
        for, not the machine, which could run it under another.
    """
    foreign = None if profile.provenance == "datasheet" else why_foreign(profile)
    if foreign is None:
        return
    if not allow_foreign:
        raise UsageError(
            f"the profile of {profile.name} is of another machine: {foreign}; leave --profile "
            "(profile=) out to use this machine's own, or give --allow-foreign-profile "
            "(allow_foreign_profile=True) to ask what if"
        )
    if progress is not None:
        progress(f"warning: the profile of {profile.name} is of another machine: {foreign}")


def low_confidence_note(profile: HardwareProfile) -> str | None:
    """What to do about a profile of a busy machine; None where it can be trusted."""
    if profile.confidence == "high":
        return None
    return "predictions have low confidence; when the machine is idle, run: hetero profile"


def runnable_profile(profile: HardwareProfile) -> HardwareProfile:
    """The profile, if something may be run by it and not only planned.

    Raises
    ------
    UsageError
        It is a datasheet's: a reference machine to ask "what if" of.
    """
    if profile.provenance == "datasheet":
        raise UsageError(
            f"the profile {profile.name} is of a reference machine, which hetero plan can use; "
            "a run needs this machine's own: leave --profile out"
        )
    return profile


def usable_hardware(profile: HardwareProfile, resources: Resources) -> HardwareProfile:
    """The profile cut down to what may be used.

    Raises
    ------
    EnvironmentProblemError
        CUDA was asked for and the profile has no GPU.
    UsageError
        A memory budget is more than the machine has, or is for a device that is not used.
    """
    own_gpu = profile.gpu
    if resources.accelerator == "none":
        hardware = profile.without_gpu()
    elif resources.accelerator == "emulated":
        share = int(_EMULATED_MEMORY_SHARE * profile.cpu.memory_bytes)
        hardware = profile.with_emulated_gpu(
            memory_bytes=share if resources.gpu_bytes is None else resources.gpu_bytes,
            link_bytes_per_s=resources.link_bytes_per_s or EMULATED_LINK_BYTES_PER_S,
        )
    elif resources.accelerator == "cuda" and own_gpu is None:
        raise EnvironmentProblemError(
            f"--accelerator cuda was asked for but the profile of {profile.name} has no GPU; use "
            "--accelerator none, or measure again with hetero profile if there is one now"
        )
    else:
        hardware = profile
    if resources.gpu_bytes is not None and hardware.gpu is None:
        raise UsageError(
            "--gpu-mem-gb was given but no accelerator is used; leave it out or give --accelerator"
        )
    for flag, budget, device in (
        ("--gpu-mem-gb", resources.gpu_bytes, hardware.gpu),
        ("--cpu-mem-gb", resources.cpu_bytes, profile.cpu),
    ):
        limit = device.memory_bytes if device is not None else 0
        if device is not None and device.kind == "emulated":
            limit = profile.cpu.memory_bytes
        if budget is not None and budget > limit:
            raise UsageError(
                f"{flag} is {budget / 1e9:.2f} GB but {profile.name} has {limit / 1e9:.2f} GB; "
                "give less, or leave it out to use what is there"
            )
    return hardware.with_memory(cpu_bytes=resources.cpu_bytes, gpu_bytes=resources.gpu_bytes)


def changed_hardware(
    hardware: HardwareProfile,
    text: str | None,
    gpu_mem_gb: float | None = None,
    cpu_mem_gb: float | None = None,
) -> HardwareProfile:
    """The machine as a what-if text would have it (`planner.what_if`); as it is without one.

    Raises
    ------
    UsageError
        The text does not apply, or changes a memory for which a budget was given.
    """
    if text is None:
        return hardware
    try:
        changed = what_if(hardware, text)
    except PlannerError as error:
        raise UsageError(f"--what-if: {error}") from None
    for device, budget in (("gpu", gpu_mem_gb), ("cpu", cpu_mem_gb)):
        if budget is not None and f"{device}-mem-gb" in what_if_keys(text):
            raise UsageError(
                f"--{device}-mem-gb is {budget} and --what-if changes {device}-mem-gb too: {text}; "
                "give one of them"
            )
    return changed


def rivals_asked(text: str | None) -> tuple[RivalName, ...]:
    """Whom to compare a plan with.

    Raises
    ------
    UsageError
        A name is unknown.
    """
    try:
        return () if text is None else rival_names(text)
    except PlannerError as error:
        raise UsageError(f"--compare: {error}") from None


def default_workload(
    max_model_len: int,
    *,
    prompt_len: int | None = None,
    output_len: int | None = None,
    num_seqs: int = 1,
) -> Workload:
    """A short chat turn, or half of a context that is shorter than that; what is given is kept.

    Examples
    --------
    >>> default_workload(4096).prompt_len, default_workload(4096).output_len
    (512, 128)
    >>> default_workload(300).prompt_len, default_workload(300).output_len
    (150, 128)
    """
    if prompt_len is None:
        room = max_model_len // 2 if output_len is None else max_model_len - output_len
        prompt_len = max(1, min(512, room))
    if output_len is None:
        output_len = max(1, min(128, max_model_len - prompt_len))
    return Workload(prompt_len=prompt_len, output_len=output_len, num_seqs=num_seqs)


def make_plan(
    spec: ModelSpec,
    hardware: HardwareProfile,
    workload: Workload,
    objective: Objective = "latency",
    *,
    strategy: str | None = None,
    corrections: Corrections = NO_CORRECTIONS,
) -> Plan:
    """Search, with the planner's complaints as errors that a user can fix.

    Raises
    ------
    UsageError
        The workload is longer than the model's context, or the strategy does not apply.
    """
    if workload.context_len > spec.max_position_embeddings:
        raise UsageError(
            f"prompt and output come to {workload.context_len} tokens but {spec.name} has a "
            f"context of {spec.max_position_embeddings}; lower --prompt-len or --output-len"
        )
    try:
        return search(
            spec, hardware, workload, objective, strategy=strategy, corrections=corrections
        )
    except PlannerError as error:
        raise UsageError(str(error)) from None


def check_plan_is_for(plan: Plan, source: ModelSource, profile: HardwareProfile) -> None:
    """Refuse a plan for another model or machine before anything else is said of either.

    Raises
    ------
    PlanMismatchError
        Names the model or machine of the plan and the one at hand.
    """
    _planned_spec(plan, read_model_spec(source))
    if plan.resources.accelerator == "cuda" and profile.gpu is None:
        raise PlanMismatchError(
            f"the plan was made for the machine {plan.profile} and its GPU but this is "
            f"{profile.name}, which has none; {_PLAN_AGAIN}"
        )


def _planned_spec(plan: Plan, spec: ModelSpec) -> ModelSpec:
    """The model in the format that a plan was made for.

    Raises
    ------
    PlanMismatchError
        The plan was made for another model.
    """
    for dtype in get_args(Dtype):
        for quantization in (None, *get_args(Quantization)):
            planned = spec_replace(spec, dtype=dtype, quantization=quantization)
            if planned.fingerprint == plan.model_fingerprint:
                return planned
    raise PlanMismatchError(
        f"the plan was made for model {plan.model} ({plan.model_fingerprint}) but this is "
        f"{spec.name} ({spec.fingerprint}); {_PLAN_AGAIN}"
    )


def _check_format(plan: Plan, planned: ModelSpec, asked: ModelSpec) -> None:
    """Refuse a plan for weights in another format, and say which option makes them agree.

    Raises
    ------
    PlanMismatchError
        The quantization or the dtype is another.
    """
    for option, planned_as, asked_as in (
        ("quantization", planned.quantization, asked.quantization),
        ("dtype", planned.dtype, asked.dtype),
    ):
        if planned_as == asked_as:
            continue
        fix = f"give --{option} {planned_as} ({option}='{planned_as}')"
        if planned_as is None:
            fix = f"leave --{option} out"
        raise PlanMismatchError(
            f"the plan of {plan.model} was made with {option} {planned_as or 'none'} but the run "
            f"has {asked_as or 'none'}; {fix}, or {_PLAN_AGAIN}"
        )


def check_plan(plan: Plan, spec: ModelSpec, hardware: HardwareProfile) -> None:
    """Refuse a plan that was made for something else, or that does not fit.

    Raises
    ------
    PlanMismatchError
        Another model or format, another machine, or layers that the model does not have.
    MemoryBudgetError
        The placement needs more memory than there is; names the nearest that fits.
    """
    _check_format(plan, _planned_spec(plan, spec), spec)
    here = profile_fingerprint(hardware)
    if plan.profile_fingerprint != here:
        raise PlanMismatchError(
            f"the plan was made for the machine {plan.profile} ({plan.profile_fingerprint}) but "
            f"this is {hardware.name} ({here}); {_PLAN_AGAIN}"
        )
    reason = check_matches(plan.placement, spec)
    if reason is not None:
        raise PlanMismatchError(f"{reason}; {_PLAN_AGAIN}")
    lacking = lacking_memory(plan, spec, hardware)
    if lacking is not None:
        raise MemoryBudgetError(lacking)


def lacking_memory(
    plan: Plan, spec: ModelSpec, hardware: HardwareProfile, nearest: str | None = None
) -> str | None:
    """Why a plan does not fit, in one sentence with the nearest that would; None where it fits.

    `nearest` says what would fit, where that was looked for.
    """
    short = {
        device: need
        for device, need in needs(spec, plan.placement, plan.wave, hardware).items()
        if not need.fits
    }
    if not short:
        return None
    parts = " and ".join(
        f"{need.needed_bytes / 1e9:.2f} GB on the {device} where {need.available_bytes / 1e9:.2f} "
        "GB may be used"
        for device, need in short.items()
    )
    fitting = next((other for other in plan.alternatives if other.feasible), None)
    if fitting is not None:
        fix = f"the nearest that fits is {fitting.name}"
    elif nearest is not None:
        fix = nearest
    else:
        flags = " and ".join(f"--{device}-mem-gb" for device in short)
        fix = f"raise {flags}, or ask for fewer or shorter sequences"
    return f"{plan.model} as {plan.placement.name} needs {parts}; {fix}"
