"""What a kept result depends on: every change that moves a number makes another identity, and nothing else does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from small_generators import Parrot
from zoo import zoo

import oversquash_lens as osl
from oversquash_lens.capture.subject import Subject
from oversquash_lens.collapse.curve import kept_curve
from oversquash_lens.collapse.families import Family
from oversquash_lens.errors import InputError
from oversquash_lens.identity import subject_identity
from oversquash_lens.parts import differences
from oversquash_lens.storage import sealed

PROMPTS = [[1, 7, 9, 3]]
POINT = "blocks.1.hook_resid_post"
SCALE = 3.0  # of a hook that reads it from its module


def model(name: str = "llama", kind: str = "bridge") -> Any:
    return zoo(name, kind)


def identity(model: Any) -> dict[str, Any]:
    return subject_identity(Subject.of(model))


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name.split(".hook_")[0] for name in differences(before, after)]


def times(factor: Any) -> Callable:
    def scale(residual: Any, hook: Any = None) -> Any:
        return residual * factor

    return scale


def late(position: int) -> Callable:
    """A hook that acts where the proof's eight tokens do not reach."""

    def cut(residual: Any, hook: Any = None) -> Any:
        residual = residual.clone()
        residual[:, position:] = 0
        return residual

    return cut


def by_a_global(residual: Any, hook: Any = None) -> Any:
    return residual * SCALE


class Steering:
    def __init__(self, vector: Any) -> None:
        self.vector, self.seen = vector, []

    def __call__(self, residual: Any, hook: Any = None) -> Any:
        self.seen.append(residual.detach())  # memory, which no number depends on
        return residual + self.vector

    def steer(self, residual: Any, hook: Any = None) -> Any:
        return self(residual, hook)


HOOKS: dict[str, tuple[Callable, Callable]] = {
    "another closure": (times(1.0), times(1.5)),
    "a closure that differs by little": (times(1.0), times(1.00001)),
    "a tensor in a closure": (times(torch.ones(1)), times(torch.full((1,), 1.0001))),
    "beyond the proof's tokens": (late(20), late(30)),
    "a partial": (functools.partial(lambda r, hook, by: r, by=1), functools.partial(lambda r, hook, by: r, by=2)),
    "an object": (Steering(torch.zeros(1)), Steering(torch.full((1,), 1e-6))),
    "a method": (Steering(torch.zeros(1)).steer, Steering(torch.full((1,), 1e-6)).steer),
    "other code": (lambda r, hook: r + 0, lambda r, hook: r - 0),
    "a default": (lambda r, hook, by=0.0: r + by, lambda r, hook, by=1e-9: r + by),
}


@pytest.mark.parametrize("name", HOOKS)
def test_another_hook_is_another_model(name: str) -> None:
    found, tried = [], model()
    for hook in HOOKS[name]:
        tried.add_hook(POINT, hook)
        found.append(identity(tried))
        assert differences(found[-1], identity(tried)) == {}, "the same hook, the same model"
        tried.reset_hooks()
    plain = identity(tried)
    assert "hooks.blocks.1" in changed(*found)
    for each in found:
        assert "hooks.blocks.1" in changed(plain, each)


def test_a_global_that_a_hook_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = model()
    tried.add_hook(POINT, by_a_global)
    before = identity(tried)
    monkeypatch.setitem(globals(), "SCALE", 3.1)
    assert "hooks.blocks.1" in changed(before, identity(tried))


def test_the_same_hook_in_another_model_of_the_same_weights() -> None:
    first, second = model(), model()
    for tried in (first, second):
        tried.add_hook(POINT, times(2.0))
    assert differences(identity(first), identity(second)) == {}


@pytest.mark.parametrize("edits", [(osl.edits.window(20), osl.edits.window(30)), (None, osl.edits.window(40))])
def test_an_edit_of_attention_that_begins_behind_the_proof(edits: tuple) -> None:
    tried, found = model(), []
    for edit in edits:
        with osl.edited_attention(tried, edit) if edit is not None else nullcontext():
            found.append(identity(tried))
    assert changed(*found)


