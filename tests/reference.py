"""The theory written out a second time: slow, plain, float64, full d×d products, one loop per index.

Written from the mathematics alone and sharing nothing with the package, so that agreement means something.
`read` takes what the formulas need from a model by hook name; `reference` gives the edge matrices, node
factors and constant of a variant; `brute_force` sums over every causal path one by one; `exact_jacobian` is
autograd, one row of one Jacobian at a time.
"""

from __future__ import annotations

import itertools
import math
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
    "gelu_pytorch_tanh": 1.1289930687,
}


def activation(name: str, x: torch.Tensor) -> torch.Tensor:
    """The activation function of that name, written by hand."""
    if name == "relu":
        return x.clamp(min=0)
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(name)


def activation_slope(name: str, x: torch.Tensor) -> torch.Tensor:
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
    """One layer as read: activations at every position, weights with one entry per query head."""

    pattern: torch.Tensor  # [head, dest, src]
    q: torch.Tensor  # [pos, head, d_head], as it enters the score
    k: torch.Tensor  # [pos, head, d_head], as it enters the score
    q_here: torch.Tensor  # both as above, but not turned by their positions
    k_here: torch.Tensor
    v: torch.Tensor  # [pos, head, d_head]
    r1: torch.Tensor  # [pos]
    r2: torch.Tensor  # [pos]
    resid_mid: torch.Tensor  # [pos, d_model]
    pre: torch.Tensor  # [pos, d_mlp]: input of the activation (the gate, where there is one)
    linear: torch.Tensor | None  # [pos, d_mlp]: what the gate multiplies
    gain1: torch.Tensor  # [d_model]
    gain2: torch.Tensor  # [d_model]
    w_q: torch.Tensor  # [head, d_model, d_head], and so w_k, w_v
    w_k: torch.Tensor
    w_v: torch.Tensor
    w_o: torch.Tensor  # [head, d_head, d_model]
    w_gate: torch.Tensor | None  # [d_model, d_mlp]
    w_in: torch.Tensor  # [d_model, d_mlp]
    w_out: torch.Tensor  # [d_mlp, d_model]


@dataclass
class Reading:
    """Everything the formulas need of one model on one prompt."""

    layers: list[Layer]
    act: str
    r3: torch.Tensor  # [pos]
    gain3: torch.Tensor  # [d_model]
    centred: bool  # whether norms take the mean away

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
    *(f"attn.hook_{name}" for name in ("pattern", "q", "k", "v", "rot_q", "rot_k")),
    *("ln1.hook_scale", "ln2.hook_scale", "hook_resid_mid", "mlp.hook_pre", "mlp.hook_pre_linear"),
)


def _hooked_values(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [f"blocks.{layer}.{name}" for layer in range(model.cfg.n_layers) for name in PER_BLOCK]
    names = [name for name in [*names, "ln_final.hook_scale"] if name in model.hook_dict]
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(value: torch.Tensor, hook: Any = None) -> None:
            found[name] = value[0].detach().double().clone()

        return hook

    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(name, keep(name)) for name in names])
    return found


def read(model: Any, tokens: torch.Tensor, act: str | None = None) -> Reading:
    """Read a model by hook name. `tokens`: [1, pos]. `act`: the activation's name, else the model's own."""
    found = _hooked_values(model, tokens)
    layers = []
    for index, block in enumerate(model.blocks):
        at = {name.split(".", 2)[2]: x for name, x in found.items() if name.startswith(f"blocks.{index}.")}
        n_heads = at["attn.hook_pattern"].shape[0]
        weight = {name: getattr(block.attn, name).detach().double() for name in ("W_Q", "W_K", "W_V", "W_O")}
        gate = getattr(block.mlp, "W_gate", None)
        layers.append(
            Layer(
                pattern=at["attn.hook_pattern"],
                q=at.get("attn.hook_rot_q", at["attn.hook_q"]),
                k=_per_query_head(at.get("attn.hook_rot_k", at["attn.hook_k"]), 1, n_heads),
                q_here=at["attn.hook_q"],
                k_here=_per_query_head(at["attn.hook_k"], 1, n_heads),
                v=_per_query_head(at["attn.hook_v"], 1, n_heads),
                r1=at["ln1.hook_scale"].flatten(),
                r2=at["ln2.hook_scale"].flatten(),
                resid_mid=at["hook_resid_mid"],
                pre=at["mlp.hook_pre"],
                linear=at["mlp.hook_pre_linear"] if gate is not None else None,
                gain1=block.ln1.w.detach().double(),
                gain2=block.ln2.w.detach().double(),
                w_q=_per_query_head(weight["W_Q"], 0, n_heads),
                w_k=_per_query_head(weight["W_K"], 0, n_heads),
                w_v=_per_query_head(weight["W_V"], 0, n_heads),
                w_o=weight["W_O"],
                w_gate=None if gate is None else gate.detach().double(),
                w_in=block.mlp.W_in.detach().double(),
                w_out=block.mlp.W_out.detach().double(),
            )
        )
    r3, gain3 = found["ln_final.hook_scale"].flatten(), model.ln_final.w.detach().double()
    centred = model.cfg.normalization_type.startswith("LN")
    return Reading(layers, act or model.cfg.act_fn, r3, gain3, centred)


