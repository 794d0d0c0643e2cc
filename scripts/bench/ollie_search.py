"""Derivation search: time, states and steps, with guidance and fingerprints and without (ollie_search.csv).

    python scripts/bench/ollie_search.py [--depth 7] [--beam 4] [--rounds 3] [--budget-s 60]

A depth is a number of explorative steps. The paper's artifact (C++, its own machine) searched to depth 7 in
7.2, 54, 101 and 0.7 s. Nothing is run: searches depend on the shapes only. "products" are steps until every
contraction is a matrix product.
"""

import gc
import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

from common import Table, parse
from harness import Contender, Race

from ollie_compile import lift
from ollie_compile.expr import Scope
from ollie_compile.search.hybrid import SearchResult, search
from ollie_compile.targets.matmul import match_matmul

_conv = partial(lift.convolution, stride=(1, 1), dilation=(1, 1))
OPERATORS: dict[str, Callable[[], Scope]] = {
    "Conv3x3": lambda: _conv((1, 64, 56, 56), (64, 64, 3, 3), padding=(1, 1)),
    "ConvTranspose": lambda: lift.transposed_convolution(
        (1, 256, 4, 4), (256, 128, 4, 4), stride=(2, 2), padding=(1, 1), output_padding=(0, 0)
    ),
    "Conv5x5": lambda: _conv((1, 32, 56, 56), (32, 32, 5, 5), padding=(2, 2)),
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


def one_search(make: Callable[[], Scope], **options: float) -> dict[str, float | str]:
    result = search(make(), **options)
    stats = result.stats
    return {
        "seconds": stats.seconds,
        "states": float(stats.states),
        "met_again": float(stats.duplicates),
        "candidates": float(stats.candidates),
        "steps_to_products": steps_to_operators(result),
    }


def main() -> None:
    options = parse(__doc__, depth=7, beam=4, rounds=3, budget_s=60.0)
    limits = {"max_depth": options.depth, "beam": options.beam, "budget_s": options.budget_s}
    table = Table("ollie_search", "Derivation search", f"medians of interleaved rounds; {options}")
    for name, make in OPERATORS.items():
        searches = {mode: partial(one_search, make, **limits, **flags) for mode, flags in MODES.items()}
        # Scopes remember what was derived from them: no search profits from another's.
        forgotten = {
            mode: Contender(call, lambda: nullcontext(gc.collect())) for mode, call in searches.items()
        }
        race = Race(forgotten, equal=None, keep=True)
        # Searches take seconds and begin with nothing: no untimed ones.
        for mode, times in race.run(options.rounds, untimed=0).items():
            seconds = statistics.median(float(row["seconds"]) for row in times.results)
            table.add(f"{name}: {mode}", **{**times.results[0], "seconds": seconds})
    table.finish()


if __name__ == "__main__":
    main()
