"""The private and version-dependent API of torch that this package uses, all in one place.

Every name was seen in torch 2.13.0. A name of `PRIVATE` is imported from here like any other, and looked up
only then: `from ollie_compile.compat import make_fx`. If torch no longer has it, an ImportError says what it
was for; the backend looks all of them up as it is imported (`require`). The functions below say themselves
what is lost if torch changes.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

SEEN_IN = "2.13.0"

PRIVATE: dict[str, tuple[str, str]] = {
    "CustomGraphPass": (
        "torch._inductor.custom_graph_pass",
        "a pass with an identity for Inductor's caches",
    ),
    "get_hash_for_files": ("torch._inductor.custom_graph_pass", "the uuid of a pass, by its sources"),
    "compile_fx": ("torch._inductor.compile_fx", "Inductor as a backend, with options for one graph"),
    "inductor_config": ("torch._inductor.config", "Inductor's options, their names and types"),
    "list_mode_options": ("torch._inductor", "the options of each mode of torch.compile"),
    "select_decomp_table": (
        "torch._inductor.decomposition",
        "decompositions that Inductor expects",
    ),
    "CppCodeCache": (
        "torch._inductor.codecache",
        "C++ compiled as Inductor's own kernels are",
    ),
    "virtualized": ("torch._inductor.virtualized", "whether a graph is compiled ahead of time"),
    "dynamo_config": ("torch._dynamo.config", "limits of recompilation, which `explain` lifts"),
    "functorch_config": ("torch._functorch.config", "AOTAutograd's cache, which `explain` switches off"),
    "TangentAOTInput": (
        "torch._functorch._aot_autograd.descriptors",
        "whether a graph computes gradients, by the descriptions of its inputs",
    ),
    "TracingContext": ("torch._guards", "which inputs of a graph are parameters"),
    "tracing": ("torch._guards", "measuring outside the context of a compilation"),
    "no_python_dispatcher": ("torch._dispatch.python", "measuring outside the dispatcher of a compilation"),
    "FakeTensor": ("torch._subclasses.fake_tensor", "tensors without values in a graph under compilation"),
    "FakeTensorMode": (
        "torch._subclasses.fake_tensor",
        "shapes and strides without values",
    ),
    "unset_fake_temporarily": (
        "torch._subclasses.fake_tensor",
        "real tensors within a compilation",
    ),
    "make_fx": ("torch.fx.experimental.proxy_tensor", "programs traced into graphs of aten"),
    "statically_known_true": ("torch.fx.experimental.symbolic_shapes", "conditions on symbolic sizes"),
    "TorchDispatchMode": ("torch.utils._python_dispatch", "the calls of a program, recorded"),
    "pytree": ("torch.utils._pytree", "arguments and results as flat lists"),
}
"""The module of each name, and what it is for. A name may be that of a module itself."""

_MODULES = {"inductor_config", "virtualized", "dynamo_config", "functorch_config", "pytree"}


def __getattr__(name: str) -> Any:
    if name not in PRIVATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    where, purpose = PRIVATE[name]
    try:
        module = importlib.import_module(where)
        found = module if name in _MODULES else getattr(module, name)
    except (ImportError, AttributeError) as error:
        shown = where if name in _MODULES else f"{where}.{name}"
        raise ImportError(
            f"ollie_compile needs `{shown}` of torch, for {purpose}; torch {torch.__version__} does not "
            f"have it. Install a torch that has it: it was last seen in {SEEN_IN}."
        ) from error
    return found


def require() -> None:
    """Look up all of `PRIVATE`.

    Raises:
        ImportError: torch has lost a name.
    """
    for name in PRIVATE:
        __getattr__(name)


@contextlib.contextmanager
def suspended_compilation() -> Iterator[None]:
    """Leave the fake tensors, the tracing context and the modes of a compilation that is under way.

    If torch adds a mode that this does not leave, measurements within a compilation fail: plans then keep the
    originals, with the error in the report.
    """
    from ollie_compile.compat import no_python_dispatcher, tracing, unset_fake_temporarily

    with unset_fake_temporarily(), no_python_dispatcher(), tracing(None):
        yield


def is_exporting() -> bool:
    """Whether the graph that Inductor compiles will run without Python, as a package of AOTInductor."""
    from ollie_compile.compat import virtualized

    return bool(virtualized.V.aot_compilation)


def is_joint_graph(graph: fx.Graph) -> bool:
    """Whether a graph of AOTAutograd computes gradients too, so that its inputs hold those of its results.

    AOTAutograd describes each input in its node's meta. If it no longer does, subprograms of training graphs
    are derived like those of inference: results are equal, but values that the backward needs are kept twice.
    """
    from ollie_compile.compat import TangentAOTInput

    inputs = graph.find_nodes(op="placeholder")
    return any(isinstance(node.meta.get("desc"), TangentAOTInput) for node in inputs)


def static_inputs() -> list[int]:
    """Positions of the inputs of the graph under compilation that are parameters or buffers.

    Empty outside a compilation, and if torch no longer says so: merged weights are then joined in every call.
    """
    from ollie_compile.compat import TracingContext

    context = TracingContext.try_get()
    return list(context.fw_metadata.static_input_indices) if context and context.fw_metadata else []


def copy_sources(graph: fx.GraphModule, copy: fx.GraphModule) -> None:
    """Let a copy of Dynamo's graph say of its inputs and tensors where Dynamo found them.

    Without that Inductor takes no input for a parameter, and has another name for the graph in its cache, so
    that warm starts compile anew. Graphs that are not Dynamo's say nothing.
    """
    if hasattr(graph, "_param_name_to_source"):
        copy._param_name_to_source = dict(graph._param_name_to_source)
    inputs = (one.graph.find_nodes(op="placeholder") for one in (graph, copy))
    for node, new in zip(*inputs, strict=True):
        if hasattr(node, "_dynamo_source"):
            new._dynamo_source = node._dynamo_source


def name_source(graph: fx.GraphModule, attribute: str, placeholder: fx.Node) -> None:
    """Let a graph say of a tensor that it holds in the place of an input where Dynamo found that input."""
    sources = getattr(graph, "_param_name_to_source", None)
    if sources is not None:
        sources[attribute] = getattr(placeholder, "_dynamo_source", None)


def is_static_input(placeholder: fx.Node) -> bool:
    """Whether Dynamo says that an input of its graph is the same tensor in every call, such as a buffer.

    If it no longer does, buffers are not held as constants under `freeze`.
    """
    return "_dynamo_static_input_type" in placeholder.meta.get("tensor_dict", {})


def guards_of(value: Tensor) -> list[str]:
    """The conditions on symbolic sizes under which a graph holds, by the fake tensor of one of its nodes."""
    return [str(guard.expr) for guard in value.fake_mode.shape_env.guards]


def hint(value: Any) -> Any:
    """The value of a symbolic size at the compilation; a size that depends on data has no hint, and stays."""
    known = isinstance(value, torch.SymInt) and value.node.hint is not None
    return int(value.node.hint) if known else value


def expression_of(size: Any) -> Any:
    """The sympy expression of a symbolic size; None for a number, and for a size that a guard has fixed."""
    expression = None if isinstance(size, int) else size.node.expr
    return None if expression is None or expression.is_number else expression


def is_view(target: Any) -> bool:
    """Whether an operator of torch only gives another view of its input; False for other functions."""
    return bool(getattr(target, "is_view", False))


def has_effects(target: Any) -> bool:
    """Whether an operator of torch writes into its arguments."""
    return bool(target._schema.is_mutable)


def load_cpp(source: str) -> Any:
    """A library of C functions, compiled as Inductor compiles its kernels, or from its cache.

    Raises:
        RuntimeError: there is no C++ compiler, or it fails.
    """
    from ollie_compile.compat import CppCodeCache

    return CppCodeCache.load(source, needs_vec_isa=True)


def has_onednn() -> bool:
    """Whether torch calls oneDNN: False where it is missing or switched off, and products then stay MKL's."""
    return torch.backends.mkldnn.is_available() and bool(torch._C._get_mkldnn_enabled())


