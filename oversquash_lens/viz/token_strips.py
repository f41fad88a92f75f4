"""A prompt's tokens as a view shows them: token bins, the token strip that CircuitsVis colours, context windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.jacobian.measured_flow import MeasuredFlow
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.swaps.substitution import Substitution
from oversquash_lens.viz.html import View, inert
from oversquash_lens.viz.words import colour_key, guide, place, rounded, visible_token

MILLION = 1_000_000
MOST_BINS = 512  # of one strip of tokens; longer prompts are binned
LONG, FEW_BINS = 2048, 256  # beyond so many tokens most bins hold several, and a strip of fewer is easier to read
SNIPPET = 28  # characters shown of a bin's text from either end
SHARE = "a token’s share in the sensitivity of the last output"
PASSED = "the share of the paths that pass through a token at that layer"
RUNS = "the share of the sensitivity that runs through a token at that layer"
MOST_INSIDE = 16_384  # tokens of a prompt whose bins can be opened: about 200 KB of a page
PICKED = 16  # tokens of the largest shares
AROUND = 8  # tokens of context on either side

# -- token bins ----------------------------------------------------------------------------------------------


class Bin(NamedTuple):
    """Tokens start … stop-1, shown as one."""

    start: int
    stop: int


def bins_for(tokens: Sequence[str], weights: Float[Tensor, "row pos"], most: int | None = None) -> Bins:
    """One bin per token; of more than `most` tokens those of the largest weights alone, and runs of the rest.

    `most` None is 512, beyond 2,048 tokens 256. Three eighths of the bins are for single tokens: 192 of 512. These
    leave at most 193 runs, which are cut at every ⌈rest/127⌉ tokens: at most 193 + 127 bins.
    """
    n = len(tokens)
    most = most or (MOST_BINS if n <= LONG else FEW_BINS)
    if n <= most:
        return Bins(tuple(tokens), tuple(Bin(i, i + 1) for i in range(n)))
    kept = 3 * most // 8
    alone = set(weights.abs().nan_to_num(0).max(0).values.topk(kept).indices.tolist())
    width = math.ceil((n - kept) / (most - 2 * kept - 1))
    bins, start = [], 0
    for i in range(n):
        if i in alone or i + 1 in alone or i + 1 - start == width or i + 1 == n:
            bins.append(Bin(start, i + 1))
            start = i + 1
    return Bins(tuple(tokens), tuple(bins), kept)


def millionths(shares: Float[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """Whole millionths, of three digits at most.

    >>> millionths(torch.tensor([0.123456, 0.0000123, 1e-9]))
    tensor([123000,     12,      0])
    """
    assert not torch.isnan(shares).any(), "shares are checked at the door"
    whole = shares.double() * MILLION
    unit = 10.0 ** (whole.abs().clamp(min=1).log10().floor() - 2).clamp(min=0)
    return ((whole / unit).round() * unit).round().long()


def check_shares(
    tokens: Sequence[str], shares: Float[Tensor, "*rows pos"], what: str = "share", signed: bool = False
) -> None:
    """One share per token, from 0 on unless `signed`, none of them NaN or infinite."""
    if not len(tokens) or shares.shape[-1] != len(tokens):
        raise InputError(
            f"expected one share per token, got {len(tokens)} tokens with {shares.shape[-1]} shares: measure again"
        )
    bad = (~torch.isfinite(shares) if signed else ~(shares >= 0) | torch.isinf(shares)).nonzero()
    if len(bad):
        *_, i = at = tuple(bad[0].tolist())
        raise InputError(
            f"expected shares{'' if signed else ' from 0 to 1'}, got {shares[at]:g} as the {what} of token {i} "
            f"({visible_token(tokens[i])}): look for NaN or infinite values in the result, and measure again in float32"
        )


@dataclass(frozen=True)
class Bins:
    """Every token of the prompt, in order, in one bin or another: nothing is dropped."""

    tokens: tuple[str, ...]
    bins: tuple[Bin, ...]
    kept: int = 0  # tokens that stand alone for their weight

    @property
    def widths(self) -> list[int]:
        """Number of tokens in each bin."""
        return [each.stop - each.start for each in self.bins]

    @property
    def texts(self) -> list[str]:
        """What stands in each bin: the token, or how many tokens there are."""
        return [self._text(*each) for each in self.bins]

    @property
    def places(self) -> list[str]:
        """Where each bin is in the prompt, in words; tokens count from 0."""
        return [
            place(start, stop) if stop - start == 1 else f"{place(start, stop)} “{self._snippet(start, stop)}”, summed"
            for start, stop in self.bins
        ]

    def sums(self, values: Float[Tensor, "*rows pos"]) -> Float[Tensor, "*rows bin"]:
        """The values of each bin's tokens, summed."""
        bin_of = torch.arange(len(self.bins)).repeat_interleave(torch.tensor(self.widths))
        sums = torch.zeros(*values.shape[:-1], len(self.bins), dtype=values.dtype)
        return sums.index_add_(-1, bin_of[: values.shape[-1]], values)

    def note(self, coloured: str = "their mean") -> str:
        """What was summed, as text; nothing where every token has its own bin."""
        n, alone = len(self.tokens), self.widths.count(1)
        if alone == n:
            return ""
        return (
            f"{n:,} tokens: {alone} are shown one by one, the {self.kept} with the "
            f"largest shares among them; the other {n - alone:,} are summed in {len(self.bins) - alone} "
            f"bins, coloured by {coloured}."
        )

    def _text(self, start: int, stop: int) -> str:
        return bin_text(self.tokens[start]) if stop - start == 1 else f"[{stop - start} tokens]"

    def _snippet(self, start: int, stop: int) -> str:
        """How the text of a bin begins and ends, so that one finds one's place in a long prompt."""
        words = " ".join(map(visible_token, "".join(self.tokens[start:stop]).split()))
        return inert(words if len(words) <= 2 * SNIPPET else f"{words[:SNIPPET]} … {words[-SNIPPET:]}")


