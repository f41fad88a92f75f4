"""The command that says where it concentrates: `flow`."""

from __future__ import annotations

import argparse
from typing import Any

from oversquash_lens.cli.common import (
    attention_option,
    check_out,
    deliver,
    load,
    plan_option,
    planned,
    prompt_command,
    prompt_of,
    recording_options,
    verify_option,
)
from oversquash_lens.errors import InputError
from oversquash_lens.paths.kinds import KINDS

LEADING = 4  # heads named for each layer


def add_commands(commands: Any) -> None:
    flow = prompt_command(commands, "flow", run_flow, "where the paths run: widths, heads, heaviest edges and paths")
    flow.add_argument("--variant", default="mean_field", help=f"one of {', '.join(KINDS)} (default mean_field)")
    flow.add_argument("--source", metavar="TOKEN", help="the route of one token or span: position, text, or START:STOP")
    flow.add_argument("--top", type=int, default=10, metavar="K", help="edges and paths to list (default 10)")
    flow.add_argument("--figures", metavar="FOLDER", help="write the figures as PDF, SVG and PNG")
    flow.add_argument("--out", metavar="FILE", help="write the result as JSON")
    plan_option(flow)
    verify_option(flow)
    attention_option(flow)


def run_flow(options: argparse.Namespace) -> None:
    if options.variant not in KINDS:
        raise InputError(f"expected one of {', '.join(KINDS)}, got variant {options.variant!r}")
    if options.top < 1:
        raise InputError(f"expected at least 1, got --top {options.top}")
    check_out(options)
    figures = _places(options.figures)
    prompt = prompt_of(options)
    from oversquash_lens.capture.recorder import record
    from oversquash_lens.paths.flow import flow
    from oversquash_lens.paths.heaviest import heaviest_edges, heaviest_paths
    from oversquash_lens.paths.squashing import squashing

    model = load(options)
    if planned(options, model, prompt, "flow"):
        return
    trace = record(model, prompt, **recording_options(options))
    squashed = squashing(trace, options.variant) if options.source is None else None
    found = squashed.flow if squashed else flow(trace, options.variant, options.source)
    edges, paths = heaviest_edges(found, options.top), heaviest_paths(found, options.top)
    result = squashed.to_dict() if squashed else found.to_dict()
    result |= {"edges": [edge.to_dict() for edge in edges], "paths": [path.to_dict() for path in paths]}
    if figures:
        _draw(found, squashed, options.figures)
    deliver(
        options, result, "\n".join([*_head(found, squashed), "", *_layers(found), "", *_heaviest(found, edges, paths)])
    )


def _places(folder: str | None) -> list:
    from oversquash_lens.storage import check_place

    return [check_place(folder, f"{name}.pdf") for name in ("flow", "heads", "width", "route")] if folder else []


def _draw(flow: Any, squashed: Any, folder: str) -> None:
    from oversquash_lens.viz import figures

    drawings = {"flow": flow, "heads": flow, "width": squashed or flow, "route": flow}
    for name, what in drawings.items():
        figures.save(getattr(figures, name)(what), folder, name)


def _head(flow: Any, squashed: Any) -> list[str]:
    n, kind = len(flow.tokens), flow.kind
    lines = [f"{flow.about}, {n} tokens", f"{kind}: paths from {flow.source_text} to the last one"]
    return lines + ([squashed.sentence] if squashed else [])


def _layers(flow: Any) -> list[str]:
    """One line per layer, the highest first: how wide the paths are on entering, and who moves them."""
    lines = ["layer  width on entering  stays  heads with the largest shares"]
    for layer in reversed(range(flow.n_layers)):
        order = flow.head[layer].argsort(descending=True)[:LEADING].tolist()
        heads = ", ".join(f"{head}: {flow.head[layer, head].item():.1%}" for head in order)
        width, stays = flow.effective_width[layer].item(), flow.residual[layer].item()
        lines.append(f"{layer:5d}  {width:17.1f}  {stays:5.0%}  {heads}")
    return lines


def _heaviest(flow: Any, edges: Any, paths: Any) -> list[str]:
    def at(position: int) -> str:
        return f"{position} {flow.tokens[position]!r}"

    lines = ["heaviest edges between positions"]
    lines += [f"{e.share:8.2%}  layer {e.layer}, head {e.head}: {at(e.src)} → {at(e.dest)}" for e in edges]
    lines += ["", "heaviest whole paths (all heads between two positions together; the one named brings most)"]
    for path in paths:
        moves = [f"layer {layer}, head {head} → {at(dest)}" for layer, head, _, dest in path.moves]
        lines.append(f"{path.share:8.2%}  {at(path.positions[0])}{''.join(f'; {move}' for move in moves) or '; stays'}")
    return lines
