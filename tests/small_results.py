"""Results made by hand, for tests that draw: no model, no forward pass, numbers that one can recompute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from oversquash_lens.analyses.audit import Audit, AuditRow
from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.jacobian.measured_flow import MeasuredFlow
from oversquash_lens.paths.blocks import EdgeBlock, HeadEdges
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.profiles import ExpectedError
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.results import About
from oversquash_lens.swaps.substitution import Substitution
from oversquash_lens.swaps.swap import Swap

TOKENS = ("The", " committee", " met", " on", " Tuesday", ".", "\n", "\t", " The", " answer", " is")
EVIL = (
    "</script><img src=x onerror=document.title='pwned'>",
    "<img src=x onerror=document.title='pwned'>",
    "<svg/onload=document.title='pwned'>",
    "<!--<script>document.title='pwned'</script>",
    "&lt;b&gt;&#x3c;script&#x3e;",
    "\u2028\u2029\u202eabc\x00\x1b\ud800",
    '"\'`${document.title="pwned"}\\u003cimg src=x onerror=document.title=1\\u003e',
    "",
    "x" * 10_000,
    "é\u0301 漢字 👩‍👧 שלום",
)
VARIANTS = ("proof", "theorem_5_1", "theorem_b5", "multi_head", "rollout", "calibrated", "calibrated_full")


def about(model: str = "a model made by hand") -> About:
    return About(model, "HookedTransformer", 3, 2, 8, "float32", False, "model", False, False, {"torch": "2.13.0"})


def profile(
    kind: str = "proof",
    tokens: tuple[str, ...] = TOKENS,
    n_layers: int = 3,
    seed: int = 0,
    constant: float = 0.0,
) -> PathProfile:
    """A profile with a loud first token, as attention sinks make it."""
    generator = torch.Generator().manual_seed(seed)
    rows = 1.5 * torch.randn(n_layers + 1, len(tokens), generator=generator, dtype=torch.float64)
    rows[:, 0] += 3
    rows[-1] = -math.inf
    rows[-1, -1] = 0.0
    return PathProfile(kind, tokens, rows, constant, about(), (f"assumed by {kind} <of course>",))


def truth(tokens: tuple[str, ...] = TOKENS, exact: bool = True, seed: int = 1) -> MeasuredSensitivity:
    generator = torch.Generator().manual_seed(seed)
    values = (1.2 * torch.randn(len(tokens), generator=generator, dtype=torch.float64)).exp()
    error = torch.zeros_like(values) if exact else 0.06 * values
    probes, seeded = (None, None) if exact else (16, 0)
    return MeasuredSensitivity(
        tokens=tokens,
        values=values,
        standard_error=error,
        exact=exact,
        norm="fro",
        freeze=(),
        probes=probes,
        seed=seeded,
        about=about(),
    )


@dataclass(frozen=True, kw_only=True)
class SplitEdgeBlock(EdgeBlock):
    """Edges given by their heads and what stays in the residual stream."""

    heads: torch.Tensor
    residual: torch.Tensor

    @classmethod
    def of(cls, start: int, heads: torch.Tensor, residual: torch.Tensor) -> EdgeBlock:
        return cls(core=heads.sum(0), start=start, diagonal=residual, heads=heads, residual=residual)

    def by_head(self) -> HeadEdges:
        return HeadEdges(self.heads.clone(), self.residual)


@dataclass(frozen=True)
class HandMadeEdges:
    """Edges kept as whole matrices."""

    heads: torch.Tensor  # [layer, head, dest, src]
    own: torch.Tensor  # [layer]

    def edge_block(self, layer: int, start: int, stop: int) -> EdgeBlock:
        heads = self.heads[layer, :, start:stop, :stop]
        return SplitEdgeBlock.of(start, heads, self.own[layer].expand(stop - start))


def flow_result(
    tokens: tuple[str, ...] = TOKENS,
    n_layers: int = 3,
    n_heads: int = 2,
    *,
    source: int | None = None,
    seed: int = 2,
    kind: str = "mean_field",
) -> Flow:
    """A flow over random causal attention, from the whole matrices: what `flow` has no part in making."""
    n = len(tokens)
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(n_layers, n_heads, n, n, generator=generator, dtype=torch.float64)
    scores[..., 0] += 2  # a loud first token, as attention sinks make it
    attention = scores.masked_fill(~torch.ones(n, n).tril().bool(), -math.inf).softmax(-1)
    factor = 0.4 * torch.rand(n_layers, n_heads, generator=generator, dtype=torch.float64)
    own = torch.ones(n_layers, dtype=torch.float64)
    heads = attention * factor[:, :, None, None]
    whole = heads.sum(1) + torch.eye(n, dtype=torch.float64)

    below = [torch.ones(n, dtype=torch.float64) if source is None else torch.eye(n, dtype=torch.float64)[source]]
    above = [torch.eye(n, dtype=torch.float64)[-1]]
    for layer in range(n_layers):
        below.append(whole[layer] @ below[-1])
        above.insert(0, above[0] @ whole[-1 - layer])
    up, down = torch.stack(below), torch.stack(above)
    node = up * down / (up * down).sum(-1, keepdim=True)
    part = node[1:] / up[1:].clamp(min=1e-300)
    return Flow(
        kind=kind,
        tokens=tokens,
        source=source,
        node=node,
        head_at=(heads @ up[:-1, None, :, None])[..., 0] * part[:, None],
        residual_at=up[:-1] * part,
        log_above=down.log(),
        log_below=up.log(),
        edges=HandMadeEdges(heads, own),
        about=about(),
        notes=("assumed by nobody",),
    )


def measured_flow_result(
    tokens: tuple[str, ...] = TOKENS,
    n_layers: int = 3,
    n_heads: int = 2,
    *,
    source: int | slice | None = None,
    seed: int = 4,
    parallel: bool = False,
) -> MeasuredFlow:
    """Random signed shares that sum to 1 where they should."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    node = random(n_layers + 1, len(tokens))
    node[-1] = 0
    node[-1, -1] = 1
    node = node + (1 - node.sum(-1, keepdim=True)) / len(tokens)
    head, mlp = 0.2 * random(n_layers, n_heads), 0.3 * random(n_layers)
    stays = 1 - head.sum(-1) - (mlp if parallel else 0)
    norms = random(n_layers + 1, len(tokens)).exp()
    norms[-1, :-1] = 0
    return MeasuredFlow(
        tokens=tokens,
        source=source,
        target="logit of ' red'",
        node=node,
        head=head,
        stays=stays,
        mlp=mlp,
        norms=norms,
        total=2.0,
        conservation=3e-7,
        error=0.0,
        probes=None,
        edges=(),
        about=about(),
    )


