"""Holding parameters and buffers as constants of a graph, so that what depends on them
alone is computed once.

Dynamo makes the weights of a module inputs of its graph, and AOTAutograd leaves them inputs. Those that the
graph only reads become constants between AOTAutograd and Inductor's code generation, by the passes of
Inductor's own freezing. What these give is an input of the compiled graph again, computed once for each set
of weights (`held`), except weights that oneDNN and MKL have packed, which Inductor wants inside its module.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ollie_compile.compat import FakeTensor
from ollie_compile.compat import freezing as inductor
from ollie_compile.graph.held import FrozenGraph, Program, aliases
from ollie_compile.graph.transforms import Transforms, agree
from ollie_compile.measure.isolation import outside_compilation

logger = logging.getLogger(__name__)

Compiled = Callable[..., Any]

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_linear_pointwise"})
MKL_PRODUCT, MKL_WEIGHT = "_mkl_linear", 2  # which argument is the weight as it was before it was packed


class Freezer:
    """Compiles one graph of Dynamo with its weights as constants.

    Args:
        inputs: the graph's inputs; only real tensors can be held.
        choose_libraries: changes an aten graph whose weights are constants; it is folded again.
        tuned: whether Inductor may pack weights for kernels of its own. It does so unseen, and the graph then
            serves only the weights that it was compiled for.
        verify: whether constants are computed a second time and compared, before other weights rely on that.

    Attributes:
        held: the places of the weights among the graph's inputs, once it is compiled.
        not_held: why other parameters and buffers are not held, with their number.
    """

    def __init__(
        self,
        inputs: Sequence[Any],
        choose_libraries: Callable[[fx.Graph], None] | None = None,
        *,
        tuned: bool = False,
        verify: bool = True,
    ) -> None:
        self.held: frozenset[int] = frozenset()
        self.not_held: Counter[str] = Counter()
        self._inputs, self._choose_libraries = inputs, choose_libraries
        self._tuned, self._verify = tuned, verify

    def compile(self, gm: fx.GraphModule, options: Mapping[str, Any]) -> Compiled:
        """Compile the graph, which may be changed, with these options of Inductor."""
        try:
            return inductor.compile_graph(gm, self._inputs, self.compile_aten, options)
        finally:
            self._inputs = ()  # so that weights live no longer than their module

    def compile_aten(self, gm: fx.GraphModule, inputs: Sequence[Any], **named: Any) -> Compiled:
        """Compile an aten graph of AOTAutograd, as Inductor's `compile_fx_inner` does."""
        values = [*inductor.traced_parameters(), *self._inputs]
        held = self._holdable(inputs, values)
        if not held:
            return inductor.compile_aten(gm, inputs, **named)
        ahead = len(values) - len(self._inputs)
        self.held = frozenset(place - ahead for place in held if place >= ahead)
        weights = [values[place] for place in held]
        with outside_compilation():  # the same data; the weights themselves must be free to go
            shadows = [weight.detach() for weight in weights]
        transforms = Transforms(gm, shadows)
        with inductor.watched_folding(transforms.folded):
            constants = dict(zip(held, shadows, strict=True))
            kept, named["layout_opt"] = inductor.freeze(gm, inputs, constants, self._choose_libraries)
        lifted = _lift(gm, lambda node, value: transforms.changes(value) and not self._stays(node, value))
        others = [place for place in range(len(inputs)) if place not in constants]
        static = set(named.get("static_input_idxs") or ())
        named["static_input_idxs"] = [new for new, place in enumerate(others) if place in static]
        named["static_input_idxs"] += range(len(kept), len(kept) + len(lifted))
        left = {id(value) for value in _constants(gm).values() if transforms.changes(value)}
        compiled = inductor.compile_aten(gm, [*kept, *map(inductor.fake, lifted)], **named)
        inside, exchangeable = self._inside(compiled, left)
        of_weights = [*inside.values(), *lifted]
        function = transforms.function(of_weights) if exchangeable else None
        if function is not None and self._verify and not agree(function, shadows, of_weights):
            logger.warning("ollie: frozen for one set of weights: its transforms could not be repeated")
            function = None
        program = Program(compiled, tuple(inside), function, aliases(weights))
        with outside_compilation():
            return FrozenGraph(program, held, others, weights, of_weights)

    def _holdable(self, inputs: Sequence[Any], values: Sequence[Any]) -> tuple[int, ...]:
        """The places of parameters and buffers that the graph only reads and no result shares memory with."""
        static, changed, shared = inductor.input_roles()
        if len(inputs) != len(values):
            self.not_held["beside tensor subclasses, or inputs that share memory"] += len(static)
            return ()
        held = []
        for place in sorted(static):
            if place in changed:
                self.not_held["which the graph changes"] += 1
            elif place in shared:
                self.not_held["which a result shares memory with"] += 1
            elif why := _unfit(values[place], inputs[place]):
                self.not_held[why] += 1
            else:
                held.append(place)
        return tuple(held)

    def _stays(self, node: fx.Node, value: Tensor) -> bool:
        """Whether Inductor must find a constant inside its module."""
        readers = {user: str(user.target).partition(".")[2].partition(".")[0] for user in node.users}
        packed = any(name == MKL_PRODUCT and user.args[MKL_WEIGHT] is node for user, name in readers.items())
        return value.is_mkldnn or packed or (self._tuned and not PRODUCTS.isdisjoint(readers.values()))

    def _inside(self, compiled: Compiled, left: Collection[int]) -> tuple[dict[str, Tensor], bool]:
        """The constants inside a compiled graph that depend on weights, and whether they can be exchanged.

        Args:
            left: the `id` of each constant that was left in the graph.
        """
        constants = inductor.module_constants(compiled) if left else {}
        if constants is None:
            return {}, False
        inside = {name: value for name, value in constants.items() if id(value) in left}
        return inside, not self._tuned and {id(value) for value in inside.values()} == left


def _unfit(value: Any, traced: Any) -> str | None:
    """Why a parameter or buffer cannot be held, or None if it can."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or value.is_meta:
        return "which have no data yet"
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_quantized:
        return "of other kinds of tensors"
    if value.is_inference():
        return "made in inference mode, which counts no changes"
    layouts = [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in (value, traced)]
    return None if layouts[0] == layouts[1] else "which AOTAutograd has in another order"


def _constants(gm: fx.GraphModule) -> dict[fx.Node, Tensor]:
    values = {node: attrgetter(str(node.target))(gm) for node in gm.graph.find_nodes(op="get_attr")}
    return {node: value for node, value in values.items() if isinstance(value, Tensor)}


def _lift(gm: fx.GraphModule, chosen: Callable[[fx.Node, Tensor], bool]) -> list[Tensor]:
    """Make inputs, behind the others, of the chosen constants of a graph; gives their values.

    Inductor writes small constants into its code, and sums into large ones, but not inputs.
    """
    first = next(node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr"))
    for node in gm.graph.find_nodes(op="placeholder"):
        first.prepend(node)
    inputs: dict[int, fx.Node] = {}
    lifted: list[Tensor] = []
    for node, value in _constants(gm).items():
        if chosen(node, value):
            if id(value) not in inputs:
                with gm.graph.inserting_before(first):
                    inputs[id(value)] = gm.graph.placeholder(f"lifted_{len(lifted)}")
                inputs[id(value)].meta = {**node.meta, "val": inductor.fake(value)}
                lifted.append(value)
            node.replace_all_uses_with(inputs[id(value)])
            gm.graph.erase_node(node)
        else:
            first.prepend(node)
    gm.graph.lint()
    gm.recompile()
    return lifted
