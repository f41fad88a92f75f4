"""How our print figures look: small type, thin lines, colours that colour-blind readers tell apart, no TeX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

INK, SOFT, FAINT = "#1f2328", "#6e757c", "#e4e6e8"
# Okabe and Ito (2008) without green and yellow: nothing red beside green, nothing too pale for white paper.
COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# From nothing to all: CIELAB lightness falls from 100 to 16 in even steps, hue from 236° to 270°.
RAMP = ("#ffffff", "#cce5f3", "#98cae8", "#61b0dc", "#1f94cc", "#0478ad", "#015c8b", "#024269", "#0c2944")
DPI = 200  # of the PNG
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("solid", (0, (5, 1.6)), (0, (4, 1.4, 1, 1.4)))
RIGHT, WRONG = COLOURS[0], COLOURS[1]
TITLE, HEADING, LABEL, SMALL = 9.5, 8.0, 7.5, 6.5  # points: figure, panel, axis, ticks and legend
_SETTINGS = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, and has ✓ and ✗
    "font.size": LABEL,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a token is a dollar
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.labelsize": LABEL,
    "axes.labelpad": 3.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.4,
    "legend.labelspacing": 0.35,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.2,
    "pdf.fonttype": 42,  # TrueType: journals refuse Type 3
    "svg.fonttype": "path",
    "svg.hashsalt": "oversquash-lens",  # the same drawing has the same ids
    "savefig.dpi": DPI,
}


@contextmanager
def styled() -> Iterator[None]:
    """Our settings over matplotlib's own, whatever the user's are; theirs are back afterwards."""
    import matplotlib

    default = {name: value for name, value in matplotlib.rcParamsDefault.items() if "backend" not in name}
    with matplotlib.rc_context({**default, **_SETTINGS}):
        yield


@dataclass(frozen=True)
class Look:
    """Colour, marker and dashes of one series, the same in every panel of a figure."""

    colour: str
    marker: str
    dashes: str | tuple


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """A look for each label, in their order; the dashes change when the colours are used up.

    >>> [look.colour for look in looks(["float32", "bfloat16", "float32"]).values()]
    ['#0072B2', '#D55E00']
    """
    n = len(COLOURS)
    return {
        label: Look(COLOURS[i % n], MARKERS[i % n], DASHES[i // n % len(DASHES)])
        for i, label in enumerate(dict.fromkeys(labels))
    }


def printable(text: str) -> str:
    """Text that the figures' font can draw: one line, and the code point of every character it has no shape for.

    >>> printable("a \\n b"), printable("漢 $x$")
    ('a b', '‹U+6F22› $x$')
    """
    known = _characters()
    return "".join(c if ord(c) in known and c.isprintable() else f"‹U+{ord(c):04X}›" for c in " ".join(text.split()))


@cache
def _font(bold: bool = False) -> Any:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return get_font(findfont(FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")))


@cache
def _characters() -> frozenset[int]:
    return frozenset(_font().get_charmap())


def inches_of(text: str, size: float, bold: bool = False) -> float:
    """How wide the text is in type of a size (points)."""
    font = _font(bold)
    font.set_size(size, 7200)  # so large that rounding to whole pixels does not matter
    font.set_text(text, 0.0)
    return font.get_width_height()[0] / 64 / 7200


def wrapped(text: str, inches: float, size: float, bold: bool = False) -> str:
    """The text in lines that fit into a width; a word that is too long for one is cut."""
    lines = [""]
    for word in printable(text).split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if inches_of(longer, size, bold) <= inches:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for character in word:
            if lines[-1] and inches_of(lines[-1] + character, size, bold) > inches:
                lines.append("")
            lines[-1] += character
    return "\n".join(lines)
