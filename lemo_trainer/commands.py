"""What the commands of `lemo` do, behind the options that `cli` reads.

A ValueError, TypeError or OSError is the user's to mend.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lemo_trainer.config import LemoConfig

if TYPE_CHECKING:
    from lemo_trainer.plan import Setup


def show_model(name: str, seq_len: int, config: LemoConfig) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoConfig, AutoModelForCausalLM

    from lemo_trainer.patch import apply_lemo
    from lemo_trainer.recipe import check_model
    from lemo_trainer.selection import BlockPlan

    check_least("seq_len", seq_len, 1)
    check_model(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    report = apply_lemo(model, config)
    table = Table(title=str(report), show_header=False)
    table.add_row("architecture", f"{report.model_type}, {model.num_parameters() / 1e6:.0f}M parameters")
    table.add_row("patched layers", join_ranges(report.patched_layers))
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
    table.add_row("kernels", report.kernels)
    table.add_row("loss", f"{segment} tokens at a time" if segment else "the model's own, all logits")
    Console().print(table)


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
    from rich.console import Console
    from rich.table import Table

    from lemo_trainer.plan import check_predictable, fit, predict

    if fit_memory is not None and fit_flops is not None:
        raise ValueError("Give one of `fit_memory` and `fit_flops`, not both.")
    config = LemoConfig.from_dict(lemo)
    check_predictable(config)
    memory = None if fit_memory is None else parse_bytes(fit_memory)
    setup = _setup(name, seq_len, batch_size, lora_rank, dtype)
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


def _setup(name: str, seq_len: int, batch_size: int, lora_rank: int, dtype: str) -> Setup:
    """The run that `lemo plan` predicts, on the device that is there."""
    import torch
    from transformers import AutoConfig

    from lemo_trainer.plan import Setup
    from lemo_trainer.recipe import check_model

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


def find_thresholds(
    name: str,
    data: str,
    output: str,
    max_increase: float | None,
    seq_len: int,
    samples: int,
    rounds: int,
    config: LemoConfig,
    *,
    kept_shares: str,
    fit_share: float | None,
    fit_flops: float | None,
    fit_memory: str | None,
    checkpointing: bool,
    lora_rank: int,
    dtype: str,
    plot: str | None,
) -> None:
    import torch
    import yaml
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lemo_trainer.budget import Budget
    from lemo_trainer.plot import check_plot, plot_kept_shares
    from lemo_trainer.recipe import check_model, pack, read_texts
    from lemo_trainer.thresholds import check_search
    from lemo_trainer.thresholds import search_thresholds as search

    fits = {"fit_share": fit_share, "fit_flops": fit_flops, "fit_memory": fit_memory}
    given = [option for option, value in fits.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"Give one of {', '.join(f'`{option}`' for option in fits)}, got {len(given)}.")
    shares = parse_shares(kept_shares) if given else ()
    check_search(config, max_increase, shares)
    for option, value, least in (("seq_len", seq_len, 2), ("samples", samples, 1), ("rounds", rounds, 0)):
        check_least(option, value, least)
    for option, path in (("output", output), ("plot", plot)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"`{option}` must lie in a folder that exists, got {path!r}.")
    if plot is not None:
        check_plot()
    check_model(name)
    memory = None if fit_memory is None else parse_bytes(fit_memory)
    texts = read_texts(data)
    blocks = pack(texts, AutoTokenizer.from_pretrained(name), seq_len)[:samples]
    if len(blocks) < samples:
        raise ValueError(f"{data} holds {len(blocks)} samples of {seq_len} tokens, fewer than {samples}.")
    batches = [{key: torch.tensor([tokens]) for key, tokens in block.items()} for block in blocks]
    budget = None
    if fit_share is not None:
        budget = Budget.of_shares(fit_share, AutoConfig.from_pretrained(name).num_hidden_layers)
    elif given:
        setup = _setup(name, seq_len, 1, lora_rank, dtype)
        budget = Budget.of_step(
            setup, config, checkpointing=checkpointing, memory=memory, flops_share=fit_flops
        )
    model = AutoModelForCausalLM.from_pretrained(name)
    found = search(
        model, batches, config, max_increase=max_increase, rounds=rounds, shares=shares, budget=budget
    )
    summary = (
        f"held-out loss {found.dense_loss:.4f} dense, {found.loss:.4f} with the thresholds "
        f"({found.predicted_loss:.4f} if losses added up)"
    )
    table = Table(title="\n".join(filter(None, [summary, found.cost])))
    for column in ("layer", "threshold", "kept", "loss alone", "used"):
        table.add_column(column, justify="right")
    for row in found.layers:
        increase = f"{row.loss_increase:+.4f}"
        used = "yes" if row.used else "" if row.layer in found.thresholds else "dense"
        table.add_row(str(row.layer), f"{row.threshold:.3f}", f"{row.kept_share:.0%}", increase, used)
    Console().print(table)
    if not found.thresholds:
        raise ValueError(
            f"The budget is met with every layer dense ({found.cost}): there is nothing to leave out."
            if found.cost
            else f"No layer can leave tokens out within {found.max_increase} nats; use another mode."
        )
    result = {**dataclasses.asdict(config), "thresholds": found.thresholds}
    with open(output, "w", encoding="utf-8") as file:
        yaml.safe_dump(result, file, sort_keys=False)
        comments = [summary, *filter(None, [found.cost]), "layer  threshold  kept share  loss alone  used"]
        for row in found.layers:
            comments.append(
                f"{row.layer:5}  {row.threshold:9.4g}  {row.kept_share:10.1%}  {row.loss_increase:+10.4f}  "
                f"{'yes' if row.used else 'no'}"
            )
        file.writelines(f"# {line}\n" for line in comments)
    if plot is not None:
        plot_kept_shares(found, plot)
        typer.echo(f"wrote {plot}")
    typer.echo(f"wrote {output}")


def make_predictors(
    name: str,
    data: str,
    output: str,
    seq_len: int,
    held_out: int,
    options: dict[str, Any],
    config: LemoConfig,
) -> None:
    import torch
    from accelerate import PartialState
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lemo_trainer.predictor_training import PredictorTraining, train_predictors
    from lemo_trainer.recipe import check_model, pack, read_texts

    training = PredictorTraining(**options)
    for option, value, least in (("seq_len", seq_len, 2 * config.block_size), ("held_out", held_out, 1)):
        check_least(option, value, least)
    check_model(name)
    samples = pack(read_texts(data), AutoTokenizer.from_pretrained(name), seq_len)
    if len(samples) <= held_out:
        raise ValueError(
            f"{data} must hold more than the {held_out} held-out samples of {seq_len} tokens, got "
            f"{len(samples)}."
        )
    batches = [{"input_ids": torch.tensor([sample["input_ids"]])} for sample in samples[-held_out:]]
    model = AutoModelForCausalLM.from_pretrained(name)
    predictors = train_predictors(model, samples[:-held_out], batches, config, training, output)
    if not PartialState().is_main_process:
        return
    share = sum(p.numel() for p in predictors.parameters()) / model.num_parameters()
    table = Table(title=f"{share:.1%} of the model's parameters; recall of {len(batches)} held-out samples")
    table.add_column("layer", justify="right")
    table.add_column("recall", justify="right")
    for layer, recall in predictors.recall.items():
        table.add_row(str(layer), f"{recall:.1%}")
    table.add_row("mean", f"{sum(predictors.recall.values()) / len(predictors.recall):.1%}")
    Console().print(table)
    typer.echo(f'wrote {output}; LemoConfig(selector="predictor", predictors="{output}") uses it')


def parse_ranks(text: str) -> tuple[int, int, int]:
    """ "32,32,32" as three numbers."""
    try:
        first, second, third = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f'`ranks` must be three whole numbers like "32,32,32", got {text!r}.') from None
    return first, second, third


def check_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"`{option}` must be at least {least}, got {value}.")


def parse_shares(text: str) -> tuple[float, ...]:
    """ "0.75,0.5" as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f'`kept_shares` must be numbers like "0.75,0.5,0.25", got {text!r}.') from None


def parse_bytes(text: str) -> float:
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


def join_ranges(indices: tuple[int, ...]) -> str:
    """(1, 2, 3, 7) as "1-3, 7"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
