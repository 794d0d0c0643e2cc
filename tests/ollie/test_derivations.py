"""Derivations that the search must find by itself, in the printed notation (derivations.yaml)."""

from pathlib import Path

import pytest
import yaml

from ollie_compile import lift
from ollie_compile.expr import Input, Scope, parse
from ollie_compile.rules.bilinear import TILES
from ollie_compile.rules.cook_toom import LARGEST, matrices
from ollie_compile.search.hybrid import search
from ollie_compile.search.proof import check_derivation

CASES = yaml.safe_load(Path(__file__).with_name("derivations.yaml").read_text())
CONSTANTS = {
    constant.name: constant
    for tile in TILES
    for taps in range(2, LARGEST + 2 - tile)
    for constant in matrices(tile, taps)
}


def scopes(case) -> tuple[Scope, Scope]:
    tensors = {
        name: Input(name, tuple(map(int, shape.split("x")))) for name, shape in case["tensors"].items()
    }
    return parse(case["from"], tensors), parse(case["to"], tensors | CONSTANTS)


@pytest.mark.parametrize("name", CASES)
def test_search_finds(name):
    original, wanted = scopes(CASES[name])
    found = search(original, max_depth=CASES[name]["depth"], budget_s=60.0)
    assert CASES[name]["to"] in [str(derivation.scope) for derivation in found.derivations]
    assert check_derivation(original, wanted, points=16) is None
    assert str(wanted) == CASES[name]["to"]


ODD = {
    "conv": lambda batch: lift.convolution(
        (batch, 4, 7, 5), (3, 4, 3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)
    ),
    "strided conv": lambda batch: lift.convolution(
        (batch, 4, 9, 7), (3, 4, 3, 3), stride=(2, 2), padding=(1, 0), dilation=(1, 1)
    ),
    "dilated conv": lambda batch: lift.convolution(
        (batch, 4, 9, 11), (3, 4, 3, 3), stride=(1, 1), padding=(2, 2), dilation=(2, 2)
    ),
    "grouped conv": lambda batch: lift.convolution(
        (batch, 6, 7), (9, 2, 3), stride=(1,), padding=(1,), dilation=(1,), groups=3
    ),
    "transposed conv": lambda batch: lift.transposed_convolution(
        (batch, 4, 3, 5), (4, 3, 4, 3), stride=(2, 3), padding=(1, 0), output_padding=(1, 0)
    ),
    "conv 3d": lambda batch: lift.convolution(
        (batch, 2, 3, 5, 3), (3, 2, 3, 1, 2), stride=(1, 1, 1), padding=(1, 0, 0), dilation=(1, 1, 1)
    ),
    "banded scores": lambda batch: lift.banded_scores(batch, 23, 3, width=3, dilation=4),
    "banded values": lambda batch: lift.banded_values(batch, 23, 3, width=2, dilation=3),
}


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", ODD)
def test_all_that_is_found_at_odd_sizes_is_exact(name, batch):
    original = ODD[name](batch)
    found = search(original, max_depth=1, budget_s=60.0, beam=4).derivations
    assert len(found) > 3
    for derivation in found[:: max(1, len(found) // 12)]:
        assert check_derivation(original, derivation.scope, points=8) is None
