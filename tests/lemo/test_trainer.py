"""What people switch on in a Trainer, with LeMo: equal to the plain Trainer where everything is kept."""

from __future__ import annotations

import dataclasses
import types
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from lemo_trainer import LemoCallback, LemoConfig, apply_lemo, remove_lemo
from lemo_trainer.compat import checkpointing_argument

from .tiny import VOCAB, assert_same_step, lora, loss_and_gradients, tiny_model
from .training import losses, samples, trainer_for, training_arguments

CHECKPOINTING = checkpointing_argument()
EVERYTHING = LemoConfig(keep_ratio=1.0, block_size=4, layers="all", loss_segment=16)
HALF = LemoConfig(keep_ratio=0.5, block_size=4, layers="all", loss_segment=16)
ALL_LOGITS = LemoConfig(keep_ratio=1.0, block_size=4, layers="all", loss_segment=0)

# peft 0.21 still reads transformers' old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def sum_of_cross_entropies(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"gradient_accumulation_steps": 2}, 1e-5),
        ({CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}, 1e-5),
        ({CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}, 1e-5),
        ({"bf16": True}, 1e-2),
        ({"label_smoothing_factor": 0.1}, 1e-5),
        ({"compute_loss_func": sum_of_cross_entropies, "gradient_accumulation_steps": 2}, 1e-5),
        ({"neftune_noise_alpha": 1.0}, 1e-5),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_keeping_everything_trains_as_without_the_callback(tmp_path, options, tolerance):
    trained = []
    for callbacks in ([], [LemoCallback(EVERYTHING)]):
        trainer = trainer_for(lora(tiny_model()), tmp_path, callbacks, **options)
        trainer.train()
        trained.append(trainer)
    plain, lemo = trained
    assert losses(lemo) == pytest.approx(losses(plain), rel=tolerance)
    torch.testing.assert_close(
        lemo.model.state_dict(), plain.model.state_dict(), rtol=tolerance, atol=10 * tolerance
    )


def test_compiling_changes_no_loss(tmp_path, caplog):
    runs = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = trainer_for(
            tiny_model(), tmp_path, [LemoCallback(HALF)], eval_strategy="steps", eval_steps=3, **options
        )
        trainer.train()
        runs.append([*losses(trainer), trainer.state.log_history[3]["eval_loss"]])
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert "training steps run eagerly" in caplog.text


@pytest.mark.parametrize(
    ("wrap", "config"),
    [
        (lambda model: model, EVERYTHING),
        (lambda model: model, LemoConfig(mode="segments", keep_ratio=1.0, loss_segment=16)),
        (lambda model: lora(model, use_dora=True), EVERYTHING),
        (lambda model: lora(model, use_rslora=True), EVERYTHING),
        (lambda model: lora(model, modules_to_save=["embed_tokens"]), EVERYTHING),
        (lambda model: lora(model, modules_to_save=["lm_head"]), ALL_LOGITS),
        (lambda model: lora(model, target_modules=["q_proj", "lm_head"]), ALL_LOGITS),
    ],
    ids=["full", "full, segments", "DoRA", "rsLoRA", "embed_tokens", "lm_head saved", "lm_head LoRA"],
)
def test_every_kind_of_fine_tuning_equals_the_plain_one(tmp_path, wrap, config):
    trained = []
    for callbacks in ([], [LemoCallback(config)]):
        trainer = trainer_for(wrap(tiny_model()), tmp_path, callbacks)
        trainer.train()
        trained.append(trainer)
    torch.testing.assert_close(
        trained[1].model.state_dict(), trained[0].model.state_dict(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("mode", ["detach", "eliminate"])
def test_a_trainer_does_what_an_own_loop_does(tmp_path, mode):
    config = LemoConfig(mode=mode, keep_ratio=0.5, block_size=4, layers="all", loss_segment=16)
    options = {"gradient_accumulation_steps": 2, "optim": "sgd", "max_steps": 2}
    trainer = trainer_for(tiny_model(), tmp_path, [LemoCallback(config)], **options)
    batches = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: batches.append(collate(rows)) or batches[-1]
    trainer.train()

    model = tiny_model()
    apply_lemo(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    wanted = []
    for step in range(2):
        micro_batches = batches[2 * step : 2 * step + 2]
        num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
        loss = sum(model(**batch, num_items_in_batch=num_items).loss for batch in micro_batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 2)
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    assert losses(trainer) == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(trainer.model.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-6)


def test_float16_is_refused_for_segments_before_a_step(tmp_path):
    trainer = trainer_for(tiny_model(), tmp_path, [LemoCallback(LemoConfig(mode="segments"))])
    trainer.args.fp16 = True
    with pytest.raises(ValueError, match="loss scaler"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_loss_from_logits_is_made_known_once(tmp_path, caplog):
    callback = LemoCallback(HALF)
    trainer_for(tiny_model(), tmp_path, [callback], label_smoothing_factor=0.1).train()
    assert caplog.text.count("`loss_segment` saves nothing") == 1


def test_a_base_in_4_bit_trains_as_without_lemo(tmp_path):
    """bitsandbytes repacks its weights for inference when a layer is computed in evaluation mode."""
    from peft import prepare_model_for_kbit_training

    tiny_model().save_pretrained(tmp_path)

    def model():
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
        torch.manual_seed(0)
        return lora(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False))

    runs = {}
    for name, config in (("plain", None), ("all", EVERYTHING), ("half", HALF)):
        trainer = trainer_for(model(), tmp_path, [LemoCallback(config)] if config else [])
        trainer.train()
        runs[name] = losses(trainer)
    assert runs["all"] == pytest.approx(runs["plain"], rel=1e-5)
    assert runs["half"][0] == pytest.approx(runs["plain"][0], rel=1e-5)  # detach: the forward is exact


def sft_trainer(folder, config, **options):
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), pad_token="0", eos_token="2")
    rows = [sample["input_ids"][: 20 + 2 * i].tolist() for i, sample in enumerate(samples())]
    labels = [[-100] * 5 + row[5:] for row in rows]  # as `assistant_only_loss` makes them
    data = Dataset.from_dict({"input_ids": rows, "labels": labels})

    arguments = training_arguments(folder, max_length=48, bf16=False, **options)
    with warnings.catch_warnings():  # TRL on what it deprecates itself
        warnings.simplefilter("ignore")
        return SFTTrainer(
            lora(tiny_model()),
            SFTConfig(**arguments),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[LemoCallback(config)] if config else [],
        )


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer(tmp_path, packing):
    """TRL's trainer makes its loss, entropy and accuracy by its own fused head."""
    runs = {}
    for name, config in (("plain", None), ("all", EVERYTHING), ("half", HALF)):
        trainer = sft_trainer(tmp_path, config, packing=packing)
        trainer.train()
        runs[name] = trainer.state.log_history[:3]
    for metric in ("loss", "entropy", "mean_token_accuracy", "grad_norm"):
        wanted = [entry[metric] for entry in runs["plain"]]
        assert [entry[metric] for entry in runs["all"]] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert runs["half"][0]["loss"] == pytest.approx(runs["plain"][0]["loss"], rel=1e-5)
    assert all(0.4 < entry["lemo_kept_share"] < 0.7 for entry in runs["half"])


@pytest.mark.parametrize(
    "config", [LemoConfig(mode="segments"), LemoConfig(mode="detach", label_weights="kept")]
)
def test_sft_trainer_refuses_losses_of_lemo_before_a_step(tmp_path, config):
    trainer = sft_trainer(tmp_path, config)
    with pytest.raises(ValueError, match="compute the loss, and so does TRL"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_segments_refuse_weights_that_are_sharded():
    model = tiny_model()
    model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks them
    with pytest.raises(ValueError, match="whole weights"):
        apply_lemo(model, LemoConfig(mode="segments"))
    apply_lemo(model, HALF)


def _tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))


