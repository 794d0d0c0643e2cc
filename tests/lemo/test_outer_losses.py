"""Losses and metrics that code outside of the model makes from its outputs, and models with another head."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from lemo_trainer import LemoCallback, LemoConfig, apply_lemo, remove_lemo

from .tiny import VOCAB, assert_same_step, batch, every_mode, lora, loss_and_gradients, tiny_model
from .training import losses, samples, trainer_for

EVERYTHING = every_mode()
HALF = {mode: config for mode, config in every_mode(0.5).items() if mode in ("detach", "eliminate")}
modes = pytest.mark.parametrize("mode", EVERYTHING)
outer = pytest.mark.parametrize("mode", ["detach", "eliminate", "exact", "auto"])


@modes
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "cohere"])
def test_logits_are_made_when_they_are_read(mode, kind, caplog):
    model, inputs = tiny_model(kind), batch("left")
    wanted, real = model(**inputs).logits, inputs["attention_mask"].bool()
    apply_lemo(model, EVERYTHING[mode])
    for _ in range(2):
        output = model(**inputs)
        torch.testing.assert_close(output.logits[real], wanted[real], rtol=1e-4, atol=1e-4)
        assert output["logits"] is output.logits
    assert caplog.text.count("made all logits for it") == 1


@outer
def test_a_loss_from_logits_on_demand_has_its_gradient(mode):
    def step(model):
        model.zero_grad()
        output = model(**batch("left"))
        loss = output.loss + 0.1 * output.logits.log_softmax(-1).square().mean()
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    model = tiny_model()
    wanted = step(model)
    apply_lemo(model, EVERYTHING[mode])
    assert_same_step(step(model), wanted)


@pytest.mark.parametrize("loss_segment", [0, 16])
def test_logits_under_segments_serve_metrics_but_no_loss(loss_segment):
    model, inputs = tiny_model(), batch("left")
    wanted = model(**inputs).logits
    apply_lemo(model, LemoConfig(mode="segments", segment_tokens=16, loss_segment=loss_segment))
    output = model(**inputs)
    torch.testing.assert_close(output.logits, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="can serve metrics, but no loss"):
        output.logits.sum().backward()


@modes
def test_token_accuracy_in_compute_loss(tmp_path, mode):
    from transformers import Trainer

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            hits = outputs.logits[:, :-1].argmax(-1) == inputs["labels"][:, 1:]
            self.accuracies.append(hits.float().mean().item())
            return (loss, outputs) if return_outputs else loss

    runs = []
    for callbacks in ([], [LemoCallback(EVERYTHING[mode])]):
        plain = trainer_for(tiny_model(), tmp_path, [])
        trainer = Own(plain.model, plain.args, train_dataset=samples(), callbacks=callbacks)
        trainer.accuracies = []
        trainer.train()
        runs.append(trainer)
    assert runs[1].accuracies == runs[0].accuracies
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)


@modes
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("share", ["all", "half"])
def test_a_graph_that_is_retained_goes_backward_twice(mode, checkpointed, share):
    from .tiny import checkpointing

    config = HALF.get(mode, EVERYTHING[mode]) if share == "half" else EVERYTHING[mode]
    if mode != "auto":  # runs plain here
        config = dataclasses.replace(config, selective_checkpointing=False)
    model, inputs = tiny_model(), batch("left")
    apply_lemo(model, config)
    if checkpointed:
        checkpointing(model, reentrant=False)
    _, wanted = loss_and_gradients(model, inputs)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    (loss * 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 3 * wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["detach", "eliminate"])
def test_a_retained_graph_and_selective_checkpointing_are_refused(mode):
    model, inputs = tiny_model(), batch("left")
    apply_lemo(model, HALF[mode])
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="needs selective_checkpointing=False"):
        loss.backward()


def classifier(head, labels):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, num_labels=labels, pad_token_id=0, **sizes)
    config.classifier_dropout = 0.0
    torch.manual_seed(0)
    return head.from_config(config).train()


@outer
@pytest.mark.parametrize("head", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_classification_heads(mode, head):
    model, inputs = classifier(head, 3), batch("right")
    tokens = head is AutoModelForTokenClassification
    inputs["labels"] = inputs["input_ids"] % 3 if tokens else torch.tensor([0, 2])
    wanted = loss_and_gradients(model, inputs)
    report = apply_lemo(model, EVERYTHING[mode])
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    remove_lemo(model)
    assert "forward" not in vars(model)
    if mode in HALF:
        report = apply_lemo(model, HALF[mode])
        loss_and_gradients(model, inputs)
        assert 0.4 < report.kept_share < 0.6


@outer
def test_a_decoder_without_a_head(mode):
    model, inputs = tiny_model().model, {"input_ids": batch("plain")["input_ids"]}

    def step():
        model.zero_grad()
        loss = model(**inputs).last_hidden_state.square().mean()
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    wanted = step()
    apply_lemo(model, EVERYTHING[mode])
    assert_same_step(step(), wanted)
    remove_lemo(model)
    assert "forward" not in vars(model)


@outer
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_alora(mode, targets):
    """Its adapter acts from the invocation tokens on, counted from a sample's end."""
    model = lora(tiny_model(), alora_invocation_tokens=[5, 6], target_modules=targets)
    inputs = batch("plain")
    inputs["input_ids"][0, 20:22] = torch.tensor([5, 6])
    inputs["input_ids"][1, 37:39] = torch.tensor([5, 6])
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, EVERYTHING[mode])
    assert_same_step(loss_and_gradients(model, inputs), wanted)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_alora_of_chosen_rows(targets):
    """Under detach the forward pass stays exact: the adapter acts on the right rows of both parts."""
    model = lora(tiny_model(), alora_invocation_tokens=[5, 6], target_modules=targets)
    inputs = batch("plain")
    inputs["input_ids"][0, 20:22] = torch.tensor([5, 6])
    inputs["input_ids"][1, 37:39] = torch.tensor([5, 6])
    wanted = model(**inputs).loss
    apply_lemo(model, HALF["detach"])
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    loss.backward()
    with torch.no_grad():
        probe = next(
            p for name, p in model.named_parameters() if "layers.2" in name and "v_proj.lora_B" in name
        )
        assert probe.grad.norm() > 0
    remove_lemo(model)
    assert model(**inputs).loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_eliminated_rows_keep_alora_on_the_right_tokens():
    model = lora(tiny_model(), alora_invocation_tokens=[5, 6], target_modules=["v_proj"])
    inputs = batch("plain")
    inputs["input_ids"][:, 20:22] = torch.tensor([5, 6])
    seen = []
    part = model.get_base_model().model.layers[0].self_attn.v_proj
    own = part.forward

    def watched(x, alora_offsets):
        seen.append((x.shape[1], alora_offsets))
        return own(x, alora_offsets=alora_offsets)

    part.forward = watched
    config = LemoConfig(mode="eliminate", keep_ratio=0.5, block_size=4, layers="0", selector="recency")
    apply_lemo(model, config)
    model(**inputs).loss.backward()
    rows, offsets = seen[-1]
    assert rows == 21  # the first block, and the last ones: positions 0 to 3, and 28 to 44
    assert offsets == [17, 17]


def test_a_loss_from_hidden_states_alone():
    model, inputs = tiny_model(), batch("plain")
    apply_lemo(model, EVERYTHING["exact"])
    hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
    got = F.mse_loss(hidden, torch.zeros_like(hidden))
    got.backward()
    assert all(p.grad is not None for p in model.model.parameters())
