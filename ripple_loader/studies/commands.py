"""The commands `ripple simulate` and `ripple report`: studies of a trace that touch no weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ripple_loader.registry import BUNDLES

Model = Annotated[str, typer.Argument(help="The model's directory, as it was traced.")]
TraceOption = Annotated[str, typer.Option("--trace", help="What `ripple trace` made of it.")]
Devices = Annotated[str | None, typer.Option(help="YAML file of devices instead of those that come along.")]
Cache = Annotated[float, typer.Option(help="Memory for neurons, as a share of all of them.")]
Replayed = Annotated[int, typer.Option(help="Tokens at the end of the trace to replay.")]
Bundles = Annotated[str, typer.Option(help=f"Stored as one of: {BUNDLES.names()}.")]


def _workload(model: str, trace: str, bundles: str, tokens: int) -> Any:
    from ripple_loader.config import ReorderConfig
    from ripple_loader.format.encoding import ENCODINGS
    from ripple_loader.offline.reordering import open_reorderable, trace_of
    from ripple_loader.offline.writing import stored_as
    from ripple_loader.studies.simulation import workload_of

    source, config = open_reorderable(Path(model)), ReorderConfig(bundles=bundles)
    row_bytes = ENCODINGS[stored_as(source, config.bundles)].row_bytes(source.hidden)
    width = len(source.architecture.bundle) * row_bytes
    return workload_of(trace_of(source, Path(trace)), width, tokens)


def _devices(path: str | None, names: list[str] | None) -> list[Any]:
    from ripple_loader.storage.devices import load_devices

    found = load_devices(path)
    for name in names or ():
        if name not in found:
            raise ValueError(f"`device` must be one of {', '.join(found)}, got {name!r}.")
    return [found[name] for name in names or found]


def _check_share(cache: float) -> None:
    if not 0 <= cache <= 1:
        raise ValueError(f"`cache` must be a share from 0 to 1, got {cache}.")


def simulate(
    model: Model,
    trace: TraceOption,
    device: Annotated[list[str] | None, typer.Option(help="Of which device; all without it.")] = None,
    devices: Devices = None,
    cache: Cache = 0.1,
    tokens: Replayed = 512,
    bundles: Bundles = "same",
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
) -> None:
    """What reading a model's neurons would take on other drives, by strategy, replaying a trace."""
    from rich.console import Console
    from rich.table import Table

    from ripple_loader.studies.simulation import CONTENDERS, place_all, replay, summarise

    _check_share(cache)
    chosen = _devices(devices, device)
    workload = _workload(model, trace, bundles, tokens)
    placed = {p: place_all(workload, p) for p in {s.placement for s in CONTENDERS.values()}}
    results: dict[str, Any] = {"cache": cache, "tokens": tokens, "bundle_bytes": workload.bundle_bytes}
    results["devices"] = {one.name: asdict(one) for one in chosen}
    results["strategies"] = {one.name: {} for one in chosen}
    for one in chosen:
        rows = results["strategies"][one.name]
        for name, contender in CONTENDERS.items():
            found = replay(
                workload,
                contender,
                placed[contender.placement],
                one.model,
                cache_bytes=int(cache * workload.weight_bytes),
                block=one.block,
            )
            rows[name] = summarise(found, tokens, one.model)
        table = Table(title=f"{one.name}: {one.description}", caption=one.source)
        table.add_column("")
        for column in ("times Ripple's", *rows["Ripple"]):
            table.add_column(column.replace("_", " "), justify="right")
        for name, row in rows.items():
            ratio = row["ms_per_token"] / max(rows["Ripple"]["ms_per_token"], 1e-12)
            table.add_row(name, f"{ratio:.2f}", *(f"{value:.4g}" for value in row.values()))
        Console(width=None if Console().is_terminal else 150).print(table)
    if json_out is not None:
        json_out.write_text(json.dumps(results, indent=1), "utf-8")


def report(
    model: Model,
    trace: TraceOption,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("ripple.html"),
    device: Annotated[str, typer.Option(help="The device that reads are priced for.")] = "ufs-4.0",
    devices: Devices = None,
    cache: Cache = 0.1,
    tokens: Replayed = 512,
    bundles: Bundles = "same",
    layer: Annotated[int, typer.Option(help="The MLP that the heat maps show.")] = 0,
) -> None:
    """Draw a trace, the order made of it, and what caches and drives make of both, as one HTML page."""
    from ripple_loader.files import whole_file
    from ripple_loader.storage.drive import DriveProfile, device_of, profile_path
    from ripple_loader.studies.html_report import check_requirements, make_report

    check_requirements()
    _check_share(cache)
    (chosen,) = _devices(devices, [device])
    probed = profile_path(device_of(Path(trace)))
    page = make_report(
        Path(model).name,
        _workload(model, trace, bundles, tokens),
        chosen,
        cache_share=cache,
        layer=layer,
        probe=DriveProfile.load(probed) if probed.exists() else None,
    )
    with whole_file(out) as partial:
        partial.write_text(page, "utf-8")
    typer.echo(str(out))
