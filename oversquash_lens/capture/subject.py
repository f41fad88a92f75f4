"""The one door: a hooked model, read once and proven, in the form in which everything inside takes it."""

from __future__ import annotations

import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from oversquash_lens.capture.architecture import Architecture, check_class, read_architecture
from oversquash_lens.capture.checks import apart
from oversquash_lens.capture.hooked_model import (
    HookedModel,
    describe,
    device_of,
    refuse_dropout,
    settings_fingerprint,
    size_of,
)
from oversquash_lens.capture.hooks import (
    all_modules,
    attached,
    hooked_places,
    hooks_fingerprint,
    note_compiled,
    ordinary_tensors,
    surroundings,
    uncompiled,
    weights_fingerprint,
    without_hooks,
)
from oversquash_lens.capture.proof import Function, predictions, prove_function, prove_sequence, rows_of
from oversquash_lens.capture.tokens import TOKENS, Prompt, TokenizedPrompt, tokenize, tokenized_ids
from oversquash_lens.errors import ModelError, OversquashError, one_line
from oversquash_lens.memory import Size
from oversquash_lens.results import About


@dataclass
class _Known:
    """What was found of one model, valid for `mark`: weights, settings and modes. It holds no reference to the model.

    `sequences`: the user's hooks under which it was proven fixed and causal, and whether they could be tried;
    `failures`: by hooks, what the proof said; `unrecordable`: "" once a recording was made, or why none can be.
    """

    mark: tuple
    architecture: Architecture
    function: Function | None = None
    sequences: dict[tuple, bool] = field(default_factory=dict)
    failures: dict[tuple, str] = field(default_factory=dict)
    unrecordable: str | None = None


_known: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


@dataclass(frozen=True)
class Subject:
    """A model with what was read of it. Every public function makes one by `Subject.of`, everything inside takes it."""

    model: HookedModel
    architecture: Architecture
    function: Function

    @classmethod
    def of(cls, model: Any, *, with_hooks: bool = True) -> Subject:
        """The proven subject of a HookedTransformer or TransformerBridge; a subject is handed through as it is.

        Read and proven at the first call, and again when weights, settings, mode or the user's hooks have changed.
        `with_hooks`: whether the user's hooks are tried, too; a recording of a pass that the user makes leaves them be.
        Raises InputError for what is no hooked model, ModelError for one that fails a proof, with numbers.
        """
        if isinstance(model, Subject):
            return model
        model = uncompiled(model)
        check_class(model)
        _refuse_modes()
        modules = list(all_modules(model))
        ordinary_tensors(modules)
        note_compiled(model, modules)
        with surroundings(model):
            known = _read(model, modules)
            hooks = hooks_fingerprint(modules) if with_hooks else ()
            if hooks in known.failures:
                raise ModelError(known.failures[hooks])
            if hooks not in known.sequences:
                try:
                    with _described(model):
                        _prove(model, known, hooks)
                except ModelError as error:
                    known.failures[hooks] = str(error)
                    raise
        assert known.function is not None, "the proof has made it"
        return cls(model, known.architecture, known.function)

    @cached_property
    def about(self) -> About:
        """The label that every result carries."""
        return describe(self.model, self.architecture)

    @property
    def support(self) -> dict[str, SupportVerdict]:
        """Which measures hold, by name, as the proof, the norms and a recording of the proof's tokens have shown."""
        for fault in _FAULTS:
            self._find(fault)
        return architecture_support(self.architecture, self.function)

    def _find(self, fault: str) -> None:
        if fault not in self.function.later:
            self.function.later[fault] = _FAULTS[fault](self)

    @cached_property
    def size(self) -> Size:
        """The shapes that memory and work are counted from."""
        return size_of(self.model)

    @property
    def device(self) -> torch.device:
        """Where the first weight lies."""
        return device_of(self.model)

    def require(self, measure: str) -> None:
        """Raise the ModelError that says why, where this measure is refused."""
        if measure in _NEEDS:
            self._find(_NEEDS[measure])
        refuse_unsupported(architecture_support(self.architecture, self.function), measure, self.about.model)

    def tokenize(self, prompt: Prompt, *, chat: bool = False, bos: bool | None = None) -> TokenizedPrompt:
        """The ids of a prompt, by the model's own rule, checked."""
        return tokenize(self.model, prompt, chat=chat, bos=bos)

    @contextmanager
    def failures_named(self, doing: str) -> Iterator[None]:
        """What the model raises within becomes a ModelError; what a hook of the user's raises is left as it is."""
        try:
            yield
        except (OversquashError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            places = hooked_places(self.model)
            if places and _raised_by_user(error):
                raise
            blamed = f"a hook of yours, on {', '.join(places[:3])}, may be what it comes from; " if places else ""
            raise ModelError(
                f"{doing} {self.about.model} ends in {type(error).__name__}: {one_line(error, 160)}; {blamed}expected "
                "a model whose hooks show what its weights make: see oversquash_lens.support(model)"
            ) from error

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """Within the block the model is this thread's own, autocast is off and inference mode is no-grad mode."""
        with surroundings(self.model):
            yield


def _raised_by_user(error: BaseException) -> bool:
    """Whether code that is neither a library's nor ours was running when it was raised, inside of what was."""
    libraries = (sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]), "<")
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = max((i for i, name in enumerate(files) if name.startswith(libraries[1])), default=0)
    return any("site-packages" not in name and not name.startswith(libraries) for name in files[ours:])


