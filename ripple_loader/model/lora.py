"""PEFT's LoRA on the linears of streamed MLPs. Import this file only where PEFT is imported already.

PEFT 0.18 to 0.21: `peft.tuners.lora.layer.Linear` with `lora_A`, `lora_B`, `scaling`, `lora_variant`,
`merged_adapters` and `check_adapters_to_merge`; they are what PEFT's own layers use.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ripple_loader.model.linears import Streamed


class StreamedLora(LoraLinear):
    """LoRA on a streamed linear: its MLP computes the product, merged or not."""

    base_layer: Streamed

    def update_layer(self, adapter_name: str, *arguments: Any, **options: Any) -> None:
        super().update_layer(adapter_name, *arguments, **options)
        check_adapter(self, adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make adapters a part of the linear, which keeps their product beside the streamed one."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            a, b = self._product(name)
            if safe_merge and not (a.isfinite().all() and b.isfinite().all()):
                raise ValueError(f"the weights of adapter {name} must be finite to merge it, but are not.")
            self.base_layer.merge(name, a, b)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo all merges."""
        while self.merged_adapters:
            self.base_layer.unmerge(self.merged_adapters.pop())

    def _is_of_copy(self, name: str) -> bool:
        orders: dict[str, bool] = self.__dict__.setdefault("of_copy", {})
        if name not in orders:
            orders[name] = self.base_layer.is_of_copy(name)
        return orders[name]

    def __getstate__(self) -> dict[str, Any]:
        for name in self.lora_A:
            self._is_of_copy(name)  # which a copy could not find out
        return self.__dict__

    def _product(self, name: str) -> tuple[Tensor, Tensor]:
        """a, and b with its scale, their neurons in the original's order."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight * self.scaling[name]
        return self.base_layer.in_original_order(a, b) if self._is_of_copy(name) else (a, b)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.__dict__.get("of_copy", {}).pop(adapter_name, None)

    def active(self) -> list[tuple[Tensor, Tensor, float]]:
        """The adapters that act and are not merged: a, b with its scale, and the share to drop."""
        if self._forward_pre_hooks:
            raise ValueError(
                "`adapter_names` must not choose an adapter for each row of a batch, because Ripple streams "
                "this model's MLPs: call the model once for each adapter."
            )
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        if self.merged:
            return []
        names = [name for name in self.active_adapters if name in self.lora_A]
        return [(*self._product(name), _dropout(self.lora_dropout[name])) for name in names]

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Like `Streamed.forward`: the MLP adds the product."""
        return self.base_layer(x)


def _dropout(module: nn.Module) -> float:
    return module.p if isinstance(module, nn.Dropout) and module.training else 0.0


def check_adapter(layer: LoraLinear, name: str) -> None:
    """ValueError if an adapter is not two plain products."""
    variant = layer.lora_variant.get(name)
    if variant is not None or layer.lora_bias.get(name):
        kind = "a bias" if variant is None else type(variant).__name__
        raise ValueError(
            f"adapter {name} must be plain LoRA on {layer.base_layer.name}, whose weights are streamed by "
            f"Ripple, got {kind}: leave the MLP's linears out of `target_modules`."
        )


def accept(layer: nn.Module) -> None:
    """Let an adapter layer of PEFT belong to a streamed MLP.

    Raises:
        ValueError: it is of another kind than LoRA.
    """
    base = getattr(layer, "base_layer", None)
    if type(layer) is not LoraLinear or not isinstance(base, Streamed):
        raise ValueError(
            f"{type(layer).__module__}.{type(layer).__name__} must not replace a linear of an MLP that is "
            "streamed by Ripple, which computes with LoRA only: leave the MLP's linears out of "
            "`target_modules` and `modules_to_save`."
        )
    for name in layer.lora_A:
        check_adapter(layer, name)
    layer.__class__ = StreamedLora
