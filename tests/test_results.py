"""What every result shares: a repr of a few lines, a table for notebooks, a frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from oversquash_lens.results import Result


@dataclass(frozen=True, repr=False)
class Shares(Result):
    tokens: tuple[str, ...]
    values: torch.Tensor

    _ranked_by = "share"

    def _title(self) -> str:
        return f"{len(self.tokens)} <tokens>"

    def _table(self) -> dict[str, Sequence[Any]]:
        return {"position": range(len(self.tokens)), "token": self.tokens, "share": self.values}


@pytest.mark.parametrize("n", [0, 1, 9, 10, 500])
def test_a_repr_has_at_most_twelve_lines(n: int) -> None:
    shown = repr(Shares(tuple(f"w{i}" for i in range(n)), torch.arange(n) / 1000))
    assert len(shown.splitlines()) <= 12
    assert shown.startswith(f"{n} <tokens>")


def test_the_largest_come_first_and_nan_last() -> None:
    shown = repr(Shares(("a", "b", "c"), torch.tensor([0.1, float("nan"), 0.7]))).splitlines()
    assert [line.split()[0] for line in shown[2:]] == ["2", "0", "1"]


def test_what_is_left_out_is_counted() -> None:
    result = Shares(tuple("w" * 500), torch.zeros(500))
    assert "491 more rows: to_frame()" in repr(result)
    assert "460 more rows" in result._repr_html_()


def test_html_is_escaped_and_long_texts_are_cut() -> None:
    found = Shares(("<script>", "x" * 900), torch.tensor([0.3, 0.7]))._repr_html_()
    assert "<script>" not in found
    assert "&lt;script&gt;" in found
    assert "x" * 40 not in found
    assert "&lt;tokens&gt;" in found


def test_the_frame_holds_every_row_and_the_tensor_s_own_numbers() -> None:
    frame = Shares(tuple("ab"), torch.tensor([0.25, 0.75], dtype=torch.float64)).to_frame()
    assert list(frame.columns) == ["position", "token", "share"]
    assert frame["share"].tolist() == [0.25, 0.75]
    assert frame["token"].tolist() == ["a", "b"]
