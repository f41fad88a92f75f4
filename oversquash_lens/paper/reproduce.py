"""Every figure of the paper by name, and `reproduce`: run, write, judge, index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from oversquash_lens.errors import InputError
from oversquash_lens.paper.run_config import LENGTHS, Options, RunConfig
from oversquash_lens.results import Result
from oversquash_lens.storage import folder_for
from oversquash_lens.viz.chart import Chart
from oversquash_lens.viz.gallery import write_chart, write_index


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

    `names`: 5, "ushape", ["8", "9"], "all". `model`: a name or path as for `load_model` (None: the embedded default),
    or a hooked model; what can be known to be wrong is said before it is loaded. Answers of the tasks are kept in `out`
    as they come, so that a run that was broken off goes on where it stopped. `done` is called after each figure. Other
    options are the fields of `paper.run_config.Options`: quick, longest, samples, dtypes, probes, seed, device, ….
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
