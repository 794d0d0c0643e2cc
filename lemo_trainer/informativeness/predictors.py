"""Pattern predictors: small nets that predict a layer's block map from its input (LeMo, section 4).

Each layer has one net for queries and one for keys. A net is three low-rank matrices
with ReLU between them: the first on each token, the second on a block's tokens, the third on the block,

    h = relu(norm(x) W1);   g = relu(flatten(h) W2);   P(x) = g W3
    I'(m, n) = softplus(a * P_Q(x)_m . P_K(x)_n / r3 + b)        for n <= m, else 0

`design="paper"` flattens, as above. `design="max"`, the default, applies W2 to each token and takes the
maximum over the block instead of flattening: it has fewer weights, and the position inside a block makes no
difference.

Shapes: B batch, S tokens, N whole blocks, M blocks with a partial one, D hidden width, r1, r2, r3 ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lemo_trainer.informativeness.scores import map_scores
from lemo_trainer.model.masks import allowed_blocks

logger = logging.getLogger(__name__)


Design = Literal["paper", "max"]
RANKS = (32, 32, 32)
_TEMPERATURE = 0.1


class BlockNet(nn.Module):
    """The net for queries or for keys: block embeddings [B, N, r3] of the residual stream."""

    def __init__(self, design: Design, block_size: int, width: int, ranks: tuple[int, int, int]) -> None:
        super().__init__()
        r1, r2, r3 = ranks
        self.design, self.block_size = design, block_size
        inner = r1 * block_size if design == "paper" else r1
        self.first = nn.Parameter(torch.randn(width, r1) * width**-0.5)
        self.second = nn.Parameter(torch.randn(inner, r2) * (2 / inner) ** 0.5)
        self.third = nn.Parameter(torch.randn(r2, r3) * (2 / r2) ** 0.5)
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, N, r3] float32 of the whole blocks of any floating `x_BSD`."""
        whole = x_BSD.shape[1] // self.block_size * self.block_size
        x_BSD = x_BSD[:, :whole]
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        norm_BS1 = torch.linalg.vector_norm(x_BSD, dim=-1, keepdim=True, dtype=wide).float()
        scale_BS1 = x_BSD.shape[-1] ** 0.5 / norm_BS1.clamp(min=1e-6)
        h_BSr = ((x_BSD @ self.first.to(x_BSD.dtype)).float() * scale_BS1).relu()
        h_BNtr = h_BSr.unflatten(1, (-1, self.block_size))
        if self.design == "paper":
            g_BNr = (h_BNtr.flatten(2) @ self.second).relu()
        else:
            g_BNr = (h_BNtr @ self.second).amax(2).relu()
        if self.training:
            self._note(h_BSr.detach().amax((0, 1)), g_BNr.detach().amax((0, 1)))
        return g_BNr @ self.third

    def _note(self, *largest: Tensor) -> None:
        """Record the largest value of each hidden unit since the last `prune`."""
        if self.seen is not None:
            largest = tuple(torch.maximum(*pair) for pair in zip(self.seen, largest, strict=True))
        self.seen = (largest[0], largest[1])

    @torch.no_grad()
    def prune(self, seen: tuple[Tensor, Tensor]) -> int:
        """Prune the hidden units whose largest value is 0, but keep one unit; returns the number pruned."""
        self.seen = None
        alive = [torch.where(largest > 0)[0] for largest in seen]
        alive = [units if len(units) else units.new_zeros(1) for units in alive]
        pruned = sum(len(largest) - len(units) for largest, units in zip(seen, alive, strict=True))
        if pruned:
            first, second = alive
            rows = self.second.unflatten(0, (-1, len(seen[0])))[:, first].flatten(0, 1)
            self.first = nn.Parameter(self.first[:, first].contiguous())
            self.second = nn.Parameter(rows[:, second].contiguous())
            self.third = nn.Parameter(self.third[second].contiguous())
        return pruned


class PatternPredictor(nn.Module):
    """The two nets of a layer.

    Args:
        design: "paper" or "max", see the module's docstring.
        block_size: tokens of a block.
        width: hidden width of the model.
        ranks: r1, r2 and r3.
    """

    def __init__(
        self, design: Design, block_size: int, width: int, ranks: tuple[int, int, int] = RANKS
    ) -> None:
        super().__init__()
        self.query = BlockNet(design, block_size, width, ranks)
        self.key = BlockNet(design, block_size, width, ranks)
        self.affine = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x_BSD: Tensor, mask_B1SS: Tensor | None = None) -> Tensor:
        """The predicted map [B, N, N] float32 of the whole blocks, 0 where no query may look at a key."""
        q_BNr, k_BNr = self.query(x_BSD), self.key(x_BSD)
        scale, bias = self.affine
        map_BNN = F.softplus(scale * (q_BNr @ k_BNr.transpose(1, 2)) / q_BNr.shape[2] + bias)
        if mask_B1SS is None:
            return map_BNN.tril()
        return map_BNN * allowed_blocks(mask_B1SS, self.query.block_size)

    def loss(self, x_BSD: Tensor, mask_B1SS: Tensor | None, exact_BMN: Tensor) -> tuple[Tensor, Tensor]:
        """The distance of the predicted map from the exact one, and the predicted map.

        The distance has three parts: the squared differences of the logarithms of the maps' entries and of
        their column sums, and the cross entropy of a block's being in the upper half of the columns. All are
        relative, so that layers of any scale weigh alike.
        """
        predicted_BNN = self(x_BSD, mask_B1SS)
        exact_BNN = exact_BMN[:, : predicted_BNN.shape[1]]
        floor = 0.01 * exact_BNN.mean() + 1e-6
        entries = (predicted_BNN > 0) & (exact_BNN > 0)
        difference = ((predicted_BNN + floor).log() - (exact_BNN + floor).log()).square()
        entry_loss = (difference * entries).sum() / entries.sum().clamp(min=1)
        predicted_BN = (map_scores(predicted_BNN) + floor).log()
        exact_BN = (map_scores(exact_BNN) + floor).log()
        upper_BN = (exact_BN > exact_BN.median(1, keepdim=True).values).float()
        logits_BN = (predicted_BN - predicted_BN.median(1, keepdim=True).values) / _TEMPERATURE
        rank_loss = F.binary_cross_entropy_with_logits(logits_BN, upper_BN)
        return rank_loss + F.mse_loss(predicted_BN, exact_BN) + 0.1 * entry_loss, predicted_BNN


