"""`oversquash-lens sweep`: what it prints and writes, and how it asks for a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import N_CTX
from small_sweeps import exactly_once, texts

import oversquash_lens as osl
from oversquash_lens.sweeps.result import SweepResult


@pytest.fixture
def prompts(tmp_path: Path) -> tuple[str, list[str]]:
    """A file of prompts, one of them too long, and what it holds."""
    found = [*texts(6), "w5 " * (N_CTX + 1) + "w6"]
    (tmp_path / "prompts.txt").write_text("\n".join(found))
    return str(tmp_path / "prompts.txt"), found


def test_a_sweep_from_the_command_line(on_tiny: Callable, prompts: tuple[str, list[str]]) -> None:
    file, found = prompts
    first = on_tiny("sweep", "--prompts-file", file, "--measures", "mean_field, proof,flow", "--figure", "bands.png")
    assert first.code == 0, first.err
    for line in ("7  total", "6  done", "1  refused", "0  reused", "refused: expected at most n_ctx"):
        assert line in first.out
    exactly_once(SweepResult.load("sweep.parquet"), found)
    assert Path("bands.png").read_bytes().startswith(b"\x89PNG")
    again = on_tiny("sweep", "--prompts-file", file, "--measures", "flow,mean_field,proof", "--json")
    told = json.loads(again.out)
    assert (told["kind"], told["reused"], told["done"], told["refused"]) == ("sweep", 7, 6, 1)
    other = on_tiny("sweep", "--prompts-file", file, "--measures", "flow")
    assert (other.code, other.out) == (2, "")
    assert "belongs to another run (measures:" in other.err


def test_a_plan_runs_nothing(on_tiny: Callable, prompts: tuple[str, list[str]]) -> None:
    found = on_tiny("sweep", "--prompts-file", prompts[0], "--plan")
    assert found.code == 0, found.err
    assert "6 prompts of" in found.out
    assert "1 cannot be used" in found.out
    told = json.loads(on_tiny("sweep", "--prompts-file", prompts[0], "--plan", "--json").out)
    assert (told["kind"], told["prompts"], told["refused"], told["fits"]) == ("sweep plan", 7, 1, True)
    assert not list(Path().iterdir())


def test_nothing_could_be_measured(on_tiny: Callable, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("w5 " * 40)
    found = on_tiny("sweep", "--prompts-file", str(tmp_path / "long.txt"), "--figure", "bands.png")
    assert found.code == 2
    assert "none of the 1 prompts could be measured" in found.err
    assert [path.name for path in Path().iterdir()] == ["sweep.parquet"]


def test_options_reach_the_sweep(
    on_tiny: Callable, prompts: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}
    done = osl.sweep(on_tiny_model(on_tiny, prompts[0]), texts(2), "flow", tmp_path / "done.parquet")

    def sweep(model: Any, prompts: Any, measures: Any, out: Any, **options: Any) -> Any:
        asked.update(options, model=model, measures=measures, out=out)
        return done

    monkeypatch.setattr("oversquash_lens.sweeps.run.sweep", sweep)
    on_tiny("sweep", "--prompts-file", prompts[0], "--no-bos", "--seed", "4", "--verify", "--probes", "3")
    assert (asked["bos"], asked["seed"], asked["verify"], asked["probes"]) == (False, 4, True, 3)
    assert asked["model"] is on_tiny_model(on_tiny, prompts[0])
    assert (asked["measures"], asked["out"], asked["ray"]) == (("mean_field", "flow"), "sweep.parquet", None)
    on_tiny.asked = None
    options = (
        "--ray",
        "auto",
        "--device-map",
        "auto",
        "--dtype",
        "bfloat16",
        "--model",
        "some/name",
        "--out",
        "o.parquet",
    )
    on_tiny("sweep", "--prompts-file", prompts[0], *options)
    assert (asked["model"], asked["ray"], asked["out"]) == ("some/name", "auto", "o.parquet")
    assert asked["load"] == {"kind": "auto", "dtype": "bfloat16", "device_map": "auto"}
    assert on_tiny.asked is None, "with Ray the workers load the model, not we"


def on_tiny_model(on_tiny: Callable, file: str) -> Any:
    """The model that stands in for the default."""
    from oversquash_lens.models import loading

    return loading.load_model("smollm2-135m")
