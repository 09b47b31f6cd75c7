"""`hetero profile`: measure this machine, keep the profile, show it."""

from __future__ import annotations

import os
from pathlib import Path

import click

from hetero.cli.machine import output_path
from planner.hardware import DeviceProfile, HardwareProfile


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_path,
    help="Also write the profile to this file.",
)
@click.option("--quick", is_flag=True, help="10 s instead of a minute: fewer samples.")
@click.option(
    "--model",
    help="Measure the products of this model (then kept in --output only).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the profile as one JSON document.")
def profile(output: Path | None, quick: bool, model: str | None, as_json: bool) -> None:
    """Measure this machine: CPU by thread count, GPU and link where there is one."""
    from hetero.measure.machine import measure_machine
    from hetero.measure.store import (
        default_cache_dir,
        private_folder,
        store_profile,
        write_atomically,
    )
    from hetero.model_lookup import default_hub_cache, find_model, read_model_spec

    # Before a minute of measuring, not after it.
    cache_dir = private_folder(default_cache_dir(os.environ))
    spec = None
    if model is not None:
        spec = read_model_spec(find_model(model, hub_cache=default_hub_cache(os.environ)))
    measured = measure_machine(quick=quick, progress=_progress, spec=spec)
    if spec is None:
        _progress(f"stored the profile in {store_profile(cache_dir, measured)}")
    elif output is None:
        _progress("a profile of one model's shapes is not stored; keep it with -o FILE")
    if output is not None:
        write_atomically(output, measured.to_json(), is_private=False)
        _progress(f"wrote {output}")
    if as_json:
        click.echo(measured.to_json(), nl=False)
    else:
        _print_table(measured)


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
    for name, cells in _rows(devices):
        table.add_row(name, *cells)
    if measured.link is not None:
        link = measured.link
        table.caption = (
            f"link: {link.h2d_bytes_per_s / 1e9:.1f} GB/s to the GPU, "
            f"{link.d2h_bytes_per_s / 1e9:.1f} GB/s back, {link.latency_s * 1e6:.0f} us"
        )
    console.print(table)
    for note in measured.notes:
        console.print(f"note: {note}")


def _column_name(device: DeviceProfile) -> str:
    if device.kind != "cpu":
        return device.name
    return f"{device.num_threads} thread{'s' if device.num_threads > 1 else ''}"


def _rows(devices: list[DeviceProfile]) -> list[tuple[str, list[str]]]:
    rows = [
        ("memory, GB", [f"{d.memory_bytes / 1e9:.1f}" for d in devices]),
        ("memory read, GB/s", [f"{d.read_bytes_per_s / 1e9:.1f}" for d in devices]),
        ("decode attention, KV GB/s", [f"{d.attention_bytes_per_s / 1e9:.1f}" for d in devices]),
        ("prefill attention, GFLOP/s", [f"{d.attention_flop_per_s / 1e9:.0f}" for d in devices]),
        ("small operation, us", [f"{d.launch_s * 1e6:.1f}" for d in devices]),
        ("small operation of torch, us", [f"{d.torch_op_s * 1e6:.1f}" for d in devices]),
    ]
    samples = {(s.dtype, s.backend, s.num_tokens) for device in devices for s in device.linear}
    for dtype, backend, num_tokens in sorted(samples):
        cells = []
        for device in devices:
            rates = {(s.dtype, s.backend, s.num_tokens): s.flop_per_s for s in device.linear}
            rate = rates.get((dtype, backend, num_tokens))
            cells.append("" if rate is None else f"{rate / 1e9:.1f}")
        tokens = f"{num_tokens} token{'s' if num_tokens > 1 else ''}"
        rows.append((f"{dtype} product by {backend}, {tokens}, GFLOP/s", cells))
    return rows
