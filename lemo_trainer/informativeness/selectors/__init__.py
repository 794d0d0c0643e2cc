"""The ways to rank blocks that `LemoConfig(selector=...)` can name, one file each.

To add one, write a file with a subclass of `Selector` under `@register("name")`, import it below, and add its
row to the table of docs/lemo.md. A selector outside of this package needs only to be imported before a
configuration names it.
"""

from lemo_trainer.informativeness.selectors.base import LayerView, Selector, register, selector_for
from lemo_trainer.informativeness.selectors.informativeness import InformativenessSelector
from lemo_trainer.informativeness.selectors.norm import NormSelector
from lemo_trainer.informativeness.selectors.predictor import PredictorSelector
from lemo_trainer.informativeness.selectors.random import RandomSelector
from lemo_trainer.informativeness.selectors.recency import RecencySelector

__all__ = [
    "InformativenessSelector",
    "LayerView",
    "NormSelector",
    "PredictorSelector",
    "RandomSelector",
    "RecencySelector",
    "Selector",
    "register",
    "selector_for",
]
