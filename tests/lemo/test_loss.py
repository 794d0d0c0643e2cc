from __future__ import annotations

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from lemo_trainer.head.loss import segmented_cross_entropy, shift

B, S, C, V = 2, 37, 16, 51


def _problem(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(B, S, C, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, C, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, V, (B, S))
    labels[0, :7] = -100
    labels[1, 20:] = -100
    return hidden, weight, bias, labels


def _compare(loss_of, wanted_of, tensors, **tolerance):
    got = loss_of()
    got_gradients = torch.autograd.grad(got, tensors)
    wanted = wanted_of()
    torch.testing.assert_close(got, wanted, **tolerance)
    torch.testing.assert_close(got_gradients, torch.autograd.grad(wanted, tensors), **tolerance)


@pytest.mark.parametrize("segment", [1, 7, 64, 1000])
@pytest.mark.parametrize("num_items", [None, 11, torch.tensor(23)])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (0.5, 3.0)])
def test_equals_the_loss_of_transformers(segment, num_items, scale, softcap):
    hidden, weight, bias, labels = _problem()

    def wanted():
        logits = (hidden @ weight.T + bias) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return ForCausalLMLoss(logits, labels, V, num_items_in_batch=num_items)

    def got():
        return segmented_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            shift(labels).flatten(),
            bias_V=bias,
            segment=segment,
            num_items=num_items,
            scale=scale,
            softcap=softcap,
        )

    _compare(got, wanted, (hidden, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_weights_change_the_gradient_and_not_the_value(softcap):
    hidden, weight, bias, labels = _problem()
    weights = torch.randint(0, 3, (B, S)) / 2

    def loss(weights_N):
        return segmented_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            shift(labels).flatten(),
            bias_V=bias,
            weights_N=weights_N,
            segment=5,
            softcap=softcap,
        )

    def weighted():
        logits = hidden @ weight.T + bias
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        wanted = shift(labels).flatten()
        rows = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="none")
        return (rows * weights.flatten()).sum() / (wanted != -100).sum()

    torch.testing.assert_close(loss(weights.flatten()), loss(None))
    got = torch.autograd.grad(loss(weights.flatten()), (hidden, weight, bias))
    wanted = torch.autograd.grad(weighted(), (hidden, weight, bias))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_the_upstream_gradient_is_applied():
    hidden, weight, _, labels = _problem()
    weight = weight.detach()

    def got():
        return 3 * segmented_cross_entropy(hidden.flatten(0, 1), weight, shift(labels).flatten(), segment=8)

    _compare(got, lambda: 3 * ForCausalLMLoss(hidden @ weight.T, labels, V), (hidden,), rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_within_its_own_rounding_of_float32():
    hidden, weight, bias, labels = _problem(torch.bfloat16)

    def got():
        return segmented_cross_entropy(
            hidden.flatten(0, 1), weight, shift(labels).flatten(), bias_V=bias, segment=8
        )

    def wanted():
        return ForCausalLMLoss(hidden.float() @ weight.float().T + bias.float(), labels, V)

    _compare(got, wanted, (hidden, weight, bias), rtol=2e-2, atol=2e-2)


def test_nothing_of_vocabulary_width_is_saved():
    hidden, weight, _, labels = _problem()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        segmented_cross_entropy(
            hidden.flatten(0, 1), weight.detach(), shift(labels).flatten(), segment=8
        ).backward()
    assert saved == [(B * S, C)]


def test_without_labelled_rows_the_mean_is_nan_as_in_transformers():
    hidden, weight, _, labels = _problem()
    labels = torch.full_like(labels, -100)
    assert segmented_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten()).isnan()
