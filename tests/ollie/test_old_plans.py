"""Plans of an earlier version are refused with the reason, never misread."""

import copy
import json

import pytest
import torch

from ollie_compile import store
from ollie_compile.plan import entries, saved
from tests.ollie.strategies import operator

NAME = "plan-085a0bbab2da35d05065c82cd26e567e3e5e879724938206c9401def3694c21d"
DERIVED = (
    "L[n:0..1, f:0..1, h1:0..4, h2:0..4] {L[h1:0..4, h2:0..4] Sum[c:0..2, r1:0..3, r2:0..3] "
    "A[0, c, h1 + r1 - 1, h2 + r2 - 1] * K[0, c, r1, r2]}[h1, h2]"
)
ENTRY = {
    "operator": "conv2d 1x2x4x4 -> 1 channels, 3x3, stride 1, padding 1, dilation 1",
    "expression": "L[n:0..1, f:0..1, h1:0..4, h2:0..4] Sum[c:0..2, r1:0..3, r2:0..3] "
    "A[n, c + 2*f, h1 + r1 - 1, h2 + r2 - 1] * K[f, c, r1, r2]",
    "inputs": {"A": [1, 2, 4, 4], "K": [1, 2, 3, 3]},
    "conditions": "another processor, 2 threads, torch 2.13.0+cpu, ollie 0b25fdd334f6b4a5",
    "budget_s": 60.0,
    "complete": True,
    "reason": "lowest cost bound",
    "original_s": 2.3e-05,
    "stats": {
        "states": 77,
        "duplicates": 13,
        "pruned": 0,
        "candidates": 77,
        "seconds": 0.36,
        "complete": True,
    },
    "winner": {
        "constants": {},
        "expression": DERIVED,
        "layout": "rows",
        "kernels": "aten",
        "bound_s": 1.47e-10,
        "measured_s": None,
        "compile_s": 0.716,
        "error": 5.2e-08,
        "depth": 0,
        "steps": [[["unit iterator", "idle iterator"], DERIVED]],
    },
}


def conv():
    return operator(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 3, 3), padding=1)


def test_an_exported_file_is_refused_with_both_formats(tmp_path, monkeypatch):
    monkeypatch.setenv(store.FOLDER, str(tmp_path / "plans"))
    file = tmp_path / "plans.json"
    file.write_text(json.dumps({"format": "ollie plans 1", "plans": {NAME: ENTRY}}))
    with pytest.raises(ValueError, match="in the format 'ollie plans 2', got 'ollie plans 1': export"):
        saved.import_plans(file)
    assert not list(store.entries())


def test_an_entry_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"must have the fields .*mixed_error"):
        entries.plan(copy.deepcopy(ENTRY), conv())
