"""The `ollie` command line."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ollie_compile.config import OllieConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Derive faster tensor programs for PyTorch models (OLLIE).",
)


@app.callback()
def _app() -> None:
    """Keep `explain` a subcommand while it is the only one."""


@app.command(epilog="Example: ollie explain configs/ollie/fsrcnn.yaml --json out/fsrcnn.json")
def explain(
    recipe: Annotated[Path, typer.Argument(help="YAML with `model`, `input_shape` and `options`.")],
    model: Annotated[str | None, typer.Option(help="FILE.py:FUNCTION or MODULE:FUNCTION.")] = None,
    input_shape: Annotated[str | None, typer.Option(help="For example 1x1x32x32.")] = None,
    max_depth: Annotated[int | None, typer.Option(help="Explorative derivation steps.")] = None,
    budget_s: Annotated[float | None, typer.Option(help="Seconds of search and measurement.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that derive side by side.")] = None,
    tune: Annotated[str | None, typer.Option(help='"measure" or "model".')] = None,
    verify: Annotated[bool | None, typer.Option(help="Check every candidate three ways.")] = None,
    candidates: Annotated[int | None, typer.Option(help="Programs measured for one operator.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative error in the own dtype.")] = None,
    margin: Annotated[float | None, typer.Option(help="Share by which a candidate must win.")] = None,
    freeze: Annotated[bool | None, typer.Option(help="Hold the parameters as constants.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="torch.set_num_threads.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the report as JSON.")] = None,
) -> None:
    """Compile a model and say what was derived, chosen and rejected, operator by operator."""
    import torch

    from ollie_compile.explain import explain as explain_model

    given = {
        "max_depth": max_depth,
        "budget_s": budget_s,
        "workers": workers,
        "tune": tune,
        "verify": verify,
        "candidates": candidates,
        "tolerance": tolerance,
        "margin": margin,
        "freeze": freeze,
    }
    values = _load_recipe(recipe)
    options = (values.get("options") or {}) | {name: v for name, v in given.items() if v is not None}
    OllieConfig.with_inductor(options)
    build = _load_function(model or values["model"])
    x = torch.randn(_shape(input_shape or values["input_shape"]))
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        net = build().eval()
        with torch.no_grad():
            net(x)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"`model` must be a function without arguments that returns a module for an input of shape "
            f"{list(x.shape)}; it failed: {reason}"
        ) from error
    report = explain_model(net, x, **options)
    typer.echo(str(report))
    if json is not None:
        json.write_text(report.to_json() + "\n", "utf-8")


def _load_recipe(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise ValueError(
            f"The recipe {path} does not exist: give a YAML file, for example those in configs/."
        )
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    known = ("model", "input_shape", "options")
    if not isinstance(values, dict) or not {"model", "input_shape"} <= values.keys() <= set(known):
        keys = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"The recipe {path} must hold `model`, `input_shape` and `options`, got {keys}.")
    if not isinstance(values.get("options") or {}, dict):
        raise ValueError(f"`options` in {path} must be a mapping, got {values['options']!r}.")
    return values


def _load_function(spec: Any) -> Any:
    """The function named by FILE.py:FUNCTION or MODULE:FUNCTION."""
    source, _, name = str(spec).rpartition(":")
    if source.endswith(".py"):
        if not Path(source).is_file():
            raise ValueError(f"The model file {source} does not exist: give FILE.py:FUNCTION.")
        names = runpy.run_path(source)
    else:
        try:
            names = vars(importlib.import_module(source))
        except (ImportError, ValueError):
            raise ValueError(
                f"The model {spec!r} names no module: give FILE.py:FUNCTION or MODULE:FUNCTION."
            ) from None
    if not callable(names.get(name)):
        raise ValueError(f"{source} has no function `{name}`: `model` must name one that returns a module.")
    return names[name]


def _shape(value: Any) -> list[int]:
    """Sizes given as a list or as 1x3x224x224."""
    parts = value.split("x") if isinstance(value, str) else value
    try:
        sizes = [int(size) for size in parts]
    except (TypeError, ValueError):
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ValueError(f"`input_shape` must look like 1x3x224x224, got {value!r}.")
    return sizes


def main() -> None:
    """Run the command line; a user's error is one sentence and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"ollie: {error}", err=True)
        sys.exit(2)
