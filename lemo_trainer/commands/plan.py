"""`lemo plan`: what a training step will cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from lemo_trainer.config import LemoConfig
from lemo_trainer.sizes import parse_bytes, size_text

if TYPE_CHECKING:
    from lemo_trainer.offline.step_cost import Setup


def predict_step(
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
    """Print predicted costs of a step; with a limit, those of the configuration that fits."""
    from rich.console import Console
    from rich.table import Table

    from lemo_trainer.offline.step_cost import check_predictable, fit, predict

    if fit_memory is not None and fit_flops is not None:
        raise ValueError("Give one of `fit_memory` and `fit_flops`, not both.")
    config = LemoConfig.from_dict(lemo)
    memory = None if fit_memory is None else parse_bytes("fit_memory", fit_memory)
    if config.mode == "auto":
        if fit_memory is not None or fit_flops is not None:
            raise ValueError(
                "`fit_memory` and `fit_flops` change the options of a mode: name one with `mode`, or give "
                "`memory` to see which exact ways fit."
            )
        _print_ways(step_setup(name, seq_len, batch_size, lora_rank, dtype), config)
        return
    check_predictable(config)
    setup = step_setup(name, seq_len, batch_size, lora_rank, dtype)
    if fit_memory is not None or fit_flops is not None:
        fitting = fit(setup, config, checkpointing=checkpointing, memory=memory, flops_share=fit_flops)
        names = ("segment_tokens",) if memory and config.mode == "segments" else ("keep_ratio",)
        typer.echo(", ".join(f"{field}: {getattr(fitting, field)}" for field in names))
        config = fitting
    table = Table(title=f"One step of {batch_size} x {seq_len} tokens, {config.mode}")
    for column in ("", "saved", "peak", "GFLOP", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for label, with_lemo in (("without LeMo", None), ("LeMo", config)):
        for suffix, recomputing in (("", False), (" + checkpointing", True)):
            cost = predict(setup, with_lemo, checkpointing=recomputing)
            sizes = map(size_text, (cost.saved_bytes, cost.peak_bytes))
            table.add_row(label + suffix, *sizes, f"{cost.flops / 1e9:,.0f}", f"{cost.seconds:.2f}")
    Console().print(table)


def _print_ways(setup: Setup, config: LemoConfig) -> None:
    """The table from which `mode="auto"` chooses, and its choice."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from lemo_trainer.exact.budget import free_bytes
    from lemo_trainer.offline.way_costs import plan_ways

    memory = parse_bytes("memory", config.memory) if config.memory else free_bytes(torch.device(setup.device))
    plans = plan_ways(setup, config, memory, longest=bool(config.memory))
    table = Table(
        title=f"One step of {setup.batch_size} x {setup.seq_len} tokens; every way has the exact gradient",
        caption=f"memory for tensors: {size_text(memory)}; peak counts weights, gradients, AdamW's states "
        "and activations; time is against the fastest way, by counts",
    )
    columns = ("", "saved", "elsewhere", "peak", "time", "fits")
    for column in (*columns, "longest sample") if config.memory else columns:
        table.add_column(column, justify="right" if column else "left")
    for plan in plans:
        cost = plan.cost
        sizes = map(size_text, (cost.saved, cost.stored, plan.peak))
        longest = [] if plan.longest is None else [f"{plan.longest:,}"]
        table.add_row(
            str(cost.way), *sizes, f"{plan.relative_time:.2f}", "yes" if plan.fits else "no", *longest
        )
    console = Console()
    console.print(table)
    chosen = next((plan for plan in plans if plan.fits), None)
    typer.echo(
        f"chosen: {chosen.cost.way}" if chosen else "No exact way fits: take shorter samples or detach."
    )


def step_setup(name: str, seq_len: int, batch_size: int, lora_rank: int, dtype: str) -> Setup:
    """The run whose steps are predicted, on a GPU if this machine has one."""
    import torch
    from transformers import AutoConfig

    from lemo_trainer.files import check_model
    from lemo_trainer.offline.step_cost import Setup

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {dtype!r}.")
    check_model(name)
    return Setup(
        model_config=AutoConfig.from_pretrained(name),
        seq_len=seq_len,
        batch_size=batch_size,
        lora={"r": lora_rank, "target_modules": "all-linear"} if lora_rank else None,
        dtype=getattr(torch, dtype),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
