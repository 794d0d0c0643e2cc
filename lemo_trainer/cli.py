"""The command line: `lemo train` and `lemo inspect`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lemo_trainer.config import LemoConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Long-context fine-tuning that leaves redundant tokens out (LeMo).",
)

Mode = Annotated[str | None, typer.Option(help="what happens to an uninformative block: eliminate, detach")]
Selector = Annotated[str | None, typer.Option(help="informativeness, norm, random or recency")]
SharedBlocks = Annotated[bool | None, typer.Option(help="the first patched layer chooses for all")]
KeepRatio = Annotated[float | None, typer.Option(help="share of the tokens that a patched layer computes")]
BlockSize = Annotated[int | None, typer.Option(help="tokens that are kept or left out together")]
Layers = Annotated[str | None, typer.Option(help='"auto", "all" or indices like "3,10-28"')]
SinkBlocks = Annotated[int | None, typer.Option(help="first blocks that are always kept")]
RecentBlocks = Annotated[int | None, typer.Option(help="last blocks that are always kept")]
ScoreTokens = Annotated[int | None, typer.Option(help="tokens of a block that the MLP score is measured on")]
WarmupSteps = Annotated[int | None, typer.Option(help="optimizer steps at the start that run dense")]
LossSegment = Annotated[int | None, typer.Option(help="tokens that meet the head at a time; 0 = all at once")]
SeqLen = Annotated[int | None, typer.Option(help="tokens of a sample")]


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Turn what the user can mend into one sentence on stderr and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"lemo: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="YAML recipe, such as configs/lemo/smollm2_lora.yaml")],
    model: Annotated[str | None, typer.Option(help="model folder or hub id")] = None,
    train_file: Annotated[str | None, typer.Option(help=".jsonl or text file to train on")] = None,
    output_dir: Annotated[str | None, typer.Option(help="where the result is written")] = None,
    seq_len: SeqLen = None,
    checkpointing: Annotated[bool | None, typer.Option(help="gradient checkpointing")] = None,
    max_steps: Annotated[int | None, typer.Option(help="optimizer steps")] = None,
    mode: Mode = None,
    selector: Selector = None,
    shared_blocks: SharedBlocks = None,
    keep_ratio: KeepRatio = None,
    block_size: BlockSize = None,
    layers: Layers = None,
    sink_blocks: SinkBlocks = None,
    recent_blocks: RecentBlocks = None,
    mlp_score_tokens: ScoreTokens = None,
    warmup_steps: WarmupSteps = None,
    loss_segment: LossSegment = None,
) -> None:
    """Fine-tune as a recipe says; options replace the recipe's values.

    Examples:

        lemo train configs/lemo/smollm2_lora.yaml

        lemo train configs/lemo/smollm2_lora.yaml --keep-ratio 0.4 --layers 15-28 --max-steps 5
    """
    from lemo_trainer.recipe import Recipe, run

    lemo = {
        "mode": mode,
        "selector": selector,
        "shared_blocks": shared_blocks,
        "keep_ratio": keep_ratio,
        "block_size": block_size,
        "layers": layers,
        "sink_blocks": sink_blocks,
        "recent_blocks": recent_blocks,
        "mlp_score_tokens": mlp_score_tokens,
        "warmup_steps": warmup_steps,
        "loss_segment": loss_segment,
    }
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


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="model folder or hub id; its weights are not loaded")],
    seq_len: Annotated[int, typer.Option(help="tokens of a sample")] = 2048,
    mode: Mode = None,
    keep_ratio: KeepRatio = None,
    block_size: BlockSize = None,
    layers: Layers = None,
    sink_blocks: SinkBlocks = None,
    recent_blocks: RecentBlocks = None,
    loss_segment: LossSegment = None,
) -> None:
    """Show what LeMo would patch in a model and how many tokens it would keep, without training.

    Examples:

        lemo inspect .cache/assets/SmolLM2-135M-Instruct

        lemo inspect .cache/assets/SmolLM2-135M-Instruct --seq-len 8192 --keep-ratio 0.4 --layers all
    """
    options: dict[str, Any] = {
        "mode": mode,
        "keep_ratio": keep_ratio,
        "block_size": block_size,
        "layers": layers,
        "sink_blocks": sink_blocks,
        "recent_blocks": recent_blocks,
        "loss_segment": loss_segment,
    }
    with _user_errors():
        config = LemoConfig.from_dict({name: value for name, value in options.items() if value is not None})
        _inspect(model, seq_len, config)


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
