"""From a model, a machine and what may be used of it to a plan that can be run; no torch here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace as spec_replace
from pathlib import Path
from typing import Literal, get_args

from msgspec.structs import replace

from hetero.errors import (
    EnvironmentProblemError,
    HeteroError,
    MemoryBudgetError,
    PlanMismatchError,
    UsageError,
)
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
from planner.memory import MARGIN_SHARE, needs
from planner.model_spec import Dtype, ModelSpec, Module, Quantization
from planner.nearest_fit import FittingChange
from planner.placement import MIXED, Device, Placement, TierPlacement, check_matches
from planner.plan import Plan
from planner.question import Question
from planner.rivals import RivalName, rival_names
from planner.search import profile_fingerprint, search
from planner.strategies import STRATEGIES, cuts
from planner.what_if import what_if, what_if_keys
from planner.workload import Objective, Workload

# A quarter of the host's memory is enough to rehearse a plan.
_EMULATED_MEMORY_SHARE = 0.25


# Sequences of a step that share each weight read; beyond this little is gained on a CPU.
MAX_NUM_SEQS = 16

# More are counted one by one for longer than anyone waits.
MAX_PLANNED_SEQS = 100_000

# The emulated link sleeps for as long as a copy takes.
_LINK_BYTES_PER_S = (1e6, 1e15)

# The field of a layer's placement that a module is in.
_FIELD_OF: dict[Module, str] = {
    "attention": "attention",
    "router": "router",
    "dense": "ffn",
    "experts": "ffn",
}

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
    panels = [each for each in hardware.samples if each.backend == "panels"]
    on_gpu = {each.format for each in panels if each.lane == "gpu"}
    unknown = {kind for kind in kinds if not hardware.backends(kind)}
    if hardware.gpu is not None:
        unknown |= (kinds & set(get_args(Quantization))) - on_gpu
    lacking = " and ".join(sorted(unknown))
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
        A budget that is no number or negative, or one that contradicts the plan.
    """
    asked = {
        "--gpu-mem-gb": gpu_mem_gb,
        "--cpu-mem-gb": cpu_mem_gb,
        "link_gb_per_s": link_gb_per_s,
    }
    gpu_bytes, cpu_bytes, link_bytes_per_s = (_bytes_of(*each) for each in asked.items())
    if plan is None:
        return Resources(
            accelerator=accelerator,
            gpu_bytes=gpu_bytes,
            cpu_bytes=cpu_bytes,
            link_bytes_per_s=link_bytes_per_s,
        )
    if accelerator not in ("auto", plan.resources.accelerator):
        raise UsageError(
            f"--accelerator is {accelerator} but the plan is for {plan.resources.accelerator}, "
            f"which is part of --plan; leave --accelerator out, or {_PLAN_AGAIN}"
        )
    for option, value in asked.items():
        if value is not None:
            raise UsageError(
                f"{option} is {value:g} but memory budgets and link rate are part of the plan "
                f"(--plan); leave {option} out, or {_PLAN_AGAIN}"
            )
    return plan.resources


def _bytes_of(option: str, gigabytes: float | None) -> int | None:
    """Bytes of a budget in units of 1e9 bytes."""
    if gigabytes is None:
        return None
    if not 0 <= gigabytes < 1e9:  # which a value that is no number fails
        raise UsageError(f"{option} is {gigabytes} but must be a number of gigabytes, 0 or more")
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


def runnable_profile(profile: HardwareProfile, what: str = "a run") -> HardwareProfile:
    """The profile, if something may be run by it and not only planned.

    Raises
    ------
    UsageError
        It is a datasheet's: a reference machine to ask "what if" of.
    """
    if profile.provenance == "datasheet":
        raise UsageError(
            f"the profile {profile.name} is of a reference machine, which hetero plan can use; "
            f"{what} needs this machine's own: leave --profile out"
        )
    return profile


# What a person calls the parts of `Resources`: options, or fields of a plan's file.
_OPTIONS = {
    "accelerator": "--accelerator",
    "gpu_bytes": "--gpu-mem-gb",
    "cpu_bytes": "--cpu-mem-gb",
    "link_bytes_per_s": "link_gb_per_s",
}
_FIELDS = {name: f"`$.resources.{name}`" for name in _OPTIONS}


