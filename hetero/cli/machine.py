"""What plan and run share: options on the machine, its profile, and the model as it will run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hetero.errors import UsageError

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
    gigabytes = click.FloatRange(min=0, max=1e6)
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
            help="Round weights to so many bits while they load.",
        ),
        click.option(
            "--strategy",
            type=click.Choice(STRATEGIES),
            help="Only this way of dividing the model; its cut point is still searched.",
        ),
        click.option(
            "--cpu-mem-gb", type=gigabytes, help="Host memory that may be used, in 1e9 bytes."
        ),
        click.option(
            "--gpu-mem-gb",
            type=gigabytes,
            help="GPU memory that may be used, in 1e9 bytes; 0 leaves the GPU out.",
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
    resources = resources_asked(plan, options.accelerator, *budgets)
    return usable_hardware(profile, resources, is_planned=plan is not None)


def check_agree(
    options: MachineOptions,
    strategy: str | None,
    gpu_what_if: str | None = None,
) -> None:
    """Refuse options of which some need an accelerator and others leave it out, on any machine.

    `gpu_what_if` is what --what-if changes of the GPU or its link.

    Raises
    ------
    UsageError
        Names both options.
    """
    if options.allow_foreign_profile and options.profile is None:
        raise UsageError("--allow-foreign-profile is for a --profile, and none was given; add one")
    accelerator = f"--accelerator {options.accelerator}"
    budget = "" if options.gpu_mem_gb is None else f"--gpu-mem-gb {options.gpu_mem_gb:g}"
    needing = (
        (f"--strategy {strategy}", strategy not in (None, "cpu")),
        (accelerator, options.accelerator in ("cuda", "emulated")),
        (budget, bool(options.gpu_mem_gb)),
        (f"--what-if {gpu_what_if}", gpu_what_if is not None),
    )
    without = (
        (accelerator, options.accelerator == "none"),
        (budget, options.gpu_mem_gb == 0),
    )
    needs = next((option for option, is_given in needing if is_given), None)
    leaves_out = next((option for option, is_given in without if is_given), None)
    if needs is not None and leaves_out is not None:
        raise UsageError(
            f"{needs} is for an accelerator but with {leaves_out} the CPU does all the work; leave "
            "one of them out"
        )


def lookup_model(model: str | None) -> ModelSource:
    """Find a model in the places that the environment names."""
    from hetero.model_lookup import default_hub_cache, find_model

    return find_model(model, hub_cache=default_hub_cache(os.environ))


def output_path(context: click.Context, option: click.Parameter, value: Path | None) -> Path | None:
    """Refuse before the work, not after it, a file whose folder is missing, or no plain file.

    A new file takes the place of what is there, which must not be a device.
    """
    if value is not None and not value.parent.is_dir():
        raise click.BadParameter(f"the folder {value.parent} does not exist", context, option)
    if value is not None and (value.is_symlink() or (value.exists() and not value.is_file())):
        raise click.BadParameter(
            f"{value} is no plain file, which a new one would replace; name another",
            context,
            option,
        )
    return value


def check_distinct(**paths: Path | None) -> None:
    """Refuse one file for two options, of which a later one would be written over the other.

    Raises
    ------
    UsageError
        Names both options and the file.
    """
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        option = f"--{name}"
        first = seen.setdefault(path.resolve(), option)
        if first != option:
            raise UsageError(f"{first} and {option} are both {path}; name two files")
