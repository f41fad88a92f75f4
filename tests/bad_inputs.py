"""What may be handed to the functions that run a model or take a trace, a flow or a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from bad_days import PROMPT, Case, World

import oversquash_lens as osl
from oversquash_lens.analyses.compare import compare
from oversquash_lens.collapse import lemmas
from oversquash_lens.collapse.families import Family
from oversquash_lens.collapse.precision import NumberFormat, computing_in, number_format
from oversquash_lens.errors import HookMismatchError, InputError, ModelError, TraceFileError
from oversquash_lens.paths.flow import flows
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.paths.squashing import count_paths, uniform_causal

Call = Callable[[World], Any]

# ---------------------------------------------------------------- a model and a prompt

PROMPTED: dict[str, Callable[[World, Any, Any], Any]] = {
    "record": lambda w, model, prompt: osl.record(model, prompt),
    "audit": lambda w, model, prompt: osl.audit(model, prompt, probes=1),
    "findings": lambda w, model, prompt: osl.findings(model, prompt, probes=1),
    "measured_sensitivity": lambda w, model, prompt: osl.measured_sensitivity(model, prompt, probes=1),
    "probe_corrected_sensitivity": lambda w, model, prompt: osl.probe_corrected_sensitivity(model, prompt),
    "report": lambda w, model, prompt: osl.report(model, prompt, w.folder / "page.html", probes=1),
    "reports": lambda w, model, prompt: osl.reports(model, [prompt], w.folder, probes=1),
    "what_if": lambda w, model, prompt: osl.what_if(model, prompt, osl.edits.window(2), probes=1),
}
BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "an empty text": ("", "empty"),
    "nothing but spaces and no BOS": ([], "(0,)"),
    "one token": ([5], "1 token"),
    "more than n_ctx": ([5] * 17, "17 tokens"),
    "floats": ([5.0, 9.0], "float32"),
    "NaN": ([math.nan, 9.0], "float32"),
    "booleans": ([True, False], "bool"),
    "a batch of two": ([[5, 9], [5, 7]], "(2, 2)"),
    "three axes": (torch.zeros(1, 1, 3, dtype=torch.long), "(1, 1, 3)"),
    "beyond the vocabulary": ([5, 50], "token id 50"),
    "a negative id": ([5, -1], "token id -1"),
    "no prompt": (None, "NoneType"),
    "bytes": (b"w5 w9", "bytes"),
    "a surrogate character": ("w5 \ud800", "surrogates"),
}
MODEL_NAMES = {"no model": "NoneType", "a model's name": "str", "transformers' own model": "GPT2LMHeadModel"}


def bad_model(world: World, which: str) -> Any:
    return {"no model": None, "a model's name": "gpt2", "transformers' own model": world.plain}[which]


def _prompted() -> list[Case]:
    def asked(name: str, prompt: Any) -> Call:
        return lambda w: PROMPTED[name](w, w.model, prompt)

    def given(name: str, which: str) -> Call:
        return lambda w: PROMPTED[name](w, bad_model(w, which), PROMPT)

    cases = []
    for name in PROMPTED:
        prompts = BAD_PROMPTS.items() if name == "record" else list(BAD_PROMPTS.items())[::3]
        cases += [Case(name, mistake, came, asked(name, prompt)) for mistake, (prompt, came) in prompts]
        cases += [Case(name, which, came, given(name, which)) for which, came in MODEL_NAMES.items()]
    return cases


MODELLED: dict[str, Call] = {
    "recording": lambda w, model: osl.recording(model).__enter__(),
    "attention_path_hooks": lambda w, model: osl.attention_path_hooks(model, {}),
    "last_token_residual_hooks": lambda w, model: osl.last_token_residual_hooks(model, {}),
    "collapse_curve": lambda w, model: osl.collapse_curve(model, lambda k: [5, 9] + [7] * k, (1, 2)),
    "edited_attention": lambda w, model: osl.edited_attention(model, osl.edits.window(2)).__enter__(),
    "families.counting": lambda w, model: osl.families.counting(model),
    "families.copying": lambda w, model: osl.families.copying(model),
    "families.separated": lambda w, model: osl.families.separated(model),
    "families.sampled_digits": lambda w, model: osl.families.sampled_digits(model),
    "families.alternating": lambda w, model: osl.families.alternating(model),
    "families.word_list": lambda w, model: osl.families.word_list(model, ["a", "b"]),
    "families.two_prompts": lambda w, model: osl.families.two_prompts(model, "w5 w9", "w5 w8"),
    "families.followed_by": lambda w, model: osl.families.followed_by(model, Family("f", lambda k: ()), "w5"),
    "reproduce": lambda w, model: osl.reproduce("5", model, w.folder),
}


def _modelled() -> list[Case]:
    def given(name: str, which: str) -> Call:
        return lambda w: MODELLED[name](w, bad_model(w, which))

    cases = []
    for name in MODELLED:
        for which, came in MODEL_NAMES.items():
            if name != "reproduce" or which == "transformers' own model":  # it takes names, and None is the default
                cases.append(Case(name, which, came, given(name, which)))
    return cases


# ---------------------------------------------------------------- a trace, a flow, a result

TRACED: dict[str, Callable[[Any], Any]] = {
    "path_bound": lambda trace: osl.path_bound(trace),
    "profiles": lambda trace: osl.profiles(trace),
    "mean_field_sensitivity": lambda trace: osl.mean_field_sensitivity(trace),
    "flow": lambda trace: osl.flow(trace),
    "flows": lambda trace: flows(trace, (0,)),
    "squashing": lambda trace: osl.squashing(trace),
    "expected_error": lambda trace: osl.expected_error(trace),
}
FLOWING: dict[str, Callable[[Any], Any]] = {
    "heaviest_edges": lambda flow: osl.heaviest_edges(flow),
    "heaviest_paths": lambda flow: osl.heaviest_paths(flow),
    "figures.flow": lambda flow: osl.figures.flow(flow),
    "figures.heads": lambda flow: osl.figures.heads(flow),
    "figures.route": lambda flow: osl.figures.route(flow),
    "figures.width": lambda flow: osl.figures.width(flow),
    "views.heads": lambda flow: osl.views.heads(flow),
    "views.route": lambda flow: osl.views.route(flow),
    "views.activations": lambda flow: osl.views.activations(flow),
}
RESULTS: dict[str, Callable[[Any], Any]] = {
    "views.positions": lambda result: osl.views.positions(result),
    "views.layers": lambda result: osl.views.layers(result),
    "views.side_by_side": lambda result: osl.views.side_by_side(result, result),
    "views.prompts": lambda result: osl.views.prompts(result, result),
    "views.what_if": lambda result: osl.views.what_if(result),
    "views.swap": lambda result: osl.views.swap(result),
    "figures.profile": lambda result: osl.figures.profile(result),
    "figures.sensitivity": lambda result: osl.figures.sensitivity(result),
    "figures.collapse": lambda result: osl.figures.collapse(result),
    "figures.chart": lambda result: osl.figures.chart(result),
    "compare": lambda result: compare(result, result),
}


def _in_words(name: str, came: str) -> str:
    """Views say "nothing" of None."""
    return "nothing" if name.startswith("views.") and came == "NoneType" else came


def _handed_over() -> list[Case]:
    def given(call: Callable[[Any], Any], make: Callable[[World], Any]) -> Call:
        return lambda w: call(make(w))

    wrong: dict[str, tuple[Callable[[World], Any], str]] = {
        "nothing": (lambda w: None, "NoneType"),
        "a path": (lambda w: "trace.safetensors", "str"),
        "a trace": (lambda w: w.trace, "Trace"),
        "a profile": (lambda w: w.profile, "PathProfile"),
    }
    tables = ((TRACED, {"a trace"}), (FLOWING, {"a path"}), (RESULTS, {"a profile", "a path"}))
    return [
        Case(name, f"{mistake} in its place", _in_words(name, came), given(call, make))
        for table, fitting in tables
        for name, call in table.items()
        for mistake, (make, came) in wrong.items()
        if mistake not in fitting
    ]


# ---------------------------------------------------------------- words and numbers


def _recorded(**options: Any) -> Call:
    return lambda w: osl.record(w.model, PROMPT, **options)


def _measured(**options: Any) -> Call:
    return lambda w: osl.measured_sensitivity(w.model, PROMPT, **options)


def _corrected(**options: Any) -> Call:
    return lambda w: osl.probe_corrected_sensitivity(w.model, PROMPT, **options)


def _what_if(*edits: Any, **options: Any) -> Call:
    return lambda w: osl.what_if(w.model, PROMPT, *(edits or (osl.edits.window(2),)), **{"probes": 1, **options})


def _bound(*arguments: Any) -> Call:
    return lambda w: osl.path_bound(w.trace, *arguments)


def _batch_of_two(w: World) -> None:
    with osl.recording(w.model):
        w.model(torch.tensor([[5, 9], [5, 7]]))


def _no_pass(w: World) -> None:
    with osl.recording(w.model) as recorder:
        pass
    recorder.trace()


def _two_passes(w: World) -> None:
    with osl.recording(w.model):
        w.model(torch.tensor([[5, 9]]))
        w.model(torch.tensor([[5, 9]]))


def _embeddings_only(w: World) -> None:
    with osl.recording(w.model) as recorder:
        pass
    del recorder
    store: dict = {}
    osl.attention_path_hooks(w.model, store)
    osl.path_products(store)


def _store(w: World, **arguments: Any) -> None:
    store: dict = {}
    w.model.run_with_hooks(torch.tensor([[5, 9, 7]] * 2), fwd_hooks=osl.attention_path_hooks(w.model, store))
    osl.path_products(store, **arguments)


def _two_pairs(first: Any, second: Any) -> Call:
    return lambda w: osl.collapse_curve(w.model, (first, second), (1,), ("float32",))


def _curve(lengths: Any = (1, 2), dtypes: Any = ("float32",), family: Any = None, **options: Any) -> Call:
    chosen = family or (lambda k: [5, 9] + [7] * k)
    return lambda w: osl.collapse_curve(w.model, chosen, lengths, dtypes, **options)


def _computing(fmt: Any, what: Callable[[World], Any] = lambda w: w.model) -> Call:
    return lambda w: computing_in(what(w), fmt).__enter__()


def _attending(model: Callable[[World], Any], edit: Any) -> Call:
    return lambda w: osl.edited_attention(model(w), edit).__enter__()


ARGUMENTS = [
    Case("record", "chat without a template", "chat=True", _recorded(chat=True)),
    Case("record", "text for a model without tokenizer", "text prompt", lambda w: osl.record(w.mute, PROMPT)),
    Case("record", "bos beside token ids", "bos=", lambda w: osl.record(w.model, [5, 9], bos=True)),
    Case("record", "no node probes", "node_probes=0", _recorded(node_probes=0)),
    Case("record", "half a node probe", "node_probes=1.5", _recorded(node_probes=1.5)),
    Case("record", "node probes as a word", "node_probes='many'", _recorded(node_probes="many")),
    Case("record", "a seed beyond 64 bits", str(2**80), _recorded(seed=2**80)),
    Case("record", "a seed that is a word", "'zero'", _recorded(seed="zero")),
    Case("recording", "a batch of two", "batch of 2", _batch_of_two),
    Case("recording", "two passes in one recording", "second time", _two_passes, HookMismatchError),
    Case("recording", "no pass in a recording", "not recorded", _no_pass, HookMismatchError),
    Case("recording", "no node probes", "node_probes=-1", lambda w: osl.recording(w.model, node_probes=-1).__enter__()),
    Case("Trace", "a path that is no file", "nowhere", lambda w: osl.Trace.load(w.folder / "nowhere"), TraceFileError),
    Case("Trace", "a folder", "is not a file", lambda w: osl.Trace.load(w.folder), TraceFileError),
    Case("Trace", "no path", "NoneType", lambda w: osl.Trace.load(None)),
    Case("Trace", "saved into no folder", "no-such", lambda w: w.trace.save(w.folder / "no-such" / "t")),
    Case("Trace", "saved onto a folder", "is a folder", lambda w: w.trace.save(w.folder)),
    Case("Trace", "saved under a number", "int", lambda w: w.trace.save(7)),
    Case("Trace", "rows that it has not", "rows 3:9", lambda w: w.trace.attention[0].rows(3, 9)),
    Case("Trace", "rows backwards", "rows 2:1", lambda w: w.trace.attention[0].rows(2, 1)),
    Case("profiles", "unknown kind", "'theorem_9'", lambda w: osl.profiles(w.trace, ["proof", "theorem_9"])),
    Case("profiles", "no kinds", "kinds=[]", lambda w: osl.profiles(w.trace, [])),
    Case("profiles", "a word for the kinds", "kinds='proof'", lambda w: osl.profiles(w.trace, "proof")),
    Case("profiles", "beta zero", "beta=0", lambda w: osl.profiles(w.trace, ["proof"], 0)),
    Case("path_bound", "unknown variant", "'theorem_9'", _bound("theorem_9")),
    Case("path_bound", "a number as variant", "variant 5", _bound(5)),
    Case("path_bound", "beta zero", "beta=0", _bound("proof", 0)),
    Case("path_bound", "beta negative", "beta=-1.0", _bound("proof", -1.0)),
    Case("path_bound", "beta NaN", "beta=nan", _bound("proof", math.nan)),
    Case("path_bound", "beta infinite", "beta=inf", _bound("proof", math.inf)),
    Case("path_bound", "beta a word", "'large'", _bound("proof", "large")),
    Case("path_bound", "beta nothing", "None", _bound("proof", None)),
    Case("path_bound", "beta for the calibrated", "beta=2.0", _bound("calibrated", 2.0)),
    Case("path_bound", "beta for rollout", "'rollout'", _bound("rollout", 1.0)),
    Case("PathProfile", "values where the constant is open", "'rollout'", lambda w: _bound("rollout")(w).values),
    Case(
        "PathProfile",
        "path products of NaN",
        "NaN",
        lambda w: PathProfile("mine", ("a", "b"), torch.full((3, 2), math.nan), 0.0),
    ),
    Case(
        "PathProfile",
        "other tokens than products",
        "(3, 2)",
        lambda w: PathProfile("mine", ("a",), torch.zeros(3, 2), 0.0),
    ),
    Case("path_products", "a store that no pass filled", "without attention", lambda w: osl.path_products({})),
    Case("path_products", "hooks that saw no pass", "without attention", _embeddings_only),
    Case("path_products", "a list", "list", lambda w: osl.path_products([])),
    Case("path_products", "two prompts, none chosen", "batch=None", lambda w: _store(w)),
    Case("path_products", "a prompt that is not there", "batch=2", lambda w: _store(w, batch=2)),
    Case("path_products", "a calibrated variant", "'calibrated'", lambda w: _store(w, variant="calibrated", batch=0)),
    Case("path_products", "beta negative", "beta=-1", lambda w: _store(w, beta=-1, batch=0)),
    Case("measured_sensitivity", "unknown norm", "'max'", _measured(norm="max")),
    Case("measured_sensitivity", "no probes", "probes=0", _measured(probes=0)),
    Case("measured_sensitivity", "half a probe", "probes=2.5", _measured(probes=2.5)),
    Case("measured_sensitivity", "probes as a word", "probes='many'", _measured(probes="many")),
    Case("measured_sensitivity", "a spectral norm from probes", "'spectral'", _measured(norm="spectral")),
    Case("measured_sensitivity", "freezing the unknown", "'mlp'", _measured(freeze=("mlp",))),
    Case("measured_sensitivity", "freeze as one word", "'attention'", _measured(freeze="attention")),
    Case("measured_sensitivity", "a seed beyond 64 bits", str(2**80), _measured(seed=2**80)),
    Case("audit", "no probes", "probes=0", lambda w: osl.audit(w.model, PROMPT, probes=0)),
    Case("audit", "where a text", "str", lambda w: osl.audit(w.model, PROMPT, probes=1, where="Alice")),
    Case("audit", "where not there", "Zoe", lambda w: osl.audit(w.model, PROMPT, probes=1, where=["Zoe"])),
    Case("audit", "where all", "None", lambda w: osl.audit(w.model, PROMPT, probes=1, where=[None])),
    Case("audit", "beta zero", "beta=0", lambda w: osl.audit(w.model, PROMPT, probes=1, beta=0)),
    Case("findings", "probes negative", "probes=-1", lambda w: osl.findings(w.model, PROMPT, probes=-1)),
    Case("findings", "beta a word", "'big'", lambda w: osl.findings(w.model, PROMPT, probes=1, beta="big")),
    Case("measured_flow", "no probes", "probes=0", lambda w: osl.measured_flow(w.model, PROMPT, probes=0)),
    Case("measured_flow", "negative edges", "edges=-1", lambda w: osl.measured_flow(w.model, PROMPT, edges=-1)),
    Case("measured_flow", "a source beyond it", "source=99", lambda w: osl.measured_flow(w.model, PROMPT, 99)),
    Case("measured_flow", "no such token", "10000", lambda w: osl.measured_flow(w.model, PROMPT, target=10000)),
    Case("measured_flow", "three targets", "(1, 2, 3)", lambda w: osl.measured_flow(w.model, PROMPT, target=(1, 2, 3))),
    Case("measured_flow", "an empty prompt", "empty", lambda w: osl.measured_flow(w.model, "")),
    Case("substitution", "no draws", "draws=0", lambda w: osl.substitution(w.model, PROMPT, draws=0)),
    Case("substitution", "unknown method", "'guess'", lambda w: osl.substitution(w.model, PROMPT, method="guess")),
    Case("substitution", "nothing to replace", "none", lambda w: osl.substitution(w.model, PROMPT, [])),
    Case("substitution", "a place beyond it", "99", lambda w: osl.substitution(w.model, PROMPT, [99])),
    Case("substitution", "too few lists", "got 1", lambda w: osl.substitution(w.model, PROMPT, replacements=[[3]])),
    Case("substitution", "no such id", "9999", lambda w: osl.substitution(w.model, PROMPT, [1], replacements=[[9999]])),
    Case("figures.measured_flow", "nothing", "NoneType", lambda w: osl.figures.measured_flow(None)),
    Case("figures.swap", "a trace", "Trace", lambda w: osl.figures.swap(w.trace)),
    Case("swap", "the same", "same tokens", lambda w: osl.swap(w.model, PROMPT, PROMPT)),
    Case("swap", "no such place", "99", lambda w: osl.swap(w.model, PROMPT, {99: 3})),
    Case("swap", "two for one", "which is 2", lambda w: osl.swap(w.model, PROMPT, {1: [3, 4]})),
    Case("swap", "another length", "got one of 2", lambda w: osl.swap(w.model, PROMPT, [1, 2])),
    Case("swap", "patches below none", "patches=-1", lambda w: osl.swap(w.model, PROMPT, {1: 3}, patches=-1)),
    Case("flow", "unknown kind", "'median'", lambda w: osl.flow(w.trace, "median")),
    Case("flow", "beta for the mean field", "beta=1.0", lambda w: osl.flow(w.trace, beta=1.0)),
    Case("flow", "a source beyond the prompt", "source=99", lambda w: osl.flow(w.trace, source=99)),
    Case("flow", "a source before it", "source=-1", lambda w: osl.flow(w.trace, source=-1)),
    Case("flow", "a source between two", "source=1.5", lambda w: osl.flow(w.trace, source=1.5)),
    Case("flow", "a source that is true", "source=True", lambda w: osl.flow(w.trace, source=True)),
    Case("flows", "no source", "no source", lambda w: flows(w.trace, ())),
    Case("flows", "one source that is no list", "int", lambda w: flows(w.trace, 3)),
    Case("Flow", "a layer that it has not", "layer 9", lambda w: w.flow.edge(9)),
    Case("probe_corrected_sensitivity", "no probes", "probes=0", _corrected(probes=0)),
    Case("probe_corrected_sensitivity", "all probes there are", "probes=None", _corrected(probes=None)),
    Case("probe_corrected_sensitivity", "a certain interval", "level=1.0", _corrected(level=1.0)),
    Case("probe_corrected_sensitivity", "a level as a word", "level='most'", _corrected(level="most")),
    Case("squashing", "unknown kind", "'median'", lambda w: osl.squashing(w.trace, "median")),
    Case("heaviest_edges", "no edges", "k=0", lambda w: osl.heaviest_edges(w.flow, 0)),
    Case("heaviest_edges", "half an edge", "k=2.5", lambda w: osl.heaviest_edges(w.flow, 2.5)),
    Case("heaviest_paths", "less than none", "k=-1", lambda w: osl.heaviest_paths(w.flow, -1)),
    Case("heaviest_paths", "true", "k=True", lambda w: osl.heaviest_paths(w.flow, True)),
    Case("compare", "other tokens", "5 and 4 tokens", lambda w: compare(w.profile, count_paths(4, 2))),
    Case("count_paths", "no positions", "n=0", lambda w: count_paths(0, 2)),
    Case("count_paths", "half a layer", "n_layers=1.5", lambda w: count_paths(3, 1.5)),
    Case("count_paths", "other tokens than positions", "2 tokens", lambda w: count_paths(3, 2, ("a", "b"))),
    Case("uniform_causal", "no layers", "n_layers=0", lambda w: uniform_causal(3, 0)),
    Case("uniform_causal", "all residual", "residual=1.0", lambda w: uniform_causal(3, 2, 1.0)),
    Case("uniform_causal", "residual NaN", "residual=nan", lambda w: uniform_causal(3, 2, math.nan)),
    Case("number_format", "unknown format", "'float7'", lambda w: number_format("float7")),
    Case("number_format", "float8 computes nowhere", "'float8_e4m3'", lambda w: number_format("float8_e4m3")),
    Case("number_format", "an option unknown", "'save=int8'", lambda w: number_format("float32:save=int8")),
    Case(
        "number_format",
        "an option twice",
        "'weights=int4'",
        lambda w: number_format("float32:weights=int8:weights=int4"),
    ),
    Case("number_format", "no text", "32", lambda w: number_format(32)),
    Case("NumberFormat", "a storage unknown", "'int3'", lambda w: NumberFormat("float32", storage="int3")),
    Case("NumberFormat", "compute as a number", "16", lambda w: NumberFormat(16)),
    Case("computing_in", "unknown format", "'float7'", _computing("float7")),
    Case("computing_in", "no model", "NoneType", _computing("float32", lambda w: None)),
    Case(
        "computing_in",
        "no weights to quantise",
        "LayerNorm",
        _computing("float32:weights=int8", lambda w: torch.nn.LayerNorm(3)),
    ),
    Case(
        "computing_in",
        "weights off-loaded",
        "meta",
        _computing("bfloat16", lambda w: torch.nn.Linear(2, 2, device="meta")),
    ),
    # edits and what they do
    Case("edits.window", "no width", "window of 0", lambda w: osl.edits.window(0)),
    Case("edits.window", "a width of words", "window of wide", lambda w: osl.edits.window("wide")),
    Case("edits.window", "half a position", "window of 2.5", lambda w: osl.edits.window(2.5)),
    Case("edits.sliding_window", "less than none", "window of -3", lambda w: osl.edits.sliding_window(-3)),
    Case("edits.mask_position", "before the prompt", "position -1", lambda w: osl.edits.mask_position(-1)),
    Case("edits.ablate_head", "a head below 0", "head -2", lambda w: osl.edits.ablate_head(0, -2)),
    Case("edits.ablate_head", "a layer that is none", "layer None", lambda w: osl.edits.ablate_head(None, 0)),
    Case("edits.sharpen", "no power", "power of 0", lambda w: osl.edits.sharpen(0)),
    Case("edits.sharpen", "NaN", "power of nan", lambda w: osl.edits.sharpen(math.nan)),
    Case("edits.sharpen", "a word", "'more'", lambda w: osl.edits.sharpen("more")),
    Case("edits.separators", "behind every 0", "every 0", lambda w: osl.edits.separators(0)),
    Case("edits.separators", "an empty one", "empty separator", lambda w: osl.edits.separators(3, "")),
    Case("edits.edited_prompt", "no prompt", "NoneType", lambda w: osl.edits.edited_prompt(w.model, None, None)),
    Case("edits.edited_trace", "no trace", "NoneType", lambda w: osl.edits.edited_trace(None, osl.edits.sharpen(2.0))),
    Case(
        "edits.edited_trace",
        "an edit of no one power",
        "adaptive temperature",
        lambda w: osl.edits.edited_trace(w.trace, osl.edits.adaptive_temperature()),
    ),
    Case(
        "Edit", "a token edit asked for a pattern", "with BOS", lambda w: osl.edits.with_bos()(torch.ones(1, 1, 2, 2))
    ),
    Case(
        "edited_attention",
        "a head that is not there",
        "head 9",
        lambda w: osl.edited_attention(w.model, osl.edits.ablate_head(0, 9)).__enter__(),
    ),
    Case(
        "edited_attention",
        "an edit of tokens",
        "with BOS",
        lambda w: osl.edited_attention(w.model, osl.edits.with_bos()).__enter__(),
    ),
    Case("edited_attention", "a word", "'window'", lambda w: osl.edited_attention(w.model, "window").__enter__()),
    Case("edits.edited_attention", "no model", "NoneType", _attending(lambda w: None, osl.edits.window(2))),
    Case("plan", "no model", "NoneType", lambda w: osl.plan(None, PROMPT)),
    Case("plan", "an unknown measure", "'colour'", lambda w: osl.plan(w.model, PROMPT, "colour")),
    Case("plan", "no probes", "probes=0", lambda w: osl.plan(w.model, PROMPT, probes=0)),
    Case("plan", "a prompt of 0 tokens", "0", lambda w: osl.plan(w.model, 0)),
    Case("plan", "a negative prompt", "-5", lambda w: osl.plan(w.model, -5)),
    Case("what_if", "no edit", "none", lambda w: osl.what_if(w.model, PROMPT)),
    Case("what_if", "a word for an edit", "'window:2'", _what_if("window:2")),
    Case(
        "what_if", "an edit of unknown derivative", "adaptive temperature", _what_if(osl.edits.adaptive_temperature())
    ),
    Case("what_if", "a layer that is not there", "layer 7", _what_if(osl.edits.ablate_head(7, 0))),
    Case("what_if", "a position beyond the prompt", "position 12", _what_if(osl.edits.mask_position(12))),
    Case("what_if", "BOS before BOS", "starts with BOS", _what_if(osl.edits.with_bos())),
    Case(
        "what_if",
        "no BOS to take",
        "without BOS",
        lambda w: osl.what_if(w.model, [5, 9, 7], osl.edits.without_bos(), probes=1),
    ),
    Case("what_if", "too short to separate", "too short", _what_if(osl.edits.separators(12, "w7"))),
    Case(
        "what_if",
        "no room for one token more",
        "16 tokens",
        lambda w: osl.what_if(w.model, [5] * 16, osl.edits.window(2)),
    ),
    Case("what_if", "unknown variant", "'theorem_9'", _what_if(variant="theorem_9")),
    Case("what_if", "no probes", "probes=0", _what_if(probes=0)),
    Case("what_if", "half a node probe", "node_probes=1.5", _what_if(node_probes=1.5)),
    # collapse
    Case("collapse_curve", "no lengths", "lengths []", _curve(())),
    Case("collapse_curve", "lengths backwards", "[3, 1]", _curve((3, 1))),
    Case("collapse_curve", "length 0", "[0, 1]", _curve((0, 1))),
    Case("collapse_curve", "half a length", "[1.5]", _curve((1.5,))),
    Case("collapse_curve", "no length but nothing", "[None]", _curve(None)),
    Case("collapse_curve", "no formats", "no dtypes", _curve(dtypes=())),
    Case("collapse_curve", "an unknown format", "'float7'", _curve(dtypes=("float7",))),
    Case("collapse_curve", "one format that is no list", "'f'", _curve(dtypes="float32")),
    Case("collapse_curve", "a family that is none", "got a str", _curve(family="ones")),
    Case("collapse_curve", "a family of words", "a str", _curve(family=lambda k: "w5 w9")),
    Case("collapse_curve", "a family of one token", "1 token", _curve(family=lambda k: [5])),
    Case("collapse_curve", "two prompts alike", "equal", _two_pairs([5, 9], [5, 9])),
    Case("collapse_curve", "beyond the vocabulary", "token id 99", _two_pairs([5, 9], [5, 99])),
    Case("collapse_curve", "beyond n_ctx", "21 tokens", _curve((1, 2, 18))),
    Case("collapse_curve", "a floor elsewhere", "[7]", _curve(noise_floor=(7,))),
    Case("CollapseCurve", "another format", "'bfloat16'", lambda w: w.curve.first_collapsed("bfloat16")),
    Case("CollapseCurve", "unknown criterion", "'eyes'", lambda w: w.curve.first_collapsed("float32", "eyes")),
    Case("CollapseCurve", "other lengths", "[9]", lambda w: w.curve.at((9,))),
    Case("Family", "a pair of three", "pair(1)", lambda w: Family("f", lambda k: ([5, 9], [5, 7], [5, 8])).pairs([1])),
    Case("Family", "no function", "'w5'", lambda w: Family("f", "w5").pairs([1])),
    Case(
        "families.separated",
        "counted from the middle",
        "'middle'",
        lambda w: osl.families.separated(w.model, counted_from="middle"),
    ),
    Case("families.separated", "groups of none", "every=0", lambda w: osl.families.separated(w.model, every=0)),
    Case("families.separated", "no step", "step=0", lambda w: osl.families.separated(w.model, step=0)),
    Case("families.alternating", "no step", "step=0", lambda w: osl.families.alternating(w.model, step=0)),
    Case(
        "families.counting",
        "a question that is none",
        "question=None",
        lambda w: osl.families.counting(w.model, question=None),
    ),
    Case("families.word_list", "no words", "[]", lambda w: osl.families.word_list(w.model, [])),
    Case("families.word_list", "one text", "'a b c'", lambda w: osl.families.word_list(w.model, "a b c")),
    Case("families.word_list", "an empty word", "['a', '']", lambda w: osl.families.word_list(w.model, ["a", ""])),
    Case("families.two_prompts", "an empty prompt", "empty", lambda w: osl.families.two_prompts(w.model, "w5 w9", "")),
    Case(
        "families.two_prompts",
        "no tokenizer",
        "without tokenizer",
        lambda w: osl.families.two_prompts(w.mute, "w5", "w9"),
    ),
    Case("families.followed_by", "no family", "NoneType", lambda w: osl.families.followed_by(w.model, None, " w5")),
    # the paper's lemmas
    Case("lemmas.largest_weight", "no scores", "n=0", lambda w: lemmas.largest_weight(0, 1.0)),
    Case("lemmas.alternating_total_variation", "no scores", "n=-1", lambda w: lemmas.alternating_total_variation(-1)),
    Case(
        "lemmas.total_variation",
        "other sizes",
        "(3,)",
        lambda w: lemmas.total_variation(torch.ones(2), torch.ones(3)),
    ),
    Case(
        "lemmas.softmax_total_variation",
        "a list",
        "got a list",
        lambda w: lemmas.softmax_total_variation([1.0], [2.0]),
    ),
    Case(
        "lemmas.total_variation_bound",
        "no scores",
        "(0,)",
        lambda w: lemmas.total_variation_bound(torch.ones(0), torch.ones(0)),
    ),
    Case("lemmas.last_weights", "a list", "list", lambda w: lemmas.last_weights([1.0, 2.0])),
    Case("lemmas.ratio_representation", "letters", "'1a'", lambda w: lemmas.ratio_representation("1a")),
    Case(
        "lemmas.ratio_representation",
        "heads that do not divide",
        "n_heads=3",
        lambda w: lemmas.ratio_representation("10", n_heads=3),
    ),
    Case(
        "lemmas.ratio_representation",
        "no heads",
        "n_heads=0",
        lambda w: lemmas.ratio_representation("10", n_heads=0),
    ),
    Case(
        "lemmas.counting_limit",
        "unknown format",
        "'float7'",
        lambda w: lemmas.counting_limit(torch.ones(3), "float7"),
    ),
    Case(
        "lemmas.averaging_counting_limit",
        "no format",
        "None",
        lambda w: lemmas.averaging_counting_limit(torch.ones(3), torch.ones(3), None),
    ),
    # pictures and pages
    Case("views.side_by_side", "nothing", "no result", lambda w: osl.views.side_by_side()),
    Case("views.side_by_side", "other tokens", "4", lambda w: osl.views.side_by_side(w.profile, count_paths(4, 2))),
    Case("views.prompts", "two kinds", "PathProfile", lambda w: osl.views.prompts(w.profile, w.truth)),
    Case("figures.profile", "an unknown value", "'log2'", lambda w: osl.figures.profile(w.profile, "log2")),
    Case(
        "figures.profile",
        "sizes where none are",
        "'rollout'",
        lambda w: osl.figures.profile(_bound("rollout")(w), "log10"),
    ),
    Case("figures.sensitivity", "an unknown value", "'ln'", lambda w: osl.figures.sensitivity(w.truth, "ln")),
    Case("figures.save", "no figure", "str", lambda w: osl.figures.save("figure", w.folder, "f")),
    Case(
        "figures.save",
        "a kind of file unknown",
        "gif",
        lambda w: osl.figures.save(osl.figures.width(w.flow), w.folder, "f", ("gif",)),
    ),
    Case(
        "figures.save",
        "a name that climbs out",
        "'../f.pdf'",
        lambda w: osl.figures.save(osl.figures.width(w.flow), w.folder, "../f"),
    ),
    Case(
        "figures.save",
        "a name beyond all measure",
        "xxx",
        lambda w: osl.figures.save(osl.figures.width(w.flow), w.folder, "x" * 5000),
    ),
    Case(
        "figures.save",
        "into a file",
        "taken",
        lambda w: osl.figures.save(osl.figures.width(w.flow), w.file("taken"), "f"),
    ),
    Case("report", "onto a folder", "is a folder", lambda w: osl.report(w.model, PROMPT, w.folder)),
    Case(
        "report", "into no folder", "nowhere", lambda w: osl.report(w.model, PROMPT, w.folder / "nowhere" / "page.html")
    ),
    Case("report", "a name beyond all measure", "xxx", lambda w: osl.report(w.model, PROMPT, w.folder / ("x" * 5000))),
    Case("report", "a place of NUL bytes", "null byte", lambda w: osl.report(w.model, PROMPT, str(w.folder) + "/a\0b")),
    Case("report", "an unknown option", "'probe'", lambda w: osl.report(w.model, PROMPT, w.folder / "p.html", probe=1)),
    Case("reports", "one text", "w5 w9", lambda w: osl.reports(w.model, "w5 w9", w.folder)),
    Case("reports", "no prompts", "no prompt", lambda w: osl.reports(w.model, [], w.folder)),
    Case("reports", "a folder that is a file", "taken", lambda w: osl.reports(w.model, ["w5 w9"], w.file("taken"))),
    Case("reports", "an unknown option", "'probe'", lambda w: osl.reports(w.model, ["w5 w9"], w.folder, probe=1)),
]


# ---------------------------------------------------------------- models that are ill


def _ill() -> list[Case]:
    def fed(name: str, value: float, *path: str) -> Call:
        return lambda w: PROMPTED[name](w, w.model_with(value, *path), PROMPT)

    ill = {"NaN": math.nan, "infinite": math.inf}
    cases = []
    for name in PROMPTED:
        for word, value in ill.items():
            for part in (("embed",), ("0", "mlp"), ("1", "attn")):
                where = " ".join(part)
                kind = InputError if name == "reports" else (HookMismatchError, ModelError)
                cases.append(Case(name, f"{word} weights in {where}", "NaN or infinite", fed(name, value, *part), kind))
    return cases


CASES = [*_prompted(), *_modelled(), *_handed_over(), *ARGUMENTS, *_ill()]
