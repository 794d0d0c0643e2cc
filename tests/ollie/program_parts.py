"""The parts that random programs are made of: layers, results, steps of a session, and ways to compile.

A part is Python source with marks: `{C}` channels, `{H}` half of them, `{D}` dimensions of the image, `{S}`
its sizes, `{N}` a number that no other part has, and `<a|b|c>`, of which one is drawn.
"""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """Source of one kind.

    Attributes:
        kind: names the feature that a program has by this part.
        body: statements. A layer's are of `forward`, and read and assign `x` [batch, C, *S]; a step's are of
            the session.
        init: statements of `__init__` that a layer needs.
        dims: the dimensions of images that a layer serves.
    """

    kind: str
    body: str
    init: str = ""
    dims: str = "123"


TOKENS = "t = x.flatten(2).transpose(1, 2)\n"  # [batch, pixels, C]
IMAGE = "\nx = t.transpose(1, 2).reshape(x.shape)"

LAYERS = (
    Part(
        "convolution",
        "x = self.a{N}(x)",
        'self.a{N} = nn.Conv{D}d({C}, {C}, <1|2|3|3>, padding="same", dilation=<1|1|2>, groups=<1|1|2|{C}>,'
        ' bias=<True|False>, padding_mode="<zeros|zeros|zeros|circular>")',
    ),
    Part(
        "convolution",
        "x = self.a{N}(x).relu() + x",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)",
    ),
    Part(
        "convolution",
        "x = self.b{N}(F.silu(self.a{N}(x)), output_size=x.shape[2:])",
        "self.a{N} = nn.Conv{D}d({C}, {H}, 3, stride=2, padding=1)\n"
        "self.b{N} = nn.ConvTranspose{D}d({H}, {C}, <3|4>, stride=2, padding=1)",
    ),
    Part(
        "convolution",
        "x = self.a{N}(x)",
        "self.a{N} = nn.ConvTranspose{D}d({C}, {C}, 3, padding=1, groups=<1|2>, bias=<True|False>)",
    ),
    Part(
        "convolution",
        "x = self.a{N}(F.pad(x, (1, 0) * {D}))",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 2)",
    ),
    Part(
        "convolution",
        "x = F.conv{D}d(x, self.a{N}<[:{C}]| * 0.5|.flip(-1)|.transpose(0, 1)|>, padding=1)",
        "self.a{N} = nn.Parameter(torch.randn({C}, {C}, *[3] * {D}) * 0.2)",
    ),
    Part(
        "convolution",
        "x = self.a{N}(x) + self.b{N}(x) + x",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)\nself.b{N} = nn.Conv{D}d({C}, {C}, 1)",
    ),
    Part(
        "convolution",
        "x = torch.cat([self.a{N}(x), self.b{N}(x)], 1)",
        "self.a{N} = nn.Conv{D}d({C}, {H}, 3, padding=1)\n"
        "self.b{N} = nn.Conv{D}d({C}, {H}, <1|3>, padding='same')",
    ),
    Part(
        "convolution",
        "u, v = x.chunk(2, 1)\nx = torch.cat([self.a{N}(u) <*|+> v, u], 1)",
        "self.a{N} = nn.Conv{D}d({H}, {H}, 3, padding=1)",
    ),
    Part(
        "convolution",
        "x = self.a{N}(x)",
        "self.a{N} = nn.Sequential(nn.Conv2d({C}, {H}, (1, 5), padding=(0, 2)), nn.GELU(),"
        " nn.Conv2d({H}, {C}, (5, 1), padding=(2, 0)))",
        dims="2",
    ),
    Part(
        "convolution",
        "y = self.a{N}(x.to(self.a{N}.weight.dtype)).to(x.dtype)\nx = x + y",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1).double()",
    ),
    Part(
        "in place",
        "y = self.a{N}(x)\ny += x\ny.<relu_()|mul_(0.5)|sigmoid_()>\nx = y",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)",
    ),
    Part(
        "in place",
        "y = self.a{N}(x)\nz = self.b{N}(y)\nz += y\nx = self.c{N}(z) + y\nx += z",
        "\n".join(f"self.{m}{{N}} = nn.Conv{{D}}d({{C}}, {{C}}, <1|3>, padding='same')" for m in "abc"),
    ),
    Part(
        "in place",
        "x = x.clone()\nx[:, <0|1:3|::2>] <*=|+=> 0.5\nx = self.a{N}(x)",
        "self.a{N} = nn.Sequential(nn.Conv{D}d({C}, {C}, 3, padding=1), nn.ReLU(inplace=True))",
    ),
    Part(
        "product",
        TOKENS + "q, k, v = self.a{N}(t), self.b{N}(t), self.c{N}(t)\n"
        "t = t + <F.scaled_dot_product_attention(q, k, v)|(q @ k.mT * 0.3).softmax(-1) @ v>" + IMAGE,
        "\n".join(f"self.{m}{{N}} = nn.Linear({{C}}, {{C}}, bias=<True|False>)" for m in "abc"),
    ),
    Part(
        "product",
        TOKENS + "t = self.a{N}(t) + self.c{N}(self.b{N}(t)) * <0.5|2>" + IMAGE,
        "self.a{N} = nn.Linear({C}, {C})\nself.b{N} = nn.Linear({C}, 2, bias=False)\n"
        "self.c{N} = nn.Linear(2, {C}, bias=False)",
    ),
    Part(
        "product",
        TOKENS + "t = self.c{N}(F.silu(self.a{N}(t)) * self.b{N}(t))" + IMAGE,
        "self.a{N} = nn.Linear({C}, {C})\nself.b{N} = nn.Linear({C}, {C})\nself.c{N} = nn.Linear({C}, {C})",
    ),
    Part(
        "product",
        'x = torch.einsum("<bi...,oi->bo...|bi...,io->bo...>", x, self.a{N})',
        "self.a{N} = nn.Parameter(torch.randn({C}, {C}) * 0.3)",
    ),
    Part(
        "product",
        TOKENS + "w = F.pad(t, (0, 0, 2, 2)).unfold(1, 5, 1)\n"
        "t = t + torch.einsum('btcw,bw->btc', w * t.unsqueeze(-1), w.mean((1, 2)))" + IMAGE,
    ),
    Part(
        "product",
        TOKENS + "t = torch.<bmm|matmul>(t, self.a{N}<.mT|>.expand(len(t), {C}, {C}))" + IMAGE,
        "self.a{N} = nn.Parameter(torch.randn(1, {C}, {C}) * 0.3)",
    ),
    Part("plain", "x = <F.relu|F.gelu|F.silu|torch.tanh|torch.sigmoid|F.hardswish|F.leaky_relu>(x)"),
    Part("plain", "x = F.<avg|max>_pool{D}d(x, 3, stride=1, padding=1)"),
    Part("plain", "x = F.interpolate(F.avg_pool{D}d(x, 2), size=x.shape[2:])"),
    Part("plain", "x = x<.flip(1)|.roll(1, -1)|[:, torch.arange({C} - 1, -1, -1)]|.transpose(-1, -2).mT>"),
    Part(
        "plain",
        "x = x * torch.sigmoid(self.a{N}(x.mean(-1, keepdim=True)))",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 1)",
    ),
    Part("plain", "x = x.contiguous(memory_format=torch.channels_last)", dims="2"),
    Part(
        "plain",
        "x = F.pixel_shuffle(self.a{N}(x), 2)[..., ::2, ::2]",
        "self.a{N} = nn.Conv2d({C}, 4 * {C}, 1)",
        dims="2",
    ),
    Part("norm", "x = self.a{N}(x)", "self.a{N} = nn.<GroupNorm(2, {C})|InstanceNorm{D}d({C}, affine=True)>"),
    Part("norm", TOKENS + "t = self.a{N}(t)" + IMAGE, "self.a{N} = nn.<LayerNorm|RMSNorm>({C})"),
    Part(
        "batch norm",
        "x = self.b{N}(self.a{N}(x))",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)\nself.b{N} = nn.BatchNorm{D}d({C})",
    ),
    Part(
        "batch norm",
        "x = F.relu(self.b{N}(self.a{N}(x)) + self.d{N}(self.c{N}(x)))",
        "self.a{N}, self.b{N} = nn.Conv{D}d({C}, {C}, 3, padding=1, bias=False), nn.BatchNorm{D}d({C})\n"
        "self.c{N}, self.d{N} = nn.Conv{D}d({C}, {C}, 1), nn.BatchNorm{D}d({C}, momentum=None)",
    ),
    Part(
        "dropout",
        "x = self.b{N}(self.a{N}(x))",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)\nself.b{N} = nn.Dropout<|{D}d>(<0.5|0.2>)",
    ),
    Part(
        "sure dropout",
        "x = F.dropout<|{D}d>(self.a{N}(x), <0.0|1.0>, self.training) + x",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)",
    ),
    Part("dropout", "x = x + torch.<randn|rand>_like(x) * 0.1"),
    Part(
        "graph break",
        "x = self.a{N}(x)\ntorch._dynamo.graph_break()\nx = self.a{N}(x).relu() + x",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)",
    ),
    Part(
        "graph break",
        "x = self.a{N}(x) if x.sum().item() > -1e30 else x",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)",
    ),
    Part(
        "buffer",
        "z = torch.cat([self.h{N}.expand(len(x), *self.h{N}.shape[1:]), x], -1)\n"
        "self.h{N}.copy_(x.detach()[:1, ..., -2:])\nself.n{N}.add_(1)\nx = self.a{N}(z)[..., 1:-1]",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)\n"
        'self.register_buffer("h{N}", torch.zeros(1, {C}, *{S}[:-1], 2))\n'
        'self.register_buffer("n{N}", torch.zeros((), dtype=torch.long))',
    ),
    Part(
        "buffer",
        "self.m{N}.mul_(0.9).add_(x.detach().flatten(2).mean((0, 2)), alpha=0.1)\n"
        "x = self.a{N}(x) - self.m{N}.view(-1, *[1] * {D})",
        'self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)\nself.register_buffer("m{N}", torch.zeros({C}))',
    ),
    Part(
        "buffer",
        "self.m{N} = x.detach().mean()\nx = x - self.m{N}",
        'self.register_buffer("m{N}", torch.zeros(()))',
    ),
    Part(
        "parametrization",
        "x = self.a{N}(x)",
        "self.a{N} = parametrizations.<weight_norm|spectral_norm>(nn.Conv{D}d({C}, {C}, 3, padding=1))",
    ),
    Part(
        "parametrization",
        TOKENS + "t = self.a{N}(t)" + IMAGE,
        "self.a{N} = nn.Linear({C}, {C})\n"
        'parametrize.register_parametrization(self.a{N}, "weight", Symmetric())',
    ),
    Part(
        "hook",
        "x = self.a{N}(x)",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)\n"
        "self.a{N}.register_forward_<hook(lambda module, given, result: result *"
        " 0.5)|pre_hook(lambda module, given: (given[0] + 1,))>",
    ),
    Part(
        "hook",
        "x = self.a{N}(x)\nif x.requires_grad:\n    x.register_hook(lambda gradient: gradient * 2)",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)",
    ),
    Part(
        "shared weight",
        "x = self.b{N}(self.a{N}(x).relu())",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)\nself.b{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)\n"
        "self.b{N}.weight = self.a{N}.weight",
    ),
    Part(
        "shared weight",
        "x = F.conv_transpose{D}d(F.relu(self.a{N}(x)), self.a{N}.weight.to(x.dtype), padding=1)",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)",
    ),
    Part(
        "counter",
        "self.calls{N} += 1\nx = self.a{N}(x) * <1|self.calls{N}>",
        "self.calls{N} = 0\nself.a{N} = nn.Conv{D}d({C}, {C}, 1)",
    ),
    Part("side effect", "x = seen(self.a{N}(x))", "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)"),
    Part(
        "checkpoint",
        "x = checkpoint(self.a{N}, x, use_reentrant=False)",
        "self.a{N} = nn.Sequential(nn.Conv{D}d({C}, {C}, 3, padding=1), nn.ReLU())",
    ),
    Part(
        "autocast",
        'with torch.autocast("cpu", torch.bfloat16):\n    y = self.a{N}(x)\nx = y.to(x.dtype)',
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)",
    ),
    Part(
        "grad mode",
        "with torch.no_grad():\n    y = self.a{N}(x)\nx = self.a{N}(x) - y * 0.5",
        "self.a{N} = nn.Conv{D}d({C}, {C}, 3, padding=1)",
    ),
    Part(
        "functorch",
        TOKENS + "t = torch.vmap(lambda row: F.linear(row, self.a{N}))(t)" + IMAGE,
        "self.a{N} = nn.Parameter(torch.randn({C}, {C}) * 0.3)",
    ),
    Part(
        "mutated input",
        "if not given.requires_grad and 0 not in given.stride():\n"
        "    given.<add_(0.5)|mul_(0.9)|clamp_(min=0)>",
    ),
)

