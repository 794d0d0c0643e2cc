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
    "F32": "7d0753cd7eb2ccadc01ad02adc7c5599213374d977b2ed13c1ac0ff514cfdbfe",
    "BF16": "e8f5f553819c4cdc957e60680ced0bed307f25234fce6a14a4539975401eca87",
    "I8": "e7f575c3db762d669d1a9d5716d03a444308313abf994940cf0ce87a6db9e438",
    "I4": "6cf0e322979965aa8f99236a63b0dbea212b9f8c4604e488db2718954b2a68d5",
}
"""SHA-256 of sidecars that version 5's first writer made of the weights below, which no encoding rounds."""


@pytest.mark.parametrize("dtype", SIDECARS)
def test_sidecars_of_a_version_have_the_same_bytes(dtype, tmp_path):
    """A writer that gives other bytes needs another version, or old sidecars would be misread."""
    assert VERSION == 5
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
        RippleConfig(dram_budget="1MiB", keep=0.5, buffer="2MiB"),  # the default of its time
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
