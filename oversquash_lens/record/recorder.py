"""`record` and `recording`: one forward pass of a hooked model in, a Trace out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import GateError, whole_number
from oversquash_lens.record import gate
from oversquash_lens.record.attention import KeptAttention
from oversquash_lens.record.hooks import Hook, NamedHook, attached
from oversquash_lens.record.layer import KEPT, LayerRecord
from oversquash_lens.record.layout import HookedModel, describe, model_layout
from oversquash_lens.record.nodes import random_source
from oversquash_lens.record.norms import norm_bias, norm_gain
from oversquash_lens.record.prompt import Prompt, TokenizedPrompt, tokenize, tokenized_ids
from oversquash_lens.record.size import check_recording
from oversquash_lens.record.support import layout_support
from oversquash_lens.record.trace import Gains, Trace
from oversquash_lens.record.verify import verify_pass
from oversquash_lens.record.weights import weight_gains
from oversquash_lens.record.whole import Whole
from oversquash_lens.record.wide import wide

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
) -> Trace:
    """Run one prompt through a HookedTransformer or TransformerBridge and keep what the measures need.

    `prompt` is a text or token ids [pos] / [1, pos]; `chat` applies the chat template; `bos` None leaves BOS to
    the tokenizer. `node_probes` directions estimate each MLP's mean-square gain (unbiased; None is exact and
    costs d_model of them), drawn anew per layer from `seed`. That the hooks describe the model is always checked
    at the last position and some others; `verify` checks all of them and, in two passes more, that recording
    changes nothing and the patterns shown are the ones used. Raises InputError for a prompt or model that cannot
    be used, GateError where the hooks do not describe the model.
    """
    tokenized = tokenize(model, prompt, chat=chat, bos=bos)
    return record_tokens(model, tokenized, node_probes=node_probes, seed=seed, verify=verify)


def record_tokens(
    model: Any,
    tokenized: TokenizedPrompt,
    *,
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
    verify: bool = False,
) -> Trace:
    """`record` for a prompt that is already tokenized and checked."""
    check_recording(model, len(tokenized.ids))
    with recording(model, node_probes=node_probes, seed=seed, verify=verify) as recorder, torch.no_grad():
        output = model(tokenized.batch(model))
    if verify:
        verify_pass(model, recorder.layout, tokenized.batch(model), output)
    return recorder.trace(tokenized)


@contextmanager
def recording(
    model: Any, *, node_probes: int | None = NODE_PROBES, seed: int = 0, verify: bool = False
) -> Iterator[Recorder]:
    """Record the one forward pass made inside the `with`; `recorder.trace()` then gives the Trace.

    Composes with your own hooks, whenever they were added: what is recorded is what the model goes on to use.
    Removes only its own hooks, also after an exception, and keeps no reference to the model. `verify` checks every
    position, not a few.
    """
    if node_probes is not None:
        whole_number("node_probes", node_probes, otherwise=", or None for the exact gain")
    random_source(seed)  # a seed that is none is refused before the model runs
    recorder = Recorder(model, node_probes, seed, verify)
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

    def __init__(self, model: HookedModel, node_probes: int | None, seed: int, verify: bool = False) -> None:
        self.layout = model_layout(model)
        self.about = describe(model, self.layout)
        self._model: HookedModel | None = model
        self._node_probes, self._seed, self._verify = node_probes, seed, verify
        self._whole: Whole | None = None
        self._layers: list[LayerRecord] = []
        self._kept: dict[str, Tensor] = {}
        self._tokenized: TokenizedPrompt | None = None

    def begin(self, embed: Any, inputs: tuple) -> None:
        """Forward pre-hook of the embedding: the token ids, and the weights as they are in this pass."""
        ids = inputs[0] if inputs else None
        if not (isinstance(ids, Tensor) and ids.ndim == 2 and self._model is not None) or self._layers:
            return
        self._tokenized = tokenized_ids(self._model, ids[0].detach().cpu().clone())
        self.layout = model_layout(self._model)  # not when the recording began
        weights = weight_gains(self._model, self.layout)
        self._whole = Whole(self._model, self.layout, weights, self._node_probes, self._seed, self._verify)
        self._layers = [LayerRecord(self._whole, i) for i in range(self.layout.n_layers)]

    def hooks(self) -> list[NamedHook]:
        inside = self.layout.layer_hooks().items()
        pairs = [
            (f"blocks.{i}.{name}", self._in_layer(key, i)) for i in range(self.layout.n_layers) for key, name in inside
        ]
        return pairs + [(name, self._behind(key)) for key, name in self.layout.final_hooks().items()]

    def _in_layer(self, key: str, layer: int) -> Hook:
        def take(value: Tensor, hook: Any = None) -> None:
            self._check_begun()
            if key == "residual" and layer:
                self._layers[layer - 1].leave(value.detach()[0])
            self._layers[layer].take(key, value)

        return take

    def _behind(self, key: str) -> Hook:
        def take(value: Tensor, hook: Any = None) -> None:
            self._check_begun()
            if key in self._kept:
                raise GateError(f"{key}: the hook fired a second time; expected one forward pass per recording")
            with torch.no_grad():
                BEHIND[key](self, value.detach()[0])

        return take

    def _check_begun(self) -> None:
        if self._whole is None:
            raise GateError("no token ids were seen; expected a forward pass that starts from token ids")

    def _last(self, residual: Tensor) -> None:
        self._layers[-1].leave(residual)
        self._kept["last"] = self._whole.work(residual[-1]).clone()

    def _final_scale(self, scale: Tensor) -> None:
        gate.check_norm("ln_final.hook_scale", self._needed("last")[None], scale[-1:, 0], self.layout)
        self._kept["final_scale"] = wide(scale[-1, 0])

    def _prediction_input(self, y: Tensor) -> None:
        gate.check_finite("the unembedding's input", y[-1])
        y, last = self._whole.work(y[-1]), self._needed("last")
        if not self.layout.normed:
            self._kept["final_scale"] = torch.ones((), dtype=torch.float64, device="cpu")
        own = self._whole.normalized(last[None], self._needed("final_scale")[None])[0]
        norm = getattr(self._model, "ln_final", None)
        gain, bias = norm_gain(norm, self._model), norm_bias(norm)
        own = own * gain.to(own) + (0.0 if bias is None else bias.to(own))
        gate.check_same("unembed.hook_in", own, y, "ln_final of the last residual", "hook_in", self.layout.dtype)
        self._kept["unembedded"] = y
        restore = self.layout.restore_gain
        self._kept["prediction_input"] = y.clone() if restore is None else y * restore.to(y)

    def end(self, unembed: Any, inputs: tuple, logits: Tensor) -> None:
        """Forward hook of the unembedding: its logits are those of the y that was recorded."""
        if self._model is None or "unembedded" not in self._kept:
            return
        with torch.no_grad():
            table, bias = self._model.W_U, getattr(self._model, "b_U", None)
            own = self._kept["unembedded"].to(table) @ table
            own = own if bias is None else own + bias
            name = "the unembedding"
            gate.check_same(name, own, logits.detach()[0, -1], "y · W_U + b_U", "its logits", self.layout.dtype)

    def _needed(self, key: str) -> Tensor:
        if key not in self._kept:
            raise GateError(
                f"the hook {self.layout.final_hooks().get(key, key)} did not fire before the unembedding; expected one "
                "whole forward pass of all layers inside the recording"
            )
        return self._kept[key]

    def close(self) -> None:
        """Forget the model, and all that is not kept."""
        self._model = None
        if self._whole is not None:
            self._whole = replace(self._whole, model=None)
        for layer in self._layers:
            layer.close()
            layer.whole = self._whole

    def trace(self, tokenized: TokenizedPrompt | None = None) -> Trace:
        """The recorded pass. Raises GateError if there was none, or if a hook did not fire."""
        tokenized, layout = tokenized or self._tokenized, self.layout
        self._check_whole(tokenized)
        gain = wide(layout.final_gain)
        gains = Gains(
            weights=self._whole.weights,
            **{key: self._stack(key) for key in STACKED},
            final_scale=self._kept["final_scale"].item(),
            final_gain_max=gain.abs().max().item(),
            final_gain_square=gain.square().mean().item(),
            node_probes=min(self._node_probes or layout.d_model, layout.d_model),
            seed=self._seed,
        )
        residuals = [layer.kept["residual"] for layer in self._layers]
        return Trace(
            about=replace(self.about, bos=tokenized.bos, chat=tokenized.chat),
            tokens=tokenized.tokens,
            token_ids=tokenized.ids,
            last_residuals=torch.stack([*residuals, self._kept["last"]]),
            prediction_input=self._kept["prediction_input"],
            attention=tuple(KeptAttention(layer.kept["pattern"]) for layer in self._layers),
            gains=gains,
            gated_mlp=layout.gated,
            parallel=layout.parallel,
            support=layout_support(layout),
        )

    def _check_whole(self, tokenized: TokenizedPrompt | None) -> None:
        """Every hook has fired."""
        silent = [layer.silence() for layer in self._layers if layer.missing() is not None]
        silent += [f"{name} did not fire" for key, name in self.layout.final_hooks().items() if key not in self._kept]
        if not self._layers or tokenized is None:
            silent = ["no forward pass was seen"]
        if silent:
            raise GateError(
                f"{silent[0]}; not recorded; expected one whole forward pass inside the recording: run the model once "
                "inside it"
            )

    def _stack(self, key: str) -> Float[Tensor, "layer ..."]:
        return torch.stack([layer.kept[key] for layer in self._layers])


# What is made of the hooks behind the last layer.
BEHIND = {
    "last": Recorder._last,
    "final_scale": Recorder._final_scale,
    "prediction_input": Recorder._prediction_input,
}
STACKED = tuple(key for key in KEPT if key not in ("residual", "pattern"))
