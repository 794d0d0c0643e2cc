"""The command line: `lemo train`, `inspect`, `plan` and `search-thresholds`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
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

    _check_least("seq_len", seq_len, 1)
    check_model(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    report = apply_lemo(model, config)
    table = Table(title=str(report), show_header=False)
    table.add_row("architecture", f"{report.model_type}, {model.num_parameters() / 1e6:.0f}M parameters")
    table.add_row("patched layers", _ranges(report.patched_layers))
    if config.mode == "segments":
        chosen = report.choose_segments(seq_len)
        table.add_row("segments with gradient", f"{sum(chosen)} of {len(chosen)}")
    elif config.thresholds:
        table.add_row("thresholds, in mean scores", config.thresholds)
        table.add_row("tokens in a patched layer", "those above, text by text")
    else:
        blocks = BlockPlan.of(seq_len, config)
        of_blocks = f"{blocks.kept_blocks} of {blocks.blocks} x {blocks.block_size} tokens, + {blocks.tail}"
        table.add_row("blocks", of_blocks)
        kept = blocks.kept_tokens
        table.add_row("tokens in a patched layer", f"{kept} of {seq_len} ({kept / seq_len:.0%})")
    segment = config.loss_segment
    table.add_row("loss", f"{segment} tokens at a time" if segment else "the model's own, all logits")
    Console().print(table)


@app.command()
@_with_config_options
def plan(
    model: Annotated[str, typer.Argument(help="model folder or hub id; its weights are not loaded")],
    seq_len: Annotated[int, typer.Option(help="tokens of a sample")] = 2048,
    batch_size: Annotated[int, typer.Option(help="samples of a step")] = 1,
    lora_rank: Annotated[int, typer.Option(help="rank of LoRA on all linear layers; 0 trains all")] = 8,
    dtype: Annotated[str, typer.Option(help="of the weights: float32, bfloat16")] = "float32",
    fit_memory: Annotated[str | None, typer.Option(help='memory that a step must fit, like "12GiB"')] = None,
    fit_flops: Annotated[float | None, typer.Option(help="share of the dense step's operations")] = None,
    checkpointing: Annotated[bool, typer.Option(help="for the two options above")] = False,
    *,
    lemo: dict[str, Any],
) -> None:
    """Predict memory and time of a training step: dense, checkpointed, with LeMo and with both.

    Runs steps of models with one to five layers of the same shapes. Memory is that of tensors, weights and
    optimizer included.

    Examples:

        lemo plan .cache/assets/SmolLM2-135M-Instruct --seq-len 4096

        lemo plan .cache/assets/SmolLM2-135M-Instruct --seq-len 8192 --mode detach --fit-memory 3GiB
    """
    with _user_errors():
        _plan(model, seq_len, batch_size, lora_rank, dtype, fit_memory, fit_flops, checkpointing, lemo)


def _plan(
    name: str,
    seq_len: int,
    batch_size: int,
    lora_rank: int,
    dtype: str,
    fit_memory: str | None,
    fit_flops: float | None,
    checkpointing: bool,
    lemo: dict[str, Any],
) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoConfig

    from lemo_trainer.plan import Setup, check_predictable, fit, predict
    from lemo_trainer.recipe import check_model

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {dtype!r}.")
    if fit_memory is not None and fit_flops is not None:
        raise ValueError("Give one of `fit_memory` and `fit_flops`, not both.")
    config = LemoConfig.from_dict(lemo)
    check_predictable(config)
    memory = None if fit_memory is None else _bytes(fit_memory)
    check_model(name)
    setup = Setup(
        model_config=AutoConfig.from_pretrained(name),
        seq_len=seq_len,
        batch_size=batch_size,
        lora={"r": lora_rank, "target_modules": "all-linear"} if lora_rank else None,
        dtype=getattr(torch, dtype),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    if fit_memory is not None or fit_flops is not None:
        fitting = fit(setup, config, checkpointing=checkpointing, memory=memory, flops_share=fit_flops)
        names = ("segment_tokens",) if memory and config.mode == "segments" else ("keep_ratio",)
        typer.echo(", ".join(f"{field}: {getattr(fitting, field)}" for field in names))
        config = fitting
    table = Table(title=f"One step of {batch_size} x {seq_len} tokens, {config.mode}")
    for column in ("", "saved, MB", "peak, MB", "GFLOP", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for label, with_lemo in (("without LeMo", None), ("LeMo", config)):
        for suffix, recomputing in (("", False), (" + checkpointing", True)):
            cost = predict(setup, with_lemo, checkpointing=recomputing)
            megabytes = (f"{value / 1e6:,.0f}" for value in (cost.saved_bytes, cost.peak_bytes))
            table.add_row(label + suffix, *megabytes, f"{cost.flops / 1e9:,.0f}", f"{cost.seconds:.2f}")
    Console().print(table)


def _check_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"`{option}` must be at least {least}, got {value}.")


def _bytes(text: str) -> float:
    """ "12GiB" as a number of bytes."""
    units = {"": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
    number = text.rstrip("BGIMbgim ")
    unit = text[len(number) :].strip().upper()
    try:
        return float(number) * units[unit]
    except (KeyError, ValueError):
        raise ValueError(
            f'`fit_memory` must be like "12GiB", "800 MB" or a number of bytes, got {text!r}.'
        ) from None


@app.command()
@_with_config_options
def search_thresholds(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    data: Annotated[str, typer.Option(help=".jsonl or text file of held-out text")],
    output: Annotated[str, typer.Option(help="YAML file that `LemoConfig` reads")] = "lemo_thresholds.yaml",
    max_increase: Annotated[float, typer.Option(help="nats a token by which the loss may rise")] = 0.05,
    seq_len: Annotated[int, typer.Option(help="tokens of a sample")] = 1024,
    samples: Annotated[int, typer.Option(help="samples of the held-out text")] = 2,
    rounds: Annotated[int, typer.Option(help="steps of Algorithm 1 for each layer")] = 1,
    *,
    lemo: dict[str, Any],
) -> None:
    """Search the thresholds of mode="eliminate" that cost at most so much held-out loss.

    Example:

        lemo search-thresholds .cache/assets/SmolLM2-135M-Instruct --data .cache/assets/text/held_out.jsonl
    """
    with _user_errors():
        config = LemoConfig.from_dict({"mode": "eliminate", **lemo})
        _search_thresholds(model, data, output, max_increase, seq_len, samples, rounds, config)


def _search_thresholds(
    name: str,
    data: str,
    output: str,
    max_increase: float,
    seq_len: int,
    samples: int,
    rounds: int,
    config: LemoConfig,
) -> None:
    import torch
    import yaml
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lemo_trainer.recipe import check_model, pack, read_texts
    from lemo_trainer.thresholds import check_search
    from lemo_trainer.thresholds import search_thresholds as search

    check_search(config, max_increase)
    for option, value, least in (("seq_len", seq_len, 2), ("samples", samples, 1), ("rounds", rounds, 0)):
        _check_least(option, value, least)
    if not Path(output).absolute().parent.is_dir():
        raise ValueError(f"`output` must lie in a folder that exists, got {output!r}.")
    check_model(name)
    texts = read_texts(data)
    blocks = pack(texts, AutoTokenizer.from_pretrained(name), seq_len)[:samples]
    if len(blocks) < samples:
        raise ValueError(f"{data} holds {len(blocks)} samples of {seq_len} tokens, fewer than {samples}.")
    batches = [{key: torch.tensor([tokens]) for key, tokens in block.items()} for block in blocks]
    model = AutoModelForCausalLM.from_pretrained(name)
    found = search(model, batches, config, max_increase=max_increase, rounds=rounds)
    table = Table(title=f"held-out loss {found.dense_loss:.4f} dense, {found.loss:.4f} with the thresholds")
    for column in ("layer", "threshold", "kept", "loss alone", "used"):
        table.add_column(column, justify="right")
    for row in found.layers:
        increase = f"{row.loss_increase:+.4f}"
        used = "yes" if row.used else "dense"
        table.add_row(str(row.layer), f"{row.threshold:.3f}", f"{row.kept_share:.0%}", increase, used)
    Console().print(table)
    if not found.thresholds:
        raise ValueError(f"No layer can leave tokens out within {max_increase} nats; use another mode.")
    result = {**dataclasses.asdict(config), "thresholds": found.thresholds}
    with open(output, "w", encoding="utf-8") as file:
        yaml.safe_dump(result, file, sort_keys=False)
    typer.echo(f"wrote {output}")


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
