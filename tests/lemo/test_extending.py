"""A selector of one's own, added as CONTRIBUTING.md shows: a class, a registration, nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from transformers import HfArgumentParser

from lemo_trainer import LemoArguments, LemoConfig, apply_lemo
from lemo_trainer.informativeness.selectors import LayerView, Selector, register
from lemo_trainer.offline.thresholds import check_search
from lemo_trainer.registry import SELECTORS
from lemo_trainer.session import session_of

from .tiny import batch, loss_and_gradients, tiny_model


@pytest.fixture
def middle() -> Iterator[type[Selector]]:
    @register("middle")
    class MiddleSelector(Selector):
        summary = "blocks in the middle of the sequence first"
        modes = ("detach", "eliminate", "segments")

        def attention_scores(self, view: LayerView) -> torch.Tensor:
            position_N = torch.arange(view.plan.blocks, device=view.x_BSD.device)
            distance_N = (position_N - (view.plan.blocks - 1) / 2).abs()
            return -distance_N.expand(len(view.x_BSD), -1)

        def segment_order(self, segments: int) -> list[int]:
            return sorted(range(segments), key=lambda i: -abs(i - (segments - 1) / 2))

    yield MiddleSelector
    del SELECTORS["middle"]


@pytest.mark.parametrize("mode", ["detach", "eliminate"])
def test_a_new_selector_chooses_the_blocks(mode, middle, monkeypatch):
    model, inputs = tiny_model(), batch("plain", seq_len=40)
    report = apply_lemo(
        model,
        LemoConfig(
            mode=mode,
            selector="middle",
            keep_ratio=0.6,
            block_size=8,
            layers="all",
            sink_blocks=0,
            recent_blocks=0,
        ),
    )
    session, chosen = session_of(model), []
    plan = session.plan
    monkeypatch.setattr(
        session, "plan", lambda *args: dataclasses.replace(plan(*args), on_chosen=chosen.append)
    )
    loss_and_gradients(model, inputs)
    assert report.patched_layers == (0, 1, 2)
    assert len(chosen) == (3 if mode == "detach" else 6)
    assert all(index.tolist() == [list(range(8, 32))] * 2 for index in chosen)


def test_a_new_selector_orders_segments(middle):
    model, inputs = tiny_model(), batch("plain", seq_len=40)
    report = apply_lemo(
        model, LemoConfig(mode="segments", segment_tokens=8, keep_ratio=0.2, selector="middle")
    )
    assert session_of(model).choose_segments(40) == [False, False, True, False, False]
    loss_and_gradients(model, inputs)
    assert report.kept_share == 0.2


def test_a_new_selector_is_an_option_and_its_traits_are_checked(middle):
    parser = HfArgumentParser(LemoArguments)
    (arguments,) = parser.parse_args_into_dataclasses(["--lemo", "--lemo_selector", "middle"])
    assert arguments.config().selector == "middle"
    with pytest.raises(ValueError, match="`selector` must be one of auto, informativeness, norm in a search"):
        check_search(LemoConfig(mode="eliminate", selector="middle"), None)


def test_a_removed_selector_is_refused():
    with pytest.raises(ValueError, match=r"`selector` must be one of auto, .*got 'middle'"):
        LemoConfig(selector="middle")
