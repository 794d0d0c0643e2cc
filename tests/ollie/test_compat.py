"""What this package takes for granted of torch's private API: each test fails when it stops holding."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ollie_compile import compat


@pytest.mark.parametrize("name", sorted(compat.PRIVATE))
def test_torch_has_the_name(name):
    assert getattr(compat, name) is not None


def test_a_name_that_torch_lost_is_named_with_its_purpose(monkeypatch):
    monkeypatch.setitem(compat.PRIVATE, "Lost", ("torch._guards", "a test"))
    with pytest.raises(
        ImportError, match=r"needs `torch._guards.Lost` of torch, for a test; torch .* does not have it"
    ):
        compat.require()
    monkeypatch.setitem(compat.PRIVATE, "Lost", ("torch._lost", "a test"))
    with pytest.raises(ImportError, match=r"`torch._lost.Lost`"):
        compat.require()
    with pytest.raises(AttributeError, match="Unknown"):
        _ = compat.Unknown


def test_nothing_is_looked_up_before_it_is_needed():
    code = "import sys, ollie_compile.compat; print('torch._inductor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def graphs(function, *inputs, **options):
    """What Dynamo's graph and Inductor's passes see of a function, as given by `look(graph)`."""
    seen = []

    class Spy(compat.CustomGraphPass):
        def __call__(self, graph):
            look = options["look"]
            seen.append(look(graph))

        def uuid(self):
            return None

    torch._dynamo.reset()
    passes = {options.get("where", "joint_custom_pre_pass"): Spy()} | options.get("more", {})
    torch.compile(function, options=passes, dynamic=options.get("dynamic", False))(*inputs)
    return seen


@pytest.mark.parametrize("training", [True, False])
def test_a_joint_graph_is_told_from_one_of_inference(training):
    with torch.set_grad_enabled(training):
        assert graphs(nn.Linear(3, 2), torch.randn(4, 3), look=compat.is_joint_graph) == [training]


def test_parameters_are_static_inputs():
    def look(graph):
        inputs = graph.find_nodes(op="placeholder")
        return [tuple(inputs[place].meta["val"].shape) for place in compat.static_inputs()]

    with torch.no_grad():
        (seen,) = graphs(nn.Linear(3, 2), torch.randn(4, 3), look=look)
    assert sorted(seen) == [(2,), (2, 3)]
    assert compat.static_inputs() == []


def test_measuring_leaves_a_compilation():
    def look(graph):
        with compat.suspended_compilation():
            assert compat.static_inputs() == []
            return torch.ones(2).sum().item()

    with torch.no_grad():
        assert graphs(torch.relu, torch.randn(3), look=look) == [2.0]


def test_no_graph_of_torch_compile_is_exported():
    with torch.no_grad():
        assert graphs(torch.relu, torch.randn(3), look=lambda graph: compat.is_exporting()) == [False]


def test_symbolic_sizes_have_a_hint_and_an_expression():
    def look(graph):
        (node,) = graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
        value = node.meta["val"]
        size = value.shape[0]
        assert not isinstance(size, int)
        assert compat.expression_of(size).is_symbol
        assert compat.expression_of(3) is None
        assert all(isinstance(guard, str) for guard in compat.guards_of(value))
        return compat.hint(size), compat.hint(3)

    with torch.no_grad():
        assert graphs(lambda x: x.relu(), torch.randn(5, 3), look=look, dynamic=True) == [(5, 3)]


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x):
        return self.linear(x) + self.shift


def test_dynamo_says_where_inputs_are_from_and_which_are_buffers():
    seen = []

    def backend(gm, inputs):
        copy = torch.fx.GraphModule(gm, torch.fx.Graph())
        copy.graph = torch.fx.Graph()
        copy.graph.graph_copy(gm.graph, {})
        compat.copy_sources(gm, copy)
        for node, new in zip(*(one.graph.find_nodes(op="placeholder") for one in (gm, copy)), strict=True):
            assert new._dynamo_source == node._dynamo_source
        assert copy._param_name_to_source == gm._param_name_to_source
        placeholders = gm.graph.find_nodes(op="placeholder")
        seen.extend(node.name for node in placeholders if compat.is_static_input(node))
        compat.name_source(gm, "held", placeholders[0])
        assert gm._param_name_to_source["held"] == placeholders[0]._dynamo_source
        return gm

    torch._dynamo.reset()
    torch.compile(Shifted(), backend=backend)(torch.randn(4, 3))
    assert any("shift" in name for name in seen)
    assert not any("_x_" in name for name in seen)


def test_views_and_effects_of_operators():
    aten = torch.ops.aten
    assert compat.is_view(aten.view.default)
    assert not compat.is_view(aten.add.Tensor)
    assert not compat.is_view(len)
    assert compat.has_effects(aten.add_.Tensor)
    assert not compat.has_effects(aten.add.Tensor)


def test_cpp_is_compiled():
    library = compat.load_cpp('extern "C" int three() { return 3; }')
    assert library.three() == 3


onednn = pytest.mark.skipif(not compat.has_onednn(), reason="this torch has no oneDNN")


@onednn
@pytest.mark.parametrize("bias", [None, torch.randn(5)])
def test_products_by_onednn_and_by_mkl(bias):
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    wanted = F.linear(a, b.t(), bias)
    torch.testing.assert_close(compat.onednn_product(a, b, bias), wanted)
    call, arguments = compat.onednn_product_call(a, compat.onednn_packed(b.t().contiguous(), 3), bias)
    torch.testing.assert_close(call(*arguments), wanted)


@onednn
def test_a_frozen_product_is_one_of_mkls():
    def look(graph):
        calls = [node for node in graph.nodes if node.op == "call_function"]
        return [compat.is_mkl_product(node.target) for node in calls if len(node.args) == 5]

    more = {"freezing": True}
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        net, x = nn.Linear(24, 40).eval(), torch.randn(6, 24)
        seen = graphs(net, x, look=look, where="post_grad_custom_pre_pass", more=more)
    assert seen == [[torch.backends.mkl.is_available()]]
    assert not compat.is_mkl_product(torch.ops.aten.mm.default)


@onednn
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_read_packed_weights(transposed):
    x, weight = torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 3)
    arguments = (x, weight, None, [1, 1], [1, 1], [1, 1], transposed, [0, 0], 1)
    packed = compat.packed_convolution(arguments, weight, list(x.shape))
    call, others = compat.packed_convolution_call((x, packed, *arguments[2:]))
    torch.testing.assert_close(
        call(*others), torch.ops.aten.convolution.default(*arguments), rtol=1e-4, atol=1e-4
    )
    assert torch.float32 in compat.onednn_dtypes()
