"""Models of images and text: the MLPs of the language model stream, the rest stays in memory."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from ripple_loader import RippleConfig, attach, reorder
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.model.streaming import StreamingMLP
from ripple_loader.offline.verification import verify
from tests.ripple.conftest import CALIBRATION, COMMON, GROUPED, SMALL, VISION, relative_error, token_ids

TEXT = COMMON | GROUPED
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
IMAGE, START, END = 110, 111, 112
TOKENS = {
    "image_token_id": IMAGE,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "video_token_id": 113,
}
# Qwen2.5-VL's vision tower has gated MLPs by the same names as the language model's.
QWEN_VISION = {
    "depth": 2,
    "patch_size": 14,
    "num_heads": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
RESAMPLED = {"resampler_depth": 1, "resampler_n_latents": 4, "resampler_n_heads": 2, "resampler_head_dim": 8}
MODELS = {
    "idefics2": {  # whose connector has layers with MLPs of the same names
        "model_type": "idefics2",
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION,
        "perceiver_config": RESAMPLED | {"hidden_size": 32, "num_key_value_heads": 1},
        "image_token_id": IMAGE,
    },
    "llava": {
        "model_type": "llava",
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    },
    "llava of phi": {  # whose MLPs have the names of those of the vision tower
        "model_type": "llava",
        "text_config": COMMON | {"model_type": "phi"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    },
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": QWEN_VISION | {"embed_dim": 32, "hidden_size": 32},
        **TOKENS,
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": QWEN_VISION
        | {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "window_size": 56},
        **TOKENS,
    },
}


def save(name, folder):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**MODELS[name]), dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if parameter.dim() >= 2 or key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in key else 0.2)
    model.save_pretrained(folder)
    return folder


def inputs(name):
    """A text with an image in it."""
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = token_ids(12) % 100
    if name == "idefics2":
        ids[0, 3:7] = IMAGE
        return {"input_ids": ids, "pixel_values": pixels[None]}
    if name.startswith("llava"):
        ids[0, 3:7] = IMAGE
        return {"input_ids": ids, "pixel_values": pixels}
    ids[0, 3:6] = torch.tensor([START, IMAGE, END])
    patches = pixels.expand(2, 3, 28, 28).reshape(2, 3, 2, 14, 2, 14).permute(2, 4, 1, 0, 3, 5).reshape(4, -1)
    kinds = (ids == IMAGE).long()
    grid = torch.tensor([[1, 2, 2]])
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_language_model_of_a_wrapper_streams(name, tmp_path):
    folder, out = save(name, tmp_path / "model"), tmp_path / "out"
    reorder(folder, out, CALIBRATION, SMALL)
    assert Sidecar(out).header.layers == 2
    config = RippleConfig(dram_budget="4MiB", strategy="sparse")
    stock = AutoModelForImageTextToText.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(out, quantization_config=config)
    streamed = [key for key, module in model.named_modules() if isinstance(module, StreamingMLP)]
    assert len(streamed) == 2
    assert all(re.search("language_model|text_model", key) for key in streamed)
    for arguments in (inputs(name), {"input_ids": token_ids() % 100}):
        assert relative_error(model(**arguments).logits, stock(**arguments).logits) < 1e-5
    arguments = inputs(name) | {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**arguments), stock.generate(**arguments))
    wanted = stock(**inputs(name)).logits
    assert [check for check, _ in verify(out, folder)][-1] == "streamed logits"
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert relative_error(saved(**inputs(name)).logits, wanted) < 1e-5
    attach(stock, RippleConfig(dram_budget="4MiB"), out)
    assert relative_error(stock(**inputs(name)).logits, wanted) < 1e-5
