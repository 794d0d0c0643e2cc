"""Products with neurons as they are stored are those with decoded neurons."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ripple_loader.format.encoding import ENCODINGS
from ripple_loader.kernels import bundles, compiling
from ripple_loader.kernels.bundles import MOST_TOKENS, StoredProducts, stored_products

from .conftest import load, relative_error, token_ids

KERNELS = ("F32", "BF16", "F16", "I8", "I4")


def stored(name, neurons, hidden, rows, seed=0):
    """Bundles of random neurons, uint8 (N, B), and their decoded rows, float64, (N, H) each."""
    generator = torch.Generator().manual_seed(seed)
    encoding = ENCODINGS[name]
    encoded = [encoding.encode(torch.randn(neurons, hidden, generator=generator)) for _ in range(rows)]
    decoded = [torch.empty(neurons, hidden) for _ in range(rows)]
    for bytes_NB, out in zip(encoded, decoded, strict=True):
        encoding.decode(bytes_NB, out)
    return torch.cat(encoded, 1), [one.double() for one in decoded]


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(KERNELS),
    neurons=st.integers(1, 40),
    hidden=st.integers(1, 140),
    rows=st.sampled_from([2, 3]),
    tokens=st.integers(1, 2 * MOST_TOKENS + 1),
    skipped=st.integers(0, 5),
    threads=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_products_are_those_with_decoded_neurons(name, neurons, hidden, rows, tokens, skipped, threads, data):
    """Wherever the bundles lie, at odd bytes too, and in any order."""
    bundles_NB, (*selecting, down) = stored(name, neurons, hidden, rows)
    order = np.array(data.draw(st.permutations(range(neurons)))[: data.draw(st.integers(1, neurons))])
    memory = torch.cat([torch.full((skipped,), 255, dtype=torch.uint8), bundles_NB.view(-1)])
    offsets = skipped + order * bundles_NB.shape[1]
    products = StoredProducts(name, ENCODINGS[name].row_bytes(hidden), hidden, rows - 1)
    x, a = torch.randn(tokens, hidden), torch.randn(tokens, len(order))
    a[:, ::3] = 0
    y = before = torch.randn(tokens, hidden)
    y = y.clone()
    torch.set_num_threads(threads)
    try:
        got = products.project(memory, offsets, x)
        products.accumulate(memory, offsets, a, y)
    finally:
        torch.set_num_threads(1)
    wanted = torch.stack([x.double() @ weight[order].T for weight in selecting])
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(y.double(), before + a.double() @ down[order], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_half_precision_number_is_read_as_it_is(name):
    dtype = ENCODINGS[name].dtype
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].view(-1, 1)
    products = StoredProducts(name, 2, 1, 1)
    memory = torch.cat([every, every], 1).view(torch.uint8).view(-1)
    got = products.project(memory, np.arange(len(every)) * 4, torch.ones(1, 1))
    assert torch.equal(got.view(-1), every.view(-1).float())


def test_infinity_and_nan_stay():
    memory = torch.tensor([[torch.inf, 0], [torch.nan, 0]], dtype=torch.float16).view(torch.uint8).view(-1)
    got = StoredProducts("F16", 2, 1, 1).project(memory, np.array([0, 4]), torch.ones(1, 1)).view(-1)
    assert got[0] == torch.inf
    assert got[1].isnan()


def test_bundles_beyond_the_memory_are_refused():
    products = StoredProducts("F32", 8, 2, 1)
    with pytest.raises(IndexError, match="within 32 bytes"):
        products.project(torch.zeros(32, dtype=torch.uint8), np.array([17]), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"float32, got torch\.float64"):
        products.project(torch.zeros(32, dtype=torch.uint8), np.array([0]), torch.ones(1, 2).double())


def test_an_encoding_from_outside_has_none():
    assert stored_products("F64", 8, 1, 1) is None


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """No library is compiled or loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiling.library.cache_clear()
    yield tmp_path / "cache" / "ripple_loader" / "kernels"
    compiling.library.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "why"), [("no-such-compiler", "no C.. compiler is installed"), ("false", "false failed")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_compiler_neurons_are_decoded(compiler, why, dtype, reordered, monkeypatch):
    ids, directory = token_ids(9), reordered("llama", dtype)
    fast = load(directory)
    assert not fast.ripple_report.fallbacks
    monkeypatch.setenv("CXX", compiler)
    compiling.library.cache_clear()
    with pytest.warns(UserWarning, match=f"decoded before they are computed with, which is slower: .*{why}"):
        slow = load(directory)
    assert any("decoded" in one for one in slow.ripple_report.fallbacks)
    monkeypatch.delenv("CXX")
    for tokens in (1, MOST_TOKENS, MOST_TOKENS + 1):
        got, wanted = fast(ids[:, :tokens]).logits, slow(ids[:, :tokens]).logits
        assert relative_error(got, wanted) <= (1e-5 if dtype == torch.float32 else 0.02)


def test_one_library_is_kept_for_a_compiler_and_a_processor(fresh, monkeypatch):
    """PEFT's BOFT leaves `CXX=gcc` in the environment, which links without the C++ library."""
    monkeypatch.setenv("CXX", "gcc")
    assert compiling.library().ripple_project
    (kept,) = fresh.iterdir()
    assert fresh.stat().st_mode & 0o777 == 0o700
    compiling.library.cache_clear()
    monkeypatch.setattr(compiling, "_compile", None)
    compiling.library()
    assert list(fresh.iterdir()) == [kept]


def test_a_folder_that_others_write_into_is_refused(fresh):
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    with pytest.raises(OSError, match="writable by nobody else"):
        compiling.library()


def test_a_forked_child_computes_with_one_thread():
    """The threads of OpenMP stay with the parent: a child that asks for them waits for ever."""
    memory, products = stored("F32", 600, 128, 2)[0].view(-1), StoredProducts("F32", 512, 128, 1)
    offsets, x = np.arange(600) * 1024, torch.ones(1, 128)
    torch.set_num_threads(2)
    try:
        wanted = products.project(memory, offsets, x)
        if (child := os.fork()) == 0:
            os._exit(0 if torch.equal(products.project(memory, offsets, x), wanted) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(1)
    assert not bundles._forked
