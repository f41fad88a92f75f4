"""Does the route say which head matters? A planted fact, its heaviest head ablated, against random heads.

    python -m benchmarks.planted_facts [--probes K] [--random N] [--kind bridge] [--out FILE.json]

For each prompt: the flow from the fact's word, the heads by the share they move to other positions, and
‖∂y_n/∂v_word‖_F measured with the first of them ablated, and with random other heads ablated, one at a time. Beside
them the head with the largest share of the measured flow, of all outputs and of the likeliest token as target; with the
latter, what is left of that target's sensitivity is measured too.
No threshold: the whole distribution is printed. The same probes measure all runs of a prompt.
"""

import argparse
import json
import random
import statistics
from pathlib import Path

import torch

import oversquash_lens as osl
from benchmarks.facts import fact_prompts
from oversquash_lens.capture.hooks import attached
from oversquash_lens.numerics import spearman
from oversquash_lens.paths.flow import Flow
from oversquash_lens.storage import write_atomically

SEED = 20261122


def moved_by_head(flow: Flow) -> torch.Tensor:
    """Share that each head carries to another position than it comes from: [layer, head]."""
    edges = (flow.edge(layer).heads for layer in range(flow.n_layers))
    return torch.stack([heads.sum((1, 2)) - heads.diagonal(dim1=1, dim2=2).sum(1) for heads in edges])


def measured(
    model: object, prompt: str, position: int, probes: int, head: tuple[int, int] | None, target: int | None = None
) -> float:
    """‖∂y_n/∂v_position‖_F, or of a target's logit, with a head's output cut off."""

    def cut(pattern: torch.Tensor, hook: object = None) -> torch.Tensor:
        return pattern.index_fill(1, torch.tensor([head[1]]), 0.0)

    hooks = [(f"blocks.{head[0]}.attn.hook_pattern", cut)] if head else []
    with attached(model, hooks):
        how = {"probes": probes} if target is None else {"target": target}
        return osl.measured_sensitivity(model, prompt, **how).values[position].item()


def by_measured_routes(model: object, prompt: str, position: int, probes: int) -> dict[str, dict]:
    """The head with the largest measured share, and what is left without it, of all outputs and of the answer."""
    with torch.no_grad():
        answer = int(model(model.to_tokens(prompt))[0, -1].argmax())
    found = {}
    for name, target in (("all outputs", None), ("the answer", answer)):
        flow = osl.measured_flow(model, prompt, position, probes, target=target)
        head = divmod(int(flow.head.argmax()), flow.head.shape[1])
        left = [measured(model, prompt, position, probes, each, target) for each in (head, None)]
        found[name] = {"head": head, "share": flow.head[head].item(), "ratio": left[0] / left[1]}
    return found


def one_prompt(model: object, prompt: str, position: int, probes: int, n_random: int, draw: random.Random) -> dict:
    trace = osl.record(model, prompt)
    flow = osl.flow(trace, source=position)
    moved = moved_by_head(flow)
    order = [divmod(place, moved.shape[1]) for place in moved.flatten().argsort(descending=True).tolist()]
    heads = [order[0], *draw.sample(order[1:], n_random)]
    base = measured(model, prompt, position, probes, None)
    ratios = [measured(model, prompt, position, probes, head) / base for head in heads]
    carried = flow.head  # what is left of the path sum without the head, if nothing else changed
    return {
        "tokens": len(trace.tokens),
        "word": trace.tokens[position],
        "position": position,
        "sensitivity": base,
        "measured_routes": by_measured_routes(model, prompt, position, probes),
        "top_heads": [{"layer": layer, "head": head, "moves": moved[layer, head].item()} for layer, head in order[:8]],
        "paths": [path.to_dict() for path in osl.heaviest_paths(flow, 5)],
        "ablated": [
            {
                "layer": layer,
                "head": head,
                "moves": moved[layer, head].item(),
                "predicted": (1 - carried[layer, head].item()) ** 0.5,
                "measured": ratio,
            }
            for (layer, head), ratio in zip(heads, ratios, strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--random", type=int, default=20, help="random heads for each prompt")
    parser.add_argument("--kind", choices=("bridge", "hooked"), default="bridge")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, draw, rows = osl.load_model(kind=options.kind), random.Random(SEED), []
    print(f"{model.cfg.model_name}, {options.probes} probes; sensitivity with the head ablated over that without")
    print(f"{'word':>10} {'n':>4}  {'top head':>8} {'moves':>6} {'ratio':>6}   random heads: min, quartiles, max")
    for prompt, position in fact_prompts(model):
        row = one_prompt(model, prompt, position, options.probes, options.random, draw)
        rows.append(row)
        if options.out:
            write_atomically(options.out, json.dumps(rows, indent=1).encode())
        top, rest = row["ablated"][0], sorted(each["measured"] for each in row["ablated"][1:])
        five = [rest[0], *statistics.quantiles(rest, n=4), rest[-1]]
        print(
            f"{row['word']:>10} {row['tokens']:4d}  {top['layer']:>5}.{top['head']} {top['moves']:6.3f} "
            f"{top['measured']:6.3f}   " + " ".join(f"{x:6.3f}" for x in five),
            flush=True,
        )
        for name, route in row["measured_routes"].items():
            layer, head = route["head"]
            print(f"{name:>16}  {layer:>5}.{head} {route['share']:6.3f} {route['ratio']:6.3f}", flush=True)
    tops = [row["ablated"][0]["measured"] for row in rows]
    rest = [each["measured"] for row in rows for each in row["ablated"][1:]]
    below = statistics.mean(
        sum(each["measured"] > row["ablated"][0]["measured"] for each in row["ablated"][1:]) / len(row["ablated"][1:])
        for row in rows
    )
    for name in rows[0]["measured_routes"]:
        left = sorted(row["measured_routes"][name]["ratio"] for row in rows)
        print(f"measured route's top head, {name}: {' '.join(f'{x:.3f}' for x in left)}")
    each = [one for row in rows for one in row["ablated"]]
    rho = spearman(*(torch.tensor([one[name] for one in each]) for name in ("predicted", "measured")))
    print(f"top head: median {statistics.median(tops):.3f}; random: median {statistics.median(rest):.3f}")
    print(f"random heads that leave more than the top head does: {below:.0%}; predicted against measured: ρ {rho:.2f}")


if __name__ == "__main__":
    main()
