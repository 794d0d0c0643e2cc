"""Private and version-dependent APIs of torch and transformers that Ripple uses.

Each name says in which version it was seen, its purpose, and what happens if a version lacks it.
`tests/ripple/test_compat.py` fails when one of them stops holding.
"""

from __future__ import annotations

import functools
import sys
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HOOKS = ("_process_model_before_weight_loading", "_process_model_after_weight_loading")


def _differs(error: ImportError) -> ImportError:
    version = metadata.version("transformers")
    return ImportError(
        f"ripple_loader was written for transformers 5.23, but {version} is installed and differs ({error}): "
        "install 5.23."
    )


try:
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if missing := [name for name in _HOOKS if not hasattr(HfQuantizer, name)]:
        raise ImportError(f"`HfQuantizer` has no {' and no '.join(missing)}")
except ImportError as error:
    raise _differs(error) from error

__all__ = [
    "LoadingHooks",
    "QuantizationConfigMixin",
    "called_by_peft",
    "expect_missing",
    "fp8_values",
    "gguf_names",
    "has_integer_units",
    "integer_product",
    "is_compiled",
    "kept_in_float32",
    "loads",
    "pickled_tensors",
    "register_quantization_config",
    "register_quantizer",
]


class LoadingHooks(HfQuantizer):
    """Hooks that `from_pretrained` calls before and after it reads the weights.

    transformers 5.23.0: `HfQuantizer._process_model_before_weight_loading`, with `checkpoint_files`, and
    `_process_model_after_weight_loading`. They are private, but every quantizer overrides them. If a
    version lacks them, importing `ripple_loader` fails: otherwise no MLP would be replaced.
    `update_attn_implementation` is the one hook between the configuration and the opening of files; if a
    version lacks it, transformers' own error names a missing original.
    """

    def before_files(self, directory: str) -> None:
        """Called before the checkpoint's files are opened, with the directory or hub id that is loaded."""

    def update_attn_implementation(self, config: Any) -> Any:
        self.before_files(config.name_or_path)
        return config

    @abstractmethod
    def before_weights(self, model: Any, files: list[Path]) -> None:
        """Change the empty model; `files` are its checkpoint's."""

    @abstractmethod
    def after_weights(self, model: Any) -> None:
        """Called once the weights are in memory."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self.before_weights(model, [Path(file) for file in checkpoint_files or ()])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.after_weights(model)
        _not_quantized(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _not_quantized(model: Any) -> None:
    """Have transformers treat a loaded model as one of plain floats, which it is.

    transformers 5.23.0: `is_quantized`, `quantization_method` and `config.quantization_config`, by which
    casts, `Trainer` and saving refuse quantized models. `hf_quantizer` stays: it keeps `generate` from
    compiling. If a version lacks one of them, nothing refuses by it.
    """
    model.is_quantized = False
    for owner, name in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)


def expect_missing(model: Any, patterns: Iterable[str]) -> None:
    """Have `from_pretrained` pass over tensors of the checkpoint whose names match, without a warning.

    transformers 5.23.0: `PreTrainedModel._keys_to_ignore_on_load_unexpected`, a set of patterns or None.
    If a version lacks it, transformers reports the tensors as unexpected and loads all others as before.
    """
    known = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    model._keys_to_ignore_on_load_unexpected = {*(known or ()), *patterns}


def is_compiled(model: Any) -> bool:
    """Whether `torch.compile` was applied to a model, to its call or to its `forward`.

    torch 2.13.0: `_orig_mod`, `_compiled_call_impl` and `_torchdynamo_orig_callable`. If a version lacks one,
    a model that is compiled so is attached, and its graphs keep the MLPs that they were made with.
    """
    owners = (model, "_orig_mod"), (model.forward, "_torchdynamo_orig_callable")
    named = any(hasattr(owner, name) for owner, name in owners)
    return named or getattr(model, "_compiled_call_impl", None) is not None


def called_by_peft() -> bool:
    """Whether the function that calls this one was called by PEFT.

    PEFT 0.21 has no way for a module to refuse an adapter by name, so this looks at the frames of the call.
    If PEFT's modules get another name, adapters on streamed experts find no parameters, and PEFT only warns.
    """
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("peft.")


def kept_in_float32(model: Any) -> tuple[str, ...]:
    """The names of modules whose weights a float16 model keeps in float32, such as T5's `wo`.

    transformers 5.23.0: `PreTrainedModel._keep_in_fp32_modules`. If a version lacks it, streamed MLPs are
    computed in float16, which overflows for some inputs of T5.
    """
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def loads(automatic: Any, config: Any) -> bool:
    """Whether an automatic class of transformers, such as `AutoModelForCausalLM`, loads a configuration.

    transformers 5.23.0: `_model_mapping` of the class, by types of configurations. If a version lacks it,
    opening a model fails with Python's own error.
    """
    return type(config) in automatic._model_mapping


def pickled_tensors(path: Path) -> dict[str, tuple[Tensor, int]]:
    """The tensors of a file of `torch.save`, without their numbers, and the byte at which each begins.

    torch 2.13.0: under `FakeTensorMode`, `torch.load` reads no numbers and notes where they lie as
    `_checkpoint_offset` of a storage. If a version lacks one of them, reading a `pytorch_model.bin` is
    refused with the missing name.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        stored: dict[str, Tensor] = torch.load(path, weights_only=True)

    def start(tensor: Tensor) -> int:
        return tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.itemsize

    return {name: (tensor, start(tensor)) for name, tensor in stored.items()}


