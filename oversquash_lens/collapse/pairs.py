"""Many pairs of prompts through one model in one number format, and how far apart each pair ends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.prefixes import Ids
from oversquash_lens.capture.readings import logits_of, read, read_alone
from oversquash_lens.capture.subject import Subject
from oversquash_lens.collapse.families import repeats_last
from oversquash_lens.collapse.precision import NumberFormat, stored
from oversquash_lens.numerics import InDouble

LOGITS = 64  # pairs whose logits are held at a time

Repeated = dict[int, tuple[Tensor, Tensor]]  # pair -> its first prompt's y and heads, from a batch of two


class PairRun:
    """What one model in one compute format makes of all pairs, in as few passes as they allow.

    `subject`: its architecture names the format that the model computes in now.
    """

    def __init__(self, subject: Subject, pairs: Sequence[tuple[Ids, Ids]], share: bool) -> None:
        self.subject = subject
        self.sequences = list(dict.fromkeys(ids for pair in pairs for ids in pair))
        index = {ids: i for i, ids in enumerate(self.sequences)}
        self.first = torch.tensor([index[a] for a, _ in pairs], device="cpu")
        self.second = torch.tensor([index[b] for _, b in pairs], device="cpu")
        covered = [repeats_last(*pair) for pair in pairs]
        repeated = {b for (_, b), asked in zip(pairs, covered, strict=True) if asked}
        compared = [ids in repeated for ids in self.sequences]
        with self._passing():
            self.readings = read(subject, self.sequences, compared=compared, share=share)
        self.covered = torch.tensor(covered, device="cpu")

    def _passing(self) -> AbstractContextManager[Any]:
        """Around every pass: a format that computes in float64 does so all through."""
        return InDouble() if self.subject.architecture.dtype == torch.float64 else nullcontext()

    def distances(self, fmt: NumberFormat) -> dict[str, Tensor]:
        """The fields of a CollapseCurve, by name, of what was computed rounded to this format's storage."""
        readings, first, second = self.readings, self.first, self.second
        y = stored(readings.prediction_input, fmt).cpu()
        heads = stored(readings.heads, fmt).cpu()
        change = (y[first] - y[second]).abs()
        shift, own = (
            values[:, second].masked_fill(~self.covered, torch.nan)
            for values in (readings.attention_shift, readings.self_attention)
        )
        return {
            "l1": change.sum(1),
            "l2": change.norm(dim=1),
            "linf": change.amax(1),
            "relative": change.norm(dim=1) / y[first].norm(dim=1),
            "per_head": (heads[first] - heads[second]).abs().amax(2),
            "by_layer": torch.stack([self._relative(layer, fmt) for layer in readings.residuals]),
            "bit_equal": (change == 0).all(1),
            "attention_shift": shift,
            "self_attention": own,
            **self._logits(y, fmt),
        }

    def _relative(self, residuals: Float[Tensor, "sequence d_model"], fmt: NumberFormat) -> Float[Tensor, " length"]:
        values = stored(residuals, fmt)
        change = (values[self.first] - values[self.second]).norm(dim=1)
        return (change / values[self.first].norm(dim=1)).cpu()

    def _logits(self, y: Float[Tensor, "sequence d_model"], fmt: NumberFormat) -> dict[str, Tensor]:
        """Each sequence's logits once, a few pairs at a time: [pair, d_vocab] would not fit for long curves."""
        change, agree, shift = [], [], []
        inputs = y.to(self.readings.prediction_input)
        wide = torch.promote_types(inputs.dtype, torch.float32)
        for first, second in zip(self.first.split(LOGITS), self.second.split(LOGITS), strict=True):
            both, place = torch.cat([first, second]).unique(return_inverse=True)
            logits = logits_of(self.subject, inputs[both]).to(wide)
            best = logits.topk(2)
            a, b = place.tensor_split(2)
            top, runner_up = best.values.double().unbind(1)
            margin = top - runner_up
            change += [(logits[i] - logits[j]).abs().max() for i, j in zip(a, b, strict=True)]
            agree.append(best.indices[a, 0] == best.indices[b, 0])
            shift.append((margin[a] - margin[b]).abs() / (fmt.epsilon * top[a].abs()))
        same = (y[self.first] == y[self.second]).all(1)  # a product's rows may round differently, whatever they are
        return {
            "logits": torch.stack(change).double().cpu().masked_fill(same, 0),
            "top1_agree": torch.cat(agree).cpu() | same,
            "margin_shift": torch.cat(shift).cpu().masked_fill(same, 0),
        }

    def repeat(self, some: Sequence[int]) -> Repeated:
        """The first prompts of these pairs once more, from a batch of two."""
        with self._passing():
            return {at: read_alone(self.subject, self.sequences[int(self.first[at])], batch=2) for at in some}

    def floors(self, fmt: NumberFormat, repeated: Repeated) -> dict[str, Float[Tensor, " length"]]:
        """What rounding alone makes of the distances: nan where a prompt was not repeated."""
        y_floor, head_floor = torch.full((2, len(self.first)), torch.nan, dtype=torch.float64, device="cpu")
        for at, (y, heads) in repeated.items():
            one = int(self.first[at])
            y_before, heads_before = self.readings.prediction_input[one], self.readings.heads[one]
            y_floor[at] = (stored(y, fmt) - stored(y_before.to(y), fmt)).abs().sum()
            head_floor[at] = (stored(heads, fmt) - stored(heads_before.to(heads), fmt)).abs().amax(1).mean()
        return {"noise_floor": y_floor, "head_floor": head_floor}
