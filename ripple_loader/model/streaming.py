"""Modules that replace MLPs and have no parameters: a backend computes with neurons from elsewhere.

They are opaque to torch.compile: a compiled model has a graph break at each. Import this file only when a
model is loaded, because `torch.compiler.disable` imports Dynamo.

Dimension key: T tokens, H hidden, N neurons, K experts a token is routed to.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ripple_loader.compat import called_by_peft, kept_in_float32
from ripple_loader.model.architectures import MLPSite, Projection
from ripple_loader.model.linears import Streamed, WeightStore, refuse_others, streamed_linear
from ripple_loader.model.lowrank import LowRank, tensors_of, with_tensors


class Backend(WeightStore, Protocol):
    """Computes the streamed MLPs of a model, numbered as they run: `online.engine.Engine` or the tracer."""

    def compute(
        self,
        layer: int,
        x_TH: Tensor,
        activation: nn.Module,
        following: int | None,
        low_rank: tuple[LowRank, ...] = (),
    ) -> Tensor:
        """An MLP's output for T tokens; `following` is the MLP that runs next, if it is known."""

    def gradients(
        self, layer: int, x_TH: Tensor, activation: nn.Module, low_rank: tuple[LowRank, ...], grad_TH: Tensor
    ) -> list[Tensor]:
        """Gradients of the input and of the tensors of `low_rank`, given that of the output."""

    def begin(self, tokens: int, layers: int) -> None:
        """Called when a forward call of `tokens` tokens reaches the first of a stack's streamed layers."""

    def stored_as(self, first: int, count: int) -> dict[str, Tensor]:
        """The tensors of some MLPs by the checkpoint's own names, from behind the layer's number."""


class StreamingMLP(nn.Module):
    """Computes an MLP with neurons that are not parameters.

    Its linears are modules without weights, which LoRA may wrap. `dropout` is the share that the stock MLP
    drops in training, and `activation_name` the stock name of its activation.

    Args:
        backend: shared by all layers of a model.
        layer: which MLP this is.
        following: the MLP that runs after it.
        begins: how many MLPs its stack has if it is the first of them, else 0.
        activation: the model's own.
        rows: the linear of each row of a bundle, by name, with its part of the linear.
        linears: the streamed linears, if they are modules of this one.
        layer_module: the layer, where it holds the linears itself.
        in_float32: whether float16 inputs are computed with in float32, as the model keeps its weights.
    """

    dropout = 0.0
    activation_name: str

    def __init__(
        self,
        backend: Backend,
        layer: int,
        following: int,
        begins: int,
        activation: nn.Module,
        rows: list[Projection],
        linears: list[Streamed],
        layer_module: nn.Module | None,
        in_float32: bool,
    ) -> None:
        super().__init__()
        self.backend, self.layer, self.following, self.activation = backend, layer, following, activation
        self.begins, self.in_float32 = begins, in_float32
        self.rows, self.names = rows, [linear.name for linear in linears]
        for linear in linears:
            setattr(self, linear.name, linear)
        self.__dict__["layer_module"] = layer_module  # which holds this module, so must not be one of its own

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse_new_activation(self, name, value)
        if name in self.__dict__.get("names", ()):
            _accept(value)
        super().__setattr__(name, value)

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states to hidden states, shape (..., H)."""
        _refuse_tracing()
        if self.training and self.dropout:
            warnings.warn(
                f"dropout inside of streamed MLPs (p={self.dropout}) is left out: Ripple computes them as in "
                "evaluation.",
                stacklevel=2,
            )
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.in_float32 and x_TH.dtype == torch.float16:
            x_TH = x_TH.float()
        low_rank = self._low_rank(x_TH)
        y_TH: Tensor = _StreamedMLP.apply(x_TH, self, low_rank, *tensors_of(low_rank))
        return y_TH.view(hidden_states.shape)

    def extra_repr(self) -> str:
        return f"layer={self.layer}"

    def _low_rank(self, x_TH: Tensor) -> tuple[LowRank, ...]:
        """All adapters on the linears, their neurons in placement order."""
        found = []
        for row, projection in enumerate(self.rows):
            linear = getattr(self.layer_module or self, projection.linear)
            streamed = linear if isinstance(linear, Streamed) else linear.base_layer
            pairs = [(a, b, 0.0) for a, b in streamed.merged_pairs()]
            pairs += [] if linear is streamed else linear.active()
            found += [self._placed(row, projection, *pair, x_TH) for pair in pairs]
        return tuple(found)

    def _placed(
        self, row: int, projection: Projection, a: Tensor, b: Tensor, dropout: float, x_TH: Tensor
    ) -> LowRank:
        places = self.backend.permutation(self.layer).to(a.device)
        if row == len(self.rows) - 1:
            a = a[:, places]
        else:
            b = (b if projection.half is None else b.chunk(2)[projection.half])[places]
        keep = None
        if dropout:
            keep = F.dropout(torch.ones(len(x_TH), a.shape[1], dtype=a.dtype, device=a.device), dropout)
        return LowRank(row, a, b, keep)

    def compute(self, x_TH: Tensor, low_rank: tuple[LowRank, ...]) -> Tensor:
        if self.begins:
            self.backend.begin(len(x_TH), self.begins)
        return self.backend.compute(self.layer, x_TH, self.activation, self.following, low_rank)


class _HoldsLinears(nn.Module):
    """A layer that holds streamed linears itself, and accepts what replaces them as an MLP does."""

    streamed_linears: tuple[str, ...]
    activation_name: str

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse_new_activation(self, name, value)
        if name in self.__dict__.get("streamed_linears", ()):
            _accept(value)
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_holder, (type(self).__bases__[1],), self.__dict__


_holders: dict[type[nn.Module], Any] = {}


def _holder_of(kind: type[nn.Module]) -> Any:
    """A class of layers that hold streamed linears, by the name of the stock class."""
    if kind not in _holders:
        _holders[kind] = type(kind.__name__, (_HoldsLinears, kind), {"__module__": kind.__module__})
    return _holders[kind]


def _new_holder(kind: type[nn.Module]) -> Any:
    holder = _holder_of(kind)
    return holder.__new__(holder)


def _accept(module: Any) -> None:
    """Let a module that replaces a streamed linear belong to its MLP; ValueError unless it is LoRA."""
    if isinstance(module, Streamed) or not isinstance(module, nn.Module):
        return
    if "peft" not in sys.modules:
        raise ValueError(
            f"{type(module).__name__} must not replace a linear of an MLP that is streamed by Ripple: load "
            "the model without `quantization_config` for that."
        )
    from ripple_loader.model.lora import accept

    accept(module)


_STACKED = ("gate_up_proj", "down_proj")  # transformers' parameters of a layer's experts


def _refuse_tracing() -> None:
    """ValueError while a model is traced: the graph would keep the neurons of the example."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise ValueError(
            "a model that is streamed by Ripple must not be traced or exported, because the graph would keep "
            "the neurons of the example: use `torch.compile`, or export the model without Ripple."
        )


