"""What follows the last layer of a recorded pass: the final norm, what the unembedding reads, its logits; checked."""

from __future__ import annotations

import torch
from torch import Tensor

from oversquash_lens.capture import checks
from oversquash_lens.capture.norms import norm_bias, norm_gain
from oversquash_lens.capture.pass_context import PassContext
from oversquash_lens.errors import HookMismatchError
from oversquash_lens.numerics import to_float64


class FinalNorm:
    """Takes what the hooks behind the last layer see; `kept` holds it, of the last position."""

    def __init__(self, context: PassContext) -> None:
        self.context = context
        self.kept: dict[str, Tensor] = {}

    def take(self, key: str, value: Tensor) -> None:
        if key in self.kept:
            raise HookMismatchError(f"{key}: the hook fired a second time; expected one forward pass per recording")
        with torch.no_grad():
            TAKEN[key](self, self.context.brought(value))

    def missing(self) -> list[str]:
        """Names of the hooks that have not fired."""
        return [name for key, name in self.context.architecture.final_hooks().items() if key not in self.kept]

    def check_logits(self, logits: Tensor) -> None:
        """They are those of the y that was recorded."""
        with torch.no_grad():
            model = self.context.model
            table, bias = model.W_U, getattr(model, "b_U", None)
            own = self.kept["unembedded"].to(table) @ table
            own = own if bias is None else own + bias.to(own.device)
            name, dtype = "the unembedding", self.context.architecture.dtype
            checks.check_same(name, own, logits.detach()[0, -1].to(own.device), "y · W_U + b_U", "its logits", dtype)

    def _last(self, residual: Tensor) -> None:
        self.kept["last"] = self.context.work(residual[-1]).clone()

    def _final_scale(self, scale: Tensor) -> None:
        checks.check_norm("ln_final.hook_scale", self._needed("last")[None], scale[-1:, 0], self.context.architecture)
        self.kept["final_scale"] = to_float64(scale[-1, 0])

    def _prediction_input(self, y: Tensor) -> None:
        checks.check_finite("the unembedding's input", y[-1])
        architecture, model = self.context.architecture, self.context.model
        y, last = self.context.work(y[-1]), self._needed("last")
        if not architecture.normed:
            self.kept["final_scale"] = torch.ones((), dtype=torch.float64, device="cpu")
        own = self.context.normalized(last[None], self._needed("final_scale")[None])[0]
        norm = getattr(model, "ln_final", None)
        gain, bias = norm_gain(norm, model), norm_bias(norm)
        own = own * gain.to(own) + (0.0 if bias is None else bias.to(own))
        checks.check_same("unembed.hook_in", own, y, "ln_final of the last residual", "hook_in", architecture.dtype)
        self.kept["unembedded"] = y
        self.kept["prediction_input"] = (
            y.clone() if architecture.restore_gain is None else y * architecture.restore_gain.to(y)
        )

    def _needed(self, key: str) -> Tensor:
        if key not in self.kept:
            raise HookMismatchError(
                f"the hook {self.context.architecture.final_hooks().get(key, key)} did not fire before the "
                "unembedding; expected one whole forward pass of all layers inside the recording"
            )
        return self.kept[key]


TAKEN = {
    "last": FinalNorm._last,
    "final_scale": FinalNorm._final_scale,
    "prediction_input": FinalNorm._prediction_input,
}
