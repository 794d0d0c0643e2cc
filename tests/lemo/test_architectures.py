from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lemo_trainer import apply_lemo
from lemo_trainer.layers.probe import is_wiring_of
from lemo_trainer.model.architectures import ARCHITECTURES, find_causal_lm
from lemo_trainer.model.calls import idle_layers

from .tiny import (
    DROPOUTS,
    EXPERTS,
    KINDS,
    MODES,
    SLIDING,
    assert_same_step,
    batch,
    checkpointing,
    leaving_out,
    lora,
    loss_and_gradients,
    tiny_model,
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_repeats_each_layer_with_all_its_dropouts(kind):
    model = tiny_model(kind, **dict.fromkeys(DROPOUTS, 0.3))
    layers = find_causal_lm(model).layers
    with torch.no_grad(), idle_layers(layers) as calls:
        model(input_ids=torch.arange(1, 9).expand(2, -1), use_cache=False)
    for layer, (_, arguments) in zip(layers, calls, strict=True):
        architecture = ARCHITECTURES[kind.split()[-1]]
        assert not architecture.missing_from(layer)
        with torch.no_grad():
            assert is_wiring_of(architecture, layer, torch.randn(2, 8, 32), arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "opt", "gemma3_text", "qwen3_moe"])
def test_checkpointing_and_lora_change_no_step(kind, reentrant, mode):
    model = tiny_model(kind)
    if not reentrant:
        model = lora(model, fan_in_fan_out=kind == "gpt2")
    inputs = batch("left")
    model.enable_input_require_grads()
    apply_lemo(model, leaving_out(mode))
    wanted = loss_and_gradients(model, inputs)
    checkpointing(model if reentrant else model.get_base_model(), reentrant=reentrant)
    assert_same_step(loss_and_gradients(model, inputs), wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_shorter_than_a_block_is_dense(mode, kind):
    model = tiny_model(kind)
    inputs = batch("plain", seq_len=15)
    wanted = loss_and_gradients(model, inputs)
    report = apply_lemo(model, leaving_out(mode, block_size=16))
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    assert report.kept_share == 1.0


@pytest.mark.parametrize("mode", MODES)
def test_whole_layers_may_be_dropped_unless_one_chooses_for_all(mode):
    model = tiny_model("opt", layerdrop=0.5)
    with pytest.raises(ValueError, match=r"opt with layerdrop 0\.5"):
        apply_lemo(model, leaving_out(shared_blocks=True))
    apply_lemo(model, leaving_out(mode))
    torch.manual_seed(0)
    for seq_len in (45, 21, 33):
        model(**batch("plain", seq_len=seq_len)).loss.backward()


def on_meta(model_type):
    with torch.device("meta"):
        return tiny_model(model_type)


def unusual(model_type, implementation="eager", **options):
    settings = AutoConfig.for_model(model_type, hidden_size=32, vocab_size=16, **options)
    return AutoModelForCausalLM.from_config(settings, attn_implementation=implementation)


def flash():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    return model


def without(part):
    model = tiny_model()
    delattr(model.model.layers[0], part)
    return model


REFUSED = {
    "flash": (flash, "got 'flash_attention_2', which takes no mask of chosen tokens"),
    "meta": (lambda: on_meta("stablelm"), "knows the wiring of .*'stablelm'.*a device other than meta"),
    "no attention": (lambda: unusual("mamba", num_hidden_layers=2), "none of whose parts norm .*, mixer"),
    "own attention": (
        lambda: unusual("gpt_neo", num_layers=2, num_heads=4, attention_types=[[["global"], 2]]),
        "none of whose parts ln_1 .* calls AttentionInterface|fails when they hand",
    ),
    "tuples": (lambda: unusual("bloom", n_layer=2, n_head=4), "turn hidden states into hidden states; Bloom"),
    "other sums": (
        lambda: tiny_model("minimax", **EXPERTS, layer_types=["full_attention"] * 3),
        "whose output is not the sum of its input, self_attn and mlp",
    ),
    "own positions": (lambda: unusual("llama4_text", num_hidden_layers=1), "positions that it counts itself"),
    "encoder": (
        lambda: tiny_model("gpt2", add_cross_attention=True),
        "a causal decoder of text alone, got GPT2LMHeadModel",
    ),
    "both directions": (
        lambda: tiny_model("gemma3_text", use_bidirectional_attention=True),
        "a causal decoder, got Gemma3ForCausalLM .* in which tokens attend to later ones",
    ),
    "missing part": (
        lambda: without("post_attention_layernorm"),
        "looked for post_attention_layernorm in LlamaDecoderLayer and found self_attn .LlamaAttention",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_what_was_found(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        apply_lemo(make(), leaving_out())


def test_a_known_architecture_needs_no_weights():
    assert str(apply_lemo(on_meta("mistral"), leaving_out())) == "LeMo patched 3 of 3 layers"


def test_each_layer_gets_its_own_window_and_rotation():
    assert SLIDING["layer_types"].count("full_attention") == 1
    model = tiny_model("gemma3_text")
    with torch.no_grad(), idle_layers(model.model.layers) as calls:
        model(**batch("plain"))
    masks = [arguments["attention_mask"] for _, arguments in calls]
    cosines = [arguments["position_embeddings"][0] for _, arguments in calls]
    assert masks[0] is not None
    assert masks[2] is None
    assert not torch.equal(cosines[0], cosines[2])
