"""What the paper prints, read off its figures: numbers to set beside ours, none of them computed here.

Barbero et al., *Transformers need glasses! Information over-squashing in language tasks* (NeurIPS 2024, arXiv
2406.04267). Read by eye from curves, to the digits given; where a curve could not be read at a length, there is no
entry. Distances are absolute and have no unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from oversquash_lens.viz.chart import Series

# The dashed line of figures 5, 8, 9, 10 and 12: bfloat16's precision at 1, drawn as an absolute distance.
PRECISION = (2.0**-7, "bfloat16 precision, 2⁻⁷")

GEMMA = "Gemma 7B, mean over heads in the last layer"
SEEDS = "synthetic, mean over 5 seeds"
ONE_LAYER = "synthetic, one attention layer, d = 64"


@dataclass(frozen=True)
class Printed:
    """One printed curve: `y` at the lengths `x`, and what it was measured on."""

    figure: str
    label: str
    of: str
    points: Mapping[int, float]

    @property
    def x(self) -> tuple[float, ...]:
        return tuple(float(each) for each in self.points)

    @property
    def y(self) -> tuple[float, ...]:
        return tuple(self.points.values())

    def series(self) -> Series:
        """The curve as a figure shows it, named as the paper's."""
        return Series(f"paper: {self.label}", self.x, self.y, kind="published")


def _printed(figure: str, label: str, of: str, x: tuple[int, ...], y: tuple[float, ...]) -> Printed:
    return Printed(figure, label, of, MappingProxyType(dict(zip(x, y, strict=True))))


FIGURE_5_LENGTHS = (1, 2, 6, 11, 51, 101, 501, 1001, 2001)

# Of (a) and (c) the print can be read at the first five lengths and at the last; between, the curves lie on the axis.
FIGURE_5: Mapping[str, Printed] = MappingProxyType(
    {
        "a": _printed("5a", "count ones", GEMMA, (1, 2, 6, 11, 51, 2001), (0.95, 0.35, 0.2, 0.08, 0.04, 0.0)),
        "b": _printed(
            "5b",
            "count ones among sampled digits",
            GEMMA,
            FIGURE_5_LENGTHS,
            (0.32, 0.28, 0.23, 0.26, 0.19, 0.13, 0.11, 0.09, 0.07),
        ),
        "c": _printed("5c", "copy ones", GEMMA, (1, 2, 6, 11, 51, 2001), (0.48, 0.40, 0.14, 0.06, 0.05, 0.01)),
        "d": _printed(
            "5d",
            "copy ones, a comma every third digit",
            GEMMA,
            FIGURE_5_LENGTHS,
            (0.48, 0.42, 0.44, 0.75, 1.0, 1.1, 1.25, 1.3, 1.4),
        ),
    }
)

FIGURE_8 = _printed(
    "8",
    "sinusoidal positions",
    ONE_LAYER,
    (5, 10, 100, 500, 1000, 5000, 10000),
    (0.07, 0.05, 0.018, 0.0075, 0.006, 0.0023, 0.0018),
)

# From 2000 on a value has one digit, 2500 excepted: 0.009 stands for 0.0085 … 0.0095, 0.002 for 0.0015 … 0.0025.
FIGURE_9 = _printed(
    "9",
    "total variation",
    SEEDS,
    (500, 750, 1000, 1500, 2000, 2500, 5000, 10000),
    (0.026, 0.020, 0.017, 0.012, 0.009, 0.0075, 0.004, 0.002),
)
# Lengths that the paper draws but that could not be read: an earlier computation of ours, as a second witness.
FIGURE_9_RECOMPUTED = _printed("9", "total variation, recomputed", SEEDS, (3000, 4000), (0.0065, 0.0049))

_FIGURE_10_LENGTHS = (5, 10, 100, 500, 1000)
_FIGURE_10_VALUES = (1.0, 0.55, 0.07, 0.013, 0.007)
# The four curves lie on one another up to 1000; at 5000 they fan out, ALiBi on top.
FIGURE_10_AT_5000 = (0.0015, 0.004)
FIGURE_10: Mapping[str, Printed] = MappingProxyType(
    {
        **{
            name: _printed("10", "all four encodings", ONE_LAYER, _FIGURE_10_LENGTHS, _FIGURE_10_VALUES)
            for name in ("NoPE", "RoPE", "sinusoidal")
        },
        "ALiBi": _printed(
            "10",
            "ALiBi",
            ONE_LAYER,
            (*_FIGURE_10_LENGTHS, 5000),
            (*_FIGURE_10_VALUES, FIGURE_10_AT_5000[1]),
        ),
    }
)

FIGURE_12 = _printed(
    "12",
    "prompt Type 1",
    "as figure 5, the question before the sequence",
    (2, 5, 10, 100, 500, 1000),
    (0.13, 0.03, 0.015, 0.012, 0.01, 0.01),
)
