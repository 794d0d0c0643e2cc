"""What a token costs the processor when nothing is read: Ripple's encodings beside the stock model.

    python scripts/bench/ripple_decode.py [--threads 1] [--rounds 5] [--tokens 8]

Random models in bfloat16, of the shapes that `SHAPES` lists; every neuron is cached. Attention, embeddings
and head are bfloat16 in all rows. Each call generates `--tokens` tokens, one at a time, after a prompt of
one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Table, parse, scratch
from harness import Race
from transformers import AutoConfig, AutoModelForCausalLM

from ripple_loader import ReorderConfig, RippleConfig, reorder

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Llama, 1536 wide, 8 layers": {
        "model_type": "llama",
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}
BUNDLES = ("same", "int8", "int4")
PROMPT = torch.ones(1, 1, dtype=torch.long)


@torch.no_grad()
def generated(model: Any, tokens: int) -> int:
    """Generate greedily; returns how many tokens."""
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(PROMPT, max_new_tokens=tokens, **options).shape[1]


def main() -> None:
    options = parse(__doc__, threads=1, rounds=5, tokens=8)
    table = Table(
        "ripple_decode",
        "Ripple: the processor's time for a token when nothing is read",
        f"random bfloat16 models, all neurons cached, {options}; median of the rounds, contenders in turn; "
        "ratio: CPU time of the calling thread to the stock model's in this run",
    )
    for shape, sizes in SHAPES.items():
        with scratch() as folder:
            torch.manual_seed(0)
            config = AutoConfig.for_model(**sizes, max_position_embeddings=512)
            stock = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            stock.save_pretrained(folder / "model")
            contenders: dict[str, Callable[[], int]] = {"stock": partial(generated, stock, options.tokens)}
            for bundles in BUNDLES:
                settings = ReorderConfig(placement="identity", tokens=8, bundles=bundles, sketches=False)
                reorder(folder / "model", folder / bundles, [PROMPT[0].tolist()], settings)
                loading = RippleConfig(dram_budget="4GiB")
                model = AutoModelForCausalLM.from_pretrained(folder / bundles, quantization_config=loading)
                name = "bfloat16" if bundles == "same" else bundles
                contenders[f"Ripple, {name}"] = partial(generated, model, options.tokens)
            times = Race(contenders, equal=None).run(options.rounds)
            rows = {name: times[name].columns("ms", parts=options.tokens) for name in contenders}
            for name, row in rows.items():
                table.add(f"{shape}: {name}", **row, ratio=row["cpu_ms"] / rows["stock"]["cpu_ms"])
            del contenders, stock, model
    table.finish()


if __name__ == "__main__":
    main()
