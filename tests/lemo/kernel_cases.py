"""LeMo's Triton kernels against their references; run as a script, under Triton's interpreter."""

from __future__ import annotations

import os

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def equal(got: Tensor | None, want: Tensor | None, dtype: torch.dtype, what: str) -> None:
    if got is None or want is None:
        assert got is want, what
        return
    assert got.dtype == want.dtype, what
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-3)
    assert error < TOLERANCES[dtype], f"{what}, {dtype}: {error}"


def check_rows(device: str) -> None:
    from lemo_trainer.kernels import torch_rows, triton_rows

    for dtype in DTYPES:
        for count, width in ((7, 5), (3, 1030)):
            rows = torch.randperm(11)[:count].to(device)
            x = torch.randn(11, width).to(device, dtype)
            update = torch.randn(width, count).to(device, torch.float32).T  # swapped in memory
            got = x.clone()
            triton_rows.scatter_add_(got, update, rows)
            torch_rows.scatter_add_(x, update, rows)
            equal(got, x, dtype, "scatter_add_")


def check_norm(device: str) -> None:
    from lemo_trainer.kernels import torch_norm, triton_norm

    for dtype in DTYPES:
        for centred, chosen in ((False, True), (False, False), (True, True)):
            for width in (20, 128):
                x = torch.randn(9, width).to(device, dtype)
                rows = torch.tensor([0, 2, 7, 8], device=device) if chosen else None
                weight, bias = (torch.randn(width).to(device, dtype) for _ in range(2))
                bias = bias if centred else None
                got = triton_norm.forward(x, rows, weight, bias, 1e-5, centred)
                want = torch_norm.forward(x, rows, weight, bias, 1e-5, centred)
                for each in zip(got, want, strict=True):
                    equal(*each, dtype, "norm")
                grad = torch.randn(width, len(want[0])).to(device, dtype).T
                for weight_gradient in (True, False):
                    arguments = (grad, x, rows, weight, *want[1:], weight_gradient)
                    gradients = triton_norm.backward(*arguments), torch_norm.backward(*arguments)
                    for each in zip(*gradients, strict=True):
                        equal(*each, dtype, "norm's gradient")


def check_attention(device: str) -> None:
    from lemo_trainer.kernels.attention import attend, reference

    # batch, heads, key heads, queries, keys, width
    cases = [(2, 2, 2, 5, 9, 16), (1, 2, 1, 66, 70, 20)]
    for dtype in DTYPES:
        for batch, heads, groups, queries, keys, width in cases:
            inputs = [
                torch.randn(batch, length, each, width).to(device, dtype).transpose(1, 2).requires_grad_()
                for each, length in ((heads, queries), (groups, keys), (groups, keys))
            ]
            positions = _positions(batch, keys, queries).to(device)
            got = attend(*inputs, positions, scaling=0.3)
            want = reference(*inputs, positions, 0.3)
            equal(got, want, dtype, "attention")
            grad = torch.randn_like(got)
            gradients = (torch.autograd.grad(each, inputs, grad) for each in (got, want))
            for name, *each in zip("qkv", *gradients, strict=True):
                equal(*each, dtype, f"attention's gradient of {name}")


def _positions(batch: int, end: int, count: int) -> Tensor:
    return torch.stack([torch.randperm(end)[:count].sort().values for _ in range(batch)])


def check_steps(device: str) -> None:
    """A training step by the kernels is that of the model's own parts, and attends to nothing twice."""
    from lemo_trainer import LemoConfig, apply_lemo, remove_lemo
    from lemo_trainer.kernels import triton_attention

    from .tiny import assert_same_step, loss_and_gradients, tiny_model

    forward, calls = triton_attention.forward, []
    triton_attention.forward = lambda *args: calls.append(1) or forward(*args)
    model = tiny_model(layers=2).to(device)
    tokens = torch.randint(3, 97, (1, 18), device=device)
    for mode in ("detach", "eliminate"):
        steps = []
        for fused in (False, True):
            config = LemoConfig(
                mode=mode, block_size=4, layers="all", selector="recency", fused_kernels=fused
            )
            apply_lemo(model, config)
            steps.append(loss_and_gradients(model, {"input_ids": tokens, "labels": tokens}))
            remove_lemo(model)
        assert_same_step(*steps, rtol=1e-4, atol=1e-5)
    triton_attention.forward = forward
    assert len(calls) == 2 * 2, calls  # the chosen and the other queries of two layers, under detach


def check(device: str) -> None:
    torch.manual_seed(0)
    check_steps(device)
    check_rows(device)
    check_norm(device)
    check_attention(device)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    check("cpu")
