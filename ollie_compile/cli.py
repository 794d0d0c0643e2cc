"""The `ollie` command line."""

from __future__ import annotations

import importlib
import importlib.util
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
    tune: Annotated[str | None, typer.Option(help='"measure" or "model".')] = None,
    verify: Annotated[bool | None, typer.Option(help="Check every candidate three ways.")] = None,
    candidates: Annotated[int | None, typer.Option(help="Programs measured for one operator.")] = None,
    margin: Annotated[float | None, typer.Option(help="Share by which a candidate must win.")] = None,
    freeze: Annotated[bool | None, typer.Option(help="Hold the parameters as constants.")] = None,
    threads: Annotated[int | None, typer.Option(help="torch.set_num_threads.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the report as JSON.")] = None,
) -> None:
    """Compile a model and say what was derived, chosen and rejected, operator by operator."""
    import torch

    from ollie_compile.explain import explain as explain_model

    given = {
        "max_depth": max_depth,
        "budget_s": budget_s,
        "tune": tune,
        "verify": verify,
        "candidates": candidates,
        "margin": margin,
        "freeze": freeze,
    }
    values = _load_recipe(recipe)
    options = values.get("options", {}) | {name: value for name, value in given.items() if value is not None}
    OllieConfig.from_dict(options)
    build = _load_function(model or values["model"])
    shape = _shape(input_shape) if input_shape else values["input_shape"]
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = build().eval()
    report = explain_model(net, torch.randn(shape), **options)
    typer.echo(str(report))
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(report.to_json() + "\n", "utf-8")


def _load_recipe(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise ValueError(
            f"The recipe {path} does not exist: give a YAML file, for example those in configs/."
        )
    values = yaml.safe_load(path.read_text("utf-8"))
    known = ("model", "input_shape", "options")
    if not isinstance(values, dict) or not {"model", "input_shape"} <= values.keys() <= set(known):
        keys = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"The recipe {path} must hold `model`, `input_shape` and `options`, got {keys}.")
    return values


def _load_function(spec: str) -> Any:
    """The function named by FILE.py:FUNCTION or MODULE:FUNCTION."""
    source, _, name = spec.rpartition(":")
    if source.endswith(".py"):
        if not Path(source).is_file():
            raise ValueError(f"The model file {source} does not exist: give FILE.py:FUNCTION.")
        names = runpy.run_path(source)
    elif source and importlib.util.find_spec(source) is not None:
        names = vars(importlib.import_module(source))
    else:
        raise ValueError(f"The model {spec!r} names no module: give FILE.py:FUNCTION or MODULE:FUNCTION.")
    if not callable(names.get(name)):
        raise ValueError(f"{source} has no function `{name}`: `model` must name one that returns a module.")
    return names[name]


def _shape(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split("x")]
    except ValueError:
        raise ValueError(f"`input_shape` must look like 1x3x224x224, got {text!r}.") from None


def main() -> None:
    """Run the command line; a user's error is one sentence and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"ollie: {error}", err=True)
        sys.exit(2)
