"""`record` and `recording`: one forward pass of a hooked model in, a Trace out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import GateError, InputError
from oversquash_lens.record import gate
from oversquash_lens.record.attention import KeptAttention
from oversquash_lens.record.hooks import Hook, NamedHook, attached
from oversquash_lens.record.layout import HookedModel, LayerWeights, describe, layer_weights, model_layout
from oversquash_lens.record.nodes import MlpState, mlp_lipschitz, node_gain, probe_directions
from oversquash_lens.record.prompt import Prompt, TokenizedPrompt, tokenize, tokenized_ids
from oversquash_lens.record.trace import Gains, Trace
from oversquash_lens.record.weights import WeightGains, weight_gains

NODE_PROBES = 2  # a node gain then is off by 0.02 in log10 (rms, SmolLM2), a tenth of what the estimate itself is


def record(
    model: Any,
    prompt: Prompt,
    *,
    chat: bool = False,
    bos: bool | None = None,
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
) -> Trace:
    """Run one prompt through a HookedTransformer or TransformerBridge and keep what the measures need.

    `prompt` is a text or token ids [pos] / [1, pos]; `chat` applies the chat template; `bos` None leaves BOS to
    the tokenizer. `node_probes` directions estimate each MLP's mean-square gain (unbiased; None is exact and
    costs d_model of them), drawn anew per layer from `seed`. Raises InputError for a prompt or model that cannot
    be used, GateError where the hooks do not describe the model.
    """
    tokenized = tokenize(model, prompt, chat=chat, bos=bos)
    return record_tokens(model, tokenized, node_probes=node_probes, seed=seed)


def record_tokens(
    model: Any, tokenized: TokenizedPrompt, *, node_probes: int | None = NODE_PROBES, seed: int = 0
) -> Trace:
    """`record` for a prompt that is already tokenized and checked."""
    with recording(model, node_probes=node_probes, seed=seed) as recorder, torch.no_grad():
        model(tokenized.batch(model))
    return recorder.trace(tokenized)


@contextmanager
def recording(model: Any, *, node_probes: int | None = NODE_PROBES, seed: int = 0) -> Iterator[Recorder]:
    """Record the one forward pass made inside the `with`; `recorder.trace()` then gives the Trace.

    Composes with your own hooks, whenever they were added: what is recorded is what the model goes on to use.
    Removes only its own hooks, also after an exception, and keeps no reference to the model.
    """
    if node_probes is not None and node_probes < 1:
        raise InputError(f"node_probes={node_probes} came; expected at least 1, or None for the exact gain")
    recorder = Recorder(model, node_probes, seed)
    try:
        with attached(model, recorder.hooks()):
            handle = model.embed.register_forward_pre_hook(recorder.begin)
            try:
                yield recorder
            finally:
                handle.remove()
    finally:
        recorder.close()


class Recorder:
    """Collects one pass, layer by layer, checks it as it goes, and forgets the model when closed."""

    def __init__(self, model: HookedModel, node_probes: int | None, seed: int) -> None:
        self.layout = model_layout(model)
        self.about = describe(model, self.layout)
        self._weights: WeightGains | None = None
        self._model: HookedModel | None = model
        self._node_probes, self._seed = node_probes, seed
        self._current: tuple[int, LayerWeights] | None = None
        self._seen: dict[tuple[str, int], Tensor] = {}
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._tokenized: TokenizedPrompt | None = None

    def begin(self, embed: Any, inputs: tuple) -> None:
        """Forward pre-hook of the embedding: the token ids, and the weights as they are in this pass."""
        ids = inputs[0] if inputs else None
        if isinstance(ids, Tensor) and ids.ndim == 2 and self._model is not None:
            self._tokenized = tokenized_ids(self._model, ids[0].detach().cpu().clone())
            self.layout = model_layout(self._model)  # not when the recording began
            self._weights = weight_gains(self._model, self.layout)

    def hooks(self) -> list[NamedHook]:
        layers = range(self.layout.n_layers)
        inside = self.layout.layer_hooks().items()
        pairs = [(f"blocks.{i}.{name}", self._take(key, i)) for i in layers for key, name in inside]
        last = self.layout.n_layers
        return pairs + [(name, self._take(key, last)) for key, name in self.layout.final_hooks().items()]

    def _take(self, key: str, layer: int) -> Hook:
        def take(value: Tensor, hook: Any = None) -> None:
            name = f"layer {layer}, {key}"
            if key == "attention_scale" and self._same_again(layer, value):
                return
            if (key, layer) in self._seen:
                raise GateError(
                    f"{name}: the hook fired a second time; expected one forward pass per recording, and no split "
                    "query/key/value inputs: open a new recording(model) for each pass"
                )
            if value.shape[0] != 1:
                raise InputError(f"{name}: a batch of {value.shape[0]} came; expected one prompt at a time")
            if self._weights is None:
                raise GateError("no token ids were seen; expected a forward pass that starts from token ids")
            self._seen[key, layer] = value.detach()[0]
            if key in FOLDING:
                with torch.no_grad():
                    FOLDING[key](self, layer)

        return take

    def _same_again(self, layer: int, scale: Tensor) -> bool:
        """HookedTransformer normalises the same residual once each for queries, keys and values."""
        kept = self._kept.get(("attention_scale", layer))
        return kept is not None and scale.shape[0] == 1 and torch.equal(kept, scale.detach()[0, :, 0].double())

    # Each stage turns what its layer's hooks saw into what is kept, as soon as the last of them has fired.

    def _attention(self, layer: int) -> None:
        name = f"layer {layer}, attention"
        query, key, value, scores, pattern, z = (
            self._pop(part, layer) for part in ("query", "key", "value", "scores", "pattern", "z")
        )
        if pattern.shape[1] != pattern.shape[2]:
            raise InputError(f"{name}: a pass with a key/value cache came; expected the whole prompt at once")
        gate.check_pattern(name, pattern)
        gate.check_output(name, pattern, value, z)
        gate.check_scores(name, scores, query, key, self._weights.score_scale[layer].item())
        weights, residual = self._layer_weights(layer), self._earlier("residual", layer)
        centre = residual.mean() if self.layout.centred else 0.0
        normalized = (residual - centre) / self._earlier("attention_scale", layer)[-1].to(residual)
        last = {"query": query[-1], "key": key[-1], "value": value[-1]}
        gate.check_projections(name, normalized, weights, last, self.layout.dtype)
        self._kept["pattern", layer] = pattern.clone()  # a user's cache may hold the same memory
        self._kept["z_last", layer] = self._work(z[-1]).clone()
        self._kept["value", layer] = self._work(value).transpose(0, 1).clone(memory_format=torch.contiguous_format)
        self._kept["query_norm", layer] = self._work(query).norm(dim=-1).T.contiguous()
        self._kept["key_norm", layer] = self._work(key).norm(dim=-1).T.contiguous()

    def _mlp(self, layer: int) -> None:
        name, layout = f"layer {layer}, MLP", self.layout
        weights = self._layer_weights(layer)
        up = self._work(self._pop("pre_linear", layer)) if layout.gated else None
        state = MlpState(
            normalized=self._work(self._pop("mlp_normalized", layer)),
            scale=self._work(self._pop("mlp_scale", layer))[:, 0],
            gate=self._work(self._pop("pre", layer)),
            up=up,
        )
        post = self._pop("post", layer)[-1]
        gate.check_mlp(name, state, post, weights, layout)
        self._kept["post_last", layer] = self._work(post).clone()
        directions = probe_directions(layout.d_model, self._node_probes, self._seed, layer)
        w, act = self._weights, layout.activation
        slopes = state.slopes(act)
        sigma = mlp_lipschitz(slopes, w.mlp_gate_norm[layer], w.mlp_in_norm[layer], w.mlp_out_norm[layer])
        self._kept["node_gain", layer] = node_gain(state, weights, slopes, directions, layout.centred).double()
        self._kept["mlp_scale", layer] = state.scale.double()
        self._kept["mlp_lipschitz", layer] = sigma / state.scale.double()
        if layout.gated:  # no global constant exists: the largest over this prompt's activations
            self._kept["mlp_sigma", layer] = sigma.max()
        else:
            self._kept["mlp_sigma", layer] = w.mlp_in_norm[layer] * act.lipschitz * w.mlp_out_norm[layer]

    def _residual(self, layer: int) -> None:
        residual = self._pop("residual" if layer < self.layout.n_layers else "last", layer)
        gate.check_finite(f"layer {layer}, residual", residual)
        self._kept["residual", layer] = self._work(residual[-1]).clone()
        if layer and ("middle", layer - 1) in self._kept:
            weights = self._layer_weights(layer - 1)
            update = self._earlier("post_last", layer - 1) @ self._work(weights.mlp_out)
            self._check_sum(layer - 1, "MLP", "middle", update, weights.mlp_out_bias, ("residual", layer))

    def _norm_scale(self, layer: int) -> None:
        scale = self._pop("attention_scale", layer)
        if scale.ndim != 2:
            raise GateError(
                f"layer {layer}, attention: the norm's divisor came per head; expected one residual stream for "
                "queries, keys and values: model.set_use_split_qkv_input(False), model.set_use_attn_in(False)"
            )
        self._kept["attention_scale", layer] = scale[:, 0].double()

    def _middle(self, layer: int) -> None:
        self._kept["middle", layer] = self._work(self._pop("middle", layer)[-1]).clone()
        weights = self._layer_weights(layer)
        update = self._earlier("z_last", layer).flatten() @ self._work(weights.output).flatten(0, 1)
        self._check_sum(layer, "attention", "residual", update, weights.output_bias, ("middle", layer))

    def _check_sum(
        self, layer: int, part: str, before: str, update: Tensor, bias: Tensor | None, after: tuple[str, int]
    ) -> None:
        update = update if bias is None else update + self._work(bias)
        name, dtype = f"layer {layer}, {part}", self.layout.dtype
        gate.check_sum(name, self._earlier(before, layer), update, self._earlier(*after), dtype)

    def _final_scale(self, layer: int) -> None:
        self._kept["final_scale", layer] = self._pop("final_scale", layer)[-1, 0].double()

    def _prediction_input(self, layer: int) -> None:
        y = self._pop("prediction_input", layer)[-1]
        gate.check_finite("the unembedding's input", y)
        restore = self.layout.restore_gain
        y = self._work(y)
        self._kept["prediction_input", layer] = y.clone() if restore is None else y * restore.to(y)

    def _layer_weights(self, layer: int) -> LayerWeights:
        """The weights of the layer that is running; its stages ask one after another."""
        if self._current is None or self._current[0] != layer:
            self._current = (layer, layer_weights(self._model, self.layout, layer))
        return self._current[1]

    def _pop(self, key: str, layer: int) -> Tensor:
        """What a hook saw, the memory given back; the mark that it fired stays."""
        value = self._fired(self._seen, key, layer)
        self._seen[key, layer] = value.new_empty(0)
        return value

    def _earlier(self, key: str, layer: int) -> Tensor:
        """What an earlier stage kept."""
        return self._fired(self._kept, key, layer)

    def _fired(self, where: dict[tuple[str, int], Tensor], key: str, layer: int) -> Tensor:
        if (key, layer) not in where:
            raise GateError(
                f"layer {layer}: the hook for {key.removesuffix('_last')} did not fire before its layer was over; "
                "expected it once: this model class does not show its own computation there (try "
                "attn_implementation='eager')"
            )
        return where[key, layer]

    def _work(self, value: Tensor) -> Tensor:
        """float64 models stay float64; everything else is accumulated in float32."""
        return value.double() if self.layout.dtype == torch.float64 else value.float()

    def close(self) -> None:
        self._model = self._current = None
        self._seen = {}

    def trace(self, tokenized: TokenizedPrompt | None = None) -> Trace:
        """The recorded pass. Raises GateError if there was none, or if a hook did not fire."""
        tokenized, layout = tokenized or self._tokenized, self.layout
        expected = [(key, i) for i in range(layout.n_layers) for key in KEPT_PER_LAYER]
        expected += [(key, layout.n_layers) for key in KEPT_AT_THE_END]
        missing = [part for part in expected if part not in self._kept]
        if missing or tokenized is None:
            missing = missing or [("the token ids", 0)]
            raise GateError(
                f"{missing[0][0]} of layer {missing[0][1]} was not recorded ({len(missing)} of {len(expected)} parts "
                "are missing); expected one whole forward pass inside the recording"
            )
        gain = layout.final_gain.double()
        gains = Gains(
            weights=self._weights,
            **{key: self._stack(key) for key in STACKED},
            final_scale=self._kept["final_scale", layout.n_layers].item(),
            final_gain_max=gain.abs().max().item(),
            final_gain_square=gain.square().mean().item(),
            node_probes=min(self._node_probes or layout.d_model, layout.d_model),
            seed=self._seed,
        )
        return Trace(
            about=replace(self.about, bos=tokenized.bos, chat=tokenized.chat),
            tokens=tokenized.tokens,
            token_ids=tokenized.ids,
            last_residuals=torch.stack([self._kept["residual", i] for i in range(layout.n_layers + 1)]),
            prediction_input=self._kept["prediction_input", layout.n_layers],
            attention=tuple(KeptAttention(self._kept["pattern", i]) for i in range(layout.n_layers)),
            gains=gains,
            gated_mlp=layout.gated,
        )

    def _stack(self, key: str) -> Float[Tensor, "layer ..."]:
        return torch.stack([self._kept[key, i] for i in range(self.layout.n_layers)])


# When a key's hook fires, everything that its stage needs has been seen.
FOLDING = {
    "attention_scale": Recorder._norm_scale,
    "z": Recorder._attention,
    "middle": Recorder._middle,
    "post": Recorder._mlp,
    "residual": Recorder._residual,
    "last": Recorder._residual,
    "final_scale": Recorder._final_scale,
    "prediction_input": Recorder._prediction_input,
}
STACKED = (
    "attention_scale",
    "mlp_scale",
    "value",
    "query_norm",
    "key_norm",
    "node_gain",
    "mlp_lipschitz",
    "mlp_sigma",
)
KEPT_PER_LAYER = (*STACKED, "pattern", "residual", "middle")
KEPT_AT_THE_END = ("residual", "final_scale", "prediction_input")
