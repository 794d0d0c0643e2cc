from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import AutoConfig

from lemo_trainer import LemoConfig, apply_lemo
from lemo_trainer.measure import ActivationBytes, FlopCounter
from lemo_trainer.offline.step_cost import Setup, StepCost, fit, predict
from lemo_trainer.offline.way_costs import STEP, plan_ways

from .tiny import checkpointing, lora, tiny_model

# peft 0.21 still reads transformers' old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LAYERS, SEQ_LEN = 6, 96
LORA = {"r": 2, "target_modules": "all-linear"}
LEMOS = {
    "none": None,
    "segments": LemoConfig(mode="segments", segment_tokens=32),
    "detach": LemoConfig(mode="detach", keep_ratio=0.4, block_size=8),
    "detach in all layers": LemoConfig(mode="detach", keep_ratio=0.4, block_size=8, layers="all"),
    "eliminate": LemoConfig(mode="eliminate", keep_ratio=0.4, block_size=8),
}


def setup_of(model_type="llama", *, seq_len=SEQ_LEN, layers=LAYERS, lora=LORA, **options):
    config = tiny_model(model_type, layers=layers, **options).config
    return Setup(model_config=config, seq_len=seq_len, lora=lora)


def measured(lemo, recomputing, *, model_type="llama", with_lora=True, **options):
    """Saved bytes, peak above the weights, and FLOPs of a step of the whole model."""
    model = tiny_model(model_type, layers=LAYERS, **options)
    base = model
    if with_lora:
        model = lora(model)
    if recomputing:
        checkpointing(base, reentrant=False)
    if lemo is not None:
        apply_lemo(model, lemo)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(97, (1, SEQ_LEN))
    with ActivationBytes() as activations, FlopCounter() as counter:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    states = sum(p.nbytes for p in model.parameters()) + 3 * sum(p.nbytes for p in trained)
    return StepCost(activations.saved_bytes, activations.peak_bytes + states, counter.flops, 0.0)


@pytest.mark.parametrize("recomputing", [False, True])
@pytest.mark.parametrize("name", LEMOS)
def test_a_prediction_is_what_is_measured(name, recomputing):
    got = predict(setup_of(), LEMOS[name], checkpointing=recomputing, repeats=0)
    wanted = measured(LEMOS[name], recomputing)
    assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(wanted), rel=0.02)


def test_a_prediction_of_full_fine_tuning_has_gradients_and_optimizer_states():
    got = predict(setup_of(lora=None), LEMOS["detach"], checkpointing=False, repeats=0)
    wanted = measured(LEMOS["detach"], False, with_lora=False)
    assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(wanted), rel=0.02)


@pytest.mark.parametrize("name", ["none", "detach"])
def test_a_prediction_of_a_hybrid_model_counts_each_kind_of_layer(name):
    """With SDPA a layer whose window is shorter than the sample needs a mask, another does not."""
    options = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "sliding_window": 11}
    got = predict(setup_of("gemma3_text", **options), LEMOS[name], checkpointing=False, repeats=0)
    wanted = measured(LEMOS[name], False, model_type="gemma3_text", **options)
    assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(wanted), rel=0.05)


def test_time_is_measured_on_request():
    assert predict(setup_of(seq_len=8), None, checkpointing=False, repeats=1).seconds > 0


def test_segments_that_are_drawn_are_predicted_without_chance():
    lemo = dataclasses.replace(LEMOS["segments"], keep_ratio=0.4)
    costs = [predict(setup_of(), lemo, checkpointing=False, repeats=0) for _ in range(3)]
    assert costs[0] == costs[1] == costs[2]


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gpt2", {}),
        ("opt", {}),
        ("mixtral", {}),
        ("gemma3_text", {"layers": 2, "layer_types": ["sliding_attention", "full_attention"]}),
        ("llama", {"layers": 1}),
    ],
)
def test_other_architectures_and_small_models(model_type, options):
    setup = setup_of(model_type, seq_len=32, lora=None, **options)
    lemo = LemoConfig(keep_ratio=0.4, block_size=4, layers="all")
    dense, sparse = (predict(setup, each, checkpointing=False, repeats=0) for each in (None, lemo))
    assert 0 < sparse.saved_bytes < dense.saved_bytes


