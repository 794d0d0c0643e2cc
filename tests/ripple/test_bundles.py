import json
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from ripple_loader.checkpoint.shards import DTYPES
from ripple_loader.format.bundles import pack_bundles, unpack_bundles
from ripple_loader.format.encoding import ENCODINGS
from ripple_loader.format.layout import SIDECAR, SidecarHeader, Vectors
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.format.sketch import sketch_rows
from ripple_loader.format.writer import SidecarWriter
from ripple_loader.storage.blocks import BLOCK

from .conftest import load

SHAPES = st.builds(
    lambda layers, neurons, hidden, rows, dtype: (layers, neurons, hidden, rows, dtype),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 1100),
    st.sampled_from([2, 3]),
    st.sampled_from(sorted(ENCODINGS)),
)
FIXTURES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)


@FIXTURES
@given(shape=SHAPES)
def test_round_trip(shape, tmp_path):
    layers, neurons, hidden, rows, dtype = shape
    header = SidecarHeader(
        model_type="llama",
        layers=layers,
        neurons=neurons,
        hidden=hidden,
        rows=rows,
        dtype=dtype,
        exact_zeros=False,
        hot=[0] * layers,
        checkpoint="0" * 64,
        files={"model.safetensors": "1" * 64},
        base={"model.safetensors": "2" * 64},
        profile={"placement": "linked"},
    )
    torch.manual_seed(0)
    stored = ENCODINGS[dtype].dtype if dtype in DTYPES else torch.float32
    weights = [[torch.randn(neurons, hidden).to(stored) for _ in range(rows)] for _ in range(layers)]
    orders = [np.random.default_rng(layer).permutation(neurons) for layer in range(layers)]
    biases = {rows - 1: torch.randn(hidden).to(stored), 0: torch.randn(neurons).to(stored)}
    with SidecarWriter(tmp_path / SIDECAR, header) as writer:
        for layer in range(layers):
            writer.write_layer(weights[layer], biases, orders[layer])

    sidecar = Sidecar(tmp_path)
    sidecar.verify()
    assert sidecar.header == header
    for layer in range(layers):
        assert (sidecar.permutation(layer) == orders[layer]).all()
        bundles, whole = sidecar.bundles(layer), torch.stack(weights[layer], dim=1)
        assert torch.equal(bundles, pack_bundles(weights[layer], header.encoding))
        back = unpack_bundles(bundles, header, torch.float32)
        assert torch.equal(sidecar.bundle(layer, neurons - 1), back[-1])
        if dtype in DTYPES:
            assert torch.equal(unpack_bundles(bundles, header, stored), whole)
        else:
            assert (back - whole).norm() < (0.02 if dtype == "I8" else 0.2) * whole.norm()
        offset, size = sidecar.section(layer, "vectors")
        data = np.fromfile(sidecar.path, np.uint8, size, offset=offset)
        vectors = Vectors.unpack(data.data, rows, neurons, hidden)
        assert (vectors.down_bias == biases[rows - 1].float().numpy()).all()
        assert (vectors.bias[0] == biases[0].float().numpy()).all()
        assert rows == 2 or (vectors.bias[1] == 0).all()
    with safe_open(sidecar.path, "np") as container:
        assert set(container.keys()) == {*sidecar.layout.offsets, "checksums"}
    assert all(offset % BLOCK == 0 for offset in sidecar.layout.offsets.values())


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 200), st.integers(0, 1 << 20))
def test_the_sketch_bounds_what_it_hides(neurons, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(neurons, hidden, generator=generator), torch.randn(hidden, generator=generator)
    rounded, scale, error = map(torch.from_numpy, sketch_rows(weight))
    hidden_part = (weight.double() - rounded.double() * scale[:, None].double()) @ x.double()
    assert (hidden_part.abs() <= error * x.norm() * (1 + 1e-5) + 1e-6).all()
    assert (rounded.abs() <= 127).all()


def test_the_sketch_of_a_row_of_zeros():
    rounded, _, error = sketch_rows(torch.zeros(2, 3))
    assert not rounded.any()
    assert not error.any()


def test_a_bundle_holds_the_rows_of_a_neuron():
    rows = [torch.full((5, 4), float(number)) for number in range(3)]
    bundles = pack_bundles(rows, ENCODINGS["F32"]).view(torch.float32)
    assert bundles.tolist() == [[0.0] * 4 + [1.0] * 4 + [2.0] * 4] * 5


@pytest.fixture
def copy(reordered, tmp_path):
    shutil.copytree(reordered("llama"), tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_a_flipped_byte_is_found_and_placed(share, copy):
    path = copy / SIDECAR
    layout = Sidecar(copy).layout
    first, last = len(layout.container), layout.checksums_at
    where = int(first + share * (last - first))
    with path.open("r+b") as file:
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(where)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match=rf"{path} is damaged at byte \d+") as error:
        Sidecar(copy).verify()
    damaged = int(str(error.value).split("at byte ")[1].split(":")[0])
    assert damaged <= where < damaged + (1 << 20)
    with pytest.raises(ValueError, match="is damaged"):
        load(copy, verify=True)


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1, -5000])
def test_a_truncated_sidecar_is_refused_at_once(size, copy):
    path = copy / SIDECAR
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(ValueError, match="is damaged at byte"):
        load(copy)


def rewrite_header(path, change):
    """Replace the description in the header, keeping everything else."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    container = json.loads(data[8 : 8 + length])
    description = json.loads(container["__metadata__"]["ripple"])
    container["__metadata__"]["ripple"] = json.dumps(change(description))
    text = json.dumps(container).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "format version 1"),
        ({"layers": 1 << 40}, "is damaged"),
        ({"layers": 1 << 30}, "is damaged"),
        ({"neurons": 1 << 30}, "is damaged"),
        ({"neurons": -1}, "is damaged"),
        ({"hidden": "32"}, "is damaged"),
        ({"rows": 7}, "is damaged"),
        ({"dtype": "I64"}, "is damaged"),
        ({"hot": [0]}, "is damaged"),
        ({"hot": [0, 97]}, "is damaged"),
        ({"hot": 0}, "is damaged"),
        ({"experts": 3}, "is damaged"),
        ({"extra": 1}, "is damaged"),
    ],
)
def test_descriptions_that_do_not_hold(change, message, copy):
    rewrite_header(copy / SIDECAR, lambda description: description | change)
    with pytest.raises(ValueError, match=message):
        Sidecar(copy)


@FIXTURES
@given(junk=st.binary(min_size=1, max_size=400), where=st.integers(0, 3000))
def test_a_fuzzed_header_is_read_as_before_or_refused(junk, where, reordered, tmp_path):
    original = reordered("llama") / SIDECAR
    data = bytearray(original.read_bytes())
    data[where : where + len(junk)] = junk
    (tmp_path / SIDECAR).write_bytes(data)
    if data == original.read_bytes():
        Sidecar(tmp_path).verify()
        return
    with pytest.raises(ValueError, match=str(tmp_path)):
        Sidecar(tmp_path).verify()
