"""What the checks of a recording cost, in per cent of that recording, cheap and full form.

    python -m benchmarks.gate_vs_recording [--kind hooked|bridge] [--lengths 128 512] [--repeats 5]

The time inside the checks is taken during the recording that it is compared with, so a machine that drifts hits both
alike; the passes that the full form makes besides are in its column `full`, as ratio to the plain forward pass, which
is run in turn with the recordings.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

import oversquash_lens as osl
from benchmarks.prompts import MEETING
from benchmarks.timing import plain, seconds
from oversquash_lens.capture import checks, layer, mlp
from oversquash_lens.capture.layer import LayerRecord
from oversquash_lens.capture.recorder import Recorder

CHECKS = [(checks, name) for name in vars(checks) if name.startswith("check_")] + [(mlp, "check_mlp")]
CHECKS += [(LayerRecord, "_check_projections"), (LayerRecord, "_check_norm")]
CHECKS += [(layer, "_check_scores"), (layer, "check_recomputed")]
CHECKS += [(Recorder, "end")]


class Clock:
    """Seconds inside the checks, those that call one another counted once."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def around(self, check: Callable) -> Callable:
        def timed(*arguments: object, **options: object) -> object:
            self.depth += 1
            begun = time.perf_counter()
            try:
                return check(*arguments, **options)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.perf_counter() - begun

        return timed


@contextmanager
def timing_checks(clock: Clock) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name in CHECKS:
            stack.enter_context(patch.object(owner, name, clock.around(getattr(owner, name))))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = osl.load_model(kind=options.kind)
    ids = torch.tensor(model.tokenizer(MEETING)["input_ids"])
    osl.record(model, ids)  # norms of the weights, once per model
    print(
        f"{model.cfg.model_name}, {type(model).__name__}, {torch.get_num_threads()} threads, {options.repeats} repeats"
    )
    print(f"{'n':>5} {'forward':>9} {'record':>8} {'checks':>8} {'full':>8}   (checks: median and worst, % of record)")
    for n in options.lengths:
        print(one_length(model, ids.repeat(n // len(ids) + 1)[:n], options.repeats), flush=True)


def one_length(model, tokens: torch.Tensor, repeats: int) -> str:
    forward, record, full, share = [], [], [], []
    for _ in range(repeats + 1):  # the first warms up
        forward.append(seconds(lambda: plain(model, tokens)))
        clock = Clock()
        with timing_checks(clock):
            record.append(seconds(lambda: osl.record(model, tokens)))
        share.append(100 * clock.seconds / record[-1])
        full.append(seconds(lambda: osl.record(model, tokens, verify=True)))
    plain_time = statistics.median(forward[1:])
    ratios = [statistics.median(a / b for a, b in zip(each[1:], forward[1:], strict=True)) for each in (record, full)]
    checks = f"{statistics.median(share[1:]):.1f} {max(share[1:]):.1f}"
    return f"{len(tokens):5d} {plain_time:7.2f} s {ratios[0]:8.2f} {checks:>8} {ratios[1]:8.2f}"


if __name__ == "__main__":
    main()
