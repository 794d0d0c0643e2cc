"""Encoder-decoders: both stacks of layers stream, and compute what the stock model computes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from ripple_loader import RippleConfig, attach, reorder
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.model.streaming import StreamingMLP
from ripple_loader.offline.verification import verify
from tests.ripple.conftest import CALIBRATION, SMALL, relative_error, token_ids

IDS = {"vocab_size": 120, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
T5 = IDS | {"d_model": 32, "d_kv": 8, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
BART = IDS | {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
    "forced_eos_token_id": None,
}
MODELS = {
    "t5": T5 | {"model_type": "t5"},
    "t5 v1.1": T5 | {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": T5 | {"model_type": "mt5"},
    "umt5": T5 | {"model_type": "umt5"},
    "bart": BART | {"model_type": "bart"},
    "led": {key: value for key, value in BART.items() if key != "max_position_embeddings"}
    | {
        "model_type": "led",
        "max_encoder_position_embeddings": 128,
        "max_decoder_position_embeddings": 128,
        "attention_window": 8,
    },
    "mbart": BART | {"model_type": "mbart"},
    "marian": BART | {"model_type": "marian", "activation_function": "swish"},
    "m2m_100": BART | {"model_type": "m2m_100", "activation_function": "relu"},
    "pegasus": BART | {"model_type": "pegasus", "activation_function": "relu"},
    "blenderbot": BART | {"model_type": "blenderbot"},
}
SIZES = {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
GEMMA = IDS | SIZES | {"hidden_size": 32}
FURTHER = {
    "bigbird_pegasus": BART | {"attention_type": "original_full"},
    "blenderbot-small": BART,
    "mvp": BART,
    "pegasus_x": BART | {"block_size": 8, "num_global_tokens": 4},
    "plbart": BART,
    "longt5": T5 | {"local_radius": 8},
    "t5gemma": {
        "encoder": GEMMA | {"num_hidden_layers": 3},
        "decoder": GEMMA | {"num_hidden_layers": 2, "cross_attention_hidden_size": 32},
        "vocab_size": 120,
    },
    "prophetnet": IDS
    | {
        "hidden_size": 32,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "num_encoder_layers": 3,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "max_position_embeddings": 128,
    },
}
EXACT = ("t5", "m2m_100", "pegasus")
SOURCE, TARGET = token_ids(12, 2), token_ids(7, 2, seed=1)


def save(name, folder, **changes):
    torch.manual_seed(0)
    chosen = MODELS[name] if name in MODELS else {"model_type": name} | FURTHER[name]
    config = AutoConfig.for_model(**chosen | changes)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if parameter.dim() >= 2 or key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in key or "shared" in key else 0.2)
    model.save_pretrained(folder)
    return folder


def streamed(folder, **options):
    config = RippleConfig(**{"dram_budget": "4MiB", "strategy": "sparse"} | options)
    return AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=config)


def logits(model):
    with torch.no_grad():
        return model(input_ids=SOURCE, decoder_input_ids=TARGET).logits


@pytest.mark.parametrize("name", MODELS)
def test_both_stacks_stream(name, tmp_path):
    folder, out = save(name, tmp_path / "model"), tmp_path / "out"
    reorder(folder, out, CALIBRATION, SMALL)
    assert Sidecar(out).header.layers == 5
    assert Sidecar(out).header.exact_zeros == (name in EXACT)
    stock, model = AutoModelForSeq2SeqLM.from_pretrained(folder), streamed(out)
    assert sum(isinstance(module, StreamingMLP) for module in model.modules()) == 5
    assert relative_error(logits(model), logits(stock)) < 1e-5
    for options in ({}, {"num_beams": 3}):
        wanted = stock.generate(SOURCE, max_new_tokens=8, do_sample=False, **options)
        assert torch.equal(model.generate(SOURCE, max_new_tokens=8, do_sample=False, **options), wanted)
    attach(stock, RippleConfig(dram_budget="4MiB"), out)
    assert relative_error(logits(stock), logits(model)) < 1e-5


@pytest.mark.parametrize("name", FURTHER)
def test_further_families(name, tmp_path):
    folder, out = save(name, tmp_path / "model"), tmp_path / "out"
    reorder(folder, out, CALIBRATION, SMALL)
    assert Sidecar(out).header.layers == 5
    stock = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert relative_error(logits(streamed(out)), logits(stock)) < 1e-5


@pytest.mark.parametrize("name", EXACT)
def test_a_relu_reads_active_neurons_only(name, tmp_path):
    reorder(save(name, tmp_path / "model"), tmp_path / "out", CALIBRATION, SMALL)
    model = streamed(tmp_path / "out")
    model.generate(SOURCE[:1], max_new_tokens=8, min_new_tokens=8, do_sample=False)
    report = model.ripple_report
    assert report.calls == 9
    assert report.layer_calls == 3 + 8 * 2
    assert 0 < report.active < 0.9 * report.layer_calls * report.neurons


@pytest.mark.parametrize("name", ["t5 v1.1", "bart"])
def test_a_copy_is_verified_and_saved_whole(name, tmp_path):
    folder, out = save(name, tmp_path / "model"), tmp_path / "out"
    reorder(folder, out, CALIBRATION, SMALL)
    assert [check for check, _ in verify(out, folder)][-1] == "streamed logits"
    streamed(out).save_pretrained(tmp_path / "saved")
    stock = AutoModelForSeq2SeqLM.from_pretrained(folder)
    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    assert relative_error(logits(saved), logits(stock)) < 1e-5


def test_half_precision_keeps_what_t5_keeps_in_float32(tmp_path):
    """T5 overflows float16 where its output weights are not kept in float32."""
    folder, out = save("t5", tmp_path / "model"), tmp_path / "out"
    stock = AutoModelForSeq2SeqLM.from_pretrained(folder)
    for block in [*stock.encoder.block, *stock.decoder.block]:
        block.layer[-1].DenseReluDense.wo.weight.data *= 30000
    stock.save_pretrained(folder)
    reorder(folder, out, CALIBRATION, SMALL)
    half = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float16)
    config = RippleConfig(dram_budget="4MiB")
    model = AutoModelForSeq2SeqLM.from_pretrained(out, dtype=torch.float16, quantization_config=config)
    assert relative_error(logits(model), logits(half)) < 1e-2


def test_a_decoder_of_an_encoder_decoder_is_a_causal_model(tmp_path):
    from transformers import BartForCausalLM

    from tests.ripple.conftest import load

    model = BartForCausalLM(AutoConfig.for_model(**MODELS["bart"]))
    model.save_pretrained(tmp_path / "model")
    reorder(tmp_path / "model", tmp_path / "out", CALIBRATION, SMALL)
    assert Sidecar(tmp_path / "out").header.layers == 2
    with torch.no_grad():
        error = relative_error(load(tmp_path / "out")(TARGET).logits, model.eval()(TARGET).logits)
    assert error < 1e-5


@pytest.mark.parametrize("model_type", ["switch_transformers", "fsmt"])
def test_other_encoder_decoders_are_refused(model_type, tmp_path):
    config = AutoConfig.for_model(model_type, **(T5 if "switch" in model_type else BART))
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    from ripple_loader.model.probe import probe

    with pytest.raises(ValueError, match="it cannot stream this architecture"):
        probe(model)