def bin_text(token: str) -> str:
    """What stands in a token's own bin."""
    # CircuitsVis breaks the line behind a token with a line break in it: code keeps its lines.
    return inert(visible_token(token)) + ("\n" if "\n" in token else "")


# -- token strips --------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Shares of the tokens at each layer, each row with its name and what it means."""

    tokens: tuple[str, ...]
    shares: Float[Tensor, "layer pos"]
    labels: list[str]
    notes: list[str]
    meaning: str
    millionths: bool = False  # a flow has many rows: carried as whole millionths of three digits, a third of the size
    unit: str = "share"
    start: str = "a tenth of a uniform share"  # where colour starts, in words

    @property
    def floor(self) -> float:
        """Where colour starts."""
        return 0.1 / len(self.tokens) if self.unit == "share" else 0.01


def input_rows(result: PathProfile | MeasuredSensitivity | Substitution | object) -> Rows:
    """The one row of shares of each input position."""
    if not isinstance(result, PathProfile | MeasuredSensitivity | Substitution):
        raise InputError(
            "expected a result of path_bound, mean_field_sensitivity, measured_sensitivity or substitution, got "
            f"{kind_of(result)}: call one of them first"
        )
    if isinstance(result, Substitution) and result.spans != tuple((i, i + 1) for i in range(len(result.tokens))):
        raise InputError("expected a substitution of every token by itself, got one of spans: leave positions= out")
    return _checked(Rows(result.tokens, result.share.detach().cpu().double()[None], [""], [""], SHARE))


def layer_rows(result: PathProfile | Flow | MeasuredFlow | object) -> Rows:
    """A row for what enters each layer, and the last one for what leaves the last."""
    if not isinstance(result, PathProfile | Flow | MeasuredFlow):
        raise InputError(
            "expected a PathProfile, from path_bound or mean_field_sensitivity, a MeasuredFlow, from measured_flow, or "
            f"a Flow, from flow, got {kind_of(result)}: call one of them (a measured truth has no layers: use "
            "positions)"
        )
    if isinstance(result, PathProfile):
        return _checked(rows_by_layer(result.tokens, result.share_by_layer, SHARE))
    meaning = PASSED if isinstance(result, Flow) else RUNS
    rows = rows_by_layer(result.tokens, result.node, meaning, millionths=True)
    return _checked(rows, signed=isinstance(result, MeasuredFlow))


