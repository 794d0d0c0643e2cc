"""The pass over Inductor's graphs that gives each product to the library which is faster for its shape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ollie_compile import compat, store
from ollie_compile.compat import CustomGraphPass, get_hash_for_files
from ollie_compile.measure import products
from ollie_compile.measure.isolation import outside_compilation
from ollie_compile.measure.machine import Machine
from ollie_compile.measure.profile import Profile
from ollie_compile.report.report import Report

logger = logging.getLogger(__name__)

_SOURCES = tuple(map(str, store.sources()))


class LibraryPass(CustomGraphPass):
    """Gives each product to the library that is faster, as Inductor's `post_grad_custom_pre_pass`.

    Args:
        margin: share by which another library must beat the one that Inductor calls.
        machine: holds earlier timings.
        before: the user's own passes.
    """

    def __init__(
        self,
        margin: float,
        report: Report,
        machine: Machine,
        before: Sequence[Callable[[fx.Graph], None]] = (),
    ) -> None:
        self.margin, self.report, self.machine, self.before = margin, report, machine, before

    def __deepcopy__(self, memo: dict[int, Any]) -> LibraryPass:
        return self

    def uuid(self) -> Any:
        """None, so that Inductor caches nothing, where passes of users have no identity."""
        theirs = [custom.uuid() if isinstance(custom, CustomGraphPass) else None for custom in self.before]
        decisive = (self.margin, torch.get_num_threads(), theirs)
        return None if None in theirs else get_hash_for_files(_SOURCES, repr(decisive))

    def __call__(self, graph: fx.Graph) -> None:
        for custom in self.before:
            custom(graph)
        if not compat.is_exporting():  # what is exported runs without Python
            self._move(graph, products.move_plain)

    def choose_packed(self, graph: fx.Graph) -> None:
        """Do the same for products whose weights are constants, of a graph to be folded again."""
        self._move(graph, products.move_packed)

    def _move(self, graph: fx.Graph, move: Callable[[fx.Node, Profile, float], str]) -> None:
        if not compat.has_onednn():
            return
        moved = set()
        for node in list(graph.nodes):
            try:
                with outside_compilation():
                    moved.add(move(node, self.machine.profile, self.margin))
            except Exception:  # such as too little memory for what is measured
                logger.warning("ollie: %s stays as Inductor computes it", node, exc_info=True)
        self.machine.profile.save()
        for which in sorted(moved - {""}):
            self.report.note(f"products are computed by {which} where it is faster than what Inductor calls")
