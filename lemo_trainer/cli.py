"""The command line: `lemo train` and `lemo inspect`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_type_hints

import typer

from lemo_trainer.arguments import documented_fields, flag_type
from lemo_trainer.config import LemoConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Long-context fine-tuning that leaves redundant tokens out (LeMo).",
)

SeqLen = Annotated[int | None, typer.Option(help="tokens of a sample")]


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Turn what the user can mend into one sentence on stderr and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"lemo: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


def _with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of `LemoConfig`; it gets those that were set as `lemo`."""
    documentation, hints = documented_fields(LemoConfig), get_type_hints(LemoConfig)
    options = {
        field.name: inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                flag_type(hints[field.name]) | None,
                typer.Option(help=documentation[field.name].partition(". ")[0].rstrip(".")),
            ],
        )
        for field in dataclasses.fields(LemoConfig)
    }

    @functools.wraps(command)
    def with_options(**arguments: Any) -> None:
        lemo = {name: arguments.pop(name) for name in options}
        command(**arguments, lemo={name: value for name, value in lemo.items() if value is not None})

    own = dict(inspect.signature(command, eval_str=True).parameters)
    del own["lemo"]
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (own | options).values()]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options


@app.command()
@_with_config_options
def train(
    recipe: Annotated[str, typer.Argument(help="YAML recipe, such as configs/lemo/smollm2_lora.yaml")],
    model: Annotated[str | None, typer.Option(help="model folder or hub id")] = None,
    train_file: Annotated[str | None, typer.Option(help=".jsonl or text file to train on")] = None,
    output_dir: Annotated[str | None, typer.Option(help="where the result is written")] = None,
    seq_len: SeqLen = None,
    checkpointing: Annotated[bool | None, typer.Option(help="gradient checkpointing")] = None,
    max_steps: Annotated[int | None, typer.Option(help="optimizer steps")] = None,
    *,
    lemo: dict[str, Any],
) -> None:
    """Fine-tune as a recipe says; options replace the recipe's values.

    Examples:

        lemo train configs/lemo/smollm2_lora.yaml

        lemo train configs/lemo/smollm2_lora.yaml --keep-ratio 0.4 --layers 15-28 --max-steps 5
    """
    from lemo_trainer.recipe import Recipe, run

    with _user_errors():
        result = run(
            Recipe.from_yaml(
                recipe,
                model=model,
                train_file=train_file,
                output_dir=output_dir,
                seq_len=seq_len,
                checkpointing=checkpointing,
                training={"max_steps": max_steps},
                lemo=lemo,
            )
        )
    if result.report is not None:
        typer.echo(str(result.report))
    typer.echo(f"training loss {result.train_loss:.4f}")
    if result.held_out_before is not None:
        typer.echo(f"held-out loss, dense: {result.held_out_before:.4f} -> {result.held_out_after:.4f}")


@app.command(name="inspect")
@_with_config_options
def inspect_model(
    model: Annotated[str, typer.Argument(help="model folder or hub id; its weights are not loaded")],
    seq_len: Annotated[int, typer.Option(help="tokens of a sample")] = 2048,
    *,
    lemo: dict[str, Any],
) -> None:
    """Show what LeMo would patch in a model and how many tokens it would keep, without training.

    Examples:

        lemo inspect .cache/assets/SmolLM2-135M-Instruct

        lemo inspect .cache/assets/SmolLM2-135M-Instruct --seq-len 8192 --keep-ratio 0.4 --layers all
    """
    with _user_errors():
        _inspect(model, seq_len, LemoConfig.from_dict(lemo))


def _inspect(name: str, seq_len: int, config: LemoConfig) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoConfig, AutoModelForCausalLM

    from lemo_trainer.patch import apply_lemo
    from lemo_trainer.recipe import check_model
    from lemo_trainer.selection import BlockPlan

    check_model(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    report = apply_lemo(model, config)
    plan = BlockPlan.of(seq_len, config)
    table = Table(title=str(report), show_header=False)
    table.add_row("architecture", f"{report.model_type}, {model.num_parameters() / 1e6:.0f}M parameters")
    table.add_row("patched layers", _ranges(report.patched_layers))
    table.add_row("blocks", f"{plan.kept_blocks} of {plan.blocks} x {plan.block_size} tokens, + {plan.tail}")
    table.add_row(
        "tokens in a patched layer", f"{plan.kept_tokens} of {seq_len} ({plan.kept_tokens / seq_len:.0%})"
    )
    segment = config.loss_segment
    table.add_row("loss", f"{segment} tokens at a time" if segment else "the model's own, all logits")
    Console().print(table)


def _ranges(indices: tuple[int, ...]) -> str:
    """(1, 2, 3, 7) as "1-3, 7"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def main() -> None:
    """Entry point of the `lemo` command."""
    app()
