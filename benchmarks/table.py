"""The benchmark table: ratios and growth from measured cells, beside what they are meant to be, as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from benchmarks.cells import Results

CLASSES = {"bridge": "TransformerBridge", "hooked": "HookedTransformer"}
LENS = ("record", "sweep")  # taken one after the other; together they are the lens
# (over the class's own pass, over Hugging Face's fused pass, peak memory over the pass's), at most
TARGETS = {512: (1.6, 2.5, 1.25), 2048: (1.5, 2.0, 1.25), 8192: (None, 2.0, 1.5)}
MOST_GB = {8192: 12}
FUSED_ONLY = 4096  # tokens from which on the class's own pass is left out: its patterns alone are n² a head
GROWTH = (2048, 8192)  # between these the lens's time is to grow no faster than the fused pass's
LEAST_ROLLOUT = 10  # times as slow as our row, from the same kept patterns
LEAST_EXTRA = 5  # times as much extra memory as the recomputed route
DASH = "–"

PEERS = {
    "row": ("our row, from kept patterns", "last row of attention rollout, forward excluded"),
    "rollout": ("rollout by full products", "the same row from the same patterns, as products of whole matrices"),
    "recomputed_row": ("our row, recomputed attention", "the same, forward included, no pattern kept"),
    "cached_rollout": ("rollout over `run_with_cache`", "the same, forward included, every pattern cached"),
    "lens": ("the whole lens", "every bound and the mean-field estimate of ‖∂y_n/∂v_i‖_F, each layer's row"),
    "alti": ("ALTI-style contributions", "per layer, how near each token's part comes to attention's output; product"),
    "gradient": ("gradient × input", "top logit's gradient times each embedding, fused attention"),
    "inseq": ("inseq, input × gradient", "gradient × input of each embedding’s entry, of one generated token"),
    "captum": ("captum, integrated gradients", "the same along 50 steps from zero embeddings, fused attention"),
}


def ratio(above: Sequence[float], below: Sequence[float]) -> float | None:
    """Median of the ratios within the rounds that both steps took part in.

    >>> ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0])
    2.0
    """
    pairs = list(zip(above, below, strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def exponent(short: tuple[float, float], long: tuple[float, float]) -> float:
    """p of y ∝ nᵖ through (n, y) at two lengths.

    >>> exponent((2048, 3.0), (8192, 48.0))
    2.0
    """
    return math.log(long[1] / short[1]) / math.log(long[0] / short[0])


def judged(value: float | None, limit: float | None, at_least: bool = False) -> str:
    """A number beside its target.

    >>> judged(1.234, 1.5), judged(2.0, 1.5), judged(12.0, 10, at_least=True), judged(1.0, None), judged(None, 2.0)
    ('1.23 (≤ 1.5, met)', '2.00 (≤ 1.5, **not met**)', '12.0 (≥ 10, met)', '1.00', '–')
    """
    if value is None:
        return DASH
    shown = f"{value:.2f}" if value < 9.95 else f"{value:.1f}"
    if limit is None:
        return shown
    met = value >= limit if at_least else value <= limit
    return f"{shown} ({'≥' if at_least else '≤'} {limit:g}, {'met' if met else '**not met**'})"


def lens_seconds(results: Results, kind: str, n: int) -> list[float]:
    parts = [results.seconds(kind, n, step) for step in LENS]
    return [sum(each) for each in zip(*parts, strict=True)] if all(parts) else []


def lens_table(results: Results, kinds: Sequence[str], lengths: Sequence[int]) -> str:
    head = ("class", "n", "own pass", "fused pass", "lens: record + sweep", "lens over own pass", "over fused pass")
    rows = [(*head, "peak memory: own, fused, lens", "lens over own pass’s", "over fused pass’s")]
    for n in lengths:
        rows += [_lens_row(results, kind, n) for kind in kinds if results.seconds(kind, n, "fused")]
    return markdown(rows, words=1)


def _lens_row(results: Results, kind: str, n: int) -> tuple[str, ...]:
    own, fused, lens = (results.seconds(kind, n, "forward"), results.seconds(kind, n, "fused"), None)
    lens = lens_seconds(results, kind, n)
    parts = " + ".join(_median(results.seconds(kind, n, step)) for step in LENS)
    peaks = {step: results.bytes(kind, n, step).get("peak") for step in ("forward", "fused", "lens")}
    over_own, over_fused, memory = TARGETS.get(n, (None, None, None))
    target = memory if n <= FUSED_ONLY else None
    return (
        CLASSES.get(kind, kind),
        f"{n:,}",
        _median(own),
        _median(fused),
        f"{_median(lens)}: {parts}" if lens else DASH,
        judged(ratio(lens, own), over_own),
        judged(ratio(lens, fused), over_fused),
        ", ".join(map(gigabytes, peaks.values())),
        judged(_over(peaks["lens"], peaks["forward"]), target),
        judged(_over(peaks["lens"], peaks["fused"]), memory if n > FUSED_ONLY else None),
    )


def peer_table(results: Results, kind: str, lengths: Sequence[int], missing: dict[str, str]) -> str:
    """Seconds and extra memory of what others compute; `missing` says why a peer was not run."""
    head = ("computes", "what")
    rows = [(*head, *(f"{name}, n = {n:,}" for n in lengths for name in ("time", "extra memory")))]
    for step, (name, what) in PEERS.items():
        cells = []
        for n in lengths:
            taken = lens_seconds(results, kind, n) if step == "lens" else results.seconds(kind, n, step)
            found = results.bytes(kind, n, step)
            taken = taken or ([found["took"]] if found else [])
            extra = gigabytes(found["peak"] - found["before"]) if found and step not in ("row", "rollout") else DASH
            cells += [_median(taken), extra] if taken else [missing.get(step, DASH), extra]
        rows.append((name, what, *cells))
    rows += [(missing[step], "", *([DASH] * 2 * len(lengths))) for step in missing if step not in PEERS]
    return markdown(rows, words=2)


def verdicts(results: Results, kind: str, lengths: Sequence[int]) -> list[str]:
    """Rollout against our row, memory against the cache, growth between the two longest prompts."""
    said = []
    for n in lengths:
        slower = ratio(results.seconds(kind, n, "rollout"), results.seconds(kind, n, "row"))
        goal = LEAST_ROLLOUT if n == 2048 else None
        said += [f"n = {n:,}: full products take {judged(slower, goal, True)} times as long as our row"] * bool(slower)
        found = [results.bytes(kind, n, step) for step in ("cached_rollout", "recomputed_row")]
        if all(found):
            more, less = (each["peak"] - each["before"] for each in found)
            goal = LEAST_EXTRA if n == 2048 else None
            said.append(f"n = {n:,}: the cache takes {judged(more / less, goal, True)} times the extra memory")
    return said


def growth(results: Results, kind: str, lengths: Sequence[int]) -> list[str]:
    """Exponents in n of time and memory between the two longest prompts, the fused pass's beside the lens's."""
    if len(lengths) < 2:
        return []
    ends = sorted(lengths)[-2:]
    takes: dict[str, Callable] = {
        "time": lambda n, step: _middle(
            lens_seconds(results, kind, n) if step == "lens" else results.seconds(kind, n, step)
        ),
        "peak memory": lambda n, step: results.bytes(kind, n, step).get("peak"),
    }
    said = []
    for what, take in takes.items():
        ours, pass_s = ([(n, take(n, step)) for n in ends] for step in ("lens", "fused"))
        if all(y for _, y in (*ours, *pass_s)):
            one, other = exponent(*ours), exponent(*pass_s)
            asked = what == "time" and tuple(ends) == GROWTH
            met = f": {'met' if one <= other else '**not met**'}" if asked else ""
            said.append(
                f"{what} grows as n^{one:.2f}, the fused pass’s as n^{other:.2f} (n = {ends[0]:,} to {ends[1]:,}){met}"
            )
    return said


def limits(results: Results, kind: str) -> list[str]:
    said = []
    for n, most in MOST_GB.items():
        peak = results.bytes(kind, n, "lens").get("peak")
        if peak:
            met = "met" if peak <= most * 1e9 else "**not met**"
            said.append(f"n = {n:,}: the lens peaks at {gigabytes(peak)} (within {most} GB: {met})")
    return said


def markdown(rows: Sequence[Sequence[str]], words: int) -> str:
    """A table whose first columns are words and whose others are numbers."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    rule = "|" + "---|" * words + "---:|" * (len(rows[0]) - words)
    return "\n".join([lines[0], rule, *lines[1:]])


def gigabytes(count: float | None) -> str:
    """Bytes for people.

    >>> gigabytes(1.234e9), gigabytes(56e6), gigabytes(None)
    ('1.23 GB', '0.06 GB', '–')
    """
    return DASH if count is None else f"{count / 1e9:.2f} GB"


def _over(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _middle(taken: Sequence[float]) -> float | None:
    return statistics.median(taken) if taken else None


def _median(taken: Sequence[float]) -> str:
    """Median seconds for people.

    >>> _median([0.0123, 0.01, 0.02]), _median([12.3, 11.0, 14.0]), _median([])
    ('0.012 s', '12.3 s', '–')
    """
    middle = _middle(taken)
    return DASH if middle is None else f"{middle:.1f} s" if middle >= 9.95 else f"{middle:.2g} s"
