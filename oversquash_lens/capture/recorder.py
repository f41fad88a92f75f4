"""`record` and `recording`: one forward pass of a hooked model in, a Trace out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from oversquash_lens.capture import checks
from oversquash_lens.capture.architecture import Architecture, read_architecture
from oversquash_lens.capture.checks import PassContext
from oversquash_lens.capture.fused import (
    ASKED_KEPT,
    AttentionRoute,
    choose_route,
    fused_attention,
    own_route,
    patterns_fit,
)
from oversquash_lens.capture.hooked_model import HookedModel, check_recording, norm_bias, norm_gain
from oversquash_lens.capture.hooks import NamedHook, attached, hooked_places, last_logits_only, without_cache
from oversquash_lens.capture.layer import KEPT, LayerRecord
from oversquash_lens.capture.mlp import random_source
from oversquash_lens.capture.subject import Subject, architecture_support
from oversquash_lens.capture.tokens import Prompt, TokenizedPrompt, tokenized_ids
from oversquash_lens.capture.trace import Gains, Trace
from oversquash_lens.capture.weights import weight_gains
from oversquash_lens.errors import HookMismatchError, whole_number
from oversquash_lens.numerics import to_float64

NODE_PROBES = 2  # a node gain then is off by 0.02 in log10 (rms, SmolLM2), a tenth of what the estimate itself is
STACKED = tuple(key for key in KEPT if key != "residual")


def record(
    model: Any,
    prompt: Prompt,
    *,
    chat: bool = False,
    bos: bool | None = None,
    verify: bool = False,
    attention: str = "auto",
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
) -> Trace:
    """Run one prompt through a hooked model and keep what the measures need.

    That the hooks describe the model is always checked at the last position and some others.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompt: a text, messages [{"role": …, "content": …}], or token ids [pos] or [1, pos]; two tokens at least.
        chat: put a text into the tokenizer's chat template first.
        bos: begin with BOS (True), without (False), or as the model itself does (None); for texts only.
        verify: check every position instead of some, and in two passes more that recording changes nothing and that
            the patterns which the hooks show are those that the model uses.
        attention: "kept" keeps every pattern, memory that grows as pos²; "recomputed" keeps queries, keys and
            log-normalisers, from which rows are made anew; "auto" as `oversquash_lens.capture.fused.choose_route` says.
        node_probes: probes (each worth 72 pairs of directions) that estimate each MLP's mean-square gain without bias;
            None computes it exactly, in d_model directions.
        seed: of the probes, which are drawn anew for each layer; a whole number of at most 63 bits.

    Returns:
        The Trace. It holds no reference to the model.

    Raises:
        InputError: a prompt or an option that cannot be used.
        ModelError: a model that cannot be described.
        HookMismatchError: what the hooks showed does not fit the model.
    """
    subject = Subject.of(model)
    tokenized = subject.tokenize(prompt, chat=chat, bos=bos)
    return record_tokens(subject, tokenized, verify=verify, attention=attention, node_probes=node_probes, seed=seed)


def record_tokens(
    model: Any,
    tokenized: TokenizedPrompt,
    *,
    verify: bool = False,
    attention: str = "auto",
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
) -> Trace:
    """`record` of a model or Subject for a prompt that is already tokenized and checked."""
    subject, n = Subject.of(model), len(tokenized.ids)
    route = choose_route(subject.model, subject.architecture, n, attention)
    check_recording(subject.model, n, route, verify=verify)
    try:
        return record_on(subject, tokenized, Recorder(subject, node_probes, seed, verify, route))
    except HookMismatchError as error:
        if attention != "auto" or route == "kept" or not patterns_fit(subject.model, n):
            raise
        # Rows made anew do not describe this model: its own patterns may, or say better what is wrong.
        route = AttentionRoute("kept", f"attention on the route {route!r} does not describe the model: {error}")
    return record_on(subject, tokenized, Recorder(subject, node_probes, seed, verify, route))


def record_on(subject: Subject, tokenized: TokenizedPrompt, recorder: Recorder) -> Trace:
    """One pass on the recorder's route, and with `verify` two more."""
    model, verify = subject.model, recorder.verify
    ids = tokenized.batch(model)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if not verify:
            stack.enter_context(last_logits_only(model))
        stack.enter_context(_attached_recorder(model, recorder))
        if recorder.route == "fused":
            stack.enter_context(fused_attention(model, recorder.report))
        stack.enter_context(subject.failures_named("recording"))
        output = model(ids, **without_cache(model))
    if verify:
        checks.verify_pass(model, recorder.architecture, ids, output)
    return recorder.trace(tokenized)


