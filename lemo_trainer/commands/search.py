"""`lemo search-thresholds`: thresholds that cost little held-out loss, or that fit a budget."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lemo_trainer.commands.options import check_least, parse_shares
from lemo_trainer.commands.plan import step_setup
from lemo_trainer.config import LemoConfig
from lemo_trainer.sizes import parse_bytes

if TYPE_CHECKING:
    from lemo_trainer.offline.budget import Budget
    from lemo_trainer.offline.thresholds import ThresholdSearch


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of `lemo search-thresholds`, as `lemo_trainer.cli` documents them.

    Raises:
        ValueError: more than one budget is given, a number is too small, or a file's folder does not exist.
    """

    model: str
    data: str
    output: str
    max_increase: float | None
    seq_len: int
    samples: int
    rounds: int
    kept_shares: str
    fit_share: float | None
    fit_flops: float | None
    fit_memory: str | None
    checkpointing: bool
    lora_rank: int
    dtype: str
    plot: str | None

    def __post_init__(self) -> None:
        budgets = ("fit_share", "fit_flops", "fit_memory")
        given = [option for option in budgets if getattr(self, option) is not None]
        if len(given) > 1:
            names = ", ".join(f"`{option}`" for option in budgets)
            raise ValueError(f"Give one of {names}, got {len(given)}.")
        for option, least in (("seq_len", 2), ("samples", 1), ("rounds", 0)):
            check_least(option, getattr(self, option), least)
        for option in ("output", "plot"):
            path = getattr(self, option)
            if path is not None and not Path(path).absolute().parent.is_dir():
                raise ValueError(f"`{option}` must lie in a folder that exists, got {path!r}.")

    @property
    def has_budget(self) -> bool:
        return any(limit is not None for limit in (self.fit_share, self.fit_flops, self.fit_memory))

    def budget(self, config: LemoConfig) -> Budget | None:
        """The limit on a step that was asked for."""
        from transformers import AutoConfig

        from lemo_trainer.offline.budget import Budget

        if not self.has_budget:
            return None
        if self.fit_share is not None:
            return Budget.of_shares(self.fit_share, AutoConfig.from_pretrained(self.model).num_hidden_layers)
        setup = step_setup(self.model, self.seq_len, 1, self.lora_rank, self.dtype)
        memory = None if self.fit_memory is None else parse_bytes("fit_memory", self.fit_memory)
        return Budget.of_step(
            setup, config, checkpointing=self.checkpointing, memory=memory, flops_share=self.fit_flops
        )


def find_thresholds(options: SearchOptions, config: LemoConfig) -> None:
    """Search, print the table of all points that were tried, and write the YAML file and the picture."""
    from transformers import AutoModelForCausalLM

    from lemo_trainer.files import check_model
    from lemo_trainer.offline.plot import check_plot, plot_kept_shares
    from lemo_trainer.offline.thresholds import check_search, search_thresholds

    shares = parse_shares(options.kept_shares) if options.has_budget else ()
    check_search(config, options.max_increase, shares)
    if options.plot is not None:
        check_plot()
    check_model(options.model)
    if options.fit_memory is not None:
        parse_bytes("fit_memory", options.fit_memory)
    batches, budget = _held_out_batches(options), options.budget(config)
    found = search_thresholds(
        AutoModelForCausalLM.from_pretrained(options.model),
        batches,
        config,
        max_increase=options.max_increase,
        rounds=options.rounds,
        shares=shares,
        budget=budget,
    )
    _print(found)
    if not found.thresholds:
        raise ValueError(
            f"The budget is met with every layer dense ({found.cost}): no tokens need to be left out."
            if found.cost
            else f"No layer can leave tokens out within {found.max_increase} nats; use another mode."
        )
    _write(found, config, options.output)
    if options.plot is not None:
        plot_kept_shares(found, options.plot)
        typer.echo(f"wrote {options.plot}")
    typer.echo(f"wrote {options.output}")


def _held_out_batches(options: SearchOptions) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoTokenizer

    from lemo_trainer.texts import pack, read_texts

    texts, tokenizer = read_texts(options.data), AutoTokenizer.from_pretrained(options.model)
    samples = pack(texts, tokenizer, options.seq_len)[: options.samples]
    if len(samples) < options.samples:
        raise ValueError(
            f"{options.data} must hold {options.samples} samples of {options.seq_len} tokens, got "
            f"{len(samples)}."
        )
    return [{name: torch.tensor([tokens]) for name, tokens in sample.items()} for sample in samples]


def _summary(found: ThresholdSearch) -> list[str]:
    """The losses in one line, and with a budget the cost in another."""
    losses = (
        f"held-out loss {found.dense_loss:.4f} dense, {found.loss:.4f} with the thresholds "
        f"({found.predicted_loss:.4f} if losses added up)"
    )
    return [losses, found.cost] if found.cost else [losses]


def _print(found: ThresholdSearch) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="\n".join(_summary(found)))
    for column in ("layer", "threshold", "kept", "loss alone", "used"):
        table.add_column(column, justify="right")
    for row in found.layers:
        increase = f"{row.loss_increase:+.4f}"
        used = "yes" if row.used else "" if row.layer in found.thresholds else "dense"
        table.add_row(str(row.layer), f"{row.threshold:.3f}", f"{row.kept_share:.0%}", increase, used)
    Console().print(table)


def _write(found: ThresholdSearch, config: LemoConfig, path: str) -> None:
    """A YAML file that `LemoConfig` reads, with the table of all points as comments."""
    import yaml

    comments = [*_summary(found), "layer  threshold  kept share  loss alone  used"]
    for row in found.layers:
        comments.append(
            f"{row.layer:5}  {row.threshold:9.4g}  {row.kept_share:10.1%}  {row.loss_increase:+10.4f}  "
            f"{'yes' if row.used else 'no'}"
        )
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump({**dataclasses.asdict(config), "thresholds": found.thresholds}, file, sort_keys=False)
        file.writelines(f"# {line}\n" for line in comments)