def _one_number(tried: Any) -> None:
    with torch.no_grad():
        list(tried.parameters())[3].view(-1)[-2] += 1e-6


def _swapped(tried: Any) -> None:
    weight = next(p for n, p in tried.named_parameters() if p.ndim == 2)
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]].clone()


def _half(tried: Any) -> None:
    tried.to(torch.bfloat16)


def _tokenizer(tried: Any) -> None:
    tried.cfg.default_prepend_bos = not tried.cfg.default_prepend_bos


CHANGES = {
    "one number of one weight": (_one_number, "weights"),
    "two rows that changed places": (_swapped, "weights"),
    "another number format": (_half, "dtype"),
    "another rule for BOS": (_tokenizer, "tokenizer"),
    "compatibility mode": (lambda tried: tried.enable_compatibility_mode(), "weights"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_model(name: str) -> None:
    change, said = CHANGES[name]
    tried = model()
    before = identity(tried)
    change(tried)
    assert said in changed(before, identity(tried))
    assert differences(before, identity(model())) == {}


def test_a_setting_of_the_config() -> None:
    tried = model("mistral-window", "hooked")
    before = identity(tried)
    tried.cfg.n_ctx -= 1
    assert changed(before, identity(tried)) == ["architecture"]


def test_rounding_of_another_processor_is_no_other_model() -> None:
    before = identity(model())
    assert before["buffers"]["values"]
    there = dict(before)
    for name in ("computes", "buffers"):
        off = before[name]["tolerance"] / 2
        there[name] = before[name] | {"values": [value + off for value in before[name]["values"]]}
    assert differences(there, before) == {}
    there["computes"]["values"][3] += 0.01
    assert list(differences(there, before)) == ["computes"]


@pytest.mark.parametrize("tried", ["sweep", "collapse"])
def test_kept_results_of_a_model_are_not_those_of_a_steered_one(tried: str, tmp_path: Path) -> None:
    """CASES A9, and what is its like: hooks that eight tokens do not show."""
    steered, out = model(), tmp_path / "kept.parquet"
    family = Family("pairs", lambda k: ([1] + [7] * k, [1] + [7] * (k + 1)), "tokens")

    def run() -> Any:
        if tried == "sweep":
            return osl.sweep(steered, PROMPTS, ["mean_field"], out)
        return kept_curve(steered, family, (1, 2), ("float32",), out=out)

    run()
    for hook in (times(3.0), late(20)):
        steered.add_hook("hook_embed", hook)
        with pytest.raises(InputError, match=r"another run \(model\.hooks\.hook_embed 0: nothing there"):
            run()
        steered.reset_hooks()
    run()


def test_answers_of_another_generator_are_refused(tmp_path: Path) -> None:
    class Marked(Parrot):
        identity = {"weights": "one"}  # noqa: RUF012

    out = tmp_path / "answers.parquet"
    osl.run_task(Marked(lambda prompt: "1"), "ones", (3,), out=out, score=False)
    Marked.identity = {"weights": "two"}
    with pytest.raises(InputError, match=r"identity\.weights: 'one' there, 'two' now"):
        osl.run_task(Marked(lambda prompt: "1"), "ones", (3,), out=out, score=False)


@pytest.mark.parametrize(("column", "value"), [("about", "[" * 100_000), ("about", "{}"), ("tensors", b"none")])
def test_a_kept_curve_that_is_none(column: str, value: Any, tmp_path: Path) -> None:
    """Its checksum is right, what it holds is not."""
    tried, out = model(), tmp_path / "kept.parquet"
    family = Family("pairs", lambda k: ([1] + [7] * k, [1] + [7] * (k + 1)), "tokens")
    kept_curve(tried, family, (1, 2), ("float32",), out=out)
    table = pyarrow.parquet.read_table(out)
    at = table.column_names.index(column)
    pyarrow.parquet.write_table(table.set_column(at, table.schema.field(at), [[value]]), out)
    out.write_bytes(sealed(out.read_bytes()))
    with pytest.raises(InputError, match="the curve kept as 'float32' is damaged"):
        kept_curve(tried, family, (1, 2), ("float32",), out=out)
