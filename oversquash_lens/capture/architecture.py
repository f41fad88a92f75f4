"""What differs between HookedTransformer and TransformerBridge, and between architectures, in one table.

Both classes answer to the same hook aliases; which of them an architecture has, and what its equations lack or add
(docs/theory.md, section 10), is looked up here and nowhere else. Structure is read from the hooks and modules that
exist, not from the config, which a bridge does not keep up to date.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture import structure
from oversquash_lens.capture.about import About, software_versions
from oversquash_lens.capture.activations import Activation
from oversquash_lens.capture.norms import folded_final_gain, is_folded, norm_gain
from oversquash_lens.errors import InputError, ModelError


@runtime_checkable
class HookedModel(Protocol):
    """The surface that HookedTransformer and TransformerBridge share and that we use."""

    cfg: Any
    hook_dict: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...


# What is recorded in each layer -> the hook's name inside `blocks.{layer}.`, the same on both classes, in the order
# in which they fire.
LAYER_HOOKS = {
    "residual": "hook_resid_pre",
    "attention_scale": "ln1.hook_scale",
    "query": "attn.hook_q",
    "key": "attn.hook_k",
    "value": "attn.hook_v",
    "cos": "attn.hook_cos",
    "sin": "attn.hook_sin",
    "turned_query": "attn.hook_rot_q",
    "turned_key": "attn.hook_rot_k",
    "scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "attention_post_scale": "ln1_post.hook_scale",
    "middle": "hook_resid_mid",
    "mlp_scale": "ln2.hook_scale",
    "pre": "mlp.hook_pre",
    "pre_linear": "mlp.hook_pre_linear",
    "post": "mlp.hook_post",
    "mlp_post_scale": "ln2_post.hook_scale",
    "mlp_post_normalized": "ln2_post.hook_normalized",
    "mlp_out": "hook_mlp_out",
}
# The property of a `Architecture` without which a layer has no such hook; every layer has those that are not listed.
ONLY_IF = {
    "attention_scale": "normed",
    "attention_post_scale": "post_norms",
    "middle": "sequential",
    "mlp_scale": "own_mlp_norm",
    "pre": "dense",
    "pre_linear": "gated",
    "post": "dense",
    "mlp_post_scale": "post_norms",
    "mlp_post_normalized": "post_norms",
    "mlp_out": "experts",
}
# How attention is recorded: "kept" keeps the pattern; "recomputed" what makes it anew, in the class's own pass; "fused"
# the same, in a pass of our own that makes no pattern (oversquash_lens.capture.fused).
ROUTES = ("kept", "recomputed", "fused")
# Where a layer shows queries and keys as they meet in the score: before any turn ("none"), in hooks behind it
# ("shown"), before it and beside the tables that turn them ("tables"), before it only, turned as GPT-J does ("pairs").
ROTATIONS = ("none", "shown", "tables", "pairs", "unknown")
# Which route listens to what only some do, and with which rotation.
ONLY_ON = {
    "cos": (("recomputed",), ("tables",)),
    "sin": (("recomputed",), ("tables",)),
    "turned_query": (("recomputed",), ("shown",)),
    "turned_key": (("recomputed",), ("shown",)),
    "scores": (("kept",), ROTATIONS),
    "pattern": (("kept", "recomputed"), ROTATIONS),
}
FINAL_HOOKS = {
    "last": "blocks.{last}.hook_resid_post",
    "final_scale": "ln_final.hook_scale",
    "prediction_input": "unembed.hook_in",
}
# What a layer's MLP is.
MLPS = ("plain", "gated", "experts", "none")


@dataclass(frozen=True)
class Architecture:
    """A hooked model's structure: which of the theory's terms it has.

    `norms` is "layer" (subtracts the mean), "rms" or "none". `parallel`: attention and MLP both read the residual
    that enters the layer; `shared_norm`: through one norm. `post_norms`: what attention and MLP write is normalised.
    `qk_norm`: queries and keys are, head by head. `delegated`: the attention is computed out of the hooks' sight,
    which show the scores only after the softmax; `rotary_dim` then says how much of a head its positions turn.
    `rotation`: one of `ROTATIONS`. `alibi`: scores carry a bias that grows with the position, counted from the first;
    `biased`: wherever it is counted from. `windows`: how many positions each layer sees, None for
    all. `score_factor`: what stretched rotations multiply scores by (YaRN).
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_mlp: int
    n_ctx: int
    norms: str
    parallel: bool
    shared_norm: bool
    post_norms: bool
    qk_norm: bool
    mlp: str
    delegated: bool
    rotary_dim: int
    rotation: str
    alibi: bool
    biased: bool
    score_factor: float
    soft_cap: float | None
    windows: tuple[int | None, ...]
    sinks: bool
    eps: float
    activation: Activation | None
    dtype: torch.dtype
    folded: bool
    final_gain: Float[Tensor, " d_model"]
    final_gain_state: str
    restore_gain: Float[Tensor, " d_model"] | None

    @property
    def normed(self) -> bool:
        return self.norms != "none"

    @property
    def centred(self) -> bool:
        return self.norms == "layer"

    @property
    def dense(self) -> bool:
        return self.mlp in ("plain", "gated")

    @property
    def gated(self) -> bool:
        return self.mlp == "gated"

    @property
    def experts(self) -> bool:
        return self.mlp == "experts"

    @property
    def sequential(self) -> bool:
        return self.mlp != "none" and not self.parallel

    @property
    def own_mlp_norm(self) -> bool:
        return self.mlp != "none" and self.normed and not self.shared_norm

    def layer_hooks(self, route: str = "kept") -> dict[str, str]:
        """Key -> name inside `blocks.{layer}.` of the hooks that a route listens to in a layer of this model."""
        return {key: name for key, name in LAYER_HOOKS.items() if self._has(key) and self._heard(key, route)}

    def _has(self, key: str) -> bool:
        return key not in ONLY_IF or getattr(self, ONLY_IF[key])

    def _heard(self, key: str, route: str) -> bool:
        routes, rotations = ONLY_ON.get(key, (ROUTES, ROTATIONS))
        return route in routes and self.rotation in rotations

    def final_hooks(self) -> dict[str, str]:
        found = {key: name.format(last=self.n_layers - 1) for key, name in FINAL_HOOKS.items()}
        return found if self.normed else {key: name for key, name in found.items() if key != "final_scale"}

    def scale_hooks(self) -> tuple[str, ...]:
        """The norms' divisors inside a layer; those of queries and keys apart."""
        return tuple(name for key, name in self.layer_hooks().items() if key.endswith("_scale"))


