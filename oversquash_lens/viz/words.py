"""Words and numbers as figures, views and pages show them: tokens made visible, names of measures, shares, places."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence

from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.jacobian.measured_flow import MeasuredFlow
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.swaps.substitution import Substitution

DASH = "–"  # stands for a number that is not known
LONGEST_TOKEN = 64  # characters shown of one token
LONGEST_SPAN = 60  # characters shown of several tokens in a row
LONGEST_TEXT = 400  # characters shown of a title, a model's name, the beginning of a prompt
MARKS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
MEANINGS = {
    "·": "· is a space",
    "↵": "↵ a line break",
    "⇥": "⇥ a tab",
    "␍": "␍ a carriage return",
    "∅": "∅ an empty token",
    "‹U+": "‹U+…› a character that cannot be seen",
}
NAMES = {
    "truth": "Measured sensitivity",
    "substitution": "Replaced",
    "mean_field": "Mean-field estimate",
    "proof": "Paper’s bound",
    "proof, β = 1": "Paper’s bound with β = 1",
    "theorem_5_1": "Theorem 5.1 as printed",
    "theorem_b5": "Theorem B.5 as printed",
    "multi_head": "Multi-head bound",
    "rollout": "Attention rollout",
    "calibrated": "Calibrated bound, attention frozen",
    "calibrated_full": "Calibrated bound, nothing frozen",
    "count_paths": "Number of causal paths",
    "uniform_causal": "Uniform causal attention",
    "attention": "Attention, last row",
    "values": "Attention × values, last row",
}
GLOSSES = {
    "mean_field": "path sensitivity from one forward pass, no gradient",
    "proof": "weighted count of attention paths, as in the proof of Theorem B.5",
    "theorem_5_1": "weighted count of attention paths, as the main text prints it",
    "theorem_b5": "weighted count of attention paths, as the appendix states it",
    "multi_head": "weighted count of attention paths, summed over heads",
    "rollout": "attention and residual stream in equal parts",
    "calibrated": "holds on a real model while the attention weights stand still",
    "calibrated_full": "holds on a real model",
    "count_paths": "null model: every edge of the causal mask counts 1",
    "uniform_causal": "null model: uniform attention to all earlier positions",
}
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"}  # Unicode categories that leave no ink
_JOINERS = "\u200c\u200d"  # belong inside emoji and Indic words; suspect only at a token's edge
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# -- tokens and texts ----------------------------------------------------------------------------------------


def visible_token(token: str, longest: int = LONGEST_TOKEN) -> str:
    """The token as one can see it on paper: no white space, nothing invisible, never empty, not too long.

    >>> visible_token(" the"), visible_token("\\n\\t"), visible_token(""), visible_token("a\\u202eb")
    ('·the', '↵⇥', '∅', 'a‹U+202E›b')
    """
    head = token[:longest]
    edges = (0, len(head) - 1)
    shown = "".join(_mark(c, inside=i not in edges) for i, c in enumerate(head)) or "∅"
    if unicodedata.combining(shown[0]):
        shown = "◌" + shown
    left_out = len(token) - len(head)
    return f"{shown}… (+{left_out:,} characters)" if left_out else shown


def _mark(character: str, inside: bool) -> str:
    if character in MARKS:
        return MARKS[character]
    if unicodedata.category(character) not in _UNSEEN or (inside and character in _JOINERS):
        return character
    return f"‹U+{ord(character):04X}›"


def one_line_text(text: object, longest: int = LONGEST_TEXT) -> str:
    """Somebody's text as one line that one can see all of: words apart by single spaces, nothing invisible in them.

    >>> one_line_text("two  words\\n"), one_line_text("a\\u202eb"), one_line_text("x" * 9, 4)
    ('two words↵', 'a‹U+202E›b', 'xxxx… (+5 characters)')
    """
    text = str(text)
    left_out = len(text) - longest
    shown = " ".join(visible_token(word, longest) for word in text[:longest].split(" ") if word)
    return f"{shown}… (+{left_out:,} characters)" if left_out > 0 else shown


def span_text(tokens: Sequence[str], start: int, stop: int) -> str:
    """Tokens start … stop-1 as one sees them in a row, cut in the middle where they are many."""
    text = "".join(visible_token(token, LONGEST_SPAN) for token in tokens[start:stop])
    return text if len(text) <= LONGEST_SPAN else f"{text[: LONGEST_SPAN // 2]} … {text[-LONGEST_SPAN // 2 :]}"


def place(start: int, stop: int) -> str:
    """Where tokens stand, in words; tokens count from 0.

    >>> place(3, 4), place(3, 6)
    ('token 3', 'tokens 3 to 5')
    """
    return f"token {start}" if stop - start == 1 else f"tokens {start} to {stop - 1}"


def named(tokens: Sequence[str], i: int) -> str:
    """A position in words.

    >>> named(("The", " cat"), 1)
    'token 1 ·cat'
    """
    return f"token {i} {visible_token(tokens[i], 24)}"


def source_named(flow: Flow | MeasuredFlow) -> str:
    """A flow's source, one token, a span or all tokens, in words."""
    if flow.source is None:
        return "all tokens"
    if isinstance(flow.source, slice):
        start, stop = flow.source.start, flow.source.stop
        return f"{place(start, stop)} {span_text(flow.tokens, start, stop)}"
    return named(flow.tokens, flow.source)


# -- measures ------------------------------------------------------------------------------------------------


