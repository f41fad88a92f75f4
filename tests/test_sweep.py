"""Sweeps over many prompts: right rows, each exactly once, whatever becomes of the process, the disk or a prompt."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from elsewhere import Elsewhere
from small_models import NO_BRIDGE, bridge, has_bridge
from small_sweeps import MEASURES, close, exactly_once, model_folder, same_rows, texts
from zoo import lacking, zoo

import oversquash_lens as osl
from oversquash_lens import storage
from oversquash_lens.capture.batch import batch_bytes
from oversquash_lens.capture.hooked_model import size_of
from oversquash_lens.capture.subject import Subject
from oversquash_lens.errors import HookMismatchError, InputError, ModelError
from oversquash_lens.storage import sealed
from oversquash_lens.sweeps import rows as work
from oversquash_lens.sweeps import run
from oversquash_lens.sweeps.prompt_files import read_prompts
from oversquash_lens.sweeps.result import SweepResult, density
from oversquash_lens.sweeps.rows import MEASURES as ALL_MEASURES
from oversquash_lens.sweeps.rows import checked_measures, columns, summary
from oversquash_lens.sweeps.run import sweep_plan

TOO_LONG = "w5 " * 40


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "rows.parquet"


@pytest.fixture
def parts(out: Path) -> Path:
    return out.with_name("rows.parquet.parts")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts at a time, so that a few prompts make several parts."""
    monkeypatch.setitem(work.MOST, "cpu", 3)


# ---------------------------------------------------------------- what the rows say


def test_rows_are_what_each_prompt_gives_by_itself(tiny: Any, out: Path) -> None:
    prompts = [*texts(7), [3, 4, 5], ("named", "w7 w8 w9")]
    result = osl.sweep(tiny, prompts, list(ALL_MEASURES), out, probes=2, seed=3)
    assert (result.total, result.done, result.refused, result.reused) == (9, 9, 0, 0)
    for prompt, row in zip(read_prompts(prompts), result.table().to_pylist(), strict=True):
        trace = osl.record(tiny, prompt.prompt, seed=3)
        bound, flow, squashing = osl.path_bound(trace), osl.flow(trace), osl.squashing(trace)
        truth = osl.measured_sensitivity(tiny, prompt.prompt, probes=2, seed=3)
        expected = {
            "name": prompt.name,
            "text": prompt.text,
            "token_ids": trace.token_ids.tolist(),
            "tokens": list(trace.tokens),
            "mean_field_share": osl.mean_field_sensitivity(trace).share.tolist(),
            "proof_log_value": bound.log_values.tolist(),
            "proof_first": bound.share[0].item(),
            "theorem_5_1_log_value": None,
            "rollout_share": osl.path_bound(trace, "rollout").share.tolist(),
            "calibrated_full_log_value": osl.path_bound(trace, "calibrated_full").log_values.tolist(),
            "flow_width": flow.effective_width.tolist(),
            "flow_residual": flow.residual.tolist(),
            "squashing_heard": squashing.effective_tokens,
            "squashing_index": squashing.index,
            "squashing_narrowest": squashing.narrowest,
            "truth_share": truth.share.tolist(),
            "truth_standard_error": truth.standard_error.tolist(),
        }
        for name, value in expected.items():
            assert close(row[name], value, 1e-5), (name, row[name], value)


def test_the_summary_of_shares() -> None:
    found = summary(torch.tensor([0.4, 0.1, 0.1, 0.1, 0.1, 0.05, 0.15], dtype=torch.float64))
    thirds = [found[f"{name}_third"] for name in ("first", "middle", "last")]
    assert thirds == pytest.approx([0.5, 0.3, 0.2])
    assert (found["first"], found["last"]) == pytest.approx((0.4, 0.15))
    assert summary(torch.full((5,), 0.2))["heard"] == pytest.approx(5)
    assert summary(torch.tensor([0.25, 0.75]))["middle_third"] == 0


