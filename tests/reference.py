"""The theory written out a second time: slow, plain, float64, full d×d products, one loop per index.

Written from the mathematics alone (docs/theory.md, sections 2 to 4 and 10) and sharing nothing with the package, so
that agreement means something. `read` takes what the formulas need from a model of any family by hook name, and
rebuilds queries, keys, values and the residual stream from it, so that nothing is read wrongly; `reference` gives the
edge matrices, node factors and constant of a bound, `mean_field` those of the estimate; `brute_force` sums over every
causal path one by one; `exact_jacobian` is autograd, one row of one Jacobian at a time.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PRINTED = ("proof", "theorem_5_1", "theorem_b5", "multi_head", "rollout")
SOUND = ("calibrated", "calibrated_full")
VARIANTS = PRINTED + SOUND

# Least upper bound of |act'(x)| over all x, rounded up in the tenth digit; `activation_slope_sup` finds them
# again. relu: 1. silu: at x = 2.3994. gelu (erf): Φ(√2) + √2 φ(√2), at x = √2. Tanh gelus: at x = 1.4185.
LIPSCHITZ = {
    "relu": 1.0,
    "silu": 1.0998393202,
    "gelu": 1.1289041452,
    "gelu_new": 1.1289930687,
    "gelu_fast": 1.1289930687,
    "gelu_pytorch_tanh": 1.1289930687,
}


Act = str | Callable[[torch.Tensor], torch.Tensor]  # by name, or as the model's own module has it


def activation(name: Act, x: torch.Tensor) -> torch.Tensor:
    """The activation function of that name, written by hand."""
    if callable(name):
        return name(x)
    if name == "relu":
        return x.clamp(min=0)
    if name == "relu2":
        return x.clamp(min=0) ** 2
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(name)


def activation_slope(name: Act, x: torch.Tensor) -> torch.Tensor:
    """act'(x) by autograd; relu's slope at exactly 0 counts as 0."""
    if name == "relu":
        return (x > 0).to(x.dtype)
    x = x.detach().clone().requires_grad_(True)
    return torch.autograd.grad(activation(name, x).sum(), x)[0]


def activation_slope_sup(name: str, reach: float = 12.0, points: int = 2_000_001) -> float:
    """Largest |act'| on a dense grid over [-reach, reach]; beyond it the slope is 0 or 1 to many digits."""
    grid = torch.linspace(-reach, reach, points, dtype=torch.float64)
    return activation_slope(name, grid).abs().max().item()


@dataclass
class Layer:
    """One layer as read: activations at every position, weights with one entry per query head.

    A norm that is not there has gains and divisors of 1. `scale` is what q·k is multiplied by, `written` what a block
    multiplies by before it adds to the residual stream (Granite), 1 elsewhere.
    """

    pattern: torch.Tensor  # [head, dest, src]
    q: torch.Tensor  # [pos, head, d_head], as it enters the score, but not turned by its position
    k: torch.Tensor  # [pos, head, d_head], the same
    v: torch.Tensor  # [pos, head, d_head]
    scale: float
    r1: torch.Tensor  # [pos]: divisor of the norm before attention
    r2: torch.Tensor  # [pos]: before the MLP
    rho1: torch.Tensor  # [pos]: of the norm of what attention writes
    rho2: torch.Tensor  # [pos]: of what the MLP writes
    rq: torch.Tensor  # [pos, head]: of the queries' own norm
    rk: torch.Tensor  # [pos, head]: of the keys' own norm
    gain1: torch.Tensor  # [d_model], and so gain2, post1, post2
    gain2: torch.Tensor
    post1: torch.Tensor
    post2: torch.Tensor
    gain_q: torch.Tensor  # [head, d_head], and so gain_k
    gain_k: torch.Tensor
    across: bool  # whether one norm takes the queries of all heads together, and one the keys
    inner_centred: bool  # whether these take the mean away
    clip: float | None  # queries, keys and values are cut to ±clip
    groups: int  # heads that share keys and values
    w_q: torch.Tensor  # [head, d_model, d_head], and so w_k, w_v
    w_k: torch.Tensor
    w_v: torch.Tensor
    w_o: torch.Tensor  # [head, d_head, d_model]
    pre: torch.Tensor | None  # [pos, d_mlp]: input of the activation (the gate, where there is one); None without MLP
    linear: torch.Tensor | None  # [pos, d_mlp]: what the gate multiplies
    w_gate: torch.Tensor | None  # [d_model, d_mlp]
    w_in: torch.Tensor | None  # [d_model, d_mlp]; None also in a mixture of experts
    w_out: torch.Tensor | None  # [d_mlp, d_model]
    act: Act
    node: torch.Tensor  # [pos]: ‖I + J_MLP‖_F²/d by autograd through the model's own modules
    written: float = 1.0


@dataclass
class Reading:
    """Everything the formulas need of one model on one prompt."""

    layers: list[Layer]
    r3: torch.Tensor  # [pos]
    gain3: torch.Tensor  # [d_model]
    centred: bool  # whether norms take the mean away
    parallel: bool  # whether the MLP reads what attention reads
    experts: bool  # whether it is a mixture of experts

    @property
    def n(self) -> int:
        return self.r3.shape[0]

    @property
    def d_model(self) -> int:
        return self.gain3.shape[0]


