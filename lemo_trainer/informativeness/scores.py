"""Block informativeness: how much a block of tokens matters to a layer's attention and to its MLP.

Attention (LeMo, section 3). With S = scaling * Q K^T before softmax, Q and K as the attention uses them
(normed, rotated, grouped heads shared), and only pairs that the attention mask allows,

    I(m, n) = max over queries i of block m, keys j of block n of (1 / H) * sum over heads of max(S_ij, 0)
    score(n) = sum over m of I(m, n)

The paper takes the maximum over all queries; a maximum over some evenly spaced ones of each block estimates
it.

MLP. With z the intermediate activation (the input of the last projection; act(gate) * up in gated MLPs),

    score(n) = mean over tokens of block n of mean over the width of |z|

Q, K and z come from the model's own modules (`lemo_trainer.model.capture`). No S x S map is ever held:
queries are scored a few blocks at a time.

Shapes: B batch, S tokens, P scored queries, H query heads, G key heads, d head width, N whole blocks,
M blocks with a partial one, D hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lemo_trainer.model.capture import AttentionInputs
from lemo_trainer.model.masks import allowed_pairs

QUERY_ROWS = 256  # queries scored at a time, rounded to whole blocks


def query_positions(seq_len: int, block_size: int, count: int, device: torch.device) -> Tensor:
    """Positions [M * c] of c = min(count, block_size) evenly spaced queries in each of the M blocks.

    Each is the last of its stretch, which sees the most keys. A partial block at the end repeats its last
    one.
    """
    count = min(count, block_size)
    offsets = torch.arange(1, count + 1, device=device) * block_size // count - 1
    blocks = torch.arange(-(-seq_len // block_size), device=device)[:, None]
    return (blocks * block_size + offsets).flatten().clamp(max=seq_len - 1)


@torch.no_grad()
def pooled_map(
    q_BHPd: Tensor,
    k_BGSd: Tensor,
    scaling: float,
    mask_B1SS: Tensor | None,
    block_size: int,
    positions_P: Tensor,
) -> Tensor:
    """I(m, n) of the module's docstring, [B, M, N] float32, 0 above the diagonal.

    M blocks of queries, a partial one included, and N whole blocks of keys.

    Args:
        q_BHPd: the queries at `positions_P`, block after block, as many in each.
        mask_B1SS: the layer's attention mask, bool or additive; None is plain causal.
    """
    batch, heads, _, width = q_BHPd.shape
    groups, seq_len = k_BGSd.shape[1:3]
    blocks = -(-seq_len // block_size)
    count = len(positions_P) // blocks
    step = max(1, QUERY_ROWS // count)
    map_BMN = torch.zeros(batch, blocks, blocks, device=q_BHPd.device)
    for first in range(0, blocks, step):
        rows = slice(first * count, (first + step) * count)
        stop = min((first + step) * block_size, seq_len)
        q, positions = q_BHPd[:, :, rows].reshape(batch, groups, -1, width), positions_P[rows]
        map_Brs = (q @ k_BGSd[:, :, :stop].transpose(2, 3)).relu_().view(batch, heads, -1, stop)
        map_Brs = map_Brs.sum(1, dtype=torch.float32).mul_(scaling / heads)
        if mask_B1SS is None:
            map_Brs *= torch.arange(stop, device=positions.device) <= positions[:, None]
        else:
            map_Brs *= allowed_pairs(mask_B1SS[:, 0, :, :stop].index_select(1, positions))
        map_Brs = nn.functional.pad(map_Brs, (0, -stop % block_size))
        pooled = map_Brs.unflatten(1, (-1, count)).unflatten(3, (-1, block_size)).amax((2, 4))
        map_BMN[:, first : first + step, : pooled.shape[2]] = pooled
    return map_BMN[:, :, : seq_len // block_size]


def attention_map(inputs: AttentionInputs, mask_B1SS: Tensor | None, block_size: int, queries: int) -> Tensor:
    """I(m, n) of the module's docstring from `queries` queries of each block: [B, M, N] float32."""
    positions_P = query_positions(inputs.key.shape[2], block_size, queries, inputs.key.device)
    q_BHPd = inputs.query.index_select(2, positions_P)
    return pooled_map(q_BHPd, inputs.key, inputs.scaling, mask_B1SS, block_size, positions_P)


def map_scores(map_BMN: Tensor, *, causal_scores: bool = False) -> Tensor:
    """score(n) of a block map [B, M, N]: its column sums, [B, N].

    Args:
        causal_scores: I(n, n) alone, without the queries of later blocks.
    """
    return map_BMN.diagonal(dim1=1, dim2=2) if causal_scores else map_BMN.sum(1)


def score_positions(blocks: int, block_size: int, count: int, device: torch.device) -> Tensor:
    """Positions [N * c] of c = min(count, block_size) evenly spaced tokens in each of the whole blocks."""
    count = min(count, block_size)
    offsets = torch.arange(count, device=device) * block_size // count
    return (torch.arange(blocks, device=device)[:, None] * block_size + offsets).flatten()


@torch.no_grad()
def mlp_scores(intermediate_BPI: Tensor, valid_BP: Tensor | None, blocks: int) -> Tensor:
    """Mean magnitude per block, [B, N] float32, from P = N * c sampled tokens; padding does not count.

    Args:
        intermediate_BPI: intermediate activations of the sampled tokens, block after block.
        valid_BP: False at padding; None without padding.
    """
    token_BP = intermediate_BPI.abs().mean(-1, dtype=torch.float32)
    if valid_BP is None:
        return token_BP.unflatten(1, (blocks, -1)).mean(-1)
    counts = valid_BP.unflatten(1, (blocks, -1)).sum(-1)
    return (token_BP * valid_BP).unflatten(1, (blocks, -1)).sum(-1) / counts.clamp(min=1)
