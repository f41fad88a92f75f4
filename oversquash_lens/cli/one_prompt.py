"""The commands that measure one prompt as it is, and under edits: `bound`, `audit`, `flow` and `what-if`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from oversquash_lens.cli.common import (
    attention_option,
    check_out,
    checked,
    deliver,
    load,
    planned,
    prompt_command,
    prompt_of,
    recording_options,
    remark,
    target_option,
    target_options,
    verify_option,
)
from oversquash_lens.errors import InputError, one_line, one_of, whole_number
from oversquash_lens.paths.kinds import KINDS, VARIANTS

LEADING = 4  # heads named for each layer
FORMS = (
    "window:WIDTH, window:WIDTH:keep-first, ablate:LAYER.HEAD, mask:POSITION, sharpen:POWER, separators:EVERY, "
    "separators:EVERY:TEXT, with-bos, without-bos"
)


def add_commands(commands: Any) -> None:
    bound = prompt_command(commands, "bound", run_bound, "the paper's bound or another variant, token by token")
    bound.add_argument("--variant", default="proof", help=f"{', '.join(VARIANTS)}, or mean_field")
    bound.add_argument("--beta", default="measured", help="'measured' or a number (printed variants only)")
    bound.add_argument("--top", type=int, default=20, metavar="K", help="rows of the table (default 20)")
    audit = prompt_command(commands, "audit", run_audit, "every measure beside both truths, infinitesimal and finite")
    audit.add_argument("--probes", type=int, metavar="K", help="estimate the truth from K probes, not exactly")
    audit.add_argument(
        "--draws", type=int, metavar="K", help="replacements of each token, 0 for none (default 4 up to 150 tokens)"
    )
    audit.add_argument(
        "--where", action="store_true", help="hold the estimated flow against the measured one too (slow)"
    )
    flow = prompt_command(commands, "flow", run_flow, "where the sensitivity runs, measured; or an estimate of it")
    flow.add_argument(
        "--source", metavar="TOKEN", help="the route of one token: its position, its text, or START:END for a span"
    )
    target_option(flow)
    flow.add_argument(
        "--probes", type=int, metavar="K", help="of all outputs, from K directions, in place of a target (8 is near)"
    )
    flow.add_argument("--estimate", action="store_true", help="path sums from one pass: an estimate, heads unsigned")
    flow.add_argument("--variant", help=f"of the path sums (with --estimate): {', '.join(KINDS)}; default mean_field")
    flow.add_argument("--top", type=int, default=10, metavar="K", help="edges and paths to list (default 10)")
    flow.add_argument(
        "--edges", type=int, default=0, metavar="K", help="measure the K heaviest edges between positions too"
    )
    flow.add_argument("--figures", metavar="FOLDER", help="write the figures as PDF, SVG and PNG")
    edited = prompt_command(commands, "what-if", run_what_if, "measure again under edits of prompt or attention")
    edited.add_argument("--edit", action="append", required=True, metavar="EDIT", help=f"repeatable; one of {FORMS}")
    edited.add_argument("--variant", default="proof", help=f"the bound beside: {', '.join(VARIANTS)}")
    edited.add_argument("--probes", type=int, default=16, metavar="K", help="backward probes (default 16)")
    target_option(edited)
    edited.add_argument("--exact", action="store_true", help="exact truth, d_model backward products each")
    for command in (bound, audit, flow, edited):
        command.add_argument("--out", metavar="FILE", help="write the result as JSON")
        verify_option(command)
        if command is not edited:
            attention_option(command)


def run_bound(options: argparse.Namespace) -> None:
    beta = _number_or_word(options.beta)
    if options.variant == "mean_field" and beta != "measured":
        raise InputError(f"expected no beta, got --beta {options.beta} with mean_field: it uses none")
    one_of("variant", options.variant, KINDS)
    checked("top", options.top)
    check_out(options)
    prompt = prompt_of(options)
    from oversquash_lens.capture.recorder import record
    from oversquash_lens.paths.profiles import estimate_and_error, path_bound

    model = load(options)
    if planned(options, model, prompt, "bound"):
        return
    trace = record(model, prompt, **recording_options(options))
    remark(trace.about)
    if options.variant == "mean_field":
        profile, expected = estimate_and_error(trace)
        table = f"{_profile_table(profile, options.top)}\n\n{expected.sentence}"
        deliver(options, {**profile.to_dict(), "expected": expected.to_dict()}, table)
    else:
        profile = path_bound(trace, options.variant, beta)
        deliver(options, profile.to_dict(), _profile_table(profile, options.top))


def run_audit(options: argparse.Namespace) -> None:
    checked("probes", options.probes)
    checked("draws", options.draws, least=0)
    check_out(options)
    prompt = prompt_of(options)
    from oversquash_lens.analyses.audit import audit

    model = load(options)
    if planned(options, model, prompt, "audit", options.probes):
        return
    how = {"probes": options.probes, "draws": options.draws, "where": options.where, **recording_options(options)}
    result = audit(model, prompt, progress=True, **how)
    remark(result.about)
    deliver(options, result.to_dict(), str(result))


def run_flow(options: argparse.Namespace) -> None:
    checked("top", options.top)
    checked("probes", options.probes)
    check_out(options)
    if options.estimate or options.variant is not None:
        _estimated_flow(options)
    else:
        _measured_flow(options)


def _measured_flow(options: argparse.Namespace) -> None:
    """Of the likeliest token unless another target, or all outputs, are asked for."""
    whole_number("edges", options.edges, least=0)
    if options.probes is not None and options.target is not None:
        raise InputError("expected --target or --probes, got both: leave one out; only a target's flow is exact")
    _places(options.figures, ("measured_flow",))
    prompt = prompt_of(options)
    from oversquash_lens.jacobian.measured_flow import measured_flow

    model = load(options)
    if planned(options, model, prompt, "measured_flow", options.probes):
        return
    how = target_options(options)
    if options.probes is None and how["target"] is None:
        how["target"] = "top"
    if options.probes is not None:
        from oversquash_lens.analyses.plan import plan

        price = plan(model, prompt, "measured_flow", probes=options.probes, chat=options.chat, bos=options.bos)
        print(price.sentence, file=sys.stderr)
    how |= {"edges": options.edges, "seed": options.seed, "progress": True}
    found = measured_flow(model, prompt, options.source, options.probes or 8, **how)
    remark(found.about)
    if options.figures:
        from oversquash_lens.viz import figures

        figures.save(figures.measured_flow(found), options.figures, "measured_flow")
    deliver(options, found.to_dict(), "\n".join(_measured_lines(found, options.top)))


def _measured_lines(found: Any, top: int) -> list[str]:
    """One line per layer, the highest first; then the heads that carry most, signed."""
    lines = [found._title(), "", "layer  width  stays    MLP  most through"]
    for layer in reversed(range(len(found.stays))):
        at = int(found.node[layer].argmax())
        lines.append(
            f"{layer:5d}  {found.width[layer].item():5.1f}  {found.stays[layer].item():5.0%}  "
            f"{found.mlp[layer].item():5.0%}  {found.node[layer, at].item():.0%} at {at} {found.tokens[at]!r}"
        )
    if found.head.numel():
        lines += ["", "heads that carry most; negative ones work against the rest"]
        for i in found.head.abs().flatten().argsort(descending=True)[:top].tolist():
            layer, head = divmod(i, found.head.shape[1])
            lines.append(f"{found.head[layer, head].item():8.1%}  layer {layer}, head {head}")
    if found.edges:
        lines += ["", "heaviest edges between positions, signed", *_edge_lines(found.edges, found.tokens)]
    return lines


def _estimated_flow(options: argparse.Namespace) -> None:
    variant = "mean_field" if options.variant is None else options.variant
    one_of("variant", variant, KINDS)
    if options.target is not None or options.probes is not None or options.edges:
        raise InputError(
            "expected no --target, --probes or --edges with an estimate: leave out --estimate and --variant"
        )
    figures = _places(options.figures, ("flow", "heads", "width", "route"))
    prompt = prompt_of(options)
    from oversquash_lens.capture.recorder import record
    from oversquash_lens.paths.flow import flow
    from oversquash_lens.paths.heaviest import heaviest_edges, heaviest_paths
    from oversquash_lens.paths.squashing import squashing

    model = load(options)
    if planned(options, model, prompt, "flow"):
        return
    trace = record(model, prompt, **recording_options(options))
    remark(trace.about)
    squashed = squashing(trace, variant) if options.source is None else None
    found = squashed.flow if squashed else flow(trace, variant, options.source)
    edges, paths = heaviest_edges(found, options.top), heaviest_paths(found, options.top)
    result = squashed.to_dict() if squashed else found.to_dict()
    result |= {"edges": [edge.to_dict() for edge in edges], "paths": [path.to_dict() for path in paths]}
    if figures:
        _draw(found, squashed, options.figures)
    deliver(
        options, result, "\n".join([*_title(found, squashed), "", *_layers(found), "", *_heaviest(found, edges, paths)])
    )


def run_what_if(options: argparse.Namespace) -> None:
    check_out(options)
    prompt = prompt_of(options)
    edits = [edit_of(text) for text in options.edit]
    from oversquash_lens.analyses.what_if import what_if

    model, probes = load(options), None if options.exact else options.probes
    if planned(options, model, prompt, "what_if", probes, times=len(edits)):
        return
    result = what_if(
        model,
        prompt,
        *edits,
        variant=options.variant,
        probes=probes,
        target=target_options(options)["target"],
        progress=True,
        **recording_options(options),
    )
    remark(result.about)
    deliver(options, result.to_dict(), str(result))


def edit_of(text: str) -> Any:
    """The edit that `--edit` means: a name, and behind colons what it needs."""
    from oversquash_lens.capture import edits

    def window(width: str, keep: str = "") -> Any:
        if keep not in ("", "keep-first"):
            raise ValueError(keep)
        return edits.window(int(width), keep_first=bool(keep))

    def ablate(head: str) -> Any:
        layer, _, number = head.partition(".")
        return edits.ablate_head(int(layer), int(number))

    known: dict[str, Callable] = {
        "window": window,
        "ablate": ablate,
        "mask": lambda position: edits.mask_position(int(position)),
        "sharpen": lambda power: edits.sharpen(float(power)),
        "separators": lambda every, text=",": edits.separators(int(every), text),
        "with-bos": edits.with_bos,
        "without-bos": edits.without_bos,
    }
    name, *arguments = text.split(":", 2)
    try:
        return known[name](*arguments)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError):
        raise InputError(f"expected one of {FORMS}, got --edit {one_line(repr(text), 60)}") from None


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        if text == "measured":
            return text
        raise InputError(f"expected 'measured' or a number, got --beta {text!r}") from None


def _profile_table(profile: Any, top: int) -> str:
    """The tokens with the largest shares, and what the others have together."""
    share = profile.share
    order = share.argsort(descending=True)[:top].tolist()
    sized = not math.isnan(profile.log_constant)
    lines = [f"{profile.about}", f"{profile.kind}: {'; '.join(profile.notes)}", ""]
    lines.append(f"{'position':>8}  {'share':>9}  {'log10 value':>11}  token")
    for i in order:
        value = f"{profile.log_values[i].item() / math.log(10):11.3f}" if sized else " " * 10 + "–"
        lines.append(f"{i:8d}  {share[i].item():9.3g}  {value}  {profile.tokens[i]!r}")
    rest = len(profile.tokens) - len(order)
    if rest:
        lines.append(f"… and {rest} more with {1 - share[order].sum().item():.3g} of the total together")
    return "\n".join(lines)


def _places(folder: str | None, names: Sequence[str]) -> list:
    from oversquash_lens.storage import check_place

    return [check_place(folder, f"{name}.pdf") for name in names] if folder else []


def _draw(flow: Any, squashed: Any, folder: str) -> None:
    from oversquash_lens.viz import figures

    drawings = {"flow": flow, "heads": flow, "width": squashed or flow, "route": flow}
    for name, what in drawings.items():
        figures.save(getattr(figures, name)(what), folder, name)


def _title(flow: Any, squashed: Any) -> list[str]:
    n, kind = len(flow.tokens), flow.kind
    lines = [f"{flow.about}, {n} tokens", f"an estimate ({kind}): paths from {flow.source_text} to the last one"]
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


def _edge_lines(edges: Any, tokens: Any) -> list[str]:
    return [
        f"{e.share:8.2%}  layer {e.layer}, head {e.head}: {e.src} {tokens[e.src]!r} → {e.dest} {tokens[e.dest]!r}"
        for e in edges
    ]


def _heaviest(flow: Any, edges: Any, paths: Any) -> list[str]:
    def at(position: int) -> str:
        return f"{position} {flow.tokens[position]!r}"

    lines = ["heaviest edges between positions", *_edge_lines(edges, flow.tokens)]
    lines += ["", "heaviest whole paths (all heads between two positions together; the one named brings most)"]
    for path in paths:
        moves = [f"layer {layer}, head {head} → {at(dest)}" for layer, head, _, dest in path.moves]
        lines.append(f"{path.share:8.2%}  {at(path.positions[0])}{''.join(f'; {move}' for move in moves) or '; stays'}")
    return lines