def test_shares_by_relative_position() -> None:
    """Over an even share, whatever the number of tokens and bins; nothing is lost between them."""
    draw = torch.Generator().manual_seed(0)
    for n in (2, 3, 7, 20, 61):
        share = torch.rand(n, generator=draw, dtype=torch.float64).softmax(0).numpy()
        for bins in (1, 4, 20):
            assert density(share, bins).sum() / bins == pytest.approx(1)
        assert density(share, n) == pytest.approx(share * n)
        assert density(share * 0 + 1 / n, 20) == pytest.approx(1)


def test_bands_are_quantiles_over_prompts(tiny: Any, out: Path) -> None:
    result = osl.sweep(tiny, texts(9), MEASURES, out)
    widths = torch.tensor(result.table(["flow_width"])["flow_width"].to_pylist(), dtype=torch.float64)
    band = result.bands("flow")
    assert (band.by, band.n, band.x) == ("layer", 9, (0, 1, 2))
    for name, level in (("least", 0), ("lower", 0.25), ("median", 0.5), ("upper", 0.75), ("most", 1)):
        assert getattr(band, name) == pytest.approx(widths.quantile(level, dim=0).tolist())
    place = result.bands("mean_field", bins=5)
    assert (place.by, place.x) == ("position", (0.1, 0.3, 0.5, 0.7, 0.9))
    assert all(a <= b <= c for a, b, c in zip(place.least, place.median, place.most, strict=True))
    with pytest.raises(InputError, match="expected one of this sweep's, mean_field, proof, flow"):
        result.bands("rollout")


def test_a_file_of_rows_is_a_result_again(tiny: Any, out: Path) -> None:
    result = osl.sweep(tiny, [*texts(4), TOO_LONG], MEASURES, out)
    again = SweepResult.load(out)
    assert (again.total, again.done, again.refused) == (5, 4, 1)
    assert again.identity == result.identity
    assert again.measures == MEASURES
    assert json.loads(json.dumps(again.to_dict()))["refused"] == 1
    assert "4  done" in str(again)
    with pytest.raises(InputError, match="got column 'nothing'"):
        again.table(["nothing"])


def test_plain_pyarrow_reads_rows_and_identity(tiny: Any, out: Path) -> None:
    osl.sweep(tiny, texts(3), "mean_field", out)
    file = pyarrow.parquet.ParquetFile(out)
    assert file.schema_arrow.names == list(columns(["mean_field"]))
    identity = json.loads(file.schema_arrow.metadata[b"oversquash-lens-run"])
    assert identity["measures"] == ["mean_field"]
    assert identity["model"]["model"] == "tiny-random-llama"
    assert file.read()["mean_field_share"][0].as_py() == pytest.approx(
        osl.sweep(tiny, texts(3), "mean_field", out).table()["mean_field_share"][0].as_py()
    )


# ---------------------------------------------------------------- prompts that cannot be used


def test_what_cannot_be_used_is_a_row_and_the_rest_is_done(tiny: Any, out: Path) -> None:
    bad = [TOO_LONG, "", [5], [], None, [5, 99], [1.5, 2.5], "w5 \ud800", ["a", 3]]
    prompts = [*texts(3), *bad, *texts(3, seed=1)]
    result = osl.sweep(tiny, prompts, MEASURES, out)
    assert (result.done, result.refused) == (6, len(bad))
    rows = result.table().to_pylist()
    assert [row["status"] for row in rows] == ["done"] * 3 + ["refused"] * len(bad) + ["done"] * 3
    reasons = [row["reason"] for row in rows[3 : 3 + len(bad)]]
    words = ("n_ctx", "empty", "1 token", "shape", "NoneType", "token id 99", "float32", "surrogates", "shape ()")
    assert all(word in reason for word, reason in zip(words, reasons, strict=True)), reasons
    assert all(row["mean_field_share"] is None for row in rows if row["status"] == "refused")
    assert sum(result.reasons.values()) == len(bad)


def test_all_may_be_refused(tiny: Any, out: Path) -> None:
    result = osl.sweep(tiny, [TOO_LONG, ""], MEASURES, out)
    assert (result.done, result.refused) == (0, 2)
    with pytest.raises(InputError, match="none of 2 prompts"):
        result.bands("flow")


