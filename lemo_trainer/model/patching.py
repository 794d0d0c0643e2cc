"""Exchanges the class and the `forward` of a model's parts for a while, and gives them back.

A patched module becomes an instance of a subclass of its own class, with the same name, as in FSDP2. Copies
and pickles of it are of its own class: unpatched, and complete.

A patched `forward` runs the patch in training passes only: in training mode, while gradients are recorded,
without a cache of keys and values, and inside the scope that the patch was made for. Every other call is
the model's own code: evaluation, generation, a reference pass under `torch.no_grad()`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lemo_trainer.compat import in_functional_transform
from lemo_trainer.model.calls import bind
from lemo_trainer.model.state import repeating

logger = logging.getLogger(__name__)

OURS = "_lemo"  # what the names of all our attributes begin with
SESSION = "_lemo"
_ENTRY = "_lemo_entry"  # the patched forward that is in force
_OWN_FORWARD = "_lemo_own_forward"  # an instance's forward from before; accelerate puts one there
_CHUNKS = (
    "LeMo trains on whole samples, and this pass goes on with a gradient from the cache of an earlier one (a "
    "sample in chunks): pass whole samples without `past_key_values` and `use_cache`, detach the cache, or "
    "train without LeMo."
)
_PREFIX_TUNING = (
    "LeMo leaves a cache alone, and this one has keys and values with a gradient (PEFT's prefix tuning or "
    "P-tuning v2): the gradient would reach them without LeMo only. Train without LeMo, or use another "
    "tuner, such as LoRA."
)
_ONE_THREAD = (
    "LeMo trains a model in one thread at a time, and another thread is in a training pass of this one: hold "
    "a lock around forward and backward, or train a copy (copy.deepcopy) in each thread."
)


class Passes:
    """Tells the training passes that a patch is for from all others.

    Attributes:
        running: whether such a pass is running now in this thread; None between passes.
        in_scope: whether the patch is in force; a callback lets it end with `Trainer.train`.
        without_gradient: whether passes that record no gradients count too, as in a search of thresholds.
        with_cache: whether a training pass came with a cache, and so ran unpatched.
    """

    def __init__(self) -> None:
        self._thread = threading.local()  # another thread may evaluate the model during a training pass
        self._lock = threading.Lock()
        self._forward_in: int | None = None  # the thread that is in a training pass
        self._backward_in: dict[int, int] = {}  # by layers that are run again: the thread that runs them
        self.in_scope: Callable[[], bool] = lambda: True
        self.without_gradient = False
        self.with_cache = False
        self._said: set[str] = set()

    @property
    def running(self) -> bool | None:
        running: bool | None = getattr(self._thread, "running", None)
        return running

    @contextlib.contextmanager
    def entering(self, module: nn.Module, given: dict[str, Any]) -> Iterator[bool]:
        """Yields whether the call of `module` with arguments `given` runs patched.

        The outermost patched module decides for all inside it.

        Raises:
            RuntimeError: another thread is in a training pass of the same model.
        """
        if self.running is not None:
            yield self.running
            return
        recording = torch.is_grad_enabled() or self.without_gradient
        trains = module.training and recording and self.in_scope() and not self._has_other_use(given)
        with self._forward_alone() if trains else contextlib.nullcontext():
            self._thread.running = trains
            try:
                yield trains
            finally:
                self._thread.running = None

    @contextlib.contextmanager
    def _forward_alone(self) -> Iterator[None]:
        this = threading.get_ident()
        with self._lock:
            if self._forward_in not in (None, this) or any(t != this for t in self._backward_in.values()):
                raise RuntimeError(_ONE_THREAD)
            before, self._forward_in = self._forward_in, this
        try:
            yield
        finally:
            self._forward_in = before

    @contextlib.contextmanager
    def running_again(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Inside the block, a backward pass runs these layers again.

        Raises:
            RuntimeError: another thread runs them, or is in a training pass of the same model.
        """
        this = threading.get_ident()
        keys = [id(layer) for layer in layers]
        with self._lock:
            taken = any(self._backward_in.get(key, this) != this for key in keys)
            if taken or self._forward_in not in (None, this):
                raise RuntimeError(_ONE_THREAD)
            new = [key for key in keys if key not in self._backward_in]
            self._backward_in.update(dict.fromkeys(new, this))
        try:
            yield
        finally:
            for key in new:
                del self._backward_in[key]

    def alone(
        self, run: Callable[..., Any], layer: nn.Module, arguments: dict[str, Any]
    ) -> Callable[..., Any]:
        """`run`, a kind of checkpointing, whose recomputation is alone with `layer`, as the layer is now.

        Args:
            arguments: what the layer gets beside hidden states.
        """
        repeated = repeating(run, layer, arguments)

        def run_alone(function: Callable[..., Any], *args: Any) -> Any:
            def again(*inner: Any) -> Any:
                with self.running_again([layer]):
                    return function(*inner)

            return repeated(again, *args)

        return run_alone

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Inside the block, every call in this thread runs the model's own code."""
        before, self._thread.running = self.running, False
        try:
            yield
        finally:
            self._thread.running = before

    def _has_other_use(self, given: dict[str, Any]) -> bool:
        if in_functional_transform():
            self._say_once(
                "A training pass inside a transform of torch.func (grad, vmap) runs without LeMo: use "
                "loss.backward() or torch.autograd.grad, also with torch.func.functional_call."
            )
            return True
        cache = given.get("past_key_values")
        if cache is None and not given.get("use_cache"):
            return False
        if cache is not None and any(head.requires_grad for head in _heads(cache)):
            raise ValueError(_CHUNKS if self.with_cache else _PREFIX_TUNING)
        self.with_cache = True
        self._say_once(
            "A training pass with a cache (`past_key_values` or use_cache=True) runs without LeMo, which "
            "trains on whole sequences: leave both out."
        )
        return True

    def _say_once(self, warning: str) -> None:
        if warning not in self._said:
            self._said.add(warning)
            logger.warning(warning)


