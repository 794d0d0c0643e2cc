"""`ollie plans`: the cache of plans on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The plans kept on disk: show, export, import, clear.")


@app.command()
def show() -> None:
    """List the plans: operator, times, and whether they are for this device and version."""
    from ollie_compile import store
    from ollie_compile.plan import entries, saved

    base = store.folder()
    if base is None:
        typer.echo(f"The cache is switched off: {store.FOLDER} is empty.")
        return
    count = 0
    for name, entry in store.entries("plan"):
        try:
            line = entries.summary(entry)
        except ValueError as error:
            typer.echo(f"ignored {name[:16]}: {error}", err=True)
            continue
        count += 1
        typer.echo(line + ("" if saved.here(entry) else ", of another device or version"))
    typer.echo(f"{count} plans in {base}")


@app.command("export")
def export_file(file: Annotated[Path, typer.Argument(help="JSON file to write.")]) -> None:
    """Write all plans into one file."""
    from ollie_compile.plan import saved

    typer.echo(f"{saved.export_plans(file)} plans written to {file}")


@app.command("import")
def import_file(file: Annotated[Path, typer.Argument(help="What `ollie plans export` wrote.")]) -> None:
    """Take plans from a file; each derivation is checked again."""
    from ollie_compile.plan import saved

    taken, refused = saved.import_plans(file)
    for why in refused:
        typer.echo(f"refused {why}", err=True)
    typer.echo(f"{taken} plans taken, {len(refused)} refused")


@app.command()
def clear() -> None:
    """Remove all plans, decisions and measurements."""
    from ollie_compile import store

    typer.echo(f"{store.clear()} entries removed")
