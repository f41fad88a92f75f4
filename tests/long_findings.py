"""Findings on thousands of tokens, made by hand: edges are computed as they are asked for, nothing is n² at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from small_findings import answer_result, findings_result
from small_results import SplitEdgeBlock, about, audit_result

from oversquash_lens.analyses.findings import Findings
from oversquash_lens.paths.blocks import EdgeBlock
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.heaviest import HeavyEdge, HeavyPath
from oversquash_lens.paths.squashing import Squashing

SENTENCE = ("The", " seals", " lay", " on", " the", " sk", "erry", " and", " sang", ".", "\n")


@dataclass(frozen=True)
class LazyEdges:
    """Heads that look at the first token and evenly at all others; rows are made when asked for."""

    n_heads: int
    largest: list[int]  # numbers of entries asked for at once

    def edge_block(self, layer: int, start: int, stop: int) -> EdgeBlock:
        self.largest.append(self.n_heads * (stop - start) * stop)
        heads = torch.full((self.n_heads, stop - start, stop), 0.1 / stop, dtype=torch.float64).tril_(start)
        heads[:, :, 0] += 0.1 / (1 + layer)
        return SplitEdgeBlock.of(start, heads, torch.ones(stop - start, dtype=torch.float64))


def long_findings(n: int, n_layers: int = 4, n_heads: int = 2, tokens: tuple[str, ...] | None = None) -> Findings:
    """A long prompt with a few loud tokens, measured by probes."""
    tokens = tokens or (SENTENCE * (n // len(SENTENCE) + 1))[:n]
    audit = audit_result(tokens, n_layers=n_layers, exact=False)
    flows = [long_flow(tokens, n_layers, n_heads, seed) for seed in (2, 5, 7)]
    short = findings_result(n_layers=n_layers)
    return replace(
        short,
        answer=answer_result(tokens, n_layers, flows[1], replaced=False),
        audit=audit,
        squashing=Squashing(flows[0], flows[1], audit.mean_field.share, flows[1].node[0]),
        routes={"largest": replace(flows[2], source=n // 3)},
        edges=(HeavyEdge(1, 0, n - 1, n // 3, 0.02),),
        paths=(HeavyPath((n // 3, *([n - 1] * n_layers)), (0, *([None] * (n_layers - 1))), 0.01),),
    )


def long_flow(tokens: tuple[str, ...], n_layers: int, n_heads: int, seed: int) -> Flow:
    n = len(tokens)
    generator = torch.Generator().manual_seed(seed)
    node = (2 * torch.randn(n_layers + 1, n, generator=generator, dtype=torch.float64)).softmax(-1)
    part = torch.rand(n_layers, n_heads + 1, 1, generator=generator, dtype=torch.float64)
    split = node[1:, None] * part / part.sum(1, keepdim=True)
    return Flow(
        kind="mean_field",
        tokens=tokens,
        source=None,
        node=node,
        head_at=split[:, :-1],
        residual_at=split[:, -1],
        log_above=node.log(),
        log_below=torch.full_like(node, -math.log(n)),
        edges=LazyEdges(n_heads, []),
        about=about(),
    )
