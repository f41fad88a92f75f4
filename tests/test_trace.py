"""A trace on disk: the same numbers again, no pickle, whole or absent; anything else is one clear error."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CASES, case

import oversquash_lens as osl
from oversquash_lens.capture.trace import FORMAT, FORMAT_VERSION, packed
from oversquash_lens.errors import InputError, OversquashError, TraceFileError
from oversquash_lens.paths.kinds import VARIANTS

NAME = "prompt.safetensors"


def recorded(name: str = "bridge-llama") -> osl.Trace:
    return osl.record(*case(name))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return recorded().save(tmp_path / NAME)


def header_of(path: Path) -> dict:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()[FORMAT])


def rewrite(path: Path, header: Any = None, tensors: Callable[[dict], dict] = lambda t: t) -> None:
    """The same file with another header or other tensors."""
    new = tensors(load_file(path))
    path.write_bytes(packed(header_of(path) if header is None else header, new))


def refusal(path: Path) -> str:
    with pytest.raises(TraceFileError) as caught:
        osl.Trace.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", CASES)
def test_every_number_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    trace = recorded(name)
    path = trace.save(tmp_path / NAME)
    assert path == tmp_path / NAME
    again = osl.Trace.load(path)
    assert (again.about, again.tokens, again.gated_mlp) == (trace.about, trace.tokens, trace.gated_mlp)
    n = trace.n_positions
    for one, two in (
        (trace.token_ids, again.token_ids),
        (trace.last_residuals, again.last_residuals),
        (trace.prediction_input, again.prediction_input),
        *((a.rows(0, n), b.rows(0, n)) for a, b in zip(trace.attention, again.attention, strict=True)),
    ):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    for one, two in ((trace.gains, again.gains), (trace.gains.weights, again.gains.weights)):
        for field in dataclasses.fields(one):
            left, right = getattr(one, field.name), getattr(two, field.name)
            if field.name != "weights":
                assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, field.name


@pytest.mark.parametrize("name", CASES)
def test_every_measure_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    trace = recorded(name)
    again = osl.Trace.load(trace.save(tmp_path / NAME))
    profiles = [(osl.path_bound(trace, v), osl.path_bound(again, v)) for v in VARIANTS]
    profiles.append((osl.path_bound(trace, "proof", beta=1.0), osl.path_bound(again, "proof", beta=1.0)))
    profiles.append((osl.mean_field_sensitivity(trace), osl.mean_field_sensitivity(again)))
    for one, two in profiles:
        assert torch.equal(one.log_by_layer, two.log_by_layer)
        assert one.to_dict() == two.to_dict()


def test_a_low_precision_trace_comes_back_in_its_dtype(tmp_path: Path) -> None:
    """What the model computed in bfloat16 stays bfloat16 on disk."""
    trace = osl.record(*case("bridge-llama"), attention="kept")
    attention = tuple(type(a)(a.pattern.bfloat16()) for a in trace.attention)
    low = dataclasses.replace(trace, attention=attention)
    again = osl.Trace.load(low.save(tmp_path / NAME))
    assert again.attention[0].rows(0, 6).dtype == torch.bfloat16
    assert torch.equal(again.attention[1].rows(2, 4), low.attention[1].rows(2, 4))


def test_tokens_of_every_kind_come_back(tmp_path: Path) -> None:
    odd = ("", "\n", "é\u0301 漢字", "👩‍👧", "\ud800", "\x00")
    trace = recorded("ln-plain-learned") if len(recorded().tokens) != 6 else recorded()
    odd = odd[: trace.n_positions]
    again = osl.Trace.load(dataclasses.replace(trace, tokens=odd).save(tmp_path / NAME))
    assert again.tokens == odd


def test_saving_again_replaces(saved: Path) -> None:
    other = dataclasses.replace(recorded(), tokens=tuple("abcdef")[: recorded().n_positions])
    other.save(saved)
    assert osl.Trace.load(saved).tokens == other.tokens
    assert [p.name for p in saved.parent.iterdir()] == [NAME]


def test_a_home_relative_path_is_read_where_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    trace = recorded()
    assert trace.save(f"~/{NAME}") == tmp_path / NAME
    assert osl.Trace.load(f"~/{NAME}").tokens == trace.tokens


# ---------------------------------------------------------------- no pickle


def test_the_file_is_safetensors_with_a_version_inside(saved: Path) -> None:
    data = saved.read_bytes()
    length = int.from_bytes(data[:8], "little")
    described = json.loads(data[8 : 8 + length])
    header = json.loads(described["__metadata__"][FORMAT])
    assert header["version"] == FORMAT_VERSION
    assert header["about"]["model"] == "tiny-random-llama"
    assert not data.startswith((b"PK", b"\x80"))  # torch.save's zip, and pickle itself


def test_neither_saving_nor_loading_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("pickle was used")

    trace = recorded()
    for module, names in ((pickle, ("load", "loads", "dump", "dumps", "Unpickler", "Pickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr(torch, "save", forbidden)
    assert osl.Trace.load(trace.save(tmp_path / NAME)).tokens == trace.tokens


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / NAME
    for write in (lambda: path.write_bytes(pickle.dumps(Bomb())), lambda: torch.save(Bomb(), path)):
        write()
        assert "damaged or not a trace" in refusal(path)
        assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------- files that are no trace


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, -1], ids=lambda keep: f"{keep} bytes")
def test_a_truncated_file(keep: int, saved: Path) -> None:
    data = saved.read_bytes()
    assert len(data) > 2000
    saved.write_bytes(data[:keep])
    assert "damaged or not a trace" in refusal(saved)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64, b"not a trace at all", b"\x00" * 4096], ids=len)
def test_a_foreign_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(content)
    assert "damaged or not a trace" in refusal(path)


def test_somebody_elses_safetensors(tmp_path: Path) -> None:
    path = tmp_path / NAME
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
        assert "not a trace" in refusal(path)


def test_no_file_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        assert "is not a file" in refusal(path)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, FORMAT_VERSION - 1, 2, 0, None, "1"], ids=str)
def test_another_format_version(version: Any, saved: Path) -> None:
    rewrite(saved, header_of(saved) | {"version": version})
    said = refusal(saved)
    assert f"version {version!r}" in said
    assert f"expected version {FORMAT_VERSION}" in said


@pytest.mark.parametrize("header", [[], "text", 5, None, True], ids=repr)
def test_a_header_of_another_kind(header: Any, saved: Path) -> None:
    path = saved
    save_file(load_file(path), path, metadata={FORMAT: json.dumps(header)})
    refusal(path)


@pytest.mark.parametrize("part", ["about", "tokens", "gains", "gated_mlp"])
def test_a_header_without_a_part(part: str, saved: Path) -> None:
    header = header_of(saved)
    del header[part]
    rewrite(saved, header)
    assert part in refusal(saved)


def test_an_unknown_field_in_the_label(saved: Path) -> None:
    header = header_of(saved)
    header["about"]["surprise"] = 1
    rewrite(saved, header)
    assert "surprise" in refusal(saved)


@pytest.mark.parametrize(
    "part", ["token_ids", "attention.1.query", "attention.1.log_normaliser", "gains.value", "weights.ov_gram"]
)
def test_a_missing_tensor(part: str, saved: Path) -> None:
    rewrite(saved, tensors=lambda all_: {name: t for name, t in all_.items() if name != part})
    assert part in refusal(saved)


@pytest.mark.parametrize(
    "part", ["token_ids", "attention.1.key", "attention.1.mixed", "last_residuals", "gains.node_gain"]
)
def test_a_tensor_of_another_shape(part: str, saved: Path) -> None:
    """Cut to fewer positions or layers: not a trace any more, and said so as of any damaged file."""

    def cut(tensors: dict) -> dict:
        whole = tensors[part]
        return tensors | {part: (whole[..., :-1, :-1] if whole.ndim > 1 else whole[:-1]).clone()}

    rewrite(saved, tensors=cut)
    refusal(saved)


def test_a_trace_that_does_not_fit_together() -> None:
    trace = recorded()
    with pytest.raises(InputError, match="record it again"):
        dataclasses.replace(trace, tokens=trace.tokens[:-1])
    with pytest.raises(InputError, match="record it again"):
        dataclasses.replace(trace, attention=trace.attention[:-1])


# ---------------------------------------------------------------- writing


def test_an_unwritable_path(tmp_path: Path) -> None:
    trace = recorded()
    blocked = tmp_path / "a-file"
    blocked.write_text("here")
    for path in (tmp_path, tmp_path / "no such folder" / NAME, blocked / NAME):
        with pytest.raises(InputError) as caught:
            trace.save(path)
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-file"]
    assert blocked.read_text() == "here"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("existing", [True, False], ids=["over another", "anew"])
def test_an_interrupted_write_leaves_what_was_there(
    error: BaseException, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trace = tmp_path / NAME, recorded()
    if existing:
        trace.save(path)
    before = path.read_bytes() if existing else None

    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        dataclasses.replace(trace, gated_mlp=False).save(path)
    monkeypatch.undo()
    if expected is InputError:
        assert "No space left on device" in str(caught.value)
        assert isinstance(caught.value, OversquashError)
    assert [p.name for p in tmp_path.iterdir()] == ([NAME] if existing else [])
    assert not existing or path.read_bytes() == before


# ---------------------------------------------------------------- what a trace says of itself


def test_a_trace_shows_itself_in_a_few_lines(smollm2: Any) -> None:
    """It printed 346,019 characters as the dataclass that it is."""
    trace = osl.record(smollm2, smollm2.tokenizer("Once upon a time there was a <b> and " * 5)["input_ids"])
    shown = repr(trace)
    assert shown.count("\n") < 12
    assert len(shown) < 2000
    assert all(word in shown for word in (trace.about.model, f"{trace.n_positions} tokens", "'Once'", trace.route))
    assert all(name in shown for name in trace.support)
    assert "&lt;" in trace._repr_html_()
    assert "<b>" not in trace._repr_html_()  # a token of text is not markup


@pytest.mark.parametrize("name", CASES)
def test_a_trace_as_numbers(name: str) -> None:
    trace = recorded(name)
    frame, numbers = trace.to_frame(), trace.to_dict()
    assert list(frame["token"]) == list(trace.tokens)
    assert list(frame["attention_scale"]) == pytest.approx(trace.gains.attention_scale.mean(0).tolist())
    assert list(frame["value_norm"]) == pytest.approx(trace.gains.value.norm(dim=-1).mean((0, 1)).tolist())
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["about"]["model"] == trace.about.model
    assert numbers["last_residual_norm"][-1] == pytest.approx(trace.last_residuals[-1].norm().item())
    assert numbers["node_gain"] == pytest.approx(frame["node_gain"].tolist())
