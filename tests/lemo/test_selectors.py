from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lemo_trainer import LemoConfig
from lemo_trainer.arguments import config_help
from lemo_trainer.informativeness.selection import BlockPlan
from lemo_trainer.informativeness.selectors import LayerView, Selector, register, selector_for
from lemo_trainer.registry import SELECTORS, selector_names

DOCS = Path(__file__).resolve().parents[2] / "docs" / "lemo.md"


def scores(selector, x, mask, plan):
    return selector_for(LemoConfig(selector=selector)).attention_scores(LayerView(x, mask, plan)).tolist()


def test_controls_rank_by_norm_by_position_and_by_chance():
    plan = BlockPlan(4, 2, 1, 2)
    x = torch.tensor([3.0, 3, 9, 0, 1, 1, 4, 4, 7]).view(1, 9, 1)
    valid = torch.ones(1, 9, dtype=torch.bool)
    valid[:, 6:8] = False
    mask = torch.ones(9, 9).tril().bool() & valid[:, None, None]
    assert scores("norm", x, None, plan) == [[3, 4.5, 1, 4]]
    assert scores("norm", x, mask, plan) == [[3, 4.5, 1, 0]]
    assert scores("recency", x, None, plan) == [[0, 1, 2, 3]]
    assert scores("random", x, None, plan) != scores("random", x, None, plan)


def test_the_docs_list_the_registered_selectors():
    rows = [
        f'| `"{name}"` | {traits.summary} | {", ".join(traits.modes)} |' for name, traits in SELECTORS.items()
    ]
    text = DOCS.read_text("utf-8")
    assert "\n".join(rows) in text, "docs/lemo.md must have these rows:\n" + "\n".join(rows)


def test_help_and_errors_list_the_registered_selectors():
    assert all(
        f'"{name}": {traits.summary}' in config_help()["selector"] for name, traits in SELECTORS.items()
    )
    with pytest.raises(ValueError, match=f"must be one of {', '.join(selector_names())}, got 'best'"):
        LemoConfig(selector="best")
    with pytest.raises(ValueError, match='must be one of auto, random, recency with mode="segments"'):
        LemoConfig(mode="segments", selector="norm")


def test_a_name_in_use_is_refused():
    for name in ("auto", "norm"):
        with pytest.raises(ValueError, match=f"name of its own, got '{name}'"):
            register(name)(Selector)
    register("norm")(SELECTORS["norm"])  # its module was imported anew
