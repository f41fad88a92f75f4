"""`record` and `recording`: one forward pass of a hooked model in, a Trace out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.about import describe
from oversquash_lens.capture.architecture import Architecture, read_architecture
from oversquash_lens.capture.final_norm import FinalNorm
from oversquash_lens.capture.fused import fused_attention
from oversquash_lens.capture.hooked_model import HookedModel
from oversquash_lens.capture.layer import KEPT, LayerRecord
from oversquash_lens.capture.nodes import random_source
from oversquash_lens.capture.pass_context import PassContext
from oversquash_lens.capture.passes import Hook, NamedHook, attached, last_logits_only, without_cache
from oversquash_lens.capture.route import choose_route, own_route, patterns_fit
from oversquash_lens.capture.size import check_recording, device_of
from oversquash_lens.capture.support import architecture_support
from oversquash_lens.capture.tokens import Prompt, TokenizedPrompt, tokenize, tokenized_ids
from oversquash_lens.capture.trace import Gains, Trace
from oversquash_lens.capture.verify import verify_pass
from oversquash_lens.capture.weights import weight_gains
from oversquash_lens.errors import HookMismatchError, whole_number
from oversquash_lens.numerics import to_float64

NODE_PROBES = 2  # a node gain then is off by 0.02 in log10 (rms, SmolLM2), a tenth of what the estimate itself is


def record(
    model: Any,
    prompt: Prompt,
    *,
    chat: bool = False,
    bos: bool | None = None,
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
    verify: bool = False,
    attention: str = "auto",
) -> Trace:
    """Run one prompt through a HookedTransformer or TransformerBridge and keep what the measures need.

    `prompt` is a text or token ids [pos] / [1, pos]; `chat` applies the chat template; `bos` None leaves BOS to
    the tokenizer. `node_probes` (each worth 72 pairs of directions) estimate each MLP's mean-square gain (unbiased;
    None is exact and costs d_model directions), drawn anew per layer from `seed`. That the hooks describe the model is
    always checked at the last position and some others; `verify` checks all of them and, in two passes more, that
    recording changes nothing and the patterns shown are the ones used. `attention`: "kept" keeps every pattern, memory
    that grows as pos²; "recomputed" what makes them anew; "auto" as `oversquash_lens.capture.route.choose_route` says.
    Raises InputError for a prompt or model that cannot be used, HookMismatchError where the hooks do not fit
    the model.
    """
    tokenized = tokenize(model, prompt, chat=chat, bos=bos)
    return record_tokens(model, tokenized, node_probes=node_probes, seed=seed, verify=verify, attention=attention)


def record_tokens(
    model: Any,
    tokenized: TokenizedPrompt,
    *,
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
    verify: bool = False,
    attention: str = "auto",
) -> Trace:
    """`record` for a prompt that is already tokenized and checked."""
    n, architecture = len(tokenized.ids), read_architecture(model)
    route = choose_route(model, architecture, n, attention)
    check_recording(model, n, route, verify=verify)
    try:
        return record_on(model, tokenized, Recorder(model, node_probes, seed, verify, route, architecture))
    except HookMismatchError:
        if attention != "auto" or route == "kept" or not patterns_fit(model, n):
            raise
    # Rows made anew do not describe this model: its own patterns may, or say better what is wrong.
    return record_on(model, tokenized, Recorder(model, node_probes, seed, verify))


def record_on(model: HookedModel, tokenized: TokenizedPrompt, recorder: Recorder) -> Trace:
    """One pass on the recorder's route, and with `verify` two more."""
    ids, verify = tokenized.batch(model), recorder.verify
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if not verify:
            stack.enter_context(last_logits_only(model))
        stack.enter_context(_listening(model, recorder))
        if recorder.route == "fused":
            stack.enter_context(fused_attention(model, recorder.tell))
        output = model(ids, **without_cache(model))
    if verify:
        verify_pass(model, recorder.architecture, ids, output)
    return recorder.trace(tokenized)


@contextmanager
def recording(
    model: Any,
    *,
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
    verify: bool = False,
    attention: str = "kept",
) -> Iterator[Recorder]:
    """Record the one forward pass made inside the `with`; `recorder.trace()` then gives the Trace.

    Composes with your own hooks, whenever they were added: what is recorded is what the model goes on to use.
    Removes only its own hooks, also after an exception, and keeps no reference to the model. `verify` checks every
    position, not a few. `attention`: "kept" or "recomputed", as for `record`; the pass is always the class's own.
    """
    route = own_route(read_architecture(model), model, attention)
    with _listening(model, Recorder(model, node_probes, seed, verify, route)) as recorder:
        yield recorder


@contextmanager
def _listening(model: HookedModel, recorder: Recorder) -> Iterator[Recorder]:
    try:
        with attached(model, recorder.hooks()):
            handles = [
                model.embed.register_forward_pre_hook(recorder.begin),
                model.unembed.register_forward_hook(recorder.end),
            ]
            try:
                yield recorder
            finally:
                for handle in handles:
                    handle.remove()
    finally:
        recorder.close()


