import dataclasses
import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ripple_loader import RippleConfig, reorder
from ripple_loader.model.streaming import StreamingMLP

from .conftest import CALIBRATION, MODELS, SMALL, least_budget, load, make_model, relative_error, token_ids

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_full_keep_equals_the_original_model(name, saved, reordered):
    stock = AutoModelForCausalLM.from_pretrained(saved(name))
    model, ids = load(reordered(name)), token_ids(batch=2)
    assert relative_error(model(ids).logits, stock(ids).logits) < 1e-5
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(name, dtype, saved, reordered):
    stock = AutoModelForCausalLM.from_pretrained(saved(name, dtype), dtype=dtype)
    model = load(reordered(name, dtype))
    assert model.dtype == dtype
    ids = token_ids(batch=2)
    assert relative_error(model(ids).logits, stock(ids).logits) < TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_checkpoint_loads_in_half_precision(dtype, saved, reordered):
    stock = AutoModelForCausalLM.from_pretrained(saved("llama"), dtype=dtype)
    ids = token_ids()
    for budget in ("1MiB", least_budget(reordered("llama"), dtype=dtype, buffer=1 << 14)):
        model = load(reordered("llama"), dtype=dtype, dram_budget=budget, buffer=1 << 14)
        for _ in range(2):
            assert relative_error(model(ids).logits, stock(ids).logits) < TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("more", [1 << 20, 4_000, 0])
def test_sparse_streaming_of_a_relu_model_is_exact_and_skips_inactive_neurons(more, saved, reordered):
    stock = AutoModelForCausalLM.from_pretrained(saved("opt"))
    least = least_budget(reordered("opt"), buffer=1 << 14)
    model = load(reordered("opt"), dram_budget=least + more, buffer=1 << 14)
    cache = reference = None
    for step in range(12):  # one token at a time, so that few neurons are active
        ids = token_ids()[:, step : step + 1]
        got, wanted = (
            m(ids, past_key_values=c, use_cache=True) for m, c in ((model, cache), (stock, reference))
        )
        cache, reference = got.past_key_values, wanted.past_key_values
        assert relative_error(got.logits, wanted.logits) < 1e-5
    report = model.ripple_report
    assert report.active < 0.75 * report.tokens * report.layers * report.neurons


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_keep_computes_the_neurons_of_the_largest_contribution(name, saved, reordered):
    model = load(reordered(name), keep=0.5)
    stock = AutoModelForCausalLM.from_pretrained(reordered(name))
    inner = model.model if name == "llama" else model.gpt_neox
    streaming: StreamingMLP = inner.layers[0].mlp
    mlp = (stock.model if name == "llama" else stock.gpt_neox).layers[0].mlp
    x = torch.randn(6, 32)
    seen: dict[str, torch.Tensor] = {}
    down = mlp.down_proj if name == "llama" else mlp.dense_4h_to_h

    def keep_largest(_, args):
        threshold = args[0].abs().topk(48, dim=-1).values[..., -1:]
        seen["kept"] = torch.where(args[0].abs() >= threshold, args[0], 0)
        return (seen["kept"],)

    down.register_forward_pre_hook(keep_largest)
    reference, got = mlp(x), streaming(x)
    # The int8 sketch may swap neurons at the threshold, which contribute least.
    assert (got - reference).norm() < 0.1 * reference.norm()


