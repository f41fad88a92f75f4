"""The one door: a hooked model, read once and proven, in the form in which everything inside takes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from oversquash_lens.capture.architecture import Architecture, check_class, read_architecture
from oversquash_lens.capture.hooked_model import About, HookedModel, describe, device_of, size_of
from oversquash_lens.capture.hooks import (
    all_modules,
    hooks_fingerprint,
    note_compiled,
    ordinary_tensors,
    settings_fingerprint,
    surroundings,
    uncompiled,
    weights_fingerprint,
    without_hooks,
)
from oversquash_lens.capture.proof import (
    Function,
    prove_function,
    prove_sequence,
    refuse_dropout,
    rows_of,
)
from oversquash_lens.capture.tokens import Prompt, TokenizedPrompt, tokenize, tokenized_ids
from oversquash_lens.errors import ModelError, OversquashError, one_line
from oversquash_lens.memory import Size


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
                    _prove(model, known, hooks)
                except ModelError as error:
                    known.failures[hooks] = str(error)
                    raise
        return cls(model, known.architecture)

    @cached_property
    def about(self) -> About:
        """The label that every result carries."""
        return describe(self.model, self.architecture)

    @cached_property
    def support(self) -> dict[str, SupportVerdict]:
        """Which measures hold, by name, as a recording of the proof's tokens has shown."""
        known = _known.get(self.model)
        if known is None or known.function is None:
            return architecture_support(self.architecture)
        if known.unrecordable is None:
            known.unrecordable = _recording_fault(self)
        return architecture_support(
            self.architecture,
            unrecordable=known.unrecordable,
            patterns_used=known.function.patterns_used,
            unproven=known.function.not_compared,
        )

    @property
    def declared(self) -> dict[str, SupportVerdict]:
        """Which measures hold, by name, as structure and the proof say; no recording is tried."""
        return architecture_support(self.architecture, patterns_used=self.patterns_used)

    @cached_property
    def size(self) -> Size:
        """The shapes that memory and work are counted from."""
        return size_of(self.model)

    @property
    def device(self) -> torch.device:
        """Where the first weight lies."""
        return device_of(self.model)

    @property
    def patterns_used(self) -> bool:
        """Whether an edit of the patterns that hooks show reaches what attention mixes."""
        known = _known.get(self.model)
        return not self.architecture.delegated and (
            known is None or known.function is None or known.function.patterns_used
        )

    def require(self, measure: str) -> None:
        """Raise the ModelError that says why, where this measure is refused."""
        needs_recording = measure in RECORDED
        refuse_unsupported(self.support if needs_recording else self.declared, measure, self.about.model)

    def tokenize(self, prompt: Prompt, *, chat: bool = False, bos: bool | None = None) -> TokenizedPrompt:
        """The ids of a prompt, by the model's own rule, checked."""
        return tokenize(self.model, prompt, chat=chat, bos=bos)

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """Within the block the model is this thread's own, autocast is off and inference mode is no-grad mode."""
        with surroundings(self.model):
            yield


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
        try:
            architecture = read_architecture(model)
        except OversquashError:
            raise
        except Exception as error:
            name = getattr(model.cfg, "model_name", None) or "this model"
            raise ModelError(
                f"{name} cannot be described: {type(error).__name__}: {one_line(error, 160)}; expected a causal "
                "decoder of one kind of blocks"
            ) from error
        known = _known[model] = _Known(mark, architecture)
    return known


def _prove(model: HookedModel, known: _Known, hooks: tuple) -> None:
    """The user's random numbers go on as if nothing had been drawn."""
    refuse_dropout(model, known.architecture.name)
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


STATES = ("supported", "approximate", "refused")
MEASURES = ("printed bounds", "calibrated", "calibrated_full", "mean_field", "truth", "attention frozen")
RECORDED = MEASURES[:4]  # what is made of a recording
FEW = 8  # tokens of the proof: what only longer prompts use is not seen by it


class SupportVerdict(NamedTuple):
    """`state` is one of `STATES`; `why` says what is left out, unproven or in the way, empty where nothing is."""

    state: str
    why: str


def architecture_support(
    architecture: Architecture, *, unrecordable: str = "", patterns_used: bool = True, unproven: str = ""
) -> dict[str, SupportVerdict]:
    """Verdicts by measure; `unrecordable`, `patterns_used` and `unproven` are what passes have shown."""
    experts = "a mixture of experts has no rigorous bound on what its router's choice does"
    hidden = "attention is computed out of the hooks' sight, so its weights cannot be held fixed"
    printed = [text for text, applies in _unprinted(architecture).items() if applies]
    left_out = [text for text, applies in _left_out(architecture).items() if applies]
    bound = _refused_if(architecture.experts, experts)
    found = {
        "printed bounds": _approximate(printed),
        "calibrated": bound,
        "calibrated_full": bound,
        "mean_field": _approximate(left_out),
        "truth": SupportVerdict("supported", "; ".join(filter(None, (unproven, _by_length(architecture))))),
        "attention frozen": _refused_if(architecture.delegated or not patterns_used, hidden),
    }
    if architecture.obstacle is not None:
        unrecordable = f"{architecture.name} has {architecture.obstacle}"
    return found | dict.fromkeys(RECORDED, SupportVerdict("refused", unrecordable)) if unrecordable else found


def refuse_unsupported(supported: dict[str, SupportVerdict], measure: str, model: str) -> None:
    """Raise the ModelError that says why, where a measure is refused."""
    verdict = supported[measure]
    if verdict.state == "refused":
        others = ", ".join(name for name, other in supported.items() if other.state != "refused")
        raise ModelError(
            f"{measure} was asked of {model}: refused, because {verdict.why}; expected a model without that: ask for "
            f"one of {others} instead"
        )


def _by_length(architecture: Architecture) -> str:
    windows = sorted({window for window in architecture.windows if window is not None and window > FEW})
    return f"windows of {', '.join(map(str, windows))} are longer than the {FEW} tokens compared" if windows else ""


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


def _refused_if(applies: bool, why: str) -> SupportVerdict:
    return SupportVerdict("refused", why) if applies else SupportVerdict("supported", "")
