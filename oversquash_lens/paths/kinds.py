"""Every kind of path, one row each: what its edges, nodes and constant are made of.

The paper prints Theorem 5.1 in three forms that differ (docs/theory.md, section 2); each is a kind here, and none of
them is a bound on a real model, whose value, output and norm-gain matrices the paper's notation leaves out:

| kind              | edge j ← k                     | constant C              | where from                            |
|-------------------|--------------------------------|-------------------------|---------------------------------------|
| `mean_field`      | mean squares of all of these   | √(d mean γ₃²)/r_n       | ours: an estimate, no bound           |
| `proof`           | mean_h α/β₁ + δ                | (1/β₃) Π_l (σ_ψ/β₂ + 1) | derivation under Theorem B.5          |
| `theorem_5_1`     | mean_h α/β₂ + δ                | unspecified (nan)       | Theorem 5.1, main text                |
| `theorem_b5`      | (mean_h α + δ)/β₁              | Π_l σ_ψ                 | Theorem B.5, statement                |
| `multi_head`      | Σ_h α + δ/H                    | max_l (σ_ψ/β₂ + 1)^L    | Barbero et al. 2025, from memory      |
| `rollout`         | (mean_h α + δ)/2               | nan                     | Abnar & Zuidema 2020                  |
| `calibrated`      | δ + Σ_h α ‖OV_h‖₂/r            | max|γ₃|/r_n             | ours: sound with the attention frozen |
| `calibrated_full` | the same + softmax derivatives | max|γ₃|/r_n             | ours: sound                           |

The text of Barbero et al. 2025 (arXiv 2504.02732) was not at hand; `multi_head` is its form as we recall it. The
calibrated kinds carry the MLP as a node factor 1 + lip at each position instead of inside C. The mean-field estimate
multiplies mean squares where a bound multiplies worst cases, which on a deep model say nothing about the truth: the
sum over paths stays, the sizes become those that a typical perturbation meets (docs/theory.md, section 4).

To add a kind, add a row: `profiles`, `path_bound`, `flow`, the command line and the figures read it. This
module costs nothing to import, so that the command line can list the names; `PathInputs` is in edges.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from oversquash_lens.paths.edges import EdgeRule, PathInputs


class PathKind(NamedTuple):
    """One kind of path. A path's weight is the product of its edges and node gains; the sensitivity that the kind
    speaks of is C · (sum over paths)^power: power is 1 for bounds, 1/2 where edges are mean squares.
    """

    name: str
    note: str  # what the numbers are, said with every result
    edges: Callable[[PathInputs], EdgeRule]
    log_constant: Callable[[PathInputs], float] = lambda x: math.nan  # nan: unspecified, only shares have a meaning
    log_node_gain: Callable[[PathInputs], Tensor | None] = lambda x: None  # [layer, pos]
    second_note: Callable[[PathInputs], str] = lambda x: ""
    support: str = "printed bounds"  # the entry of `Trace.support` that says whether it holds on this architecture
    takes_beta: bool = False  # whether a number may stand for the norms
    is_bound: bool = False  # whether it promises to be above the truth on a real model
    power: float = 1.0


MEAN_FIELD = PathKind(
    name="mean_field",
    note="an estimate from one forward pass, not a bound",
    edges=lambda x: x.mean_squares(),
    log_constant=lambda x: x.log_root_mean_square_gain,
    log_node_gain=lambda x: x.log_mean_square_nodes,
    second_note=lambda x: f"node gains from {x.gains.node_probes} probes",
    support="mean_field",
    power=0.5,
)
# As if attention weights were constants: what the predicted error compares the estimate with, no kind of its own.
MEAN_FIELD_FIXED = MEAN_FIELD._replace(
    name="mean_field, attention fixed", edges=lambda x: x.mean_squares(attention_fixed=True)
)

_ROWS = (
    MEAN_FIELD,
    PathKind(
        name="proof",
        note="printed form, no bound on a real model: value and output matrices and per-head norms are left out",
        edges=lambda x: x.mean_attention(1 / x.beta_1, residual=x.one),
        log_constant=lambda x: x.log_mlp_factors.sum().item() - math.log(x.beta_3),
        second_note=lambda x: x.sigma_note,
        takes_beta=True,
    ),
    PathKind(
        name="theorem_5_1",
        note="printed form; the paper leaves its constant unspecified, so only shares have a meaning",
        edges=lambda x: x.mean_attention(1 / x.beta_2, residual=x.one),
        takes_beta=True,
    ),
    PathKind(
        name="theorem_b5",
        note="printed form, no bound even on the paper's own terms: its constant vanishes with the MLP",
        edges=lambda x: x.mean_attention(1 / x.beta_1, residual=1 / x.beta_1),
        log_constant=lambda x: x.sigma.log().sum().item(),
        second_note=lambda x: x.sigma_note,
        takes_beta=True,
    ),
    PathKind(
        name="multi_head",
        note="the sinks paper's multi-head form as we recall it; no bound on a real model",
        edges=lambda x: x.mean_attention(x.n_heads * x.one, residual=x.one / x.n_heads),
        log_constant=lambda x: len(x.log_mlp_factors) * x.log_mlp_factors.max().item(),
        second_note=lambda x: x.sigma_note,
        takes_beta=True,
    ),
    PathKind(
        name="rollout",
        note="attention rollout, dimensionless: a share, no sensitivity",
        edges=lambda x: x.mean_attention(x.one / 2, residual=x.one / 2),
    ),
    PathKind(
        name="calibrated",
        note="a bound with the attention weights frozen; always above that truth, by orders of magnitude",
        edges=lambda x: x.frozen_norms(),
        log_constant=lambda x: x.log_final_gain,
        log_node_gain=lambda x: x.log_lipschitz_nodes,
        support="calibrated",
        is_bound=True,
    ),
    PathKind(
        name="calibrated_full",
        note="a bound on the full sensitivity; always above the truth, by orders of magnitude",
        edges=lambda x: x.full_norms(),
        log_constant=lambda x: x.log_final_gain,
        log_node_gain=lambda x: x.log_lipschitz_nodes,
        support="calibrated_full",
        is_bound=True,
    ),
)
TABLE = {kind.name: kind for kind in _ROWS}

KINDS = tuple(TABLE)
VARIANTS = tuple(name for name in KINDS if name != "mean_field")  # of `path_bound`
PRINTED = tuple(name for name, kind in TABLE.items() if kind.takes_beta)
CALIBRATED = tuple(name for name, kind in TABLE.items() if kind.is_bound)
FROM_PATTERNS = (*PRINTED, "rollout")  # these need attention patterns and norms only, no gains
