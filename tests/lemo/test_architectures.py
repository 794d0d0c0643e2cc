from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lemo_trainer import LemoConfig, apply_lemo, remove_lemo
from lemo_trainer.architectures import ARCHITECTURES, find_causal_lm
from lemo_trainer.probe import idle_layers, is_wiring_of

from .tiny import (
    DROPOUTS,
    EXPERTS,
    KINDS,
    SLIDING,
    assert_same_step,
    batch,
    checkpointing,
    lora,
    loss_and_gradients,
    tiny_model,
)

MODES = ("detach", "eliminate")


def config(mode="detach", **options):
    return LemoConfig(**{"mode": mode, "keep_ratio": 0.4, "block_size": 4, "layers": "all", **options})


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
    model = tiny_model(kind) if reentrant else lora(tiny_model(kind))
    inputs = batch("left")
    model.enable_input_require_grads()
    apply_lemo(model, config(mode))
    wanted = loss_and_gradients(model, inputs)
    checkpointing(model if reentrant else model.get_base_model(), reentrant=reentrant)
    assert_same_step(loss_and_gradients(model, inputs), wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_shorter_than_a_block_is_dense(mode, kind):
    model = tiny_model(kind)
    inputs = batch("plain", seq_len=15)
    wanted = loss_and_gradients(model, inputs)
    report = apply_lemo(model, config(mode, block_size=16))
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    assert report.kept_share == 1.0


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers' own call
@pytest.mark.parametrize(("kind", "mode"), [("mistral", "eliminate"), ("gemma2", "detach")])
def test_flex_attention_takes_the_step_of_the_others(kind, mode):
    model = tiny_model(kind)
    inputs = batch("left")
    apply_lemo(model, config(mode))
    wanted = loss_and_gradients(model, inputs)
    model = tiny_model(kind, implementation="flex_attention")
    apply_lemo(model, config(mode))
    with torch.compiler.set_stance("force_eager"):  # or the mask is compiled
        assert_same_step(loss_and_gradients(model, inputs), wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "olmoe"])
def test_router_losses_come_from_all_tokens(kind, mode):
    model = tiny_model(kind, output_router_logits=True, router_aux_loss_coef=3.0)
    inputs = batch("left")
    wanted = loss_and_gradients(model, inputs)
    report = apply_lemo(model, config(keep_ratio=1.0))
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    remove_lemo(model)
    report = apply_lemo(model, config(mode))
    assert report.wiring.dense_mlps == ((0, 2) if kind == "qwen2_moe" else (0, 1, 2))
    assert "works on all tokens (mixture of experts)" in str(report)
    output = model(**inputs)
    assert all(len(logits) == 2 * 45 for logits in output.router_logits)
    if mode == "detach":
        torch.testing.assert_close(output.loss, wanted[0])


@pytest.mark.parametrize("mode", MODES)
def test_whole_layers_may_be_dropped_unless_one_chooses_for_all(mode):
    model = tiny_model("opt", layerdrop=0.5)
    with pytest.raises(ValueError, match=r"opt with layerdrop 0\.5"):
        apply_lemo(model, config(shared_blocks=True))
    apply_lemo(model, config(mode))
    torch.manual_seed(0)
    for seq_len in (45, 21, 33):
        model(**batch("plain", seq_len=seq_len)).loss.backward()


PROBED = {
    "stablelm": {"use_parallel_residual": True},
    "glm4": {},
    "biogpt": {"hidden_dropout_prob": 0.3},
    "bitnet": {},
    "modernbert-decoder": {},
    "granitemoe": {**EXPERTS, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    "ernie4_5_moe": EXPERTS,
    "lfm2": {"layer_types": ["conv", "full_attention", "full_attention"]},
}


@pytest.mark.parametrize("model_type", PROBED)
def test_an_unknown_layer_is_watched_and_its_forward_stays_exact(model_type):
    model = tiny_model(model_type, **PROBED[model_type])
    assert model_type not in ARCHITECTURES
    inputs = batch("left")
    report = apply_lemo(model, config(keep_ratio=1.0))
    remove_lemo(model)
    assert report.wiring.probed
    assert "found by a probe" in str(report)
    if model_type == "biogpt":  # dropout was there to be found
        assert report.wiring.architecture.after_mlp == "dropout"
        return
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, config(keep_ratio=1.0))
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    remove_lemo(model)
    for mode in MODES:
        apply_lemo(model, config(mode))
        got = loss_and_gradients(model, inputs)
        if mode == "detach":
            torch.testing.assert_close(got[0], wanted[0])
        remove_lemo(model)


def test_layers_that_are_no_attention_stay_dense_and_are_named(caplog):
    model = tiny_model("lfm2", **PROBED["lfm2"])
    conv = model.model.layers[0]
    report = apply_lemo(model, config())
    assert report.patched_layers == (1, 2)
    assert "dense are layers 0 (Lfm2DecoderLayer, none of whose parts " in str(report)
    assert "conv (Lfm2ShortConv)" in caplog.text
    assert conv._lemo_layer is None
    remove_lemo(model)
    with pytest.raises(ValueError, match=r"`layers` must name a layer that can .*got \(0,\).*Lfm2ShortConv"):
        apply_lemo(model, config(layers=(0,)))


def test_a_probe_leaves_no_trace():
    model = tiny_model("stablelm", hidden_dropout=0.3)
    model.model.layers[1].mlp.eval()
    checkpointing(model, reentrant=False)

    def state():
        return [
            (name, type(part), part.training, dict(vars(part)), len(part._forward_hooks))
            for name, part in model.named_modules()
        ]

    before, generator = state(), torch.get_rng_state()
    apply_lemo(model, config())
    assert torch.equal(torch.get_rng_state(), generator)
    remove_lemo(model)
    assert [each[:3] for each in state()] == [each[:3] for each in before]
    assert all(a[3].keys() == b[3].keys() for a, b in zip(state(), before, strict=True))
    assert all(a[3].get("config") is b[3].get("config") for a, b in zip(state(), before, strict=True))
    assert all(a[4] == b[4] for a, b in zip(state(), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


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
    "own positions": (lambda: unusual("llama4_text", num_hidden_layers=1), "counts the positions"),
    "missing part": (
        lambda: without("post_attention_layernorm"),
        "looked for post_attention_layernorm in LlamaDecoderLayer and found self_attn .LlamaAttention",
    ),
    "head": (
        lambda: tiny_model("recurrent_gemma", layers=3, attention_window_size=16),
        "must equal that of RecurrentGemmaForCausalLM.*set loss_segment=0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_what_was_found(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        apply_lemo(make(), config())


def test_a_known_architecture_needs_no_weights():
    assert str(apply_lemo(on_meta("mistral"), config())) == "LeMo patched 3 of 3 layers"


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
