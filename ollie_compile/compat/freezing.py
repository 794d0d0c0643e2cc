"""torch's private interfaces that freezing needs, each in one function.

pyproject.toml bounds torch to the versions that these were tested with.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], inner: Callable[..., Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Inductor's `compile_fx` of a graph of Dynamo, with `inner` as its compiler of aten graphs.

    AOTAutograd's cache is off, for it would answer without asking `inner`.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor import compile_fx

    options = {**options, "freezing": False}
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx.compile_fx(gm, list(inputs), inner_compile=inner, config_patches=options)


def compile_unfrozen(
    gm: fx.GraphModule, values: Sequence[Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Inductor's `compile_fx` of a graph of Dynamo for these values, when no compilation is under way."""
    from torch._dynamo.convert_frame import compile_lock
    from torch._inductor import compile_fx

    with compile_lock:
        return compile_fx.compile_fx(gm, list(values), config_patches={**options, "freezing": False})


def compile_aten(gm: fx.GraphModule, inputs: Sequence[Any], **named: Any) -> Callable[..., Any]:
    """Inductor's compiler of one aten graph, whose constants may be real tensors.

    Returns:
        a function of a list of arguments, which it empties.
    """
    from torch._inductor import compile_fx

    context = torch._guards.TracingContext.try_get()
    assert context is not None, "a compilation is under way"
    with mock.patch.object(context.fake_mode, "allow_non_fake_inputs", True):
        return compile_fx.compile_fx_inner(gm, inputs, **named)


def traced_parameters() -> list[Any]:
    """The tensors of Dynamo's graph module, which AOTAutograd passes ahead of the graph's inputs."""
    context = torch._guards.TracingContext.try_get()
    return list(context.params_flat or ()) if context else []


def input_roles() -> tuple[frozenset[int], frozenset[int], frozenset[int]]:
    """The places of inputs of AOTAutograd's graph: those that are parameters or buffers, those that the graph
    changes, and those that a result shares memory with."""
    context = torch._guards.TracingContext.try_get()
    metadata = context.fw_metadata if context else None
    if metadata is None:
        return frozenset(), frozenset(), frozenset()
    changed = {
        place
        for place, info in enumerate(metadata.input_info)
        if info.mutates_data or info.mutates_metadata or info.mutation_inductor_storage_resize
    }
    shared = {info.base_idx for info in metadata.output_info if info.base_idx is not None}
    return frozenset(metadata.static_input_indices), frozenset(changed), frozenset(shared)


def fake(value: Tensor) -> Tensor:
    """The tensor as the compilation under way has it in the place of its data."""
    context = torch._guards.TracingContext.try_get()
    assert context is not None, "a compilation is under way"
    return context.fake_mode.from_tensor(value, static_shapes=True)


def freeze(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    weights: Mapping[int, Tensor],
    choose_libraries: Callable[[fx.Graph], None] | None = None,
) -> tuple[list[Any], bool]:
    """Inductor's freezing of an aten graph: some inputs become constants, what depends on constants alone is
    folded, and convolutions and products read packed weights.

    Args:
        weights: the inputs that become constants, by their place.
        choose_libraries: changes the graph once it is folded; it is folded again.

    Returns:
        the other inputs, and whether convolutions are channels last.
    """
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._inductor import constant_folding, freezing
    from torch._inductor.compile_fx import fake_tensor_prop
    from torch._inductor.fx_passes.freezing_patterns import freezing_passes
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.graph import GraphLowering

    _keep_order_of_draws(gm)
    channels_last = GraphLowering.decide_layout_opt(gm, is_inference=True)
    if channels_last:
        fake_tensor_prop(gm, inputs, True)
        freezing.convert_conv_weights_to_channels_last(gm)
        _share_forced_memory(gm)
    view_to_reshape(gm)
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if place in weights:
            constant_folding.replace_node_with_constant(gm, node, weights[place])
    kept = [value for place, value in enumerate(inputs) if place not in weights]
    gm.graph = fx_graph_cse(gm.graph)
    _separate_scales(gm)
    with _float64_unpacked(gm):
        freezing_passes(gm, kept)
    constant_folding.constant_fold(gm)
    if choose_libraries is not None:
        choose_libraries(gm.graph)
        constant_folding.constant_fold(gm)
    output = gm.graph.output_node()
    output.meta["user_visible_output_idxs"] = [
        place for place, result in enumerate(output.args[0]) if isinstance(result, fx.Node)
    ]
    return kept, channels_last


def _keep_order_of_draws(gm: fx.GraphModule) -> None:
    """Force what random numbers are drawn for to its strides, where the numbers must be eager's.

    They are drawn in the order of memory, and packed convolutions give another order than the one traced.
    """
    from torch._inductor import config

    force = torch.ops.prims.inductor_force_stride_order.default
    if not config.fallback_random:
        return
    seeded = torch.Tag.nondeterministic_seeded
    drawn = [node for node in gm.graph.nodes if seeded in getattr(node.target, "tags", ())]
    for node, source in [(user, source) for user in drawn for source in user.all_input_nodes]:
        value = source.meta["val"]
        if _is_dense(value):
            with gm.graph.inserting_before(node):
                forced = gm.graph.call_function(force, (source, tuple(value.stride())))
            forced.meta = dict(source.meta)
            node.replace_input_with(source, forced)


