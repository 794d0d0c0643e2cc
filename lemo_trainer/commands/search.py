"""What the commands of `lemo` do, behind the options that `cli` reads.

A ValueError, TypeError or OSError is the user's to mend.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import typer

from lemo_trainer.commands.options import check_least, parse_bytes, parse_shares
from lemo_trainer.commands.plan import step_setup
from lemo_trainer.config import LemoConfig


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

    from lemo_trainer.files import check_model
    from lemo_trainer.offline.budget import Budget
    from lemo_trainer.offline.plot import check_plot, plot_kept_shares
    from lemo_trainer.offline.thresholds import check_search
    from lemo_trainer.offline.thresholds import search_thresholds as search
    from lemo_trainer.texts import pack, read_texts

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
        setup = step_setup(name, seq_len, 1, lora_rank, dtype)
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
