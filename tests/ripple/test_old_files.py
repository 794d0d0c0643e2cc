"""What was written before the folders: read as it was meant, or refused with the reason."""

import base64
import hashlib
import pickle

import numpy as np
import pytest
import torch

from ripple_loader import ReorderConfig, RippleConfig, RippleReport
from ripple_loader.format.layout import VERSION, SidecarHeader
from ripple_loader.format.writer import SidecarWriter

PICKLES = {
    "RippleConfig": """
gASVEQEAAAAAAACMFHJpcHBsZV9sb2FkZXIuY29uZmlnlIwMUmlwcGxlQ29uZmlnlJOUKYGUfZQojAxxdWFudF9tZXRob2SUjAZy
aXBwbGWUjAtkcmFtX2J1ZGdldJSMBDFNaUKUjARrZWVwlEc/4AAAAAAAAIwGcmVjYWxslEc/8AAAAAAAAIwJYWRqYWNlbmN5lEcA
AAAAAAAAAIwIc3RyYXRlZ3mUjARhdXRvlIwJbWVyZ2VfZ2FwlGgNjAhwcmVmZXRjaJSIjAZidWZmZXKUjAQyTWlClIwLcXVldWVf
ZGVwdGiUSyCMCWlvX2VuZ2luZZRoDYwMY2FjaGVfcG9saWN5lIwGbGlua2VklIwGdmVyaWZ5lIl1Yi4=
""",
    "ReorderConfig": """
gASV+AAAAAAAAACMFHJpcHBsZV9sb2FkZXIuY29uZmlnlIwNUmVvcmRlckNvbmZpZ5STlCmBlH2UKIwJcGxhY2VtZW50lIwGbGlu
a2VklIwGdG9rZW5zlEsHjA9zZXF1ZW5jZV9sZW5ndGiUTQACjAZhY3RpdmWUjAV0b3Bfa5SMDGFjdGl2ZV9zaGFyZZRHP+AAAAAA
AACMCHBhcnRuZXJzlEsgjAd0d29fb3B0lIiMCWhvdF9zaGFyZZRHP7mZmZmZmZqMCXByZWRpY3RvcpRHP8AAAAAAAACMB2J1bmRs
ZXOUjARzYW1llIwHd29ya2Vyc5RLAowEc2VlZJRLAHViLg==
""",
    "RippleReport": """
gASVRgEAAAAAAACMFHJpcHBsZV9sb2FkZXIucmVwb3J0lIwMUmlwcGxlUmVwb3J0lJOUKYGUfZQojAlkaXJlY3RvcnmUjAFklIwG
bGF5ZXJzlEsBjAduZXVyb25zlEsCjAZidWRnZXSUSwOMCHJlc2lkZW50lH2UjAtjYWNoZV9zbG90c5RdlIwGcGlubmVklEsAjAlm
YWxsYmFja3OUXZSMBWRyaXZllIwAlIwIc3RyYXRlZ3mUaBKMBnRva2Vuc5RLAIwGYWN0aXZllEsAjARoaXRzlEsAjAZtaXNzZXOU
SwCMCWV2aWN0aW9uc5RLAIwIcmVxdWVzdHOUSwCMCmJ5dGVzX3JlYWSUSwCMBXdob2xllEsAjAhmb3Jlc2VlbpRLAIwFYXNrZWSU
SwCMCnJlYWRfYWhlYWSUSwCMDHJlYWRfaW5fdmFpbpRLAHViLg==
""",
}
SIDECARS = {
    "F32": "5fde5f44a47ea8aa2e9cd558cb289199ee2f970e9fb81a34f2ae303f3f0ef023",
    "BF16": "4f15a9d17a6b9a98eed25ed4017ffbee86b03edf2e8a07e4c7a737a01427a19a",
    "I8": "01ab4ce9aeaa7184296f6854b41f80bd5685eb19cd380c2f823231a1e0908568",
    "I4": "e005e3e61ba737591dd941e57c37eb68e33eb022773f52acb1583c362b9ac195",
}
"""SHA-256 of sidecars that version 4's first writer made of the weights below, which no encoding rounds."""


@pytest.mark.parametrize("dtype", SIDECARS)
def test_sidecars_of_a_version_have_the_same_bytes(dtype, tmp_path):
    """A writer that gives other bytes needs another version, or old sidecars would be misread."""
    assert VERSION == 4
    header = SidecarHeader(
        model_type="llama",
        layers=2,
        neurons=6,
        hidden=40,
        rows=3,
        dtype=dtype,
        exact_zeros=False,
        hot=[1, 0],
        checkpoint="0" * 64,
        files={"model.safetensors": "1" * 64},
        base={"model.safetensors": "2" * 64},
        profile={"uses": [[3.0, 1.0]] * 2},
    )
    with SidecarWriter(tmp_path / "sidecar", header) as writer:
        for layer in range(2):
            rows = [(torch.arange(240).view(6, 40) * (7 + row + layer) % 15 - 8).float() for row in range(3)]
            for row in rows:
                row[:, 0] = -8
            biases = {0: torch.arange(6).float(), 2: torch.arange(40).float()}
            writer.write_layer(rows, biases, np.arange(6)[::-1].copy())
    assert hashlib.sha256((tmp_path / "sidecar").read_bytes()).hexdigest() == SIDECARS[dtype]


@pytest.mark.parametrize(
    "expected",
    [
        RippleConfig(dram_budget="1MiB", keep=0.5),
        ReorderConfig(tokens=7),
        RippleReport(directory="d", layers=1, neurons=2, budget=3),
    ],
    ids=lambda expected: type(expected).__name__,
)
def test_pickles_of_public_names_load(expected):
    found = pickle.loads(base64.b64decode(PICKLES[type(expected).__name__]))
    assert type(found) is type(expected)
    assert all(getattr(found, name) == value for name, value in vars(expected).items())


def test_a_pickle_of_a_moved_name_says_what_it_does_not_find():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'ripple_loader\.placement'"):
        pickle.loads(b"cripple_loader.placement\nPlan\n.")
