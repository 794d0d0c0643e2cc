from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lemo_trainer import LemoConfig, apply_lemo
from lemo_trainer.layers.stream import Streams
from lemo_trainer.model.rows import flat_rows

from .tiny import batch, lora, loss_and_gradients, tiny_model

INDEX = torch.tensor([[0, 2, 3], [1, 4, 6]])
ROWS = flat_rows(INDEX, 7)


def branch(x):
    return (2 * x).sin() * x


def run_layers(streams, x, layers=3, between=lambda x: x):
    """Two branches a layer, each on rows of its own."""
    layer = nn.Identity()
    for number in range(layers):
        stream = streams.enter(layer, x)
        stream.add(branch(stream.take(ROWS)), ROWS)
        other = (ROWS + number) % 14
        stream.add(branch(stream.take(other)), other)
        x = between(streams.leave(layer, stream))
    return x


def run_plainly(x, layers=3, between=lambda x: x):
    for number in range(layers):
        for rows in (ROWS, (ROWS + number) % 14):
            picked = x.flatten(0, 1)[rows]
            x = x.flatten(0, 1).index_add(0, rows, branch(picked)).view_as(x)
        x = between(x)
    return x


@pytest.mark.parametrize("in_place", [True, False])
def test_rows_are_taken_and_added_with_the_gradients_of_indexing(in_place):
    """With patched layers alone, dense ones between them, and gradients that are not contiguous."""

    def swapped(x):
        return (2 * x).transpose(0, 1).contiguous().transpose(0, 1)

    torch.manual_seed(0)
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    for between in (lambda x: x, lambda x: x + x.sin(), swapped):
        got = run_layers(Streams(in_place=in_place), x, between=between)
        wanted = run_plainly(x, between=between)
        torch.testing.assert_close(got, wanted)
        gradients = (torch.autograd.grad(y, x, weights) for y in (got, wanted))
        torch.testing.assert_close(*gradients)
    assert torch.autograd.gradcheck(
        lambda x: run_layers(Streams(in_place=in_place), x), x[..., :2].detach().requires_grad_()
    )


def test_a_gradient_that_others_hold_stays_as_it_is():
    x = torch.randn(2, 7, 5, requires_grad=True)
    given = torch.ones(2, 7, 5)
    y = run_layers(Streams(), x)
    beside = torch.zeros(2, 7, 5, requires_grad=True)
    y.retain_grad()
    (y + beside).backward(given, inputs=[x, beside, y])
    for gradient in (given, beside.grad, y.grad):
        torch.testing.assert_close(gradient, torch.ones(2, 7, 5))


def test_a_stream_is_overwritten_only_where_the_layer_before_made_it():
    layer, streams = nn.Identity(), Streams()
    x = torch.zeros(2, 7, 5)
    first = streams.leave(layer, streams.enter(layer, x))
    assert first is not x
    assert streams.enter(layer, first).x_BSD is first
    assert streams.enter(layer, first).x_BSD is not first  # it was handed on once
    again = streams.leave(layer, streams.enter(layer, x))
    hook = layer.register_forward_pre_hook(lambda *_: None)
    assert streams.enter(layer, again).x_BSD is not again
    hook.remove()
    layer.register_forward_hook(lambda *_: None)
    again = streams.leave(layer, streams.enter(layer, x))
    assert streams.enter(layer, again).x_BSD is not again
    layer = nn.Identity()
    kept = Streams(in_place=False)
    again = kept.leave(layer, kept.enter(layer, x))
    assert kept.enter(layer, again).x_BSD is not again


def test_what_was_saved_of_an_overwritten_stream_is_an_error_not_a_wrong_gradient():
    layer, streams = nn.Identity(), Streams()
    x = torch.randn(2, 7, 5, requires_grad=True)
    y = streams.leave(layer, streams.enter(layer, x))
    square = y.square().sum()
    run_layers(streams, y, layers=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.parametrize("mode", ["detach", "eliminate"])
def test_hidden_states_that_were_asked_for_are_those_of_their_layer(mode):
    inputs = batch("plain", seq_len=45)
    config = LemoConfig(mode=mode, keep_ratio=0.4, block_size=4, layers="all", selector="recency")
    model = tiny_model()
    apply_lemo(model, config)
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    hidden = model(**inputs, output_hidden_states=True).hidden_states[1:-1]
    assert len(hidden) == 2
    for got, wanted in zip(hidden, seen[:2], strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def full_size_allocations(function, size):
    """Names of the operations that allocated at least `size` bytes at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return [event.name for event in profiler.events() if event.self_cpu_memory_usage >= size]


@pytest.mark.parametrize("mode", ["detach", "eliminate"])
def test_no_full_size_temporary_is_allocated(mode):
    """A layer more costs no allocation of the stream's size, forward or backward."""
    seq_len, width = 64, 512
    counts = {}
    for layers in (2, 3):
        model = lora(tiny_model(layers=layers, hidden_size=width))
        config = LemoConfig(mode=mode, keep_ratio=0.5, block_size=4, layers="all", selector="recency")
        apply_lemo(model, config)
        model.enable_input_require_grads()
        inputs = batch("plain", size=1, seq_len=seq_len)
        counts[layers] = full_size_allocations(
            lambda model=model, inputs=inputs: loss_and_gradients(model, inputs), seq_len * width * 4
        )
    assert counts[2]
    assert counts[2] == counts[3]
