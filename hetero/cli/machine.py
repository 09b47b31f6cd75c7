"""What plan and run share: options on the machine, its profile, and the model as it will run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from hetero.model_lookup import ModelSource
    from planner.hardware import AcceleratorName, HardwareProfile
    from planner.plan import Plan

# The choices of click are made when the command is defined, without the planner.
QUANTIZATIONS = ("int8", "int4")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ACCELERATORS = ("auto", "none", "cuda", "emulated")
STRATEGIES = ("gpu", "cpu", "offload", "split", "experts-on-cpu")
RIVALS = (
    *("llama-fit", "flexgen", "accelerate"),
    *("experts-on-cpu", "split", "offload", "cpu", "gpu"),
)

# of cpu_kernels.compiling, which takes 0.1 s to import
_KERNEL_CACHE = "HETERO_KERNEL_CACHE"

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """What of which machine may be used, as the command line said it."""

    profile: str | None
    allow_foreign_profile: bool
    accelerator: AcceleratorName
    gpu_mem_gb: float | None
    cpu_mem_gb: float | None


def machine_options(command: _Command) -> _Command:
    """Add the machine's profile, --accelerator, budgets, --strategy, --dtype, --quantization."""
    positive = click.FloatRange(min=0, max=1e6, min_open=True)
    for option in (
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="auto",
            show_default=True,
            help="Weights and arithmetic; auto is the checkpoint's own.",
        ),
        click.option(
            "--quantization",
            type=click.Choice(QUANTIZATIONS),
            help="Round weights to so many bits while they load; on the CPU only.",
        ),
        click.option(
            "--strategy",
            type=click.Choice(STRATEGIES),
            help="Only this way of dividing the model; its cut point is still searched.",
        ),
        click.option(
            "--cpu-mem-gb", type=positive, help="Host memory that may be used, in 1e9 bytes."
        ),
        click.option(
            "--gpu-mem-gb", type=positive, help="GPU memory that may be used, in 1e9 bytes."
        ),
        click.option(
            "--accelerator",
            type=click.Choice(ACCELERATORS),
            default="auto",
            show_default=True,
            help="What to use beside the CPU; emulated rehearses a GPU on one core.",
        ),
        click.option(
            "--allow-foreign-profile",
            is_flag=True,
            help="Take a --profile that was measured on another machine.",
        ),
        click.option(
            "--profile",
            metavar="NAME|PATH",
            help="The machine: a reference machine or a file; otherwise this machine as measured.",
        ),
    ):
        command = option(command)
    return command


def say(line: str) -> None:
    """A line of progress or a warning."""
    from hetero.terminal_text import one_line

    click.echo(one_line(line), err=True)


def use_kernel_cache(progress: Callable[[str], None] = say) -> None:
    """Keep compiled kernels in hetero's own cache; an error where that is not safe."""
    from hetero.measure.store import CacheNotWritableError, default_cache_dir, kernel_cache_dir

    if _KERNEL_CACHE in os.environ:
        return
    try:
        os.environ[_KERNEL_CACHE] = str(kernel_cache_dir(default_cache_dir(os.environ)))
    except CacheNotWritableError as error:
        os.environ[_KERNEL_CACHE] = os.devnull  # not a folder: nothing is kept, nor said twice
        progress(f"warning: compiled kernels are not kept and will be compiled again: {error}")


def read_profile(options: MachineOptions, progress: Callable[[str], None] = say) -> HardwareProfile:
    """A named profile, or this machine's own, measured now if it has none."""
    from hetero.measure.store import default_cache_dir
    from hetero.planning import base_profile

    if options.profile is None:
        use_kernel_cache(progress)
    return base_profile(
        options.profile,
        default_cache_dir(os.environ),
        progress,
        allow_foreign=options.allow_foreign_profile,
    )


def usable_part(
    profile: HardwareProfile, options: MachineOptions, plan: Plan | None = None
) -> HardwareProfile:
    """The part of a machine that may be used: by a plan's own account, or by the options."""
    from hetero.planning import resources_asked, usable_hardware

    budgets = (options.gpu_mem_gb, options.cpu_mem_gb)
    return usable_hardware(profile, resources_asked(plan, options.accelerator, *budgets))


def lookup_model(model: str | None) -> ModelSource:
    """Find a model in the places that the environment names."""
    from hetero.model_lookup import default_hub_cache, find_model

    return find_model(model, hub_cache=default_hub_cache(os.environ))


def output_path(context: click.Context, option: click.Parameter, value: Path | None) -> Path | None:
    """Refuse before the work, not after it, a file whose folder is missing."""
    if value is not None and not value.parent.is_dir():
        raise click.BadParameter(f"the folder {value.parent} does not exist", context, option)
    return value
