"""Checkpoints of GPTQ, AWQ and bitsandbytes, dequantized by `reorder`; packed here as their writers pack."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ripple_loader import reorder
from ripple_loader.checkpoint.dequantizing import open_quantized
from ripple_loader.offline.verification import verify
from tests.ripple.conftest import CALIBRATION, SMALL, load, make_model, relative_error, token_ids

INPUTS_A_GROUP = 16
AWQ_WORD = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each of a word's eight fields, lowest bits first


def words(numbers, bits):
    """Columns of numbers as columns of int32, by Python's own integers."""
    columns = []
    for column in numbers.T.tolist():
        packed = sum(number << bits * at for at, number in enumerate(column))
        columns.append(np.frombuffer(packed.to_bytes(len(column) * bits // 8, "little"), np.int32))
    return torch.from_numpy(np.stack(columns, 1))


def rounded(weight, bits, group, symmetric):
    """A weight (O, I) in integers, and the zero points and scales (G, O) of the groups of its inputs."""
    count = int(group.max()) + 1
    low, high = (
        torch.stack([getattr(weight[:, group == g], name)(1).values for g in range(count)])
        for name in ("min", "max")
    )
    scales = ((high - low) / (2**bits - 1)).half()
    middle = torch.full_like(low, 2 ** (bits - 1))
    zeros = (middle if symmetric else (-low / scales.float()).round().clamp(1, 2**bits - 1)).int()
    numbers = (weight / scales.float()[group].T).round() + zeros[group].T
    return numbers.clamp(0, 2**bits - 1).int(), zeros, scales


def dequantized(numbers, zeros, scales, group):
    return (numbers - zeros[group].T) * scales.float()[group].T


def gptq(weight, bits=4, act_order=False, v1=True, symmetric=False):
    """The tensors of a linear as GPTQModel and AutoGPTQ write them, and its dequantized weight."""
    group = torch.arange(weight.shape[1]) // INPUTS_A_GROUP
    group = group.flip(0).roll(5) if act_order else group
    numbers, zeros, scales = rounded(weight, bits, group, symmetric)
    tensors = {
        "qweight": words(numbers.T, bits),
        "qzeros": words((zeros - 1 if v1 else zeros).T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": group.int(),
    }
    return tensors, dequantized(numbers, zeros, scales, group)


def awq(weight):
    """The tensors of a linear as AutoAWQ writes them in its form "gemm", and its dequantized weight."""
    group = torch.arange(weight.shape[1]) // INPUTS_A_GROUP
    numbers, zeros, scales = rounded(weight, 4, group, symmetric=False)

    def packed(rows):
        fields = rows.T.reshape(-1, 8, len(rows))[:, AWQ_WORD].flatten(0, 1)
        return words(fields, 4).T.contiguous()

    tensors = {"qweight": packed(numbers.T), "qzeros": packed(zeros), "scales": scales}
    return tensors, dequantized(numbers, zeros, scales, group)


def quantized(folder, write, config, name="llama", dtype=torch.float32, bias=False, **options):
    """Save a random model with quantized projections; returns the model with their dequantized weights."""
    extra = {"mlp_bias": False, "num_key_value_heads": 4} if name == "llama" else {}
    model = make_model(name, dtype, **extra)
    model.save_pretrained(folder)
    tensors, modules = {}, dict(model.named_modules())
    for key, tensor in load_file(folder / "model.safetensors").items():
        linear = key.removesuffix(".weight")
        module = modules.get(linear, modules.get(f"{model.base_model_prefix}.{linear}"))
        if tensor.dim() != 2 or "emb" in key or "lm_head" in key or "wte" in key or "wpe" in key:
            tensors[key] = tensor.clone()
            continue
        turned = isinstance(module, torch.nn.Linear)
        parts, plain = write(tensor.float() if turned else tensor.float().T, **options)
        tensors |= {f"{linear}.{part}": values for part, values in parts.items()}
        if bias:
            tensors[f"{linear}.bias"] = torch.zeros(len(plain))
        module.weight.data = (plain if turned else plain.T).to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return model


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": INPUTS_A_GROUP, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": INPUTS_A_GROUP, "version": "gemm", "zero_point": True}


def written(folder, out):
    """The tensors of the dequantized checkpoint."""
    out.mkdir()
    open_quantized(folder).write(out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("write", "config", "options"),
    [
        (gptq, GPTQ, {}),
        (gptq, GPTQ | {"desc_act": True}, {"act_order": True, "bias": True}),
        (gptq, GPTQ | {"bits": 3, "checkpoint_format": "gptq_v2"}, {"bits": 3, "v1": False}),
        (gptq, GPTQ | {"bits": 2, "checkpoint_format": "gptq"}, {"bits": 2}),
        (gptq, GPTQ | {"bits": 8}, {"bits": 8, "symmetric": True, "dtype": torch.float16}),
        (gptq, GPTQ, {"name": "gpt2"}),
        (awq, AWQ, {"dtype": torch.bfloat16}),
    ],
)
def test_packed_integers_are_dequantized(write, config, options, tmp_path):
    model = quantized(tmp_path / "model", write, config, **options)
    model.save_pretrained(tmp_path / "plain")
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    got = written(tmp_path / "model", tmp_path / "written")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(("write", "config"), [(gptq, GPTQ), (awq, AWQ)])
@torch.no_grad()
def test_packed_integers_are_streamed(write, config, tmp_path):
    model = quantized(tmp_path / "model", write, config)
    reorder(tmp_path / "model", tmp_path / "out", CALIBRATION, SMALL)
    wanted = model(token_ids()).logits
    assert relative_error(load(tmp_path / "out")(token_ids()).logits, wanted) < 1e-5
    assert [name for name, _ in verify(tmp_path / "out", tmp_path / "model")][-1] == "streamed logits"


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
        {"load_in_8bit": True},
    ],
)
@torch.no_grad()
def test_bitsandbytes_is_dequantized(options, tmp_path):
    """The checkpoint is written by transformers, and the reference dequantized by it."""
    base = make_model("llama", hidden_size=64, intermediate_size=128, mlp_bias=False)
    base.save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(**options)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    stock.save_pretrained(tmp_path / "model")
    reorder(tmp_path / "model", tmp_path / "out", CALIBRATION, SMALL)
    wanted = stock.dequantize(torch.float32)(token_ids()).logits
    assert relative_error(load(tmp_path / "out")(token_ids()).logits, wanted) < 1e-5


@pytest.mark.parametrize(
    ("write", "config", "change", "message"),
    [
        (
            gptq,
            GPTQ | {"checkpoint_format": "marlin"},
            {},
            "`checkpoint_format` .* must be gptq or gptq_v2, got",
        ),
        (gptq, GPTQ | {"bits": 8}, {}, r"must be packed in 8 bits, but its qweight is \(12, 32\)"),
        (gptq, GPTQ | {"desc_act": True}, {"g_idx": None}, "must hold .*g_idx, but does not"),
        (gptq, GPTQ, {"scales": None}, "must hold .*scales, but does not"),
        (gptq, GPTQ, {"qweight": None}, "must hold one weight that is dequantized with .*, but holds 0"),
        (gptq, GPTQ, {"bias": torch.ones(32)}, "bias must be zero, because the model has no such bias"),
        (gptq, GPTQ, {"weight": torch.ones(32, 32)}, "must hold .*weight quantized or plain, but holds both"),
        (awq, AWQ | {"version": "gemv"}, {}, "`version` .* must be gemm, got gemv"),
        (awq, AWQ | {"zero_point": False}, {}, "`zero_point` .* must be True, got False"),
        (awq, AWQ, {"qzeros": None}, "must hold .*qzeros, but does not"),
    ],
)
def test_what_cannot_be_dequantized_is_refused(write, config, change, message, tmp_path):
    quantized(tmp_path / "model", write, config)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file) | {f"model.layers.0.self_attn.q_proj.{k}": v for k, v in change.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        open_quantized(tmp_path / "model")


def test_a_zero_point_that_programs_read_differently_is_refused(tmp_path):
    quantized(tmp_path / "model", gptq, GPTQ)
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.0.mlp.up_proj.qzeros"
    tensors = load_file(file)
    save_file(tensors | {name: torch.full_like(tensors[name], -1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj\.weight cannot be dequantized: a zero point of 16"):
        reorder(tmp_path / "model", tmp_path / "out", CALIBRATION, SMALL)
    assert not (tmp_path / "out").exists()


def test_scales_of_an_activation_are_refused(tmp_path):
    """AWQ divides the inputs of some models' second linear by such scales, so its weight alone is another."""
    quantized(tmp_path / "model", awq, AWQ)
    file = tmp_path / "model" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.mlp.act_fn.scales": torch.ones(96)}, file)
    with pytest.raises(
        ValueError, match=r"dequantized with model\.layers\.0\.mlp\.act_fn\.scales, but holds 0"
    ):
        open_quantized(tmp_path / "model")
