"""Compiled graphs with constants that belong to certain weights: each call says which weights it has.

Dynamo compiles one graph for all modules of a class, and weights change. So the constants of a graph are kept
for several sets of weights, known by the tensors themselves, their versions and where their data lies.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ollie_compile.compat import freezing as inductor
from ollie_compile.graph.transforms import Function, transformed

MOST_SETS = 64  # of weights that a graph keeps constants for; the least recently used goes first
MOST_REMADE = 16  # sets that may be made ahead of as many calls that need none
SAMPLES = 64  # values of a weight that are compared in each call

_version, _pointer, _bytes = attrgetter("_version"), Tensor.data_ptr, np.ndarray.tobytes
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


class OtherWeightsError(Exception):
    """Raised for weights that a graph has no constants for and does not make any."""


@dataclass(frozen=True, slots=True)
class Program:
    """What Inductor compiled, and how the constants of other weights are made.

    Args:
        compiled: takes a list of the inputs that are no weights and the constants that are inputs.
        inside: the names in its module of the other constants, which only oneDNN and MKL read.
        transforms: a function of the weights that gives the constants inside, then those that are inputs;
            None where Inductor made a constant in a way that is not known.
        aliases: for each weight the first one that has its data at the same place.
    """

    compiled: Callable[[list[Any]], Any]
    inside: tuple[str, ...]
    transforms: Function | None
    aliases: list[int]


class _Set:
    """A set of weights and the constants that a graph has for them.

    It refers to the weights weakly but to their data strongly: other weights of the same version could
    come to lie in memory that is freed.
    """

    __slots__ = ("call", "inputs", "pointers", "samples", "storages", "values", "versions", "weights")

    def __init__(
        self,
        program: Program,
        weights: Sequence[Tensor],
        constants: Sequence[Tensor],
        dead: Callable[..., None],
    ) -> None:
        self.versions, self.pointers = list(map(_version, weights)), list(map(_pointer, weights))
        self.storages = [weight.untyped_storage() for weight in weights]
        self.samples = [_sample(weight) for weight in weights if weight.is_cpu]
        self.values = self._sampled()
        self.weights = [weakref.ref(weight, dead) for weight in weights]
        inside = dict(zip(program.inside, constants, strict=False))
        self.call = inductor.with_constants(program.compiled, inside) if inside else program.compiled
        self.inputs = tuple(constants[len(inside) :])

    def unchanged(self, weights: Sequence[Tensor]) -> bool:
        """Whether these, which are the same tensors, have the same values as far as can be seen quickly."""
        return (
            list(map(_version, weights)) == self.versions
            and list(map(_pointer, weights)) == self.pointers
            and self._sampled() == self.values
        )

    def _sampled(self) -> list[bytes]:
        return list(map(_bytes, self.samples))


class FrozenGraph:
    """A compiled aten graph whose weights are held as constants.

    Threads may call it at once: two that meet new weights both make their constants, and one is kept.

    Args:
        held, others: the places of the weights, and of all else, among the graph's inputs.
        weights, constants: those that the program was compiled for.
    """

    _boxed_call = True  # AOTAutograd hands over its list of arguments, which is to be emptied

    def __init__(
        self,
        program: Program,
        held: Sequence[int],
        others: Sequence[int],
        weights: Sequence[Tensor],
        constants: Sequence[Tensor],
    ) -> None:
        self._program = program
        self._weights, self._others = _picked(held), _picked(others)
        self._sets: dict[tuple[int, ...], _Set] = {}
        self._latest: tuple[int, ...] = ()
        self._constant_results: tuple[int, ...] | None = None
        self._may_make = MOST_REMADE
        self._refused: tuple[int, ...] = ()
        self._add(weights, constants)
        if program.inside:
            inductor.drop_constants(program.compiled, program.inside)
        _frozen.add(self)

    def __call__(self, args: list[Any]) -> Any:
        """Run the graph.

        Raises:
            OtherWeightsError: constants cannot be made of these weights, or have been made so often that they
                do not pay.
        """
        weights = self._weights(args)
        ids = tuple(map(id, weights))
        known = self._sets.get(ids)
        if known is None or not known.unchanged(weights):
            known = self._add(weights, self._made(weights))
        else:
            self._may_make = min(self._may_make + 1, MOST_REMADE)
            if ids != self._latest:
                self._latest = ids
                self._sets[ids] = self._sets.pop(ids, known)
        others = self._others(args)
        args.clear()
        results = known.call([*others, *known.inputs])
        if self._constant_results is None:
            self._constant_results = _shared(results, known.inputs, others)
        return _owned(results, self._constant_results) if self._constant_results else results

    def forget(self, ids: Set[int] | None = None) -> None:
        """Forget the constants of sets with one of these tensors, or all; the next call makes them anew."""
        for known in list(self._sets):
            if ids is None or not ids.isdisjoint(known):
                self._sets.pop(known, None)

    def _made(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._program.transforms is None or aliases(weights) != self._program.aliases:
            raise OtherWeightsError
        if self._may_make > 0:
            self._may_make -= 1
        else:  # weights that no longer change are those of the call before
            before, self._refused = self._refused, (*map(id, weights), *map(_version, weights))
            if before != self._refused:
                raise OtherWeightsError
        return transformed(self._program.transforms, weights)

    def _add(self, weights: Sequence[Tensor], constants: Sequence[Tensor]) -> _Set:
        ids = tuple(map(id, weights))
        dead = functools.partial(_forget, weakref.ref(self), ids)
        self._sets.pop(ids, None)
        self._sets[ids] = added = _Set(self._program, weights, constants, dead)
        self._latest = ids
        for oldest in list(self._sets)[:-MOST_SETS]:
            self._sets.pop(oldest, None)
        return added


_frozen: weakref.WeakSet[FrozenGraph] = weakref.WeakSet()


def refreeze(model: nn.Module | None = None) -> None:
    """Have frozen weights transformed anew in the next call.

    Changes of weights are seen by themselves: in place, by `load_state_dict`, by an optimizer, by another
    tensor or Parameter in their place. Only what is written in place through `weight.data` or through another
    library's view of the memory leaves no trace; call this after it.

    Args:
        model: the module, compiled or not, whose weights have changed; None is every module.
    """
    ids = None if model is None else {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for graph in list(_frozen):
        graph.forget(ids)


def _sample(weight: Tensor) -> np.ndarray:
    """A few values of a weight, from its first to its last, as a view of its memory."""
    if not weight.numel():
        return np.empty(0)
    step = (_reach(weight) - 1) // (SAMPLES - 1)
    few = weight.detach().as_strided((SAMPLES if step else 1,), (max(step, 1),))
    return few.view(_INTEGERS[few.itemsize]).numpy()


def aliases(weights: Sequence[Tensor]) -> list[int]:
    """For each weight the first one that has its data at the same place."""
    first: dict[int, int] = {}
    return [first.setdefault(pointer, place) for place, pointer in enumerate(map(_pointer, weights))]


def _forget(graph: weakref.ref[FrozenGraph], ids: tuple[int, ...], _: Any) -> None:
    """A weight is gone: the `id` may become another's."""
    if (known := graph()) is not None:
        known._sets.pop(ids, None)


