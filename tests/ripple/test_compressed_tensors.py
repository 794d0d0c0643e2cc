"""Checkpoints that the package compressed-tensors wrote, dequantized by `reorder`."""

import importlib.util
import json
import shutil

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ripple_loader import reorder
from ripple_loader.checkpoint.dequantizing import open_quantized
from tests.ripple.conftest import CALIBRATION, SMALL, load, make_model, relative_error, token_ids

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
GROUP = 16


def integers(weight, bits, group=None):
    """Symmetric integers: the scales of groups of inputs, or of whole rows, and the dequantized weight."""
    groups = weight.view(len(weight), -1, group or weight.shape[1])
    scale = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return {"weight_scale": scale[..., 0]}, ((groups / scale).round() * scale).view_as(weight)


def shifted_integers(weight):
    """Integers of 4 bits with zero points."""
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = (-8 - low / scale).round().clamp(-8, 7)
    plain = ((groups / scale + zero).round().clamp(-8, 7) - zero) * scale
    parts = {"weight_scale": scale[..., 0], "weight_zero_point": zero[..., 0].to(torch.int8)}
    return parts, plain.view_as(weight)


def fp8(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight_scale": scale}, (weight / scale).to(torch.float8_e4m3fn).float() * scale


def fp4(weight, group):
    """4-bit floats: of NVIDIA with fp8 scales and one scale for all, of MX with powers of two."""
    groups = weight.view(len(weight), -1, group)
    scale = groups.abs().amax(-1, keepdim=True) / 6
    parts, shared = {}, torch.ones(1)
    if group == 32:
        scale = 2.0 ** scale.log2().ceil()
    else:
        shared = 448 * 6 / weight.abs().amax().view(1)
        parts["weight_global_scale"] = shared
        scale = (scale * shared).to(torch.float8_e4m3fn).float()
    step = scale / shared
    near = ((groups.abs() / step)[..., None] - FP4).abs().argmin(-1)
    return parts | {"weight_scale": scale[..., 0]}, (FP4[near] * groups.sign() * step).view_as(weight)


FORMATS = {
    "pack-quantized": (lambda w: integers(w, 4, GROUP), {"num_bits": 4, "group_size": GROUP}),
    "pack-quantized, asymmetric": (
        shifted_integers,
        {"num_bits": 4, "group_size": GROUP, "symmetric": False},
    ),
    "int-quantized": (lambda w: integers(w, 8), {"num_bits": 8, "strategy": "channel"}),
    "naive-quantized": (lambda w: integers(w, 8), {"num_bits": 8, "strategy": "channel"}),
    "float-quantized": (fp8, {"num_bits": 8, "strategy": "channel", "type": "float"}),
    "nvfp4-pack-quantized": (
        lambda w: fp4(w, 16),
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4-pack-quantized": (lambda w: fp4(w, 32), {"num_bits": 4, "type": "float", "group_size": 32}),
}


def compressed(folder, kind, name="llama", dtype=torch.float32):
    """Save a random model in a format; returns the directory of the model with the dequantized weights."""
    quantize, arguments = FORMATS[kind]
    form = kind.partition(",")[0]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments), format=form)
    compressor = BaseCompressor.get_value_from_registry(form)
    plain = folder.parent / "plain"
    make_model(name, dtype, **{"mlp_bias": False} if name == "llama" else {}).save_pretrained(plain)
    shutil.copytree(plain, folder)
    dequantized, stored = load_file(plain / "model.safetensors"), {}
    for key, tensor in list(dequantized.items()):
        if "proj" not in key:
            stored[key] = tensor
            continue
        parts, values = quantize(tensor.float())
        parts = compressor.compress({"weight": values, **parts}, scheme)  # its rounding has no say
        stored |= {key.replace("weight", part): tensor for part, tensor in parts.items()}
        stored[key.replace("weight", "input_scale")] = torch.ones(1)
        dequantized[key] = values.to(dtype)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(dequantized, plain / "model.safetensors", {"format": "pt"})
    described = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=form,
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    change_config(folder, quantization_config=json.loads(described.model_dump_json()))
    return plain


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(FORMATS))
def test_every_format_is_dequantized(kind, dtype, tmp_path):
    plain = compressed(tmp_path / "model", kind, dtype=dtype)
    (tmp_path / "written").mkdir()
    open_quantized(tmp_path / "model").write(tmp_path / "written")
    got, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "written", plain))
    assert got.keys() == expected.keys()
    tolerance = 1e-2 if "nvfp4" in kind else 1e-5 if dtype == torch.float32 else 4e-3
    for name, tensor in expected.items():
        assert got[name].dtype == dtype
        assert relative_error(got[name].float(), tensor.float()) < tolerance, name


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "pack-quantized"), ("qwen3_moe", "pack-quantized"), ("llama", "int-quantized")],
)
@torch.no_grad()
def test_a_compressed_model_is_streamed(name, kind, tmp_path):
    plain = compressed(tmp_path / "model", kind, name)
    reorder(tmp_path / "model", tmp_path / "out", CALIBRATION, SMALL)
    got = load(tmp_path / "out")(token_ids()).logits
    assert relative_error(got, AutoModelForCausalLM.from_pretrained(plain)(token_ids()).logits) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transform_config": {"config_groups": {"R1": {}}}}, "`transform_config` .* must be empty"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"`sparsity_config\.format` .* must be dense"),
        ({"config_groups": {}}, "one of `config_groups` must match .*, but 0 do"),
        ({"format": "marlin-24"}, "must be stored as pack-quantized, .*, but is as marlin-24"),
    ],
)
def test_what_cannot_be_dequantized_is_refused(changes, message, tmp_path):
    compressed(tmp_path / "model", "pack-quantized")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["format"] = None
    change_config(tmp_path / "model", quantization_config=config | changes)
    with pytest.raises(ValueError, match=message):
        open_quantized(tmp_path / "model")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    compressed(tmp_path / "model", "pack-quantized")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package compressed-tensors: pip install"):
        open_quantized(tmp_path / "model")
