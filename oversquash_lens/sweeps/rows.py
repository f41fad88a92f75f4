"""What a sweep finds out of one prompt: the table of measures, and the columns that each of them fills."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.batch import batch_bytes, record_tokens_batch
from oversquash_lens.capture.recorder import record_tokens
from oversquash_lens.capture.subject import RECORDED, Subject
from oversquash_lens.capture.tokens import TokenizedPrompt
from oversquash_lens.capture.trace import Trace
from oversquash_lens.errors import HookMismatchError, InputError, ModelError, OversquashError, one_line, one_of
from oversquash_lens.jacobian.measured import measured_sensitivity
from oversquash_lens.memory import Size, available_bytes
from oversquash_lens.numerics import effective_number
from oversquash_lens.paths.flow import Flow, flow
from oversquash_lens.paths.kinds import VARIANTS
from oversquash_lens.paths.profiles import profiles
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.paths.squashing import squashing
from oversquash_lens.results import DOUBLED_BOS
from oversquash_lens.sweeps.prompt_files import SweepPrompt

Values = dict[str, Any]
NUMBER, COUNT, ROW, WORD, IDS, WORDS = "number", "count", "row", "word", "ids", "words"  # types of columns

FORMAT = 3  # of the rows
# Every row has these, whatever is measured.
ALWAYS = {
    "index": COUNT,  # the prompt's place among all, from 0
    "name": WORD,
    "status": WORD,  # "done" or "refused"
    "reason": WORD,  # why it was refused; of a prompt that is done, which measures the model refuses, and why
    "remark": WORD,  # what may not be meant as it came: BOS twice
    "text": WORD,
    "token_ids": IDS,
    "tokens": WORDS,
    "n_tokens": COUNT,
    "seconds": NUMBER,  # recording and measuring; of a batch, by its tokens
}
# What is said of any distribution of shares over positions.
SUMMARY = {
    "heard": NUMBER,  # effective number of positions: exp of the share's entropy, 1 … n
    "first": NUMBER,  # share of the first token
    "last": NUMBER,  # … of the last one itself
    "first_third": NUMBER,  # shares of the three thirds of the prompt; they sum to 1
    "middle_third": NUMBER,
    "last_third": NUMBER,
}
PROFILE = {
    "share": ROW,  # per position, sums to 1
    "log_value": ROW,  # natural log of the sensitivity per position; null where the constant is unspecified
    "heard_by_layer": ROW,  # effective number of positions that are heard from each layer on
    **SUMMARY,
}
FLOW = {
    "width": ROW,  # effective width per layer: entering 0 … leaving the last
    "narrowest": COUNT,  # the layer on entering which it is least
    "narrowest_width": NUMBER,
    "steepest": COUNT,  # the layer across which it falls by the largest factor
    "residual": ROW,  # per layer, the share of the paths that stays in the residual stream
}
SQUASHING = {
    "heard": NUMBER,
    "null_heard": NUMBER,  # the same with even attention
    "index": NUMBER,  # 0 as with even attention, 1 if one token alone is heard
    "relative_width": ROW,  # effective width over that of even attention, per layer
    "narrowest": COUNT,
}
TRUTH = {"share": ROW, "log_value": ROW, "standard_error": ROW, **SUMMARY}


@dataclass(frozen=True)
class Effort:
    """What is measured of each prompt, and how; all of it belongs to a sweep's identity."""

    measures: tuple[str, ...]
    chat: bool = False
    bos: bool | None = None
    node_probes: int | None = 2
    probes: int | None = 16
    seed: int = 0
    verify: bool = False
    attention: str = "auto"


@dataclass(frozen=True)
class Measured:
    """One prompt, its trace where one was made, its profiles, and the model for measures that run it again."""

    subject: Subject
    tokenized: TokenizedPrompt
    trace: Trace | None
    profiles: Mapping[str, PathProfile]
    effort: Effort


@dataclass(frozen=True)
class Measure:
    """One name that a sweep takes: what it means, which columns it fills (behind its name), how it is supported.

    `definition` counts up when the same prompt gives other numbers than before: rows of two are never mixed.
    """

    meaning: str
    columns: Mapping[str, str]
    values: Callable[[Measured], Values]
    support: str
    profile: str | None = None
    definition: int = 1


def profile_values(profile: PathProfile) -> Values:
    logs = profile.log_values
    share = profile.share
    return {
        "share": share.tolist(),
        "log_value": None if logs.isnan().any() else logs.tolist(),
        "heard_by_layer": effective_number(profile.share_by_layer).tolist(),
        **summary(share),
    }