def _refuse_new_activation(module: nn.Module, name: str, value: Any) -> None:
    """ValueError if a module's activation would be replaced where nothing would use the new one."""
    if isinstance(value, nn.Module) and name == module.__dict__.get("activation_name"):
        raise ValueError(
            f"{name} must not be replaced, because its MLP is streamed by Ripple with the activation that it "
            "was reordered for: change the model's configuration, and reorder that."
        )


class StreamingExperts(nn.Module):
    """Computes the routed experts of a layer; it does not read experts that no token is routed to.

    Args:
        backend: shared by all layers of a model.
        first: number of the layer's first expert among all streamed MLPs.
        experts: how many experts the layer has.
        layers: how many layers of the model have streamed experts.
        activation: the model's own.
        name: of this module in its layer.
    """

    def __init__(
        self, backend: Backend, first: int, experts: int, layers: int, activation: nn.Module, name: str
    ) -> None:
        super().__init__()
        self.backend, self.first, self.experts, self.activation = backend, first, experts, activation
        self.layers, self.name, self.loaded = layers, name, False

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the routed experts' outputs, shape (T, H).

        Args:
            hidden_states: shape (T, H).
            top_k_index: the experts of each token, shape (T, K); numbers from `experts` on are no expert.
            top_k_weights: the factor of each of their outputs, shape (T, K).
        """
        _refuse_tracing()
        return _StreamedExperts.apply(hidden_states, top_k_weights, top_k_index, self)

    def extra_repr(self) -> str:
        return f"first={self.first}, experts={self.experts}"

    def named_parameters(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """None; for PEFT, which looks for parameters to adapt here, an error if it wants one of them."""
        yield from super().named_parameters(*arguments, **options)
        if called_by_peft():
            for name in _STACKED:
                yield name, nn.Parameter(torch.empty(0))

    def __getattr__(self, name: str) -> Any:
        if name in _STACKED and called_by_peft():
            raise ValueError(
                f"{name} of routed experts must have no adapter, because the experts are streamed by Ripple: "
                "leave them out of `target_modules` and `target_parameters`."
            )
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse_new_activation(self, name, value)
        super().__setattr__(name, value)

    def routed(self, index_TK: Tensor) -> list[int]:
        """The experts that tokens are routed to, ascending."""
        return [expert for expert in index_TK.unique().tolist() if expert < self.experts]

    def compute(self, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if self.first == 0:
            self.backend.begin(len(x_TH), self.layers)
        y_TH = torch.zeros_like(x_TH)
        routed = self.routed(index_TK)
        for expert, following in zip(routed, [*routed[1:], None], strict=True):
            tokens, rank = torch.where(index_TK == expert)
            out = self.backend.compute(
                self.first + expert,
                x_TH[tokens],
                self.activation,
                None if following is None else self.first + following,
            )
            y_TH.index_add_(0, tokens, (out * weights_TK[tokens, rank, None]).to(y_TH.dtype))
        return y_TH

    def gradients(
        self, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, grad_TH: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the input and of the experts' factors."""
        grad_x_TH, grad_weights_TK = torch.zeros_like(x_TH), torch.zeros_like(weights_TK)
        for expert in self.routed(index_TK):
            tokens, rank = torch.where(index_TK == expert)
            grad_out = grad_TH[tokens] * weights_TK[tokens, rank, None]
            arguments = self.first + expert, x_TH[tokens], self.activation
            (grad,) = self.backend.gradients(*arguments, (), grad_out.to(x_TH.dtype))
            grad_x_TH.index_add_(0, tokens, grad.to(x_TH.dtype))
            out = self.backend.compute(*arguments, None)
            grad_weights_TK[tokens, rank] = (grad_TH[tokens] * out).sum(1).to(weights_TK.dtype)
        return grad_x_TH, grad_weights_TK

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.loaded:
            destination.update(self._tensors(prefix))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        *_, errors = arguments
        own = self._tensors(prefix)
        given = {
            name: tensor for name, tensor in state_dict.items() if name in own or name.startswith(prefix)
        }
        refuse_others(given, own, "", errors)

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        """The experts' weights by the checkpoint's names: one tensor for each linear, or stacked."""
        _, _, inner = self.name.rpartition(".")
        stored = self.backend.stored_as(self.first, self.experts)
        return {prefix + name.partition(f"{inner}.")[2]: tensor for name, tensor in stored.items()}


