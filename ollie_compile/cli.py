"""The `ollie` command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ollie_compile.commands import plans
from ollie_compile.config import OllieConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Derive faster tensor programs for PyTorch models (OLLIE).",
)


app.add_typer(plans.app, name="plans")


@app.command(epilog="Example: ollie explain configs/ollie/fsrcnn.yaml --html out/fsrcnn.html")
def explain(
    model: Annotated[
        str,
        typer.Argument(
            help="A recipe (.yaml with `model`, `input_shape` and `options`), FILE.py:FUNCTION or "
            "MODULE:FUNCTION that returns a module, or a Hugging Face folder or hub id."
        ),
    ],
    input_shape: Annotated[str | None, typer.Option(help="For example 1x1x32x32.")] = None,
    max_depth: Annotated[int | None, typer.Option(help="Explorative derivation steps.")] = None,
    budget_s: Annotated[float | None, typer.Option(help="Seconds of search and measurement.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that derive side by side.")] = None,
    tune: Annotated[str | None, typer.Option(help='"measure" or "model".')] = None,
    verify: Annotated[bool | None, typer.Option(help="Check every candidate three ways.")] = None,
    candidates: Annotated[int | None, typer.Option(help="Programs measured for one operator.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative error in the own dtype.")] = None,
    non_finite: Annotated[str | None, typer.Option(help='"spread" or "exact".')] = None,
    margin: Annotated[float | None, typer.Option(help="Share by which a candidate must win.")] = None,
    freeze: Annotated[bool | None, typer.Option(help="Hold the parameters as constants.")] = None,
    mode: Annotated[str | None, typer.Option(help="A mode of torch.compile.")] = None,
    dynamic: Annotated[bool, typer.Option(help="One graph for all sizes.")] = False,
    training: Annotated[bool, typer.Option(help="Compile the backward too.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="torch.set_num_threads.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the report as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report as one HTML page.")] = None,
) -> None:
    """Compile a model and report each operator: its derivations, the choice, the rejected candidates."""
    import torch

    from ollie_compile.commands import models
    from ollie_compile.explanation import explain as explain_model

    given = {
        "max_depth": max_depth,
        "budget_s": budget_s,
        "workers": workers,
        "tune": tune,
        "verify": verify,
        "candidates": candidates,
        "tolerance": tolerance,
        "non_finite": non_finite,
        "margin": margin,
        "freeze": freeze,
    }
    given = {name: value for name, value in given.items() if value is not None}
    OllieConfig.from_dict(given)
    if threads is not None:
        torch.set_num_threads(threads)
    net, x, options = models.load(model, input_shape)
    for path in (json, html):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    report = explain_model(net, x, mode=mode, dynamic=dynamic, training=training, **options | given)
    typer.echo(str(report))
    if json is not None:
        json.write_text(report.to_json() + "\n", "utf-8")
    if html is not None:
        html.write_text(report.to_html(), "utf-8")


def main() -> None:
    """Run the command line; a user's error is one sentence and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"ollie: {error}", err=True)
        sys.exit(2)