def summary(share: Float[Tensor, " pos"]) -> Values:
    """The columns of SUMMARY of shares that sum to 1."""
    n = len(share)
    one, two = round(n / 3), round(2 * n / 3)
    return {
        "heard": effective_number(share).item(),
        "first": share[0].item(),
        "last": share[-1].item(),
        "first_third": share[:one].sum().item(),
        "middle_third": share[one:two].sum().item(),
        "last_third": share[two:].sum().item(),
    }


def flow_values(measured: Measured) -> Values:
    assert measured.trace is not None, "a recorded measure"
    found: Flow = flow(measured.trace)
    width = found.effective_width
    narrowest = int(width[:-1].argmin())
    return {
        "width": width.tolist(),
        "narrowest": narrowest,
        "narrowest_width": width[narrowest].item(),
        "steepest": int((width[:-1] / width[1:]).argmax()),
        "residual": found.residual.tolist(),
    }


def squashing_values(measured: Measured) -> Values:
    assert measured.trace is not None, "a recorded measure"
    found = squashing(measured.trace)
    numbers = {name: getattr(found, name) for name in ("index", "narrowest")}
    numbers |= {"heard": found.effective_tokens, "null_heard": found.null_effective_tokens}
    return numbers | {"relative_width": found.relative_width.tolist()}


def truth_values(measured: Measured) -> Values:
    effort, ids = measured.effort, measured.tokenized.ids
    found = measured_sensitivity(measured.subject.model, ids, probes=effort.probes, seed=effort.seed)
    share = found.values / found.values.sum()
    return {
        "share": share.tolist(),
        "log_value": found.values.log().tolist(),
        "standard_error": found.standard_error.tolist(),
        **summary(share.double()),
    }


def _profiled(kind: str, meaning: str, support: str = "printed bounds") -> Measure:
    return Measure(meaning, PROFILE, lambda measured: profile_values(measured.profiles[kind]), support, kind)


MEASURES: dict[str, Measure] = {
    "mean_field": _profiled("mean_field", "the mean-field estimate of the sensitivity", "mean_field"),
    **{name: _profiled(name, f"the bound, variant {name}") for name in VARIANTS if not name.startswith("calibrated")},
    **{name: _profiled(name, f"the bound, variant {name}", name) for name in VARIANTS if name.startswith("calibrated")},
    "flow": Measure("where the mean-field paths run: effective width by layer", FLOW, flow_values, "mean_field"),
    "squashing": Measure("the same against even attention", SQUASHING, squashing_values, "mean_field"),
    "truth": Measure("the measured sensitivity, from backward probes", TRUTH, truth_values, "truth"),
}


def checked_measures(measures: Any) -> tuple[str, ...]:
    """Names of MEASURES, each once, in the table's order: their order does not make another run."""
    names = [measures] if isinstance(measures, str) else measures
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"expected names out of {', '.join(MEASURES)}, got measures={one_line(repr(measures), 60)}: give a list "
            "of some of them"
        )
    for name in names:
        one_of("measure", name, MEASURES)
    return tuple(name for name in MEASURES if name in names)


def columns(measures: Sequence[str]) -> dict[str, str]:
    """Name and type of every column of the rows."""
    found = dict(ALWAYS)
    for name in measures:
        found |= {f"{name}_{column}": kind for column, kind in MEASURES[name].columns.items()}
    return found


def measured_values(subject: Subject, tokenized: TokenizedPrompt, trace: Trace | None, effort: Effort) -> Values:
    """The measures' columns of one prompt; those of measures that the model refuses stay empty."""
    refused = refused_measures(subject, effort)
    names = [name for name in effort.measures if name not in refused]
    kinds = [MEASURES[name].profile for name in names if MEASURES[name].profile]
    made = profiles(trace, kinds) if trace is not None and kinds else {}
    measured = Measured(subject, tokenized, trace, made, effort)
    found: Values = {}
    for name in names:
        values = MEASURES[name].values(measured)
        found |= {f"{name}_{column}": value for column, value in values.items()}
    return found


def refused_measures(subject: Subject, effort: Effort) -> dict[str, str]:
    """The measures that this model refuses, and why."""
    support = subject.support
    verdicts = {name: support[MEASURES[name].support] for name in effort.measures}
    return {name: verdict.why for name, verdict in verdicts.items() if verdict.state == "refused"}


# Of one prompt; the others may still do. RuntimeError: torch's, inside the model itself (out of memory is one, too).
UNUSABLE = (InputError, HookMismatchError, ModelError, MemoryError, RuntimeError)
MOST = {"cpu": 16}  # prompts in one pass; on a CPU more are no faster, and a kill loses more
MOST_ELSEWHERE = 64
TOKENS = 4096  # positions in one pass, padding included
WASTE = 1.25  # … over real tokens

Ready = tuple[SweepPrompt, TokenizedPrompt]


