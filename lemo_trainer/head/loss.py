"""Segment-wise language-model head and loss: no tensor of vocabulary width outlives its segment.

The paper's segment-based peak cutting (LeMo, section 5). Each segment of tokens goes through the head, the
cross entropy and its gradient before the next one starts, so the step keeps one [N, C] gradient instead of
[N, V] logits, their float32 copy and their softmax.

Shapes: N tokens, C hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lemo_trainer.compat import first_gradients_only

IGNORE_INDEX = -100


class _SegmentedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of all rows with a label, divided by `denominator`.

    The forward pass computes the gradients, while a segment's logits exist; the backward pass scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        weights_N: Tensor | None,
        denominator: Tensor,
        segment: int,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden_NC = torch.zeros_like(hidden_NC) if want_hidden else None
        grad_weight_VC = torch.zeros_like(weight_VC, dtype=torch.float32) if want_weight else None
        grad_bias_V = weight_VC.new_zeros(len(weight_VC), dtype=torch.float32) if want_bias else None
        total = hidden_NC.new_zeros((), dtype=torch.float32)

        labelled = labels_N != IGNORE_INDEX
        weighty = labelled if weights_N is None else labelled & (weights_N > 0)
        segments = [(rows, True) for rows in weighty.nonzero().squeeze(1).split(segment)]
        if weights_N is not None:
            weightless = (labelled & ~weighty).nonzero().squeeze(1)
            segments += [(rows, False) for rows in weightless.split(segment)]
        for rows, differentiated in segments:
            h_nC = hidden_NC.index_select(0, rows)
            target_n1 = labels_N.index_select(0, rows).unsqueeze(1)
            logits_nV = nn.functional.linear(h_nC, weight_VC, bias_V).float()
            if scale != 1.0:
                logits_nV *= scale
            if softcap is not None:
                logits_nV.div_(softcap).tanh_().mul_(softcap)
            max_n1 = logits_nV.amax(1, keepdim=True)
            slope_nV = None if softcap is None else 1 - (logits_nV / softcap).square_()
            logits_nV.sub_(max_n1)
            target_logit_n1 = logits_nV.gather(1, target_n1)
            sum_n1 = logits_nV.exp_().sum(1, keepdim=True)
            total += (sum_n1.log() - target_logit_n1).sum()
            if not differentiated or not any(ctx.needs_input_grad[:3]):
                continue
            factor = scale / denominator
            if weights_N is not None:
                factor = factor * weights_N.index_select(0, rows).unsqueeze(1)
            grad_nV = logits_nV.mul_(factor / sum_n1)
            grad_nV.scatter_add_(1, target_n1, -factor.expand_as(sum_n1))
            if slope_nV is not None:
                grad_nV *= slope_nV
            grad_nV = grad_nV.to(hidden_NC.dtype)
            if grad_hidden_NC is not None:
                grad_hidden_NC.index_copy_(0, rows, grad_nV @ weight_VC)
            if grad_weight_VC is not None:
                grad_weight_VC += grad_nV.T @ h_nC
            if grad_bias_V is not None:
                grad_bias_V += grad_nV.sum(0)

        ctx.save_for_backward(grad_hidden_NC, grad_weight_VC, grad_bias_V)
        ctx.dtypes = hidden_NC.dtype, weight_VC.dtype
        return total / denominator

    @staticmethod
    @first_gradients_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_dtype, weight_dtype = ctx.dtypes
        grad_hidden, grad_weight, grad_bias = (
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(
                ctx.saved_tensors, (hidden_dtype, weight_dtype, weight_dtype), strict=True
            )
        )
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def segmented_cross_entropy(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    weights_N: Tensor | None = None,
    segment: int = 256,
    num_items: Tensor | int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Cross entropy of `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`, segment by segment.

    Args:
        hidden_NC: [N, C], any floating dtype; the logits of a segment are computed in float32 from it.
        weight_VC: [V, C] in the dtype of `hidden_NC`.
        labels_N: [N] int64, already shifted; rows labelled -100 are neither computed nor counted.
        bias_V: [V] or None.
        weights_N: [N] factors on the gradients of the rows' losses, at least 0; the value of the loss stays
            the unweighted one. None is 1 for all.
        segment: rows whose logits exist at the same time.
        num_items: divisor of the summed loss (the Trainer's `num_items_in_batch`); None is the number of
            labelled rows, which gives the mean.
        scale: factor on the logits (Granite's 1 / `logits_scaling`).
        softcap: Gemma 2's `final_logit_softcapping`; None does not cap.

    Returns:
        A float32 scalar with gradients for hidden, weight and bias.
    """
    if num_items is None:
        num_items = (labels_N != IGNORE_INDEX).sum()
    denominator = torch.as_tensor(num_items, dtype=torch.float32, device=hidden_NC.device)
    loss: Tensor = _SegmentedCrossEntropy.apply(
        hidden_NC, weight_VC, bias_V, labels_N, weights_N, denominator, segment, scale, softcap
    )
    return loss


def shift(labels_BS: Tensor) -> Tensor:
    """Labels [B, S] moved one to the left, so that position i holds the token after i; the last gets -100."""
    return nn.functional.pad(labels_BS, (0, 1), value=IGNORE_INDEX)[:, 1:]
