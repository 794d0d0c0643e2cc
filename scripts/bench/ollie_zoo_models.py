"""The zoo: models of transformers and diffusers with random weights that OLLIE was not tuned for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

WIDTHS, DEPTHS = [16, 24, 32, 48], [1, 1, 1, 1]

Made = tuple[nn.Module, Mapping[str, Tensor]]
"""A module and what it is called with, by name."""


class First(nn.Module):
    """A model that gives the first of its results that is not a loss or made of integers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        result = self.model(**inputs)
        if isinstance(result, Tensor):
            return result
        return next(
            v for v in result.to_tuple() if isinstance(v, Tensor) and v.is_floating_point() and v.dim()
        )


def transformers_model(kind: str, config: str, inputs: Mapping[str, Tensor], **settings: Any) -> Made:
    import transformers

    made = getattr(transformers, config)(**settings)
    return First(getattr(transformers, kind)(made)), inputs


def diffusers_model(kind: str, inputs: Mapping[str, Tensor], **settings: Any) -> Made:
    import diffusers

    return First(getattr(diffusers, kind)(**settings)), inputs


def image(size: int = 32, channels: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, channels, size, size)}


def sound(samples: int = 640) -> dict[str, Tensor]:
    return {"input_values": torch.randn(1, 1, samples)}


def _pyramid(name: str, size: int = 64, **settings: Any) -> Made:
    known = {"hidden_sizes": WIDTHS, "depths": DEPTHS} | settings
    return transformers_model(f"{name}Model", f"{name}Config", image(size), **known)


def _unet() -> Made:
    inputs = {"sample": torch.randn(1, 3, 16, 16), "timestep": torch.tensor([10])}
    return diffusers_model(
        "UNet2DModel",
        inputs,
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def _autoencoder(kind: str, **settings: Any) -> Made:
    known = {"block_out_channels": (16, 32), "sample_size": 32, "norm_num_groups": 4} | settings
    known |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers_model(kind, {"sample": torch.randn(1, 3, 32, 32)}, **known)


VISION_AND_AUDIO: dict[str, Callable[[], Made]] = {
    "resnet": lambda: _pyramid("ResNet", embedding_size=16, layer_type="basic"),
    "regnet": lambda: _pyramid("RegNet", embedding_size=16, groups_width=8),
    "convnext": lambda: _pyramid("ConvNext"),
    "convnextv2": lambda: _pyramid("ConvNextV2"),
    "bit": lambda: _pyramid("Bit", embedding_size=16, num_groups=4),
    "segformer": lambda: _pyramid("Segformer", num_attention_heads=[1, 2, 4, 4], decoder_hidden_size=16),
    "poolformer": lambda: _pyramid("PoolFormer"),
    "mobilenetv1": lambda: transformers_model(
        "MobileNetV1Model", "MobileNetV1Config", image(64), depth_multiplier=0.25, image_size=64
    ),
    "mobilenetv2": lambda: transformers_model(
        "MobileNetV2Model", "MobileNetV2Config", image(64), depth_multiplier=0.25, image_size=64
    ),
    "efficientnet": lambda: transformers_model(
        "EfficientNetModel",
        "EfficientNetConfig",
        image(64),
        width_coefficient=0.25,
        depth_coefficient=0.3,
        image_size=64,
        hidden_dim=320,
    ),
    "vit": lambda: transformers_model(
        "ViTModel",
        "ViTConfig",
        image(32),
        image_size=32,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
    "swin2sr": lambda: transformers_model(
        "Swin2SRForImageSuperResolution",
        "Swin2SRConfig",
        image(16),
        image_size=16,
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
    ),
    "dpt": lambda: transformers_model(
        "DPTForDepthEstimation",
        "DPTConfig",
        image(32),
        image_size=32,
        patch_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=WIDTHS,
        fusion_hidden_size=16,
        is_hybrid=False,
    ),
    "hifigan": lambda: transformers_model(
        "SpeechT5HifiGan",
        "SpeechT5HifiGanConfig",
        {"spectrogram": torch.randn(1, 12, 80)},
        upsample_initial_channel=32,
    ),
    "univnet": lambda: transformers_model(
        "UnivNetModel",
        "UnivNetConfig",
        {"input_features": torch.randn(1, 8, 100), "noise_sequence": torch.randn(1, 8, 64)},
        model_hidden_channels=8,
    ),
    "encodec": lambda: transformers_model(
        "EncodecModel",
        "EncodecConfig",
        sound(),
        num_filters=8,
        hidden_size=32,
        codebook_size=64,
        codebook_dim=32,
    ),
    "dac": lambda: transformers_model(
        "DacModel",
        "DacConfig",
        sound(1024),
        encoder_hidden_size=8,
        decoder_hidden_size=64,
        downsampling_ratios=[2, 4],
        n_codebooks=2,
        codebook_size=64,
    ),
    "autoencoder_kl": lambda: _autoencoder("AutoencoderKL"),
    "autoencoder_tiny": lambda: diffusers_model(
        "AutoencoderTiny",
        {"sample": torch.randn(1, 3, 32, 32)},
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    "unet2d": _unet,
}

_SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODERS = ("bert", "roberta", "electra", "distilbert", "albert")


def _language(name: str) -> Made:
    import transformers

    auto = transformers.AutoModel if name in _ENCODERS else transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.for_model(name, **_SMALL | _OWN.get(name, {}))
    inputs = {"input_ids": torch.randint(3, 128, (1, 16))}
    return First(auto.from_config(config)), inputs


_OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    "gpt2": {"n_inner": 64},
    "bloom": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 2},
}

LANGUAGE: dict[str, Callable[[], Made]] = {
    name: (lambda name=name: _language(name))
    for name in (
        "gpt2",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "phi",
        "phi3",
        "opt",
        "bloom",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "falcon",
        "stablelm",
        "olmo2",
        "starcoder2",
        "bert",
        "roberta",
    )
}

ZOO = VISION_AND_AUDIO | LANGUAGE


def build(name: str) -> Made:
    """A model for evaluation whose results and gradients are of ordinary size in all of its layers.

    With the weights that models begin training with, some of them give less than 1e-30 and have gradients of
    0, which anything equals.
    """
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter += torch.rand_like(parameter) - 0.5
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0  # it normalizes as it did in the last call in training
                module.train()
        model(**inputs)
    return model.eval(), inputs


def loss(result: Tensor) -> Tensor:
    """A loss whose gradients say something: the mean of what a LayerNorm gives is the same for all that it
    gets, so that results are weighted."""
    weights = torch.rand(result.shape, generator=torch.Generator().manual_seed(0))
    return (result.float() * weights).mean()
