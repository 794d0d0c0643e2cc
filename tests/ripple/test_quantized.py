"""Quantized checkpoints: dequantized one tensor at a time by `reorder`, or refused by name."""

import json
import shutil
import weakref

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GgufConfig

from ripple_loader import ReorderConfig, reorder
from ripple_loader.checkpoint import quantization
from ripple_loader.checkpoint.source import open_source
from ripple_loader.compat import fp8_values
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.offline.verification import verify
from tests.ripple.conftest import CALIBRATION, SMALL, load, make_model, relative_error, token_ids

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def quantize(tensor, size=32):
    """A weight in fp8 and the scale of each block of `size` by `size`."""
    rows, columns = tensor.shape
    blocks = tensor.float().view(rows // size, size, columns // size, size)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    return (blocks / scale).view(rows, columns).to(torch.float8_e4m3fn), scale[:, 0, :, 0].contiguous()


def fp8(folder, name="llama", dtype=torch.float32, files=1):
    """A random model whose projections are in fp8, its scales in another file if there are several."""
    extra = {"mlp_bias": False} if name == "llama" else {"moe_intermediate_size": 64}
    model = make_model(name, dtype, **SIZES | extra)
    model.save_pretrained(folder)
    tensors, scales = {}, {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if "proj" in key:
            tensors[key], scales[f"{key}_scale_inv"] = quantize(tensor)
        else:
            tensors[key] = tensor.clone()
    (folder / "model.safetensors").unlink()
    if files == 1:
        save_file(tensors | scales, folder / "model.safetensors", {"format": "pt"})
    else:
        parts = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": scales}
        for file, part in parts.items():
            save_file(part, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {key: file for file, part in parts.items() for key in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def check(out, stock, tolerance=1e-5):
    """The copy is the dequantized stock model: streamed, and for everyone else."""
    wanted = stock(token_ids()).logits
    assert relative_error(load(out)(token_ids()).logits, wanted) < tolerance
    assert relative_error(AutoModelForCausalLM.from_pretrained(out)(token_ids()).logits, wanted) < tolerance


@pytest.mark.parametrize(
    ("name", "dtype", "files", "tolerance"),
    [
        ("llama", torch.float32, 1, 1e-5),
        ("llama", torch.bfloat16, 2, 5e-2),
        ("qwen3_moe", torch.float32, 2, 1e-5),
    ],
)
def test_fp8_in_blocks_is_dequantized(name, dtype, files, tolerance, tmp_path):
    folder = fp8(tmp_path / "fp8", name, dtype, files)
    reorder(folder, tmp_path / "out", CALIBRATION, SMALL)
    config = FineGrainedFP8Config(dequantize=True)
    check(
        tmp_path / "out",
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config),
        tolerance,
    )
    assert [name for name, _ in verify(tmp_path / "out", folder)][-1] == "streamed logits"
    assert not list(tmp_path.glob(".*")), "the dequantized files are removed"


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    folder, alive, most = fp8(tmp_path / "fp8"), [], []

    def counted(quantized, scales):
        values = fp8_values(quantized, scales)
        alive.append(weakref.ref(values))
        most.append(sum(one() is not None for one in alive))
        return values

    monkeypatch.setattr(quantization, "fp8_values", counted)
    reorder(folder, tmp_path / "out", CALIBRATION, SMALL)
    assert len(most) == 14
    assert max(most) <= 2, "the last one and this one"


def test_bundles_have_an_encoding_of_their_own(tmp_path):
    reorder(
        fp8(tmp_path / "fp8"),
        tmp_path / "out",
        CALIBRATION,
        ReorderConfig(tokens=256, sequence_length=64, bundles="int8"),
    )
    assert load(tmp_path / "out")(token_ids()).logits.isfinite().all()
    assert Sidecar(tmp_path / "out").header.bundle_bytes < 3 * 64 * 4 / 2


def test_an_fp8_tensor_without_scales_is_refused(tmp_path):
    folder = fp8(tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold the scales of model\.layers\.1\.mlp\.up_proj\.weight"):
        reorder(folder, tmp_path / "out", CALIBRATION, SMALL)


def test_the_sidecar_alone_needs_plain_weights(tmp_path):
    config = ReorderConfig(tokens=256, sequence_length=64, sidecar_only=True)
    with pytest.raises(ValueError, match=r"`sidecar_only` .* is quantized: leave it out"):
        reorder(fp8(tmp_path / "fp8"), tmp_path / "out", CALIBRATION, config)


@pytest.mark.parametrize("method", ["mxfp4", "quanto", "torchao"])
def test_other_quantized_checkpoints_are_refused_by_their_method(method, saved, tmp_path):
    shutil.copytree(saved("llama"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    quantization = {"quantization_config": {"quant_method": method}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantization))
    with pytest.raises(ValueError, match=rf"is quantized with {method}: .*"):
        reorder(tmp_path / "model", tmp_path / "out", CALIBRATION, SMALL)


def test_other_commands_name_the_way_out_of_fp8(tmp_path):
    with pytest.raises(ValueError, match=r"`ripple reorder` and `ripple verify` dequantize it"):
        open_source(fp8(tmp_path / "fp8"))


def write_gguf(path, kind):
    """A random Llama as llama.cpp would write it."""
    model = make_model("llama", **SIZES | {"mlp_bias": False, "num_hidden_layers": 2})
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(2)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, tensor in model.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight",))
        array = tensor.numpy()
        if array.ndim == 2 and kind is not gguf.GGMLQuantizationType.F32:
            blocks = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.filterwarnings("ignore:.* has no tokenizer that transformers can read:UserWarning")
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_gguf_file_is_dequantized(kind, given, tmp_path):
    (tmp_path / "model").mkdir()
    file = write_gguf(tmp_path / "model" / "tiny.gguf", gguf.GGMLQuantizationType[kind])
    with pytest.warns(UserWarning, match="has no tokenizer that transformers can read"):
        reorder(file if given == "file" else file.parent, tmp_path / "out", CALIBRATION, SMALL)
    stock = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    check(tmp_path / "out", stock)
    assert [name for name, _ in verify(tmp_path / "out", file)][-1] == "streamed logits"


def test_a_damaged_gguf_file_is_refused_before_anything_is_written(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.F32)
    for number, content in enumerate((file.read_bytes()[:-5000], b"GGUF" + bytes(20), b"")):
        (tmp_path / f"{number}.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{number}\.gguf must be a whole GGUF file"):
            reorder(tmp_path / f"{number}.gguf", tmp_path / "out", CALIBRATION, SMALL)
    with pytest.raises(FileNotFoundError, match=r"none\.gguf must be a GGUF file, but does not exist"):
        reorder(tmp_path / "none.gguf", tmp_path / "out", CALIBRATION, SMALL)
    assert not list(tmp_path.glob(".*"))


def test_one_of_several_gguf_files_must_be_given(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"but holds a\.gguf, b\.gguf: give the path"):
        reorder(tmp_path, tmp_path / "out", CALIBRATION, SMALL)


def test_other_commands_refuse_a_gguf_file(tmp_path):
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ValueError, match="GGUF file: `ripple reorder` and `ripple verify` dequantize it"):
        open_source(tmp_path)