def fp8_values(quantized: Tensor, scales: Tensor) -> Tensor:
    """The numbers that fp8, or packed four-bit floats, stand for with the scales of their blocks, float32.

    transformers 5.23.0: `Fp8Dequantize.convert`. If a version lacks it, reordering such a checkpoint fails
    with the missing name.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    if scales.is_floating_point() and scales.itemsize > 1:
        scales = scales.float()  # the dtype of the result
    named = {"weight": quantized, "weight_scale_inv": scales}
    values: Tensor = Fp8Dequantize(None).convert(named)["weight"]
    return values


def gguf_names(file: Path, model: Any) -> Iterator[tuple[str, Any, Any]]:
    """The tensors of a GGUF file that a model has.

    Yields the model's name of each, the tensor as the package `gguf` reads it, and a function that arranges
    its numbers as the model has them.

    transformers 5.23.0: `TENSOR_PROCESSORS`, `TensorProcessor.process` and `get_gguf_hf_weights_map` of
    `modeling_gguf_pytorch_utils`. If a version lacks one, reordering a GGUF file fails with the missing name.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        read_field,
    )

    reader = GGUFReader(file)
    kind = TENSOR_PROCESSORS.get(read_field(reader, "general.architecture")[0], TensorProcessor)
    processor = kind(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    for tensor in reader.tensors:
        if tensor.name in names:
            process = functools.partial(_processed, processor, tensor.name)
            yield names[tensor.name], tensor, process


def _processed(processor: Any, name: str, values: Any) -> Any:
    return processor.process(weights=values, name=name, tensor_key_mapping={}, parsed_parameters={}).weights


@functools.cache
def has_integer_units() -> bool:
    """Whether the processor multiplies int8 numbers with units of their own (AVX-512 VNNI).

    torch 2.13.0: `torch.cpu._is_vnni_supported` and `torch._int_mm`. If a version lacks one, products
    are computed in floats, which is slower, and a warning says so.
    """
    if not hasattr(torch.cpu, "_is_vnni_supported") or not hasattr(torch, "_int_mm"):
        warnings.warn(
            f"torch {torch.__version__} does not say whether the processor has integer units: ripple_loader "
            "multiplies sketches as floats, which is slower.",
            stacklevel=2,
        )
        return False
    return bool(torch.cpu._is_vnni_supported())


def integer_product(first_TH: Tensor, second_HR: Tensor) -> Tensor:
    """The product of two int8 matrices, int32, shape (T, R), where `has_integer_units`.

    torch 2.13.0: `torch._int_mm`.
    """
    return torch._int_mm(first_TH, second_HR)
