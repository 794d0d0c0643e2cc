"""selector="predictor": scores that trained nets predict (LeMo, section 4), without queries and keys."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from torch import Tensor, nn

from lemo_trainer.compat import unwrap
from lemo_trainer.config import LemoConfig
from lemo_trainer.informativeness.predictor_files import (
    base_fingerprint,
    has_predictors,
    load_predictors,
    save_predictors,
)
from lemo_trainer.informativeness.scores import map_scores
from lemo_trainer.informativeness.selectors.base import LayerView, register
from lemo_trainer.informativeness.selectors.informativeness import InformativenessSelector

logger = logging.getLogger(__name__)


@register("predictor")
class PredictorSelector(InformativenessSelector):
    """The block map that a layer's nets predict; the exact one while they are refreshed or distrusted."""

    summary = "nets that predict the paper's scores, trained for this model by `lemo predict-train`"
    options = ("predictors", "predictor_refresh", "predictor_recall")
    searchable = False
    stand_in = "informativeness"

    def prepare(self, model: nn.Module, layers: tuple[int, ...]) -> None:
        """Load the predictors of `config.predictors`, or of the model's own folder, onto the model's device.

        Raises:
            FileNotFoundError, ValueError: see `load_predictors`; or they are for other blocks or layers.
        """
        config = self.config
        folder = config.predictors or unwrap(model).config.name_or_path
        predictors = load_predictors(folder, model)
        missing = [layer for layer in layers if layer not in predictors.layers]
        if missing or predictors.block_size != config.block_size:
            raise ValueError(
                f"The predictors in {folder} must be for blocks of {config.block_size} tokens and layers "
                f"{list(layers)}, got blocks of {predictors.block_size} and layers {list(predictors.layers)}."
            )
        predictors.refresh_steps = config.predictor_refresh
        predictors.least_recall = config.predictor_recall
        weak = [i for i in layers if predictors.recall.get(i, 1.0) < config.predictor_recall]
        if weak:
            predictors.distrusted.update(weak)
            logger.warning(
                "Layers %s use exact scores: the recall of their predictors is below `predictor_recall` "
                "%.0f%%.",
                weak,
                100 * config.predictor_recall,
            )
        self.predictors = predictors.to(next(unwrap(model).parameters()).device)

    def attention_scores(self, view: LayerView) -> Tensor:
        assert self.predictors is not None, "`prepare` loads the predictors"
        layer, x_BSD, mask_B1SS = view.plan.layer, view.x_BSD, view.mask_B1SS
        if self.predictors.needs_exact(layer):
            map_BMN = self.exact_map(view)
            self.predictors.refresh(layer, x_BSD, mask_B1SS, map_BMN, view.plan.kept_blocks)
        else:
            map_BMN = self.predictors.pooled_map(layer, x_BSD, mask_B1SS)
        return map_scores(map_BMN, causal_scores=self.config.causal_scores)

    def at_step(self, step: int) -> None:
        if self.predictors is not None:
            self.predictors.at_step(step)

    def metrics(self) -> dict[str, float]:
        """The recall of each layer, where a refresh measures it."""
        if self.predictors is None or not self.config.predictor_refresh:
            return {}
        return {f"lemo_recall/layer_{i}": round(r, 4) for i, r in self.predictors.recall.items()}

    def save(self, folder: Path, model: nn.Module) -> None:
        if self.predictors is not None:
            save_predictors(self.predictors, folder, base_fingerprint(model))

    @classmethod
    def resume(cls, config: LemoConfig, checkpoint: Path) -> LemoConfig:
        if not has_predictors(checkpoint):
            return config
        return dataclasses.replace(config, predictors=str(checkpoint))
