"""`lemo predict-train`: training the nets of selector="predictor"."""

from __future__ import annotations

from typing import Any

import typer

from lemo_trainer.commands.options import check_least
from lemo_trainer.config import LemoConfig


def make_predictors(
    name: str,
    data: str,
    output: str,
    seq_len: int,
    held_out: int,
    options: dict[str, Any],
    config: LemoConfig,
) -> None:
    """Train predictors on a text and print the recall of each layer."""
    import torch
    from accelerate import PartialState
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lemo_trainer.files import check_model
    from lemo_trainer.offline.predictor_training import PredictorTraining, train_predictors
    from lemo_trainer.texts import pack, read_texts

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
