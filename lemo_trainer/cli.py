"""The command line: `lemo train`, `inspect`, `plan`, `search-thresholds` and `predict-train`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, get_type_hints

import typer

from lemo_trainer.arguments import config_help, flag_type
from lemo_trainer.commands.inspect import show_model
from lemo_trainer.commands.plan import predict_step
from lemo_trainer.commands.predictors import make_predictors, parse_ranks
from lemo_trainer.commands.search import SearchOptions, find_thresholds
from lemo_trainer.config import LemoConfig
from lemo_trainer.registry import selector_names

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Long-context fine-tuning that leaves redundant tokens out (LeMo).",
)

SeqLen = Annotated[int | None, typer.Option(help="tokens of a sample")]


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Turn an error that the user can correct into one sentence on stderr and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"lemo: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


def _with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of `LemoConfig`; those that are set arrive as `lemo`."""
    documentation, hints = config_help(), get_type_hints(LemoConfig)
    hints["selector"] = Literal[tuple(selector_names())]
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
    output_dir: Annotated[str | None, typer.Option(help="folder for the result")] = None,
    seq_len: SeqLen = None,
    checkpointing: Annotated[bool | None, typer.Option(help="gradient checkpointing")] = None,
    max_steps: Annotated[int | None, typer.Option(help="optimizer steps")] = None,
    *,
    lemo: dict[str, Any],
) -> None:
    """Fine-tune by a recipe; options replace the recipe's values.

    Examples:

        lemo train configs/lemo/smollm2_lora.yaml

        lemo train configs/lemo/smollm2_lora.yaml --keep-ratio 0.4 --layers 15-28 --max-steps 5
    """
    from lemo_trainer.commands.recipe import Recipe, run

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
        show_model(model, seq_len, LemoConfig.from_dict(lemo))


@app.command()
@_with_config_options
def plan(
    model: Annotated[str, typer.Argument(help="model folder or hub id; its weights are not loaded")],
    seq_len: Annotated[int, typer.Option(help="tokens of a sample")] = 2048,
    batch_size: Annotated[int, typer.Option(help="samples of a step")] = 1,
    lora_rank: Annotated[int, typer.Option(help="rank of LoRA on all linear layers; 0 trains all")] = 8,
    dtype: Annotated[str, typer.Option(help="dtype of the weights: float32, bfloat16")] = "float32",
    fit_memory: Annotated[str | None, typer.Option(help='memory that a step must fit, like "12GiB"')] = None,
    fit_flops: Annotated[float | None, typer.Option(help="share of the dense step's operations")] = None,
    checkpointing: Annotated[
        bool, typer.Option(help="gradient checkpointing, for the two options above")
    ] = False,
    *,
    lemo: dict[str, Any],
) -> None:
    """Predict memory and time of a training step.

    Without a mode: by every exact way, which are those that mode "auto" chooses from. Nothing is computed;
    --memory says what fits, and the longest sample that does. With a mode: without LeMo and with it, with
    and without checkpointing, from steps of models with one to five layers. Memory is that of tensors,
    weights and optimizer included.

    Examples:

        lemo plan .cache/assets/SmolLM2-135M-Instruct --seq-len 16384 --memory 4GiB

        lemo plan .cache/assets/SmolLM2-135M-Instruct --seq-len 8192 --mode detach --fit-memory 3GiB
    """
    with _user_errors():
        predict_step(model, seq_len, batch_size, lora_rank, dtype, fit_memory, fit_flops, checkpointing, lemo)