RESULTS = (
    Part("plain", "x"),
    Part("structure", "<x, None, 3|[x, x * 2]|{'y': x, 'more': [x.mean()]}>"),
    Part("view", "<x, x[:, 0]|x, x.flatten(1)|x.transpose(1, 2)|x, given|x, given[:1]|x[::1]|x, x>"),
    Part("constant", "x, <self.scale * 2|self.scale.exp() @ self.scale|torch.ones(3)>"),
    Part("constant", "x, <self.scale|self.scale[0]|self.table|self.table.view(-1)>"),
)

# How a network is compiled; `entry(net)` is called in its place.
ENTRIES = (
    Part("plain", "entry = compiled"),
    Part("function", "apply = compiled(lambda net, x: net(x))\nentry = lambda net: lambda x: apply(net, x)"),
    Part("regional", "Block.forward = compiled(Block.forward)\nentry = lambda net: net"),
    Part(
        "parameters as arguments",
        "apply = compiled(lambda held, x: torch.func.functional_call(net, held, (x,)))\n"
        "entry = lambda net: lambda x: apply({**dict(net.named_parameters()),"
        " **dict(net.named_buffers())}, x)",
    ),
)

INFERENCE = "with torch.<no_grad|no_grad|inference_mode>():\n    yield 'result {N}', run(x)"
CALLS = (
    Part("plain", INFERENCE),
    Part(
        "training",
        "y = run(x)\nbackward(y)\nyield 'result {N}', y\nyield 'gradients {N}', gradients(net, x)\n"
        "clear(net, x)",
    ),
    Part(
        "training",
        "backward(run(x))\nyield 'gradients {N}', gradients(net, x)\n"
        "with torch.no_grad():\n    for p in net.parameters():\n        if p.grad is not None:\n"
        "            p.sub_(p.grad, alpha=0.1)\n"
        "clear(net, x)",
    ),
    Part("grad mode", "with torch.set_grad_enabled(<True|False>):\n    yield 'result {N}', run(x)"),
    Part(
        "autocast",
        "with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):\n    yield 'result {N}', run(x)",
    ),
)
STEPS = (
    *CALLS,
    Part("plain", "yield 'state {N}', state(net)"),
    Part("grad mode", "for p in list(net.parameters())[::2]:\n    p.requires_grad_(not p.requires_grad)"),
    Part(
        "grad mode",
        "x = x.detach().requires_grad_()\nbackward(run(x))\nyield 'gradients {N}', gradients(net, x)\n"
        "clear(net, x)",
    ),
    Part(
        "autocast",
        "with torch.autocast('cpu', torch.bfloat16):\n    y = run(x)\nbackward(y)\nyield 'result {N}', y\n"
        "yield 'gradients {N}', gradients(net, x)\nclear(net, x)",
    ),
    Part("mode", "net.<train|eval>()"),
    Part("batch", "x = random(<1|3|5>, {C}, *{S}, seed={N})\n" + INFERENCE),
    Part("batch", "x = random(0, {C}, *{S}, seed={N})\n" + INFERENCE),
    Part("layout", "x = random(2, *{S}, {C}, seed={N}).movedim(-1, 1)\n" + INFERENCE),
    Part("layout", "x = random(2, {C}, *{S}, seed={N}, extra=2)[:, <:{C}|1:1 + {C}>]\n" + INFERENCE),
    Part("layout", "x = random(1, {C}, *{S}, seed={N}).expand(3, {C}, *{S})\n" + INFERENCE),
    Part(
        "dtype",
        "net, x = net.<double|bfloat16>(), x.<double|bfloat16>()\nx = x.to(next(net.parameters()).dtype)\n"
        + INFERENCE,
    ),
    Part(
        "optimizer",
        "optimizer = torch.optim.<SGD(net.parameters(), lr=0.1)|Adam(net.parameters(), lr=0.01)>\n"
        "backward(run(x))\noptimizer.step()\nclear(net, x)\n" + INFERENCE,
    ),
    Part("loaded state", "net.load_state_dict(changed(net.state_dict())<|, assign=True>)\n" + INFERENCE),
    Part(
        "weight written",
        "with torch.no_grad():\n    for p in list(net.parameters())[::2]:\n        p.mul_(0.5)\n" + INFERENCE,
    ),
    Part("new weight", "replace(net, {N}, lambda p: nn.Parameter(p.detach() * 0.5))\n" + INFERENCE),
    Part("data assigned", "for p in list(net.parameters())[::2]:\n    p.data = p.data * 0.5\n" + INFERENCE),
    Part(
        "new module",
        "net.blocks[0] = copy.deepcopy(net.blocks[0])\nwith torch.no_grad():\n"
        "    for p in net.blocks[0].parameters():\n        p.mul_(0.5)\n" + INFERENCE,
    ),
    Part(
        "instance",
        "other = make({N})\nother_run = entry(other)\nwith torch.no_grad():\n"
        "    yield 'other {N}', other_run(x)\n    yield 'result {N}', run(x)",
    ),
    Part(
        "instance",
        "other = make({N})\nother.load_state_dict(net.state_dict())\nwith torch.no_grad():\n"
        "    yield 'other {N}', entry(other)(x)",
    ),
    Part(
        "copy",
        "other = copy.deepcopy(net)\nwith torch.no_grad():\n    for p in other.parameters():\n"
        "        p.mul_(1.5)\n"
        "    yield 'other {N}', entry(other)(x)\n    yield 'result {N}', run(x)",
    ),
    Part(
        "result written",
        "with torch.no_grad():\n    for y in tensors(run(x.clone())):\n        if y.is_floating_point():\n"
        "            y.<zero_()|add_(1)>\n    yield 'result {N}', run(x)",
    ),
    Part(
        "result kept", "with torch.no_grad():\n    first = run(x)\n    run(x + 1)\nyield 'first {N}', first"
    ),
    Part("mutated input", "yield 'input {N}', x"),
    Part("random state", "yield 'random state {N}', torch.rand(3)"),
)

