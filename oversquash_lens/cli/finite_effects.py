"""The commands that really replace something: `substitute` and `swap`."""

from __future__ import annotations

import argparse
import math
from typing import Any

from oversquash_lens.cli.common import (
    check_out,
    checked,
    deliver,
    load,
    planned,
    prompt_command,
    prompt_of,
    remark,
    target_option,
    target_options,
)
from oversquash_lens.errors import InputError, one_line

LEADING = 8  # nodes and heads that a swap's table names


def add_commands(commands: Any) -> None:
    replaced = prompt_command(
        commands, "substitute", run_substitute, "replace tokens by others, and see how far the prediction moves"
    )
    replaced.add_argument(
        "--positions",
        nargs="+",
        metavar="TOKEN",
        help="what to replace: positions, texts, or START:END for a span (default: every token)",
    )
    replaced.add_argument("--draws", type=int, default=8, metavar="K", help="replacements of each (default 8)")
    replaced.add_argument("--method", default="auto", help="exact, nodes or auto (default)")
    replaced.add_argument("--top", type=int, default=20, metavar="K", help="rows of the table (default 20)")
    replaced.add_argument(
        "--keep", metavar="FILE", help="a parquet file that keeps what is done; the same call goes on"
    )
    swapped = prompt_command(
        commands, "swap", run_swap, "replace one thing by another: where the difference runs, and what carries it"
    )
    change = swapped.add_mutually_exclusive_group(required=True)
    change.add_argument("--change", action="append", metavar="OLD=NEW", help="repeatable; such as Alice=Carol")
    change.add_argument("--with-prompt", metavar="TEXT", help="another prompt of as many tokens")
    swapped.add_argument(
        "--patches", type=int, metavar="K", help="most patched passes (default: by the prompt's length)"
    )
    for command in (replaced, swapped):
        target_option(command)
        command.add_argument("--out", metavar="FILE", help="write the result as JSON")


def run_substitute(options: argparse.Namespace) -> None:
    checked("draws", options.draws)
    checked("top", options.top)
    check_out(options)
    prompt = prompt_of(options)
    from oversquash_lens.swaps.substitution import METHODS, substitution

    if options.method not in METHODS:
        raise InputError(f"expected one of {', '.join(METHODS)}, got --method {options.method!r}")
    model = load(options)
    if planned(options, model, prompt, "substitution", times=options.draws):
        return
    found = substitution(
        model,
        prompt,
        options.positions,
        options.draws,
        options.method,
        out=options.keep,
        progress=True,
        **target_options(options),
    )
    remark(found.about)
    deliver(options, found.to_dict(), _substituted(found, options.top))


def run_swap(options: argparse.Namespace) -> None:
    checked("patches", options.patches, least=0)
    check_out(options)
    prompt = prompt_of(options)
    change: Any = options.with_prompt
    if change is None:
        pairs = [each.partition("=") for each in options.change]
        if any(not old or not sign or not new for old, sign, new in pairs):
            raise InputError(f"expected OLD=NEW, got --change {one_line(repr(options.change), 60)}")
        change = {old: new for old, _, new in pairs}
    from oversquash_lens.swaps.swap import swap

    model = load(options)
    if planned(options, model, prompt, "forward", times=2):
        return
    found = swap(model, prompt, change, patches=options.patches, progress=True, **target_options(options))
    remark(found.about)
    deliver(options, found.to_dict(), _swapped(found))


def _substituted(found: Any, top: int) -> str:
    head, rows, total = found._shown(top)
    lines = [found._title(), "", "  ".join(f"{name:>10}" for name in head)]
    lines += ["  ".join(f"{cell:>10}" for cell in row) for row in rows]
    if total > len(rows):
        lines.append(f"… and {total - len(rows)} more")
    if len(set(found.plausible)) > 1:
        means = [f"{name} {found.of(kind).distance.mean().item():.3g}" for name, kind in DRAWN.items()]
        lines.append(f"mean distance by kind of draw: {', '.join(means)}")
    return "\n".join(lines)


DRAWN = {"uniform over the vocabulary": False, "from the model's own prediction": True}


def _swapped(found: Any) -> str:
    lines = [found._title(), ""]
    for name, top in (("before", found.top_before), ("after", found.top_after)):
        lines.append(f"likeliest {name}: " + ", ".join(f"{text!r} {chance:.1%}" for text, chance in top))
    lines += ["", "residuals that carry it (activation patching; gradient × difference beside)"]
    table = found._table()
    for layer, at, token, patched, said in list(
        zip(*(table[name] for name in ("layer", "position", "token", "patched", "attributed")), strict=True)
    )[:LEADING]:
        lines.append(f"{patched:8.0%}  ({said:.0%})  entering layer {layer}, position {at} {token!r}")
    heads = found.patched_heads.nan_to_num(0)
    if heads.numel():
        lines += ["", "heads that carry it"]
        for i in heads.abs().flatten().argsort(descending=True)[:LEADING].tolist():
            layer, head = divmod(i, heads.shape[1])
            lines.append(f"{heads[layer, head].item():8.0%}  layer {layer}, head {head}")
    sums = [each for each in found.additivity.tolist() if not math.isnan(each)]
    if sums:
        lines += [
            "",
            f"patched one by one, the positions of a layer sum to {min(sums):.2f} … {max(sums):.2f} of the whole",
        ]
    return "\n".join(lines)
