"""What every result can do: say itself in a few lines, as a table, as a pandas frame; and the label that it carries.

A result is a frozen dataclass with `repr=False` that inherits `Result` and describes itself by two methods:

    @dataclass(frozen=True, repr=False)
    class PathProfile(Result):
        def _title(self) -> str:                 # one line: what was measured, on which model, the total
        def _table(self) -> dict[str, Sequence]: # columns of equal length, one row a token, length, edge, …
        _ranked_by = "share"                     # rows shown first are the largest of this column; None: the first
"""

from __future__ import annotations

import html
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar

from oversquash_lens.errors import visible

if TYPE_CHECKING:
    import pandas

LINES = 10  # rows of a `repr`
HTML_ROWS = 40
WIDTH = 24  # characters shown of a text


class Result:
    """Mixin of all results; see the module's docstring. What a result says of itself controls no terminal."""

    _ranked_by: ClassVar[str | None] = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("__repr__", "__str__"):
            if name in vars(cls):
                setattr(cls, name, _harmless(vars(cls)[name]))

    def _title(self) -> str:
        raise NotImplementedError(type(self).__name__)

    def _table(self) -> Mapping[str, Sequence[Any]]:
        raise NotImplementedError(type(self).__name__)

    def __repr__(self) -> str:
        """At most twelve lines: the title, the column names, the rows that matter most."""
        head, rows, total = self._shown(LINES - 1)
        cells = [head, *rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        more = [f"… {total - len(rows)} more rows: to_frame()"] if total > len(rows) else []
        return visible("\n".join([self._title(), *lines, *more]))

    def _repr_html_(self) -> str:
        head, rows, total = self._shown(HTML_ROWS)
        columns = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join(
            "<tr>" + "".join(f"<td><bdi>{html.escape(cell)}</bdi></td>" for cell in row) + "</tr>" for row in rows
        )
        more = f"<p>… {total - len(rows)} more rows: to_frame()</p>" if total > len(rows) else ""
        title = html.escape(self._title())
        return f"<p>{title}</p><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>{more}"

    def to_frame(self) -> pandas.DataFrame:
        """The whole table as a pandas DataFrame, one row a token, length, edge, …"""
        import pandas

        return pandas.DataFrame({name: list(_plain(column)) for name, column in self._table().items()})

    def _shown(self, most: int) -> tuple[list[str], list[list[str]], int]:
        """Column names, the rows that are shown, and how many there are."""
        table = {name: list(_plain(column)) for name, column in self._table().items()}
        total = len(next(iter(table.values()), []))
        places = list(range(total))
        if self._ranked_by is not None:
            rank = table[self._ranked_by]
            places.sort(key=lambda i: -rank[i] if isinstance(rank[i], int | float) and rank[i] == rank[i] else math.inf)
        return list(table), [[in_a_cell(column[i]) for column in table.values()] for i in places[:most]], total


def _harmless(shown: Callable[[Any], str]) -> Callable[[Any], str]:
    @wraps(shown)
    def made(self: Any) -> str:
        return visible(shown(self))

    return made


def in_a_cell(value: Any) -> str:
    """One value as text of one line: three digits of a number, the beginning of a long text.

    >>> in_a_cell(0.123456), in_a_cell(" cat\\n"), in_a_cell(None)
    ('0.123', "' cat\\\\n'", '–')
    """
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, str):
        shown = repr(value)
        return shown if len(shown) <= WIDTH else shown[: WIDTH - 2] + "…" + shown[-1]
    return str(value)


def duration(seconds: float | int) -> str:
    """A time for people.

    >>> duration(0.2), duration(42.3), duration(754), duration(20_000)
    ('0.2 s', '42 s', '13 min', '5.6 h')
    """
    for limit, unit, of in ((9.95, "s", 1), (99.5, "s", 1), (5970, "min", 60)):
        if seconds < limit:
            return f"{seconds / of:.1f} {unit}" if limit < 10 else f"{seconds / of:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def _plain(column: Any) -> Sequence[Any]:
    """A tensor's or array's own numbers; any other sequence as it is."""
    return column.tolist() if hasattr(column, "tolist") else column


DOUBLED_BOS = "the prompt begins with BOS twice: text that a chat template has made has it already; give bos=False"
FINAL_GAIN = ("model", "restored", "unknown")


def software_versions() -> dict[str, str]:
    """Versions that a number depends on, for reports and saved traces."""
    found = {"python": platform.python_version()}
    for package in ("oversquash-lens", "transformer-lens", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass(frozen=True)
class About:
    """Where a number comes from; carried by every trace, profile and truth.

    `folded`: the model's LayerNorm gains were folded into its weights. `final_gain` says what then became of
    the last norm's gain γ₃ in y: "model" (the model applies it itself), "restored" (folded, but known, and
    multiplied back), "unknown" (folded and not recoverable: y lacks it; not comparable with the other two).
    `doubled_bos`: the prompt begins with BOS twice, as text does that a chat template has made before.
    """

    model: str
    model_class: str
    n_layers: int
    n_heads: int
    d_model: int
    dtype: str
    folded: bool
    final_gain: str
    bos: bool
    chat: bool
    versions: dict[str, str]
    doubled_bos: bool = False

    def to_dict(self) -> dict:
        return asdict(self)

    def with_prompt(self, *, bos: bool, chat: bool, doubled_bos: bool = False) -> About:
        return replace(self, bos=bos, chat=chat, doubled_bos=doubled_bos)

    @property
    def remark(self) -> str:
        """What may not be meant as it came, empty where nothing is."""
        return DOUBLED_BOS if self.doubled_bos else ""

    def __str__(self) -> str:
        parts = [f"{self.model} as {self.model_class} ({self.dtype})"]
        parts.append("starts with BOS twice" if self.doubled_bos else "starts with BOS" if self.bos else "no BOS")
        if self.chat:
            parts.append("chat template")
        if self.folded:
            parts.append(f"folded norms, final gain {self.final_gain}")
        return visible(", ".join(parts))
