"""How the layers of a patched model run in exact mode.

Scheme "layers": each layer is a walk of its own, and its input waits for the backward pass.

Scheme "segments": one walk goes through all layers. The model calls its layers one by one, so all but the
last hand their input on and note how they were called; the last one walks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import operator
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lemo_trainer.compat import attention_implementation, global_hooks, is_whole
from lemo_trainer.config import LemoConfig
from lemo_trainer.exact import recorded
from lemo_trainer.exact.auto import AutoChoice
from lemo_trainer.exact.boundaries import saved_in
from lemo_trainer.exact.check import Trial, try_layers
from lemo_trainer.exact.layer import LayerCall, segments_of
from lemo_trainer.exact.masks import lazy_masks
from lemo_trainer.exact.walk import Walk, walk_through
from lemo_trainer.exact.ways import Way, WayScheme
from lemo_trainer.layers.checkpointing import saving_attention, saving_inputs, saving_matmuls
from lemo_trainer.model.architectures import CausalLM
from lemo_trainer.model.calls import CACHES, layer_arguments
from lemo_trainer.model.hooks import counts_from_the_end, hooks_on_gradients, name_of
from lemo_trainer.model.patching import Passes

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]
_OTHER_LAYERS = (
    'scheme="segments" needs the layers that the model had when LeMo was applied, all of them, in order and '
    'with nothing between them, got others; use scheme="layers", or change layers before apply_lemo.'
)


@dataclass
class ExactMode:
    """What the layers of one model share.

    Args:
        config: the configuration in force.
        parts: the model.
        trial: which of its layers run in segments.
        only_layers: why the model cannot run by scheme "segments"; empty if it can.
        notes: what a user should know about it.
        way: how the layers run in the latest forward pass; None before the first.
        auto: what chooses it under `mode="auto"`; None under "exact".
        on_batch: called with the tokens of a sample and of its segments when a forward pass begins.
        passes: those of the session, which let one thread train at a time.
    """

    config: LemoConfig
    parts: CausalLM
    trial: Trial
    only_layers: str
    notes: list[str] = field(default_factory=list)
    way: Way | None = None
    auto: AutoChoice | None = None
    on_batch: Callable[[int, int], None] = lambda seq_len, size: None
    passes: Passes = field(default_factory=Passes)
    _thread: threading.local = field(default_factory=threading.local)
    _calls: list[LayerCall] = field(default_factory=list)
    _handed_on: Tensor | None = None  # what the latest call returned in place of its layer's output
    _begun: bool = False
    _told_of_hooks: bool = False

    @classmethod
    def of(cls, parts: CausalLM, config: LemoConfig) -> ExactMode:
        """The mode of the layers of `parts`.

        Raises:
            ValueError: the scheme asked for needs what they lack.
        """
        trial = try_layers(parts, _recomputing(parts.layers[0], config))
        only_layers = _only_layers(parts, trial)
        if config.scheme == "segments" and only_layers:
            raise ValueError(f'scheme="segments" needs {only_layers}; use scheme="layers".')
        mode = cls(config, parts, trial, only_layers)
        if config.mode == "auto":
            mode.auto = AutoChoice(parts, config, set(trial.uncut), bool(only_layers))
        for reason in dict.fromkeys(trial.uncut.values()):
            indices = ", ".join(str(index) for index, why in trial.uncut.items() if why == reason)
            mode.notes.append(f"layers {indices} run over a whole sample at a time ({reason})")
        return mode

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block, the decoder's forward pass is one of exact mode."""
        implementation = attention_implementation(self.parts.model.config)
        lazy = self.trial.lazy_masks and not self._runs_plain()
        masks = lazy_masks(implementation) if lazy else contextlib.nullcontext()
        self._thread.running, self._begun, self._calls = True, False, []
        try:
            with masks:
                yield
            if self._calls:
                raise ValueError(_OTHER_LAYERS)
        finally:
            self._thread.running, self._calls, self._handed_on = False, [], None

    def run_layer(
        self, index: int, layer: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output of layer number `index`; `forward` is its class's own."""
        if not getattr(self._thread, "running", False):  # or in another thread
            return forward(layer, *args, **kwargs)
        x_BSD, arguments = layer_arguments(forward, args, kwargs)
        if self.way is None or not self._begun:
            self._begun = True
            self.way = self._choose(x_BSD)
            seq_len = x_BSD.shape[1]
            self.on_batch(seq_len, self.way.segment_tokens or seq_len)
        if self.way.scheme == "plain":
            return self._run_plain(layer, forward, arguments, x_BSD)
        _check_constants(arguments)
        call = LayerCall(layer, forward, arguments, x_BSD.shape[1])
        run = self._walk_layer if self.way.scheme == "layers" else self._walk_all
        return run(self.way, index, call, x_BSD)

    def _runs_plain(self) -> bool:
        return self.auto is not None and self.auto.way.scheme == "plain"

    def _run_plain(self, layer: Any, forward: Forward, arguments: dict[str, Any], x_BSD: Tensor) -> Any:
        assert self.way is not None
        if not self.way.selective:
            return forward(layer, x_BSD, **arguments)
        arguments = {name: value for name, value in arguments.items() if name not in CACHES}
        run = self.passes.alone(saving_matmuls, layer, arguments)
        output: Tensor = run(functools.partial(forward, layer, **arguments), x_BSD)
        return output

    def _choose(self, x_BSD: Tensor) -> Way:
        if self.auto is None:
            size, boundaries = self.config.segment_tokens, self.config.boundaries
            return Way(scheme=self._scheme(x_BSD), segment_tokens=size, boundaries=boundaries)
        way = self.auto.way
        if way.scheme == "segments" and self._needs_layers():
            return dataclasses.replace(way, scheme="layers", selective=False)
        return way

    def _scheme(self, x_BSD: Tensor) -> WayScheme:
        batch, seq_len = x_BSD.shape[:2]
        size = self.config.segment_tokens
        if self.config.scheme != "auto" or self.only_layers or self.trial.layer_bytes is None:
            return "segments" if self.config.scheme == "segments" else "layers"
        if self._needs_layers():
            return "layers"
        bytes_, total = self.trial.layer_bytes, len(self.parts.layers)
        return bytes_.scheme(total, batch * seq_len, batch * min(size, seq_len), self.config.boundaries)

    def _walk_layer(self, way: Way, index: int, call: LayerCall, x_BSD: Tensor) -> Tensor:
        whole = index in self.trial.uncut or counts_from_the_end(call.layer) or self._is_watched(call.layer)
        size = call.seq_len if whole or not way.segment_tokens else way.segment_tokens
        segments = segments_of(call.seq_len, size)
        walk = Walk([call], segments, keep_heads=False, run=operator.call, passes=self.passes)
        with saved_in(way.boundaries, x_BSD, len(self.parts.layers) - index):
            return walk_through(walk, x_BSD)

    def _is_watched(self, layer: nn.Module) -> bool:
        """Whether a hook sees gradients of a part of the layer, which must then be those of whole samples."""
        hooks = hooks_on_gradients(layer, inside=True)
        if hooks and not self._told_of_hooks:
            self._told_of_hooks = True
            logger.warning(
                "LeMo found %s, which must see gradients of whole samples: such a layer runs over a whole "
                "sample at a time, which takes more memory.",
                hooks[0],
            )
        return bool(hooks)

    def _walk_all(self, way: Way, index: int, call: LayerCall, x_BSD: Tensor) -> Tensor:
        segments = segments_of(call.seq_len, way.segment_tokens)
        run = _recomputing(call.layer, self.config)
        if self.auto is not None:
            run = saving_matmuls if way.selective else operator.call
        if len(segments) == 1:
            run = run if run is operator.call else self.passes.alone(run, call.layer, call.arguments)
            return run(functools.partial(call, segment=segments[0]), x_BSD)
        if not self._calls and (seams := self._seams()):
            raise ValueError(
                'scheme="segments" has no hidden states of a whole sample between its layers, got '
                f'{seams[0]}; use scheme="layers".'
            )
        elsewhere = index != len(self._calls) or (index and x_BSD is not self._handed_on)
        if elsewhere or not self.parts.has_same_layers():
            raise ValueError(_OTHER_LAYERS)
        self._calls.append(call)
        self._handed_on = x_BSD
        if index < len(self.parts.layers) - 1:
            return x_BSD
        calls, self._calls = self._calls, []
        walk = Walk(calls, segments, keep_heads=True, run=run, passes=self.passes)
        return walk_through(walk, x_BSD)

    def _needs_layers(self) -> bool:
        """Whether this forward pass cannot run by scheme "segments"."""
        return bool(self._seams()) or not self.parts.has_same_layers()

    def _seams(self) -> list[str]:
        """Whoever wants hidden states of a whole sample between two layers, where no layer has made them."""
        seams = ["`output_hidden_states`"] if recorded.wants_hidden_states() else []
        seams += ["the adapter of aLoRA"] if any(map(counts_from_the_end, self.parts.layers)) else []
        seams += _foreign_hooks(self.parts.layers)
        return seams + [hook for layer in self.parts.layers for hook in hooks_on_gradients(layer)]


def _only_layers(parts: CausalLM, trial: Trial) -> str:
    """What scheme "segments" needs and this model lacks."""
    name = type(parts.model).__name__
    for index, reason in trial.uncut.items():
        return f"layers that keep keys and values alone, got {name}, whose layer {index} does not ({reason})"
    if len(set(parts.layers)) < len(parts.layers):
        return f"a layer of its own at each depth, got {name}, which uses one at several"
    if layerdrop := getattr(parts.model.config, "layerdrop", 0):
        return f"a model that runs all its layers, got {name} with layerdrop {layerdrop}"
    if not all(weight.is_meta or is_whole(weight) for weight in parts.model.parameters()):
        return "whole weights, and these are sharded (FSDP, ZeRO-3)"
    return ""


def _foreign_hooks(layers: nn.ModuleList) -> Iterator[str]:
    """The forward hooks that are given hidden states between two layers, by name."""
    for hook in global_hooks():
        yield f"the hook {name_of(hook)} on all modules"
    last = len(layers) - 1
    for index, layer in enumerate(layers):
        seen = [*layer._forward_hooks.values()] * (index < last)
        seen += [*layer._forward_pre_hooks.values()] * (index > 0)
        for hook in seen:
            if not recorded.is_recording(hook):
                yield f"the hook {name_of(hook)} on layer {index}"


def _recomputing(layer: Any, config: LemoConfig) -> Callable[..., Tensor]:
    """What runs a layer with graph, of which it saves all, or less under checkpointing."""
    if vars(layer).get("gradient_checkpointing"):
        return saving_attention if config.save_attention else saving_inputs
    return saving_matmuls if config.selective_checkpointing else operator.call


def _check_constants(arguments: dict[str, Any]) -> None:
    """Raise ValueError for an argument with a gradient: the walk passes on that of the hidden states only."""
    for name, value in arguments.items():
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(value)):
            raise ValueError(
                f'mode="exact" needs layers that get a gradient through their hidden states only, got one '
                f"through `{name}`; train without LeMo."
            )