def test_a_forward_with_a_loss_of_its_own_composes_and_refuses_label_weights():
    """As `use_liger_kernel` binds one to the model, with the fused loss, when training starts."""

    def fused(self, input_ids, labels, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        loss = ForCausalLMLoss(hidden @ self.lm_head.weight.T, labels, VOCAB)
        return CausalLMOutputWithPast(loss=loss)

    sample = {name: values[None] for name, values in samples(1)[0].items()}
    wanted = loss_and_gradients(tiny_model(), sample)
    model = tiny_model()
    model.forward = types.MethodType(fused, model)
    apply_lemo(model, EVERYTHING)
    assert_same_step(loss_and_gradients(model, sample), wanted)
    remove_lemo(model)
    apply_lemo(model, LemoConfig(keep_ratio=0.5, block_size=4, label_weights="kept"))
    with pytest.raises(ValueError, match=r"`label_weights` must be 'all' .*LlamaForCausalLM"):
        model(**sample)


def test_embeddings_stand_in_for_ids():
    model = tiny_model()
    sample = {name: values[None] for name, values in samples(1)[0].items()}
    apply_lemo(model, HALF)
    wanted = model(**sample).loss
    embeddings = model.get_input_embeddings()(sample.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeddings, **sample).loss, wanted)


@pytest.mark.parametrize("num_items", [None, torch.tensor(0)])
def test_a_batch_without_labels_loses_what_the_plain_model_does(num_items):
    sample = {name: values[None] for name, values in samples(1)[0].items()}
    sample["labels"] = torch.full_like(sample["labels"], -100)
    model = tiny_model()
    wanted = model(**sample, num_items_in_batch=num_items).loss
    apply_lemo(model, HALF)
    got = model(**sample, num_items_in_batch=num_items).loss
    torch.testing.assert_close(got, wanted, equal_nan=True)


def test_scores_that_are_no_numbers_name_the_layer():
    model = tiny_model()
    sample = {name: values[None] for name, values in samples(1)[0].items()}
    apply_lemo(model, dataclasses.replace(HALF, shared_blocks=False))
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^Layer 2: .*NaN"):
        model(**sample)
    remove_lemo(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: lora(tiny_model(), target_modules=["lm_head"]), "set loss_segment=0"),
        (lambda: lora(tiny_model(), modules_to_save=["lm_head"]), "set loss_segment=0"),
    ],
)
def test_a_head_that_the_segmented_loss_cannot_read_is_refused_before_a_step(tmp_path, model, message):
    trainer = trainer_for(model(), tmp_path, [LemoCallback(HALF)])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "config",
    [
        LemoConfig(mode="detach", keep_ratio=0.5, block_size=4, layers="all"),
        LemoConfig(mode="eliminate", keep_ratio=0.5, block_size=4, layers="all"),
        LemoConfig(mode="segments", keep_ratio=0.5, segment_tokens=8),
    ],
    ids=lambda config: config.mode,
)
@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_crash_inside_a_layer_leaves_everything_as_it_was(config, part):
    model = lora(tiny_model())
    sample = {name: values[None] for name, values in samples(1)[0].items()}

    def state():
        return [
            (name, type(module), module.training, id(getattr(module, "config", None)), sorted(vars(module)))
            for name, module in model.named_modules()
        ]

    def crash(*_):
        raise RuntimeError("out of memory")

    before, wanted = state(), model(**sample).loss
    apply_lemo(model, config)
    hook = model.get_base_model().model.layers[1].get_submodule(part).register_forward_hook(crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**sample)
    hook.remove()
    remove_lemo(model)
    assert state() == before
    torch.testing.assert_close(model(**sample).loss, wanted)
