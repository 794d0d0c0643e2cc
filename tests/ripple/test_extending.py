"""What CONTRIBUTING.md shows how to add, added from outside the package through the public points."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ripple_loader import RippleConfig, reorder
from ripple_loader.format.encoding import ENCODINGS, FloatEncoding, register_encoding
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.model.architectures import ARCHITECTURES
from ripple_loader.offline.placement import Placed
from ripple_loader.offline.verification import verify
from ripple_loader.online.cache import NeuronCache
from ripple_loader.registry import ACTIVE_RULES, BUNDLES, CACHE_POLICIES, PLACEMENTS, Registry

from .conftest import CALIBRATION, SMALL, load, make_model, relative_error, token_ids
from .test_cache import assert_index_is_charged, assert_slots_hold_their_neurons


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The choices of the package alone, again, after each test."""
    for registry in (ACTIVE_RULES, BUNDLES, CACHE_POLICIES, PLACEMENTS):
        monkeypatch.setattr(registry, "_choices", dict(registry._choices))
    for table in (ENCODINGS, ARCHITECTURES):
        for name in set(table):
            monkeypatch.setitem(table, name, table[name])


@torch.no_grad()
def test_a_cache_policy(reordered):
    random = np.random.default_rng(0)

    @CACHE_POLICIES.register("random")
    class RandomCache(NeuronCache):
        """Neurons drawn at random make room."""

        def victims(self, count):
            return random.choice(self.evictable(), count, replace=False)

    steps = [np.flatnonzero(random.random(40) < 0.4) for _ in range(50)]
    assert_slots_hold_their_neurons("random", steps, capacity=20, pinned=3)
    assert_index_is_charged("random")
    options = {"keep": 0.3, "dram_budget": "80KiB", "buffer": 1 << 14}
    model, wanted = (load(reordered("llama"), cache_policy=policy, **options) for policy in ("random", "lru"))
    assert model.ripple_report.resident["cache"] > 0
    for seed in range(4):
        assert relative_error(model(token_ids(seed=seed)).logits, wanted(token_ids(seed=seed)).logits) < 1e-5
    assert model.ripple_report.hits > 0 < model.ripple_report.evictions


def test_a_placement(saved, tmp_path):
    @PLACEMENTS.register("reversed")
    def place_reversed(layer):
        return Placed(layer.by_frequency[::-1].copy())

    config = dataclasses.replace(SMALL, placement="reversed")
    plan = reorder(saved("llama"), tmp_path / "out", CALIBRATION, config)
    assert plan.profile["placement"] == "reversed"
    assert len(dict(verify(tmp_path / "out", saved("llama")))) == 7


def test_a_rule_for_what_is_active(saved, tmp_path):
    @ACTIVE_RULES.register("above_mean")
    def above_mean(size_TN, share):
        return size_TN > share * size_TN.mean(-1, keepdim=True)

    plans = []
    for share in (0.9, 0.5):
        config = dataclasses.replace(SMALL, active="above_mean", active_share=share)
        plans.append(reorder(saved("llama"), tmp_path / str(share), CALIBRATION, config))
    assert 0 < plans[0].profile["activity"] < plans[1].profile["activity"] < 1


def test_an_encoding_of_bundles(saved, tmp_path):
    register_encoding("float64", "F64", FloatEncoding(torch.float64))
    config = dataclasses.replace(SMALL, bundles="float64")
    reorder(saved("llama"), tmp_path / "out", CALIBRATION, config)
    assert Sidecar(tmp_path / "out").header.dtype == "F64"
    stock = AutoModelForCausalLM.from_pretrained(saved("llama"))
    assert relative_error(load(tmp_path / "out")(token_ids()).logits, stock(token_ids()).logits) < 1e-5


def test_an_architecture(tmp_path, monkeypatch):
    entry = ARCHITECTURES["mixtral"]
    monkeypatch.delitem(ARCHITECTURES, "mixtral")
    make_model("mixtral").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"ripple_loader\.model\.architectures\.ARCHITECTURES"):
        reorder(tmp_path / "model", tmp_path / "out", CALIBRATION, SMALL)
    monkeypatch.setitem(ARCHITECTURES, "mixtral", entry)
    reorder(tmp_path / "model", tmp_path / "out", CALIBRATION, SMALL)
    assert len(dict(verify(tmp_path / "out", tmp_path / "model"))) == 7


def test_a_name_can_be_taken_once():
    choices: Registry[int] = Registry("option")
    choices.register("one")(1)
    with pytest.raises(ValueError, match="`option` has a choice 'one' already"):
        choices.register("one")(2)
    with pytest.raises(
        ValueError, match=f"`cache_policy` must be one of {CACHE_POLICIES.names()}, got 'clock'"
    ):
        RippleConfig(cache_policy="clock")
