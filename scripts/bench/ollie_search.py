"""Derivation search: time, states and steps, with guidance and fingerprints and without (ollie_search.csv).

    python scripts/bench/ollie_search.py [--depth 7] [--beam 4] [--rounds 3] [--budget-s 60]

A depth is a number of explorative steps. "best" is the least number of multiplications among the lowerable
expressions found, relative to the original. The paper's artifact (C++, its own machine) searched to depth 7
in 7.2, 54, 101 and 0.7 s. Nothing is run: searches depend on the shapes only. "products" are steps until
every contraction is a matrix product.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable

from common import Table

from ollie_compile import lift
from ollie_compile.expr import Scope
from ollie_compile.search.expansion import products
from ollie_compile.search.hybrid import SearchResult, search
from ollie_compile.targets.matmul import match_matmul

ONE = (1, 1)
OPERATORS: dict[str, Callable[[], Scope]] = {
    "Conv3x3": lambda: lift.convolution(
        (1, 64, 56, 56), (64, 64, 3, 3), stride=ONE, padding=ONE, dilation=ONE
    ),
    "ConvTranspose": lambda: lift.transposed_convolution(
        (1, 256, 4, 4), (256, 128, 4, 4), stride=(2, 2), padding=ONE, output_padding=(0, 0)
    ),
    "Conv5x5": lambda: lift.convolution(
        (1, 32, 56, 56), (32, 32, 5, 5), stride=ONE, padding=(2, 2), dilation=ONE
    ),
    "G2BMM": lambda: lift.banded_scores(8, 10000, 64, width=1000, dilation=4),
}
MODES = {
    "guided, fingerprints": {},
    "without guidance": {"guided": False},
    "without fingerprints": {"fingerprints": False},
    "without both": {"guided": False, "fingerprints": False},
}


def steps_to_operators(result: SearchResult) -> float:
    """Steps of the first candidate whose contractions are all matrix products; nan where there is none."""
    for derivation in result.derivations:
        contractions = [inner for inner in derivation.scope.scopes() if inner.is_contraction]
        if contractions and all(map(match_matmul, contractions)):
            return float(len(derivation.steps))
    return math.nan


def one_search(
    expression: Scope, arguments: argparse.Namespace, flags: dict[str, bool]
) -> dict[str, float | str]:
    result = search(
        expression, max_depth=arguments.depth, budget_s=arguments.budget_s, beam=arguments.beam, **flags
    )
    stats = result.stats
    best = min((float(products(d.scope)) for d in result.derivations), default=math.nan)
    return {
        "seconds": stats.seconds,
        "states": float(stats.states),
        "met_again": float(stats.duplicates),
        "pruned": float(stats.pruned),
        "candidates": float(stats.candidates),
        "steps_to_products": steps_to_operators(result),
        "best": best / products(expression),
        "complete": str(stats.complete),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=7)
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=60.0)
    arguments = parser.parse_args()
    config = f"depth {arguments.depth}, beam {arguments.beam}, budget {arguments.budget_s:.0f} s, "
    config += f"medians of {arguments.rounds} interleaved rounds"
    table = Table("ollie_search", "Derivation search", config)
    for name, make in OPERATORS.items():
        rows: dict[str, list[dict[str, float | str]]] = {mode: [] for mode in MODES}
        for _ in range(arguments.rounds):
            for mode, flags in MODES.items():
                gc.collect()  # scopes remember what was derived from them: no search profits from another's
                rows[mode].append(one_search(make(), arguments, flags))
        for mode, found in rows.items():
            median = sorted(float(row["seconds"]) for row in found)[len(found) // 2]
            table.add(f"{name}: {mode}", **{**found[0], "seconds": median})
    table.finish()


if __name__ == "__main__":
    main()
