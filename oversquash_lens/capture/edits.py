"""Changes to a prompt's tokens or to a model's attention while it runs: what remedies do, and what one tries out.

An attention edit takes a pattern [batch, head, dest, src] of non-negative rows and gives one whose rows sum to 1
again (a head that is switched off: to 0). Masking scores before the softmax and dividing the surviving weights by
their sum are the same thing, and so are scaling the scores and raising the weights to a power.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.architecture import LAYER_HOOKS, Architecture
from oversquash_lens.capture.hooks import attached
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import TokenizedPrompt, text_ids
from oversquash_lens.capture.trace import Trace
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.numerics import to_float64

PatternEdit = Callable[[Tensor], Tensor]
Spelling = Sequence[tuple[int, int | None]]  # each token's id, and the place it had before; None: it had none
Speller = Callable[[Any, TokenizedPrompt], Spelling]

# Polynomial of the entropy that gives the inverse temperature, highest power first: Veličković et al. 2024,
# "Softmax is not enough (for sharp size generalisation)", section 5, as we recall it; its text was not at hand.
ADAPTIVE = (-0.037, 0.481, -2.3, 4.917, -1.791)
FAINTEST = 1e-300  # attention weights below it are taken for it: their logarithm stays finite
ADAPTIVE_FROM = 0.5  # nats of entropy below which a row stays as it is


@dataclass(frozen=True)
class Edit:
    """One change, `label` its one line; the functions of this module make them.

    `spell` gives a prompt's new tokens, `attend` the new pattern, in every layer or in `layer` alone; calling the
    edit on a pattern is calling `attend`. `layer`, `head` and `position` are what a model and a prompt must have.
    `power` is what the scores are multiplied by, 1 for edits that only cut weights away: the softmax's derivative
    grows with it. None: no one number, so no measure of a trace can know that derivative.
    """

    label: str
    spell: Speller | None = None
    attend: PatternEdit | None = None
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    power: float | None = 1.0

    def __call__(self, pattern: Tensor) -> Tensor:
        return _attending(self)(pattern)


class EditedPrompt(NamedTuple):
    """What the model reads under an edit, and for each token the place that it had before (None: it had none)."""

    prompt: TokenizedPrompt
    places: tuple[int | None, ...]


# ---------------------------------------------------------------- edits of the tokens


def separators(every: int = 3, text: str = ",", from_right: bool = False) -> Edit:
    """`text` between the prompt's tokens, behind every third one; a BOS in front is not counted.

    Counted from the left, or with `from_right` from the end, as commas in long numbers are. None is put behind the
    last token, so that the same token is last before and after.
    """
    every = _whole(every, 1, "expected at least 1, got separators behind every {} tokens")
    if not text:
        raise InputError("expected a text such as ',', got an empty separator")

    def spell(model: Any, prompt: TokenizedPrompt) -> Spelling:
        if getattr(model, "tokenizer", None) is None:
            raise InputError("expected one that can spell it, got a separator for a model without tokenizer")
        separator = [(token, None) for token in text_ids(model, text, bos=False)]
        start, n = int(prompt.bos), len(prompt.ids)
        spelled: list[tuple[int, int | None]] = []
        for place, token in enumerate(prompt.ids.tolist()):
            spelled.append((token, place))
            count = n - 1 - place if from_right else place + 1 - start
            if start <= place < n - 1 and count % every == 0:
                spelled += separator
        if len(spelled) == n:
            raise InputError(f"expected more than {every}, got a prompt of {n} tokens, too short to separate")
        return spelled

    behind = f"every {every} tokens" if every > 1 else "every token"
    return Edit(f"{text!r} behind {behind}{', counted from the end' if from_right else ''}", spell=spell)


def with_bos() -> Edit:
    """The tokenizer's BOS in front of a prompt that starts without."""

    def spell(model: Any, prompt: TokenizedPrompt) -> Spelling:
        begin = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
        if begin is None:
            raise InputError("expected one that has it, got a tokenizer without a BOS token")
        if prompt.bos:
            raise InputError("expected one without, got a prompt that starts with BOS: ask for it with bos=False")
        return [(begin, None), *((token, place) for place, token in enumerate(prompt.ids.tolist()))]

    return Edit("with BOS", spell=spell)