@torch.no_grad()
def test_selection_does_not_depend_on_how_tokens_are_batched(reordered):
    streaming = load(reordered("llama"), keep=0.25).model.layers[1].mlp
    x = torch.randn(9, 32)
    one_by_one = torch.cat([streaming(row[None]) for row in x])
    torch.testing.assert_close(streaming(x), one_by_one, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_adjacency_selects_neighbours(reordered):
    reads, tokens = [], torch.randn(40, 32)
    for adjacency in (0.0, 0.5, 1.0):
        model = load(reordered("llama"), keep=0.3, adjacency=adjacency)
        streaming = model.model.layers[1].mlp
        reads.append(sum(_runs(streaming, row[None]) for row in tokens))
    assert reads[0] > reads[1] > reads[2]


def _runs(streaming, row):
    places = streaming.backend.selector.select(streaming.layer, row, streaming.activation).places
    return 1 + int((places[1:] - places[:-1] > 1).sum())


@torch.no_grad()
@pytest.mark.parametrize("policy", ["linked", "s3fifo", "lru"])
@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_the_cache_changes_reads_and_not_results(policy, keep, reordered):
    directory = reordered("llama")
    least = least_budget(directory, keep=keep, buffer=1 << 14)
    without = load(directory, keep=keep, dram_budget=least, buffer=1 << 14)
    cached = load(directory, keep=keep, dram_budget=least + 50_000, buffer=1 << 14, cache_policy=policy)
    assert without.ripple_report.resident["cache"] == 0 < cached.ripple_report.resident["cache"]
    for seed in range(4):
        ids = token_ids(5, seed=seed)
        assert relative_error(cached(ids).logits, without(ids).logits) < 1e-5
    assert cached.ripple_report.hits > 0 == without.ripple_report.hits
    assert cached.ripple_report.bytes_read < without.ripple_report.bytes_read


def test_loading_leaves_the_mlps_on_disk(reordered):
    model, info = AutoModelForCausalLM.from_pretrained(
        reordered("llama"), quantization_config=RippleConfig(dram_budget="1MiB"), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not any("mlp" in name for name, _ in model.named_parameters())
    assert model.ripple_report.resident_bytes <= 1 << 20


@torch.no_grad()
def test_dict_form_and_config_json(saved, reordered, tmp_path):
    ids = token_ids()
    reference = AutoModelForCausalLM.from_pretrained(saved("llama"))(ids).logits
    options = {"quant_method": "ripple", "dram_budget": "1MiB"}
    model = AutoModelForCausalLM.from_pretrained(reordered("llama"), quantization_config=options)
    assert relative_error(model(ids).logits, reference) < 1e-5

    for file in reordered("llama").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = AutoConfig.from_pretrained(reordered("llama"))
    config.quantization_config = options
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative_error(model(ids).logits, reference) < 1e-5
    assert model.ripple_report.budget == 1 << 20


def test_a_sidecar_beside_other_weights_is_refused(reordered, tmp_path):
    for file in reordered("llama").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model.safetensors").unlink()
    model = make_model("llama")
    model.model.norm.weight.data += 1
    model.save_pretrained(tmp_path / "tuned")
    os.replace(tmp_path / "tuned" / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"those of .* differ"):
        load(tmp_path)


@torch.no_grad()
def test_the_summary_counts_what_a_forward_call_reads(reordered):
    """A prompt reads each neuron once, whatever its number of tokens."""
    model = load(reordered("llama"))
    for ids in (token_ids(24), token_ids(8), token_ids(1)):
        model(ids)
    report = model.ripple_report
    assert (report.calls, report.tokens) == (3, 33)
    assert "33 tokens in 3 forward calls; per call and layer 96 neurons" in report.summary()
    report.reset()
    assert (report.calls, report.tokens) == (0, 0)


def test_a_directory_without_sidecar_is_refused(saved):
    with pytest.raises(FileNotFoundError, match="ripple reorder"):
        load(saved("llama"))


@torch.no_grad()
def test_many_threads_and_models_read_one_directory(saved, reordered):
    reference = AutoModelForCausalLM.from_pretrained(saved("llama"))
    models = [load(reordered("llama"), dram_budget="50KiB") for _ in range(2)]
    inputs = [token_ids(seed=seed) for seed in range(8)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(torch.no_grad()(models[i % 2]), ids) for i, ids in enumerate(inputs)]
        for ids, job in zip(inputs, jobs, strict=True):
            assert relative_error(job.result().logits, reference(ids).logits) < 1e-5


def _held() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("cycles", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_freed_model_leaves_no_descriptor_no_thread_and_no_memory(cycles, reordered):
    def cycle():
        model = load(reordered("llama"), keep=0.5)
        model.generate(token_ids(4), max_new_tokens=2, do_sample=False)

    for _ in range(5):
        cycle()
    until = time.monotonic() + 10  # threads end on their own time
    before, resident = _held(), _resident()
    for _ in range(cycles):
        cycle()
    while _held() > before and time.monotonic() < until + cycles:
        time.sleep(0.01)
    assert _held() <= before
    # Each model holds more than 4 MiB; what the allocator keeps does not grow with the cycles.
    assert _resident() - resident < 16 << 20


@torch.no_grad()
def test_hot_neurons_stay_in_memory(saved, tmp_path):
    config = dataclasses.replace(SMALL, active_share=0.6, hot_share=0.3)
    plan = reorder(saved("llama"), tmp_path / "out", CALIBRATION, config)
    assert all(plan.hot)
    options = {"keep": 0.6, "buffer": 1 << 14}
    least = least_budget(tmp_path / "out", **options)
    stock = AutoModelForCausalLM.from_pretrained(saved("llama"))
    exact = load(tmp_path / "out", dram_budget="1MiB", buffer=1 << 14)
    assert exact.ripple_report.pinned == sum(plan.hot)
    assert exact.ripple_report.requests == 0
    assert relative_error(exact(token_ids()).logits, stock(token_ids()).logits) < 1e-5
    pinned = load(tmp_path / "out", dram_budget=least + 60_000, **options)
    assert 0 < pinned.ripple_report.pinned <= sum(plan.hot)
    without = load(tmp_path / "out", dram_budget=least, **options)
    assert without.ripple_report.pinned == 0
    for seed in range(3):
        ids = token_ids(5, seed=seed)
        assert relative_error(pinned(ids).logits, without(ids).logits) < 1e-5


@torch.no_grad()
def test_layers_may_be_called_in_any_order(saved, reordered):
    stock = AutoModelForCausalLM.from_pretrained(saved("llama"))
    model = load(reordered("llama"), dram_budget="50KiB", buffer=1 << 14)
    x = torch.randn(3, 32)
    for layer in (0, 1, 1, 0, 0, 1):
        got, wanted = (m.model.layers[layer].mlp(x) for m in (model, stock))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_error_in_the_middle_of_a_layer_leaves_no_trace(reordered):
    model, ids = load(reordered("llama"), dram_budget="50KiB", buffer=1 << 14), token_ids()
    reference = model(ids).logits
    mlp = model.model.layers[1].mlp
    working, calls = mlp.activation, []

    class Failing(torch.nn.Module):
        def forward(self, x):
            calls.append(x)
            if len(calls) == 2:
                raise MemoryError
            return working(x)

    mlp.activation = Failing()
    with pytest.raises(MemoryError) as held:  # `held` keeps the frames of the failed call alive
        model(ids)
    mlp.activation = working
    for _ in range(3):
        assert relative_error(model(ids).logits, reference) < 1e-6
    del held


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_device_maps(device_map, name, saved, reordered):
    stock = AutoModelForCausalLM.from_pretrained(saved(name))
    config = RippleConfig(dram_budget="1MiB")
    model = AutoModelForCausalLM.from_pretrained(
        reordered(name), quantization_config=config, device_map=device_map
    )
    ids = token_ids()
    assert relative_error(model(ids.to(model.device)).logits.cpu(), stock(ids).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("name", "keep"), [("llama", 0.4), ("opt", 1.0), ("mixtral", 0.4)])
def test_reading_ahead_changes_no_result(name, keep, reordered):
    options = {"keep": keep, "buffer": 1 << 14}
    options["dram_budget"] = least_budget(reordered(name), **options) + 60_000
    ahead, without = (load(reordered(name), prefetch=prefetch, **options) for prefetch in (True, False))
    caches: list = [None, None]
    for step in range(20):
        ids = token_ids()[:, step : step + 1]
        outputs = [
            model(ids, past_key_values=cache, use_cache=True)
            for model, cache in zip((ahead, without), caches, strict=True)
        ]
        caches = [output.past_key_values for output in outputs]
        assert relative_error(outputs[0].logits, outputs[1].logits) < 1e-5
    report = ahead.ripple_report
    assert report.active == without.ripple_report.active
    assert without.ripple_report.read_ahead == 0
    assert report.asked > 0
    assert report.recall > keep / 3
    assert 0 <= report.read_in_vain <= report.read_ahead


@torch.no_grad()
def test_a_budget_of_one_layers_neurons_and_less_is_streamed_within(saved, reordered):
    """Whatever the budget holds less than a layer's neurons is read in several parts."""
    stock = AutoModelForCausalLM.from_pretrained(saved("llama"))
    least = least_budget(reordered("llama"))
    model = load(reordered("llama"), dram_budget=least)
    assert least < 96 * 3 * 32 * 4 * 2
    assert relative_error(model(token_ids()).logits, stock(token_ids()).logits) < 1e-5
