"""The paper's path-counting bounds, the two forms of them that hold on a real model, and attention rollout.

The paper prints Theorem 5.1 in three forms that differ (docs/theory.md, section 2); each is a variant here, and none
of them is a bound on a real model, whose value, output and norm-gain matrices the paper's notation leaves out:

| variant           | edge j ← k                     | constant C              | where from                            |
|-------------------|--------------------------------|-------------------------|---------------------------------------|
| `proof`           | mean_h α/β₁ + δ                | (1/β₃) Π_l (σ_ψ/β₂ + 1) | derivation under Theorem B.5          |
| `theorem_5_1`     | mean_h α/β₂ + δ                | unspecified (nan)       | Theorem 5.1, main text                |
| `theorem_b5`      | (mean_h α + δ)/β₁              | Π_l σ_ψ                 | Theorem B.5, statement                |
| `multi_head`      | Σ_h α + δ/H                    | max_l (σ_ψ/β₂ + 1)^L    | Barbero et al. 2025, from memory      |
| `rollout`         | (mean_h α + δ)/2               | nan                     | Abnar & Zuidema 2020                  |
| `calibrated`      | δ + Σ_h α ‖OV_h‖₂/r            | max|γ₃|/r_n             | ours: sound with the attention frozen |
| `calibrated_full` | the same + softmax derivatives | max|γ₃|/r_n             | ours: sound                           |

The text of Barbero et al. 2025 (arXiv 2504.02732) was not at hand; `multi_head` is its form as we recall it.
The calibrated variants carry the MLP as a node factor 1 + lip at each position instead of inside C.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.attention import KeptAttention
from oversquash_lens.capture.support import refuse_unsupported
from oversquash_lens.capture.trace import Trace, check_trace
from oversquash_lens.errors import InputError
from oversquash_lens.numerics import to_float64
from oversquash_lens.paths.block import Block, Layer
from oversquash_lens.paths.edges import MixedEdges, Parts, SplitEdges
from oversquash_lens.paths.factored import Factored
from oversquash_lens.paths.paths import PathKind, PathProfile, log_path_sums
from oversquash_lens.paths.weighing import Weighing

PRINTED = ("proof", "theorem_5_1", "theorem_b5", "multi_head")
CALIBRATED = ("calibrated", "calibrated_full")
VARIANTS = (*PRINTED, "rollout", *CALIBRATED)
NOTES = {
    "proof": "printed form, no bound on a real model: value and output matrices and per-head norms are left out",
    "theorem_5_1": "printed form; the paper leaves its constant unspecified, so only shares have a meaning",
    "theorem_b5": "printed form, no bound even on the paper's own terms: its constant vanishes with the MLP",
    "multi_head": "the sinks paper's multi-head form as we recall it; no bound on a real model",
    "rollout": "attention rollout, dimensionless: a share, no sensitivity",
    "calibrated": "a bound with the attention weights frozen; always above that truth, by orders of magnitude",
    "calibrated_full": "a bound on the full sensitivity; always above the truth, by orders of magnitude",
}


def path_bound(trace: Trace, variant: str = "proof", beta: float | str = "measured") -> PathProfile:
    """Weighted count of causal paths from every input position to the prediction, as the variant weights them.

    `beta` is what the printed variants divide by: "measured" (per layer the geometric mean over positions of the
    norm's divisor; β₃ at the last token, over max|γ₃|) or one number for all norms. The calibrated variants use
    each position's own divisor and rollout none: giving them a number raises InputError.
    """
    check_trace(trace)
    return bound_weighing(trace, variant, beta).profile()


def bound_weighing(trace: Trace, variant: str, beta: float | str = "measured") -> Weighing:
    """What the variant's edges, nodes and constant are on this trace."""
    if variant not in VARIANTS:
        raise InputError(f"expected one of {', '.join(VARIANTS)}, got variant {variant!r}")
    _check_beta(beta, variant)
    if variant in CALIBRATED:
        refuse_unsupported(trace.support, variant, trace.about.model)
        gains = trace.gains
        edges = _full_edges(trace) if variant == "calibrated_full" else _frozen_edges(trace)
        log_constant = math.log(gains.final_gain_max / gains.final_scale)
        nodes = None if trace.parallel else torch.log1p(gains.mlp_lipschitz)
        return Weighing(variant, trace, edges, nodes, log_constant, _notes(trace, variant))
    norms = _norms(trace, beta)
    edges, log_constant = _printed_edges(variant, norms, trace.about.n_heads), _log_constant(variant, norms, trace)
    return Weighing(variant, trace, edges, None, log_constant, _notes(trace, variant))


def path_products(
    store: Mapping[str, Any],
    variant: str = "proof",
    beta: float | str = "measured",
    batch: int | None = None,
) -> Float[Tensor, "layer_plus_1 pos"]:
    """Attention-path products from what `attention_path_hooks` left in `store`, constant left out.

    Row l is how much the last token hears of each position entering layer l; the last row is the last token
    alone. `variant` is one of the printed ones or rollout (the calibrated ones need `record`); `batch` picks the
    prompt where several ran together. float64; see `path_bound` for logarithms that cannot overflow.
    """
    known = (*PRINTED, "rollout")
    if variant not in known:
        raise InputError(
            f"expected one of {', '.join(known)}, got variant {variant!r}: the calibrated ones need record()"
        )
    _check_beta(beta, variant)
    if not isinstance(store, Mapping):
        raise InputError(
            f"expected a store that hooks filled, got a {type(store).__name__}: give attention_path_hooks one"
        )
    patterns = store.get("attention")
    if not patterns:
        raise InputError(
            "expected one that attention_path_hooks(model, store) filled, got a store without attention: run the "
            "model with these hooks first"
        )
    size = len(patterns[0])
    which = 0 if batch is None and size == 1 else batch
    if which is None or not 0 <= which < size:
        raise InputError(f"expected batch=0 … {size - 1}, got a store of {size} prompts with batch={batch}")
    if variant == "rollout":
        beta = 1.0  # it divides by no norm
    norms = Norms(*(_stored_norm(store, key, which, beta) for key in ("attention_scale", "mlp_scale")), 1.0)

    def blocks(layer: int) -> Iterator[Block]:
        return Layer(KeptAttention(patterns[layer][which].detach()), None, layer).blocks()

    edges = _printed_edges(variant, norms, patterns[0].shape[1])
    return log_path_sums(blocks, [PathKind(edges.factored)], patterns[0].shape[-1], len(patterns))[0].exp()


@dataclass(frozen=True)
class Norms:
    """β₁, β₂ of each layer and β₃, what assumption (i) replaces the norms by."""

    attention: Float[Tensor, " layer"]
    mlp: Float[Tensor, " layer"]
    final: float


def _geometric_mean(scale: Float[Tensor, "layer pos"]) -> Float[Tensor, " layer"]:
    return scale.cpu().double().log().mean(-1).exp()


def _norms(trace: Trace, beta: float | str) -> Norms:
    gains = trace.gains
    measured = Norms(
        _geometric_mean(gains.attention_scale),
        _geometric_mean(gains.mlp_scale),
        gains.final_scale / gains.final_gain_max,
    )
    if beta == "measured":
        return measured
    given = torch.full_like(measured.attention, float(beta))
    return Norms(given, given, float(beta))


def _stored_norm(store: Mapping[str, Any], key: str, batch: int, beta: float | str) -> Float[Tensor, " layer"]:
    layers = range(len(store["attention"]))
    if beta != "measured":
        return torch.full((len(layers),), float(beta), dtype=torch.float64, device="cpu")
    if len(store.get(key, ())) != len(layers):
        raise InputError(f"expected attention_path_hooks to fill it, or beta=1.0, got a store without {key}")
    return _geometric_mean(torch.stack([store[key][layer][batch].detach().cpu() for layer in layers]))


def _check_beta(beta: float | str, variant: str) -> None:
    if beta == "measured":
        return
    number = isinstance(beta, int | float) and not isinstance(beta, bool)
    if not number or not (math.isfinite(beta) and beta > 0):
        raise InputError(f"expected 'measured' or a positive number, got beta={beta!r}: 1.0 divides by nothing")
    if variant not in PRINTED:
        raise InputError(f"expected no beta, got beta={beta!r} with variant {variant!r}: it uses none")


def _printed_edges(variant: str, norms: Norms, n_heads: int) -> MixedEdges:
    """The paper's Ā as factors of α^h and of δ; the sum over heads over H is their mean."""
    beta_1, beta_2 = norms.attention, norms.mlp
    one = torch.ones_like(beta_1)
    of_mean, own = {
        "proof": (1 / beta_1, one),
        "theorem_5_1": (1 / beta_2, one),
        "theorem_b5": (1 / beta_1, 1 / beta_1),
        "multi_head": (n_heads * one, one / n_heads),
        "rollout": (one / 2, one / 2),
    }[variant]
    return MixedEdges(own[:, None], (of_mean / n_heads)[:, None])


def _log_constant(variant: str, norms: Norms, trace: Trace) -> float:
    sigma = trace.gains.mlp_sigma.cpu().double()
    factors = torch.log1p(sigma / norms.mlp)
    if variant == "proof":
        return factors.sum().item() - math.log(norms.final)
    if variant == "theorem_b5":
        return sigma.log().sum().item()
    if variant == "multi_head":
        return len(factors) * factors.max().item()
    return math.nan


def _frozen_edges(trace: Trace) -> MixedEdges:
    """Operator norms: δ + Σ_h α^h ‖OV_h‖₂/r (docs/theory.md, sections 3 and 10)."""
    gains = trace.gains
    return MixedEdges(_own(trace), 1 / gains.attention_post_scale, 1 / gains.attention_scale, "ov_norm")


def _own(trace: Trace) -> Float[Tensor, "layer pos"]:
    """What the residual stream passes on inside an edge: an MLP beside attention belongs to it."""
    lipschitz = trace.gains.mlp_lipschitz
    return 1 + lipschitz if trace.parallel else torch.ones_like(lipschitz)


def _full_edges(trace: Trace) -> FullEdges:
    worst = trace.gains.weights.worst_output_factor is not None
    return FullEdges(_frozen_edges(trace), "worst_output_factor" if worst else "output_factor")


@dataclass(frozen=True)
class FullEdges(SplitEdges):
    """The frozen ones and the derivative of the attention weights (docs/theory.md, sections 3 and 10).

    `factor` names the triangular factors of W_O by which head outputs are measured.
    """

    frozen: MixedEdges
    factor: str

    def factored(self, block: Block) -> Factored:
        frozen = self.frozen.factored(block)
        own = frozen.own + self._query_side(block).sum(0)
        return replace(frozen, core=frozen.core + block.summed_pull(self.factor, "key_norm"), own=own)

    def parts(self, block: Block) -> Parts:
        frozen, gains = self.frozen.parts(block), block.gains
        key_side = block.pull(self.factor) * gains.weights.key_norm[block.index].to(frozen.heads)[:, None, None]
        key_side *= self.frozen.src_factor[block.index, : block.stop].to(key_side)
        key_side *= self.frozen.dest_factor[block.index, block.start : block.stop, None].to(key_side)
        heads = frozen.heads.add_(key_side)
        heads.diagonal(offset=block.start, dim1=1, dim2=2).add_(self._query_side(block).to(heads))
        return Parts(heads, frozen.own)

    def _query_side(self, block: Block) -> Float[Tensor, "head dest"]:
        """What moving the query does: on the diagonal, as the query is the position's own."""
        gains, at = block.gains, (block.index, slice(block.start, block.stop))
        drift = to_float64(block.drift(self.factor)) * to_float64(gains.weights.query_norm[block.index])[:, None]
        scale = to_float64(gains.query_scale[block.index][:, block.start : block.stop])
        return drift / (scale * to_float64(gains.attention_scale[at] * gains.attention_post_scale[at]))


def _notes(trace: Trace, variant: str) -> tuple[str, ...]:
    notes = [NOTES[variant]]
    if variant in ("proof", "theorem_b5", "multi_head") and trace.gated_mlp:
        notes.append("a gated MLP has no global Lipschitz constant: σ_ψ is the largest over this prompt")
    verdict = trace.support[variant if variant in CALIBRATED else "printed bounds"]
    if verdict.why:
        notes.append(verdict.why)
    if trace.about.final_gain == "unknown":
        notes.append("the final gain was folded into the unembedding and is not known: y lacks it")
    return tuple(notes)
