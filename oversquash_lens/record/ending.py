"""What follows the last layer of a recorded pass: the final norm, what the unembedding reads, its logits; checked."""

from __future__ import annotations

import torch
from torch import Tensor

from oversquash_lens.errors import GateError
from oversquash_lens.record import gate
from oversquash_lens.record.norms import norm_bias, norm_gain
from oversquash_lens.record.whole import Whole
from oversquash_lens.record.wide import wide


class Ending:
    """Takes what the hooks behind the last layer see; `kept` holds it, of the last position."""

    def __init__(self, whole: Whole) -> None:
        self.whole = whole
        self.kept: dict[str, Tensor] = {}

    def take(self, key: str, value: Tensor) -> None:
        if key in self.kept:
            raise GateError(f"{key}: the hook fired a second time; expected one forward pass per recording")
        with torch.no_grad():
            TAKEN[key](self, self.whole.brought(value))

    def missing(self) -> list[str]:
        """Names of the hooks that have not fired."""
        return [name for key, name in self.whole.layout.final_hooks().items() if key not in self.kept]

    def check_logits(self, logits: Tensor) -> None:
        """They are those of the y that was recorded."""
        with torch.no_grad():
            model = self.whole.model
            table, bias = model.W_U, getattr(model, "b_U", None)
            own = self.kept["unembedded"].to(table) @ table
            own = own if bias is None else own + bias.to(own.device)
            name, dtype = "the unembedding", self.whole.layout.dtype
            gate.check_same(name, own, logits.detach()[0, -1].to(own.device), "y · W_U + b_U", "its logits", dtype)

    def _last(self, residual: Tensor) -> None:
        self.kept["last"] = self.whole.work(residual[-1]).clone()

    def _final_scale(self, scale: Tensor) -> None:
        gate.check_norm("ln_final.hook_scale", self._needed("last")[None], scale[-1:, 0], self.whole.layout)
        self.kept["final_scale"] = wide(scale[-1, 0])

    def _prediction_input(self, y: Tensor) -> None:
        gate.check_finite("the unembedding's input", y[-1])
        layout, model = self.whole.layout, self.whole.model
        y, last = self.whole.work(y[-1]), self._needed("last")
        if not layout.normed:
            self.kept["final_scale"] = torch.ones((), dtype=torch.float64, device="cpu")
        own = self.whole.normalized(last[None], self._needed("final_scale")[None])[0]
        norm = getattr(model, "ln_final", None)
        gain, bias = norm_gain(norm, model), norm_bias(norm)
        own = own * gain.to(own) + (0.0 if bias is None else bias.to(own))
        gate.check_same("unembed.hook_in", own, y, "ln_final of the last residual", "hook_in", layout.dtype)
        self.kept["unembedded"] = y
        self.kept["prediction_input"] = y.clone() if layout.restore_gain is None else y * layout.restore_gain.to(y)

    def _needed(self, key: str) -> Tensor:
        if key not in self.kept:
            raise GateError(
                f"the hook {self.whole.layout.final_hooks().get(key, key)} did not fire before the unembedding; "
                "expected one whole forward pass of all layers inside the recording"
            )
        return self.kept[key]


TAKEN = {
    "last": Ending._last,
    "final_scale": Ending._final_scale,
    "prediction_input": Ending._prediction_input,
}