def recall_at_kept(predicted_BN: Tensor, exact_BN: Tensor, kept_blocks: int) -> float:
    """Share of the `kept_blocks` highest exact scores that are among as many highest predicted ones."""
    kept_blocks = max(kept_blocks, 1)
    shape = torch.zeros_like(exact_BN, dtype=torch.bool)
    chosen = (shape.scatter(1, s.topk(kept_blocks, 1).indices, True) for s in (predicted_BN, exact_BN))
    both_BN = torch.logical_and(*chosen)
    return both_BN.sum().item() / (len(both_BN) * kept_blocks)


class PatternPredictors(nn.Module):
    """The predictors of a model's layers, with the recall of each.

    They are no modules of the model, so that they stay out of its state dict, PEFT and FSDP.

    Args:
        layers: indices of the decoder layers that have a predictor.
        design, block_size, width, ranks: those of `PatternPredictor`.

    Attributes:
        recall: by layer, the share of the exactly chosen blocks that its predictor chose too: measured on
            held-out text after training, then a running mean over the refreshes.
        refreshing: whether every layer scores exactly in this step and its predictor learns from it.
        distrusted: layers that went back to exact scores because their recall fell below `least_recall`.
    """

    def __init__(
        self,
        layers: Iterable[int],
        *,
        design: Design = "max",
        block_size: int = 64,
        width: int,
        ranks: tuple[int, int, int] = RANKS,
    ) -> None:
        super().__init__()
        self.design, self.block_size, self.width = design, block_size, width
        nets = {str(layer): PatternPredictor(design, block_size, width, ranks) for layer in sorted(layers)}
        self.nets = nn.ModuleDict(nets)
        self.recall: dict[int, float] = {}
        self.refreshing = False
        self.distrusted: set[int] = set()
        self.refresh_steps, self.least_recall, self.lr = 0, 0.0, 1e-3
        self._optimizers: dict[int, torch.optim.Optimizer] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """Sorted indices of the layers that have a predictor."""
        return tuple(sorted(int(layer) for layer in self.nets))

    def of(self, layer: int) -> PatternPredictor:
        net = self.nets[str(layer)]
        assert isinstance(net, PatternPredictor)
        return net

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a state dict of `nets`, whose shapes differ from the present ones if nets were pruned."""
        for name, parameter in self.nets.named_parameters():
            parameter.data = tensors[name]
        self.nets.load_state_dict(dict(tensors))

    def at_step(self, step: int) -> None:
        """Refresh in every `refresh_steps`-th optimizer step."""
        self.refreshing = bool(self.refresh_steps) and step % self.refresh_steps == 0

    def needs_exact(self, layer: int) -> bool:
        """Whether `layer` must score exactly in this step."""
        return self.refreshing or layer in self.distrusted

    @torch.no_grad()
    def pooled_map(self, layer: int, x_BSD: Tensor, mask_B1SS: Tensor | None) -> Tensor:
        """The predicted map [B, N, N] float32 of a layer's input; `mask_B1SS` as the layer gets it."""
        with torch.autocast(x_BSD.device.type, enabled=False):
            return self.of(layer).eval()(x_BSD, mask_B1SS)

    def refresh(
        self, layer: int, x_BSD: Tensor, mask_B1SS: Tensor | None, exact_BMN: Tensor, kept_blocks: int
    ) -> None:
        """Train a layer's predictor for one step on the exact map of this batch, in a refreshing step.

        A layer whose running mean of the recall falls below `least_recall` is distrusted from then on.
        """
        if not self.refreshing or layer in self.distrusted:
            return
        net = self.of(layer).train()
        if layer not in self._optimizers:
            self._optimizers[layer] = torch.optim.AdamW(net.parameters(), lr=self.lr)
        with torch.enable_grad(), torch.autocast(x_BSD.device.type, enabled=False):
            loss, predicted_BNN = net.loss(x_BSD.detach(), mask_B1SS, exact_BMN)
            loss.backward()
        self._optimizers[layer].step()
        self._optimizers[layer].zero_grad()
        recall = recall_at_kept(map_scores(predicted_BNN), map_scores(exact_BMN), kept_blocks)
        self.recall[layer] = 0.5 * self.recall.get(layer, recall) + 0.5 * recall
        if self.recall[layer] < self.least_recall:
            self.distrusted.add(layer)
            logger.warning(
                "Layer %d goes back to exact scores: its predictor found %.0f%% of the blocks that they "
                "choose, fewer than `predictor_recall` %.0f%%.",
                layer,
                100 * self.recall[layer],
                100 * self.least_recall,
            )
