"""The lens against the model's own plain forward pass, in one run.

    python -m benchmarks.lens_vs_forward [--kind hooked|bridge] [--lengths 128 512] [--repeats 5]

`lens` is record + every bound + the mean-field estimate. `rollout` is the peer: attention rollout by full matrix
products over `run_with_cache`. What depends on the weights alone is computed once per model and shown apart.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import oversquash_lens as osl
from benchmarks.prompts import MEETING
from oversquash_lens.measure.bounds import VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = osl.load_model(kind=options.kind)
    ids = torch.tensor(model.tokenizer(MEETING)["input_ids"])
    first = seconds(lambda: osl.record(model, ids))
    again = seconds(lambda: osl.record(model, ids))
    print(f"{model.cfg.model_name}, {type(model).__name__}, {torch.get_num_threads()} threads")
    print(f"once per model (norms and Grams of the weights): {first - again:.1f} s")
    print(f"medians of {options.repeats}; the last three columns are ratios to the forward pass")
    print(f"{'n':>5} {'forward':>9} {'record':>8} {'lens':>8} {'rollout':>8}")
    for n in options.lengths:
        tokens = ids.repeat(n // len(ids) + 1)[:n]
        steps = {
            "forward": lambda tokens=tokens: plain(model, tokens),
            "record": lambda tokens=tokens: osl.record(model, tokens),
            "lens": lambda tokens=tokens: lens(model, tokens),
            "rollout": lambda tokens=tokens: rollout(model, tokens),
        }
        times = {name: [] for name in steps}
        for _ in range(options.repeats + 1):  # in turn, so that a drifting machine hits all alike; the first warms up
            for name, step in steps.items():
                times[name].append(seconds(step))
        forward = times["forward"][1:]
        ratios = [
            statistics.median(t / f for t, f in zip(times[name][1:], forward, strict=True))
            for name in ("record", "lens", "rollout")
        ]
        print(f"{n:5d} {statistics.median(forward):7.2f} s" + "".join(f" {r:8.2f}" for r in ratios), flush=True)


def plain(model, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        model(tokens[None])


def lens(model, tokens: torch.Tensor) -> None:
    trace = osl.record(model, tokens)
    for variant in VARIANTS:
        osl.path_bound(trace, variant)
    osl.mean_field_sensitivity(trace)


def rollout(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[None], names_filter=lambda name: name.endswith("hook_pattern"))
    product = torch.eye(len(tokens))
    for pattern in cache.values():
        product = (pattern[0].mean(0) + torch.eye(len(tokens))) / 2 @ product
    return product[-1]


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
