"""Programs like those of public bug reports of torch.compile, each with a second call of another shape.

They are named after issues of pytorch/pytorch, whose subject they share; the programs are our own.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from tests.ollie.strategies import FORCED

pytestmark = pytest.mark.usefixtures("fresh", "always_rewrite", "uncompiled")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Scaled(torch.autograd.Function):
    """Multiplies, with a gradient that is three times too large."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient * weight * 3, None


class Parts(nn.Module):
    """The weights that the programs below share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(6, 6)
        self.odd = nn.Conv1d(8, 5, 1)  # whose weight lies in memory as one of images, channels last
        weight = self.odd.weight.data.view(5, 8, 1, 1).to(memory_format=torch.channels_last)
        self.odd.weight.data = weight.view(5, 8, 1)
        self.table = nn.Embedding(8, 6)
        self.more = nn.Parameter(random(6, 3))


def duplicates_138908(net, x, y):
    index, y = x + 10, y * 1.0
    y[index] += y[index]
    return y @ net.linear.weight + y @ net.linear.weight.T


def sine_in_place_183894(net, x):
    x.sin_()
    return net.conv(x), x.transpose(2, 3).argmin()


def view_of_an_input_111133(net, x, added, index):
    y = x.permute(1, 0)
    y.index_add_(0, index, added)
    return y, net.linear(y.T), x


def input_after_its_use_94777(net, x):
    y, z = net.conv(x.abs() + 1).exp(), torch.log(x.abs())
    x.abs_().log_()
    return y, z, x


def unsqueezed_input_93259(net, x):
    y = x.unsqueeze_(0)
    return net.conv(y), y


def strides_of_channels_last_174963(net, x):
    y = torch.roll(x, -1, 0)
    return torch.as_strided(y, (5, 10), (4, 1), 0), net.conv(x[:, :3])


def norm_with_weights_100970(net, x):
    y, weight = net.conv(x), net.more[0, 0] * torch.arange(1.0, 5.0)
    return F.batch_norm(y, torch.zeros(4), torch.ones(4), weight, weight * 2)


def odd_weight_strides_124256(net, x):
    return net.odd(x)


def complex_views_122457(net, x):
    z = torch.view_as_complex((net.linear(x) + 1).view(-1, 3, 2))
    return torch.view_as_real(z) + 1, torch.view_as_real(z + 1), (z * z.conj()).abs()


def copied_after_compiling_128121(net, x):
    return F.relu(net.conv(x))[:, :3] + x


def tied_weights_93420(net, index):
    weight, y = net.table.weight, net.table(index)
    return y @ torch.cat([weight.t(), net.more], 1), F.linear(y, weight) + F.linear(y, weight * 0.5)


def custom_gradient_in_a_checkpoint(net, x):
    inner = checkpoint(lambda y: net.conv(y).tanh(), x, use_reentrant=False)
    return Scaled.apply(net.conv(x), torch.tensor(2.0)) + inner


IMAGES = [(random(1, 3, 4, 4),), (random(2, 3, 5, 4),)]
CASES = {
    duplicates_138908: [(torch.full((1, rows), -10), random(2, 6)) for rows in (2, 3)],
    sine_in_place_183894: IMAGES,
    view_of_an_input_111133: [
        (torch.ones(rows, 6), random(3, rows), torch.tensor([0, 4, 2])) for rows in (3, 4)
    ],
    input_after_its_use_94777: IMAGES,
    unsqueezed_input_93259: [(random(3, 4, 4),), (random(3, 5, 4),)],
    strides_of_channels_last_174963: [
        (random(2, 5, 2, 5).to(memory_format=torch.channels_last),),
        (random(2, 5, 2, 5),),
    ],
    norm_with_weights_100970: IMAGES,
    odd_weight_strides_124256: [(random(20, 8, 9),), (random(2, 8, 9),)],
    complex_views_122457: [(random(4, 6),), (random(5, 6),)],
    copied_after_compiling_128121: IMAGES,
    tied_weights_93420: [(torch.tensor([[1, 2, 3]]),), (torch.tensor([[1, 2], [5, 0]]),)],
    custom_gradient_in_a_checkpoint: IMAGES,
}


def session(function, calls, train):
    """The results of calls, what they write into their inputs, and the gradients of the weights."""
    net = Parts()
    seen = []
    for arguments in calls:
        given = [argument.clone() for argument in arguments]
        with torch.set_grad_enabled(train):
            results = function(net, *given)
        leaves = pytree.tree_leaves(results)
        if train:
            sum(one.sum() for one in leaves if one.requires_grad).backward()
        gradients = [None if one.grad is None else one.grad.clone() for one in net.parameters()]
        seen.append([*(one.detach() for one in (*leaves, *given)), *gradients])
        net.zero_grad()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["frozen", "with gradients"])
@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_programs_of_bug_reports_equal_eager(function, train):
    run = torch.compile(function, backend="ollie", options=FORCED | {"freeze": not train})
    for name in ("first", "copy"):
        want = session(function, CASES[function], train)
        got = session(run, CASES[function], train)
        torch.testing.assert_close(
            got, want, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
        if function is not copied_after_compiling_128121:
            return
        run = torch.compile(copy.deepcopy(run), backend="ollie", options=FORCED | {"freeze": not train})
