"""On which model, how long and where the experiments run; the model is loaded when the first recipe asks for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from oversquash_lens.collapse.families import Family
from oversquash_lens.collapse.precision import number_format
from oversquash_lens.errors import InputError, whole_number
from oversquash_lens.paper.generator import Generator, Sampling
from oversquash_lens.paper.prompts import COPYING_LENGTHS, COUNTING_LENGTHS, PROMPT_TYPE_LENGTHS
from oversquash_lens.paper.published import FIGURE_5_LENGTHS, FIGURE_12

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
