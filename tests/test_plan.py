"""Memory and time planned before a run: right in what is counted, and nothing is begun that would not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import bridge, has_bridge, has_hooked, hooked, tokens_for

import oversquash_lens as osl
from oversquash_lens import memory as memory_module
from oversquash_lens.analyses.courses import MEASURES
from oversquash_lens.analyses.plan import SMALL, plan_collapse
from oversquash_lens.capture.architecture import read_architecture
from oversquash_lens.capture.hooked_model import check_recording, size_of
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import tokenize
from oversquash_lens.errors import InputError
from oversquash_lens.jacobian import routes
from oversquash_lens.jacobian.measured import MEMORY
from oversquash_lens.jacobian.products import differentiate
from oversquash_lens.memory import BASE, MEMORY_VARIABLE, Size, available_bytes, in_words, kept_bytes, parse_bytes
from oversquash_lens.results import duration

SMOLLM2 = Size(30, 9, 3, 64, 576, 1536, 3, 49152, 4, "bridge")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """memory(amount): what there is from now on."""
    return lambda amount: monkeypatch.setenv(MEMORY_VARIABLE, str(amount))


# ---------------------------------------------------------------- what there is


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("1.5 GB", 1.5e9), ("2MiB", 2 << 20), ("800M", 8e8), ("1e9", 1e9), ("3 kib", 3072), ("1TB", 1e12)],
)
def test_amounts_as_people_write_them(text: str, size: float, memory: Callable) -> None:
    assert parse_bytes(text) == size
    memory(text)
    assert available_bytes() == size


@pytest.mark.parametrize("text", ["much", "-1", "1.5.2 GB", "GB", "1 PB", "5 i", "1" * 1000 + "x"])
def test_other_amounts_are_refused(text: str, memory: Callable) -> None:
    memory(text)
    with pytest.raises(
        InputError, match=r"expected an amount of memory, got OVERSQUASH_LENS_MEMORY=.*: write 12GB"
    ) as raised:
        available_bytes()
    assert len(str(raised.value)) < 300


def write_cgroup(folder: Path, limit: object, used: int, names: tuple[str, str], stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(stat)


VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
VERSION_2 = ("memory.max", "memory.current")


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """cgroups(what /proc/self/cgroup says) -> the folder that stands for /sys/fs/cgroup; 8 GB are free beside."""
    import psutil

    monkeypatch.delenv(MEMORY_VARIABLE, raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8_000_000_000))
    monkeypatch.setattr(memory_module, "_process_limits", list)
    monkeypatch.setattr(memory_module, "_CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(memory_module, "_OWN_CGROUP", tmp_path / "own")

    def cgroups(said: str) -> Path:
        (tmp_path / "own").write_text(said)
        return tmp_path / "fs"

    return cgroups


def test_the_machine_is_asked_where_there_is_no_container(cgroups: Callable) -> None:
    assert available_bytes() == 8_000_000_000  # not even the file is there
    write_cgroup(cgroups("0::/\n"), "max", 5, VERSION_2)
    assert available_bytes() == 8_000_000_000


def test_a_container_leaves_what_its_limit_leaves(cgroups: Callable) -> None:
    write_cgroup(cgroups("0::/a/b\n") / "a/b", 3_000_000_000, 1_000_000_000, VERSION_2, "anon 7\ninactive_file 250\n")
    assert available_bytes() == 2_000_000_250


def test_the_narrowest_of_nested_containers_counts(cgroups: Callable) -> None:
    root = cgroups("0::/a/b\n")
    write_cgroup(root / "a", 2_000_000_000, 1_500_000_000, VERSION_2)
    write_cgroup(root / "a/b", 3_000_000_000, 1_000_000_000, VERSION_2)
    assert available_bytes() == 500_000_000


def test_containers_of_the_first_version(cgroups: Callable) -> None:
    root = cgroups("5:cpu:/x\n4:memory:/x\n")
    write_cgroup(root / "memory", 2**63 - 4096, 9, VERSION_1)
    assert available_bytes() == 8_000_000_000
    write_cgroup(root / "memory/x", 900_000_000, 200_000_000, VERSION_1, "total_inactive_file 100\n")
    assert available_bytes() == 700_000_100


def test_a_container_beyond_its_limit_leaves_nothing(cgroups: Callable) -> None:
    write_cgroup(cgroups("0::/a\n") / "a", 100, 200, VERSION_2)
    assert available_bytes() == 0


def test_the_process_has_a_limit_too(cgroups: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroups("")
    monkeypatch.setattr(memory_module, "_process_limits", lambda: [123])
    assert available_bytes() == 123


def test_an_accelerator_is_asked_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MEMORY_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert available_bytes("cuda") == 1400  # what torch holds but does not use is there as well


# ---------------------------------------------------------------- what is counted


def both_kinds() -> list[Any]:
    made = [bridge(3, "llama")] if has_bridge() else []
    return made + ([hooked(4, n_heads=4, d_model=16, kv_heads=2)] if has_hooked() else [])


def test_a_model_tells_its_shapes() -> None:
    for model in both_kinds():
        size, architecture = size_of(model), read_architecture(model)
        assert (size.n_layers, size.n_heads, size.d_model) == (
            architecture.n_layers,
            architecture.n_heads,
            architecture.d_model,
        )
        assert (size.n_kv_heads, size.d_mlp) == (architecture.n_kv_heads, architecture.d_mlp)
        assert size.itemsize == architecture.dtype.itemsize
        assert size.matrices == (3 if architecture.gated else 2)
        matrices = [p for name, p in model.blocks.named_parameters() if p.ndim > 1]
        assert size.layer_weights * size.n_layers == pytest.approx(sum(p.numel() for p in matrices), rel=0.2)


def test_a_trace_is_as_large_as_was_said() -> None:
    for model in both_kinds():
        trace = osl.record(model, tokens_for(5, 12), attention="kept")
        patterns = sum(each.pattern.numel() * each.pattern.element_size() for each in trace.attention)
        said = kept_bytes(size_of(model), 12)["the attention patterns of all layers"]
        assert patterns <= said <= 1.2 * patterns


def test_patterns_grow_with_the_square_and_are_named() -> None:
    parts = kept_bytes(SMOLLM2, 4096)["the attention patterns of all layers"]
    assert 30 * 9 * 4096**2 * 4 <= parts <= 1.2 * 30 * 9 * 4096**2 * 4  # 18 GB
    assert kept_bytes(SMOLLM2, 2048)["the attention patterns of all layers"] * 4 == pytest.approx(parts)
    half = replace(SMOLLM2, itemsize=2)
    assert kept_bytes(half, 4096)["the attention patterns of all layers"] * 2 == pytest.approx(parts)


def test_a_backward_product_is_reckoned_as_the_truth_reckons_it() -> None:
    for model in both_kinds():
        architecture = read_architecture(model)
        widest = max(4 * architecture.n_heads * 9 * 9, 4 * 9 * architecture.d_mlp)
        expected = (widest + 6 * 9 * architecture.d_model) * architecture.dtype.itemsize
        tape = differentiate(Subject.of(model), tokenize(model, tokens_for(5, 9)))
        assert routes.product_bytes(size_of(model), 9) == tape.bytes_per_product == expected


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_is_planned(measure: str) -> None:
    for model in both_kinds():
        short, long = (osl.plan(model, n, measure, new_tokens=2, clock=clock(1.0)) for n in (4, 12))
        assert 0 < short.bytes < long.bytes
        assert short.passes >= 1
        assert short.seconds > 0
        assert short.bytes == sum(short.parts.values())
        assert short.seconds == pytest.approx(sum(short.steps.values()))
        assert short.verdict == "fits"
        assert json.loads(json.dumps(short.to_dict()))["sentence"] == short.sentence
        for said in (*short.parts, *short.steps, short.fullest, short.sentence):
            assert said in str(short)
        assert len(repr(short).splitlines()) <= 12
        assert list(short.to_frame()["what"]) == [*_largest_first(short.parts), *_largest_first(short.steps)]


def _largest_first(parts: Any) -> list[str]:
    return sorted(parts, key=lambda name: -parts[name])


def test_a_prompt_is_counted_as_it_is_read() -> None:
    for model in both_kinds():
        by_ids = osl.plan(model, tokens_for(5, 7), "record")
        assert by_ids.n == 7
        assert by_ids.bytes == osl.plan(model, 7, "record").bytes


def test_the_exact_truth_takes_longer_than_probes() -> None:
    for model in both_kinds():
        exact, some = (osl.plan(model, 8, "truth", probes=probes, clock=clock(1.0)) for probes in (None, 2))
        assert exact.seconds > some.seconds
        assert exact.probes is None


def test_norms_of_the_weights_are_counted_once() -> None:
    for model in both_kinds():
        step = "norms of the weights, once per model"
        assert step in osl.plan(model, 8, "record").steps
        osl.record(model, tokens_for(5, 6))
        assert step not in osl.plan(model, 8, "record").steps


@pytest.mark.parametrize("came", [0, 1, 10**6, -3])
def test_lengths_that_the_model_does_not_read_are_refused(came: int) -> None:
    for model in both_kinds():
        with pytest.raises(InputError, match=f"expected 2 … .*, got {came} tokens"):
            osl.plan(model, came)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"measure": "magic"}, "expected one of forward, record, .*, got measure 'magic'"),
        ({"probes": 0}, "got probes=0"),
    ],
)
def test_other_questions_are_refused(options: dict, said: str) -> None:
    for model in both_kinds():
        with pytest.raises(InputError, match=said):
            osl.plan(model, 8, **options)


@pytest.mark.parametrize("measure", MEASURES)
def test_one_small_pass_is_run_and_no_other(measure: str) -> None:
    for model in both_kinds():
        lengths = []
        handle = model.embed.register_forward_pre_hook(
            lambda embed, inputs, read=lengths: read.append(inputs[0].numel())
        )
        osl.support(model)  # the model is proven, with this hook
        lengths.clear()
        osl.plan(model, model.cfg.n_ctx, measure)
        handle.remove()
        assert lengths == [2, min(SMALL, model.cfg.n_ctx)]


# ---------------------------------------------------------------- how long


def test_seconds_are_those_of_a_small_pass_times_its_work() -> None:
    """A clock that ticks once per look makes the small pass one second long."""
    for model in both_kinds():
        size = size_of(model)
        found = osl.plan(model, 12, "truth", probes=3, clock=clock(1.0))
        assert found.seconds == pytest.approx(found.passes)  # the small pass is one of these 12 tokens
        back = size.pass_operations(12) + size.attention_operations(12)
        assert found.passes == pytest.approx(1 + 3 * back / size.pass_operations(12))


def test_a_pass_grows_by_tokens_and_by_pairs_of_tokens() -> None:
    one, two, four = (SMOLLM2.pass_operations(n) - SMOLLM2.logits_operations(1) for n in (1024, 2048, 4096))
    per_token = 30 * (576 * 64 * 24 + 3 * 576 * 1536)
    assert one == 1024 * per_token + 2 * 30 * 9 * 64 * 1024**2
    assert four - 2 * two == 4 * (two - 2 * one)


def test_a_slower_machine_is_planned_slower() -> None:
    for model in both_kinds():
        fast, slow = (osl.plan(model, 8, "bound", clock=clock(step)) for step in (0.001, 1.0))
        assert slow.seconds == pytest.approx(1000 * fast.seconds)


def test_what_is_done_several_times_takes_several_times_as_long() -> None:
    for model in both_kinds():
        for measure in MEASURES:
            osl.record(model, tokens_for(5, 6))  # norms of the weights are known from here on
            once, thrice = (osl.plan(model, 8, measure, times=times, clock=clock(1.0)) for times in (1, 3))
            assert thrice.seconds == pytest.approx(
                (2 if measure == "what_if" else 3) * once.seconds
            )  # prompt and edits
            assert thrice.bytes == once.bytes


def test_a_collapse_curve_is_planned_by_the_tokens_that_are_run() -> None:
    """Prompts that begin one another share a pass: [1, 2, 3, 3] holds all of these, and runs once in each format."""
    for model in both_kinds():
        pairs = [((1, 2), (1, 2, 2)), ((1, 2, 3), (1, 2, 3, 3))]
        found = plan_collapse(model, pairs, ("float32", "float64"), clock=clock(1.0))
        assert (found.measure, found.n) == ("collapse", 4)
        alone = plan_collapse(model, pairs[1:], ("float32", "float64"), clock=clock(1.0))
        assert alone.passes == 2
        assert alone.passes < found.passes <= 3 * alone.passes


def clock(step: float) -> Callable[[], float]:
    ticks = count()
    return lambda: step * next(ticks)


def test_times_and_sizes_for_people() -> None:
    assert [duration(s) for s in (0.04, 9.96, 99.4, 99.6, 5990, 7200)] == [
        "0.0 s",
        "10 s",
        "99 s",
        "2 min",
        "1.7 h",
        "2.0 h",
    ]
    assert [in_words(b) for b in (0, 999.6, 1e9, 2.5e12)] == ["0 B", "1 kB", "1 GB", "2.5 TB"]


# ---------------------------------------------------------------- what is done about it

TOO_MUCH = r"needs about [\d.]+ [MG]B of memory beyond what is in use \(.* of it for .*\), and 1 MB are there; expected"


@pytest.mark.parametrize("door", ["audit", "findings"])
def test_what_would_not_fit_is_refused_with_the_numbers(door: str, memory: Callable) -> None:
    memory("1MB")
    for model in both_kinds():
        osl.support(model)  # the model is proven
        model.forward = lambda *_, **__: pytest.fail("the model ran")
        with pytest.raises(InputError, match=TOO_MUCH) as raised:
            getattr(osl, door)(model, tokens_for(5, 12), probes=2)
        assert MEMORY_VARIABLE in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_recording_is_refused_likewise(memory: Callable) -> None:
    memory("1MB")
    for model in both_kinds():
        with pytest.raises(InputError, match=f"recording 12 tokens .* {TOO_MUCH}"):
            check_recording(model, 12)
        memory("10GB")
        check_recording(model, 12)
        memory("1MB")


def test_a_truth_without_room_for_one_product_is_refused(memory: Callable) -> None:
    memory("1MB")
    for model in both_kinds():
        with pytest.raises(
            InputError, match=r"the truth of 12 tokens needs at least .* for the graph, and 1 MB are there"
        ):
            routes.fitting_memory(Subject.of(model), 12, MEMORY)


def test_a_truth_takes_fewer_products_at_a_time_where_memory_is_short(memory: Callable) -> None:
    for model in both_kinds():
        size, ids = size_of(model), tokens_for(5, 12)
        memory("10GB")
        enough = osl.measured_sensitivity(model, ids, probes=9).values
        assert routes.fitting_memory(Subject.of(model), 12, MEMORY) == MEMORY
        one = routes.product_bytes(size, 12)
        memory(sum(routes.graph_bytes(size, 12, "blocks").values()) + 3 * one)
        lean = routes.fitting_memory(Subject.of(model), 12, MEMORY)
        assert one <= lean <= 7 * one
        assert osl.plan(model, 12, "truth", probes=64).verdict == "fits, leaner"
        few = osl.measured_sensitivity(model, ids, probes=9, memory=lean).values
        assert torch.allclose(few, enough, rtol=1e-5)


@pytest.mark.parametrize("n", [2048, 8192])
def test_the_leaner_the_route_the_less_it_holds(n: int) -> None:
    for size in (SMOLLM2, replace(SMOLLM2, kind="hooked")):
        whole, blocks, fused = (
            sum(routes.truth_bytes(size, n, 16, MEMORY, route=route).values()) for route in routes.TRUTH_ROUTES
        )
        assert whole > blocks > fused
    fused = [sum(routes.graph_bytes(SMOLLM2, n, "fused").values()) - BASE for n in (2048, 4096)]
    assert fused[1] == 2 * fused[0]  # nothing in it grows as the square


def test_a_truth_takes_the_route_that_the_memory_allows(memory: Callable) -> None:
    for model in both_kinds():
        subject, size = Subject.of(model), size_of(model)
        most = sum(routes.graph_bytes(size, 400).values()) + routes.product_bytes(size, 400)
        for amount, route in ((routes.COMFORT * most, "whole"), (routes.COMFORT * most - 1, "blocks")):
            memory(amount)
            assert routes.truth_route(subject, 400) == route
        can_fuse = size.kind == "bridge"
        assert routes.truth_route(subject, routes.FUSED_FROM) == ("fused" if can_fuse else "blocks")
        assert routes.truth_route(subject, routes.FUSED_FROM, ("norms",)) == ("fused" if can_fuse else "blocks")
        assert routes.truth_route(subject, routes.FUSED_FROM, ("attention",)) == "blocks"
        with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda value, hook: None)]):
            assert routes.truth_route(subject, routes.FUSED_FROM) == "blocks"


def test_leaner_never_means_more() -> None:
    for n in (64, 512, 2048):
        for spectral in (False, True):
            for route in routes.TRUTH_ROUTES:
                found = [routes.truth_bytes(SMOLLM2, n, 576, m, spectral, route) for m in (0, 10**8, MEMORY)]
                sums = [sum(each.values()) for each in found]
                assert sums == sorted(sums)


def test_the_verdict_says_which_way(memory: Callable) -> None:
    for model in both_kinds():
        size = size_of(model)  # so little memory that no whole graph is kept
        least = sum(routes.truth_bytes(size, 12, 1, 0, route="blocks").values())
        most = sum(routes.truth_bytes(size, 12, 64, MEMORY, route="blocks").values())
        for amount, verdict in ((most, "fits"), ((least + most) // 2, "fits, leaner"), (least - 1, "does not fit")):
            memory(amount)
            found = osl.plan(model, 12, "truth", probes=64)
            assert (found.verdict, found.fits) == (verdict, verdict != "does not fit")
            assert found.available == amount


# ---------------------------------------------------------------- --plan

PROMPT = "--token-ids=1 2 3 4 5 6"


@pytest.mark.parametrize(
    ("command", "measure"),
    [("report", "report"), ("bound", "bound"), ("audit", "audit"), ("flow", "measured_flow")],
)
def test_plan_is_printed_and_nothing_else_is_done(
    command: str, measure: str, on_tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oversquash_lens.capture.recorder.record_tokens", lambda *_, **__: pytest.fail("recorded"))
    found = on_tiny(command, PROMPT, "--plan")
    assert found.code == 0
    assert found.out.startswith(f"{measure} of 6 tokens with ")
    assert "it fits" in found.out
    assert list(Path.cwd().iterdir()) == []
    told = json.loads(on_tiny(command, PROMPT, "--plan", "--json").out)
    assert (told["kind"], told["measure"], told["n"]) == ("plan", measure, 6)
    assert told["bytes"] == sum(told["parts"].values())


def test_plan_of_many_prompts(on_tiny: Callable, smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oversquash_lens.models.loading.load_model", lambda name, **_: smollm2)
    Path("prompts.txt").write_text("One prompt here.\nAnother, which is longer than that.\n")
    found = on_tiny("report", "--prompts-file", "prompts.txt", "--plan")
    assert found.code == 0
    assert found.out.count("report of ") == 2
    assert [path.name for path in Path.cwd().iterdir()] == ["prompts.txt"]


def test_plan_says_what_would_be_refused(on_tiny: Callable, memory: Callable) -> None:
    memory("1MB")
    found = on_tiny("audit", PROMPT, "--plan")
    assert found.code == 0
    assert "1 MB are there: it does not fit" in found.out
    assert on_tiny("audit", PROMPT, "--probes=2").code == 2
