import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ripple_loader import RippleConfig, reorder
from ripple_loader.bundles import Sidecar
from ripple_loader.predictor import Predictor, rank_of

from .conftest import CALIBRATION, SMALL, load, make_model, relative_error, token_ids


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
    found = predictor.estimate(x[1000:]) + bias + predictor.slack(recall) > 0
    assert 0.02 < active.float().mean() < 0.3
    assert (found & active).sum() / active.sum() == pytest.approx(recall, abs=0.03)
    assert found.sum() < 1.5 * active.sum()


def test_more_recall_adds_neurons_and_takes_none():
    x, weight, bias = layer(noise=0.5)
    predictor = Predictor.fit(x, weight, bias, rank=8)
    slack = [predictor.slack(recall) for recall in (0.8, 0.9, 0.95, 0.99, 0.999)]
    assert all((more > less).all() for less, more in itertools.pairwise(slack))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 12), st.integers(1, 24), st.integers(1, 9))
def test_too_few_inputs_rule_nothing_out_that_was_seen(tokens, rank, neurons):
    x, weight, bias = layer(tokens=tokens, neurons=neurons)
    predictor = Predictor.fit(x, weight, bias, rank)
    held_back = x[3::4]
    active = held_back @ weight.T + bias > 0
    found = predictor.estimate(x) + bias + predictor.slack(0.999) > 0
    if not active.any():
        assert found.all()
    assert torch.isfinite(predictor.deviation).all()


@pytest.mark.parametrize("recall", [0.9, 0.99])
def test_survives_packing(recall):
    x, weight, bias = layer()
    predictor = Predictor.fit(x, weight, bias, rank=8)
    data = predictor.pack()
    assert len(data) == Predictor.size(8, 200, 64)
    again = Predictor.unpack(data, 8, 200, 64)
    assert torch.equal(again.estimate(x), predictor.estimate(x))
    assert torch.equal(again.slack(recall), predictor.slack(recall))


def test_the_rank_is_a_multiple_of_eight_or_nothing():
    assert [rank_of(512, share) for share in (0, 0.125, 0.13, 1)] == [0, 64, 72, 512]
    assert rank_of(20, 1.0) == 20
    assert Predictor.size(0, 100, 10) == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["opt", "arcee"])
def test_a_model_comes_closer_with_more_recall(name, saved, reordered):
    def each_alone(model):
        return torch.cat([model(token_ids(1, seed=seed)).logits for seed in range(12)])

    reference = each_alone(make_model(name))
    errors, computed = [], []
    for recall in (0.8, 0.99, 1.0):
        model = load(reordered(name), recall=recall)
        errors.append(relative_error(each_alone(model), reference))
        computed.append(model.ripple_report.active)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5
    assert computed[0] < computed[1]


@torch.no_grad()
def test_predictors_take_less_memory_than_sketches_and_read_ahead(reordered):
    exact, predicted = (load(reordered("opt"), recall=recall, dram_budget="100%") for recall in (1.0, 0.95))
    assert exact.ripple_report.resident["predictors"] == predicted.ripple_report.resident["sketch"] == 0
    assert 0 < predicted.ripple_report.resident["predictors"] < exact.ripple_report.resident["sketch"]
    for model in (exact, predicted):
        model.generate(token_ids(4), max_new_tokens=8, do_sample=False)
        assert model.ripple_report.asked > 0
        assert model.ripple_report.recall > 0.5


@torch.no_grad()
def test_a_token_gets_the_same_neurons_in_a_prompt_as_alone(reordered):
    model, ids = load(reordered("opt"), recall=0.8), token_ids(12)
    cache, alone = None, []
    for token in ids.split(1, dim=1):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        alone.append(output.logits)
    assert relative_error(torch.cat(alone, 1), model(ids).logits) < 1e-5


@torch.no_grad()
def test_dense_reads_all_whatever_the_recall(reordered):
    reference = make_model("opt")(token_ids()).logits
    model = load(reordered("opt"), recall=0.8, strategy="dense")
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
        with pytest.raises(ValueError, match="`recall` should be 1 or between"):
            RippleConfig(recall=recall)
    with pytest.raises(ValueError, match="should not both be below 1"):
        RippleConfig(recall=0.9, keep=0.5)


def test_a_trace_without_inputs_says_so(saved, tmp_path):
    from ripple_loader.source import open_source
    from ripple_loader.trace import cut_sequences, trace_source

    source = open_source(saved("opt"))
    trace = trace_source(source, cut_sequences(source, CALIBRATION, SMALL), SMALL, tmp_path / "trace")
    inputs = trace.inputs(1)
    assert inputs.shape == (64, source.hidden)
    assert inputs.dtype == torch.float32
    assert torch.isfinite(inputs).all()
    description = tmp_path / "trace" / "trace.json"
    description.write_text(description.read_text().replace('"inputs": true', '"inputs": false'))
    with pytest.raises(ValueError, match="trace the model again, or reorder with `predictor` 0"):
        reorder(saved("opt"), tmp_path / "out", trace=tmp_path / "trace")
    assert not (tmp_path / "out").exists()
