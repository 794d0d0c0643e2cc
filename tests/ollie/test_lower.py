import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

from ollie_compile import lift
from ollie_compile.expr import Input, evaluate
from ollie_compile.lower.layouts import is_lowerable, programs, with_kernels
from ollie_compile.lower.lowering import Program
from ollie_compile.plan.checks import check_program, rounding_error
from ollie_compile.search.hybrid import search
from ollie_compile.targets.banded import match_banded
from ollie_compile.targets.bilinear import CppBilinearForms
from ollie_compile.targets.selective_add import match_selective_add
from tests.ollie.strategies import convolutions, operator

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # naming a device needs none


@settings(max_examples=40, deadline=None)
@given(convolutions())
@example(  # the second tensor is the data, of which a part is read
    operator(torch.zeros(1, 2, 1, 2), torch.zeros(2, 2, 3, 4), stride=(2, 1), padding=(0, 2), transposed=True)
)
def test_every_program_found_equals_torch(conv):
    found = search(conv.expression(), max_depth=1, budget_s=2.0)
    assert found.derivations
    for derivation in found.derivations[:12]:
        for program in programs(derivation.scope, CPU):
            # On this CPU "triton" computes by the kernels' references, and so does "cpp" in float64.
            for written in (program, *with_kernels(program, CUDA), *with_kernels(program, CPU)):
                assert check_program(conv, written) is None
                if written.kernels == "cpp":
                    assert rounding_error(conv, written) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_derivations_in_half_precision_round_as_torch_does(dtype, transposed):
    x, weight = torch.zeros(2, 4, 6, 5, dtype=dtype), torch.zeros(4, 4, 3, 3, dtype=dtype)
    conv = operator(x, weight, padding=1, transposed=transposed, stride=2 if transposed else 1)
    found = search(conv.expression(), max_depth=1, budget_s=5.0).derivations
    written = [program for d in found if not d.scope.constants() for program in programs(d.scope, CPU)]
    assert len(written) > 10
    for program in written[:40]:
        assert conv.finished(program)(*conv.example_inputs()).dtype == dtype
        # Taps are rounded before they are added, each by half an eps of its own size.
        assert rounding_error(conv, program) < 4 * torch.finfo(dtype).eps, program


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_have_the_strides_of_torch(memory_format):
    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=memory_format)
    weight = torch.randn(3, 4, 3, 3).contiguous(memory_format=memory_format)
    conv = operator(x, weight, padding=1)
    for derivation in search(conv.expression(), max_depth=0, budget_s=2.0).derivations:
        for program in programs(derivation.scope, CPU):
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


@pytest.mark.parametrize(
    ("weight", "settings"),
    [
        ((6, 4, 3, 4), {"padding": (0, 2)}),
        ((4, 6, 3, 4), {"stride": 2, "padding": 1, "output_padding": 1, "transposed": True}),
        ((4, 6, 3, 4), {"stride": (1, 3), "transposed": True}),
    ],
    ids=["OffsetAdd", "selective add", "both"],
)
def test_overlapping_additions_have_kernels(weight, settings):
    conv = operator(torch.zeros(2, 4, 6, 7), torch.zeros(weight), **settings)
    found = search(conv.expression(), max_depth=0, budget_s=20.0).derivations
    written = [p for d in found for program in programs(d.scope, CPU) for p in with_kernels(program, CPU)]
    assert {program.kernels for program in written} == {"fold", "cpp"}
    assert {program.layout for program in written if program.kernels == "cpp"} >= {"columns", "batched"}
    x, k = conv.example_inputs()
    for program in written:
        torch.testing.assert_close(conv.finished(program)(x, k), conv.reference(x, k), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("weight", "others", "rule"),
    [
        ((8, 3, 4, 4), {"padding": 1}, "phase splitting"),
        ((8, 1, 9, 9), {"padding": 4, "output_padding": 1}, "variable splitting"),
    ],
    ids=["other phases", "one channel"],
)
def test_selective_additions_are_known_in_every_form(weight, others, rule):
    conv = operator(torch.zeros(1, 8, 5, 6), torch.zeros(weight), stride=2, transposed=True, **others)
    found = search(conv.expression(), max_depth=1, budget_s=20.0).derivations
    known = [d for d in found if any(map(match_selective_add, d.scope.scopes()))]
    split = [d for d in known if any(rule in step.rules for step in d.steps)]
    assert split
    x, k = conv.example_inputs()
    for derivation in split[:8]:
        got = conv.finished(Program(derivation.scope, "columns", "cpp"))(x, k)
        torch.testing.assert_close(got, conv.reference(x, k), rtol=1e-4, atol=1e-4)


def test_a_pooling_window_is_no_selective_addition():
    depthwise = operator(torch.zeros(1, 6, 8, 8), torch.zeros(6, 1, 3, 3), groups=6)
    assert match_selective_add(depthwise.expression()) is None
    assert (
        match_selective_add(
            lift.average_pool(Input("X", (1, 2, 6, 6)), (2, 2), stride=(2, 2), padding=(0, 0))
        )
        is None
    )


@pytest.mark.parametrize("write", [lift.banded_scores, lift.banded_values])
def test_banded_products_are_kernels_on_a_gpu_and_nothing_elsewhere(write):
    scope = write(2, 4, 130, width=65, dilation=2)
    assert match_banded(scope) is not None
    assert programs(scope, CPU) == []
    (program,) = programs(scope, CUDA)
    assert program.kernels == "triton"
    generator = np.random.default_rng(0)
    arrays = {tensor.name: generator.integers(-8, 9, tensor.shape) for tensor in scope.inputs().values()}
    points = np.stack(np.meshgrid(*map(np.arange, scope.shape), indexing="ij"), -1).reshape(-1, 3)
    want = evaluate(scope, arrays, points, None).reshape(scope.shape)
    got = program({name: torch.tensor(array).double() for name, array in arrays.items()})
    assert got.tolist() == want.tolist()


def test_an_image_of_one_tile_has_no_loop_over_tiles():
    conv = operator(torch.zeros(1, 2, 6, 6), torch.zeros(3, 2, 3, 3))
    found = search(conv.expression(), max_depth=1, budget_s=20.0).derivations
    written = [program for derivation in found for program in programs(derivation.scope, CPU)]
    single = [
        program
        for program in written
        for kernel, matches in program.used.items()
        if isinstance(kernel, CppBilinearForms) and not matches[0].tiles
    ]
    assert single
    for program in single:
        assert check_program(conv, program) is None
        assert rounding_error(conv, program) < 1e-4