def usable_hardware(
    profile: HardwareProfile, resources: Resources, *, is_planned: bool = False
) -> HardwareProfile:
    """The profile cut down to what may be used; without a GPU where its budget is 0.

    `is_planned` says that the resources are those of a plan, by whose fields errors name them.

    Raises
    ------
    EnvironmentProblemError
        CUDA was asked for and the profile has no GPU.
    UsageError
        Resources that contradict each other, a memory budget that is more than the machine has, or
        is for a device that is not used.
    """
    names = _FIELDS if is_planned else _OPTIONS
    why = _contradiction(resources, names)
    if why is None and resources.gpu_bytes == 0:
        resources = replace(resources, accelerator="none", gpu_bytes=None)
    if why is None and resources.accelerator == "cuda" and profile.gpu is None:
        raise EnvironmentProblemError(
            f"{names['accelerator']} is cuda but the profile of {profile.name} has no GPU; use "
            "--accelerator none, or measure again with hetero profile if there is one now"
        )
    hardware = profile
    if resources.accelerator == "none":
        hardware = profile.without_gpu()
    elif resources.accelerator == "emulated":
        share = int(_EMULATED_MEMORY_SHARE * profile.cpu.memory_bytes)
        hardware = profile.with_emulated_gpu(
            memory_bytes=share if resources.gpu_bytes is None else resources.gpu_bytes,
            link_bytes_per_s=resources.link_bytes_per_s or EMULATED_LINK_BYTES_PER_S,
        )
    why = why or _excess(profile, hardware, resources, names)
    if why is not None:
        raise UsageError(f"{why}; {_PLAN_AGAIN}" if is_planned else why)
    return hardware.with_memory(cpu_bytes=resources.cpu_bytes, gpu_bytes=resources.gpu_bytes)


def _contradiction(resources: Resources, names: dict[str, str]) -> str | None:
    """What contradicts itself on any machine; None where nothing does."""
    accelerator, link = names["accelerator"], resources.link_bytes_per_s
    how = f"{accelerator} is {resources.accelerator}"
    if resources.gpu_bytes == 0 and resources.accelerator in ("cuda", "emulated"):
        return f"{names['gpu_bytes']} is 0 but {how}; leave one of them out"
    if resources.gpu_bytes and resources.accelerator == "none":
        return (
            f"{names['gpu_bytes']} is {_gigabytes(resources.gpu_bytes)} but {how}, so that no "
            "accelerator is used; leave one of them out"
        )
    if link is not None and resources.accelerator != "emulated":
        return (
            f"{names['link_bytes_per_s']} is {_gigabytes(link)}/s but {how}, and only an emulated "
            "link can be set; leave one of them out"
        )
    least, most = _LINK_BYTES_PER_S
    if link is not None and not least <= link <= most:
        return (
            f"{names['link_bytes_per_s']} is {_gigabytes(link)}/s but must be "
            f"{_gigabytes(least)}/s to {_gigabytes(most)}/s"
        )
    return None


def _excess(
    profile: HardwareProfile,
    hardware: HardwareProfile,
    resources: Resources,
    names: dict[str, str],
) -> str | None:
    """A budget that the machine does not have; None where it has them."""
    gpu, host_bytes = hardware.gpu, profile.cpu.memory_bytes
    if resources.gpu_bytes is not None and gpu is None:
        return (
            f"{names['gpu_bytes']} is {_gigabytes(resources.gpu_bytes)} but {profile.name} has no "
            f"GPU, so that no accelerator is used; leave it out, or give {names['accelerator']} "
            "emulated to rehearse one"
        )
    is_emulated = gpu is not None and gpu.kind == "emulated"
    gpu_limit = host_bytes if gpu is None or is_emulated else gpu.memory_bytes
    for name, limit in (("gpu_bytes", gpu_limit), ("cpu_bytes", host_bytes)):
        budget: int | None = getattr(resources, name)
        if budget is not None and not 0 <= budget <= limit:
            return (
                f"{names[name]} is {_gigabytes(budget)} but {profile.name} has "
                f"{_gigabytes(limit)}; give less, or leave it out to use what is there"
            )
    left_bytes = host_bytes - (gpu.memory_bytes if gpu is not None and is_emulated else 0)
    if resources.cpu_bytes is not None and resources.cpu_bytes > left_bytes:
        return (
            f"{names['cpu_bytes']} is {_gigabytes(resources.cpu_bytes)} but the emulated "
            f"accelerator leaves {_gigabytes(left_bytes)} of the {_gigabytes(host_bytes)} of "
            f"{profile.name}; lower it or {names['gpu_bytes']}"
        )
    return None


def _gigabytes(num_bytes: float) -> str:
    """Four digits, so that two numbers that differ look different."""
    return f"{num_bytes / 1e9:.4g} GB"


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


