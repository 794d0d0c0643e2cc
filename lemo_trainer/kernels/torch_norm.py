"""Reference of norms of chosen rows. Legend: N rows of the stream, M chosen rows, D hidden width."""

from __future__ import annotations

import torch
from torch import Tensor


def _chosen(x_ND: Tensor, rows_M: Tensor | None) -> Tensor:
    return x_ND if rows_M is None else x_ND.index_select(0, rows_M)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def forward(
    x_ND: Tensor, rows_M: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The normed rows [M, D], and in float32 the rows' means (LayerNorm's) and reciprocal deviations [M].

    Rounding is that of transformers' LlamaRMSNorm, which multiplies by the weight in the dtype of `x_ND`, and
    of torch's LayerNorm, which rounds last.
    """
    x = _chosen(x_ND, rows_M)
    if centred:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[1:], weight_D, bias_D, eps)
        return y, _wide(mean.squeeze(1)), _wide(rstd.squeeze(1))
    wide = _wide(x)
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype).mul_(weight_D), None, rstd.squeeze(1)


def backward(
    grad_MD: Tensor,
    x_ND: Tensor,
    rows_M: Tensor | None,
    weight_D: Tensor,
    mean_M: Tensor | None,
    rstd_M: Tensor,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the chosen rows [M, D], the weight [D] and the bias [D]; the last two only on demand."""
    x = _wide(_chosen(x_ND, rows_M))
    normed = (x if mean_M is None else x - mean_M[:, None]) * rstd_M[:, None]
    grad = _wide(grad_MD)
    grad_x = grad * _wide(weight_D)
    slope = torch.linalg.vecdot(grad_x, normed)[:, None] / x.shape[1]
    if mean_M is not None:
        grad_x -= grad_x.mean(-1, keepdim=True)
    grad_x = grad_x.addcmul_(normed, slope, value=-1.0).mul_(rstd_M[:, None]).to(x_ND.dtype)
    if not weight_gradient:
        return grad_x, None, None
    return grad_x, torch.linalg.vecdot(grad, normed, dim=0), grad.sum(0)
