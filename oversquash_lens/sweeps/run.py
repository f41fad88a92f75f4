"""`sweep`: the same measures over thousands of prompts, a row each in one parquet file; stopped, it goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from oversquash_lens.capture.mlp import random_source
from oversquash_lens.capture.recorder import NODE_PROBES
from oversquash_lens.capture.route import check_attention
from oversquash_lens.errors import InputError, one_line, whole_number
from oversquash_lens.sweeps.on_ray import Cluster
from oversquash_lens.sweeps.prompts import SweepPrompt, mark_of, read_prompts
from oversquash_lens.sweeps.result import SweepResult
from oversquash_lens.sweeps.rows import Effort, checked_measures, columns
from oversquash_lens.sweeps.store import WINDOW, Store, check_out
from oversquash_lens.sweeps.work import check_measurable, model_identity, rows_of

FORMAT = 1  # of the rows
MEASURES = ("mean_field", "flow")


def sweep(
    model: Any,
    prompts: Any,
    measures: Any = MEASURES,
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

    `model`: a loaded model, or a name for `load_model`, with `load` as its options. `prompts`: texts, token ids,
    (name, prompt) pairs, or a file of them, .txt (one a line), .json, .jsonl or .parquet (`column`). `measures`: names
    out of `sweep_rows.MEASURES`, which also lists the columns that each fills; "truth" takes `probes`. Prompts of
    similar length are recorded together as far as `memory` (bytes; half of what is there) goes; `attention`, as
    `record` takes it, is for those that are recorded alone.

    Rows are kept in `<out>.parts` as they are made: stopped or killed at any moment, the same call goes on, and no row
    is lost or there twice. A prompt that cannot be used becomes a row with status "refused" and the reason. Rows of
    another run (model, weights, prompts, measures, options, versions) are never mixed or overwritten: InputError.

    `ray`: "auto" (the running cluster, or one on this machine) or a cluster's address: each worker loads the model
    itself, so it must be given by name; `ray_options` are those of a Ray task, such as {"num_gpus": 1}.
    """
    path, effort = check_out(out), _effort(measures, chat, bos, node_probes, probes, seed, verify, attention)
    if memory is not None:
        whole_number("memory", memory, otherwise=" byte, or None for half of what is there")
    listed = read_prompts(prompts, column)
    begun = time.perf_counter()
    team = _Alone(model, load, memory) if ray is None else Cluster(model, load, memory, ray, ray_options)
    with team:
        identity = {
            "format": FORMAT,
            "model": team.identity(effort),
            "prompts": mark_of(listed),
            **asdict(effort),
            "measures": list(effort.measures),
        }
        store = Store(path, identity, columns(effort.measures), len(listed))
        reused = len(store.done)
        if not store.finished:
            _run(team, store, listed, effort, progress)
            store.finish()
    return SweepResult.load(path, reused=reused, seconds=time.perf_counter() - begun)


def _run(team: Any, store: Store, prompts: Sequence[SweepPrompt], effort: Effort, progress: bool) -> None:
    """Have all prompts measured that are not done yet."""
    from tqdm import tqdm

    missing = [each for each in prompts if each.index not in store.done]
    with tqdm(total=len(prompts), initial=len(store.done), desc="sweep", unit="prompt", disable=not progress) as bar:
        for rows in team.rows(_windows(missing), effort):
            store.add(rows)
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
        return self

    def __exit__(self, *failure: object) -> None:
        self._model = None

    def identity(self, effort: Effort) -> dict[str, Any]:
        check_measurable(self._model, effort)
        return model_identity(self._model)

    def rows(self, windows: Sequence[Sequence[SweepPrompt]], effort: Effort) -> Iterator[list]:
        for window in windows:
            yield from rows_of(self._model, window, effort, self._memory)


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
