import pytest
import torch
from hypothesis import given, settings

from ollie_compile.lower import Program, is_lowerable, programs
from ollie_compile.search import search
from ollie_compile.verify import check_program
from tests.ollie.strategies import convolutions, operator


@settings(max_examples=40, deadline=None)
@given(convolutions())
def test_every_program_found_equals_torch(conv):
    found = search(conv.expression(), max_depth=1, budget_s=2.0)
    assert found.derivations
    for derivation in found.derivations[:12]:
        for program in programs(derivation.scope):
            assert check_program(conv, program) is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_have_the_strides_of_torch(memory_format):
    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=memory_format)
    weight = torch.randn(3, 4, 3, 3).contiguous(memory_format=memory_format)
    conv = operator(x, weight, padding=1)
    for derivation in search(conv.expression(), max_depth=0, budget_s=2.0).derivations:
        for program in programs(derivation.scope):
            got = conv.finished(program)(x, weight)
            assert got.stride() == conv.output.stride
            torch.testing.assert_close(got, conv.reference(x, weight), rtol=1e-4, atol=1e-4)


def test_gradients_equal_torch():
    x, weight = torch.randn(2, 3, 5, 5).double(), torch.randn(3, 2, 4, 4).double()
    conv = operator(x, weight, stride=2, padding=1, transposed=True)
    derivation = search(conv.expression(), max_depth=0, budget_s=2.0).derivations[-1]
    program = conv.finished(Program(derivation.scope, "batched"))
    for function in (program, conv.reference):
        assert torch.autograd.gradcheck(function, (x.requires_grad_(), weight.requires_grad_()))


def test_many_taps_are_not_written_out():
    conv = operator(torch.zeros(1, 1, 20, 20), torch.zeros(1, 1, 13, 13))
    assert not is_lowerable(conv.expression())


def test_a_wrong_program_is_caught():
    x, weight = torch.zeros(1, 2, 6, 6), torch.zeros(3, 2, 3, 3)
    padded, plain = operator(x, weight, padding=1), operator(x, weight, padding=1, dilation=1, stride=1)
    other = operator(x, weight, padding=2, dilation=2)
    assert other.output.shape == padded.output.shape
    scope = search(other.expression(), max_depth=0, budget_s=1.0).derivations[-1].scope
    assert "differs by" in (check_program(plain, Program(scope, "rows")) or "")