def _refuse_modes() -> None:
    """Inside torch.func's transforms, and under fake tensors, no numbers are made."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise OversquashError(
            "expected ordinary tensors, got a call in a torch.func transform (vmap, grad, …): measure outside it"
        )
    if torch._guards.detect_fake_mode() is not None:
        raise OversquashError("expected ordinary tensors, got a call under FakeTensorMode: measure outside it")


def support(model: Any) -> dict[str, SupportVerdict]:
    """What may be said of a HookedTransformer or TransformerBridge, measure by measure.

    Keys are those of `oversquash_lens.capture.subject.MEASURES`; values say "supported", "approximate" or "refused",
    and why. Read off a recording of a few tokens. Raises ModelError for a model that no measure may be taken of, and so
    does a refused measure when it is asked for.
    """
    return Subject.of(model).support


def _read(model: HookedModel, modules: Sequence[nn.Module]) -> _Known:
    mark = (weights_fingerprint(model), settings_fingerprint(model, modules))
    known = _known.get(model)
    if known is None or known.mark != mark:
        with _described(model):
            architecture = read_architecture(model)
        known = _known[model] = _Known(mark, architecture)
    return known


@contextmanager
def _described(model: HookedModel) -> Iterator[None]:
    """An error of any other kind, while a model is read and proven, is about what cannot be read of it."""
    try:
        yield
    except (OversquashError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        name = getattr(model.cfg, "model_name", None) or "this model"
        raise ModelError(
            f"{name} cannot be described: {type(error).__name__}: {one_line(error, 160)}; expected a decoder with an "
            "embedding, a list of blocks and an unembedding, and a cfg that is true of it"
        ) from error


def _prove(model: HookedModel, known: _Known, hooks: tuple) -> None:
    """The user's random numbers go on as if nothing had been drawn."""
    refuse_dropout([*all_modules(model)], known.architecture.name)
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if known.function is None:
            known.function = prove_function(model, known.architecture)
            known.architecture = replace(known.architecture, fused_obstacle=known.function.fused_obstacle)
        known.sequences[hooks] = prove_sequence(model, known.architecture, known.function, bool(hooks))


def _recording_fault(subject: Subject) -> str:
    """Why no recording of the proof's tokens can be made, empty where one is made."""
    from oversquash_lens.capture.recorder import record_tokens

    model = subject.model
    tokens = tokenized_ids(model, rows_of(model)[0][0])
    try:
        with without_hooks(model):
            record_tokens(subject, tokens, node_probes=1)
    except OversquashError as error:
        return str(error)
    except Exception as error:
        return f"recording {subject.about.model} ends in {type(error).__name__}: {one_line(error, 160)}"
    return ""