def measure_name(kind: str) -> str:
    """What a page calls a measure; its own name where it has no other."""
    return NAMES.get(kind, kind)


def title_and_gloss(
    result: PathProfile | MeasuredSensitivity | MeasuredFlow | Substitution | Flow | object, topic: str = "Flow"
) -> tuple[str, str]:
    """Name of the result, and what it is; `topic` is what is shown of a flow."""
    if isinstance(result, MeasuredFlow):
        how = "exact" if result.probes is None else f"error about {number(result.error, '.2g')}"
        return topic, f"measured: sensitivity of the {result.target or 'last output'} to {source_named(result)}, {how}"
    if isinstance(result, Flow):
        source = source_named(result) + ("" if result.source is None else " alone")
        return topic, f"{measure_name(result.kind)}, paths from {source} to the last one"
    if isinstance(result, PathProfile):
        return measure_name(result.kind), GLOSSES.get(result.kind, "")
    if isinstance(result, Substitution):
        return NAMES["substitution"], f"how far the last output moves when this token is replaced, {result.method}"
    assert isinstance(result, MeasuredSensitivity)
    if result.target:
        return f"Sensitivity of the {result.target}", "how far it moves with this token’s embedding: exact"
    how = "exact, by autograd" if result.exact else f"by autograd, {result.probes} random probes"
    frozen = f", {' and '.join(result.freeze)} frozen" if result.freeze else ""
    return "Sensitivity of all outputs", f"how far the last output moves with this token’s embedding: {how}{frozen}"


def guide(meaning: str, start: str, floor: float, tokens: Iterable[str], walk: str = "", signed: bool = False) -> str:
    """How to read a view: what colour means and where it starts; of the marks of white space, those that occur."""
    shown = "".join({visible_token(token) for token in tokens})
    marks = ", ".join(text for mark, text in MEANINGS.items() if mark in shown)
    walk = walk or "Hover over a token, tap it or walk to it with the arrow keys for the number."
    below = " Blue is below 0: it works against the rest." if signed else ""
    return (
        f"Colour is {meaning}, on a logarithmic scale: none at {plain_number(floor)} ({start}) or less, full at 1."
        f"{below} {walk} Tokens count from 0{'; ' if marks else ''}{marks}."
    )


# -- numbers -------------------------------------------------------------------------------------------------


def number(value: float | int, form: str) -> str:
    """A number on a page; what is not known is a dash.

    >>> number(-0.25, "+.2f"), number(-0.001, "+.2f"), number(float("nan"), ".4g"), number(float("inf"), ".4g")
    ('−0.25', '0.00', '–', '∞')
    """
    if math.isnan(value):
        return DASH
    text = "0.00" if form.endswith(".2f") and abs(value) < 0.005 else format(value, form)
    return text.replace("-", "−").replace("inf", "∞")


def percent(share: float | int, digits: int = 2) -> str:
    """A share as people read it, without needless zeros.

    >>> percent(0.1234), percent(0.00567), percent(1.0), percent(3e-7), percent(0.0), percent(0.04132, 3)
    ('12 %', '0.57 %', '100 %', '< 0.001 %', '0 %', '4.13 %')
    """
    if math.isnan(share):
        return DASH
    return "< 0.001 %" if 0 < share < 1e-5 else f"{float(f'{100 * share:.{digits}g}'):g} %"


def count(value: float | int) -> str:
    """An effective number: one digit behind the point below a hundred."""
    return number(value, ".1f" if value < 100 else ",.0f")


def rounded(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def plain_number(value: float) -> str:
    """Two digits without an exponent.

    >>> plain_number(0.002), plain_number(1e-5), plain_number(1.0)
    ('0.002', '0.00001', '1')
    """
    return f"{value:.2g}" if value >= 1e-4 else f"{float(f'{value:.2g}'):.12f}".rstrip("0")


def axis_number(value: float | int) -> str:
    """A number on an axis or in a table: no exponent unless it is needed, thousands set off from 10,000 on.

    >>> [axis_number(value) for value in (0.0, 1001.0, 10000.0, 0.25, -2.0, 1e-9)]
    ['0', '1001', '10,000', '0.25', '−2', '10⁻⁹']
    """
    if value == 0:
        return "0"  # -0.0 too
    if not 1e-4 < abs(value) < 1e7:
        return power_of_ten(value)
    return (f"{value:,.7g}" if abs(value) >= 1e4 else f"{value:.7g}").replace("-", "−")


def power_of_ten(value: float | int) -> str:
    """A number as digits times a power of ten.

    >>> power_of_ten(1e-9), power_of_ten(2.5e8), power_of_ten(1.0)
    ('10⁻⁹', '2.5·10⁸', '1')
    """
    digits, power = f"{value:.3e}".split("e")
    digits, exponent = digits.rstrip("0").rstrip(".").replace("-", "−"), int(power)
    if digits == "1" and exponent in (0, 1):
        return str(10**exponent)
    return f"{digits}·".removeprefix("1·") + "10" + str(exponent).translate(_SUPERSCRIPT)


def colour_key(floor: float) -> list[tuple[str, float]]:
    """Labels and shares of the colour key: the floor and every power of ten above it.

    >>> colour_key(0.002)
    [('≤ 0.002', 0.002), ('0.01', 0.01), ('0.1', 0.1), ('1', 1.0)]
    """
    tens = [10.0**power for power in range(math.floor(math.log10(1.5 * floor)) + 1, 1)]
    return [(f"≤ {plain_number(floor)}", floor)] + [(plain_number(ten), ten) for ten in tens]
