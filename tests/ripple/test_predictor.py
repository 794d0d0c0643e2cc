import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from ripple_loader import RippleConfig, reorder
from ripple_loader.checkpoint.source import open_source
from ripple_loader.format.predictor import Predictor, rank_of
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.model.streaming import StreamingMLP
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.offline.trace import trace_source

from .conftest import CALIBRATION, SMALL, load, make_model, relative_error, token_ids

MORE = [token_ids(64, seed=seed)[0] for seed in range(16)]


@pytest.fixture(scope="module")
def predicting(saved, tmp_path_factory):
    """`predicting(name)`: a copy made from as many tokens as a predictor needs, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "copy"
            reorder(saved(name), made[name], MORE, replace(SMALL, tokens=1024))
        return made[name]

    return get


def layer(tokens=2000, rank=6, hidden=64, neurons=200, noise=0.02, seed=0):
    """Inputs close to a subspace, and weights of neurons of which about a tenth are active."""
    random = torch.Generator().manual_seed(seed)
    subspace = torch.randn(rank, hidden, generator=random)
    x = torch.randn(tokens, rank, generator=random) @ subspace
    x += noise * torch.randn(tokens, hidden, generator=random)
    weight = torch.randn(neurons, hidden, generator=random) / hidden**0.5
    return x, weight, torch.full((neurons,), -1.3 * rank**0.5)


@pytest.mark.parametrize("recall", [0.8, 0.9, 0.99, 0.999])
def test_finds_the_share_that_was_asked_for_on_other_inputs_of_the_kind(recall):
    x, weight, bias = layer()
    predictor = Predictor.fit(x[:1000], weight, bias, rank=8)
    active = x[1000:] @ weight.T + bias > 0
    found = predictor.estimate(x[1000:]) + bias + predictor.deviations(recall) * predictor.deviation > 0
    assert 0.02 < active.float().mean() < 0.3
    assert (found & active).sum() / active.sum() == pytest.approx(recall, abs=0.03)
    assert found.sum() < 1.5 * active.sum()


def test_more_recall_adds_neurons_and_takes_none():
    x, weight, bias = layer(noise=0.5)
    predictor = Predictor.fit(x, weight, bias, rank=8)
    deviations = [predictor.deviations(recall) for recall in (0.8, 0.9, 0.95, 0.99, 0.999)]
    assert all(more > less for less, more in itertools.pairwise(deviations))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 127), st.integers(1, 24), st.integers(1, 9))
def test_too_few_inputs_rule_nothing_out(tokens, rank, neurons):
    x, weight, bias = layer(tokens=tokens, neurons=neurons)
    predictor = Predictor.fit(x, weight, bias, rank)
    other, _, _ = layer(tokens=5, neurons=neurons, seed=1)
    assert (predictor.estimate(other) + bias + predictor.deviations(0.8) * predictor.deviation > 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_that_are_not_numbers_do_not_count(bad):
    x, weight, bias = layer()
    spoilt = torch.cat([x, torch.full((3, x.shape[1]), bad)])
    expected, found = (Predictor.fit(inputs, weight, bias, 8) for inputs in (x, spoilt))
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.levels, expected.levels)


@pytest.mark.parametrize("recall", [0.9, 0.99])
def test_survives_packing(recall):
    x, weight, bias = layer()
    predictor = Predictor.fit(x, weight, bias, rank=8)
    data = predictor.pack()
    assert len(data) == Predictor.size(8, 200, 64)
    again = Predictor.unpack(torch.frombuffer(bytearray(data), dtype=torch.uint8), 8, 200, 64)
    assert torch.equal(again.estimate(x), predictor.estimate(x))
    assert torch.equal(again.deviation, predictor.deviation)
    assert again.deviations(recall) == predictor.deviations(recall)


def test_the_rank_is_a_multiple_of_eight_or_nothing():
    assert [rank_of(512, share) for share in (0, 1e-6, 0.125, 0.13, 1)] == [0, 8, 64, 72, 512]
    assert rank_of(20, 1.0) == 20
    assert Predictor.size(0, 100, 10) == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["opt", "arcee"])
def test_a_model_comes_closer_with_more_recall(name, predicting):
    def each_alone(model):
        return torch.cat([model(token_ids(1, seed=seed)).logits for seed in range(12)])

    reference = each_alone(make_model(name))
    errors, computed = [], []
    for recall in (0.8, 0.99, 1.0):
        model = load(predicting(name), recall=recall)
        errors.append(relative_error(each_alone(model), reference))
        computed.append(model.ripple_report.active)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5
    assert computed[0] < computed[1]


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["auto", "sparse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_predictors_of_half_precision_checkpoints(dtype, strategy, saved, tmp_path):
    reorder(saved("opt", dtype), tmp_path / "out", MORE, replace(SMALL, tokens=1024))
    model = load(tmp_path / "out", recall=0.999, strategy=strategy)
    reference = AutoModelForCausalLM.from_pretrained(saved("opt", dtype), dtype=dtype)(token_ids()).logits
    assert model.dtype == dtype
    assert relative_error(model(token_ids()).logits, reference) < 0.1


@torch.no_grad()
def test_predictors_take_less_memory_than_sketches_and_read_ahead(predicting):
    exact, predicted = (load(predicting("opt"), recall=recall, dram_budget="100%") for recall in (1.0, 0.95))
    assert exact.ripple_report.resident["predictors"] == predicted.ripple_report.resident["sketch"] == 0
    assert 0 < predicted.ripple_report.resident["predictors"] < exact.ripple_report.resident["sketch"]
    for model in (exact, predicted):
        model.generate(token_ids(4), max_new_tokens=8, do_sample=False)
        assert model.ripple_report.asked > 0
        assert model.ripple_report.recall > 0.5


@torch.no_grad()
def test_a_token_gets_the_same_neurons_in_a_prompt_as_alone(predicting):
    model, ids = load(predicting("opt"), recall=0.8), token_ids(12)
    cache, alone = None, []
    for token in ids.split(1, dim=1):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        alone.append(output.logits)
    assert relative_error(torch.cat(alone, 1), model(ids).logits) < 1e-5


@torch.no_grad()
def test_a_trace_that_was_too_short_is_told_of_and_leaves_nothing_out(reordered):
    with pytest.warns(UserWarning, match="2 of 2 MLPs compute all neurons: the trace had too few tokens"):
        model = load(reordered("opt"), recall=0.8)
    assert "too few tokens" in model.ripple_report.fallbacks[0]
    reference = make_model("opt")(token_ids()).logits
    assert relative_error(model(token_ids()).logits, reference) < 1e-5


@torch.no_grad()
def test_dense_reads_all_whatever_the_recall(predicting):
    reference = make_model("opt")(token_ids()).logits
    model = load(predicting("opt"), recall=0.8, strategy="dense")
    assert relative_error(model(token_ids()).logits, reference) < 1e-5
    assert model.ripple_report.resident["predictors"] == 0


def test_refused_where_it_has_no_meaning(saved, reordered, tmp_path):
    with pytest.raises(ValueError, match="never exactly zero: use `keep`"):
        load(reordered("llama"), recall=0.9)
    reorder(saved("opt"), tmp_path / "out", CALIBRATION, replace(SMALL, predictor=0.0))
    assert Sidecar(tmp_path / "out").header.rank == 0
    with pytest.raises(ValueError, match="reorder the model again with `predictor` above 0"):
        load(tmp_path / "out", recall=0.9)
    for recall in (0, 0.5, 0.9999, 2, "0.9"):
        with pytest.raises(ValueError, match="`recall` must be 1 or between"):
            RippleConfig(recall=recall)
    with pytest.raises(ValueError, match="must not both be below 1"):
        RippleConfig(recall=0.9, keep=0.5)


def traced(saved, directory, name="opt"):
    source = open_source(saved(name))
    return source, trace_source(source, cut_sequences(source, CALIBRATION, SMALL), SMALL, directory)


@torch.no_grad()
def test_a_trace_holds_the_inputs_of_every_fourth_token(saved, tmp_path):
    _, trace = traced(saved, tmp_path)
    model, seen = make_model("opt"), []
    model.model.decoder.layers[1].fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for ids in torch.cat(CALIBRATION)[:256].view(-1, 64):
        model(ids[None])
    expected = torch.cat([x.flatten(0, -2)[::4] for x in seen])
    torch.testing.assert_close(trace.inputs(1), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["opt", "arcee"])
def test_a_model_finds_its_active_neurons_on_what_was_traced(name, saved, tmp_path):
    """With a basis of all dimensions, which only int8 rounding keeps from being exact."""
    reorder(saved(name), tmp_path / "out", MORE, replace(SMALL, tokens=1024, predictor=1.0))
    model = load(tmp_path / "out", recall=0.99)
    mlp = next(module for module in model.modules() if isinstance(module, StreamingMLP))
    engine, (_, trace) = mlp.backend, traced(saved, tmp_path / "trace", name)
    for layer in range(2):
        x = trace.inputs(layer)
        weight = engine.sidecar.bundles(layer).view(torch.float32).view(96, 2, 32)[:, 0]
        active = x @ weight.T + engine.bias(layer, 0) > 0
        found = engine.selector.select(layer, x, mlp.activation).mask
        assert (found & active).sum() > 0.97 * active.sum()
        assert (found & ~active).sum() < 0.05 * (~active).sum()


@torch.no_grad()
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_input_that_is_not_a_number_has_all_neurons_computed(bad, predicting):
    model = load(predicting("opt"), recall=0.9)
    mlp = next(module for module in model.modules() if isinstance(module, StreamingMLP))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    x[1, 5] = bad
    assert mlp.backend.selector.select(0, x, mlp.activation).mask.all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("strategy", ["sparse", "auto"])
def test_a_budget_that_is_too_small_is_told_the_least_that_works(strategy, predicting):
    options = {"recall": 0.9, "strategy": strategy}
    with pytest.raises(ValueError, match="must be at least") as error:
        load(predicting("opt"), dram_budget=1, **options)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    load(predicting("opt"), dram_budget=least, **options)
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        load(predicting("opt"), dram_budget=least - 1, **options)


def test_a_trace_without_inputs_says_so_before_anything_is_written(saved, tmp_path):
    traced(saved, tmp_path / "trace")
    description = tmp_path / "trace" / "trace.json"
    description.write_text(description.read_text().replace("inputs_every", "nothing"))
    with pytest.raises(ValueError, match="trace the model again, or reorder with `predictor` 0"):
        reorder(saved("opt"), tmp_path / "out", trace=tmp_path / "trace")
    assert not list(tmp_path.glob("*out*"))
