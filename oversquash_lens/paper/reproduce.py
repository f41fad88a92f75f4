"""Every figure of the paper by name, and `reproduce`: run, write, judge, index."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from oversquash_lens.collapse.families import Family
from oversquash_lens.collapse.precision import number_format
from oversquash_lens.errors import InputError, whole_number
from oversquash_lens.paper.generator import Generator, Sampling
from oversquash_lens.paper.prompts import COPYING_LENGTHS, COUNTING_LENGTHS, PROMPT_TYPE_LENGTHS
from oversquash_lens.paper.published import FIGURE_5_LENGTHS, FIGURE_12
from oversquash_lens.results import Result
from oversquash_lens.storage import folder_for
from oversquash_lens.viz.chart import Chart
from oversquash_lens.viz.reports import write_chart, write_index


@dataclass(frozen=True)
class Recipe:
    """One figure: what it shows, and `module:function` that makes its Chart, from a RunConfig where a model runs."""

    title: str
    source: str
    synthetic: bool = False

    def chart(self, config: RunConfig) -> Chart:
        module, name = self.source.split(":")
        make = getattr(import_module(f"oversquash_lens.paper.{module}"), name)
        return make() if self.synthetic else make(config)


FIGURES = {
    "1": Recipe("converging counts; paths of an early and a late token", "collapse_figures:figure_1"),
    "2": Recipe("copying the first and the last digit, hint, interleaving", "task_figures:figure_2"),
    "3": Recipe("counting: error against length", "task_figures:figure_3"),
    "4": Recipe("which numbers are answered", "task_figures:figure_4"),
    "5": Recipe("representational collapse", "collapse_figures:figure_5"),
    "6": Recipe("counting on an open model: error against length", "task_figures:figure_6"),
    "7": Recipe("which numbers an open model answers", "task_figures:figure_7"),
    "8": Recipe("one Gaussian attention layer, convergence", "synthetic:figure_8", synthetic=True),
    "9": Recipe("total variation of softmaxes", "synthetic:figure_9", synthetic=True),
    "10": Recipe("convergence under four positional encodings", "synthetic:figure_10", synthetic=True),
    "11": Recipe("copying under prompt Types 1 and 2", "task_figures:figure_11"),
    "12": Recipe("collapse under prompt Type 1", "collapse_figures:figure_12"),
    "ushape": Recipe("a planted fact at every depth", "sensitivity_figures:ushape"),
    "window": Recipe("sliding-window attention", "sensitivity_figures:window"),
    "remedies": Recipe("remedies, before and after", "remedies:remedies"),
}


@dataclass(frozen=True, repr=False)
class Reproduced(Result):
    """A figure that was made: its chart and its files by ending."""

    name: str
    chart: Chart
    files: dict[str, Path]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the chart's numbers and verdicts, and where its files are."""
        return {**self.chart.to_dict(), "files": {ending: str(path) for ending, path in self.files.items()}}

    def _title(self) -> str:
        place = next(iter(self.files.values())).parent if self.files else "not written"
        return f"{self.chart.title}, {self.chart.model} ({place})"

    def _table(self) -> dict[str, Sequence[Any]]:
        """One row a claim of the paper: whether it held, and the number that decides it."""
        verdicts = self.chart.verdicts
        return {
            "claim": [one.claim for one in verdicts],
            "verdict": [one.word for one in verdicts],
            "number": [one.number for one in verdicts],
        }

    def __str__(self) -> str:
        return "\n".join(f"{self.name}: {verdict}" for verdict in self.chart.verdicts)


def chosen_figures(names: Sequence[str | int]) -> tuple[str, ...]:
    """The figures asked for, once each, in the paper's order; "all" is every one."""
    wanted = {str(name) for name in names}
    unknown = sorted(wanted - {*FIGURES, "all"})
    if unknown or not wanted:
        raise InputError(f"expected any of {', '.join(FIGURES)}, or all, got figure {' '.join(unknown) or '(none)'}")
    return tuple(name for name in FIGURES if name in wanted or "all" in wanted)


def reproduce(
    names: Sequence[str | int] | str | int,
    model: Any = None,
    out: Any = "figures",
    *,
    done: Callable[[Reproduced], None] | None = None,
    **options: Any,
) -> tuple[Reproduced, ...]:
    """Make figures of the paper on `model`, write each as PDF, SVG, PNG, JSON and CSV, and an index page, into `out`.

    What can be known to be wrong is said before the model is loaded. Answers of the tasks are kept in `out` as they
    come, so that a run that was broken off goes on where it stopped.

    Args:
        names: a figure or a list of them: 5, "ushape", ["8", "9"], "all".
        model: a name or path as for `load_model` (None: the embedded default), or a hooked model.
        out: the folder of the results.
        done: called with each figure when it is made.
        options: the fields of `oversquash_lens.paper.reproduce.Options`: quick, longest, samples, dtypes, probes, ….

    Returns:
        For each figure its chart, with a verdict for each claim of the paper, and its files.

    Raises:
        InputError: a figure or an option that is none, or answers in `out` that were made by another run.
    """
    known = {field.name for field in fields(Options)}
    if not set(options) <= known:
        raise InputError(f"expected some of {', '.join(sorted(known))}, got options {sorted(set(options) - known)}")
    chosen = chosen_figures([names] if isinstance(names, str | int) else names)
    asked = Options(model=model, **options)
    for name in LENGTHS.keys() & chosen:
        asked.lengths(name)
    with folder_for(out, "index.html") as folder:
        config, made = RunConfig(asked, folder), []
        for name in chosen:
            chart = FIGURES[name].chart(config)
            made.append(Reproduced(name, chart, write_chart(chart, folder)))
            write_index(folder)
            if done is not None:
                done(made[-1])
    return tuple(made)


