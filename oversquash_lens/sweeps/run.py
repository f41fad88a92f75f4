"""`sweep`: the same measures over thousands of prompts, a row each in one parquet file; stopped, it goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from oversquash_lens.analyses.plan import Plan, plan
from oversquash_lens.capture.fused import check_attention
from oversquash_lens.capture.mlp import random_source
from oversquash_lens.capture.recorder import NODE_PROBES
from oversquash_lens.capture.subject import Subject
from oversquash_lens.errors import InputError, one_line, whole_number
from oversquash_lens.identity import subject_identity
from oversquash_lens.memory import in_words
from oversquash_lens.parts import RECORDED, WINDOW, Parts, check_results_file
from oversquash_lens.results import duration, software_versions
from oversquash_lens.sweeps.on_ray import Cluster
from oversquash_lens.sweeps.prompt_files import SweepPrompt, mark_of, read_prompts
from oversquash_lens.sweeps.result import SweepResult
from oversquash_lens.sweeps.rows import (
    FORMAT,
    MEASURES,
    Effort,
    check_measurable,
    checked_measures,
    columns,
    rows_of,
)

LENGTHS = 5  # of the prompts' lengths, evenly spread over them, a plan is made
NEEDS = {"flow": ("flow",), "squashing": ("flow", "flow"), "truth": ("truth",)}  # all other measures: "bound"
USUAL = ("mean_field", "flow")  # measures where none are named


def sweep(
    model: Any,
    prompts: Any,
    measures: Any = USUAL,
    out: str | os.PathLike = "sweep.parquet",
    *,
    load: Mapping[str, Any] | None = None,
    column: str | None = None,
    chat: bool = False,
    bos: bool | None = None,
    node_probes: int | None = NODE_PROBES,
    probes: int | None = 16,
    seed: int = 0,
    verify: bool = False,
    attention: str = "auto",
    memory: int | None = None,
    ray: str | None = None,
    ray_options: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> SweepResult:
    """Measure every prompt and write one row each, in their order, to the parquet file `out`.

    Prompts of similar length are recorded together. Rows are kept in `<out>.parts` as they are made: stopped or killed
    at any moment, the same call goes on, and no row is lost or there twice. A prompt that cannot be used becomes a row
    with status "refused" and the reason. Rows of another run (model, its hooks, weights, prompts, measures and their
    definitions, options, versions of torch and transformers) are never mixed or overwritten: InputError.

    Args:
        model: a loaded model, or a name for `load_model`.
        prompts: texts, messages, token ids, (name, prompt) pairs, a table (pandas, polars, Arrow, datasets), or a file:
            .txt (one a line), .json, .jsonl, .csv, .tsv or .parquet; "-" is standard input, one a line.
        measures: names out of `oversquash_lens.sweeps.rows.MEASURES`, which also lists the columns that each fills.
        out: the file of rows.
        load: options of `load_model`, where the model is a name.
        column: where a table has its prompts, else "text", "prompt" or "messages".
        chat: as `record` takes it, and so are bos, node_probes, seed, verify; attention too, for prompts that are
            recorded alone.
        probes: backward probes of "truth"; None measures it exactly.
        memory: bytes for prompts that are recorded together; None is half of what is there.
        ray: "auto" (the running cluster, or one on this machine) or a cluster's address. Each worker loads the model
            itself, so it must be given by name.
        ray_options: those of a Ray task, such as {"num_gpus": 1}.
        progress: show a bar.

    Returns:
        A `SweepResult`: how many were done, refused (with the reasons) and there already; `to_frame()` reads the rows.

    Raises:
        InputError: what cannot be used, or a file of another run.
        ModelError: a model of which a measure cannot be taken.
    """
    path, effort = check_results_file(out), _effort(measures, chat, bos, node_probes, probes, seed, verify, attention)
    if memory is not None:
        whole_number("memory", memory, otherwise=" byte, or None for half of what is there")
    listed = read_prompts(prompts, column)
    begun = time.perf_counter()
    team = _Alone(model, load, memory) if ray is None else Cluster(model, load, memory, ray, ray_options)
    with team:
        identity = {
            "kind": "sweep",
            "format": FORMAT,
            "model": team.identity(effort),
            "prompts": mark_of(listed),
            **asdict(effort),
            "measures": list(effort.measures),
            "definitions": {name: MEASURES[name].definition for name in effort.measures},
            RECORDED: {"versions": software_versions()},
        }
        with Parts(path, identity, columns(effort.measures)) as parts:
            done = {index for index in parts.keys if index is not None} & set(range(len(listed)))
            missing = [each for each in listed if each.index not in done]
            _measure(team, parts, missing, len(listed), effort, progress)
            parts.finish(range(len(listed)))
    return SweepResult.load(path, reused=len(done), seconds=time.perf_counter() - begun)


def _measure(
    team: _Alone | Cluster, parts: Parts, missing: Sequence[SweepPrompt], total: int, effort: Effort, progress: bool
) -> None:
    """Have these prompts measured and their rows kept."""
    from tqdm import tqdm

    with tqdm(total=total, initial=total - len(missing), desc="sweep", unit="prompt", disable=not progress) as bar:
        for rows in team.rows(_windows(missing), effort) if missing else ():
            parts.add(rows)
            bar.update(len(rows))


def _windows(prompts: Iterable[SweepPrompt]) -> list[list[SweepPrompt]]:
    found: dict[int, list[SweepPrompt]] = {}
    for each in prompts:
        found.setdefault(each.index // WINDOW, []).append(each)
    return list(found.values())


class _Alone:
    """This process, with a model that it holds or loads."""

    def __init__(self, model: Any, load: Mapping[str, Any] | None, memory: int | None) -> None:
        if load and not isinstance(model, str | os.PathLike):
            raise InputError(
                f"expected it with the name of a model only, got load={one_line(repr(dict(load)), 60)} with a "
                f"{type(model).__name__}: leave it out"
            )
        self._model, self._load, self._memory = model, dict(load or {}), memory

    def __enter__(self) -> _Alone:
        if isinstance(self._model, str | os.PathLike):
            from oversquash_lens.models.loading import load_model

            self._model = load_model(self._model, **self._load)
        self._subject = Subject.of(self._model)
        return self

    def __exit__(self, *failure: object) -> None:
        del self._model, self._subject

    def identity(self, effort: Effort) -> dict[str, Any]:
        check_measurable(self._subject, effort)
        return subject_identity(self._subject)

    def rows(self, windows: Sequence[Sequence[SweepPrompt]], effort: Effort) -> Iterator[list]:
        for window in windows:
            yield from rows_of(self._subject, window, effort, self._memory)


def _effort(
    measures: Any, chat: bool, bos: bool | None, node_probes: Any, probes: Any, seed: int, verify: bool, attention: str
) -> Effort:
    """The options of measuring, checked."""
    exact = ", or None for the exact one"
    for name, number in (("node_probes", node_probes), ("probes", probes)):
        if number is not None:
            whole_number(name, number, otherwise=exact)
    random_source(seed)
    names = checked_measures(measures)
    return Effort(names, bool(chat), bos, node_probes, probes, seed, bool(verify), check_attention(attention))


@dataclass(frozen=True)
class SweepPlan:
    """The plan of a sweep on this machine, one process; `bytes` is what the longest prompt needs alone."""

    model: str
    prompts: int
    refused: int
    shortest: int
    median: int
    longest: int
    tokens: int
    seconds: float
    bytes: int
    available: int

    @property
    def fits(self) -> bool:
        return self.bytes <= self.available

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "sweep plan", **asdict(self), "fits": self.fits}

    def __str__(self) -> str:
        good = self.prompts - self.refused
        if not good:
            return f"none of the {self.prompts:,} prompts can be used by {self.model}"
        return (
            f"{good:,} prompts of {self.shortest} … {self.longest} tokens (median {self.median}, {self.tokens:,} in "
            f"all) with {self.model} need about {duration(self.seconds)}; {self.refused:,} cannot be used.\n"
            f"The longest needs about {in_words(self.bytes)} of memory, and {in_words(self.available)} are there: "
            + ("it fits." if self.fits else "it will be refused.")
        )


def sweep_plan(
    model: Any,
    prompts: Sequence[SweepPrompt],
    measures: Sequence[str],
    *,
    chat: bool = False,
    bos: bool | None = None,
    probes: int | None = 16,
) -> SweepPlan:
    """Tokenize all prompts and plan for some lengths; the time of those between is read off a straight line."""
    subject = Subject.of(model)
    lengths = sorted(n for n in (_length(subject, each, chat, bos) for each in prompts) if n)
    name = subject.about.model
    if not lengths:
        return SweepPlan(name, len(prompts), len(prompts), 0, 0, 0, 0, 0.0, 0, 0)
    steps = {lengths[round(i * (len(lengths) - 1) / (LENGTHS - 1))] for i in range(LENGTHS)}
    kinds = [kind for measure in measures for kind in NEEDS.get(measure, ())]
    kinds += ["bound"] * any(measure not in NEEDS for measure in measures)
    found = {n: [plan(subject.model, n, kind, probes=probes) for kind in kinds] for n in sorted(steps)}
    per_token = {n: _seconds(each) / n for n, each in found.items()}
    seconds = sum(n * per_token[min(steps, key=lambda step: abs(step - n))] for n in lengths)
    longest = found[lengths[-1]]
    return SweepPlan(
        model=name,
        prompts=len(prompts),
        refused=len(prompts) - len(lengths),
        shortest=lengths[0],
        median=lengths[len(lengths) // 2],
        longest=lengths[-1],
        tokens=sum(lengths),
        seconds=seconds,
        bytes=max(each.bytes for each in longest),
        available=min(each.available for each in longest),
    )


def _length(subject: Subject, each: SweepPrompt, chat: bool, bos: bool | None) -> int:
    """Tokens of a prompt; 0 where it cannot be used."""
    try:
        return len(subject.tokenize(each.prompt, **each.options(chat, bos)).ids)
    except InputError:
        return 0


def _seconds(found: Sequence[Plan]) -> float:
    """All measures of one prompt; the recording that each plan holds is made once."""
    steps: dict[str, float] = {}
    for number, each in enumerate(found):
        shared = ("recording", "norms of the weights, once per model")
        steps |= {name if name in shared else f"{number} {name}": time for name, time in each.steps.items()}
    steps.pop("norms of the weights, once per model", None)
    return sum(steps.values())
