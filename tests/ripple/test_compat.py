"""Each private API that `ripple_loader.compat` uses still does what it is used for."""

import importlib
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, T5Config
from transformers.quantizers.base import HfQuantizer

from ripple_loader import RippleConfig, compat
from ripple_loader.checkpoint.shards import read_shards
from ripple_loader.loader import RippleQuantizer

from .conftest import load


def test_from_pretrained_calls_the_hooks_around_reading_the_weights(reordered, monkeypatch):
    """Before, with the checkpoint's files and parameters on the meta device; after, with those in memory."""
    seen, directory = [], reordered("llama")

    def noted(name, hook):
        def run(self, model, *arguments):
            embedding = model.get_input_embeddings().weight
            seen.append((name, embedding.device.type, *arguments))
            return hook(self, model, *arguments)

        return run

    for name in ("before_weights", "after_weights"):
        monkeypatch.setattr(RippleQuantizer, name, noted(name, getattr(RippleQuantizer, name)))
    load(directory)
    (before, meta, files), (after, device) = seen
    assert (before, after) == ("before_weights", "after_weights")
    assert (meta, device) == ("meta", "cpu")
    assert [Path(file).name for file in files] == ["model.safetensors"]


@pytest.mark.parametrize(
    "name", ["_process_model_before_weight_loading", "_process_model_after_weight_loading"]
)
def test_a_hook_that_is_gone_is_an_error_at_import(name, monkeypatch):
    monkeypatch.delattr(HfQuantizer, name)
    source = Path(compat.__file__).read_text("utf-8")
    with pytest.raises(ImportError, match=rf"written for transformers 5\.23, .*`HfQuantizer` has no {name}"):
        exec(compile(source, compat.__file__, "exec"), {"__name__": "ripple_loader.compat"})


def test_streamed_tensors_are_not_reported_as_unexpected(reordered):
    assert hasattr(PreTrainedModel, "_keys_to_ignore_on_load_unexpected")
    config = RippleConfig(dram_budget="4MiB")
    _, found = AutoModelForCausalLM.from_pretrained(
        reordered("llama"), quantization_config=config, output_loading_info=True
    )
    assert not found["unexpected_keys"]
    assert not found["missing_keys"]


def test_only_calls_from_peft_are_calls_of_peft():
    source = "def ask(): return function()"
    outcomes = []
    for name in ("peft.tuners.lora", "peftish", "tests"):
        namespace = {"__name__": name, "function": lambda: compat.called_by_peft()}
        exec(source, namespace)
        outcomes.append(namespace["ask"]())
    assert outcomes == [True, False, False]
    assert Path(peft.tuners.lora.__file__).parts[-4:-2] == ("peft", "tuners")


def test_t5_keeps_its_last_linear_in_float32():
    model = AutoModelForSeq2SeqLM.from_config(T5Config(num_layers=1, d_model=8, d_ff=8, vocab_size=9))
    assert "wo" in compat.kept_in_float32(model)


def test_automatic_classes_know_what_they_load():
    assert compat.loads(AutoModelForSeq2SeqLM, T5Config())
    assert not compat.loads(AutoModelForCausalLM, T5Config())


def test_the_numbers_of_a_pickled_tensor_lie_where_they_are_said_to(tmp_path):
    path, whole = tmp_path / "pytorch_model.bin", torch.arange(12, dtype=torch.int16).view(3, 4)
    torch.save({"whole": whole, "end": whole[1:]}, path)
    for name, wanted in (("whole", whole), ("end", whole[1:])):
        tensor, start = compat.pickled_tensors(path)[name]
        content = path.read_bytes()[start : start + 2 * tensor.numel()]
        assert content == wanted.numpy().tobytes()


def test_without_places_a_pickled_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(3)}, path)
    monkeypatch.delattr("torch._subclasses.fake_tensor.FakeTensorMode")
    with pytest.raises(ValueError, match=r"cannot be read .*FakeTensorMode.*save it as safetensors"):
        read_shards(tmp_path)


def test_integer_products_are_those_of_integers():
    torch.manual_seed(0)
    first, second = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((3, 64), (64, 40)))
    assert torch.equal(compat.integer_product(first, second), first.int() @ second.int())


def test_integer_units_are_those_that_the_kernel_lists():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert compat.has_integer_units() == ("avx512_vnni" in flags)


@pytest.mark.parametrize(("module", "name"), [("torch.cpu", "_is_vnni_supported"), ("torch", "_int_mm")])
def test_without_integer_products_a_warning_says_that_floats_are_used(module, name, monkeypatch):
    monkeypatch.delattr(importlib.import_module(module), name)
    compat.has_integer_units.cache_clear()
    try:
        with pytest.warns(UserWarning, match="multiplies sketches as floats"):
            assert not compat.has_integer_units()
    finally:
        compat.has_integer_units.cache_clear()
