"""Derivations that the search must find by itself, in the printed notation (derivations.yaml)."""

from pathlib import Path

import pytest
import yaml

from ollie_compile.expr import Input, Scope, parse
from ollie_compile.rules.bilinear import TILES
from ollie_compile.rules.cook_toom import LARGEST, matrices
from ollie_compile.search import search
from ollie_compile.verify import check_derivation

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