def check_measurable(subject: Subject, effort: Effort) -> None:
    """Refuse a model of which none of these measures can be taken, before any prompt is run."""
    if len(refused_measures(subject, effort)) == len(effort.measures):
        subject.require(MEASURES[effort.measures[0]].support)


def rows_of(
    subject: Subject, prompts: Sequence[SweepPrompt], effort: Effort, memory: int | None = None
) -> Iterator[list[Values]]:
    """Rows of these prompts, some at a time, in the order in which they are done; refused ones first."""
    ready: list[Ready] = []
    refused: list[Values] = []
    for each in prompts:
        try:
            ready.append((each, _tokenized(subject, each, effort)))
        except InputError as error:
            refused.append(_refusal(each, error, effort))
    if refused:
        yield refused
    for batch in batches(subject, ready, memory):
        yield _batch_rows(subject, batch, effort)


def _tokenized(subject: Subject, each: SweepPrompt, effort: Effort) -> TokenizedPrompt:
    return subject.tokenize(each.prompt, **each.options(effort.chat, effort.bos))


def batches(subject: Subject, ready: Sequence[Ready], memory: int | None) -> Iterator[list[Ready]]:
    """Prompts of similar length together: within memory, and without much padding."""
    budget = available_bytes(subject.device) // 2 if memory is None else memory
    most = MOST.get(subject.device.type, MOST_ELSEWHERE)
    some: list[Ready] = []
    for one in sorted(ready, key=lambda pair: len(pair[1].ids)):
        lengths = [len(tokenized.ids) for _, tokenized in (*some, one)]
        if some and (len(some) == most or not _fit(subject.size, lengths, budget)):
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def _fit(size: Size, lengths: Sequence[int], budget: int) -> bool:
    area = len(lengths) * max(lengths)
    return area <= min(TOKENS, WASTE * sum(lengths)) and sum(batch_bytes(size, lengths).values()) <= budget


def _batch_rows(subject: Subject, batch: Sequence[Ready], effort: Effort) -> list[Values]:
    options: dict[str, Any] = {"node_probes": effort.node_probes, "seed": effort.seed, "verify": effort.verify}
    tokenized = [each for _, each in batch]
    refused = refused_measures(subject, effort)
    begun = time.perf_counter()
    try:
        if not any(MEASURES[name].support in RECORDED for name in effort.measures if name not in refused):
            traces: list[Trace | None] = [None] * len(batch)
        elif len(batch) == 1:
            traces = [record_tokens(subject.model, tokenized[0], attention=effort.attention, **options)]
        else:
            traces = [*record_tokens_batch(subject.model, tokenized, **options)]
    except UNUSABLE as error:
        if len(batch) == 1:
            return [_refusal(batch[0][0], error, effort, tokenized[0])]
        return [row for one in batch for row in _batch_rows(subject, [one], effort)]  # whose fault it is
    each_token = (time.perf_counter() - begun) / sum(len(each.ids) for each in tokenized)
    rows = []
    for prompt, tokens in batch:
        begun = time.perf_counter()
        try:
            values = measured_values(subject, tokens, traces.pop(0), effort)
        except UNUSABLE as error:
            rows.append(_refusal(prompt, error, effort, tokens))
            continue
        seconds = each_token * len(tokens.ids) + time.perf_counter() - begun
        reason = "; ".join(f"{name}: {why}" for name, why in refused.items()) or None
        done = {"status": "done", "reason": reason, "seconds": seconds}
        rows.append(_row(prompt, effort, tokens) | done | values)
    return rows


def refused_rows(prompts: Sequence[SweepPrompt], reason: str, effort: Effort) -> list[Values]:
    """Rows of prompts that nothing is known of but why."""
    return [_row(each, effort, None) | {"status": "refused", "reason": reason} for each in prompts]


def _refusal(
    prompt: SweepPrompt, error: BaseException, effort: Effort, tokens: TokenizedPrompt | None = None
) -> Values:
    said = one_line(error, 500)
    reason = said if said and isinstance(error, OversquashError | MemoryError) else f"{type(error).__name__}: {said}"
    return _row(prompt, effort, tokens) | {"status": "refused", "reason": reason}


def _row(prompt: SweepPrompt, effort: Effort, tokens: TokenizedPrompt | None) -> Values:
    row = dict.fromkeys(columns(effort.measures))
    row |= {"index": prompt.index, "name": _storable(prompt.name), "text": _storable(prompt.text)}
    if tokens is not None:
        ids = tokens.ids.tolist()
        row |= {"token_ids": ids, "tokens": list(tokens.tokens), "n_tokens": len(ids)}
        row["remark"] = DOUBLED_BOS if tokens.doubled_bos else None
    return row


def _storable(text: str | None) -> str | None:
    """What is no Unicode is why a prompt was refused, and shows as question marks."""
    return None if text is None else text.encode("utf-8", "replace").decode("utf-8")