def _heads(cache: Any) -> list[Tensor]:
    layers = getattr(cache, "layers", None)
    parts = (
        cache if layers is None else [(getattr(x, "keys", None), getattr(x, "values", None)) for x in layers]
    )
    return [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)]


def swap_class(
    module: Any, patched: type[nn.Module], on_undo: Callable[[Callable[[], None]], None], **attributes: Any
) -> None:
    """Make `module` an instance of `patched`, with more attributes, until it is undone."""
    original = module.__class__
    vars(module).update(attributes)
    module.__class__ = patched

    def undo() -> None:
        module.__class__ = original
        for name in attributes:
            del vars(module)[name]

    on_undo(undo)


def subclass_of(original: Any, **namespace: Any) -> type[nn.Module]:
    """A subclass of the same name, whose copies and pickles are instances of `original`."""

    def reduce(self: Any, protocol: Any) -> Any:
        parent: Any = super(type(self), self)
        _, _, state, *rest = parent.__reduce_ex__(protocol)
        state = {name: value for name, value in state.items() if not name.startswith(OURS)}
        if (entry := vars(self).get(_ENTRY)) and _function_of(state.get("forward")) is entry:
            del state["forward"]
            if vars(self)[_OWN_FORWARD] is not None:
                state["forward"] = vars(self)[_OWN_FORWARD]
        # the usual way, copyreg.__newobj__, insists on the object's own class
        return (object.__new__, (original,), state, *rest)

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), {"__reduce_ex__": reduce, **names, **namespace})


_copied_clean = functools.cache(subclass_of)


def patch_forward(
    module: Any,
    patched: Callable[..., Any],
    session: Any,
    passes: Passes,
    on_undo: Callable[[Callable[[], None]], None],
) -> None:
    """Let `patched(forward, *args, **kwargs)` run the training passes of `module`.

    Args:
        patched: gets the module's own forward and the arguments of the call.
        session: what the module remembers as its session.
        passes: tells which calls are training passes.
        on_undo: called with what takes the patch off again.
    """
    own_forward = vars(module).get("forward")
    below = module.forward
    own_method = getattr(below, "__self__", None) is module
    signature = inspect.signature(below)
    patched = torch.compiler.disable(patched)  # inside torch.compile, the training step runs eagerly

    @functools.partial(torch.compiler.disable, recursive=False)
    @functools.wraps(below)
    def lemo_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A copy runs its own code, and so does a module that remove_lemo left inside somebody's wrapper.
        forward = below.__func__.__get__(self) if own_method else below
        if vars(self).get(_ENTRY) is not entry:
            return forward(*args, **kwargs)
        given = bind(self, forward, args, kwargs).arguments if args else kwargs
        with passes.entering(self, given) as running:
            run = functools.partial(patched, forward) if running else forward
            return run(*args, **kwargs)

    entry = lemo_forward
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    entry.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])
    module.forward = types.MethodType(entry, module)
    attributes = {SESSION: session, _ENTRY: entry, _OWN_FORWARD: own_forward}
    swap_class(module, _copied_clean(module.__class__), on_undo, **attributes)

    def undo() -> None:
        # If other code wrapped the patch since, it stays inside and only passes calls on.
        if _function_of(vars(module).get("forward")) is entry:
            del module.forward
            if own_forward is not None:
                module.forward = own_forward

    on_undo(undo)


def _function_of(method: Any) -> Any:
    return getattr(method, "__func__", method)
