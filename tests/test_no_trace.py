"""No public function leaves a trace: what a process has set, drawn, opened or hooked is as before, after errors too."""

from __future__ import annotations

import csv
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as pyplot
import numpy as np
import pytest
import torch
from bad_days import PROMPT, World, as_users_run_it
from small_generators import Parrot

import oversquash_lens as osl
from oversquash_lens.errors import OversquashError

pytestmark = pytest.mark.filterwarnings("ignore")
Call = Callable[[World], Any]


def _recording(w: World) -> Any:
    with osl.recording(w.model) as recorder:
        w.model(torch.tensor([[5, 9, 7]]))
    return recorder.trace()


def _edited(w: World, edit: Any = None) -> Any:
    with osl.edited_attention(w.model, edit or osl.edits.window(2)):
        return w.model(torch.tensor([[5, 9, 7]]))


def _hooked(hooks: Callable) -> Call:
    return lambda w: w.model.run_with_hooks(torch.tensor([[5, 9, 7]]), fwd_hooks=hooks(w.model, {}))


def _path_products(w: World) -> Any:
    store: dict = {}
    w.model.run_with_hooks(torch.tensor([[5, 9, 7]]), fwd_hooks=osl.attention_path_hooks(w.model, store))
    return osl.path_products(store, variant="proof")


def _folder(w: World) -> Path:
    """A model's folder, as transformers saves it."""
    from small_models import tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    state = torch.get_rng_state()
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(w.folder / "model")
    torch.set_rng_state(state)
    tokenizer().save_pretrained(w.folder / "model")
    return w.folder / "model"


def _drawn(w: World) -> Any:
    figure = osl.figures.flow(w.flow)
    figure.savefig(w.folder / "flow.svg")
    return osl.figures.save(osl.figures.profile(w.profile), w.folder, "profile")


