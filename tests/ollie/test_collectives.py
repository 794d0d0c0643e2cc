"""Several processes: graphs that exchange data are never run but for their caller, and all decide alike."""

import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from ollie_compile.backend import compile_with
from ollie_compile.report.report import Report

OPTIONS = {"budget_s": 3.0, "margin": 0.0, "candidates": 1}
RANKS = 2


def run_on_ranks(function, folder, timeout_s=600):
    """Call function(rank) in processes of one group; raises what they raise."""
    context = mp.start_processes(_started, (function, str(folder)), RANKS, join=False, start_method="spawn")
    stop = time.monotonic() + timeout_s
    try:
        while not context.join(max(0.0, stop - time.monotonic())):
            assert time.monotonic() < stop, "the processes are still running"
    finally:
        for process in context.processes:
            process.kill()


def _started(rank, function, folder):
    torch.set_num_threads(1)
    os.environ["OLLIE_CACHE_DIR"] = f"{folder}/plans-{rank}"  # each decides for itself
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor-{rank}"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    try:
        function(rank)
    finally:
        dist.destroy_process_group()


def agree(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def compiled(function, report, **options):
    def backend(*graph):
        return compile_with(*graph, report, options=OPTIONS | options)

    return torch.compile(function, backend=backend, dynamic=False)


def _all_reduce_and_data_parallel(rank):
    import torch.distributed._functional_collectives as collectives

    first, last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def summed(x):
        y = first(x).relu()
        return collectives.all_reduce(last(y) * (rank + 1), "sum", dist.group.WORLD).relu()

    x = torch.randn(1, 16, 12, 12)
    for freeze in (False, True):
        report = Report()
        run = compiled(summed, report, freeze=freeze)
        with torch.no_grad():
            for _ in range(2):
                agree(run(x), summed(x))
                first.weight.mul_(0.5)
        assert report.rewritten == 0
        assert any("so that all processes decide alike" in note for note in report.notes)
        torch.compiler.reset()

    net, plain = (
        nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())) for _ in "ab"
    )
    plain.load_state_dict(net.state_dict())
    x, run = torch.randn(2, 3, 8, 8) + rank, compiled(net, Report())
    for one in (run, plain):
        one(x).square().sum().backward()
    for parameter, other in zip(net.parameters(), plain.parameters(), strict=True):
        agree(parameter.grad, other.grad)


def test_collectives_in_the_graph_and_data_parallel_training(tmp_path):
    run_on_ranks(_all_reduce_and_data_parallel, tmp_path)


def _sharded(rank):
    from torch.distributed.fsdp import fully_shard

    def made():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 4))
        return net.eval()

    plain, x = made(), torch.randn(1, 3, 8, 8)
    for freeze in (False, True):
        net, report = made(), Report()
        for layer in (net[0], net[2], net[4], net):
            fully_shard(layer)
        run = compiled(net, report, freeze=freeze)
        optimizers = [torch.optim.SGD(one.parameters(), lr=0.05) for one in (net, plain)]
        for _ in range(3):
            with torch.no_grad():
                agree(run(x), plain(x))
            for one, optimizer in zip((net, plain), optimizers, strict=True):
                one(x).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        plain.load_state_dict(made().state_dict())
        torch.compiler.reset()


@pytest.mark.slow
def test_sharded_inference_between_training_steps(tmp_path):
    run_on_ranks(_sharded, tmp_path)


def _tensor_parallel(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).eval()

    plain, x = made(), torch.randn(4, 16)
    mesh, plan = init_device_mesh("cpu", (RANKS,)), {"0": ColwiseParallel(), "2": RowwiseParallel()}
    for freeze in (False, True):
        net, report = parallelize_module(made(), mesh, plan), Report()
        run = compiled(net, report, freeze=freeze)
        with torch.no_grad():
            for _ in range(2):
                agree(run(x), plain(x))
                plain[0].weight.mul_(0.5)
                net[0].weight.mul_(0.5)
        assert report.rewritten == 0
        plain.load_state_dict(made().state_dict())
        torch.compiler.reset()


@pytest.mark.slow
def test_tensor_parallel_inference(tmp_path):
    run_on_ranks(_tensor_parallel, tmp_path)
