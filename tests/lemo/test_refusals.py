"""What LeMo cannot serve is refused by its name, with the way out."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from lemo_trainer import LemoConfig, apply_lemo
from lemo_trainer.compat import set_attention_implementation

from .tiny import EVERY_MODE, VOCAB, batch, lora, loss_and_gradients, tiny_model

modes = pytest.mark.parametrize("mode", EVERY_MODE)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def bert(head):
    config = AutoConfig.for_model("bert", vocab_size=VOCAB, **SIZES)
    return head.from_config(config).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keepratio": 0.5}, "no option 'keepratio'; the closest are keep_ratio"),
        ({"segment_tokens": 64}, '`segment_tokens` must be left out with mode="detach"'),
        ({"mode": "eliminate", "segment_tokens": 64}, "`segment_tokens` must be left out"),
        ({"mode": "segments", "block_size": 8}, '`block_size` must be left out with mode="segments"'),
        ({"mode": "segments", "sink_blocks": 2}, "`sink_blocks` must be left out"),
        ({"mode": "segments", "causal_scores": True}, "`causal_scores` must be left out"),
        (
            {"mode": "detach", "mlp_score_tokens": 2},
            r"`mlp_score_tokens` must .*\(eliminate does\)",
        ),
        ({"mode": "exact", "block_size": 8}, '`block_size` must be left out with mode="exact"'),
    ],
)
def test_options_of_another_mode_and_misspelt_ones(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LemoConfig(**{"mode": "detach", **options})


def test_options_without_names():
    with pytest.raises(TypeError, match=r'options by name, such as LemoConfig\(mode="segments"\), got \'seg'):
        LemoConfig("segments")


@pytest.mark.parametrize("config", [{"mode": "detach"}, "detach", None])
def test_no_config(config):
    with pytest.raises(TypeError, match="takes a LemoConfig"):
        apply_lemo(tiny_model(), config)


@pytest.mark.parametrize("mode", ["detach", "eliminate"])
def test_a_model_of_two_layers(mode):
    model = tiny_model(layers=2) if mode == "detach" else tiny_model(layers=1)
    with pytest.raises(ValueError, match='`layers` must be "all" for a model of'):
        apply_lemo(model, LemoConfig(mode=mode))
    apply_lemo(model, LemoConfig(mode=mode, layers="all"))


@modes
@pytest.mark.parametrize("head", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_an_encoder(mode, head):
    with pytest.raises(ValueError, match=r"bert'.*an encoder.*without LeMo"):
        apply_lemo(bert(head), LemoConfig(mode=mode))


@modes
def test_an_encoder_decoder(mode):
    config = AutoConfig.for_model(
        "t5", vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    with pytest.raises(ValueError, match="encoder-decoder: train it without LeMo"):
        apply_lemo(AutoModelForSeq2SeqLM.from_config(config), LemoConfig(mode=mode))


@modes
def test_a_vision_language_model(mode):
    model = tiny_model()
    model.config.get_text_config = lambda: tiny_model().config
    with pytest.raises(ValueError, match="more than text: train it without LeMo, or load its language model"):
        apply_lemo(model, LemoConfig(mode=mode))


@pytest.mark.parametrize("mode", ["detach", "eliminate", "exact"])
def test_flash_attention(mode):
    model = tiny_model()
    set_attention_implementation(model.config, "flash_attention_2")
    why = "does not run a segment at a time" if mode == "exact" else "takes no mask of chosen tokens"
    with pytest.raises(ValueError, match=f'mode="{mode}" works with .*flash_attention_2.*{why}.*sdpa'):
        apply_lemo(model, LemoConfig(mode=mode))


def test_segments_take_any_attention_that_a_cache_serves():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("my_attention", sdpa_attention_forward)
    AttentionMaskInterface.register("my_attention", sdpa_mask)
    model, inputs = tiny_model(), batch("plain")
    apply_lemo(model, LemoConfig(mode="segments", segment_tokens=16))
    wanted = loss_and_gradients(model, inputs)
    model = tiny_model()
    set_attention_implementation(model.config, "my_attention")
    apply_lemo(model, LemoConfig(mode="segments", segment_tokens=16))
    assert torch.equal(loss_and_gradients(model, inputs)[0], wanted[0])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft 0.21
@modes
def test_adaption_prompt(mode):
    from peft import AdaptionPromptConfig, get_peft_model

    adapter = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2)
    model = get_peft_model(tiny_model(), adapter)
    with pytest.raises(ValueError, match="PEFT's adaption prompt"):
        apply_lemo(model, LemoConfig(mode=mode))


@modes
def test_a_gradient_penalty(mode):
    by_blocks = mode in ("detach", "eliminate")
    small = {"block_size": 4, "layers": "all"} if by_blocks else {"segment_tokens": 16}
    model, inputs = tiny_model(), batch("plain")
    apply_lemo(model, LemoConfig(mode=mode, **small))
    loss = model(**inputs).loss
    with pytest.raises((RuntimeError, ValueError), match="create_graph=True"):
        loss.backward(create_graph=True)


@pytest.mark.parametrize("option", [{"mode": "segments"}, {"mode": "detach", "label_weights": "kept"}])
def test_modes_of_the_loss_need_a_language_model_head(option):
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, num_labels=1, pad_token_id=0, **SIZES)
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has not"):
        apply_lemo(model, LemoConfig(**option))


@pytest.mark.parametrize("mode", ["detach", "eliminate"])
def test_alora_with_an_mlp_in_segments(mode):
    model = lora(tiny_model(), alora_invocation_tokens=[5, 6], target_modules="all-linear")
    inputs = batch("plain")
    inputs["input_ids"][:, 20:22] = torch.tensor([5, 6])
    apply_lemo(model, LemoConfig(mode=mode, block_size=4, layers="all", mlp_segment=8))
    with pytest.raises(ValueError, match="`mlp_segment` must be 0 with PEFT's aLoRA"):
        model(**inputs)