def read_architecture(model: Any) -> Architecture:
    """Read a model's structure; a ModelError names what this package cannot describe."""
    if not (hasattr(model, "hook_dict") and hasattr(model, "cfg") and hasattr(model, "blocks")):
        raise InputError(
            f"expected a HookedTransformer or TransformerBridge, got a {type(model).__name__}: load one with "
            "oversquash_lens.load_model()"
        )
    hooks = model.hook_dict  # a bridge builds it anew at every look
    structure.refuse_unknown_structure(model, hooks)
    cfg, block = model.cfg, model.blocks[0]
    folded = is_folded(model)
    restore = folded_final_gain(model) if folded else None
    weight, mlp = block.attn.W_O, structure.mlp_kind(block)
    architecture = Architecture(
        n_layers=len(model.blocks),
        n_heads=weight.shape[0],
        n_kv_heads=getattr(cfg, "n_key_value_heads", None) or weight.shape[0],
        d_model=weight.shape[2],
        d_mlp=block.mlp.W_out.shape[0] if mlp in ("plain", "gated") else 0,
        n_ctx=cfg.n_ctx,
        norms=structure.norms(model, hooks),
        parallel=structure.parallel(model, hooks),
        shared_norm=structure.parallel(model, hooks) and "blocks.0.ln2.hook_scale" not in hooks,
        post_norms="blocks.0.ln1_post.hook_scale" in hooks,
        qk_norm=any(f"blocks.0.attn.{name}.hook_scale" in hooks for name in ("q_norm", "k_norm")),
        mlp=mlp,
        # A bridge's plain attention hands everything to the module that it wraps; its other kinds compute themselves.
        delegated=type(block.attn).__name__ == "AttentionBridge",
        rotary_dim=structure.rotary_dim(model),
        rotation=structure.rotation(model, hooks),
        alibi=structure.alibi(model),
        biased=structure.biased(model),
        score_factor=structure.score_factor(model),
        soft_cap=structure.soft_cap(model),
        windows=tuple(structure.window(model, layer) for layer in range(len(model.blocks))),
        sinks=structure.per_head_sinks(block) is not None,
        eps=float(getattr(cfg, "eps", None) or 1e-5),
        activation=structure.activation(model) if mlp in ("plain", "gated") else None,
        dtype=weight.dtype,
        folded=folded,
        final_gain=norm_gain(getattr(model, "ln_final", None), model) if restore is None else restore,
        final_gain_state="model" if not folded else ("restored" if restore is not None else "unknown"),
        restore_gain=restore,
    )
    _refuse_missing_hooks(model, architecture, hooks)
    return architecture


def describe(model: HookedModel, architecture: Architecture) -> About:
    """The label that every result carries."""
    return About(
        model=getattr(model.cfg, "model_name", None) or "unnamed",
        model_class=type(model).__name__,
        n_layers=architecture.n_layers,
        n_heads=architecture.n_heads,
        d_model=architecture.d_model,
        dtype=str(architecture.dtype).removeprefix("torch."),
        folded=architecture.folded,
        final_gain=architecture.final_gain_state,
        bos=False,
        chat=False,
        versions=software_versions(),
    )


def _refuse_missing_hooks(model: HookedModel, architecture: Architecture, hooks: dict[str, Any]) -> None:
    missing = [name for name in architecture.layer_hooks().values() if f"blocks.0.{name}" not in hooks]
    if missing:
        raise ModelError(
            f"{structure.model_name(model)} has no hook {missing[0]!r} in its blocks; expected TransformerLens' "
            "standard hooks: load the model with attn_implementation='eager'"
        )