def _share_forced_memory(gm: fx.GraphModule) -> None:
    """Let results that are views share memory with each other.

    Inductor's freezing forces each result to its strides, which copies them apart.
    """
    force, output = torch.ops.prims.inductor_force_stride_order.default, gm.graph.output_node()
    results = [result for result in output.args[0] if isinstance(result, fx.Node)]
    forced = {result.args[0]: result for result in results if result.target is force}
    for result in results:
        views = []
        source = result.args[0] if result.target is force else result
        while getattr(source.target, "is_view", False) or source.target is operator.getitem:
            views.append(source)
            source = source.args[0]
        if not views or source.op != "call_function" or not _is_dense(source.meta["val"]):
            continue
        with gm.graph.inserting_before(output):
            if source not in forced:
                strides = tuple(source.meta["val"].stride())
                forced[source] = gm.graph.call_function(force, (source, strides))
            copies = {source: forced[source]}
            for view in reversed(views):
                copies[view] = gm.graph.node_copy(view, lambda node, copies=copies: copies.get(node, node))
        output.replace_input_with(result, copies[views[0]])
    gm.graph.eliminate_dead_code()


def _is_dense(value: Any) -> bool:
    static = isinstance(value, Tensor) and all(
        type(number) is int for number in (*value.shape, *value.stride())
    )
    return static and torch._prims_common.is_non_overlapping_and_dense_or_false(value)


@contextlib.contextmanager
def _float64_unpacked(gm: fx.GraphModule) -> Iterator[None]:
    """Hide convolutions in float64 from Inductor, which packs their weights for oneDNN, which reads none."""
    hidden = [
        node
        for node in gm.graph.find_nodes(op="call_function", target=aten.convolution.default)
        if node.meta["val"].dtype == torch.float64
    ]
    for node in hidden:
        node.target = _convolution
    try:
        yield
    finally:
        for node in gm.graph.find_nodes(op="call_function", target=_convolution):
            node.target = aten.convolution.default


def _convolution(*arguments: Any) -> Tensor:
    return aten.convolution.default(*arguments)


def _separate_scales(gm: fx.GraphModule) -> None:
    """Turn numbers that a convolution's result is scaled by into tensors.

    Inductor does so itself when it folds them into the weights, but has one name for the numbers of all.
    """
    for node in list(gm.graph.nodes):
        if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor):
            continue
        source, scale = node.args
        if isinstance(scale, float) and getattr(source, "target", None) is aten.convolution.default:
            value, name = source.meta["val"], f"_scale_of_{node.name}"
            with torch.utils._python_dispatch._disable_current_modes():
                gm.register_buffer(name, torch.tensor(scale, dtype=value.dtype, device=value.device))
            with gm.graph.inserting_before(node):
                held = gm.graph.get_attr(name)
            held.meta["val"] = value.new_empty(())
            node.args = (source, held)


@contextlib.contextmanager
def watched_folding(seen: Callable[[fx.GraphModule, fx.Node, Tensor], None]) -> Iterator[None]:
    """Tell `seen` of every node that Inductor is about to replace by a constant."""
    from torch._inductor import constant_folding

    original = constant_folding.replace_node_with_constant

    def replace(gm: fx.GraphModule, node: fx.Node, constant: Tensor | None = None, *more: Any) -> None:
        if constant is not None:
            seen(gm, node, constant)
        original(gm, node, constant, *more)

    constant_folding.replace_node_with_constant = replace
    try:
        yield
    finally:
        constant_folding.replace_node_with_constant = original


@contextlib.contextmanager
def sums_out_of_place() -> Iterator[None]:
    """Let oneDNN's convolutions write their sums with another tensor into a new one.

    In the place of that tensor, Inductor of torch 2.13 may lose the order of two sums in a row.
    """
    from torch._inductor.lowering import lowerings

    mkldnn = torch.ops.mkldnn
    in_place, out_of_place = mkldnn._convolution_pointwise_.binary, mkldnn._convolution_pointwise.binary
    original = lowerings[in_place]
    lowerings[in_place] = lowerings[out_of_place]
    try:
        yield
    finally:
        lowerings[in_place] = original


def module_constants(compiled: Any) -> dict[str, Tensor] | None:
    """The constants of a graph that `compile_aten` gave, by their names in the module of its code.

    Returns:
        None where they cannot be exchanged, for more than that module's `call` reads them.
    """
    function = _called(compiled)
    if function is None:
        return None
    module, constants = function.__globals__, dict(compiled.constants or {})
    functions = [*module.values(), *vars(module.get("Runner", object)).values()]
    others = {
        name
        for other in functions
        if isinstance(other, FunctionType) and other.__code__ is not function.__code__
        for name in other.__code__.co_names
        if other.__name__ != "get_args"  # of Inductor's own benchmarks
    }
    whole = all(module.get(name) is value for name, value in constants.items())
    return constants if whole and others.isdisjoint(constants) else None


def with_constants(compiled: Any, constants: Mapping[str, Tensor]) -> Any:
    """The same compiled graph with other tensors for some of its `module_constants`."""
    function, call = _called(compiled), compiled.current_callable
    assert function is not None, "it has constants that can be exchanged"
    names = {**function.__globals__, **constants}
    other = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    result = copy.copy(compiled)
    result.current_callable = MethodType(other, call.__self__) if isinstance(call, MethodType) else other
    result.compiled_fn_runner = None  # the original takes it apart at its end
    result.constants = {}
    return result


def drop_constants(compiled: Any, names: Sequence[str]) -> None:
    """Let a compiled graph no longer hold these constants, nor the module of its code.

    Inductor never frees modules."""
    function = _called(compiled)
    assert function is not None, "it has constants that can be exchanged"
    for name in names:
        function.__globals__.pop(name)
        compiled.constants.pop(name)


def _called(compiled: Any) -> FunctionType | None:
    call = getattr(compiled, "current_callable", None)
    function = call.__func__ if isinstance(call, MethodType) else call
    return function if isinstance(function, FunctionType) else None
