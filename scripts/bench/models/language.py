"""Language models of the tables, SmolLM2 unless another folder is named, and the text that they are given."""

import math
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from common import assets
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

SIZES = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"


def quiet() -> None:
    """No messages and progress bars of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load(folder: Path | None = None, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder or assets.model_dir(), **options)


def tokenizer(folder: Path | None = None) -> Any:
    return AutoTokenizer.from_pretrained(folder or assets.model_dir())


def tokens(split: str, *shape: int, folder: Path | None = None) -> Tensor:
    """The first tokens of a split's documents, all in a row, or in the shape given (sequences, length)."""
    encode = tokenizer(folder)
    ids = torch.cat([encode(text, return_tensors="pt").input_ids[0] for text in assets.texts(split)])
    return ids[: math.prod(shape)].view(shape) if shape else ids


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    """Of sequences [sequences, length], each by itself."""
    return math.exp(statistics.mean(model(row[None], labels=row[None]).loss.item() for row in ids))


def own_bytes(model: Any) -> int:
    """Bytes of the parameters in memory, each counted once."""
    return sum({p.data_ptr(): p.nbytes for p in model.parameters() if p.device.type != "meta"}.values())


def random(kind: type, *sizes: int, **others: Any) -> Any:
    """A causal LM in bfloat16 with random weights.

    Args:
        kind: class of its config.
        sizes: the values of `SIZES`.
        others: of the config's fields.
    """
    torch.manual_seed(0)
    config = kind(**dict(zip(SIZES, sizes, strict=True)), **others)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def opt(layers: int, neurons: int, hidden: int, group: int, bias: float) -> Any:
    """An OPT with random weights of which the neurons of a group are alike, and lie anywhere in their layer.

    Args:
        bias: of fc1; -1.5 leaves about a fourteenth of the neurons active.
    """
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=1024,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=neurons,
        num_hidden_layers=layers,
        num_attention_heads=6,
        max_position_embeddings=512,
    )
    model = OPTForCausalLM(config)
    for layer in model.model.decoder.layers:
        alike = torch.randn(neurons // group, hidden).repeat_interleave(group, 0)
        weight = (0.9 * alike + 0.44 * torch.randn(neurons, hidden)) * hidden**-0.5
        layer.fc1.weight.data = weight[torch.randperm(neurons)]
        layer.fc1.bias.data.fill_(bias)
    return model.eval()
