"""The interface of selectors, the view of a layer that they get, and their registration.

Shapes: B batch, S tokens, N whole blocks, P sampled tokens, I intermediate width, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from torch import Tensor, nn

from lemo_trainer.config import LemoConfig
from lemo_trainer.informativeness.predictors import PatternPredictors
from lemo_trainer.informativeness.selection import BlockPlan
from lemo_trainer.model.capture import AttentionInputs
from lemo_trainer.model.masks import valid_tokens
from lemo_trainer.registry import AUTO, SELECTORS, SelectorTraits


class LayerView:
    """A decoder layer and a batch in front of its attention or its MLP, as a selector sees them.

    Args:
        x_BSD: the residual stream.
        mask_B1SS: the layer's attention mask, bool or additive; None is plain causal.
        plan: how many blocks will be kept, of which size, in which layer.
        project: computes what `attention_inputs` returns; None in front of the MLP.
        intermediate: computes what `mlp_intermediate` returns; None in front of the attention.
    """

    def __init__(
        self,
        x_BSD: Tensor,
        mask_B1SS: Tensor | None,
        plan: BlockPlan,
        *,
        project: Callable[[], AttentionInputs] | None = None,
        intermediate: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.x_BSD, self.mask_B1SS, self.plan = x_BSD, mask_B1SS, plan
        self._project, self._intermediate = project, intermediate
        self.projected: AttentionInputs | None = None

    @property
    def valid_BS(self) -> Tensor | None:
        """Bool [B, S], False at padding; None when every token counts."""
        return valid_tokens(self.mask_B1SS)

    def attention_inputs(self) -> AttentionInputs:
        """Queries, keys and values of all tokens; a layer that needs them too does not compute them again."""
        assert self._project is not None, "queries and keys exist only in front of the attention"
        if self.projected is None:
            self.projected = self._project()
        return self.projected

    def mlp_intermediate(self, positions_P: Tensor) -> Tensor:
        """Intermediate activations [B, P, I] of the tokens at these positions."""
        assert self._intermediate is not None, "intermediates exist only in front of the MLP"
        return self._intermediate(positions_P)


class Selector(SelectorTraits):
    """Ranks blocks for one model: of the blocks of a sample, those with the highest scores are kept.

    A subclass sets the attributes of `SelectorTraits` and overrides `attention_scores`, or `segment_order` if
    `modes` has "segments". Scores are computed without gradient, once for each choice.

    Attributes:
        config: the configuration in force.
        predictors: trained nets that the scores come from, which `LemoReport` shows; None without.
    """

    predictors: PatternPredictors | None = None

    def __init__(self, config: LemoConfig) -> None:
        self.config = config

    def prepare(self, model: nn.Module, layers: tuple[int, ...]) -> None:
        """Load what the scores of these decoder layers need, before `model` is patched.

        Raises:
            ValueError, FileNotFoundError: the model, or a file that belongs to it, does not fit.
        """

    def attention_scores(self, view: LayerView) -> Tensor:
        """Scores [B, N] of the whole blocks, for the choice of an attention, or of a layer under detach."""
        raise NotImplementedError

    def mlp_scores(self, view: LayerView) -> Tensor:
        """Scores [B, N] for the choice of an MLP (`mode="eliminate"`); those of the attention by default."""
        return self.attention_scores(view)

    def segment_order(self, segments: int) -> list[int]:
        """The numbers of a sample's segments, the last ones to be kept first (`mode="segments"`)."""
        raise NotImplementedError

    def at_step(self, step: int) -> None:
        """Follow the schedule: `step` is the number of optimizer steps done."""

    def metrics(self) -> dict[str, float]:
        """Numbers for the training log, by name."""
        return {}

    def save(self, folder: Path, model: nn.Module) -> None:
        """Write what a resumed run or another one needs into `folder`, beside a checkpoint of `model`."""

    @classmethod
    def resume(cls, config: LemoConfig, checkpoint: Path) -> LemoConfig:
        """`config` for a run that resumes from `checkpoint`, into which `save` has written."""
        return config


AnySelector = TypeVar("AnySelector", bound=type[Selector])


def register(name: str) -> Callable[[AnySelector], AnySelector]:
    """Class decorator: let `LemoConfig(selector=name)` mean this subclass of `Selector`.

    Raises:
        ValueError: another class has this name, or it is "auto".
    """

    def decorate(selector: AnySelector) -> AnySelector:
        known = SELECTORS.get(name)
        same = known is not None and (known.__module__, known.__qualname__) == (
            selector.__module__,
            selector.__qualname__,
        )
        if name == AUTO or (known is not None and not same):
            raise ValueError(f"A selector must have a name of its own, got {name!r}, which is in use.")
        SELECTORS[name] = selector
        return selector

    return decorate


def selector_for(config: LemoConfig) -> Selector:
    """The selector that a configuration names."""
    return cast(type[Selector], SELECTORS[config.resolved_selector])(config)