def _per_query_head(x: torch.Tensor, axis: int, n_heads: int) -> torch.Tensor:
    """Repeat key/value heads until there is one per query head."""
    return x.repeat_interleave(n_heads // x.shape[axis], dim=axis)


PER_BLOCK = (
    *(f"attn.hook_{name}" for name in ("pattern", "q", "k", "v", "rot_q", "rot_k", "attn_scores")),
    *(f"{norm}.hook_scale" for norm in ("ln1", "ln2", "ln1_post", "ln2_post", "attn.q_norm", "attn.k_norm")),
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"),
)


def _hooked_values(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    known = model.hook_dict
    names = [f"blocks.{layer}.{name}" for layer in range(model.cfg.n_layers) for name in PER_BLOCK]
    names = [name for name in [*names, "ln_final.hook_scale"] if name in known]
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(value: torch.Tensor, hook: Any = None) -> None:
            value = value.detach().double().clone()
            found[name] = value[0] if value.shape[0] == 1 else value

        return hook

    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(name, keep(name)) for name in names])
    return found


def _weight(module: Any, *names: str) -> torch.Tensor | None:
    for name in names:
        found = getattr(module, name, None)
        if isinstance(found, torch.Tensor):
            return found.detach().double()
    return None


def _norm(norm: Any, size: int, like: torch.Tensor, flat: bool = False) -> tuple[torch.Tensor, bool]:
    """A norm's γ, and whether it takes the mean away; 1 and no where there is none.

    Both are seen by running it: whether 1 is added to the γ that is stored (Gemma), and what becomes of a constant.
    `flat`: it takes rows [row, size], not [batch, pos, size].
    """
    if norm is None:
        return torch.ones(size, dtype=torch.float64), False

    def run(x: torch.Tensor) -> torch.Tensor:
        x = x.to(like)
        with torch.no_grad():
            return norm(x[None] if flat else x[None, None]).double().flatten()

    stored, bias = _weight(norm, "w", "weight"), _weight(norm, "b", "bias")
    constant = run(torch.full((size,), 3.0)) - (0 if bias is None else bias)
    centred = constant.abs().max().item() < 1e-2
    if stored is None:
        return torch.ones(size, dtype=torch.float64), centred
    x = torch.linspace(0, 9, size, dtype=torch.float64).cos()
    inside = x - x.mean() if centred else x
    shown = (run(x) - (0 if bias is None else bias)) / inside * inside.square().mean().sqrt()
    return min((stored, stored + 1), key=lambda gain: (gain - shown).abs().max().item()), centred


def _own_scale(model: Any, attn: Any, layer: int) -> float:
    """What q·k is multiplied by in the score, as the config has it."""
    if not hasattr(model, "original_model"):
        divisor = model.cfg.attn_scale if model.cfg.use_attn_scale else 1.0
        return 1 / (divisor * (layer + 1 if model.cfg.scale_attn_by_inverse_layer_idx else 1))
    config = model.original_model.config
    if getattr(config, "attention_multiplier", None) is not None:  # Granite
        return config.attention_multiplier
    if getattr(config, "model_type", "") == "gpt_neo":
        return 1.0
    return (getattr(config, "query_pre_attn_scalar", None) or attn.W_Q.shape[-1]) ** -0.5


def _own_cap(model: Any) -> float | None:
    """c of c·tanh(score/c) as the config has it; nan where ALiBi is added to the scores as well."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    biased = getattr(config, "alibi", False) or getattr(config, "model_type", "") in ("bloom", "mpt")
    if biased or getattr(model.cfg, "positional_embedding_type", "") == "alibi":
        return math.nan
    cap = getattr(config, "attn_logit_softcapping", None) or getattr(model.cfg, "attn_scores_soft_cap", None)
    return float(cap) if cap is not None and cap > 0 else None


def _final_gain(model: Any, like: torch.Tensor) -> torch.Tensor:
    """γ₃; where it was folded into the unembedding, from W_U = γ₃ · W_Eᵀ up to a shift, if that holds (tied once)."""
    gain = _norm(getattr(model, "ln_final", None), like.shape[2], like)[0]
    if not (gain == 1).all() or not hasattr(model, "W_U"):
        return gain
    embed, unembed = model.W_E.detach().double().T, model.W_U.detach().double()
    embed, unembed = (x - x.mean(1, keepdim=True) for x in (embed, unembed))
    folded = torch.stack([torch.linalg.lstsq(e[:, None], u).solution[0] for e, u in zip(embed, unembed, strict=True)])
    return folded if (folded[:, None] * embed - unembed).abs().max() < 1e-3 * unembed.abs().max() else gain


KNOWN = {"relu2": "relu2", "relu_squared": "relu2", "swish": "silu"} | {name: name for name in LIPSCHITZ}


def _activation(model: Any, block: Any) -> Act:
    """By the name in the config; the module's own function where that is none that is written here (xIELU)."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    unsaid = {"bloom": "gelu_new", "mpt": "gelu"}.get(getattr(config, "model_type", ""))
    if unsaid is not None:  # their configs have no word for it
        return unsaid
    words = ("hidden_activation", "hidden_act", "activation_function", "activation")
    name = next((getattr(config, w) for w in words if isinstance(getattr(config, w, None), str)), model.cfg.act_fn)
    if name in KNOWN:
        return KNOWN[name]
    return getattr(block.mlp, "original_component", block.mlp).act_fn