def operator_norm(matrix: torch.Tensor) -> float:
    """Largest singular value, from a full singular-value decomposition."""
    return torch.linalg.matrix_norm(matrix, 2).item()


def sigma(layer: Layer, act: str, lipschitz: dict[str, float]) -> float:
    """Section 2's σ_ψ: a Lipschitz bound of the MLP, norm's divisor left out (gated: local to the prompt)."""
    out = operator_norm(layer.w_out)
    into = operator_norm(layer.gain2.diag() @ layer.w_in)
    if layer.w_gate is None or layer.linear is None:
        return into * lipschitz[act] * out
    gate = operator_norm(layer.gain2.diag() @ layer.w_gate)
    slopes = activation_slope(act, layer.pre) * layer.linear
    values = activation(act, layer.pre)
    return max(
        (gate * slopes[j].abs().max().item() + into * values[j].abs().max().item()) * out for j in range(len(layer.pre))
    )


def lip(layer: Layer, act: str, j: int) -> float:
    """Section 3's lip_j: a bound on the MLP's local Jacobian at position j, norm included."""
    out = operator_norm(layer.w_out)
    into = operator_norm(layer.gain2.diag() @ layer.w_in)
    slope = activation_slope(act, layer.pre[j])
    if layer.w_gate is None or layer.linear is None:
        return into * slope.abs().max().item() * out / layer.r2[j].item()
    gate = operator_norm(layer.gain2.diag() @ layer.w_gate)
    c = (slope * layer.linear[j]).abs().max().item()
    a = activation(act, layer.pre[j]).abs().max().item()
    return (gate * c * out + into * a * out) / layer.r2[j].item()


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
    sigmas = [sigma(layer, reading.act, table) for layer in reading.layers]
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
        "theorem_b5": lambda: math.fsum(math.log(s) if s > 0 else -math.inf for s in sigmas),
        "multi_head": lambda: n_layers * math.log(max(factors)),
    }
    log_constant = constants[variant]() if variant in constants else math.nan
    return Paths(edges, [torch.ones(n, dtype=torch.float64)] * n_layers, log_constant)


def _calibrated(reading: Reading, full: bool) -> Paths:
    """Section 3: what bounds a real model, with attention frozen or (`full`) with nothing frozen."""
    edges, nodes = [], []
    for layer in reading.layers:
        edge = torch.zeros(reading.n, reading.n, dtype=torch.float64)
        for j in range(reading.n):
            for k in range(j + 1):
                edge[j, k] = _value_side(layer, j, k) + (_key_side_bound(layer, j, k) if full else 0.0)
            if full:
                edge[j, j] += _query_side_bound(layer, j)
        edges.append(edge)
        factors = [1 + lip(layer, reading.act, j) for j in range(reading.n)]
        nodes.append(torch.tensor(factors, dtype=torch.float64))
    last = reading.gain3.abs().max().item() / reading.r3[-1].item()
    return Paths(edges, nodes, math.log(last))


def _value_side(layer: Layer, j: int, k: int) -> float:
    gain = layer.gain1.diag()
    total = 1.0 if j == k else 0.0
    for h in range(len(layer.pattern)):
        norm = operator_norm(gain @ layer.w_v[h] @ layer.w_o[h])
        total += layer.pattern[h, j, k].item() * norm / layer.r1[k].item()
    return total


def deviation(layer: Layer, h: int, j: int, k: int) -> float:
    """‖o_k − ō_j‖ of head h, from the o vectors themselves."""
    o = layer.v[:, h] @ layer.w_o[h]
    mean = sum(layer.pattern[h, j, m] * o[m] for m in range(j + 1))
    return torch.linalg.vector_norm(o[k] - mean).item()


def _key_side_bound(layer: Layer, j: int, k: int) -> float:
    gain, d_head = layer.gain1.diag(), layer.w_k.shape[-1]
    total = 0.0
    for h in range(len(layer.pattern)):
        total += (
            layer.pattern[h, j, k].item()
            * deviation(layer, h, j, k)
            * operator_norm(gain @ layer.w_k[h])
            * torch.linalg.vector_norm(layer.q[j, h]).item()
            / (math.sqrt(d_head) * layer.r1[k].item())
        )
    return total