def _loose_norms(subject: Subject) -> str:
    """Why the norms' divisors cannot be held fixed, empty where they can.

    In a pass with every divisor replaced by a copy no other norm may run but those of queries and keys, and the
    predictions stay; each norm called by itself heeds a divisor that is doubled.
    """
    model, architecture, blocks = subject.model, subject.architecture, cast(nn.ModuleList, subject.model.blocks)
    names = [f"blocks.{i}.{name}" for i in range(architecture.n_layers) for name in architecture.scale_hooks()]
    names += [architecture.final_hooks()["final_scale"]] if architecture.normed else []
    if absent := sorted(set(names) - set(model.hook_dict)):
        return f"no hook {absent[0]} shows a norm's divisor"
    apart_from = [
        getattr(getattr(block, "attn", None), name, None) for block in blocks for name in ("q_norm", "k_norm")
    ]
    exempt = {id(each) for norm in apart_from if isinstance(norm, nn.Module) for each in norm.modules()}
    inside = [(f"blocks.{name}", module) for name, module in blocks.named_modules()]
    inside += [("ln_final", module) for module in getattr(model, "ln_final", nn.Module()).modules()]
    called: list[str] = []

    def twice(divisor: Tensor, hook: Any = None) -> Tensor:
        return 2 * divisor

    x = torch.linspace(-1, 2, architecture.d_model, dtype=architecture.dtype, device=subject.device)[None, None]
    with ExitStack() as stack:
        for each in (torch.no_grad(), subject.surroundings(), without_hooks(model), warnings.catch_warnings()):
            stack.enter_context(each)
        warnings.simplefilter("ignore")  # upstream warns of every edit of a divisor
        norms = {name: cast(nn.Module, model).get_submodule(name.rpartition(".")[0]) for name in names}
        plain = {name: norm(x) for name, norm in norms.items()}
        with attached(model, [(name, twice) for name in names]):
            for name, norm in norms.items():
                try:
                    edited = norm(x)
                except Exception as error:  # a norm without weights of its own, on a bridge
                    return f"an edit of {name} makes its norm fail ({one_line(error, 80)})"
                if torch.equal(edited, plain[name]):
                    return f"an edit of {name} does not reach what its norm gives"
        for name, module in inside:
            if (
                "norm" in type(module).__name__.lower()
                and not hasattr(module, "hook_scale")
                and id(module) not in exempt
            ):
                shown = name.replace("._original_component", "")
                stack.enter_context(module.register_forward_hook(lambda *_, shown=shown: called.append(shown)))
        copies = [(name, lambda divisor, hook=None: divisor.clone()) for name in names]
        found = predictions(model, rows_of(model)[0], architecture.name, copies)
    if called:
        return f"its norm {called[0]} computes out of the hooks' sight"
    said = apart(subject.function.own, found, architecture)
    return f"with a copy of each divisor it computes something else: {said}" if said else ""


# What is found when first asked for, and which measures ask.
_FAULTS: dict[str, Callable[[Subject], str]] = {"unrecordable": _recording_fault, "loose_norms": _loose_norms}

STATES = ("supported", "approximate", "refused")
RECORDED = ("printed bounds", "calibrated", "calibrated_full", "mean_field")  # what is made of a recording
MEASURES = (
    *RECORDED,
    "truth",
    "attention frozen",
    "norms frozen",
    "attention edits",
    "collapse",
    "residual hooks",
    "path hooks",
)


_NEEDS = dict.fromkeys(RECORDED, "unrecordable") | {"norms frozen": "loose_norms"}


class SupportVerdict(NamedTuple):
    """`state` is one of `STATES`; `why` says what is left out, unproven or in the way, empty where nothing is."""

    state: str
    why: str


def architecture_support(architecture: Architecture, function: Function | None = None) -> dict[str, SupportVerdict]:
    """Verdicts by measure; `function` is what passes have shown.

    Of a structure alone, without it, only what a trace needs is said.
    """
    experts = "a mixture of experts has no rigorous bound on what its router's choice does"
    printed = [text for text, applies in _unprinted(architecture).items() if applies]
    left_out = [text for text, applies in _left_out(architecture).items() if applies]
    bound = _refused_if(experts if architecture.experts else "")
    found = {
        "printed bounds": _approximate(printed),
        "calibrated": bound,
        "calibrated_full": bound,
        "mean_field": _approximate(left_out),
        "truth": SupportVerdict("supported", _by_length(architecture)),
        "attention frozen": _refused_if(HIDDEN if architecture.delegated else ""),
    }
    found |= {} if function is None else _shown_support(architecture, function)
    unrecordable = "" if function is None else function.later.get("unrecordable", "")
    if architecture.obstacle is not None:
        unrecordable = f"{architecture.name} has {architecture.obstacle}"
    return found | dict.fromkeys(RECORDED, SupportVerdict("refused", unrecordable)) if unrecordable else found


