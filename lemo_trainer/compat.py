"""Private and version-dependent parts of torch, transformers and PEFT that LeMo uses, each in one place.

Seen in torch 2.13.0 and transformers 5.23.0; `tests/lemo/test_compat.py` fails for each part that stops
holding. Without a part that training needs, an ImportError says what is missing, when this module is imported
or when the part is first needed. Where only a feature is lost, the part's docstring and a warning say which.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

try:
    # Every operation of a step, and the storages that live: activation bytes, FLOPs, `lemo plan`.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
except ImportError as error:
    raise ImportError(
        f"lemo_trainer measures steps by internals of torch that torch {torch.__version__} moved ({error}); "
        "install a torch that pyproject.toml allows."
    ) from error

try:
    # A layer of a cache with an `update` of its own, for mode="segments": attributes `keys`, `values` and
    # `is_initialized`, method `lazy_initialization`, and `Cache(layer_class_to_replicate=...)`.
    from transformers.cache_utils import Cache, DynamicLayer
except ImportError as error:
    raise ImportError(
        f"lemo_trainer needs the layered caches of transformers ({error}); install a transformers that "
        "pyproject.toml allows."
    ) from error

if TYPE_CHECKING:
    from transformers.trainer_callback import CallbackHandler

__all__ = ["Cache", "DynamicLayer", "FakeTensorMode", "StorageWeakRef", "TorchDispatchMode", "flop_registry"]
__all__ += ["sdpa_backward_flop_count", "sdpa_flop_count", "tree_leaves"]

logger = logging.getLogger(__name__)


def _operator(name: str) -> Any:
    """The operator packet `torch.ops.aten.NAME`; these names have no public alias."""
    try:
        return getattr(torch.ops.aten, name)
    except AttributeError as error:
        raise ImportError(
            f"lemo_trainer knows torch's attention kernels by name, and torch {torch.__version__} has no "
            f"aten::{name}; install a torch that pyproject.toml allows."
        ) from error


# torch: the kernels that scaled_dot_product_attention dispatches to, whose outputs are worth saving.
SDPA_ON_CPU = _operator("_scaled_dot_product_flash_attention_for_cpu")
SDPA_ON_CPU_BACKWARD = _operator("_scaled_dot_product_flash_attention_for_cpu_backward")
SDPA_KERNELS = frozenset(
    packet.default
    for packet in (
        SDPA_ON_CPU,
        _operator("_scaled_dot_product_flash_attention"),
        _operator("_scaled_dot_product_efficient_attention"),
        _operator("_scaled_dot_product_cudnn_attention"),
    )
)

# transformers: options that models hand to an attention function and that torch's SDPA does not know.
# `s_aux` are attention sinks, `cache` a paged cache.
NOT_IN_SDPA = ("softcap", "s_aux", "position_bias", "cache")

# transformers: the attribute of a decoder layer that switches its gradient checkpointing on.
CHECKPOINTING = "gradient_checkpointing"


def first_gradients_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass of an autograd function, which refuses to make a graph of itself."""

    def checked(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "LeMo makes first gradients only, got create_graph=True (a gradient penalty, a Hessian); "
                "train without LeMo."
            )
        return backward(ctx, *gradients)

    return checked


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread (torch has no public way to ask)."""
    return torch._C._current_graph_task_id() != -1


def in_functional_transform() -> bool:
    """Whether `torch.func.grad`, `vmap` or another transform of functions runs (torch has no public way).

    While Dynamo traces, the stack looks as if one did.
    """
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; torch does not count that of inference tensors."""
    return -1 if tensor.is_inference() else tensor._version


def storage_of(tensor: Tensor) -> int:
    """Which memory a tensor lies in, as long as it lies there.

    Sharded weights move on their own: FSDP keeps the storage and changes its size, which this does not see,
    and ZeRO-3 exchanges it, so that this is 0 for its weights and for DTensors.
    """
    return tensor.untyped_storage()._cdata if is_whole(tensor) else 0


@contextlib.contextmanager
def uncached_parametrizations() -> Iterator[None]:
    """Inside the block, `torch.nn.utils.parametrize.cached` caches nothing.

    What it cached in a pass without gradient would be a constant in the pass with gradient, and what the
    forward pass cached would be missing when the backward pass runs it again.
    """
    from torch.nn.utils import parametrize

    before = parametrize._cache_enabled
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = before


