"""What the benchmark table is made of: its peers compute what they say, its numbers are judged and printed right."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import NO_BRIDGE, NO_HOOKED, bridge, has_bridge, has_hooked, hooked, tokens_for
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import oversquash_lens as osl  # noqa: E402
from benchmarks import gpu, peers, table  # noqa: E402
from benchmarks.__main__ import cells, page, put  # noqa: E402
from benchmarks.cells import Cell, Results  # noqa: E402
from benchmarks.long_text import OPENING, QUESTION, long_prompt, long_text  # noqa: E402
from benchmarks.machine import in_words, machine  # noqa: E402
from benchmarks.timing import peak_bytes, seconds  # noqa: E402

LENGTHS = (512, 2048, 8192)


def causal(seed: int, heads: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(heads, n, n, generator=generator, dtype=torch.float64)
    return scores.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf).softmax(-1)


# -- peers ---------------------------------------------------------------------------------------------------


def test_rollout_by_full_products_is_our_row():
    if not has_hooked():
        pytest.skip(NO_HOOKED)
    trace = osl.record(hooked(3, n_layers=3, n_heads=4, d_model=16), tokens_for(1, 9))
    patterns = [layer.rows(0, 9).double() for layer in trace.attention]
    ours = osl.path_bound(trace, "rollout")
    torch.testing.assert_close(peers.rollout(patterns).double(), ours.share, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_contributions_are_altis_formula_term_by_term(seed):
    """Brute force: every transformed vector on its own, distances in L1, as the paper writes them."""
    heads, n, d = 3, 5, 4
    generator = torch.Generator().manual_seed(seed)
    pattern = causal(seed, heads, n)
    written = torch.randn(n, heads, d, generator=generator, dtype=torch.float64)
    residual = torch.randn(n, d, generator=generator, dtype=torch.float64)
    bias = torch.randn(d, generator=generator, dtype=torch.float64)
    found = peers.contributions(pattern, written, residual, bias)
    for i in range(n):
        parts = [sum(pattern[h, i, j] * written[j, h] for h in range(heads)) for j in range(i + 1)]
        parts[i] = parts[i] + residual[i]
        whole = sum(parts) + bias
        near = [max(0.0, (whole.abs().sum() - (whole - part).abs().sum()).item()) for part in parts]
        assert found[i, : i + 1].tolist() == pytest.approx([each / sum(near) for each in near])
        assert not found[i, i + 1 :].any()


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_alti_and_cached_rollout_are_distributions_on_both_classes(kind):
    if not (has_hooked() if kind == "hooked" else has_bridge()):
        pytest.skip(NO_HOOKED if kind == "hooked" else NO_BRIDGE)
    made = {"hooked": lambda: hooked(5, kv_heads=1, dtype=torch.float32), "bridge": lambda: bridge(5)}
    model, tokens = made[kind](), tokens_for(2, 7)[0]
    for row in (peers.alti(model.to(torch.float32), tokens), peers.rollout(peers.cached_patterns(model, tokens))):
        assert row.shape == (7,)
        assert (row >= 0).all()
        assert row.sum().item() == pytest.approx(1, abs=1e-5)


def test_alti_of_one_layer_is_read_off_the_cache():
    if not has_hooked():
        pytest.skip(NO_HOOKED)
    model, tokens = hooked(6, n_layers=1, n_heads=2, dtype=torch.float32), tokens_for(3, 6)[0]
    _, cache = model.run_with_cache(tokens[None])
    written = torch.einsum("phe,hed->phd", cache["blocks.0.attn.hook_v"][0], model.blocks[0].attn.W_O)
    expected = peers.contributions(
        cache["blocks.0.attn.hook_pattern"][0], written, cache["blocks.0.hook_resid_pre"][0]
    )[-1]
    torch.testing.assert_close(peers.alti(model, tokens), expected)


def test_gradient_times_input_is_the_derivative_along_the_embedding():
    """f(e_i·(1+t)) at t = 0, by central differences."""
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    from small_models import _llama

    torch.manual_seed(1)
    model, tokens = _llama(2, 16).double().eval(), tokens_for(4, 5)[0]
    found = peers.gradient_times_input(model, tokens)
    embedded = model.get_input_embeddings()(tokens[None]).detach()
    top = model(inputs_embeds=embedded).logits[0, -1].argmax()
    for i in range(5):
        change = torch.zeros_like(embedded)
        change[0, i] = 1e-2 * embedded[0, i]
        up, down = (model(inputs_embeds=embedded + sign * change).logits[0, -1, top].item() for sign in (1, -1))
        assert found[i].item() == pytest.approx((up - down) / 2e-2, rel=0.01, abs=1e-5)  # norms are in float32


# -- the table -----------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path) -> Results:
    """A run whose every number one can recompute: the lens takes 1.4 of the own pass and 1.9 of the fused one."""
    made = Results(tmp_path / "cells.json", {"cpu": "A chip", "cores": 2, "threads": 1, "torch": "2"})
    for cell in cells(["bridge", "hooked"], list(LENGTHS), 2, {"inseq": "not installed"}):
        made.add(cell.name, made_up(cell))
    return made


def made_up(cell: Cell) -> dict:
    work = (cell.n / 512) ** 1.5
    if cell.what == "memory":
        extra = {"forward": 1.0, "fused": 0.8, "lens": 1.1, "recomputed_row": 0.1, "cached_rollout": 1.0}
        before = 5 * 10**8
        peak = before + round(extra.get(cell.steps[0], 0.5) * 1e8 * cell.n / 512)
        return {"before": before, "peak": peak, "took": 77.0}
    each = {"forward": 1.0, "fused": 1.4 / 1.9, "record": 1.0, "sweep": 0.4, "row": 0.05, "rollout": 0.6}
    return {"seconds": {step: [each.get(step, 1.0) * work] * cell.repeats for step in cell.steps}}


def test_ratios_and_their_targets_stand_in_the_table(results):
    text = page(results, ["bridge", "hooked"], list(LENGTHS), 2, {"inseq": "not installed"})
    row = next(line for line in text.splitlines() if line.startswith("| HookedTransformer | 512"))
    assert "| 1.40 (≤ 1.6, met) | 1.90 (≤ 2.5, met) |" in row
    long = next(line for line in text.splitlines() if line.startswith("| TransformerBridge | 8,192"))
    assert "| – |" in long
    assert "1.90 (≤ 2, met)" in long
    assert "12.0 (≥ 10, met) times as long" in text
    assert "10.0 (≥ 5, met) times the extra memory" in text
    assert "time grows as n^1.50, the fused pass’s as n^1.50 (n = 2,048 to 8,192): met" in text
    assert "A chip, 2 cores, 1 thread, torch 2" in text
    assert "not installed" in text
    alti = next(line for line in text.splitlines() if line.startswith("| ALTI"))
    assert alti.endswith("| 77.0 s | 0.05 GB | 77.0 s | 0.20 GB |")


def test_what_failed_is_said_and_asked_again(results):
    cell = Cell("memory", "bridge", 512, ("lens",))
    results.add(cell.name, {"failed": "OutOfMemory: 3 GB"})
    assert results.bytes("bridge", 512, "lens") == {}
    assert "OutOfMemory: 3 GB" in page(results, ["bridge"], list(LENGTHS), 2, {})


def test_results_of_another_machine_are_left_out(results):
    again = Results(results.path, results.machine)
    assert again.cells == results.cells
    assert Results(results.path, results.machine | {"cores": 64}).cells == {}
    assert Results(results.path, results.machine, again=True).cells == {}
    assert json.loads(results.path.read_text())["machine"]["cores"] == 2


@pytest.mark.parametrize("name", ["table", "machine", "peers", "__main__"])
def test_the_examples_in_the_docstrings_hold(name):
    found = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert found.attempted
    assert not found.failed


def test_exponents_are_fitted_and_rows_are_even():
    for power in (0.7, 1.0, 2.0):
        assert table.exponent((2048, 3 * 2048.0**power), (8192, 3 * 8192.0**power)) == pytest.approx(power)
    lines = table.markdown([("a", "b", "c"), ("1", "2", "3")], words=1).splitlines()
    assert lines == ["| a | b | c |", "|---|---:|---:|", "| 1 | 2 | 3 |"]


def test_a_median_of_ratios_is_taken_within_rounds():
    assert table.ratio([10.0, 1.0, 3.0], [5.0, 1.0, 2.0]) == 1.5
    assert table.ratio([], [1.0]) is None


def test_the_readme_takes_the_table_between_its_marks():
    assert put("x <!-- benchmarks -->\nold\n<!-- /benchmarks --> y", r"new \1") == (
        "x <!-- benchmarks -->\nnew \\1\n<!-- /benchmarks --> y"
    )
    with pytest.raises(SystemExit, match="expected both marks"):
        put("nothing", "new")
    assert "<!-- benchmarks -->" in (ROOT / "README.md").read_text("utf-8")


# -- measuring -----------------------------------------------------------------------------------------------


def test_peak_and_seconds_are_those_of_the_step():
    before, peak = peak_bytes(lambda: torch.ones(40_000_000).sum())
    assert 1.2e8 < peak - before < 4e8
    assert seconds(lambda: None) >= 0


def test_the_machine_is_named():
    found = machine(2)
    assert found["torch"] == torch.__version__
    assert "2 threads" in in_words(found)


def test_a_cell_is_measured_in_a_process_of_its_own_from_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--readme" in done.stdout


def test_the_gpu_script_runs_on_the_cpu(capsys):
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    device = torch.device("cpu")
    rows = gpu.rows_of("tiny", [32], device, 1, gpu.speeds_of(device, 64, 1 << 16))
    assert [row[:2] for row in rows] == [("tiny", "32")]
    assert all(len(row) == 8 for row in rows)


# -- the long text -------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of words, each with the white space before it."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str) -> dict:
        import re

        return {"input_ids": [self.known.setdefault(word, len(self.known)) for word in re.findall(r"\s*\S+", text)]}


@pytest.mark.parametrize("n", [300, 1000, 8192])
def test_a_long_text_fits_and_asks_for_its_beginning(n):
    words = Words()
    text = long_text(words, n)
    assert n - 150 < len(words(text)["input_ids"]) <= n
    assert text.startswith(OPENING)
    assert text.endswith(QUESTION)
    assert text == long_text(words, n)
    assert "Merry Agnes" in text
    assert "{" not in text


@pytest.mark.parametrize("n", [8, 100, 2048])
def test_a_long_prompt_has_exactly_so_many_tokens(n):
    words = Words()
    ids = long_prompt(words, n)
    assert len(ids) == n
    assert ids[-4:] == words(QUESTION)["input_ids"][-4:]


# -- all of them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_finds_what_it_imports(path: Path) -> None:
    assert importlib.import_module(f"benchmarks.{path.stem}").__doc__ or path.stem == "__init__"
