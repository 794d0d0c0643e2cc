"""The commands `ripple simulate` and `ripple report`: studies of a trace that read no weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ripple_loader.config import check_share
from ripple_loader.registry import BUNDLES, CACHE_POLICIES

Model = Annotated[str, typer.Argument(help="The model's directory or hub id, as it was traced.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
TraceOption = Annotated[str, typer.Option("--trace", help="Directory that `ripple trace` wrote for it.")]
Devices = Annotated[str | None, typer.Option(help="YAML file of devices instead of the package's.")]
Cache = Annotated[str, typer.Option(help='Memory for neurons, as a share of all of them: 0.25 or "25%".')]
Replayed = Annotated[int, typer.Option(help="Tokens at the end of the trace to replay.")]
Bundles = Annotated[str, typer.Option(help=f"Stored as one of: {BUNDLES.names()}.")]


def _share(text: str) -> float:
    """A share given as a number or in percent."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        raise ValueError(f'`cache` must be a share such as 0.25 or "25%", got {text!r}.') from None
    check_share(share, "cache", zero=True)
    return share


def _workload(model: str, revision: str | None, trace: str, bundles: str, tokens: int) -> Any:
    from ripple_loader.config import ReorderConfig
    from ripple_loader.format.encoding import ENCODINGS
    from ripple_loader.offline.reordering import open_reorderable, trace_of
    from ripple_loader.offline.writing import stored_as
    from ripple_loader.studies.simulation import workload_of

    source, config = open_reorderable(model, revision), ReorderConfig(bundles=bundles)
    row_bytes = ENCODINGS[stored_as(source, config.bundles)].row_bytes(source.hidden)
    width = len(source.architecture.bundle) * row_bytes
    return workload_of(trace_of(source, Path(trace)), width, tokens)


def _devices(path: str | None, names: list[str] | None) -> list[Any]:
    from ripple_loader.storage.devices import load_devices

    known = load_devices(path)
    for name in names or ():
        if name not in known:
            raise ValueError(f"`device` must be one of {', '.join(known)}, got {name!r}.")
    return [known[name] for name in names or known]


def simulate(
    model: Model,
    trace: TraceOption,
    device: Annotated[
        list[str] | None, typer.Option(help="Name of a device; without it all of them.")
    ] = None,
    devices: Devices = None,
    cache: Cache = "10%",
    tokens: Replayed = 512,
    bundles: Bundles = "same",
    cache_policy: Annotated[
        list[str] | None,
        typer.Option(help=f"Also replay Ripple with another cache policy: {CACHE_POLICIES.names()}."),
    ] = None,
    revision: Revision = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
) -> None:
    """Replay a trace to price the reads of a model's neurons on other drives, by strategy."""
    from rich.console import Console
    from rich.table import Table

    from ripple_loader.studies.simulation import place_contenders, replay_contenders, summarise

    cache_share = _share(cache)
    for policy in cache_policy or ():
        CACHE_POLICIES.check(policy)
    chosen = _devices(devices, device)
    workload = _workload(model, revision, trace, bundles, tokens)
    placed = place_contenders(workload)
    results: dict[str, Any] = {"cache": cache_share, "tokens": tokens, "bundle_bytes": workload.bundle_bytes}
    results["devices"] = {one.name: asdict(one) for one in chosen}
    results["strategies"] = {one.name: {} for one in chosen}
    for one in chosen:
        rows = results["strategies"][one.name]
        replays = replay_contenders(
            workload, placed, one, cache_share=cache_share, policies=cache_policy or ()
        )
        for name, replayed in replays.items():
            rows[name] = summarise(replayed, tokens, one.model)
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
    cache: Cache = "10%",
    tokens: Replayed = 512,
    bundles: Bundles = "same",
    layer: Annotated[int, typer.Option(help="The MLP that the heat maps show.")] = 0,
    revision: Revision = None,
) -> None:
    """Draw a trace, its order, and the reads that caches and drives give, as one HTML page."""
    from ripple_loader.files import whole_file
    from ripple_loader.storage.drive import DriveProfile, device_of, profile_path
    from ripple_loader.studies.html_report import check_requirements, make_report

    check_requirements()
    cache_share = _share(cache)
    (chosen,) = _devices(devices, [device])
    probed = profile_path(device_of(Path(trace)))
    page = make_report(
        Path(model).name,
        _workload(model, revision, trace, bundles, tokens),
        chosen,
        cache_share=cache_share,
        layer=layer,
        probe=DriveProfile.load(probed) if probed.exists() else None,
    )
    with whole_file(out) as partial:
        partial.write_text(page, "utf-8")
    typer.echo(str(out))
