"""A sweep on Ray: every worker loads the model itself, chunks of prompts go out as tasks, rows come back.

What Ray does, and we do not: placing tasks, starting them again elsewhere when a worker or its machine is lost
(`RETRIES` times; without end where it ran out of memory), and bringing rows back. The process that called writes them,
so only it needs the disk. Ray's own peculiarities: no dashboard and no usage statistics are started, a cluster that is
started here takes STORE bytes of shared memory and leaves with the process, and every worker holds a model of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from typing import Any

from oversquash_lens.capture.subject import Subject
from oversquash_lens.errors import InputError, ModelError, OversquashError, one_line
from oversquash_lens.identity import subject_identity
from oversquash_lens.parts import differences
from oversquash_lens.sweeps.prompt_files import SweepPrompt
from oversquash_lens.sweeps.rows import Effort, check_measurable, refused_rows, rows_of

CHUNK = 32  # prompts of one task
RETRIES = 3  # of a task whose worker is lost
STORE = 1 << 28  # bytes of shared memory of a cluster that is started here: rows are small
LOST = ("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError")  # Ray's errors of a task whose worker is lost
AHEAD = 2  # tasks that wait for each one that runs

_loaded: dict[str, Subject] = {}  # in a worker: the one model that it holds


class Cluster:
    """A Ray cluster and the name of a model that its workers load."""

    def __init__(
        self, model: Any, load: Mapping[str, Any] | None, memory: int | None, address: Any, options: Any
    ) -> None:
        if not isinstance(model, str | os.PathLike):
            raise InputError(
                "expected the name or path that load_model takes, for every worker loads it itself, got a "
                f"{type(model).__name__} as the model with ray={one_line(repr(address), 60)}: give its name, and "
                "load= for options"
            )
        if not isinstance(address, str) or not address:
            raise InputError(
                "expected 'auto', or the address of a cluster, such as 'ray://host:10001', got "
                f"ray={one_line(repr(address), 60)}: give one"
            )
        self._model, self._load, self._memory = os.fspath(model), dict(load or {}), memory
        self._address, self._options, self._ours = address, dict(options or {}), False
        self._redirected = ExitStack()
        self._ray = _ray()
        self._lost = tuple(getattr(self._ray.exceptions, name) for name in LOST)

    def __enter__(self) -> Cluster:
        if not self._ray.is_initialized():
            self._ours = True
            _start(self._ray, self._address)
        gpu = {"num_gpus": 1} if self._ray.cluster_resources().get("GPU") else {}
        options = {"num_cpus": 1, **gpu, "max_retries": RETRIES, **self._options}
        self._identify = self._ray.remote(**options)(_identify)
        self._measure = self._ray.remote(**options)(_task)
        self._redirected.enter_context(redirect_stdout(sys.stderr))  # where Ray tells of lost workers; results go out
        return self

    def __exit__(self, *failure: object) -> None:
        if self._ours:
            self._ray.shutdown()
        self._redirected.close()

    def identity(self, effort: Effort) -> dict[str, Any]:
        self._known = self._get(self._identify.remote(self._model, self._load, effort))
        return self._known

    def rows(self, windows: Sequence[Sequence[SweepPrompt]], effort: Effort) -> Iterator[list]:
        """Rows as they come back. A chunk whose workers were lost again and again is tried prompt by prompt."""
        waiting = [list(window[at : at + CHUNK]) for window in windows for at in range(0, len(window), CHUNK)][::-1]
        running: dict[Any, list[SweepPrompt]] = {}
        most = AHEAD * max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        while waiting or running:
            while waiting and len(running) < most:
                chunk = waiting.pop()
                running[self._measure.remote(self._model, self._load, self._memory, effort, chunk)] = chunk
            (finished, *_), _ = self._ray.wait(list(running), num_returns=1)
            chunk = running.pop(finished)
            try:
                identity, rows = self._get(finished)
            except self._lost as lost:
                if len(chunk) > 1:
                    waiting += [[each] for each in chunk]
                else:
                    yield refused_rows(
                        chunk, f"its worker was lost {RETRIES + 1} times ({one_line(lost, 120)})", effort
                    )
                continue
            self._check_same(identity)
            yield rows

    def _get(self, reference: Any) -> Any:
        """What a task gave, or the error that it ended with as if it had been raised here."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, OversquashError):
                raise error.cause from None
            raise
        except self._lost:
            raise
        except self._ray.exceptions.RayError as error:
            raise OversquashError(
                f"the Ray cluster was lost ({one_line(error, 160)}); expected it to stay until the sweep is over: run "
                "the same sweep again, it goes on with what is missing"
            ) from error

    def _check_same(self, identity: dict[str, Any]) -> None:
        if differing := differences(identity, self._known):
            name, (theirs, first) = next(iter(differing.items()))
            raise ModelError(
                f"a worker loaded {self._model} with another {name} than the first ({theirs}, not {first}); expected "
                "the same model and versions on every machine of the cluster: install the same there"
            )


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its new way, which it otherwise warns of
    try:
        import ray
    except ImportError as error:
        raise InputError(
            f"expected the extra that brings it, got ray=, and Ray is not to be had here ({one_line(error, 80)}): "
            "pip install 'oversquash-lens[ray]'"
        ) from error
    return ray


def _start(ray: Any, address: str) -> None:
    """Join the cluster; "auto" starts one on this machine where none is running."""
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except ConnectionError as error:
        if address != "auto":
            raise InputError(
                f"no Ray cluster answers at {one_line(address, 60)} ({one_line(error, 120)}); expected one that runs: "
                "start it, or give ray='auto' for one on this machine"
            ) from error
        ray.init(object_store_memory=STORE, **quiet)


def _subject(name: str, load: Mapping[str, Any]) -> Subject:
    """In a worker: the model, loaded by the first task that needs it."""
    from oversquash_lens.models.loading import load_model

    key = f"{name} {sorted(load.items(), key=str)}"
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = Subject.of(load_model(name, **load))
    return _loaded[key]


def _identify(name: str, load: Mapping[str, Any], effort: Effort) -> dict[str, Any]:
    subject = _subject(name, load)
    check_measurable(subject, effort)
    return subject_identity(subject)


def _measure(
    name: str, load: Mapping[str, Any], memory: int | None, effort: Effort, chunk: Sequence[SweepPrompt]
) -> tuple[dict[str, Any], list]:
    subject = _subject(name, load)
    return subject_identity(subject), [row for rows in rows_of(subject, chunk, effort, memory) for row in rows]


_task = _measure
