"""A dense collapse curve against one plain forward pass of its longest prompt, and against two passes per length.

    python -m benchmarks.collapse_vs_forward [--kind hooked|bridge] [--longest 1001] [--dtypes float32 bfloat16]

`curve` is every length from 1 to the longest, `forward` the model's own pass over the longest prompt, logits and all.
`naive` runs both prompts of each length by themselves; it is timed once, at a few lengths, and extrapolated to all.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import oversquash_lens as osl
from oversquash_lens.collapse import families
from oversquash_lens.collapse.curve import collapse_curve

FAMILIES = {
    "counting": families.counting,  # one chain of prefixes
    "commas from the right": lambda model: families.separated(model, counted_from="right"),  # three chains
    "sampled digits": families.sampled_digits,  # every length branches off
}
SAMPLE = 4  # lengths at which the naive way is timed, evenly spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default="auto")
    parser.add_argument("--longest", type=int, default=1001)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=["counting"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for dtype in options.dtypes:
        model = osl.load_model(kind=options.kind, dtype=dtype)
        for name in options.family:
            compare(model, name, dtype, options.longest, options.repeats)


def compare(model, name: str, dtype: str, longest: int, repeats: int) -> None:
    family = FAMILIES[name](model)
    every = range(1, longest + 1)
    sample = range(longest // (2 * SAMPLE) + 1, longest + 1, longest // SAMPLE)
    ids = torch.tensor([max(family.pair(longest), key=len)], device=model.W_E.device)
    print(
        f"\n{model.cfg.model_name}, {type(model).__name__}, {dtype}, {torch.get_num_threads()} threads; {name}, "
        f"lengths 1 … {longest}, longest prompt {ids.shape[1]} tokens; medians of {repeats}"
    )
    forward, curve = [], []
    for _ in range(repeats + 1):  # in turn, so that a drifting machine hits both alike; the first warms up
        forward.append(seconds(lambda: plain(model, ids)))
        curve.append(seconds(lambda: collapse_curve(model, family, every, (dtype,))))
    dense, once = statistics.median(curve[1:]), statistics.median(forward[1:])
    ratio = statistics.median(c / f for c, f in zip(curve[1:], forward[1:], strict=True))
    part = seconds(lambda: collapse_curve(model, family, sample, (dtype,), share=False))
    naive = part * longest / len(sample)
    print(f"forward {once:8.2f} s")
    print(f"curve   {dense:8.2f} s {ratio:8.2f} × forward")
    print(
        f"naive   {naive:8.0f} s {naive / once:8.0f} × forward, {naive / dense:.0f} × curve "
        f"(extrapolated from lengths {', '.join(map(str, sample))})",
        flush=True,
    )


def plain(model, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(ids)


def seconds(step: Callable[[], object]) -> float:
    """Until the accelerator, if there is one, is done too."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
