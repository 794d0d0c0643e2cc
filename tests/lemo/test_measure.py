from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lemo_trainer.layers.checkpointing import saving_matmuls
from lemo_trainer.measure import ActivationBytes, FlopCounter, peak_rss_bytes


def count_flops(step):
    with FlopCounter() as counter:
        step()
    return counter.flops


def test_activation_bytes_are_those_that_wait_for_the_backward_pass():
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(3, 8, requires_grad=True)
    with ActivationBytes() as activations:
        loss = (layer(x).exp().view(8, 3) * 2).sum()  # saves the exponential, x and the weight
        assert activations.peak_bytes == 2 * 3 * 8 * 4 + 4  # the exponential, its double and the loss
        assert activations.bytes == 3 * 8 * 4 + 4
        loss.backward()
        del loss
    assert activations.saved_bytes == 3 * 8 * 4 + 4 + 4  # and the gradient of the loss
    assert activations.bytes == layer.weight.grad.nbytes + x.grad.nbytes


def test_activation_bytes_see_what_selective_checkpointing_caches():
    layer = nn.Linear(100, 8, bias=False)
    x = torch.randn(3, 100, requires_grad=True)
    with ActivationBytes() as activations:
        loss = saving_matmuls(lambda x: layer(x).exp().tanh().sum(), x)
        assert activations.bytes == 3 * 8 * 4 + 4  # the product and the loss
    loss.backward()
    assert x.grad is not None


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_the_cpu_is_counted_forward_and_backward(causal):
    heads, seq_len, width = 2, 64, 16
    q, k, v = (torch.randn(1, heads, seq_len, width, requires_grad=True) for _ in range(3))

    def forward():
        functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def step():
        functional.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()

    pairs = seq_len * (seq_len + 1) // 2 if causal else seq_len**2
    product = 2 * heads * pairs * width
    assert count_flops(forward) == 2 * product
    assert count_flops(step) == 7 * product  # the backward recomputes the map: five products


def test_recomputation_is_counted():
    layer = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.randn(3, 8, requires_grad=True)
    plain = count_flops(lambda: layer(x).sum().backward())
    forward = count_flops(lambda: layer(x))
    again = count_flops(
        lambda: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    )
    assert plain + forward // 2 <= again <= plain + forward


def test_peak_memory_is_that_of_a_process_with_torch_in_it():
    assert 50e6 < peak_rss_bytes() < 1e12