@contextlib.contextmanager
def without_hooks_on_saved_tensors() -> Iterator[None]:
    """Inside the block, hooks on saved tensors from around it rest (torch has no public way to ask for them).

    `torch.utils.checkpoint` around a whole model has such hooks, and so has offloading.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
        yield


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a hook sees the output of `module`, its own or a global one (private dicts of torch)."""
    return bool(module._forward_hooks or nn.modules.module._global_forward_hooks)


def has_forward_pre_hooks(module: nn.Module) -> bool:
    """Whether a hook sees the input of `module`, its own or a global one (private dicts of torch)."""
    return bool(module._forward_pre_hooks or nn.modules.module._global_forward_pre_hooks)


def backward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks of its own that see gradients of `module` (private dicts of torch)."""
    return [*module._backward_pre_hooks.values(), *module._backward_hooks.values()]


_GLOBAL_FORWARD_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")
_GLOBAL_BACKWARD_HOOKS = ("_global_backward_pre_hooks", "_global_backward_hooks")


def global_hooks(*, backward_only: bool = False) -> list[Callable[..., Any]]:
    """The hooks on all modules, as `torch.nn.modules.module.register_module_full_backward_hook` adds them."""
    names = _GLOBAL_BACKWARD_HOOKS if backward_only else _GLOBAL_FORWARD_HOOKS + _GLOBAL_BACKWARD_HOOKS
    return [hook for name in names for hook in getattr(nn.modules.module, name).values()]


@contextlib.contextmanager
def without_global_hooks() -> Iterator[None]:
    """Inside the block, no hook that is registered for all modules runs."""
    own = [getattr(nn.modules.module, name) for name in _GLOBAL_FORWARD_HOOKS + _GLOBAL_BACKWARD_HOOKS]
    before = [dict(hooks) for hooks in own]
    for hooks in own:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in zip(own, before, strict=True):
            hooks.update(kept)


def hooks_on(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that a call of `module` runs, forward and backward, its own and those on all modules."""
    own = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [*own, *backward_hooks(module), *global_hooks()]


def is_whole(weight: Tensor) -> bool:
    """Whether all of a weight is in this process: not on the meta device, nor sharded by FSDP2 or ZeRO-3.

    FSDP2's DTensor is known by its `full_tensor`, DeepSpeed's ZeRO-3 by the `ds_id` that it gives a
    parameter; asking for their classes would import both libraries.
    """
    return not (weight.is_meta or hasattr(weight, "full_tensor") or hasattr(weight, "ds_id"))


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside the wrappers of PEFT, torch.compile (`_orig_mod`) or DDP."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def base_parameter_name(name: str) -> str | None:
    """The name that a parameter has without PEFT; None for one that PEFT added (an adapter, a trained copy).

    PEFT marks its parameters by parts of their names only. If these change, predictors are refused because
    they seem to belong to another base model.
    """
    if "lora_" in name or ".modules_to_save." in name:
        return None
    return name.replace(".base_layer", "").replace(".original_module", "")


def attention_implementation(config: Any) -> str:
    """The attention implementation in force, such as "sdpa"; transformers keeps it in a private attribute."""
    implementation: str = config._attn_implementation
    return implementation


def set_attention_implementation(config: Any, name: str) -> None:
    """Let modules of this config dispatch to `name`, past the checks of transformers' own setter."""
    config._attn_implementation = name