def read(model: Any, tokens: torch.Tensor, act: str | None = None) -> Reading:
    """Read a model of any family by hook name. `tokens`: [1, pos]; `act`: its activation, where its config errs."""
    found, first = _hooked_values(model, tokens), model.blocks[0]
    ones = torch.ones(tokens.shape[1], dtype=torch.float64)
    like = first.attn.W_O.detach()
    parallel = hasattr(first, "mlp") and "blocks.0.hook_resid_mid" not in found
    _, centred = _norm(getattr(first, "ln1", None), like.shape[2], like)
    layers = [_read_layer(model, index, _of_block(found, index), act) for index in range(len(model.blocks))]
    behind_only = _before("ln1", _of_block(found, 0), "hook_resid_pre") is None
    return Reading(
        layers=layers,
        r3=found["ln_final.hook_scale"].flatten() if "ln_final.hook_scale" in found else ones,
        gain3=_final_gain(model, like),
        centred=centred and not behind_only,
        parallel=parallel,
        experts=layers[0].pre is None and hasattr(first, "mlp"),
    )


def _of_block(found: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    return {name.split(".", 2)[2]: x for name, x in found.items() if name.startswith(f"blocks.{index}.")}


def _before(norm: str, at: dict[str, torch.Tensor], reads: str) -> str | None:
    """The norm's name where it stands before: its divisor is that of what it then reads; None where it is another's."""
    if f"{norm}.hook_scale" not in at or reads not in at:
        return None
    x, r = at[reads], at[f"{norm}.hook_scale"].flatten()
    squares = (x.square().mean(-1), (x - x.mean(-1, keepdim=True)).square().mean(-1))
    eps = [r.square() - square for square in squares]  # the same at every position
    return norm if any((each.max() - each.min()).item() <= 1e-3 * r.square().max().item() for each in eps) else None


def _read_layer(model: Any, index: int, at: dict[str, torch.Tensor], act: str | None) -> Layer:
    block, n_heads = model.blocks[index], at["attn.hook_pattern"].shape[0]
    attn, mlp, like = block.attn, getattr(block, "mlp", None), block.attn.W_O.detach()
    d_model = like.shape[2]
    component = getattr(block, "original_component", None)
    ones = torch.ones(len(at["hook_resid_pre"]), dtype=torch.float64)
    kv_heads = at["attn.hook_k"].shape[1]
    weight = {name: _per_query_head(_weight(attn, name), 0, n_heads) for name in ("W_Q", "W_K", "W_V", "W_O")}
    parallel = mlp is not None and "hook_resid_mid" not in at
    entering = "hook_resid_pre" if parallel or mlp is None else "hook_resid_mid"
    # Each norm's own name here: one that stands before, the same where it stands behind, none.
    before1, before2 = _before("ln1", at, "hook_resid_pre"), _before("ln2", at, entering)
    names = {"ln1": before1, "ln2": before1 if parallel and "ln2.hook_scale" not in at else before2}
    names |= {f"{n}_post": f"{n}_post" if f"{n}_post.hook_scale" in at else n for n in ("ln1", "ln2")}
    for n, before in (("ln1", before1), ("ln2", before2)):
        if names[f"{n}_post"] == n and (before is not None or f"{n}.hook_scale" not in at):
            names[f"{n}_post"] = None
    gain = {n: _norm(getattr(block, own, None) if own else None, d_model, like)[0] for n, own in names.items()}
    divisor = {n: at[f"{own}.hook_scale"].flatten() if own else ones for n, own in names.items()}
    config = getattr(getattr(model, "original_model", None), "config", None)
    clip = getattr(config, "clip_qkv", None) or getattr(getattr(config, "attn_config", None), "clip_qkv", None)

    def cut(x: torch.Tensor) -> torch.Tensor:
        return x if not clip else x.clamp(-clip, clip)

    scored = {}
    for letter in "qk":
        bare, norm = at[f"attn.hook_{letter}"], getattr(attn, f"{letter}_norm", None)
        inner, centred, across = _inner_norm(norm, bare.shape[1], like)
        r = torch.ones(bare.shape[:2], dtype=torch.float64)
        x = bare - bare.mean(-1, keepdim=True) if centred else bare
        if norm is not None:
            shown = at.get(f"attn.{letter}_norm.hook_scale")  # norms for heads apart show none
            r = _own_divisor(norm.original_component.norms[0], x) if shown is None else _by_position(shown, x, across)
        elif getattr(getattr(attn, "original_component", None), "qk_norm", None) is not None:  # Llama 4: without γ
            r = _own_divisor(attn.original_component.qk_norm, x)
        scored[letter] = [
            _per_query_head(cut(x / r[..., None] * inner), 1, n_heads),
            _per_query_head(r, 1, n_heads),
            _per_query_head(inner, 0, n_heads),
        ]
    stretch = [_stretch(scored[letter][0], at.get(f"attn.hook_rot_{letter}")) for letter in "qk"]
    dense = mlp is not None and _weight(mlp, "W_in") is not None
    gated = dense and _weight(mlp, "W_gate") is not None
    layer = Layer(
        pattern=at["attn.hook_pattern"],
        q=scored["q"][0],
        k=scored["k"][0],
        v=_per_query_head(cut(at["attn.hook_v"]), 1, n_heads),
        scale=_own_scale(model, attn, index) * stretch[0] * stretch[1],
        r1=divisor["ln1"],
        r2=divisor["ln2"],
        rho1=divisor["ln1_post"],
        rho2=divisor["ln2_post"],
        rq=scored["q"][1],
        rk=scored["k"][1],
        gain1=gain["ln1"],
        gain2=gain["ln2"],
        post1=gain["ln1_post"],
        post2=gain["ln2_post"],
        gain_q=scored["q"][2],
        gain_k=scored["k"][2],
        across=across,
        inner_centred=centred,
        clip=clip or None,
        groups=n_heads // kv_heads,
        w_q=weight["W_Q"],
        w_k=weight["W_K"],
        w_v=weight["W_V"],
        w_o=weight["W_O"],
        pre=at["mlp.hook_pre"] if dense else None,
        linear=at["mlp.hook_pre_linear"] if gated else None,
        w_gate=_weight(mlp, "W_gate") if gated else None,
        w_in=_weight(mlp, "W_in") if dense else None,
        w_out=_weight(mlp, "W_out") if dense else None,
        act=act or (_activation(model, block) if dense else ""),
        node=ones,
        written=float(getattr(component, "residual_multiplier", 1.0)),
    )
    if mlp is not None:
        norms = [getattr(block, names[name], None) if names[name] else None for name in ("ln2", "ln2_post")]
        layer.node = node_gains(_as_called(mlp, layer), at[entering], *norms, like.dtype, layer.written)
    _rebuild(layer, block, at, names, _own_cap(model), f"layer {index}")
    return layer


def _stretch(x: torch.Tensor, turned: torch.Tensor | None) -> float:
    """By how much a rotation lengthens what it turns (YaRN), at the first position, which it turns by nothing."""
    return 1.0 if turned is None else (turned[0].norm() / x[0, :: x.shape[1] // turned.shape[1]].norm()).item()


def _own_divisor(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return (x.square().mean(-1) + norm.eps).sqrt()


def _inner_norm(norm: Any, heads: int, like: torch.Tensor) -> tuple[torch.Tensor, bool, bool]:
    """γ [head, d_head] of the queries' or keys' own norm, whether it takes the mean away, and all heads together."""
    d_head = like.shape[1]
    if norm is None:
        return torch.ones(heads, d_head, dtype=torch.float64), False, False
    apart = getattr(getattr(norm, "original_component", None), "norms", None)  # a norm for each head (StableLM)
    if apart is not None:
        found = [_norm(each, d_head, like) for each in apart]
        return torch.stack([gain for gain, _ in found]), found[0][1], False
    stored = _weight(norm, "w", "weight")
    if stored.ndim == 2:  # Cohere: a norm for each head in one module, which centres
        return stored, True, False
    gain, centred = _norm(norm, stored.numel(), like, flat=True)
    across = stored.numel() != d_head
    return (gain.reshape(heads, d_head) if across else gain.expand(heads, d_head)), centred, across


def _by_position(r: torch.Tensor, x: torch.Tensor, across: bool) -> torch.Tensor:
    """Divisors of the norms of x [pos, head, d_head] in x's own order, [pos, head]; a class may turn both axes."""
    if across:
        return r.reshape(-1, 1).expand(x.shape[:2])
    size = x.square().mean(-1).sqrt()
    orders = (r.reshape(size.shape), r.reshape(size.shape[::-1]).T)
    return min(orders, key=lambda order: (order - size).abs().max().item())


def _rebuild(
    layer: Layer, block: Any, at: dict[str, torch.Tensor], names: dict[str, str | None], cap: float | None, where: str
) -> None:
    """Assert that what was read makes queries, keys, values, scores, activations, and what attention adds."""

    def same(own: torch.Tensor, shown: torch.Tensor, what: str) -> None:
        off = (own - shown).abs().max().item()
        assert off <= 1e-4 * shown.abs().max().item() + 1e-12, f"{where}: {what} is read wrongly, off by {off:.2g}"

    def normed(x: torch.Tensor, name: str, r: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        norm = getattr(block, names[name], None) if names[name] else None
        centred = _norm(norm, len(gain), block.attn.W_O.detach())[1]
        bias = _weight(norm, "b", "bias")
        x = (x - x.mean(-1, keepdim=True) if centred else x) / r[:, None] * gain
        return x if bias is None else x + bias

    inside = normed(at["hook_resid_pre"], "ln1", layer.r1, layer.gain1)
    for letter, w in (("q", layer.w_q), ("k", layer.w_k), ("v", layer.w_v)):
        own, bias = torch.einsum("jd,hdi->jhi", inside, w), _weight(block.attn, f"b_{letter.upper()}")
        own = own if bias is None else own + _per_query_head(bias.reshape(-1, w.shape[-1]), 0, len(w))
        same(own, _per_query_head(at[f"attn.hook_{letter}"], 1, len(w)), f"W_{letter.upper()}")
    for letter, own in (("q", layer.q), ("k", layer.k)):
        turned = at.get(f"attn.hook_rot_{letter}")
        if turned is not None:
            lengths = _per_query_head(turned, 1, own.shape[1]).norm(dim=-1)
            same(own.norm(dim=-1) * _stretch(own, turned), lengths, f"the norm of {letter}")
    scores = at.get("attn.hook_attn_scores", layer.pattern)
    if cap is None or cap > 0:  # on the diagonal, where positions cancel; some classes show the softmax there
        own = (layer.q * layer.k).sum(-1).T * layer.scale
        own = own if cap is None else cap * torch.tanh(own / cap)
        if not torch.equal(scores, layer.pattern):
            same(own, scores.diagonal(dim1=1, dim2=2), "the scores' scale")
    if layer.pre is not None:  # but for a bias that some add behind the gate's product
        own = activation(layer.act, layer.pre) * (1 if layer.linear is None else layer.linear)
        same(own - own[:1], at["mlp.hook_post"] - at["mlp.hook_post"][:1], "the activation")
    wrote, bias = torch.einsum("hjk,khi,hid->jd", layer.pattern, layer.v, layer.w_o), _weight(block.attn, "b_O")
    wrote = normed(wrote if bias is None else wrote + bias, "ln1_post", layer.rho1, layer.post1)
    if "hook_resid_mid" in at:
        same(at["hook_resid_pre"] + layer.written * wrote, at["hook_resid_mid"], "what attention writes")


def operator_norm(matrix: torch.Tensor) -> float:
    """Largest singular value, from a full singular-value decomposition."""
    return torch.linalg.matrix_norm(matrix, 2).item()


def largest(gain: torch.Tensor) -> float:
    """max|γ|: what a norm's gain does at most."""
    return gain.abs().max().item()


def local_sigma(layer: Layer, j: int) -> float:
    """A bound on the MLP's local Jacobian at position j, the divisor of the norm before it left out."""
    if layer.pre is None:
        return 0.0
    out = operator_norm(layer.w_out) * largest(layer.post2) / layer.rho2[j].item() * layer.written
    into = operator_norm(layer.gain2.diag() @ layer.w_in)
    slope = activation_slope(layer.act, layer.pre[j])
    if layer.w_gate is None or layer.linear is None:
        return into * largest(slope) * out
    gate = operator_norm(layer.gain2.diag() @ layer.w_gate)
    c, a = largest(slope * layer.linear[j]), largest(activation(layer.act, layer.pre[j]))
    return (gate * c + into * a) * out


def sigma(layer: Layer, lipschitz: dict[str, float]) -> float:
    """Section 2's σ_ψ: a Lipschitz bound of the MLP, its norm's divisor left out.

    Local to the prompt where there is no global one: of a gated MLP, one behind a norm, an activation without.
    """
    plain = layer.pre is not None and layer.w_gate is None and bool((layer.rho2 == 1).all())
    if plain and layer.act in lipschitz:
        into = operator_norm(layer.gain2.diag() @ layer.w_in)
        return into * lipschitz[layer.act] * operator_norm(layer.w_out) * largest(layer.post2) * layer.written
    return max(local_sigma(layer, j) for j in range(len(layer.r2)))


def lip(layer: Layer, j: int) -> float:
    """Section 3's lip_j: a bound on the MLP's local Jacobian at position j, norm included."""
    return local_sigma(layer, j) / layer.r2[j].item()


def geometric_mean(x: torch.Tensor) -> float:
    return math.exp(math.fsum(math.log(value) for value in x.tolist()) / len(x))


@dataclass
class Paths:
    """A variant: `edges[l][j, k]` from source k to destination j, `nodes[l][j]`, and ln C (nan: none)."""

    edges: list[torch.Tensor]
    nodes: list[torch.Tensor]
    log_constant: float


def reference(
    reading: Reading, variant: str, beta: str | float = "measured", lipschitz: dict[str, float] | None = None
) -> Paths:
    """Edge matrices, node factors and constant of one of the seven bounds (sections 2 and 3)."""
    if variant in SOUND:
        return _calibrated(reading, full=variant == "calibrated_full")
    table = LIPSCHITZ if lipschitz is None else lipschitz
    n, n_layers = reading.n, len(reading.layers)
    eye = torch.eye(n, dtype=torch.float64)
    if beta == "measured":
        beta1 = [geometric_mean(layer.r1) for layer in reading.layers]
        beta2 = [geometric_mean(layer.r2) for layer in reading.layers]
        beta3 = reading.r3[-1].item() / reading.gain3.abs().max().item()
    else:
        beta1, beta2, beta3 = [float(beta)] * n_layers, [float(beta)] * n_layers, float(beta)
    # No Lipschitz constant of a router is known.
    sigmas = [math.nan if reading.experts else sigma(layer, table) for layer in reading.layers]
    factors = [s / b + 1 for s, b in zip(sigmas, beta2, strict=True)]
    edges = []
    for index, layer in enumerate(reading.layers):
        mean = sum(layer.pattern[h] for h in range(len(layer.pattern))) / len(layer.pattern)
        if variant == "proof":
            edges.append(mean / beta1[index] + eye)
        elif variant == "theorem_5_1":
            edges.append(mean / beta2[index] + eye)
        elif variant == "theorem_b5":
            edges.append((mean + eye) / beta1[index])
        elif variant == "multi_head":
            edges.append(layer.pattern.abs().sum(0) + eye / len(layer.pattern))
        elif variant == "rollout":
            edges.append((mean + eye) / 2)
        else:
            raise ValueError(variant)
    constants = {
        "proof": lambda: math.fsum(map(math.log, factors)) - math.log(beta3),
        "theorem_b5": lambda: math.fsum(math.log(s) if s != 0 else -math.inf for s in sigmas),
        "multi_head": lambda: n_layers * math.log(max(factors)),
    }
    log_constant = constants[variant]() if variant in constants else math.nan
    return Paths(edges, [torch.ones(n, dtype=torch.float64)] * n_layers, log_constant)


def _calibrated(reading: Reading, full: bool) -> Paths:
    """Section 3: what bounds a real model, with attention frozen or (`full`) with nothing frozen.

    An MLP beside attention is part of what stays at a position, and no node.
    """
    edges, nodes = [], []
    for layer in reading.layers:
        lips = torch.tensor([lip(layer, j) for j in range(reading.n)], dtype=torch.float64)
        heads = _value_side(layer) + (_key_side_bound(layer) if full else 0.0)
        edge = heads.sum(0) + torch.eye(reading.n, dtype=torch.float64)
        if full:
            edge = edge + _query_side_bound(layer).sum(0).diag()
        edges.append(edge + lips.diag() if reading.parallel else edge)
        nodes.append(torch.ones_like(lips) if reading.parallel else 1 + lips)
    last = reading.gain3.abs().max().item() / reading.r3[-1].item()
    return Paths(edges, nodes, math.log(last))


def _outer(layer: Layer) -> torch.Tensor:
    """What stands behind the heads: 1/ρ_j of a norm of what attention writes, and the multiplier, [dest, 1]."""
    return layer.written / layer.rho1[:, None]


def _value_side(layer: Layer) -> torch.Tensor:
    """α^h_jk ‖OV_h‖ / (r_k ρ_j), the gain of a norm behind attention at its worst: [head, dest, src]."""
    parts = []
    for h in range(len(layer.pattern)):
        norm = operator_norm(layer.gain1.diag() @ layer.w_v[h] @ layer.w_o[h])
        if layer.clip is not None:  # a cut of coordinates stands between the two
            norm = operator_norm(layer.gain1.diag() @ layer.w_v[h]) * operator_norm(layer.w_o[h])
        norm = norm * largest(layer.post1)
        parts.append(layer.pattern[h] * norm / layer.r1[None, :] * _outer(layer))
    return torch.stack(parts)


def deviation(layer: Layer, h: int, behind: torch.Tensor | float) -> torch.Tensor:
    """‖o_k − ō_j‖ of head h from the o vectors themselves, with the gain `behind` the heads: [dest, src]."""
    o = layer.v[:, h] @ layer.w_o[h] * behind
    mean = layer.pattern[h] @ o
    return torch.linalg.vector_norm(o[None, :] - mean[:, None], dim=-1)


def _pull(layer: Layer, w: torch.Tensor, h: int, groups: int) -> float:
    """How far a head's queries or keys move at most; a norm of all heads together stands behind all of them."""
    if layer.across:
        return operator_norm(layer.gain1.diag() @ torch.cat(list(w[::groups]), dim=1))
    return operator_norm(layer.gain1.diag() @ w[h])


def _key_side_bound(layer: Layer) -> torch.Tensor:
    parts = []
    for h in range(len(layer.pattern)):
        pull = _pull(layer, layer.w_k, h, layer.groups) * largest(layer.gain_k[h])
        queries = layer.q[:, h].norm(dim=-1)[:, None] * abs(layer.scale)
        moved = layer.pattern[h] * deviation(layer, h, largest(layer.post1)) * queries * pull
        parts.append(moved / (layer.r1 * layer.rk[:, h])[None, :] * _outer(layer))
    return torch.stack(parts)


def _query_side_bound(layer: Layer) -> torch.Tensor:
    """[head, dest]: on the diagonal, as the query is the position's own."""
    parts = []
    for h in range(len(layer.pattern)):
        pull = _pull(layer, layer.w_q, h, 1) * largest(layer.gain_q[h])
        keys = layer.k[:, h].norm(dim=-1)[None, :] * abs(layer.scale)
        moved = (layer.pattern[h] * deviation(layer, h, largest(layer.post1)) * keys).sum(1) * pull
        parts.append(moved / (layer.r1 * layer.rq[:, h]) * _outer(layer)[:, 0])
    return torch.stack(parts)


def mean_field(reading: Reading) -> Paths:
    """Section 4 on squares, key and query side included, node gains exact by autograd. `log_constant` is of S's scale:

    the estimate of ‖∂y_n/∂v_i‖_F is exp(½·(log_constant + ln S)).
    """
    edges, nodes, ones = [], [], torch.ones(reading.n, dtype=torch.float64)
    for layer in reading.layers:
        own = layer.node if reading.parallel else ones
        edge = _mean_square_values(layer, own)
        edge = edge + _mean_square_key_side(layer, reading.centred).sum(0)
        edge = edge + _mean_square_query_side(layer, reading.centred).sum(0).diag()
        edges.append(edge.clamp(min=0))  # an MLP beside attention leaves out a cross term, and might go below
        nodes.append(ones if reading.parallel else layer.node)
    mean_square_gain = (reading.gain3**2).mean().item()
    return Paths(edges, nodes, math.log(reading.d_model * mean_square_gain / reading.r3[-1].item() ** 2))


def _mean_square_values(layer: Layer, own: torch.Tensor) -> torch.Tensor:
    """What values pass on, heads with one another and with the residual stream, whose own mean square is `own`."""
    d, heads, ov = len(layer.gain1), range(len(layer.pattern)), _mean_square_ov(layer)
    step = [layer.pattern[h] / layer.r1[None, :] * _outer(layer) for h in heads]
    total = own.diag()
    for h in heads:
        total = total + 2 * step[h].diagonal().diag() * torch.trace(ov[h]) / d
        for g in heads:
            total = total + step[h] * step[g] * torch.trace(ov[h] @ ov[g].T) / d
    return total


def _mean_square_ov(layer: Layer) -> list[torch.Tensor]:
    return [layer.gain1.diag() @ w_v @ w_o @ layer.post1.diag() for w_v, w_o in zip(layer.w_v, layer.w_o, strict=True)]


def mean_square_alone(reading: Reading, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each head of a layer passes on if it is alone, [head, dest, src], and the residual stream, [dest]."""
    layer = reading.layers[index]
    squares = torch.stack([ov.square().sum() for ov in _mean_square_ov(layer)]) / reading.d_model
    values = (layer.pattern / layer.r1[None, None, :] * _outer(layer)).square() * squares[:, None, None]
    by_query = torch.diag_embed(_mean_square_query_side(layer, reading.centred))
    own = layer.node if reading.parallel else torch.ones(reading.n, dtype=torch.float64)
    return values + _mean_square_key_side(layer, reading.centred) + by_query, own


def _centring(d: int, centred: bool) -> torch.Tensor:
    """What a norm does to its input before it divides: LayerNorm takes the mean away."""
    eye = torch.eye(d, dtype=torch.float64)
    return eye - 1 / d if centred else eye


def _follows(layer: Layer, w: torch.Tensor, gain: torch.Tensor, centred: bool) -> torch.Tensor:
    """How queries or keys follow the residual stream, divisors left out: [d_model, d_head]."""
    d, d_head = w.shape
    return _centring(d, centred) @ layer.gain1.diag() @ w @ _centring(d_head, layer.inner_centred) @ gain.diag()


def _mean_square_key_side(layer: Layer, centred: bool) -> torch.Tensor:
    d, parts = len(layer.gain1), []
    for h in range(len(layer.pattern)):
        follows = _follows(layer, layer.w_k[h], layer.gain_k[h], centred)
        pull = (layer.q[:, h] @ follows.T).square().sum(-1)[:, None] * layer.scale**2 / d
        moved = (layer.pattern[h] * deviation(layer, h, layer.post1)).square() * pull
        parts.append(moved / (layer.r1 * layer.rk[:, h]).square()[None, :] * _outer(layer) ** 2)
    return torch.stack(parts)


def _mean_square_query_side(layer: Layer, centred: bool) -> torch.Tensor:
    d, d_head = len(layer.gain1), layer.w_q.shape[-1]
    parts = []
    for h in range(len(layer.pattern)):
        follows = _follows(layer, layer.w_q[h], layer.gain_q[h], centred)
        keys = layer.k[:, h]
        mean = layer.pattern[h] @ keys
        away = keys[None, :] - mean[:, None]  # [dest, src, d_head]
        spread = (layer.pattern[h] * away.square().sum(-1)).sum(1)
        # A sink is a key of 0, whose score nothing moves, and has what is left of the row.
        spread = spread + (1 - layer.pattern[h].sum(1)) * mean.square().sum(-1)
        moved = (layer.pattern[h] * deviation(layer, h, layer.post1)).square().sum(1) * spread
        per_direction = follows.square().sum() * layer.scale**2 / (d_head * d)
        parts.append(moved * per_direction / (layer.r1 * layer.rq[:, h]).square() * _outer(layer)[:, 0] ** 2)
    return torch.stack(parts)


def _as_called(mlp: Any, layer: Layer) -> Callable[[torch.Tensor], torch.Tensor]:
    """An MLP as a function of what its norm gives; by its weights where the class has no module of its own (OPT)."""
    if getattr(mlp, "name", "") is None:
        b_in, b_out = (_weight(mlp, name) for name in ("b_in", "b_out"))
        return lambda x: activation(layer.act, x.double() @ layer.w_in + b_in) @ layer.w_out + b_out
    if "residual" in inspect.signature(getattr(mlp, "original_component", mlp).forward).parameters:  # BLOOM, MPT
        return lambda x: mlp(x, torch.zeros_like(x))
    return mlp


def node_gains(
    mlp: Callable, entering: torch.Tensor, before: Any, behind: Any, dtype: torch.dtype, written: float = 1.0
) -> torch.Tensor:
    """‖I + J_MLP,j‖_F²/d at every position j: the Jacobian of what an MLP adds, by autograd, [pos].

    Through the model's own modules: the norm before it, the MLP or the experts with their router, a norm behind.
    """
    d = entering.shape[1]
    with torch.enable_grad():
        z = entering.to(dtype).clone().requires_grad_(True)
        out = mlp(z[None] if before is None else before(z[None]))
        out = out[0] if isinstance(out, tuple) else out
        out = out if behind is None else behind(out)
        added = written * out.reshape(z.shape).sum(0)
        rows = [torch.autograd.grad(part, z, retain_graph=True)[0].double() for part in added]
    jacobian = torch.stack(rows, dim=1)  # [pos, out, in]: positions do not see one another
    return (torch.eye(d, dtype=torch.float64) + jacobian).square().sum((1, 2)) / d


def brute_force(edges: list[torch.Tensor], nodes: list[torch.Tensor], n: int) -> torch.Tensor:
    """Sum over every causal path from (i, layer l) to (n, layer L), one path at a time, [layer+1, pos].

    A path visits positions i = p_l ≤ p_{l+1} ≤ … ≤ p_L = n and earns edge_l(p_{l+1}, p_l) and node_l(p_{l+1})
    at every step. Linear scale: only for small n and L.
    """
    n_layers = len(edges)
    edge_list, node_list = [e.tolist() for e in edges], [f.tolist() for f in nodes]
    sums = torch.zeros(n_layers + 1, n, dtype=torch.float64)
    sums[n_layers, n - 1] = 1.0
    for start in range(n_layers):
        for i in range(n):
            terms = []
            for middle in itertools.combinations_with_replacement(range(i, n), n_layers - start - 1):
                path = (i, *middle, n - 1)
                product = 1.0
                for step in range(n_layers - start):
                    source, dest, layer = path[step], path[step + 1], start + step
                    product *= edge_list[layer][dest][source] * node_list[layer][dest]
                terms.append(product)
            sums[start, i] = math.fsum(terms)
    return sums


def matrix_product(edges: list[torch.Tensor], nodes: list[torch.Tensor]) -> torch.Tensor:
    """The same sums by full matrix products, [layer+1, pos]; for prompts too long for `brute_force`."""
    n = len(edges[0])
    product = torch.eye(n, dtype=torch.float64)
    rows = [product[-1]]
    for edge, node in zip(reversed(edges), reversed(nodes), strict=True):
        product = product @ node.diag() @ edge
        rows.append(product[-1])
    return torch.stack(rows[::-1])


def exact_jacobian(
    model: Any, tokens: torch.Tensor, *, freeze_attention: bool = False, freeze_norms: bool = False
) -> torch.Tensor:
    """∂y_n/∂v_i⁽⁰⁾ for every i, [pos, d_out, d_in], one backward pass per row; frozen parts are detached."""
    kept: dict[str, torch.Tensor] = {}

    def inject(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        kept["v"] = value.detach().clone().requires_grad_(True)
        return kept["v"]

    def take(value: torch.Tensor, hook: Any = None) -> None:
        kept["y"] = value

    def detach(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        return value.detach().clone()

    hooks = [("blocks.0.hook_resid_pre", inject), ("unembed.hook_in", take)]
    for index in range(model.cfg.n_layers):
        if freeze_attention:
            hooks.append((f"blocks.{index}.attn.hook_pattern", detach))
        if freeze_norms:
            hooks += [(f"blocks.{index}.ln{which}.hook_scale", detach) for which in (1, 2)]
    if freeze_norms:
        hooks.append(("ln_final.hook_scale", detach))
    with torch.enable_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        rows = [torch.autograd.grad(part, kept["v"], retain_graph=True)[0][0] for part in kept["y"][0, -1]]
    return torch.stack(rows, dim=1).double()


def linear_jacobian(reading: Reading, centred: bool) -> torch.Tensor:
    """∂y_n/∂v_i of a model whose MLPs write a constant, attention and norms frozen: a product of linear maps.

    Π_l (I + Σ_h A_h ⊗ C·diag(γ)·W_V·W_O / r), then the last norm; C removes the mean (`centred`: LayerNorm).
    """
    d, n = reading.d_model, reading.n
    eye = torch.eye(d, dtype=torch.float64)
    centre = eye - 1 / d if centred else eye
    total = torch.eye(n * d, dtype=torch.float64)  # row vectors: [src pos·d_in, dest pos·d_out]
    for layer in reading.layers:
        step = torch.zeros(n, d, n, d, dtype=torch.float64)
        for j in range(n):
            step[j, :, j, :] += eye
            for k in range(j + 1):
                for h in range(len(layer.pattern)):
                    ov = centre @ layer.gain1.diag() @ layer.w_v[h] @ layer.w_o[h]
                    step[k, :, j, :] += layer.pattern[h, j, k] * ov / layer.r1[k]
        total = total @ step.reshape(n * d, n * d)
    last = centre @ reading.gain3.diag() / reading.r3[-1]
    return (total.reshape(n, d, n, d)[:, :, -1, :] @ last).transpose(1, 2)


def frobenius(jacobian: torch.Tensor) -> torch.Tensor:
    """‖∂y_n/∂v_i‖_F for every i, [pos]."""
    return torch.tensor([block.pow(2).sum().sqrt().item() for block in jacobian], dtype=torch.float64)


def spectral(jacobian: torch.Tensor) -> torch.Tensor:
    """‖∂y_n/∂v_i‖₂ for every i, [pos]."""
    return torch.tensor([operator_norm(block) for block in jacobian], dtype=torch.float64)
