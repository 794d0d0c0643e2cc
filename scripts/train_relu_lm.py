"""Train a small language model whose ReLU activations are mostly zero.

    python scripts/train_relu_lm.py [--model relu-lm] [--steps 1100] [--target 0.9] [--batch 8]

No trained ReLU model can be had offline, so this makes one: CPython's help topics (scripts/assets.py) and the
sources of the running interpreter's standard library, a byte-level BPE tokenizer of their own, AdamW, and an
L1 penalty on the activations whose weight follows the share of zeros. The seed is fixed; the text, and with
it the numbers, depends on the Python version. The model lies in .cache/relu-lm and has OPT's architecture;
relu-lm-wide, for which fewer and smaller steps will do, is one whose MLPs are six sevenths of it, with
Arcee's architecture (squared ReLU), which other engines know too. Losses and zeros are appended to
docs/results/relu_lm.csv. Call it "trained here": it shows sparsity, not quality. A run that was killed is
gone on with by the next one with the same arguments, to the same numbers: see .cache/relu-lm.partial.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
from common import ROOT, Table  # also makes `assets` importable

CACHE = ROOT / ".cache"
SEED, VOCABULARY, LENGTH = 0, 4096, 256
SHAPES: dict[str, dict[str, Any]] = {
    "relu-lm": {
        "model_type": "opt",
        "hidden_size": 384,
        "word_embed_proj_dim": 384,
        "ffn_dim": 3072,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "dropout": 0.0,
    },
    "relu-lm-wide": {
        "model_type": "arcee",
        "hidden_size": 512,
        "intermediate_size": 8192,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}
LEARNING_RATE, WARM_UP = 1e-3, 50
PENALTY, PENALTY_RATE = (
    0.01,
    0.15,
)  # the weight at the start; by how much it follows the missing share of zeros
HELD_OUT_EVERY, LOG_EVERY = 16, 50
SKIPPED = {"test", "tests", "idlelib", "idle_test", "site-packages", "pydoc_data", "lib2to3", "__pycache__"}


def documents() -> tuple[list[str], list[str]]:
    """Training and held-out documents: help topics, and modules of the standard library."""
    import assets

    library = Path(sysconfig.get_path("stdlib"))
    modules = [
        path.read_text("utf-8", errors="replace")
        for path in sorted(library.rglob("*.py"))
        if not SKIPPED & set(path.relative_to(library).parts)
    ]
    train = [text for number, text in enumerate(modules) if number % HELD_OUT_EVERY]
    return [*assets.texts("train"), *train], [*assets.texts("held_out"), *modules[::HELD_OUT_EVERY]]


def make_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer trained on `texts`."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts, VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **special)


def token_stream(texts: list[str], tokenizer: Any) -> Tensor:
    """All documents in one row, each after an end-of-text token."""
    ids = [[tokenizer.eos_token_id, *tokenizer(text).input_ids] for text in texts]
    return torch.tensor([token for document in ids for token in document])


def batches(stream: Tensor, steps: int, batch: int) -> Iterator[Tensor]:
    """`steps` batches of (batch, LENGTH) tokens, the stream in a new order after each pass."""
    rows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(rows), generator=generator)
        yield rows[order[:batch]]
        order = order[batch:]


class Activations:
    """Sees what the last linear of each MLP is given: the mean activation and the share of zeros."""

    def __init__(self, model: Any) -> None:
        self.means: list[Tensor] = []
        self.zeros: list[float] = []
        for name, module in model.named_modules():
            if name.endswith((".fc2", ".down_proj")):
                module.register_forward_pre_hook(lambda _, args: self.record(args[0]))

    def record(self, activation: Tensor) -> None:
        self.means.append(activation.float().mean())
        self.zeros.append((activation == 0).float().mean().item())

    def take(self) -> tuple[Tensor, list[float]]:
        """The mean activation over layers and each layer's share of zeros, since the last call."""
        taken = torch.stack(self.means).mean(), self.zeros
        self.means, self.zeros = [], []
        return taken


@torch.no_grad()
def evaluate(
    model: Any, activations: Activations, stream: Tensor, rows: int = 32
) -> tuple[float, list[float]]:
    """Loss in float32 and each layer's share of zeros on the first tokens of a held-out stream."""
    model.eval()
    losses, zeros = [], []
    for row in stream[: rows * LENGTH].view(rows, 1, LENGTH):
        losses.append(model(row, labels=row).loss.item())
        zeros.append(activations.take()[1])
    model.train()
    return statistics.mean(losses), [statistics.mean(layer) for layer in zip(*zeros, strict=True)]


