"""`lemo inspect`: what LeMo would patch in a model."""

from __future__ import annotations

from lemo_trainer.commands.options import check_least
from lemo_trainer.config import LemoConfig


def show_model(name: str, seq_len: int, config: LemoConfig) -> None:
    """Print the patched layers, the kept tokens, the kernels and the loss, for a model without weights."""
    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoConfig, AutoModelForCausalLM

    from lemo_trainer.files import check_model
    from lemo_trainer.informativeness.selection import BlockPlan
    from lemo_trainer.patch import apply_lemo
    from lemo_trainer.session import session_of

    check_least("seq_len", seq_len, 1)
    check_model(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    report = apply_lemo(model, config)
    table = Table(title=str(report), show_header=False)
    table.add_row("architecture", f"{report.model_type}, {model.num_parameters() / 1e6:.0f}M parameters")
    table.add_row("patched layers", join_ranges(report.patched_layers))
    session = session_of(model)
    assert session is not None
    if config.mode == "segments":
        chosen = session.choose_segments(seq_len)
        table.add_row("segments with gradient", f"{sum(chosen)} of {len(chosen)}")
    elif config.mode in ("auto", "exact"):
        table.add_row("tokens in a patched layer", "all")
    elif config.thresholds:
        table.add_row("thresholds, in mean scores", config.thresholds)
        table.add_row("tokens in a patched layer", "the blocks above them, different in each text")
    else:
        blocks = BlockPlan.of(seq_len, config)
        of_blocks = f"{blocks.kept_blocks} of {blocks.blocks} x {blocks.block_size} tokens, + {blocks.tail}"
        table.add_row("blocks", of_blocks)
        kept = blocks.kept_tokens
        table.add_row("tokens in a patched layer", f"{kept} of {seq_len} ({kept / seq_len:.0%})")
    segment = config.loss_segment
    table.add_row("kernels", report.kernels)
    table.add_row("loss", f"{segment} tokens at a time" if segment else "the model's own, all logits")
    Console().print(table)


def join_ranges(indices: tuple[int, ...]) -> str:
    """(1, 2, 3, 7) as "1-3, 7"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