HIDDEN = (
    "attention is computed out of the hooks' sight: its weights cannot be held fixed, and it would drop the edit in "
    "silence"
)


def _shown_support(architecture: Architecture, function: Function) -> dict[str, SupportVerdict]:
    """Verdicts on what needs no recording, as the proof's passes have shown."""
    shown = function.shown
    blank = [str(layer) for layer in range(architecture.n_layers) if layer not in shown.patterns]
    some = f"{', '.join(blank[:8])}{', …' * (len(blank) > 8)}"
    none = f"layers {some} show no attention pattern" if len(blank) > 1 else f"layer {some} shows no attention pattern"
    unseen = none if blank else ""
    unfrozen = HIDDEN if architecture.delegated else unseen or shown.unused
    left_out = f"{none}, so attention_shift and self_attention are nan there" if blank else ""
    notes = "; ".join(filter(None, (function.not_compared, _by_length(architecture))))
    return {
        "truth": _refused_if(shown.derivative, notes),
        "attention frozen": _refused_if(shown.derivative or shown.residuals or unfrozen),
        "norms frozen": _refused_if(shown.derivative or shown.residuals or function.later.get("loose_norms", "")),
        "attention edits": _refused_if(unfrozen),
        "collapse": _refused_if(shown.residuals, left_out),
        "residual hooks": _refused_if(shown.residuals),
        "path hooks": _refused_if(unseen or shown.scales),
    }


def refuse_unsupported(supported: dict[str, SupportVerdict], measure: str, model: str) -> None:
    """Raise the ModelError that says why, where a measure is refused."""
    verdict = supported[measure]
    if verdict.state == "refused":
        others = ", ".join(name for name, other in supported.items() if other.state != "refused")
        instead = f"ask for one of {others} instead" if others else "no measure of this model remains"
        raise ModelError(
            f"{measure} was asked of {model}: refused, because {verdict.why}; expected a model without that: {instead}"
        )


def _by_length(architecture: Architecture) -> str:
    windows = sorted({window for window in architecture.windows if window is not None and window > TOKENS})
    return f"windows of {', '.join(map(str, windows))} are longer than the {TOKENS} tokens compared" if windows else ""


def _unprinted(architecture: Architecture) -> dict[str, bool]:
    """Where a model leaves the equations that the paper's theorem speaks of."""
    return {
        "attention and MLP work side by side, where the paper has one after the other": architecture.parallel,
        "norms of what attention and MLP write are not in the paper's model": architecture.post_norms,
        "a router has no Lipschitz constant, so only shares have a meaning": architecture.experts,
        "the MLP's activation has no global Lipschitz constant: σ_ψ is the largest over a prompt": architecture.steep,
        "rows of attention sum to less than 1, the rest goes to a sink": architecture.sinks,
    }


def _left_out(architecture: Architecture) -> dict[str, bool]:
    """What the mean-field edges leave out beyond what they always do."""
    return {
        "the cross term of attention and MLP is left out": architecture.parallel,
        "post-norms are taken without their projection": architecture.post_norms,
        "norms of queries and keys are taken without their projection": architecture.qk_norm,
        "the slope of the scores' soft cap is taken as 1": architecture.soft_cap is not None,
        "the slope of what cuts queries, keys and values is taken as 1": architecture.clip is not None,
    }


def _approximate(reasons: list[str]) -> SupportVerdict:
    return SupportVerdict("approximate", "; ".join(reasons)) if reasons else SupportVerdict("supported", "")


def _refused_if(why: str, otherwise: str = "") -> SupportVerdict:
    return SupportVerdict("refused", why) if why else SupportVerdict("supported", otherwise)