PREAMBLE = """
import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

DTYPE = {DTYPE}
times_seen = []


@torch.library.custom_op("programs::seen", mutates_args=())
def seen(x: torch.Tensor) -> torch.Tensor:
    times_seen.append(1)
    return x.clone()


seen.register_fake(torch.empty_like)
seen.register_autograd(lambda ctx, gradient: gradient)


class Symmetric(nn.Module):
    def forward(self, w):
        return (w + w.mT) / 2


def make(seed):
    torch.manual_seed(seed)
    return Net().double().eval() if DTYPE == torch.float64 else Net().eval()


def random(*shape, seed, extra=0):
    shape = (shape[0], shape[1] + extra, *shape[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def tensors(value):
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def backward(value):
    leaves = [y for y in tensors(value) if y.requires_grad and y.is_floating_point()]
    if leaves:
        sum(y.to(DTYPE).square().mean() for y in leaves).backward()


def gradients(net, x):
    return {**{name: p.grad for name, p in net.named_parameters()}, "x": x.grad}


def clear(net, x):
    net.zero_grad()
    x.grad = None


def state(net):
    counts = {k: v for m in net.modules() for k, v in vars(m).items() if k.startswith("calls")}
    return {**net.state_dict(), **counts}


def changed(held):
    return {k: v * 0.5 if v.is_floating_point() else v + 1 for k, v in held.items()}


def replace(net, place, make):
    named = dict(net.named_parameters())
    name = sorted(named)[place % len(named)]
    owner, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(owner), leaf, make(named[name]))
""".lstrip()