def rows_by_layer(tokens: tuple[str, ...], shares: Float[Tensor, "layer_plus_1 pos"], meaning: str, **how: Any) -> Rows:
    """Rows with their names; `how`: the other fields of `Rows`."""
    last = len(shares) - 1
    labels = [f"layer {layer}" for layer in range(last + 1)]
    meanings = ["the embeddings", *(f"what enters block {layer}" for layer in range(1, last))]
    meanings.append("what leaves the last block")
    notes = [f"{label} of {last}: {meaning}" for label, meaning in zip(labels, meanings, strict=True)]
    return Rows(tokens, shares.detach().cpu().double(), labels, notes, meaning, **how)


def _checked(rows: Rows, signed: bool = False) -> Rows:
    check_shares(rows.tokens, rows.shares, signed=signed)
    return rows


def kind_of(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def strip_view(
    rows: Rows, title: str, gloss: str, *, bins: Bins | None = None, floor: float | None = None, **extra: Any
) -> View:
    """A view of tokens coloured by their shares, one row at a time; `title` and `gloss` (what it is) stand above.

    `bins` and `floor` are given where several views share them; `extra` goes into the payload as it is.
    """
    bins = bins or bins_for(rows.tokens, rows.shares)
    floor = rows.floor if floor is None else floor
    sums = bins.sums(rows.shares)
    if rows.millionths:
        shares = millionths(sums).tolist()
    else:
        shares = [[None if math.isnan(share) else rounded(share) for share in row] for row in sums.tolist()]
    payload = {
        "view": "strip",
        "tokens": bins.texts,
        "widths": bins.widths,
        "places": bins.places,
        "shares": shares,
        "parts": MILLION if rows.millionths else 1,  # of which one is the unit of `shares`
        "unit": rows.unit,
        "labels": rows.labels,
        "notes": rows.notes,
        "floor": rounded(floor),
        "key": colour_key(floor),
        **extra,
    }
    notes = [bins.note()]
    if len(rows.shares) == 1 and len(bins.bins) < len(rows.tokens) <= MOST_INSIDE:
        inside = [rounded(share, 3) for share in rows.shares[0].tolist()]  # every token's own share
        payload["inside"] = {"tokens": [bin_text(token) for token in rows.tokens], "shares": inside}
        notes.append("Click a bin, or press Enter on it, and its tokens open one by one.")
    words = guide(rows.meaning, rows.start, floor, rows.tokens, signed=bool((sums < 0).any()))
    return View(payload, title, gloss, notes, words)


# -- context windows -----------------------------------------------------------------------------------------


class ContextWindow(NamedTuple):
    """Tokens start … stop-1, and which of them have the largest shares."""

    start: int
    stop: int
    picked: tuple[int, ...]


def context_windows(share: Float[Tensor, " pos"], picked: int = PICKED, around: int = AROUND) -> list[ContextWindow]:
    """The tokens of the largest shares with their neighbours, overlapping windows joined, the largest share first."""
    n = len(share)
    found: list[ContextWindow] = []
    for i in sorted(share.topk(min(picked, n)).indices.tolist()):
        start, stop = max(0, i - around), min(n, i + around + 1)
        if found and start <= found[-1].stop:
            found[-1] = ContextWindow(found[-1].start, stop, (*found[-1].picked, i))
        else:
            found.append(ContextWindow(start, stop, (i,)))
    return sorted(found, key=lambda window: -share[list(window.picked)].sum().item())


def readable(tokens: Sequence[str]) -> list[str]:
    """Tokens inside a text: a leading space is a space, all else that cannot be seen is marked.

    >>> readable([" the", "\\n"])
    [' the', '↵']
    """
    words = [(token, token.removeprefix(" ")) for token in tokens]
    return [" " * (word != token) + (visible_token(word) if word else "") for token, word in words]