@app.command()
@_with_config_options
def search_thresholds(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    data: Annotated[str, typer.Option(help=".jsonl or text file of held-out text")],
    output: Annotated[str, typer.Option(help="YAML file that `LemoConfig` reads")] = "lemo_thresholds.yaml",
    max_increase: Annotated[
        float | None,
        typer.Option(help="nats a token by which the loss may rise; 0.05 without a budget"),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="tokens of a sample")] = 1024,
    samples: Annotated[int, typer.Option(help="samples of the held-out text")] = 2,
    rounds: Annotated[int, typer.Option(help="steps of Algorithm 1 for each layer")] = 1,
    fit_share: Annotated[float | None, typer.Option(help="mean kept share over the model's layers")] = None,
    fit_flops: Annotated[float | None, typer.Option(help="share of the dense step's operations")] = None,
    fit_memory: Annotated[str | None, typer.Option(help='memory that a step must fit, like "3GiB"')] = None,
    kept_shares: Annotated[
        str, typer.Option(help="kept shares to try in each layer for a --fit option")
    ] = "0.75,0.5,0.25",
    checkpointing: Annotated[
        bool, typer.Option(help="gradient checkpointing, for --fit-flops and --fit-memory")
    ] = False,
    lora_rank: Annotated[int, typer.Option(help="rank of LoRA, for the same; 0 trains all weights")] = 8,
    dtype: Annotated[
        str, typer.Option(help="dtype of the weights, for the same: float32, bfloat16")
    ] = "float32",
    plot: Annotated[str | None, typer.Option(help="PNG of the kept share by layer")] = None,
    *,
    lemo: dict[str, Any],
) -> None:
    """Search the thresholds of mode="eliminate" that cost little held-out loss, or that fit a budget.

    A budget limits a step of one sample of --seq-len tokens. The layers and their thresholds are then chosen
    for the least predicted loss, and the loss with all of them is measured.

    Examples:

        lemo search-thresholds MODEL --data held_out.jsonl --max-increase 0.1

        lemo search-thresholds MODEL --data held_out.jsonl --fit-flops 0.8 --plot kept.png
    """
    with _user_errors():
        options = SearchOptions(
            model=model,
            data=data,
            output=output,
            max_increase=max_increase,
            seq_len=seq_len,
            samples=samples,
            rounds=rounds,
            kept_shares=kept_shares,
            fit_share=fit_share,
            fit_flops=fit_flops,
            fit_memory=fit_memory,
            checkpointing=checkpointing,
            lora_rank=lora_rank,
            dtype=dtype,
            plot=plot,
        )
        find_thresholds(options, LemoConfig.from_dict({"mode": "eliminate", **lemo}))


@app.command()
@_with_config_options
def predict_train(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    data: Annotated[str, typer.Option(help=".jsonl or text file to learn from")],
    output: Annotated[str, typer.Option(help="folder for the predictors")] = "lemo_predictors",
    seq_len: Annotated[int, typer.Option(help="tokens of a sample")] = 1024,
    held_out: Annotated[int, typer.Option(help="last samples of the text, for the recall")] = 4,
    design: Annotated[str, typer.Option(help="max or paper")] = "max",
    ranks: Annotated[str, typer.Option(help="ranks of a net's three matrices")] = "32,32,32",
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 300,
    batch_size: Annotated[int, typer.Option(help="samples of a step, in each process")] = 1,
    lr: Annotated[float, typer.Option(help="largest learning rate")] = 3e-3,
    prune_steps: Annotated[
        int, typer.Option(help="steps between prunings of dead hidden units; 0 never")
    ] = 100,
    save_steps: Annotated[int, typer.Option(help="steps between saved states")] = 50,
    seed: Annotated[int, typer.Option(help="seed of the nets and of the order of the samples")] = 0,
    *,
    lemo: dict[str, Any],
) -> None:
    """Train the nets of selector="predictor" for a model, and show their recall by layer.

    An interrupted run resumes from its last saved state when it is started again.

    Examples:

        lemo predict-train .cache/assets/SmolLM2-135M-Instruct --data text.jsonl --layers 1 --steps 100

        accelerate launch --num_processes 2 $(command -v lemo) predict-train MODEL --data text.jsonl
    """
    with _user_errors():
        training = {
            "design": design,
            "ranks": parse_ranks(ranks),
            "steps": steps,
            "batch_size": batch_size,
            "lr": lr,
            "prune_steps": prune_steps,
            "save_steps": save_steps,
            "seed": seed,
        }
        config = LemoConfig.from_dict({"mode": "detach", **lemo})
        make_predictors(model, data, output, seq_len, held_out, training, config)


def main() -> None:
    """Entry point of the `lemo` command."""
    app()