def attention_function(attention: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    """The function that an attention module calls for an implementation.

    The table of functions is a module-level object of transformers; "eager" is not in it but in the file of
    each model, as `eager_attention_forward`.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ImportError(
            f"LeMo needs `eager_attention_forward` in {type(attention).__module__}, which this version of "
            "transformers has not; install one that pyproject.toml allows."
        )
    function: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return function


def uses_causal_lm_loss(model: Any) -> bool:
    """Whether the model computes transformers' standard loss of a causal LM."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return model.loss_function is ForCausalLMLoss


@contextlib.contextmanager
def loss_function(model: Any, function: Callable[..., Tensor]) -> Iterator[None]:
    """Let a model compute `function` as its loss.

    `loss_function` is a public property, but one that was set can be unset only by its private attribute.
    """
    own = vars(model).get("_loss_function")
    model.loss_function = function
    try:
        yield
    finally:
        del model._loss_function
        if own is not None:
            model.loss_function = own


def checkpointing_function(layer: Any) -> Callable[..., Any]:
    """The function with which a decoder layer checkpoints, reentrant or not as the user chose."""
    function: Any = layer._gradient_checkpointing_func
    return function


def checkpointing_argument() -> str:
    """The name of `TrainingArguments`' gradient checkpointing, which transformers 5.23 renamed."""
    from transformers import TrainingArguments

    new = "activation_checkpointing"
    return new if hasattr(TrainingArguments, new) else "gradient_checkpointing"


class ThreadSwitch:
    """Exchanges a global function of a library, for the threads that are inside `with switch.on(value)`.

    Args:
        install: exchanges the function and returns what gives it back. The new function must do what the old
            one does where `value` is None.
    """

    def __init__(self, install: Callable[[], Callable[[], None]]) -> None:
        self._install = install
        self._uninstall: Callable[[], None] | None = None
        self._inside = 0
        self._lock = threading.Lock()
        self._thread = threading.local()

    @property
    def value(self) -> Any:
        """The value of the innermost block that this thread is in; None outside."""
        return getattr(self._thread, "value", None)

    @contextlib.contextmanager
    def on(self, value: Any) -> Iterator[None]:
        """Inside the block, `self.value` is `value` in this thread."""
        before = self.value
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._uninstall = self._install()
        self._thread.value = value
        try:
            yield
        finally:
            self._thread.value = before
            with self._lock:
                self._inside -= 1
                if not self._inside and self._uninstall is not None:
                    self._uninstall()


def _install_one_document() -> Callable[[], None]:
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    own = getattr(masking_utils, name)

    def find(*args: Any, **kwargs: Any) -> Any:
        return None if _documents.value else own(*args, **kwargs)

    setattr(masking_utils, name, find)
    return lambda: setattr(masking_utils, name, own)


_documents = ThreadSwitch(_install_one_document)


@contextlib.contextmanager
def one_document() -> Iterator[None]:
    """Let transformers make the masks of samples of one document each, without looking at the positions.

    Fake tensors have no positions to look at, and transformers then makes a mask for the worst case.
    """
    with _documents.on(True):
        yield


def makes_cache(decoder: Any, given: dict[str, Any]) -> bool:
    """Whether a decoder that gets the arguments `given` makes a cache of its own.

    Where it does, and gets no attention mask, transformers does not look for packed documents.
    """
    if given.get("past_key_values") is not None or getattr(decoder, CHECKPOINTING, False):
        return False
    use_cache = given.get("use_cache")
    return bool(getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache)


def enable_checkpointing(model: Any) -> None:
    """Switch gradient checkpointing on, without reentrance, under the name that transformers has for it."""
    new = "activation_checkpointing_enable"
    enable = getattr(model, new, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def loss_is_made_by_trl(arguments: dict[str, Any]) -> bool:
    """Whether TRL's fused head asked a training forward for log-probabilities, to compute its own loss."""
    return bool(arguments.get("kwargs", {}).get("fused_lm_head"))


def calling_handler(callback: Any) -> CallbackHandler | None:
    """The Trainer's handler that calls an event of `callback` just now.

    A callback gets no reference to its handler or its Trainer, so this looks for the handler in the frames of
    the call. If there is none, it warns and returns None, and the order of the callbacks cannot be changed.
    """
    from transformers.trainer_callback import CallbackHandler

    frame = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            return handler
        frame = frame.f_back  # type: ignore[assignment]
    logger.warning(
        "LeMo found no handler of transformers that calls its callback: its metrics reach the log, but not "
        "the reporting callbacks (TensorBoard, W&B) in front of it."
    )
    return None


def calling_trainer(handler: CallbackHandler) -> Any:
    """The Trainer whose method calls an event of `handler` just now; None outside of a Trainer."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if getattr(caller, "callback_handler", None) is handler and hasattr(caller, "train"):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def is_training(trainer: Any) -> bool:
    """Whether `train` of this Trainer runs in this thread; its own flag stays set after an exception."""
    frame = sys._getframe(1)
    while frame is not None:
        loops = frame.f_code.co_name in ("train", "_inner_training_loop")
        if loops and frame.f_locals.get("self") is trainer:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