def without_bos() -> Edit:
    """The prompt without the BOS that it starts with."""

    def spell(model: Any, prompt: TokenizedPrompt) -> Spelling:
        if not prompt.bos:
            raise InputError("expected one that starts with it, got a prompt without BOS: ask for it with bos=True")
        spelt: Spelling = [(token, place) for place, token in enumerate(prompt.ids.tolist())]
        return spelt[1:]

    return Edit("without BOS", spell=spell)


# ---------------------------------------------------------------- edits of the attention


def window(width: int, keep_first: bool = False) -> Edit:
    """Each position attends to the `width` last ones, itself included, and with `keep_first` to position 0 as well.

    >>> window(1)(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]))
    tensor([[[[1., 0.],
              [0., 1.]]]])
    """
    width = _whole(width, 1, "expected at least 1 position, got a window of {}")

    def attend(pattern: Float[Tensor, "batch head dest src"]) -> Float[Tensor, "batch head dest src"]:
        dest, src = _positions(pattern)
        near = dest - src < width
        return _renormalised(pattern * (near | (src == 0) if keep_first else near))

    return Edit(f"window of {width}{', position 0 kept' if keep_first else ''}", attend=attend)


def sliding_window(width: int, *, keep_first: bool = False) -> Edit:
    """`window` under the paper's name for it."""
    return window(width, keep_first)


def mask_position(position: int) -> Edit:
    """Nobody but it itself attends to `position`."""
    position = _whole(position, 0, "expected one from 0 on, got position {}")

    def attend(pattern: Float[Tensor, "batch head dest src"]) -> Float[Tensor, "batch head dest src"]:
        dest, src = _positions(pattern)
        return _renormalised(pattern * ((src != position) | (dest == position)))

    return Edit(f"position {position} masked", attend=attend, position=position)


def without_first() -> Edit:
    """Nobody but position 0 itself attends to position 0: the attention sink is closed."""
    return mask_position(0)


def ablate_head(layer: int, head: int) -> Edit:
    """One head switched off: its whole pattern is zero, so that it reads nothing and writes nothing."""
    layer = _whole(layer, 0, "expected one from 0 on, got layer {}")
    head = _whole(head, 0, "expected one from 0 on, got head {}")

    def attend(pattern: Float[Tensor, "batch head dest src"]) -> Float[Tensor, "batch head dest src"]:
        others = torch.arange(pattern.shape[1], device=pattern.device) != head
        return pattern * others[:, None, None]

    return Edit(f"head {head} of layer {layer} off", attend=attend, layer=layer, head=head)


def sharpen(power: float | int) -> Edit:
    """Every softmax of `power` times its scores: above 1 sharper, below 1 flatter, the same in all layers."""
    if not (isinstance(power, int | float) and 0 < power < math.inf):
        raise InputError(f"expected a positive number, 1 leaves all as it is, got a power of {power!r}")
    power = float(power)

    def attend(pattern: Float[Tensor, "batch head dest src"]) -> Float[Tensor, "batch head dest src"]:
        return _to_power(pattern, power)

    return Edit(f"scores times {power:g}", attend=attend, power=power)


def adaptive_temperature() -> Edit:
    """Rows of high entropy are sharpened by an inverse temperature that is a polynomial of their entropy."""

    def attend(pattern: Float[Tensor, "batch head dest src"]) -> Float[Tensor, "batch head dest src"]:
        log = _log(pattern)
        entropy = -(pattern * log).sum(-1, keepdim=True)
        terms = (factor * entropy**i for i, factor in enumerate(reversed(ADAPTIVE)))
        power = sum(terms, torch.zeros_like(entropy))
        return _to_power(pattern, torch.where(entropy > ADAPTIVE_FROM, power.clamp(min=1.0), 1.0))

    return Edit("adaptive temperature", attend=attend, power=None)


# ---------------------------------------------------------------- what an edit makes of prompt, model and trace


def edited_prompt(model: Any, prompt: TokenizedPrompt, edit: Edit) -> EditedPrompt:
    """The tokens under an edit, once it is sure that this model and prompt have what the edit speaks of."""
    for came, wanted in ((prompt, TokenizedPrompt), (edit, Edit)):
        if not isinstance(came, wanted):
            raise InputError(
                f"expected a {wanted.__name__}, got a {type(came).__name__}: see oversquash_lens.what_if, which "
                "takes any prompt and edit"
            )
    subject = Subject.of(model)
    _check(edit, subject.architecture, len(prompt.ids))
    if edit.spell is None:
        return EditedPrompt(prompt, tuple(range(len(prompt.ids))))
    try:
        ids, places = zip(*edit.spell(subject.model, prompt), strict=True)
        return EditedPrompt(replace(subject.tokenize(ids), chat=prompt.chat), places)
    except InputError as error:
        raise InputError(f"{edit.label}: {error}") from error