@contextmanager
def recording(
    model: Any,
    *,
    verify: bool = False,
    attention: str = "kept",
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
) -> Iterator[Recorder]:
    """Record the one forward pass made inside the `with`; `recorder.trace()` then gives the Trace.

    Composes with your own hooks, whenever they were added: what is recorded is what the model goes on to use.
    Removes only its own hooks, also after an exception, and keeps no reference to the model.

    Args:
        model: a HookedTransformer or TransformerBridge; the pass is always the class's own.
        verify: check every position instead of some.
        attention: "kept" or "recomputed", as for `record`.
        node_probes: as for `record`.
        seed: as for `record`.

    Raises:
        InputError: an option that cannot be used.
        ModelError: a model that cannot be described.
        HookMismatchError: during the pass or in `trace()`, where the hooks do not fit the model.
    """
    subject = Subject.of(model, with_hooks=False)
    route = own_route(subject.architecture, subject.model, attention)
    recorder = Recorder(subject, node_probes, seed, verify, route, read_again=True)
    with _attached_recorder(subject.model, recorder):
        yield recorder


@contextmanager
def _attached_recorder(model: HookedModel, recorder: Recorder) -> Iterator[None]:
    try:
        with attached(model, recorder.hooks()):
            handles = [
                model.embed.register_forward_pre_hook(recorder.begin),
                model.unembed.register_forward_hook(recorder.end),
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
    finally:
        recorder.close()


@dataclass
class _Pass:
    """One pass that has begun."""

    context: PassContext
    layers: list[LayerRecord]
    final: FinalNorm
    tokenized: TokenizedPrompt


class Recorder:
    """Collects one pass, layer by layer, checks it as it goes, and forgets the model when closed."""

    def __init__(
        self,
        subject: Subject,
        node_probes: int | None,
        seed: int,
        verify: bool = False,
        route: AttentionRoute = ASKED_KEPT,
        *,
        read_again: bool = False,
        beside: Recorder | None = None,
    ) -> None:
        """`read_again`: read the architecture once more when the pass begins, for weights that are edited until then.

        `beside`: the recorder of another prompt in the same pass, whose reading of the weights this one takes over.
        """
        if node_probes is not None:
            whole_number("node_probes", node_probes, otherwise=", or None for the exact gain")
        random_source(seed)  # a seed that is none is refused before the model runs
        subject.architecture.check_recordable()
        self.architecture, self.about = subject.architecture, subject.about
        self.verify, self.route = verify, route
        self._subject: Subject | None = subject
        self._node_probes, self._seed = node_probes, seed
        self._read_again, self._beside = read_again, beside
        self._pass: _Pass | None = None

    def begin(self, embed: Any, inputs: tuple) -> None:
        """Forward pre-hook of the embedding: the token ids, and the weights as they are in this pass."""
        ids = inputs[0] if inputs else None
        if not (isinstance(ids, Tensor) and ids.ndim == 2) or self._subject is None or self._pass is not None:
            return
        model, tokenized = self._subject.model, tokenized_ids(self._subject.model, ids[0].detach().cpu().clone())
        if self._read_again:
            self.architecture = read_architecture(model)
        if self._beside is None:
            context = self._read_weights(self._subject, self.architecture)
        else:
            context = self._beside.passed().context
        layers = [LayerRecord(context, i) for i in range(self.architecture.n_layers)]
        self._pass = _Pass(context, layers, FinalNorm(context), tokenized)

    def _read_weights(self, subject: Subject, architecture: Architecture) -> PassContext:
        return PassContext(
            model=subject.model,
            architecture=architecture,
            weights=weight_gains(subject.model, architecture),
            node_probes=self._node_probes,
            seed=self._seed,
            verify=self.verify,
            device=subject.device,
            route=self.route,
        )

    def hooks(self) -> list[NamedHook]:
        inside = self.architecture.layer_hooks(self.route).items()
        pairs: list[NamedHook] = [
            (f"blocks.{i}.{name}", partial(self._in_layer, key, i))
            for i in range(self.architecture.n_layers)
            for key, name in inside
        ]
        return pairs + [(name, partial(self._behind, key)) for key, name in self.architecture.final_hooks().items()]

    def _in_layer(self, key: str, layer: int, value: Tensor, hook: Any = None) -> None:
        layers = self.passed().layers
        with self._hooks_named():
            if key == "residual" and layer:
                layers[layer - 1].leave(value.detach()[0])
            layers[layer].take(key, value)

    def report(self, layer: int, key: str, value: Tensor) -> None:
        """What no hook shows, reported by fused attention."""
        self._in_layer(key, layer, value)

    def _behind(self, key: str, value: Tensor, hook: Any = None) -> None:
        passed = self.passed()
        with self._hooks_named():
            if key == "last" and key not in passed.final.kept:
                passed.layers[-1].leave(value.detach()[0])
            passed.final.take(key, value.detach()[0])

    @contextmanager
    def _hooks_named(self) -> Iterator[None]:
        """A mismatch names the user's hooks, where there are any: they may be what it comes from."""
        try:
            yield
        except HookMismatchError as error:
            places = hooked_places(self._subject.model) if self._subject is not None else []
            if not places:
                raise
            raise HookMismatchError(
                f"{error}; a hook of yours, on {', '.join(places[:3])}, may edit what the weights then do not tell: "
                "remove it (to switch a head off, use edits.ablate_head; measured_sensitivity allows any edit)"
            ) from error

    def passed(self) -> _Pass:
        """The pass that has begun; a HookMismatchError where none has."""
        if self._pass is None:
            raise HookMismatchError("no token ids were seen; expected a forward pass that starts from token ids")
        return self._pass

    def end(self, unembed: Any, inputs: tuple, logits: Tensor) -> None:
        """Forward hook of the unembedding."""
        if self._subject is not None and self._pass is not None and "unembedded" in self._pass.final.kept:
            self._pass.final.check_logits(logits)

    def close(self) -> None:
        """Forget the model, and all that is not kept."""
        self._subject = self._beside = None
        if self._pass is not None:
            context = replace(self._pass.context, model=None, cache={})
            self._pass.context = self._pass.final.context = context
            for layer in self._pass.layers:
                layer.close()
                layer.context = context

    def trace(self, tokenized: TokenizedPrompt | None = None) -> Trace:
        """The recorded pass. Raises HookMismatchError if there was none, or if a hook did not fire."""
        passed, architecture = self._complete(), self.architecture
        tokenized = tokenized or passed.tokenized
        gain, final = to_float64(architecture.final_gain), passed.final.kept
        stacked: dict[str, Any] = {key: torch.stack([layer.kept[key] for layer in passed.layers]) for key in STACKED}
        gains = Gains(
            weights=passed.context.weights,
            **stacked,
            final_scale=final["final_scale"].item(),
            final_gain_max=gain.abs().max().item(),
            final_gain_square=gain.square().mean().item(),
            node_probes=min(self._node_probes or architecture.d_model, architecture.d_model),
            seed=self._seed,
        )
        return Trace(
            about=tokenized.described(self.about),
            tokens=tokenized.tokens,
            token_ids=tokenized.ids,
            last_residuals=torch.stack([*(layer.kept["residual"] for layer in passed.layers), final["last"]]),
            prediction_input=final["prediction_input"],
            attention=tuple(layer.attention for layer in passed.layers),
            gains=gains,
            gated_mlp=architecture.gated,
            parallel=architecture.parallel,
            support=architecture_support(architecture),
            route_reason=self.route.why,
        )

    def _complete(self) -> _Pass:
        """The pass, once every hook has fired."""
        reasons = ["no forward pass was seen"]
        if self._pass is not None:
            reasons = [layer.silence() for layer in self._pass.layers if layer.missing() is not None]
            reasons += [f"{name} did not fire" for name in self._pass.final.missing()]
            if not reasons:
                return self._pass
        raise HookMismatchError(
            f"{reasons[0]}; not recorded; expected one whole forward pass inside the recording: run the model once "
            "inside it"
        )


class FinalNorm:
    """Takes what the hooks behind the last layer see; `kept` holds it, of the last position."""

    def __init__(self, context: PassContext) -> None:
        self.context = context
        self.kept: dict[str, Tensor] = {}

    def take(self, key: str, value: Tensor) -> None:
        if key in self.kept:
            raise HookMismatchError(f"{key}: the hook fired a second time; expected one forward pass per recording")
        with torch.no_grad():
            TAKEN[key](self, self.context.detached(value))

    def missing(self) -> list[str]:
        """Names of the hooks that have not fired."""
        return [name for key, name in self.context.architecture.final_hooks().items() if key not in self.kept]

    def check_logits(self, logits: Tensor) -> None:
        """They are those of the y that was recorded."""
        with torch.no_grad():
            model = self.context.model
            table, bias = model.W_U, getattr(model, "b_U", None)
            own = self.kept["unembedded"].to(table) @ table
            own = own if bias is None else own + bias.to(own.device)
            name, dtype = "the unembedding", self.context.architecture.dtype
            checks.check_same(name, own, logits.detach()[0, -1].to(own.device), "y · W_U + b_U", "its logits", dtype)

    def _last(self, residual: Tensor) -> None:
        self.kept["last"] = self.context.work(residual[-1]).clone()

    def _final_scale(self, scale: Tensor) -> None:
        checks.check_norm("ln_final.hook_scale", self._needed("last")[None], scale[-1:, 0], self.context.architecture)
        self.kept["final_scale"] = to_float64(scale[-1, 0])

    def _prediction_input(self, y: Tensor) -> None:
        checks.check_finite("the unembedding's input", y[-1])
        architecture, model = self.context.architecture, self.context.model
        y, last = self.context.work(y[-1]), self._needed("last")
        if not architecture.normed:
            self.kept["final_scale"] = torch.ones((), dtype=torch.float64, device="cpu")
        own = self.context.normalized(last[None], self._needed("final_scale")[None])[0]
        norm = getattr(model, "ln_final", None)
        gain, bias = norm_gain(norm, model), norm_bias(norm)
        own = own * gain.to(own) + (0.0 if bias is None else bias.to(own))
        checks.check_same("unembed.hook_in", own, y, "ln_final of the last residual", "hook_in", architecture.dtype)
        self.kept["unembedded"] = y
        self.kept["prediction_input"] = (
            y.clone() if architecture.restore_gain is None else y * architecture.restore_gain.to(y)
        )

    def _needed(self, key: str) -> Tensor:
        if key not in self.kept:
            raise HookMismatchError(
                f"the hook {self.context.architecture.final_hooks().get(key, key)} did not fire before the "
                "unembedding; expected one whole forward pass of all layers inside the recording"
            )
        return self.kept[key]


TAKEN = {
    "last": FinalNorm._last,
    "final_scale": FinalNorm._final_scale,
    "prediction_input": FinalNorm._prediction_input,
}