def test_what_memory_does_not_hold_is_refused_alone(tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = size_of(tiny)
    room = sum(batch_bytes(size, [6]).values())
    monkeypatch.setenv("OVERSQUASH_LENS_MEMORY", str(room))
    result = osl.sweep(tiny, [[5] * n for n in (2, 3, 6, 12, 3)], "mean_field", out, attention="kept")
    assert result.table()["status"].to_pylist() == ["done", "done", "done", "refused", "done"]
    (reason,) = result.reasons
    assert "recording 12 tokens" in reason


@pytest.mark.parametrize("failure", [MemoryError("no room"), HookMismatchError("a hook; expected none: remove it")])
def test_a_batch_that_fails_is_tried_one_by_one(
    failure: Exception, tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise failure

    def fail_at_three(model: Any, tokenized: Any, **options: Any) -> Any:
        if len(tokenized.ids) == 3:
            raise failure
        return alone(model, tokenized, **options)

    alone = work.record_tokens
    monkeypatch.setattr(work, "record_tokens_batch", fail)
    monkeypatch.setattr(work, "record_tokens", fail_at_three)
    result = osl.sweep(tiny, [[5] * n for n in (4, 3, 4, 5)], "mean_field", out)
    assert result.table()["status"].to_pylist() == ["done", "refused", "done", "done"]
    assert result.reasons == {str(failure): 1}


def test_no_prompt_at_all(tiny: Any, out: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got no prompt"):
        osl.sweep(tiny, [], MEASURES, out)
    (tmp_path / "empty.txt").write_text("\n  \n")
    with pytest.raises(InputError, match="holds no prompt"):
        osl.sweep(tiny, tmp_path / "empty.txt", MEASURES, out)
    assert not out.exists()


def test_a_measure_that_this_model_has_not_is_refused_and_the_others_are_measured(out: Path, parts: Path) -> None:
    if lacking("mixtral", "bridge"):
        pytest.skip(NO_BRIDGE)
    model = zoo("mixtral", "bridge")
    with pytest.raises(ModelError, match="calibrated was asked of"):
        osl.sweep(model, texts(3), ["calibrated", "calibrated_full"], out)
    assert not out.exists()
    assert not parts.exists()
    rows = osl.sweep(model, texts(3), ["mean_field", "calibrated"], out).table().to_pylist()
    assert [row["status"] for row in rows] == ["done"] * 3
    assert all("calibrated: a mixture of experts" in row["reason"] for row in rows)
    assert all(row["calibrated_share"] is None and sum(row["mean_field_share"]) == pytest.approx(1) for row in rows)


# ---------------------------------------------------------------- stopped, and gone on with


class StoppedError(Exception):
    pass


def stopped(*arguments: Any, after: int, **options: Any) -> None:
    """A sweep that is stopped when so many parts are written."""
    whole, counted = work._batch_rows, []

    def rows(*given: Any) -> Any:
        if len(counted) == after:
            raise StoppedError
        counted.append(1)
        return whole(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "_batch_rows", rows)
        with pytest.raises(StoppedError):
            osl.sweep(*arguments, **options)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("after", [0, 1, 3])
def test_the_next_call_goes_on(after: int, tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [*texts(14), TOO_LONG]
    stopped(tiny, prompts, MEASURES, out, after=after)
    assert not out.exists()
    seen = []
    whole = work._batch_rows
    monkeypatch.setattr(work, "_batch_rows", lambda m, batch, e: seen.extend(batch) or whole(m, batch, e))
    result = osl.sweep(tiny, prompts, MEASURES, out)
    assert result.reused == 15 - len(seen)
    assert (result.reused > 1) == (after > 0)
    exactly_once(result, prompts)
    same_rows(result.table(), osl.sweep(tiny, prompts, MEASURES, out.with_name("other.parquet")).table(), 1e-6)


def test_a_finished_sweep_runs_nothing(tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = texts(5)
    first = osl.sweep(tiny, prompts, MEASURES, out)
    monkeypatch.setattr(work, "_batch_rows", None)
    before = out.read_bytes()
    again = osl.sweep(tiny, prompts, MEASURES[::-1], out)
    assert (again.reused, again.done) == (5, 5)
    assert out.read_bytes() == before
    assert again.identity == first.identity


@pytest.mark.usefixtures("small_batches")
def test_rows_that_are_there_twice_count_once(tiny: Any, out: Path, parts: Path) -> None:
    prompts = texts(8)
    stopped(tiny, prompts, MEASURES, out, after=2)
    (one, *_) = sorted(parts.glob("*.parquet"))
    (parts / f"000000-{'f' * 32}.parquet").write_bytes(one.read_bytes())
    exactly_once(osl.sweep(tiny, prompts, MEASURES, out), prompts)


@pytest.mark.usefixtures("small_batches")
def test_killed_between_the_file_and_the_tidying(tiny: Any, out: Path, parts: Path) -> None:
    prompts = texts(8)
    stopped(tiny, prompts, MEASURES, out, after=2)
    kept = {path.name: path.read_bytes() for path in parts.iterdir()}
    osl.sweep(tiny, prompts, MEASURES, out)
    parts.mkdir()
    for name, payload in kept.items():
        (parts / name).write_bytes(payload)
    (parts / f"{storage._DRAFT}{'0' * 32}.tmp").write_bytes(b"half")  # what was being written just then
    exactly_once(osl.sweep(tiny, prompts, MEASURES, out), prompts)


@pytest.mark.usefixtures("small_batches")
def test_a_damaged_part_and_one_that_went_missing(tiny: Any, out: Path, parts: Path) -> None:
    prompts = texts(8)
    stopped(tiny, prompts, MEASURES, out, after=2)
    (one, *_) = sorted(parts.glob("*.parquet"))
    whole = one.read_bytes()
    one.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"damaged .* delete it"):
        osl.sweep(tiny, prompts, MEASURES, out)
    one.unlink()
    exactly_once(osl.sweep(tiny, prompts, MEASURES, out), prompts)


@pytest.mark.usefixtures("small_batches")
def test_parts_that_vanish_while_it_runs(tiny: Any, out: Path, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, whole = texts(8), work._batch_rows

    def meanwhile(*given: Any) -> Any:
        for part in parts.glob("*.parquet"):
            part.unlink()
        return whole(*given)

    with monkeypatch.context() as patch:
        patch.setattr(work, "_batch_rows", meanwhile)
        with pytest.raises(InputError, match="is gone from"):
            osl.sweep(tiny, prompts, MEASURES, out)
    assert not out.exists()
    exactly_once(osl.sweep(tiny, prompts, MEASURES, out), prompts)


# ---------------------------------------------------------------- another run


def other_weights() -> Any:
    return bridge(99, "llama")


OTHERS: dict[str, tuple[str, Callable[[Any, Path], Any]]] = {
    "measures": ("measures", lambda model, out: osl.sweep(model, texts(5), "proof", out)),
    "prompts": ("prompts", lambda model, out: osl.sweep(model, texts(6), MEASURES, out)),
    "names": ("prompts", lambda model, out: osl.sweep(model, [("a", each) for each in texts(5)], MEASURES, out)),
    "seed": ("seed", lambda model, out: osl.sweep(model, texts(5), MEASURES, out, seed=1)),
    "probes": ("node_probes", lambda model, out: osl.sweep(model, texts(5), MEASURES, out, node_probes=3)),
    "BOS": ("bos", lambda model, out: osl.sweep(model, texts(5), MEASURES, out, bos=True)),
    "weights": (r"model\.weights", lambda model, out: osl.sweep(other_weights(), texts(5), MEASURES, out)),
}


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("state", ["finished", "begun"])
@pytest.mark.parametrize("other", OTHERS)
def test_another_run_is_refused_and_nothing_touched(
    other: str, state: str, tiny: Any, out: Path, tmp_path: Path
) -> None:
    if state == "finished":
        osl.sweep(tiny, texts(5), MEASURES, out)
    else:
        stopped(tiny, texts(5), MEASURES, out, after=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    what, call = OTHERS[other]
    with pytest.raises(InputError, match=rf"belongs to another run \({what}: .* give another file"):
        call(tiny, out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def steered(residual: Any, hook: Any = None) -> Any:
    return residual + 0.5 * residual.roll(1, -1)


def test_rows_of_the_plain_model_are_not_those_of_a_hooked_one(tiny: Any, out: Path) -> None:
    """A hook of the user's makes another model; without it, yesterday's rows are right again."""
    osl.sweep(tiny, texts(3), "proof", out)
    before = out.read_bytes()
    tiny.add_hook("blocks.0.hook_resid_post", steered)
    try:
        with pytest.raises(InputError, match=r"another run \(model\.hooks\.blocks\.0\.hook_out 0: nothing there"):
            osl.sweep(tiny, texts(3), "proof", out)
    finally:
        tiny.reset_hooks()
    assert osl.sweep(tiny, texts(3), "proof", out).reused == 3
    assert out.read_bytes() == before


def test_another_definition_of_a_measure_is_another_run(tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    osl.sweep(tiny, texts(3), ["proof", "flow"], out)
    monkeypatch.setitem(ALL_MEASURES, "flow", replace(ALL_MEASURES["flow"], definition=2))
    with pytest.raises(InputError, match=r"\(definitions\.flow: 1 there, 2 now\)"):
        osl.sweep(tiny, texts(3), ["proof", "flow"], out)


def test_this_librarys_version_is_recorded_and_not_compared(
    tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "oversquash-lens" in osl.sweep(tiny, texts(3), "proof", out).identity["recorded"]["versions"]
    monkeypatch.setattr(run, "software_versions", lambda: {"oversquash-lens": "99"})
    assert osl.sweep(tiny, texts(3), "proof", out).reused == 3


@pytest.mark.usefixtures("small_batches")
def test_two_sweeps_on_one_file_do_not_both_do_the_work(tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, whole, refused = texts(8), work._batch_rows, []

    def meanwhile(*given: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(work, "_batch_rows", None)
            with pytest.raises(InputError, match="another run is writing into"):
                osl.sweep(tiny, prompts, MEASURES, out)
        refused.append(1)
        return whole(*given)

    monkeypatch.setattr(work, "_batch_rows", meanwhile)
    exactly_once(osl.sweep(tiny, prompts, MEASURES, out), prompts)
    assert refused


def test_what_fails_inside_the_model_refuses_its_prompt_alone(
    tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = work.record_tokens

    def fail_at_four(model: Any, tokenized: Any, **options: Any) -> Any:
        if len(tokenized.ids) == 4:
            raise RuntimeError("sizes\ndo not match")
        return whole(model, tokenized, **options)

    monkeypatch.setattr(work, "record_tokens", fail_at_four)
    result = osl.sweep(tiny, [[5] * n for n in (2, 4, 9)], "mean_field", out)
    assert result.table()["status"].to_pylist() == ["done", "refused", "done"]
    assert result.reasons == {"RuntimeError: sizes do not match": 1}


def test_a_damaged_file_of_rows(tiny: Any, out: Path) -> None:
    """Without its column of states, with half its content, with an identity that is none."""
    result = osl.sweep(tiny, texts(3), "flow", out)
    table = result.table()
    pyarrow.parquet.write_table(table.drop_columns(["status"]), out)
    with pytest.raises(InputError, match="or a damaged one"):  # edited by another program
        SweepResult.load(out)
    out.write_bytes(sealed(out.read_bytes()))
    with pytest.raises(InputError, match="is damaged"):
        SweepResult.load(out)
    with pytest.raises(InputError, match="is damaged"):
        osl.sweep(tiny, texts(3), "flow", out)
    edited = table.set_column(2, "status", [["done", "lost", "done"]])
    identity = json.loads(table.schema.metadata[b"oversquash-lens-run"])
    for metadata, rows, said in (
        (b"[" * 100_000, table, "is no sweep's file"),
        (json.dumps(identity).encode(), edited, "a row is 'lost'"),
        (json.dumps(identity | {"measures": ["median"]}).encode(), table, "no sweep's file of this version"),
        (json.dumps(identity | {"model": "mine"}).encode(), table, "no sweep's file of this version"),
        (json.dumps(identity | {"model": {"model": 5, "class": [], "dtype": None}}).encode(), table, "of this version"),
        (json.dumps({"kind": "sweep"}).encode(), table, "no sweep's file of this version"),
    ):
        pyarrow.parquet.write_table(rows.replace_schema_metadata({b"oversquash-lens-run": metadata}), out)
        out.write_bytes(sealed(out.read_bytes()))
        with pytest.raises(InputError, match=said):
            SweepResult.load(out)


def test_a_result_says_itself_in_a_few_lines(tiny: Any, out: Path) -> None:
    result = osl.sweep(tiny, [*texts(6), TOO_LONG], MEASURES, out)
    lines = repr(result).splitlines()
    assert len(lines) <= 12
    assert "7 prompts, 6 measured, 1 refused" in lines[0]
    assert "mean_field_heard" in repr(result) + "".join(result._table()["column"])
    medians = dict(zip(result._table()["column"], result._table()["median"], strict=True))
    frame = result.to_frame()
    assert medians["mean_field_heard"] == pytest.approx(frame["mean_field_heard"].median())
    assert (len(frame), list(frame.columns)) == (7, list(result.columns))
    assert "<table>" in result._repr_html_()


def test_a_file_that_is_no_sweeps(tiny: Any, out: Path) -> None:
    for payload in (b"my notes", b""):
        out.write_bytes(payload)
        with pytest.raises(InputError, match="holds no results that this version keeps"):
            osl.sweep(tiny, texts(2), MEASURES, out)
        assert out.read_bytes() == payload
    pyarrow.parquet.write_table(pyarrow.table({"text": ["mine"]}), out)
    with pytest.raises(InputError, match="holds no results that this version keeps"):
        osl.sweep(tiny, texts(2), MEASURES, out)
    with pytest.raises(InputError, match="is no sweep's file"):
        SweepResult.load(out)


def test_a_folder_of_parts_that_is_no_sweeps(tiny: Any, out: Path, parts: Path) -> None:
    parts.mkdir()
    (parts / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds mine\.txt and no run\.json"):
        osl.sweep(tiny, texts(2), MEASURES, out)
    assert [path.name for path in parts.iterdir()] == ["mine.txt"]


def test_an_empty_folder_of_parts_is_a_beginning(tiny: Any, out: Path, parts: Path) -> None:
    parts.mkdir()
    exactly_once(osl.sweep(tiny, texts(2), MEASURES, out), texts(2))


# ---------------------------------------------------------------- the disk


@pytest.mark.parametrize("place", ["no/such/folder/rows.parquet", ".", "x" * 300])
def test_places_where_nothing_can_be_written(place: str, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected"):
        osl.sweep(tiny, texts(2), MEASURES, tmp_path / place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_full_disk_keeps_what_was_done(
    at: int, tiny: Any, out: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at run.json, at the first part, at a later one; with room again the sweep goes on."""
    prompts, whole, written = texts(9), storage.replace_file, []

    def replace(target: Path, payload: bytes) -> None:
        written.append(target)
        if len(written) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(target, payload)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "replace_file", replace)
        with pytest.raises(InputError, match="No space left on device"):
            osl.sweep(tiny, prompts, MEASURES, out)
    there = sum(pyarrow.parquet.read_metadata(part).num_rows for part in parts.glob("*.parquet"))
    assert (there > 0) == (at > 2)
    result = osl.sweep(tiny, prompts, MEASURES, out)
    assert result.reused == there
    exactly_once(result, prompts)


def test_a_full_disk_at_the_end(tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = storage.replace_file

    def replace(target: Path, payload: bytes) -> None:
        if target == out:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(target, payload)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "replace_file", replace)
        with pytest.raises(InputError, match="No space left on device"):
            osl.sweep(tiny, texts(5), MEASURES, out)
    result = osl.sweep(tiny, texts(5), MEASURES, out)
    assert result.reused == 5
    exactly_once(result, texts(5))


def test_killed_at_any_moment(tmp_path: Path, record_property: Callable) -> None:
    kills = int(os.environ.get("OVERSQUASH_LENS_KILLS", "12"))
    script = Path(__file__).with_name("killed_sweeps.py")
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path), str(kills), "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    record_property("bad days", json.dumps({"killed": told["killed"], "out of room": 0}))
    assert told["killed"] == kills
    assert told["wrong"] == []


# ---------------------------------------------------------------- how it goes about it


def ready(model: Any, lengths: list[int]) -> list[Any]:
    effort = work.Effort(("mean_field",))
    return [
        (each, work._tokenized(Subject.of(model), each, effort)) for each in read_prompts([[5] * n for n in lengths])
    ]


def test_batches_hold_similar_lengths_within_memory(tiny: Any) -> None:
    lengths = [2, 3, 16, 4, 3, 2, 15, 9, 9, 9, 2]
    size, prompts = size_of(tiny), ready(tiny, [2, 3, 16, 4, 3, 2, 15, 9, 9, 9, 2])
    for memory in (10**12, sum(batch_bytes(size, [9, 9]).values()), 0):
        found = list(work.batches(Subject.of(tiny), prompts, memory))
        assert sorted(each.index for batch in found for each, _ in batch) == list(range(len(lengths)))
        for batch in found:
            sizes = [len(tokens.ids) for _, tokens in batch]
            assert len(sizes) * max(sizes) <= work.WASTE * sum(sizes)
            assert len(batch) == 1 or sum(batch_bytes(size, sizes).values()) <= memory
    assert len(found) == len(lengths)  # no memory: each alone
    many = list(work.batches(Subject.of(tiny), ready(tiny, [5] * 40), 10**12))
    assert [len(batch) for batch in many] == [16, 16, 8]


def test_the_model_by_name(tmp_path: Path, out: Path) -> None:
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    folder = model_folder(tmp_path / "model")
    by_name = osl.sweep(str(folder), texts(4), MEASURES, out, load={"kind": "bridge", "device_map": "cpu"})
    held = osl.load_model(folder, kind="bridge")
    assert osl.sweep(held, texts(4), MEASURES, out).reused == 4  # the same weights, so the same run
    assert by_name.done == 4
    with pytest.raises(InputError, match=r"got load=.* with a TransformerBridge"):
        osl.sweep(held, texts(4), MEASURES, out, load={"kind": "bridge"})


def test_a_sweep_where_the_model_is(out: Path) -> None:
    """On a pretended accelerator nothing of ours mixes its tensors with the CPU's."""
    name, kind = next(cell for cell in (("llama", "bridge"), ("llama", "hooked")) if lacking(*cell) is None)
    model = zoo(name, kind, dtype=torch.float32)
    with Elsewhere() as there:
        there.move(model)
        result = osl.sweep(model, [[5, 6, 7], [8, 9], [3, 4, 5, 6]], ["mean_field", "proof", "flow", "truth"], out)
    assert result.done == 3
    assert not there.mixed, sorted(there.mixed)


def test_ray_wants_a_name_and_its_extra(tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"got a TransformerBridge as the model with ray='auto'.* give its name"):
        osl.sweep(tiny, texts(2), MEASURES, out, ray="auto")
    with pytest.raises(InputError, match="expected 'auto', or the address"):
        osl.sweep("a-name", texts(2), MEASURES, out, ray="")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'oversquash-lens\[ray\]'"):
        osl.sweep("a-name", texts(2), MEASURES, out, ray="auto")


def test_measures_are_names_of_the_table() -> None:
    assert checked_measures("flow") == ("flow",)
    assert checked_measures(["truth", "mean_field", "truth"]) == ("mean_field", "truth")
    for wrong in ([], "", ["no such"], 7, [7], None):
        with pytest.raises(InputError, match="mean_field, proof"):
            checked_measures(wrong)
    names = list(columns(tuple(ALL_MEASURES)))
    assert len(names) == len(set(names))


def test_a_plan_counts_and_forecasts(tiny: Any) -> None:
    prompts = read_prompts([*([5] * n for n in (2, 4, 8, 16)), TOO_LONG, ""])
    plan = sweep_plan(tiny, prompts, ("mean_field", "flow", "truth"), probes=2)
    assert (plan.prompts, plan.refused, plan.shortest, plan.median, plan.longest, plan.tokens) == (6, 2, 2, 8, 16, 30)
    assert plan.fits
    assert 0 < plan.seconds < math.inf
    assert "2 cannot be used" in str(plan)
    assert "none of the 1 prompts" in str(sweep_plan(tiny, read_prompts([""]), ("mean_field",)))
