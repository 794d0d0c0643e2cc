import pytest
import torch

from ollie_compile import backend


@pytest.fixture(autouse=True)
def _no_wrong_candidate(caplog):
    """A candidate that fails verification fails the test, unless the test expects it and clears the log."""
    yield
    dropped = [record.getMessage() for record in caplog.records if "dropped, it" in record.getMessage()]
    assert not dropped, dropped[0]


@pytest.fixture(autouse=True)
def _nothing_on_disk(monkeypatch):
    """No plan of an earlier run, unless a test names a folder."""
    monkeypatch.setenv("OLLIE_CACHE_DIR", "")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """No graph of an earlier run answers from Inductor's caches: the pass must run."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    backend.CONTEXT.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def always_rewrite(monkeypatch):
    """Bounds so low that every convolution is rewritten, by what compiles quickly."""

    def bound(program, *arguments, **named):
        return 1e-12 * sum(1 for _ in program.scope.scopes())

    monkeypatch.setattr("ollie_compile.measure.bounds.bound_seconds", bound)


@pytest.fixture
def uncompiled(monkeypatch):
    """Inductor's graphs run as they are after its passes over the joint graph: no kernel is built."""
    from torch._inductor import compile_fx

    def run(gm, example_inputs, **named):
        def call(inputs):
            return gm(*inputs)

        call._boxed_call = True
        return call

    original = compile_fx.compile_fx

    def compile_graph(gm, example_inputs, inner_compile=run, **named):
        return original(gm, example_inputs, inner_compile=inner_compile, **named)

    monkeypatch.setattr(compile_fx, "compile_fx", compile_graph)
    monkeypatch.setattr(compile_fx, "compile_fx_inner", run)  # of graphs that are frozen