def onednn_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a @ b + bias by oneDNN, in float32 on a CPU."""
    return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), bias, "none", [], "")


def onednn_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that oneDNN has packed convolutions for on this CPU; empty without oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return ()
    ops = torch.ops.mkldnn
    halves = {
        torch.bfloat16: ops._is_mkldnn_bf16_supported,
        torch.float16: ops._is_mkldnn_fp16_supported,
    }
    return (torch.float32, *(dtype for dtype, supported in halves.items() if supported()))


def packed_convolution(arguments: Iterable[Any], weight: Tensor, size: list[int]) -> Tensor:
    """A convolution's weight in the order in which oneDNN reads it.

    Args:
        arguments: of `aten.convolution`.
        size: of the data.

    Raises:
        RuntimeError: oneDNN has no kernel for these sizes.
    """
    _, _, _, stride, padding, dilation, transposed, output_padding, groups = arguments
    ops = torch.ops.mkldnn
    if transposed:
        reorder = ops._reorder_convolution_transpose_weight
        return reorder(weight, padding, output_padding, stride, dilation, groups, size)
    return ops._reorder_convolution_weight(weight, padding, stride, dilation, groups, size)


def packed_convolution_call(arguments: Iterable[Any]) -> tuple[Any, tuple[Any, ...]]:
    """The operator that computes `aten.convolution` with a packed weight, and its arguments."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = arguments
    ops = torch.ops.mkldnn
    fused: tuple[Any, ...] = ("none", [], "")  # no activation
    if transposed:
        sizes = (padding, output_padding, stride, dilation, groups)
        return ops._convolution_transpose_pointwise.default, (x, weight, bias, *sizes, *fused)
    return ops._convolution_pointwise.default, (x, weight, bias, padding, stride, dilation, groups, *fused)


def is_mkl_product(target: Any) -> bool:
    """Whether a call of Inductor's graph is a product with a weight packed for MKL; never without MKL."""
    if not torch.backends.mkl.is_available():
        return False
    packet = torch.ops.mkl._mkl_linear
    return target in (packet, packet.default)


def mkl_product(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """x @ weight.T + bias by MKL, the weight also packed for so many rows."""
    return torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows)


def onednn_packed(weight: Tensor, rows: int) -> Tensor:
    """The weight of a product in the order in which oneDNN reads it, for so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def onednn_packing() -> Any:
    """The operator that `onednn_packed` calls, for a graph."""
    return torch.ops.mkldnn._reorder_linear_weight.default


def onednn_product_call(x: Any, packed: Any, bias: Any) -> tuple[Any, tuple[Any, ...]]:
    """The operator that computes a product with a weight of `onednn_packed`, and its arguments."""
    return torch.ops.mkldnn._linear_pointwise.default, (x, packed, bias, "none", [], "")
