"""A prompt's tokens as the cells of a view: one each, or of a long prompt the heaviest alone and runs of the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oversquash_lens.errors import InputError
from oversquash_lens.viz.html import inert, visible_token

MILLION = 1_000_000
MOST_CELLS = 512  # of one strip of tokens; longer prompts are binned
LONG, FEW_CELLS = 2048, 256  # beyond so many tokens most cells are bins, and a strip of fewer is easier to read
SNIPPET = 28  # characters shown of a bin's text from either end


class Cell(NamedTuple):
    """Tokens start … stop-1, shown as one."""

    start: int
    stop: int


def cells_for(tokens: Sequence[str], weights: Float[Tensor, "row pos"], most: int | None = None) -> Cells:
    """One cell per token; of more than `most` tokens those of the largest weights alone, and runs of the rest.

    `most` None is 512, beyond 2,048 tokens 256. Three eighths of the cells are for single tokens: 192 of 512. These
    leave at most 193 runs, which are cut at every ⌈rest/127⌉ tokens: at most 193 + 127 bins.
    """
    n = len(tokens)
    most = most or (MOST_CELLS if n <= LONG else FEW_CELLS)
    if n <= most:
        return Cells(tuple(tokens), tuple(Cell(i, i + 1) for i in range(n)))
    kept = 3 * most // 8
    alone = set(weights.max(0).values.topk(kept).indices.tolist())
    width = math.ceil((n - kept) / (most - 2 * kept - 1))
    cells, start = [], 0
    for i in range(n):
        if i in alone or i + 1 in alone or i + 1 - start == width or i + 1 == n:
            cells.append(Cell(start, i + 1))
            start = i + 1
    return Cells(tuple(tokens), tuple(cells), kept)


def millionths(shares: Float[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """Whole millionths, of three digits at most.

    >>> millionths(torch.tensor([0.123456, 0.0000123, 1e-9]))
    tensor([123000,     12,      0])
    """
    assert not torch.isnan(shares).any(), "shares are checked at the door"
    whole = shares.double() * MILLION
    unit = 10.0 ** (whole.clamp(min=1).log10().floor() - 2).clamp(min=0)
    return ((whole / unit).round() * unit).round().long()


def check_shares(tokens: Sequence[str], shares: Float[Tensor, "*rows pos"], what: str = "share") -> None:
    """One share per token, from 0 on, none of them NaN or infinite."""
    if not len(tokens) or shares.shape[-1] != len(tokens):
        raise InputError(
            f"expected one share per token, got {len(tokens)} tokens with {shares.shape[-1]} shares: measure again"
        )
    bad = (~(shares >= 0) | torch.isinf(shares)).nonzero()
    if len(bad):
        *_, i = place = tuple(bad[0].tolist())
        raise InputError(
            f"the {what} of token {i} ({visible_token(tokens[i])}) is {shares[place]:g}; expected shares "
            "from 0 to 1: look for NaN or infinite values in the result, and measure again in float32"
        )


@dataclass(frozen=True)
class Cells:
    """Every token of the prompt, in order, in one cell or another: nothing is dropped."""

    tokens: tuple[str, ...]
    cells: tuple[Cell, ...]
    kept: int = 0  # tokens that stand alone for their weight

    @property
    def widths(self) -> list[int]:
        """Number of tokens in each cell."""
        return [cell.stop - cell.start for cell in self.cells]

    @property
    def texts(self) -> list[str]:
        """What stands in each cell: the token, or how many tokens there are."""
        return [self._text(cell) for cell in self.cells]

    @property
    def places(self) -> list[str]:
        """Where each cell is in the prompt, in words; tokens count from 0."""
        return [
            f"token {start}"
            if stop - start == 1
            else f"tokens {start} to {stop - 1} “{self._snippet(start, stop)}”, summed"
            for start, stop in self.cells
        ]

    def sums(self, values: Float[Tensor, "*rows pos"]) -> Float[Tensor, "*rows cell"]:
        """The values of each cell's tokens, summed."""
        cell_of = torch.arange(len(self.cells)).repeat_interleave(torch.tensor(self.widths))
        sums = torch.zeros(*values.shape[:-1], len(self.cells), dtype=values.dtype)
        return sums.index_add_(-1, cell_of[: values.shape[-1]], values)

    def note(self, coloured: str = "their mean") -> str:
        """What was summed, as HTML; nothing where every token has its own cell."""
        n, alone = len(self.tokens), self.widths.count(1)
        if alone == n:
            return ""
        return (
            f' <span class="osl-note">{n:,} tokens: {alone} are shown one by one, the {self.kept} with the '
            f"largest shares among them; the other {n - alone:,} are summed in {len(self.cells) - alone} "
            f"bins, coloured by {coloured}.</span>"
        )

    def _text(self, cell: Cell) -> str:
        if cell.stop - cell.start > 1:
            return f"[{cell.stop - cell.start} tokens]"
        return cell_text(self.tokens[cell.start])

    def _snippet(self, start: int, stop: int) -> str:
        """How the text of a bin begins and ends, so that one finds one's place in a long prompt."""
        words = " ".join(map(visible_token, "".join(self.tokens[start:stop]).split()))
        return inert(words if len(words) <= 2 * SNIPPET else f"{words[:SNIPPET]} … {words[-SNIPPET:]}")


def cell_text(token: str) -> str:
    """What stands in a token's own cell."""
    # CircuitsVis breaks the line behind a token with a line break in it: code keeps its lines.
    return inert(visible_token(token)) + ("\n" if "\n" in token else "")
