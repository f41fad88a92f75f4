"""What all layers of one recorded pass share, and how they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oversquash_lens.capture.architecture import Architecture
from oversquash_lens.capture.weights import WeightGains

Made = TypeVar("Made")
# What fused attention was given and gave, for want of hooks.
TOLD = ("turned_query", "turned_key", "scale", "log_normaliser")


@dataclass(frozen=True)
class PassContext:
    """One pass: of which model, in what structure, with how many probes of each node, checked at how many positions."""

    model: Any  # None once the recording is over
    architecture: Architecture
    weights: WeightGains
    node_probes: int | None
    seed: int
    verify: bool
    home: torch.device  # where all is computed, wherever the layers of a spread model lie
    route: str = "kept"  # one of architecture.ROUTES
    made: dict[str, tuple[int, Any]] = field(default_factory=dict)  # see `once`

    def once(self, what: str, layer: int, make: Callable[[], Made]) -> Made:
        """What is made of one layer's weights alone, kept until another layer's is: the prompts of a batch share it."""
        if self.made.get(what, (None,))[0] != layer:
            self.made[what] = (layer, make())
        return self.made[what][1]

    def brought(self, value: Tensor) -> Tensor:
        """What a hook saw, without its graph, from whatever device its layer is on."""
        return value.detach().to(self.home)

    def work(self, value: Tensor) -> Tensor:
        """float64 models stay float64; everything else is accumulated in float32."""
        return value.double() if self.architecture.dtype == torch.float64 else value.float()

    def normalized(self, x: Float[Tensor, "row d"], scale: Float[Tensor, " row"]) -> Float[Tensor, "row d"]:
        """What a norm of this model makes of x, its gain left out."""
        x = self.work(x)
        centre = x.mean(-1, keepdim=True) if self.architecture.centred else 0.0
        return (x - centre) / scale.to(x)[:, None]

    def rows(self, n: int) -> Int[Tensor, " row"]:
        """Where residual bookkeeping and matrices are followed: the last position, or all of them."""
        return torch.arange(n, device="cpu") if self.verify else torch.tensor([n - 1], device="cpu")

    def hooks(self) -> dict[str, str]:
        """Key -> name of what is waited for in each layer: hooks, and what fused attention tells without one."""
        told = dict.fromkeys(TOLD, "of fused attention") if self.route == "fused" else {}
        return self.architecture.layer_hooks(self.route) | told

    def name(self, layer: int, key: str | None = None) -> str:
        """`layer 7, attn.hook_pattern`: what an error calls a place."""
        hook = self.hooks().get(key) if key else None
        return f"layer {layer}" + (f", {hook}" if hook else "")