def gpu_what_if(text: str | None) -> str | None:
    """The first key of a what-if text that is of the GPU or its link; None where there is none.

    Raises
    ------
    UsageError
        The text is no list of keys and values.
    """
    try:
        keys = () if text is None else what_if_keys(text)
    except PlannerError as error:
        raise UsageError(f"--what-if: {error}") from None
    return next((key for key in keys if key == "link" or key.startswith("gpu")), None)


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
    if workload.num_seqs > MAX_PLANNED_SEQS:
        raise UsageError(
            f"--num-seqs is {workload.num_seqs} but a plan can be for {MAX_PLANNED_SEQS} at most; "
            "plan for fewer, as many as arrive together"
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
            f"{profile.name}, which has none - at `$.resources.accelerator`; {_PLAN_AGAIN}"
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
        f"{spec.name} ({spec.fingerprint}) - at `$.model_fingerprint`; {_PLAN_AGAIN}"
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
            f"with its `$.resources` this is {hardware.name} ({here}) - at "
            f"`$.profile_fingerprint`; {_PLAN_AGAIN}"
        )
    reason = check_matches(plan.placement, spec)
    if reason is not None:
        raise PlanMismatchError(f"{reason}; {_PLAN_AGAIN}")
    for name, tier in plan.placement.named_tiers:
        _check_is_named_rightly(tier, f"$.placement.{name}", spec)
    on_gpu = _first_on_gpu(plan.placement)
    if hardware.gpu is None and on_gpu is not None:
        raise PlanMismatchError(
            f"the plan uses the gpu but {hardware.name} is used without one - at `{on_gpu}`; "
            f"{_PLAN_AGAIN}"
        )
    if plan.workload.context_len > spec.max_position_embeddings:
        raise PlanMismatchError(
            f"prompt and output of the plan come to {plan.workload.context_len} tokens but "
            f"{spec.name} has a context of {spec.max_position_embeddings} - at `$.workload`; "
            f"{_PLAN_AGAIN}"
        )
    lacking = lacking_memory(plan, spec, hardware)
    if lacking is not None:
        raise MemoryBudgetError(
            f"{lacking} - at `$.placement`, for `$.workload` within `$.resources`"
        )


def _check_is_named_rightly(tier: TierPlacement, path: str, spec: ModelSpec) -> None:
    """Refuse a tier that is called a named strategy and is another.

    Raises
    ------
    PlanMismatchError
        Names the strategy, its cut, and what they would be.
    """
    if tier.strategy not in STRATEGIES:
        return
    known = cuts(tier.strategy, spec, has_gpu=True)
    if tier.cut not in known:
        raise PlanMismatchError(
            f"cut is {tier.cut} but {tier.strategy} of {spec.name} has {known.start} to "
            f"{known.stop - 1} - at `{path}.cut`; {_PLAN_AGAIN}"
        )
    named = STRATEGIES[tier.strategy](spec, tier.phase, tier.cut)
    if replace(named, max_num_tokens=tier.max_num_tokens) != tier:
        raise PlanMismatchError(
            f"`{path}` is not where {tier.strategy} with cut {tier.cut} has everything; call its "
            f"strategy {MIXED} with cut 0, or {_PLAN_AGAIN}"
        )


def _first_on_gpu(placement: Placement) -> str | None:
    """Path of the first module that lies or runs on the GPU; None where the CPU has them all."""
    for name, tier in placement.named_tiers:
        modules = [("embedding", tier.embedding), ("head", tier.head)]
        for index, layer in enumerate(tier.layers):
            modules += [(f"layers[{index}].{_FIELD_OF[each]}", at) for each, at in layer.modules()]
        for path, where in modules:
            if where.lives == "gpu" or "gpu" in where.devices:
                return f"$.placement.{name}.{path}"
    return None


@contextlib.contextmanager
def naming(path: Path | None) -> Iterator[None]:
    """Put a plan's file, where it is from one, before what is wrong with it."""
    try:
        yield
    except HeteroError as error:
        if path is None:
            raise
        raise type(error)(f"{path}: {error}") from None


def lacking_memory(
    plan: Plan, spec: ModelSpec, hardware: HardwareProfile, nearest: str | None = None
) -> str | None:
    """Why a plan does not fit, in one sentence with the nearest that would; None where it fits.

    `nearest` says what would fit, where that was looked for; it is empty where nothing would.
    """
    short = {
        device: need
        for device, need in needs(spec, plan.placement, plan.wave, hardware).items()
        if not need.fits
    }
    if not short:
        return None
    parts = " and ".join(
        f"{_gigabytes(need.needed_bytes)} on the {device} where "
        f"{_gigabytes(need.available_bytes)} may be used"
        for device, need in short.items()
    )
    fitting = next((other for other in plan.alternatives if other.feasible), None)
    if fitting is not None:
        fix = f"the nearest that fits is {fitting.name}"
    elif nearest:
        fix = nearest
    else:
        flags = " and ".join(
            f"--{device}-mem-gb to {_budget_for(need.needed_bytes, device)}"
            for device, need in short.items()
        )
        less = "use a smaller model" if nearest == "" else "ask for fewer or shorter sequences"
        fix = f"raise {flags} where the machine has that, or {less}"
    return f"{plan.model} as {plan.placement.name} needs {parts}; {fix}"


def _budget_for(num_bytes: int, device: Device) -> str:
    """The least budget of a device that has room for so many bytes, three digits rounded up."""
    gigabytes = num_bytes / (1.0 - MARGIN_SHARE[device]) / 1e9
    step = 10.0 ** (math.floor(math.log10(gigabytes)) - 2)
    return f"{math.ceil(gigabytes / step) * step:.3g}"


def why_not_feasible(plan: Plan, question: Question, found: Sequence[FittingChange]) -> str:
    """Why the nearest miss of a question does not fit, and what would."""
    from hetero.explain_view import nearest_text  # brings rich

    nearest = nearest_text(found) or ""
    lacking = lacking_memory(plan, question.spec, question.hardware, nearest)
    assert lacking is not None
    return lacking
