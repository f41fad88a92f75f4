"""A long prompt's most heard tokens in the text around them: what a strip of bins cannot show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from oversquash_lens.analyses.findings import Findings
from oversquash_lens.viz.document import head_row, percent, table
from oversquash_lens.viz.html import escape, visible_token

PICKED = 16  # of the most heard tokens
AROUND = 8  # tokens of context on either side


class Passage(NamedTuple):
    """Tokens start … stop-1, and which of them are among the most heard."""

    start: int
    stop: int
    picked: tuple[int, ...]


def passages(share: Float[Tensor, " pos"], picked: int = PICKED, around: int = AROUND) -> list[Passage]:
    """The most heard tokens with their neighbours, those that overlap in one, the most heard passage first."""
    n = len(share)
    found: list[Passage] = []
    for i in sorted(share.topk(min(picked, n)).indices.tolist()):
        start, stop = max(0, i - around), min(n, i + around + 1)
        if found and start <= found[-1].stop:
            found[-1] = Passage(found[-1].start, stop, (*found[-1].picked, i))
        else:
            found.append(Passage(start, stop, (i,)))
    return sorted(found, key=lambda passage: -share[list(passage.picked)].sum().item())


def in_context(found: Findings) -> str:
    """The most heard tokens of the measured truth as a table of passages."""
    shares = (found.audit.truth.share, found.squashing.share, found.squashing.null_share)
    rows = []
    for passage in passages(shares[0]):
        start, stop = passage.start, passage.stop
        numbers = "".join(f'<td class="n">{percent(share[start:stop].sum().item())}</td>' for share in shares)
        text = f'<th scope="row" class="passage">{_text(found.tokens, passage)}</th>'
        rows.append(f'<tr>{text}<td class="n">{start}</td><td class="n">{stop - 1}</td>{numbers}</tr>\n')
    caption = (
        f"The {min(PICKED, len(found.tokens))} tokens with the largest measured shares, marked, in the text around "
        "them; shares are of the whole passage."
    )
    names = ("from", "to", "share, measured", "share, estimated", "even attention")
    return table("Most heard, in context", caption, head_row(("passage",), names), rows)


def _text(tokens: Sequence[str], passage: Passage) -> str:
    shown = [escape(_readable(token)) for token in tokens[passage.start : passage.stop]]
    for i in passage.picked:
        shown[i - passage.start] = f"<mark>{shown[i - passage.start]}</mark>"
    return f"<bdi>{''.join(shown)}</bdi>"


def _readable(token: str) -> str:
    """A token inside a text: its leading space is a space, all else that cannot be seen is marked."""
    word = token.removeprefix(" ")
    return " " * (word != token) + (visible_token(word) if word else "")