PAPER_MODEL = "Gemma 7B"
_COUNTING = (COUNTING_LENGTHS, (5, 15, 45))
# The lengths of each figure, as the paper has them (or, where it draws none, as we do), and its quick ones.
LENGTHS: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "1": (range(1, 11), range(1, 11)),
    "2": (COPYING_LENGTHS, (10, 50, 100)),
    **dict.fromkeys(("3", "4", "6", "7"), _COUNTING),
    "5": (FIGURE_5_LENGTHS, FIGURE_5_LENGTHS[:6]),
    "11": (PROMPT_TYPE_LENGTHS, (10, 50, 100)),
    "12": (tuple(FIGURE_12.points), tuple(FIGURE_12.points)[:4]),
    "window": (range(11, 502), range(11, 102)),
    "remedies": ((11, 101, 501), (11, 51, 101)),
}


@dataclass(frozen=True)
class Options:
    """What a user chooses once for all figures.

    `model`: a name or path for `load_model` (None: the embedded default), or a hooked model already at hand. `quick`:
    short lengths. `longest`: lengths beyond it are left out (None: as the paper has them). `dtypes`: number formats of
    the collapse curves. `samples`: answers per length, at `temperature` (0: greedy). `chat` None: the chat template
    where the tokenizer has one, for the tasks alone. `probes`: backward probes of a measured sensitivity.
    """

    model: Any = None
    kind: str = "auto"
    dtype: str = "float32"
    device: str | None = None
    device_map: Any = None
    trust_remote_code: bool = False
    bos: bool | None = None
    chat: bool | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    quick: bool = False
    longest: int | None = None
    samples: int = 1
    temperature: float = 0.0
    probes: int = 8
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        """What can be known to be wrong before any model is loaded."""
        if not (isinstance(self.model, str | PathLike | None) or hasattr(self.model, "hook_dict")):
            raise InputError(
                f"expected a name, a path or a hooked model, got a {type(self.model).__name__} as the model: load "
                "one with oversquash_lens.load_model()"
            )
        for each in self.dtypes:
            number_format(each)
        Sampling(self.temperature)
        whole_number("samples", self.samples)
        whole_number("probes", self.probes)
        if self.longest is not None:
            whole_number("longest", self.longest, least=0)

    def lengths(self, figure: str) -> tuple[int, ...]:
        """The figure's lengths, or its quick ones, up to `longest`."""
        full, quick = LENGTHS[figure]
        chosen = quick if self.quick else full
        kept = tuple(k for k in chosen if self.longest is None or k <= self.longest)
        if not kept:
            raise InputError(
                f"expected at least {chosen[0]}, the shortest of figure {figure}, got a longest length of "
                f"{self.longest}"
            )
        return kept


class RunConfig:
    """Options, the folder of the results, and the models, each loaded once."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder = options, folder

    @cached_property
    def model(self) -> Any:
        """The hooked model."""
        from oversquash_lens.models.default_model import NAME
        from oversquash_lens.models.loading import load_model

        given = self.options.model
        if hasattr(given, "hook_dict"):
            return given
        name = NAME if given is None else given
        self._say(f"loading {name} …")
        return load_model(name, kind=self.options.kind, **self._loading())

    @cached_property
    def generator(self) -> Any:
        """Who answers the tasks: the plain twin of a named model, or the hooked model at hand."""
        from oversquash_lens.models.default_model import NAME
        from oversquash_lens.models.loading import load_twin

        given = self.options.model
        if not hasattr(given, "hook_dict"):
            name = NAME if given is None else given
            self._say(f"loading {name} without hooks …")
            given = load_twin(name, **self._loading())
        return Generator(given, chat=self.options.chat)

    @property
    def label(self) -> str:
        return self.model.cfg.model_name

    def lengths(self, figure: str) -> tuple[int, ...]:
        return self.options.lengths(figure)

    def readable(self, lengths: Sequence[int], *made: Family) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Of these lengths those whose prompts the model can read, in every family, and a note on those left out.

        Where none fits the shortest stays, for the curve to refuse.
        """
        n_ctx = self.model.cfg.n_ctx
        fits = [all(len(ids) <= n_ctx for family in made for ids in family.pair(k)) for k in lengths]
        kept = tuple(k for k, fit in zip(lengths, fits, strict=True) if fit) or tuple(lengths[:1])
        if len(kept) == len(lengths):
            return kept, ()
        return kept, (f"Lengths beyond {kept[-1]} are left out: this model reads n_ctx = {n_ctx} tokens.",)

    def _loading(self) -> dict[str, Any]:
        names = ("dtype", "device", "device_map", "trust_remote_code")
        return {name: getattr(self.options, name) for name in names}

    def _say(self, line: str) -> None:
        if self.options.progress:
            print(line, file=sys.stderr)