class _StreamedMLP(torch.autograd.Function):
    """Streams the neurons once for the output, and once more for the gradients of what comes before."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, module: StreamingMLP, low_rank: tuple[LowRank, ...], *tensors: Tensor
    ) -> Tensor:
        ctx.module, ctx.low_rank = module, low_rank
        ctx.save_for_backward(x_TH, *tensors)
        return module.compute(x_TH, low_rank)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> Any:
        x_TH, *tensors = ctx.saved_tensors
        low_rank, module = with_tensors(ctx.low_rank, tensors), ctx.module
        arguments = module.layer, x_TH, module.activation, low_rank, grad_TH
        first, *others = module.backend.gradients(*arguments)
        return first, None, None, *others


class _StreamedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weights_TK: Tensor, index_TK: Tensor, module: StreamingExperts
    ) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x_TH, index_TK, weights_TK)
        return module.compute(x_TH, index_TK, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> Any:
        return *ctx.module.gradients(*ctx.saved_tensors, grad_TH), None, None


def is_streamed(model: nn.Module) -> bool:
    """Whether MLPs of a model are streamed already."""
    return any(isinstance(module, StreamingMLP | StreamingExperts) for module in model.modules())


def stream(model: nn.Module, sites: list[MLPSite], backend: Backend) -> None:
    """Replace the MLPs of a model, in the order in which they run."""
    stacks = [site.stack for site in sites]
    kept = kept_in_float32(model)
    for number, site in enumerate(sites):
        if site.experts is not None:
            first, name = number * site.experts, site.architecture.mlp
            experts = StreamingExperts(backend, first, site.experts, len(sites), site.activation, name)
            experts.train(site.container.training).activation_name = site.architecture.activation
            site.replace(model, experts)
            continue
        inside = bool(site.architecture.mlp)
        linears = [
            streamed_linear(
                linear,
                backend,
                number,
                projections,
                inside=inside,
                is_down=projections == [site.architecture.down],
            )
            for linear, projections in site.linears()
        ]
        architecture = site.architecture
        # After the last layer comes the first of the decoder, for the next token.
        following = number + 1 if number + 1 < len(sites) else stacks.index(stacks[-1])
        mlp = StreamingMLP(
            backend,
            number,
            following,
            stacks.count(site.stack) if number == stacks.index(site.stack) else 0,
            site.activation,
            [architecture.projections[role] for role in architecture.bundle],
            linears if inside else [],
            None if inside else site.container,
            in_float32=architecture.down.linear in kept,
        )
        mlp.train(site.container.training).dropout = site.dropout
        mlp.activation_name = architecture.activation
        site.replace(model, mlp, {linear.name: linear for linear in linears})
        if not inside:
            site.container.__class__ = _holder_of(type(site.container))
            site.container.streamed_linears = tuple(linear.name for linear in linears)
            site.container.activation_name = architecture.activation


def loaded(model: nn.Module) -> None:
    """From now on the streamed weights belong to the model's state dict; its parameters are frozen.

    Gradients pass through streamed MLPs, which do not train: only what the user asks for should.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Streamed | StreamingExperts):
            module.loaded = True
        if isinstance(module, Streamed):
            module.model = weakref.ref(model)