@pytest.mark.parametrize("mode", ["detach", "eliminate"])
def test_a_kept_share_that_fits_the_memory(mode):
    lemo = LemoConfig(mode=mode, block_size=8, layers="all")
    costs = [
        predict(setup_of(), dataclasses.replace(lemo, keep_ratio=share), checkpointing=False, repeats=0)
        for share in (0.1, 1.0)
    ]
    memory = 0.5 * (costs[0].peak_bytes + costs[1].peak_bytes)
    fitting = fit(setup_of(), lemo, checkpointing=False, memory=memory)
    assert 0.1 < fitting.keep_ratio < 1
    assert measured(fitting, False).peak_bytes <= 1.02 * memory
    assert fit(setup_of(), lemo, checkpointing=False, memory=math.inf).keep_ratio == 1.0


def test_a_kept_share_that_fits_the_operations():
    lemo, share = LemoConfig(mode="eliminate", selector="norm", block_size=8, layers="all"), 0.7
    fitting = fit(setup_of(), lemo, checkpointing=False, flops_share=share)
    assert 0.1 < fitting.keep_ratio < 1
    assert measured(fitting, False).flops <= 1.02 * share * measured(None, False).flops


def test_segments_that_fit_the_memory():
    lemo = LemoConfig(mode="segments")
    dense = predict(setup_of(), None, checkpointing=False, repeats=0)
    states = predict(setup_of(), dataclasses.replace(lemo, segment_tokens=48), checkpointing=False, repeats=0)
    memory = 0.5 * (dense.peak_bytes + states.peak_bytes)
    fitting = fit(setup_of(), lemo, checkpointing=False, memory=memory)
    assert measured(fitting, False).peak_bytes <= 1.02 * memory
    with pytest.raises(ValueError, match="No segment of 32 tokens or more fits"):
        fit(setup_of(), lemo, checkpointing=False, memory=1.0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "Give one of `memory` and `flops_share`, got None and None"),
        ({"memory": 1e6, "flops_share": 0.5}, "Give one of"),
        ({"memory": 1e3}, "a tenth of the tokens still takes .* peak_bytes"),
        ({"flops_share": 0.01}, "a tenth of the tokens still takes .* flops"),
    ],
)
def test_what_cannot_fit_is_said(limits, message):
    with pytest.raises(ValueError, match=message):
        fit(setup_of(seq_len=32), LEMOS["detach"], checkpointing=False, **limits)


def test_the_longest_sample_of_each_way_fits_and_a_longer_one_does_not():
    setup = setup_of("llama", hidden_size=64, intermediate_size=160, layers=3, seq_len=256)
    config, memory, name = LemoConfig(segment_tokens=32, loss_segment=32), 8e6, "exact by layers of 32"
    plans = {str(plan.cost.way): plan for plan in plan_ways(setup, config, memory, longest=True)}
    longest = plans[name].longest
    assert plans["plain"].longest < plans["checkpointing"].longest < longest
    for seq_len, fits in ((longest, True), (longest + STEP, False)):
        tried = plan_ways(dataclasses.replace(setup, seq_len=seq_len), config, memory)
        assert next(plan for plan in tried if str(plan.cost.way) == name).fits == fits


def test_a_table_of_ways_is_what_auto_chooses_from():
    setup = setup_of(layers=4, seq_len=SEQ_LEN)
    config = LemoConfig(segment_tokens=16, loss_segment=16)
    planned = plan_ways(setup, config, 1e9)
    model = lora(tiny_model(layers=4))
    report = apply_lemo(model, config)
    tokens = torch.randint(97, (1, SEQ_LEN))
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert [plan.cost for plan in planned] == list(report.choice.table)


def test_what_cannot_be_predicted_is_said():
    with pytest.raises(ValueError, match='`mode` must be named for a prediction, got "auto"'):
        predict(setup_of(), LemoConfig(), checkpointing=False)
    with pytest.raises(ValueError, match="thresholds '1:0\\.8'"):
        predict(setup_of(), LemoConfig(thresholds="1:0.8"), checkpointing=False)
    with pytest.raises(ValueError, match="`seq_len` must be within the model's positions, 128, got 129"):
        predict(setup_of("gpt2", seq_len=129), None, checkpointing=False)
    for name, value in (("seq_len", 1), ("batch_size", 0)):
        with pytest.raises(ValueError, match=f"`{name}` must be at least .*got {value}"):
            Setup(model_config=AutoConfig.for_model("llama"), **{"seq_len": 8, name: value})