class Recorder:
    """Collects one pass, layer by layer, checks it as it goes, and forgets the model when closed."""

    def __init__(
        self,
        model: HookedModel,
        node_probes: int | None,
        seed: int,
        verify: bool = False,
        route: str = "kept",
        architecture: Architecture | None = None,
        beside: Recorder | None = None,
    ) -> None:
        """`architecture`: the model's, where the pass follows at once; otherwise it is read again when one begins.

        `beside`: the recorder of another prompt in the same pass, whose reading of the weights this one takes over.
        """
        if node_probes is not None:
            whole_number("node_probes", node_probes, otherwise=", or None for the exact gain")
        random_source(seed)  # a seed that is none is refused before the model runs
        self.architecture = read_architecture(model) if architecture is None else architecture
        self.about = describe(model, self.architecture)
        self._model: HookedModel | None = model
        self._node_probes, self._seed, self.verify, self.route = node_probes, seed, verify, route
        self._at_once, self._beside = architecture is not None, beside
        self._context: PassContext | None = None
        self._layers: list[LayerRecord] = []
        self._ending: FinalNorm | None = None
        self._tokenized: TokenizedPrompt | None = None

    def begin(self, embed: Any, inputs: tuple) -> None:
        """Forward pre-hook of the embedding: the token ids, and the weights as they are in this pass."""
        ids = inputs[0] if inputs else None
        if not (isinstance(ids, Tensor) and ids.ndim == 2 and self._model is not None) or self._layers:
            return
        self._tokenized = tokenized_ids(self._model, ids[0].detach().cpu().clone())
        self.architecture = self.architecture if self._at_once else read_architecture(self._model)
        self._context = self._read_weights() if self._beside is None else self._beside._context
        self._layers = [LayerRecord(self._context, i) for i in range(self.architecture.n_layers)]
        self._ending = FinalNorm(self._context)

    def _read_weights(self) -> PassContext:
        weights = weight_gains(self._model, self.architecture)
        home = device_of(self._model)
        return PassContext(
            self._model, self.architecture, weights, self._node_probes, self._seed, self.verify, home, self.route
        )

    def hooks(self) -> list[NamedHook]:
        inside = self.architecture.layer_hooks(self.route).items()
        pairs = [
            (f"blocks.{i}.{name}", self._in_layer(key, i))
            for i in range(self.architecture.n_layers)
            for key, name in inside
        ]
        return pairs + [(name, self._behind(key)) for key, name in self.architecture.final_hooks().items()]

    def _in_layer(self, key: str, layer: int) -> Hook:
        def take(value: Tensor, hook: Any = None) -> None:
            self._check_begun()
            if key == "residual" and layer:
                self._layers[layer - 1].leave(value.detach()[0])
            self._layers[layer].take(key, value)

        return take

    def tell(self, layer: int, key: str, value: Tensor) -> None:
        """What no hook shows, told by fused attention."""
        self._in_layer(key, layer)(value)

    def _behind(self, key: str) -> Hook:
        def take(value: Tensor, hook: Any = None) -> None:
            self._check_begun()
            if key == "last" and key not in self._ending.kept:
                self._layers[-1].leave(value.detach()[0])
            self._ending.take(key, value.detach()[0])

        return take

    def _check_begun(self) -> None:
        if self._context is None:
            raise HookMismatchError("no token ids were seen; expected a forward pass that starts from token ids")

    def end(self, unembed: Any, inputs: tuple, logits: Tensor) -> None:
        """Forward hook of the unembedding."""
        if self._model is not None and self._ending is not None and "unembedded" in self._ending.kept:
            self._ending.check_logits(logits)

    def close(self) -> None:
        """Forget the model, and all that is not kept."""
        self._model = self._beside = None
        if self._context is not None:
            self._context = replace(self._context, model=None, made={})
            self._ending.context = self._context
        for layer in self._layers:
            layer.close()
            layer.context = self._context

    def trace(self, tokenized: TokenizedPrompt | None = None) -> Trace:
        """The recorded pass. Raises HookMismatchError if there was none, or if a hook did not fire."""
        tokenized, architecture = tokenized or self._tokenized, self.architecture
        self._check_complete(tokenized)
        gain, ending = to_float64(architecture.final_gain), self._ending.kept
        gains = Gains(
            weights=self._context.weights,
            **{key: self._stack(key) for key in STACKED},
            final_scale=ending["final_scale"].item(),
            final_gain_max=gain.abs().max().item(),
            final_gain_square=gain.square().mean().item(),
            node_probes=min(self._node_probes or architecture.d_model, architecture.d_model),
            seed=self._seed,
        )
        residuals = [layer.kept["residual"] for layer in self._layers]
        return Trace(
            about=replace(self.about, bos=tokenized.bos, chat=tokenized.chat),
            tokens=tokenized.tokens,
            token_ids=tokenized.ids,
            last_residuals=torch.stack([*residuals, ending["last"]]),
            prediction_input=ending["prediction_input"],
            attention=tuple(layer.attention for layer in self._layers),
            gains=gains,
            gated_mlp=architecture.gated,
            parallel=architecture.parallel,
            support=architecture_support(architecture),
        )

    def _check_complete(self, tokenized: TokenizedPrompt | None) -> None:
        """Every hook has fired."""
        silent = [layer.silence() for layer in self._layers if layer.missing() is not None]
        silent += [f"{name} did not fire" for name in (self._ending.missing() if self._ending else ())]
        if not self._layers or tokenized is None:
            silent = ["no forward pass was seen"]
        if silent:
            raise HookMismatchError(
                f"{silent[0]}; not recorded; expected one whole forward pass inside the recording: run the model once "
                "inside it"
            )

    def _stack(self, key: str) -> Float[Tensor, "layer ..."]:
        return torch.stack([layer.kept[key] for layer in self._layers])


STACKED = tuple(key for key in KEPT if key != "residual")