IDS = [5, 9, 7]
FAMILY = lambda k: [5, 9] + [7] * k  # noqa: E731
# Of each public name: a call, and one that raises; None where nothing can be called.
CALLS: dict[str, tuple[Call, Call] | None] = {
    "OversquashError": None,
    "Trace": (
        lambda w: osl.Trace.load(w.trace.save(w.folder / "t")),
        lambda w: osl.Trace.load(w.file("t", b"no trace")),
    ),
    "attention_path_hooks": (_hooked(osl.attention_path_hooks), lambda w: osl.attention_path_hooks(None, {})),
    "audit": (lambda w: osl.audit(w.model, PROMPT), lambda w: osl.audit(w.model, PROMPT, probes=0)),
    "collapse_curve": (
        lambda w: osl.collapse_curve(w.model, FAMILY, (1, 2), ("float32", "bfloat16"), noise_floor=True),
        lambda w: osl.collapse_curve(w.model, FAMILY, (1, 50), ("float32",)),
    ),
    "edited_attention": (_edited, lambda w: _edited(w, osl.edits.ablate_head(9, 0))),
    "edits": (lambda w: osl.edits.sharpen(2.0), lambda w: osl.edits.window(0)),
    "expected_error": (lambda w: osl.expected_error(w.trace), lambda w: osl.expected_error(None)),
    "families": (lambda w: osl.families.as_family(FAMILY), lambda w: osl.families.counting(None)),
    "figures": (_drawn, lambda w: osl.figures.save(osl.figures.flow(w.flow), w.folder, "x", ["gif"])),
    "findings": (lambda w: osl.findings(w.model, PROMPT), lambda w: osl.findings(w.model, "")),
    "flow": (lambda w: osl.flow(w.trace, source=1), lambda w: osl.flow(w.trace, source=99)),
    "heaviest_edges": (lambda w: osl.heaviest_edges(w.flow, 3), lambda w: osl.heaviest_edges(w.flow, 0)),
    "heaviest_paths": (lambda w: osl.heaviest_paths(w.flow, 3), lambda w: osl.heaviest_paths(w.flow, 0)),
    "last_token_residual_hooks": (
        _hooked(osl.last_token_residual_hooks),
        lambda w: osl.last_token_residual_hooks(None, {}),
    ),
    "load_model": (
        lambda w: osl.load_model(_folder(w), device="cpu"),
        lambda w: osl.load_model(w.folder, device="cpu"),
    ),
    "mean_field_sensitivity": (
        lambda w: osl.mean_field_sensitivity(w.trace),
        lambda w: osl.mean_field_sensitivity(None),
    ),
    "measured_sensitivity": (
        lambda w: [osl.measured_sensitivity(w.model, PROMPT, probes=probes) for probes in (2, None)],
        lambda w: osl.measured_sensitivity(w.model, PROMPT, probes=0),
    ),
    "measured_flow": (
        lambda w: [osl.measured_flow(w.model, PROMPT, 1, probes) for probes in (2, None)],
        lambda w: osl.measured_flow(w.model, PROMPT, 99),
    ),
    "path_bound": (lambda w: osl.path_bound(w.trace), lambda w: osl.path_bound(w.trace, "median")),
    "path_products": (_path_products, lambda w: osl.path_products({})),
    "plan": (lambda w: osl.plan(w.model, PROMPT, "report"), lambda w: osl.plan(w.model, PROMPT, "median")),
    "probe_corrected_sensitivity": (
        lambda w: osl.probe_corrected_sensitivity(w.model, PROMPT),
        lambda w: osl.probe_corrected_sensitivity(w.model, ""),
    ),
    "profiles": (lambda w: osl.profiles(w.trace, ["proof"]), lambda w: osl.profiles(w.trace, ["median"])),
    "record": (lambda w: osl.record(w.model, PROMPT, verify=True), lambda w: osl.record(w.model, "w5 " * 99)),
    "record_batch": (lambda w: osl.record_batch(w.model, [PROMPT, IDS]), lambda w: osl.record_batch(w.model, [""])),
    "recording": (_recording, lambda w: osl.recording(w.model, attention="sparse").__enter__()),
    "report": (
        lambda w: osl.report(w.model, PROMPT, w.folder / "page.html"),
        lambda w: osl.report(w.model, PROMPT, w.folder),
    ),
    "reports": (
        lambda w: osl.reports(w.model, [PROMPT, ""], w.folder / "pages"),
        lambda w: osl.reports(w.model, [""], w.folder / "pages"),
    ),
    "reproduce": (lambda w: osl.reproduce("8", out=w.folder / "f"), lambda w: osl.reproduce("99", out=w.folder)),
    "run_task": (
        lambda w: osl.run_task(Parrot(lambda prompt: "1"), "ones", (3,), out=w.folder / "a.parquet"),
        lambda w: osl.run_task(Parrot(lambda prompt: "1"), "sing", (3,)),
    ),
    "squashing": (lambda w: osl.squashing(w.trace), lambda w: osl.squashing(None)),
    "support": (lambda w: osl.support(w.model), lambda w: osl.support(None)),
    "substitution": (
        lambda w: osl.substitution(w.model, PROMPT, draws=2, target=3, dtypes=["bfloat16"], out=w.folder / "s.parquet"),
        lambda w: osl.substitution(w.model, PROMPT, [99]),
    ),
    "swap": (lambda w: osl.swap(w.model, PROMPT, {1: 3}), lambda w: osl.swap(w.model, PROMPT, PROMPT)),
    "sweep": (
        lambda w: osl.sweep(w.model, [PROMPT, IDS, ""], out=w.folder / "rows.parquet"),
        lambda w: osl.sweep(w.model, w.file("p.csv", b"a,b\n1,2\n"), out=w.folder / "rows.parquet"),
    ),
    "views": (lambda w: osl.views.route(w.flow)._repr_html_(), lambda w: osl.views.route(None)),
    "what_if": (
        lambda w: osl.what_if(w.model, PROMPT, osl.edits.window(2), osl.edits.separators(2, "w3"), probes=2),
        lambda w: osl.what_if(w.model, PROMPT),
    ),
}
NO_MODEL = {"OversquashError", "edits", "families", "load_model", "reproduce", "run_task"}


