"""The zoo: models of transformers and diffusers with random weights that OLLIE was not tuned for."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Mapping[str, Tensor]]
"""A module and its inputs by name."""


class First(nn.Module):
    """A model that gives the first of its results that is neither a loss nor made of integers."""

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


def _transformers(name: str, inputs: Callable[[], Any], kind: str = "Model", **settings: Any) -> Built:
    import transformers

    tensors = inputs()
    config = getattr(transformers, f"{name}Config")(**settings)
    return First(getattr(transformers, name + kind)(config)), tensors


def _diffusers(name: str, inputs: Callable[[], Any], **settings: Any) -> Built:
    import diffusers

    tensors = inputs()
    return First(getattr(diffusers, name)(**settings)), tensors


def _language(model_type: str, auto: str = "AutoModelForCausalLM", **settings: Any) -> Built:
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **_LANGUAGE | settings)
    tensors = {"input_ids": torch.randint(3, 128, (1, 16))}
    return First(getattr(transformers, auto).from_config(config)), tensors


def _random(**shapes: tuple[int, ...]) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randn(shape) for name, shape in shapes.items()}


def _image(size: int, channels: int = 3) -> Callable[[], dict[str, Tensor]]:
    return _random(pixel_values=(1, channels, size, size))


def _noisy_image() -> dict[str, Tensor]:
    return {"sample": torch.randn(1, 3, 16, 16), "timestep": torch.tensor([10])}


_WIDTHS = [16, 24, 32, 48]
_LAYERS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 128}
_LANGUAGE = (
    _LAYERS | _TOKENS | {"num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
)
_EFFICIENTNET = {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}
_SWIN = {"image_size": 16, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
_ENCODEC = {"num_filters": 8, "hidden_size": 32, "codebook_size": 64, "codebook_dim": 32}
_DAC = {"encoder_hidden_size": 8, "decoder_hidden_size": 64, "n_codebooks": 2, "codebook_size": 64}
_GPT_NEO = [[["global", "local"], 1]]
_DPT = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": _WIDTHS, "fusion_hidden_size": 16}
_DOWN_UP = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
_UNET = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
}
_TINY_AUTOENCODER = {f"{half}_block_out_channels": (16, 16) for half in ("encoder", "decoder")}
_TINY_AUTOENCODER |= {f"num_{half}_blocks": (1, 1) for half in ("encoder", "decoder")}

_pyramid = partial(_transformers, inputs=_image(64), hidden_sizes=_WIDTHS, depths=[1, 1, 1, 1])
_mobile = partial(_transformers, inputs=_image(64), depth_multiplier=0.25, image_size=64)
_vision = partial(_transformers, inputs=_image(32), image_size=32, **_LAYERS)
_convolutional = partial(_diffusers, block_out_channels=(16, 32), norm_num_groups=4)
_SAMPLE = _random(sample=(1, 3, 32, 32))

VISION_AND_AUDIO: dict[str, Callable[[], Built]] = {
    "resnet": partial(_pyramid, "ResNet", embedding_size=16, layer_type="basic"),
    "regnet": partial(_pyramid, "RegNet", embedding_size=16, groups_width=8),
    "convnext": partial(_pyramid, "ConvNext"),
    "convnextv2": partial(_pyramid, "ConvNextV2"),
    "bit": partial(_pyramid, "Bit", embedding_size=16, num_groups=4),
    "segformer": partial(_pyramid, "Segformer", num_attention_heads=[1, 2, 4, 4], decoder_hidden_size=16),
    "poolformer": partial(_pyramid, "PoolFormer"),
    "mobilenetv1": partial(_mobile, "MobileNetV1"),
    "mobilenetv2": partial(_mobile, "MobileNetV2"),
    "efficientnet": partial(_transformers, "EfficientNet", _image(64), **_EFFICIENTNET),
    "vit": partial(_vision, "ViT", patch_size=8, num_hidden_layers=2),
    "swin2sr": partial(_transformers, "Swin2SR", _image(16), "ForImageSuperResolution", **_SWIN),
    "dpt": partial(
        _vision, "DPT", kind="ForDepthEstimation", patch_size=16, num_hidden_layers=4, is_hybrid=False, **_DPT
    ),
    "hifigan": partial(
        _transformers, "SpeechT5HifiGan", _random(spectrogram=(1, 12, 80)), "", upsample_initial_channel=32
    ),
    "univnet": partial(
        _transformers,
        "UnivNet",
        _random(input_features=(1, 8, 100), noise_sequence=(1, 8, 64)),
        model_hidden_channels=8,
    ),
    "encodec": partial(_transformers, "Encodec", _random(input_values=(1, 1, 640)), **_ENCODEC),
    "dac": partial(
        _transformers, "Dac", _random(input_values=(1, 1, 1024)), downsampling_ratios=[2, 4], **_DAC
    ),
    "autoencoder_kl": partial(_convolutional, "AutoencoderKL", _SAMPLE, sample_size=32, **_DOWN_UP),
    "autoencoder_tiny": partial(_diffusers, "AutoencoderTiny", _SAMPLE, **_TINY_AUTOENCODER),
    "unet2d": partial(_convolutional, "UNet2DModel", _noisy_image, sample_size=16, **_UNET),
}

_PLAIN = "llama", "mistral", "qwen2", "phi", "phi3", "bloom", "gpt_neox", "stablelm", "olmo2", "starcoder2"
LANGUAGE: dict[str, Callable[[], Built]] = {
    **{name: partial(_language, name) for name in _PLAIN},
    **{name: partial(_language, name, head_dim=8) for name in ("qwen3", "gemma", "gemma2")},
    **{name: partial(_language, name, "AutoModel") for name in ("bert", "roberta")},
    "gpt2": partial(_language, "gpt2", n_inner=64),
    "opt": partial(_language, "opt", ffn_dim=64, word_embed_proj_dim=32),
    "gpt_neo": partial(_language, "gpt_neo", attention_types=_GPT_NEO, num_layers=2, num_heads=4),
    "gptj": partial(_language, "gptj", rotary_dim=4),
    "falcon": partial(_language, "falcon", new_decoder_architecture=True, num_kv_heads=2, alibi=False),
}

ZOO = VISION_AND_AUDIO | LANGUAGE


def build(name: str) -> Built:
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
    """A weighted mean, because the plain mean of a LayerNorm's results is the same whatever it is given, and
    its gradients would say nothing."""
    weights = torch.rand(result.shape, generator=torch.Generator().manual_seed(0))
    return (result.float() * weights).mean()