def _query_side_bound(layer: Layer, j: int) -> float:
    gain, d_head = layer.gain1.diag(), layer.w_q.shape[-1]
    total = 0.0
    for h in range(len(layer.pattern)):
        for k in range(j + 1):
            total += (
                layer.pattern[h, j, k].item()
                * deviation(layer, h, j, k)
                * operator_norm(gain @ layer.w_q[h])
                * torch.linalg.vector_norm(layer.k[k, h]).item()
                / (math.sqrt(d_head) * layer.r1[j].item())
            )
    return total


def mean_field(reading: Reading, model: Any) -> Paths:
    """Section 4 on squares, key and query side included, node gains exact by autograd. `log_constant` is of S's scale:

    the estimate of ‖∂y_n/∂v_i‖_F is exp(½·(log_constant + ln S)).
    """
    edges, nodes = [], []
    for index, layer in enumerate(reading.layers):
        edge = torch.zeros(reading.n, reading.n, dtype=torch.float64)
        for j in range(reading.n):
            for k in range(j + 1):
                edge[j, k] = _mean_square_edge(layer, j, k) + _mean_square_key_side(layer, j, k, reading.centred)
            edge[j, j] += _mean_square_query_side(layer, j, reading.centred)
        edges.append(edge)
        nodes.append(node_gains(model.blocks[index], layer.resid_mid))
    mean_square_gain = (reading.gain3**2).mean().item()
    return Paths(edges, nodes, math.log(reading.d_model * mean_square_gain / reading.r3[-1].item() ** 2))


def _mean_square_edge(layer: Layer, j: int, k: int) -> float:
    d, heads = len(layer.gain1), range(len(layer.pattern))
    ov = [layer.gain1.diag() @ layer.w_v[h] @ layer.w_o[h] for h in heads]
    total = 0.0
    if j == k:
        total += 1.0
        for h in heads:
            total += 2 * layer.pattern[h, j, j].item() * torch.trace(ov[h]).item() / (d * layer.r1[j].item())
    for h in heads:
        for g in heads:
            gram = torch.trace(ov[h] @ ov[g].T).item() / d
            total += (layer.pattern[h, j, k] * layer.pattern[g, j, k]).item() * gram / layer.r1[k].item() ** 2
    return total


def _centring(d: int, centred: bool) -> torch.Tensor:
    """What a norm does to its input before it divides: LayerNorm takes the mean away."""
    eye = torch.eye(d, dtype=torch.float64)
    return eye - 1 / d if centred else eye


def _mean_square_key_side(layer: Layer, j: int, k: int, centred: bool) -> float:
    d, d_head = len(layer.gain1), layer.w_k.shape[-1]
    total = 0.0
    for h in range(len(layer.pattern)):
        pull = _centring(d, centred) @ layer.gain1.diag() @ layer.w_k[h] @ layer.q_here[j, h]
        total += (
            layer.pattern[h, j, k].item() ** 2
            * deviation(layer, h, j, k) ** 2
            * ((pull**2).sum().item() / d_head)
            / (d * layer.r1[k].item() ** 2)
        )
    return total


def _mean_square_query_side(layer: Layer, j: int, centred: bool) -> float:
    d, d_head = len(layer.gain1), layer.w_q.shape[-1]
    total = 0.0
    for h in range(len(layer.pattern)):
        query = _centring(d, centred) @ layer.gain1.diag() @ layer.w_q[h]
        look = layer.pattern[h, j, : j + 1]
        away = layer.k_here[: j + 1, h] - look @ layer.k_here[: j + 1, h]
        spread = (look * (away**2).sum(-1)).sum().item()
        reached = sum((look[k].item() * deviation(layer, h, j, k)) ** 2 for k in range(j + 1))
        total += reached * spread * (query**2).sum().item() / d_head / d_head / (d * layer.r1[j].item() ** 2)
    return total


def node_gains(block: Any, resid_mid: torch.Tensor) -> torch.Tensor:
    """‖I + J_MLP,j‖_F²/d at every position j: the Jacobian of z → mlp(ln2(z)) by autograd, [pos]."""
    d = resid_mid.shape[1]
    dtype = block.mlp.W_in.dtype

    def mlp(z: torch.Tensor) -> torch.Tensor:
        return block.mlp(block.ln2(z[None, None])).reshape(d)

    gains = []
    for z in resid_mid:
        jacobian = torch.autograd.functional.jacobian(mlp, z.to(dtype)).double()
        gains.append(((torch.eye(d, dtype=torch.float64) + jacobian) ** 2).sum() / d)
    return torch.stack(gains)


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