def modules(model: Any) -> dict[str, Any]:
    found = dict(model.named_modules())
    return found | {f"wrapped {name}": module for name, module in model.original_model.named_modules()}


def state(world: World) -> dict[str, Any]:
    """Everything that outlives a call and is not its result."""
    model, kinds = world.model, ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parts, loggers = modules(model), [logging.getLogger(), *map(logging.getLogger, LOGGERS)]
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "hooks": {name: [list(getattr(m, kind)) for kind in kinds] for name, m in parts.items()},
        "hook points": {name: [len(point.fwd_hooks), len(point.bwd_hooks)] for name, point in model.hook_dict.items()},
        "modes": {name: module.training for name, module in parts.items()},
        "attributes of modules": {name: sorted(vars(module)) for name, module in parts.items()},
        "requires_grad": {name: weight.requires_grad for name, weight in weights.items()},
        "grad": {name: weight.grad is None for name, weight in weights.items()},
        "weights": {name: (weight.data_ptr(), weight.dtype, weight.sum().item()) for name, weight in weights.items()},
        "settings": {k: repr(v) for k, v in vars(model.cfg).items()},
        "default dtype": torch.get_default_dtype(),
        "random states": [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())],
        "grad mode": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()],
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "running threads": {each.name for each in threading.enumerate() if type(each) is threading.Thread},
        "warnings": [list(warnings.filters), warnings.showwarning],
        "matplotlib": dict(matplotlib.rcParams),
        "open figures": pyplot.get_fignums(),
        "environment": dict(os.environ),
        "loggers": [(each.level, list(each.handlers), each.disabled, each.propagate) for each in loggers],
        "logging": [logging.root.manager.disable, len(logging._handlerList) >= 0],
        "folder": os.getcwd(),
        "streams": [sys.stdout, sys.stderr, sys.stdin],
        "python": [list(sys.path), sys.excepthook, sys.getrecursionlimit(), sys.getswitchinterval()],
        "signals": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "numpy": np.geterr(),
        "csv": [csv.field_size_limit(), csv.list_dialects()],
        "locale": locale.setlocale(locale.LC_ALL),
    }


LOGGERS = (
    "transformers",
    "transformer_lens",
    "oversquash_lens",
    "matplotlib",
    "torch",
    "py.warnings",
    "huggingface_hub",
)


@pytest.fixture(scope="module")
def shared() -> World:
    """A world with everything made, and the libraries below us imported: what these leave is theirs."""
    import circuitsvis  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import rich.console  # noqa: F401

    world = World()
    with as_users_run_it():
        assert world.flow
        assert world.profile
    return world


@pytest.fixture
def world(shared: World, tmp_path: Path) -> World:
    shared.folder = tmp_path
    return shared


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in before if before[name] != after[name]]


def test_every_public_name_has_its_row() -> None:
    assert sorted(CALLS) == osl.__all__


@pytest.mark.parametrize("name", [name for name in osl.__all__ if CALLS.get(name)])
def test_nothing_is_left_behind(name: str, world: World) -> None:
    good, bad = CALLS[name]
    before = state(world)
    with as_users_run_it():
        good(world)
        assert differing(before, state(world)) == []
        with pytest.raises(OversquashError):
            bad(world)
        assert differing(before, state(world)) == []


@pytest.mark.parametrize("name", [name for name in osl.__all__ if CALLS.get(name) and name not in NO_MODEL])
def test_nothing_is_left_behind_by_a_pass_that_breaks(name: str, world: World) -> None:
    """A hook of the user's raises in the third pass from here on; their error, or ours, and nothing else is left."""
    passes = []

    def breaking(value: Any, hook: Any = None) -> None:
        passes.append(1)
        if len(passes) > 2:
            raise ZeroDivisionError

    world.model.add_hook("blocks.1.hook_resid_post", breaking)
    before = state(world)
    try:
        with as_users_run_it(), suppress(ZeroDivisionError, OversquashError):
            CALLS[name][0](world)
        assert differing(before, state(world)) == []
    finally:
        world.model.reset_hooks()