def _picked(places: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda args: [args[place] for place in places]


def _shared(results: Sequence[Any], constants: Sequence[Tensor], others: Sequence[Any]) -> tuple[int, ...]:
    """The places of results that lie in the memory of constants, which are so in every call."""
    inputs = {_memory(value) for value in others if isinstance(value, Tensor)}
    memory = {_memory(constant) for constant in constants} - inputs - {None}
    return tuple(
        place for place, one in enumerate(results) if isinstance(one, Tensor) and _memory(one) in memory
    )


def _memory(tensor: Tensor) -> int | None:
    return tensor.untyped_storage().data_ptr() or None


def _owned(results: Sequence[Any], places: Iterable[int]) -> list[Any]:
    """Results with copies in the place of constants; those that share memory share it with each other."""
    results = list(results)
    groups: dict[tuple[int | None, torch.dtype], list[int]] = {}
    for place in places:
        groups.setdefault((_memory(results[place]), results[place].dtype), []).append(place)
    for group in groups.values():
        begin = min(results[place].storage_offset() for place in group)
        end = max(results[place].storage_offset() + _reach(results[place]) for place in group)
        memory = results[group[0]].as_strided((end - begin,), (1,), begin).clone().untyped_storage()
        for place in group:
            one = results[place]
            results[place] = torch.empty(0, dtype=one.dtype, device=one.device).set_(
                memory, one.storage_offset() - begin, one.shape, one.stride()
            )
    return results


def _reach(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
