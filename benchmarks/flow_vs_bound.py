"""What flow costs: against the path products of the same kind, in one run.

    python -m benchmarks.flow_vs_bound [--kinds mean_field proof ...] [--lengths 128 512] [--repeats 5]

Ratios to `path_bound` (or `mean_field_sensitivity`) of that kind. `9 sources`: flow of the whole prompt and of eight
single positions at once. `squashing`: flow and its null model. `paths`: the ten heaviest. Then the deviation from
conservation.
"""

import argparse
import statistics
from functools import partial

import torch

import oversquash_lens as osl
from benchmarks.prompts import MEETING
from benchmarks.timing import seconds
from oversquash_lens.paths.flow import flows
from oversquash_lens.paths.kinds import KINDS
from oversquash_lens.paths.profiles import paths_of_trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = osl.load_model()
    ids = torch.tensor(model.tokenizer(MEETING)["input_ids"])
    print(f"{model.cfg.model_name}, {torch.get_num_threads()} threads, medians of {options.repeats}")
    columns = ("flow", "9 sources", "squashing", "paths")
    print(f"{'n':>5} {'kind':>16} {'bound':>9}" + "".join(f" {name:>9}" for name in columns) + f" {'imbalance':>9}")
    for n in options.lengths:
        trace = osl.record(model, ids.repeat(n // len(ids) + 1)[:n])
        sources = (None, *range(0, n, n // 8 + 1))
        for kind in options.kinds:
            flow = osl.flow(trace, kind)
            steps = {
                "bound": lambda kind=kind, trace=trace: paths_of_trace(trace, kind).profile(),
                "flow": partial(osl.flow, trace, kind),
                "9 sources": partial(flows, trace, sources, kind),
                "squashing": partial(osl.squashing, trace, kind),
                "paths": partial(osl.heaviest_paths, flow),
            }
            times = {name: [] for name in steps}
            for _ in range(options.repeats + 1):  # in turn; the first warms up
                for name, step in steps.items():
                    times[name].append(seconds(step))
            bound = times["bound"][1:]
            ratios = [statistics.median(t / b for t, b in zip(times[name][1:], bound, strict=True)) for name in columns]
            worst = max(each.imbalance for each in flows(trace, sources, kind))
            print(
                f"{n:5d} {kind:>16} {1e3 * statistics.median(bound):6.1f} ms"
                + "".join(f" {ratio:9.2f}" for ratio in ratios)
                + f" {worst:9.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
