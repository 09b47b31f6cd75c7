"""`hetero profile`: measure this machine, keep the profile, show it."""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path

import click

from hetero.cli.machine import output_path
from hetero.errors import UsageError
from planner.device import DeviceProfile, Sample
from planner.hardware import HardwareProfile


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_path,
    help="Also write the profile to this file.",
)
@click.option("--quick", is_flag=True, help="10 s instead of a minute and a half: fewer samples.")
@click.option(
    "--model",
    help="Measure this model's own shapes as well, in all formats that it can run in.",
)
@click.option("--list", "is_list", is_flag=True, help="List the reference machines, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print the profile as one JSON document.")
def profile(
    output: Path | None, quick: bool, model: str | None, is_list: bool, as_json: bool
) -> None:
    """Measure this machine: CPU by thread count, GPU and link where there is one."""
    if is_list:
        if quick or as_json or output is not None or model is not None:
            raise UsageError("--list only lists the reference machines: give it alone")
        _print_machines()
        return
    from hetero.measure.machine import measure_machine
    from hetero.measure.store import (
        default_cache_dir,
        measuring,
        store_profile,
        write_atomically,
    )
    from hetero.model_lookup import default_hub_cache, find_model, read_model_spec

    spec = None
    if model is not None:
        spec = read_model_spec(find_model(model, hub_cache=default_hub_cache(os.environ)))
    cache_dir = default_cache_dir(os.environ)
    # A folder that cannot be used is found before a minute of measuring, not after it.
    with measuring(cache_dir, _progress):
        measured = measure_machine(quick=quick, progress=_progress, spec=spec)
        if output is not None:
            write_atomically(output, measured.to_json(), is_private=False)
            _progress(f"wrote {output}")
        _progress(f"stored the profile in {store_profile(cache_dir, measured)}")
    if as_json:
        click.echo(measured.to_json(), nl=False)
    else:
        _print_table(measured)


def _print_machines() -> None:
    """Each reference machine: its name for --profile, and its devices with their memory."""
    from hetero.measure.store import find_profile, machine_names

    width = max(map(len, machine_names()))
    for name in machine_names():
        machine = find_profile(name)
        devices = [device for device in (machine.gpu, machine.cpu) if device is not None]
        texts = [f"{device.name}, {device.memory_bytes / 1e9:.0f} GB" for device in devices]
        click.echo(f"{name:<{width}}  {'; '.join(texts)}")


def _progress(line: str) -> None:
    click.echo(line, err=True)


def _print_table(measured: HardwareProfile) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    devices = [*measured.cpu_by_threads, *([measured.gpu] if measured.gpu else [])]
    # A pipe has no width: 80 columns would cut the table of a machine with many cores.
    console = Console(width=None if os.isatty(1) else 200, highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, title=measured.name, title_justify="left")
    table.add_column("")
    for device in devices:
        table.add_column(_column_name(device), justify="right")
    for name, cells in _rows(measured, devices):
        table.add_row(name, *cells)
    if measured.link is not None:
        link = measured.link
        table.caption = (
            f"link: {link.h2d_bytes_per_s / 1e9:.1f} GB/s to the GPU, "
            f"{link.d2h_bytes_per_s / 1e9:.1f} GB/s back, {link.latency_s * 1e6:.0f} us"
        )
    console.print(table)
    kernels = Table(
        box=box.SIMPLE_HEAD,
        title=f"kernels with {_column_name(measured.cpu)}",
        title_justify="left",
    )
    for name in ("kernel", "format", "samples", "share of the ceiling", "spread"):
        kernels.add_column(name, justify="left" if name in ("kernel", "format") else "right")
    for row in _sample_rows(measured):
        kernels.add_row(*row)
    console.print(kernels)
    if measured.confidence == "low":
        console.print("low confidence: the machine was busy; measure again when it is idle")
    for note in measured.notes:
        console.print(f"note: {note}")


def _column_name(device: DeviceProfile) -> str:
    if device.kind != "cpu":
        return device.name
    return f"{device.num_threads} thread{'s' if device.num_threads > 1 else ''}"


def _rows(measured: HardwareProfile, devices: list[DeviceProfile]) -> list[tuple[str, list[str]]]:
    rows = [
        ("memory, GB", [f"{d.memory_bytes / 1e9:.1f}" for d in devices]),
        ("memory read, GB/s", [f"{d.read_bytes_per_s / 1e9:.1f}" for d in devices]),
        ("small operation, us", [f"{d.launch_s * 1e6:.1f}" for d in devices]),
        ("small operation of torch, us", [f"{d.torch_op_s * 1e6:.1f}" for d in devices]),
    ]
    kinds = dict.fromkeys(kind for device in devices for kind in device.flop_per_s)
    for kind in kinds:
        rates = [device.flop_per_s.get(kind) for device in devices]
        cells = ["" if rate is None else f"{rate / 1e9:.0f}" for rate in rates]
        rows.append((f"{kind} products, best, GFLOP/s", cells))
    rows.append(("samples", [str(len(_samples_of(measured, device))) for device in devices]))
    return rows


def _samples_of(measured: HardwareProfile, device: DeviceProfile) -> list[Sample]:
    if device.kind != "cpu":
        return [sample for sample in measured.samples if sample.lane == "gpu"]
    return [
        sample
        for sample in measured.samples
        if sample.lane == "cpu" and sample.num_threads == device.num_threads
    ]


def _sample_rows(measured: HardwareProfile) -> list[tuple[str, str, str, str, str]]:
    """Each kernel as it is used: how many samples, the share of its ceilings, the usual spread."""
    from planner.speed_of_light import speed_of_light

    found: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
    for sample in measured.samples:
        device = measured.gpu if sample.lane == "gpu" else measured.cpu
        is_used = sample.lane != "cpu" or sample.num_threads == measured.cpu.num_threads
        if device is None or not is_used or sample.busy or sample.lane in ("h2d", "d2h"):
            continue
        light = speed_of_light(sample.call, device)
        share = light.seconds / sample.seconds if light.resource != "launch" else math.nan
        key = (sample.lane, sample.kernel, sample.format, sample.backend)
        found.setdefault(key, []).append((share, sample.spread))
    rows = []
    for (lane, kernel, kind, backend), seen in found.items():
        shares = [share for share, _ in seen]
        text = "" if math.isnan(shares[0]) else f"{min(shares):.0%} to {max(shares):.0%}"
        spread = statistics.median(each for _, each in seen)
        rows.append(
            (f"{lane} {kernel}", f"{kind} {backend}", str(len(seen)), text, f"{spread:.0%}")
        )
    return rows
