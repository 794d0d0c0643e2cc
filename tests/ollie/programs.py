"""Random programs: modules, and sessions in which they are compiled, called and changed, as Python source.

A program is drawn from a seed. Its source defines `session(compiled)`, a generator of labelled values, which
are outputs, gradients, buffers and counters. With `compiled=lambda f: f` they are eager torch's.
"""

from __future__ import annotations

import itertools
import random
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.ollie.program_parts import CALLS, ENTRIES, LAYERS, PREAMBLE, RESULTS, STEPS, Part

KINDS = frozenset(part.kind for part in (*LAYERS, *RESULTS, *ENTRIES, *STEPS))
SIZES = {1: (12,), 2: (5, 6), 3: (3, 4, 3)}
CHANNELS = (4, 4, 4, 6)
BLOCKS = ("[Block()]", "[Block(), Block()]", "[Block()] * 2")
CHOICE = re.compile(r"<([^<>]*\|[^<>]*)>")

AMPLE_S = 600
# Kernels in C++ take seconds to build, so that few programs may use them.
OPTIONS: dict[str, dict[str, Any]] = {
    "forced": {"tune": "model", "margin": 0.0, "budget_s": AMPLE_S, "candidates": 1, "portable": True},
    "timed": {"budget_s": AMPLE_S, "candidates": 1, "portable": True},
}
FURTHER: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"freeze": True},
    {"freeze": True},
    {"freeze": True, "portable": False},
    {"budget_s": 0.3},
    {"budget_s": 0.3, "freeze": True},
    {"budget_s": 0},
    {"budget_s": 0, "freeze": True},
    {"non_finite": "exact"},
    {"non_finite": "exact", "freeze": True},
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """One program; its parts are drawn, so that source stands in place of their marks.

    Attributes:
        block, outer: layers of `Block`, of which a network has several instances, and of the network itself.
        blocks: the instances of `Block`, as an expression.
        steps: of the session.
        wide: whether its numbers are float64, so that rounding cannot hide a wrong one.
        named: arguments of `torch.compile` beside the backend.
        style: how it is run, as in `program_runs.styled`.
    """

    seed: int
    dims: int
    channels: int
    block: tuple[Part, ...]
    outer: tuple[Part, ...]
    blocks: str
    result: Part
    entry: Part
    steps: tuple[Part, ...]
    wide: bool
    named: dict[str, Any]
    style: str

    @property
    def source(self) -> str:
        size = ", ".join(map(str, SIZES[self.dims]))
        session = [
            self.entry.body,
            f"net = make({self.seed})",
            "run = entry(net)",
            f"x = random(2, {self.channels}, {size}, seed=0)",
            *(step.body for step in self.steps),
            "with torch.no_grad():\n    yield 'last result', run(x)",
            "yield 'last state', (state(net), len(times_seen))",
        ]
        outer = [
            f"self.blocks = nn.ModuleList({self.blocks})",
            "self.scale = nn.Parameter(torch.randn(4))",
            "self.register_buffer('table', torch.randn(2, 2))",
        ]
        return "\n\n".join(
            [
                PREAMBLE.replace("{DTYPE}", "torch.float64" if self.wide else "torch.float32"),
                _module("Block", [], self.block, ["return x"]),
                _module(
                    "Net",
                    outer,
                    self.outer,
                    ["for block in self.blocks:\n    x = block(x)", f"return {self.result.body}"],
                ),
                _function("session(compiled)", session),
                "",
            ]
        )

    def smaller(self) -> Iterator[Program]:
        """The programs with one step or layer less, or with a plainer result or entry."""
        for field in ("steps", "outer", "block"):
            parts = getattr(self, field)
            for place in reversed(range(len(parts))):
                yield replace(self, **{field: parts[:place] + parts[place + 1 :]})
        for field, plain in (("result", RESULTS[0]), ("entry", ENTRIES[0]), ("blocks", BLOCKS[0])):
            if getattr(self, field) != plain:
                yield replace(self, **{field: plain})


def shrunk(program: Program, fails: Callable[[Program], bool]) -> Program:
    """A program that still fails, and of which nothing can be left out."""
    while (found := next(filter(fails, program.smaller()), None)) is not None:
        program = found
    return program