def substitution_result(tokens: tuple[str, ...] = TOKENS, draws: int = 2, n_layers: int = 3) -> Substitution:
    n, generator = len(tokens), torch.Generator().manual_seed(6)
    return Substitution(
        tokens=tokens,
        spans=tuple((i, i + 1) for i in range(n)),
        replacements=(((7,),) * draws,) * n,
        plausible=tuple(draw >= draws / 2 for draw in range(draws)),
        distances=torch.rand(n, draws, generator=generator, dtype=torch.float64) + 0.1,
        kls=torch.rand(n, draws, generator=generator, dtype=torch.float64),
        kept=torch.ones(n, draws, dtype=torch.bool),
        effects=torch.zeros(n, draws, dtype=torch.float64),
        arrival=torch.rand(n_layers + 1, n, generator=generator, dtype=torch.float64),
        collapsed={},
        size=4.0,
        target="logit of ' red'",
        method="nodes",
        method_reason="made by hand",
        about=about(),
    )


def swap_result(tokens: tuple[str, ...] = TOKENS, n_layers: int = 3) -> Swap:
    """Token 2 swapped; every other node patched."""
    generator = torch.Generator().manual_seed(8)
    spread, patched = torch.rand(2, n_layers + 1, len(tokens), generator=generator, dtype=torch.float64)
    spread[:, :2] = 0
    patched = 2 * patched - 1
    patched[:, ::2] = math.nan
    head = torch.zeros(n_layers, 2, dtype=torch.float64)
    return Swap(
        tokens=tokens,
        swapped=(*tokens[:2], " sat", *tokens[3:]),
        positions=(2,),
        spread=spread,
        distance=1.5,
        relative=0.5,
        kl=0.25,
        top_before=((" red", 0.5),),
        top_after=((" blue", 0.4),),
        target="logit of ' red' less that of ' blue'",
        before=2.0,
        after=-1.5,
        patched=patched,
        patched_heads=head,
        attributed=torch.zeros_like(spread),
        attributed_heads=head,
        about=about(),
    )


def audit_result(
    tokens: tuple[str, ...] = TOKENS,
    *,
    model: str = "a model made by hand",
    n_layers: int = 3,
    exact: bool = True,
) -> Audit:
    unspecified = ("theorem_5_1", "rollout")
    bounds = {
        kind: profile(kind, tokens, n_layers, seed, math.nan if kind in unspecified else 2.0)
        for seed, kind in enumerate(VARIANTS)
    }
    rows = [
        AuditRow(kind, 0.25, *(math.nan,) * 3, None, False, "–")
        if kind in unspecified
        else AuditRow(kind, -0.5, 1.25, -0.75, 3.0, 2, kind.startswith("cal"), "‖J‖₂", 0.4)
        for kind in VARIANTS
    ]
    rows.append(AuditRow("mean_field", 0.93, -0.09, -0.55, 0.22, None, False, "‖J‖_F", 0.3))
    return Audit(
        about=about(model),
        tokens=tokens,
        truth=truth(tokens, exact),
        bounds=bounds,
        mean_field=profile("mean_field", tokens, n_layers, 9),
        rows=tuple(rows),
        expected=ExpectedError(softmax_share=0.2, offset=-0.25, offset_error=0.1, spread=0.2),
    )