class Checkpoint:
    """Everything that changes while training, in one file that is replaced as a whole.

    Args:
        path: the file.
        key: what the run depends on; a file of another run is ignored.
        parts: have a `state_dict` that is restored in place.
    """

    def __init__(self, path: Path, key: str, **parts: Any) -> None:
        self.path, self.key, self.parts = path, key, parts

    def load(self) -> dict[str, Any] | None:
        """Restore the parts; returns what else was saved, or None where there is nothing to go on with."""
        if not self.path.exists():
            return None
        saved = torch.load(self.path)
        if saved["key"] != self.key:
            print(f"{self.path} is of a run with other arguments and will be replaced", file=sys.stderr)
            return None
        for name, part in self.parts.items():
            part.load_state_dict(saved["parts"][name])
        return saved["more"]

    def save(self, **more: Any) -> None:
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".new")
        with written.open("wb") as file:
            torch.save({"key": self.key, "parts": parts, "more": more}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, self.path)


def save_model(model: Any, tokenizer: Any, out: Path) -> None:
    """Replace the directory `out` once all of it is written."""
    written = out.with_suffix(".new")
    shutil.rmtree(written, ignore_errors=True)
    model.eval().save_pretrained(written)
    tokenizer.save_pretrained(written)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(written, out)


def new_model(shape: dict[str, Any], tokenizer: Any) -> Any:
    """A model with random weights for the tokens of a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        vocab_size=len(tokenizer),
        max_position_embeddings=2 * LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    return AutoModelForCausalLM.from_config(config)


def main(name: str, steps: int, target: float, batch: int) -> None:
    from transformers import get_cosine_schedule_with_warmup as cosine

    torch.manual_seed(SEED)
    shape, out = SHAPES[name], CACHE / name
    train, held_out = documents()
    tokenizer = make_tokenizer(train)
    stream, held_out_stream = token_stream(train, tokenizer), token_stream(held_out, tokenizer)
    model = new_model(shape, tokenizer)
    activations = Activations(model)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = cosine(optimizer, WARM_UP, steps)
    bfloat16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # slower than float32 without
    arithmetic = "bfloat16 autocast" if bfloat16 else "float32"
    table = Table(
        name="relu_lm",
        title=f"ReLU model trained here, {model.num_parameters() / 1e6:.1f}M parameters",
        config=f"{shape}, {VOCABULARY} tokens, {len(stream):,} of text, {steps} steps of "
        f"{batch} x {LENGTH}, {arithmetic}, seed {SEED}, target {target:.0%} zeros",
    )
    partial = CACHE / f"{name}.partial"  # the last checkpoint of a run that is not finished
    checkpoint = Checkpoint(partial, table.config, model=model, optimizer=optimizer, schedule=schedule)
    done, penalty, seconds = 0, PENALTY, 0.0
    if saved := checkpoint.load():
        done, penalty, seconds, table.rows = (saved[name] for name in ("step", "penalty", "seconds", "rows"))
        print(f"going on after step {done}", flush=True)
    start = time.monotonic() - seconds
    losses: list[float] = []
    for step, ids in enumerate(itertools.islice(batches(stream, steps, batch), done, None), done + 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(ids, labels=ids).loss
        mean_activation, by_layer = activations.take()
        zeros = statistics.mean(by_layer)
        (loss + penalty * mean_activation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        penalty *= math.exp(PENALTY_RATE * (target - zeros))
        losses.append(loss.item())
        if step % LOG_EVERY == 0 or step == steps:
            row = {"loss": statistics.mean(losses), "zeros": zeros, "penalty": penalty}
            table.add(f"step {step}", **row)
            seconds = time.monotonic() - start
            print(
                step,
                " ".join(f"{key} {value:.4g}" for key, value in row.items()),
                f"{seconds:.0f} s",
                flush=True,
            )
            losses = []
            checkpoint.save(step=step, penalty=penalty, seconds=seconds, rows=table.rows)
    loss_, by_layer = evaluate(model, activations, held_out_stream)
    shares = {f"zeros_layer_{layer}": share for layer, share in enumerate(by_layer)}
    table.add("held out", loss=loss_, perplexity=math.exp(loss_), zeros=statistics.mean(by_layer), **shares)
    save_model(model, tokenizer, out)
    table.finish()
    partial.unlink()
    print(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="relu-lm")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--target", type=float, default=0.9, help="share of zeros to train for")
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {LENGTH} tokens a step")
    arguments = parser.parse_args()
    main(arguments.model, arguments.steps, arguments.target, arguments.batch)
