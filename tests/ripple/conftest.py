"""Tiny random models of every supported architecture, saved and reordered once a session."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ripple_loader import ReorderConfig, RippleConfig, reorder

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 120,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MODELS: dict[str, dict[str, Any]] = {
    "arcee": {"model_type": "arcee", **GROUPED},
    "falcon": {"model_type": "falcon", "bias": True, "ffn_hidden_size": 96},
    "gemma": {"model_type": "gemma", **GROUPED, "head_dim": 8},
    "gemma2": {"model_type": "gemma2", **GROUPED, "head_dim": 8},
    "gemma3": {"model_type": "gemma3_text", **GROUPED, "head_dim": 8},
    "gemma3_multimodal": {
        "model_type": "gemma3",
        "text_config": COMMON | GROUPED | {"head_dim": 8},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 110,
        "boi_token_index": 111,
        "eoi_token_index": 112,
    },
    "gpt2": {"model_type": "gpt2", "n_inner": 96},
    "gpt_neox": {"model_type": "gpt_neox"},
    "granite": {"model_type": "granite", **GROUPED},
    "llama": {"model_type": "llama", **GROUPED, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **GROUPED},
    "mixtral": {"model_type": "mixtral", **GROUPED, "num_local_experts": 4},
    "nemotron": {"model_type": "nemotron", **GROUPED, "mlp_bias": True},
    "olmo2": {"model_type": "olmo2", **GROUPED},
    "olmoe": {"model_type": "olmoe", **GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 32},
    "phi": {"model_type": "phi"},
    "phi3": {"model_type": "phi3", **GROUPED},
    "qwen2": {"model_type": "qwen2", **GROUPED, "tie_word_embeddings": True},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **GROUPED,
        **EXPERTS,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "shared_expert_intermediate_size": 64,
    },
    "qwen3": {"model_type": "qwen3", **GROUPED, "head_dim": 8},
    "qwen3_moe": {"model_type": "qwen3_moe", **GROUPED, **EXPERTS, "head_dim": 8},
    "stablelm": {"model_type": "stablelm", **GROUPED},
    "starcoder2": {"model_type": "starcoder2", **GROUPED, "use_bias": True},
}


def make_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model whose biases are not zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**(COMMON | MODELS[name] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        scale = 1.0 if "embed" in parameter_name else 0.2
        if parameter.dim() >= 2 or parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=scale)
    return model.to(dtype).eval()


def token_ids(length: int = 24, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(seed))


CALIBRATION = [token_ids(64, seed=seed)[0] for seed in range(8)]
SMALL = ReorderConfig(tokens=256, sequence_length=64)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_probe(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the user without any probe of a drive."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved(name, dtype)`: directory of a random model, made once."""
    made: dict[Any, Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
        key = (name, dtype, *save.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name) / "model"
            make_model(name, dtype).save_pretrained(made[key], **save)
        return made[key]

    return get


@pytest.fixture(scope="session")
def reordered(saved: Callable[..., Path]) -> Callable[..., Path]:
    """`reordered(name, dtype)`: its streaming copy, made once."""
    made: dict[Any, Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
        key = (name, dtype, *save.items())
        if key not in made:
            base = saved(name, dtype, **save)
            made[key] = base.parent / "reordered"
            reorder(base, made[key], CALIBRATION, SMALL)
        return made[key]

    return get


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """`cache(directory, name)`: puts a directory into a cache of the hub, where it is found offline."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(directory, name):
        repository = folder / f"models--{name.replace('/', '--')}"
        for part in ("refs", "blobs", f"snapshots/{COMMIT}"):
            (repository / part).mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        for number, file in enumerate(directory.iterdir()):
            shutil.copyfile(file, repository / "blobs" / f"{number:040}")
            link = repository / "snapshots" / COMMIT / file.name
            link.symlink_to(f"../../blobs/{number:040}")
        return repository / "snapshots" / COMMIT

    return put


def load(directory: Path, **options: Any) -> PreTrainedModel:
    """Load through Ripple; `dtype` goes to transformers, the rest to RippleConfig.

    Neurons are selected where `keep` allows it, which a model this small would not pay for.
    """
    dtype = options.pop("dtype", "auto")
    config = RippleConfig(**({"dram_budget": "4MiB", "strategy": "sparse"} | options))
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=config)


def relative_error(got: torch.Tensor, reference: torch.Tensor) -> float:
    return ((got.float() - reference.float()).abs().max() / reference.float().abs().max()).item()


def least_budget(directory: Path, **options: Any) -> int:
    """The smallest DRAM budget that the loader accepts, as its error names it."""
    with pytest.raises(ValueError, match="`dram_budget` must be at least") as error:
        load(directory, dram_budget=1, **options)
    return int(re.search(r"at least (\d+) bytes", str(error.value))[1])