def _module(name: str, init: list[str], layers: tuple[Part, ...], last: list[str]) -> str:
    inits = [*init, *(layer.init for layer in layers if layer.init)]
    text = f"class {name}(nn.Module):\n"
    text += textwrap.indent(_function("__init__(self)", ["super().__init__()", *inits]), "    ")
    body = ["given = x", *(layer.body for layer in layers), *last]
    return text + "\n\n" + textwrap.indent(_function("forward(self, x)", body), "    ")


def _function(signature: str, statements: list[str]) -> str:
    return f"def {signature}:\n" + textwrap.indent("\n".join(statements), "    ")


def draw(seed: int, kinds: Collection[str] = KINDS, *, small: bool = False) -> Program:
    """The program of a seed, of these kinds alone, and one that eager torch can run.

    Args:
        small: draws two layers and two steps, which compile in two seconds.
    """
    from tests.ollie.program_runs import runs

    for attempt in itertools.count():
        program = Drawing(seed, attempt, kinds, small=small).program()
        if runs(program.source):
            return program
    raise AssertionError("unreachable")


class Drawing:
    """Draws the parts of one program."""

    def __init__(self, seed: int, attempt: int, kinds: Collection[str], *, small: bool) -> None:
        self.random = random.Random(f"{seed}.{attempt}")
        self.seed, self.kinds, self.small = seed, kinds, small
        self.dims = self.choose((1, 1, 2, 2, 2, 2, 3))
        self.channels = self.choose(CHANNELS)
        self.number = 0

    def choose(self, among: Sequence[Any]) -> Any:
        return self.random.choice(among)

    def program(self) -> Program:
        layers = [self.part(LAYERS) for _ in range(self.choose((2,) if self.small else (2, 2, 3)))]
        cut = self.choose(range(1, len(layers)))
        style = self.choose(("forced", "forced", "forced", "timed"))
        return Program(
            seed=self.seed,
            dims=self.dims,
            channels=self.channels,
            block=tuple(layers[:cut]),
            outer=tuple(layers[cut:]),
            blocks=self.choose(BLOCKS[:1] if self.small else BLOCKS),
            result=self.part(RESULTS),
            entry=self.part(ENTRIES),
            steps=self.steps(),
            wide=self.small or self.choose((True, False)),
            named=self.named({part.kind for part in layers}, style),
            style=style,
        )

    def steps(self) -> tuple[Part, ...]:
        """A call, and steps after it; a small program is first called without gradients, to compile once."""
        if self.small:
            return self.part(CALLS[:1]), self.part(STEPS)
        return tuple(self.part(steps) for steps in [CALLS] + [STEPS] * self.choose((1, 1, 2)))

    def part(self, among: tuple[Part, ...]) -> Part:
        """A part, its kind drawn first, so that kinds of many parts are not drawn more often."""
        fitting = [part for part in among if part.kind in self.kinds and str(self.dims) in part.dims]
        kind = self.choose(sorted({part.kind for part in fitting}))
        part = self.choose([part for part in fitting if part.kind == kind])
        self.number += 1
        return part._replace(body=self.drawn(part.body), init=self.drawn(part.init))

    def drawn(self, text: str) -> str:
        marks = {
            "{N}": self.number,
            "{D}": self.dims,
            "{C}": self.channels,
            "{H}": self.channels // 2,
            "{S}": SIZES[self.dims],
        }
        for mark, value in marks.items():
            text = text.replace(mark, str(value))
        while match := CHOICE.search(text):
            text = text[: match.start()] + self.choose(match[1].split("|")) + text[match.end() :]
        return text

    def named(self, layers: set[str], style: str) -> dict[str, Any]:
        """Arguments of `torch.compile` beside the backend."""
        options = OPTIONS[style] | self.choose(FURTHER)
        options["max_depth"] = self.choose((0, 0, 1)) if style == "forced" and not self.small else 0
        if "dropout" in layers:  # Inductor draws other random numbers otherwise
            options["fallback_random"] = True
        return {"options": options, "dynamic": self.choose((None, None, False, False, False, True))}