@contextmanager
def edited_attention(model: Any, edit: Edit | PatternEdit | None) -> Iterator[None]:
    """The model attends by the edited pattern inside the `with`; `None` changes nothing.

    Args:
        model: a HookedTransformer or TransformerBridge.
        edit: an attention edit of this module, or any function of a pattern, then used in every layer.

    Raises:
        InputError: an edit of the prompt, or a layer or head that the model has not.
        ModelError: a model whose attention an edit does not reach.
    """
    if edit is None:
        yield
        return
    subject = Subject.of(model)
    architecture, layers = subject.architecture, None
    if not callable(edit):
        raise InputError(
            "expected one of the attention, such as edits.window(32), or a function of a pattern, got "
            f"{one_line(repr(edit), 60)} as an edit"
        )
    subject.require("attention edits")
    if isinstance(edit, Edit):
        _check(edit, architecture)
        layers, edit = edit.layer, _attending(edit)

    def change(pattern: Tensor, hook: Any = None) -> Tensor:
        return edit(pattern)

    chosen = range(architecture.n_layers) if layers is None else (layers,)
    with attached(subject.model, [(f"blocks.{i}.{LAYER_HOOKS['pattern']}", change) for i in chosen]):
        yield


def edited_trace(trace: Trace, edit: Edit) -> Trace:
    """A trace recorded under an edit, its queries and keys as the edit has them enter the score."""
    if not isinstance(trace, Trace) or not isinstance(edit, Edit):
        raise InputError(
            f"expected a Trace and an edit, got a {type(trace).__name__} and a {type(edit).__name__}: record one "
            "inside edited_attention(model, edit)"
        )
    if edit.power is None:
        raise InputError(
            f"expected an edit of one power, under which the softmax's derivative is known, got {edit.label}: use "
            "measured_sensitivity inside edited_attention(model, edit)"
        )
    gains = trace.gains
    scored = ("query_norm", "key_norm", "key", "key_pull")
    return replace(trace, gains=replace(gains, **{name: getattr(gains, name) * edit.power for name in scored}))


def _attending(edit: Edit) -> PatternEdit:
    if edit.attend is None:
        raise InputError(f"expected an edit of the attention, got {edit.label}, which changes tokens: see what_if")
    return edit.attend


def _check(edit: Edit, architecture: Architecture, n: int | None = None) -> None:
    sizes = {"layer": architecture.n_layers, "head": architecture.n_heads, "position": n}
    owners = {"layer": "model", "head": "model", "position": "prompt"}
    for name, size in sizes.items():
        asked = getattr(edit, name)
        if asked is not None and size is not None and asked >= size:
            raise InputError(
                f"{edit.label}: expected 0 … {size - 1}, the {name}s of this {owners[name]}, got {name} {asked}"
            )


def _whole(number: Any, least: int, refusal: str) -> int:
    try:
        found = operator.index(number)
    except TypeError:
        found = least - 1
    if found < least:
        raise InputError(refusal.format(number))
    return found


def _positions(pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Column of destinations and row of sources; with a cache the destinations are the last of the sources."""
    dest, src = pattern.shape[-2:]
    places = torch.arange(src, device=pattern.device)
    return places[src - dest :, None], places[None, :]


def _renormalised(pattern: Tensor) -> Tensor:
    """Rows that sum to 1; a row whose every weight was cut away or underflowed spreads over nothing but itself."""
    wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))  # float16 has few small numbers
    total = wide.sum(-1, keepdim=True)
    dest, src = _positions(pattern)
    rows = torch.where(total > 0, wide / total.clamp(min=torch.finfo(wide.dtype).tiny), (dest == src).to(wide))
    return rows.to(pattern.dtype)


def _log(pattern: Tensor) -> Tensor:
    """Its logarithm in float64, whose gradient stays finite at 0."""
    return to_float64(pattern).clamp(min=FAINTEST).log()


def _to_power(pattern: Tensor, power: float | Tensor) -> Tensor:
    """pattern**power with rows that sum to 1; whatever the power, the largest weight of a row does not underflow."""
    scores = power * _log(pattern)
    return _renormalised((scores - scores.detach().amax(-1, keepdim=True)).exp() * (pattern > 0)).to(pattern.dtype)
