"""Rows of attention made anew against kept patterns: the largest relative difference of every measure, all families.

    python -m benchmarks.recomputed_vs_kept [--dtype float32 float64]

Every family of the compatibility table on every class that the installed TransformerLens has, tiny random models. A
dash says that the route is not for this architecture, and why.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "float64"), default=["float32", "float64"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from routes import compare, table, tolerance

    for name in options.dtype:
        dtype = getattr(torch, name)
        found = list(compare(dtype))
        print(f"{name}\n{table(found)}")
        measured = [each for each in found if not each.why]
        worst = max(measured, key=lambda each: each.worst)
        over = [each for each in measured if each.worst > tolerance(each.family, each.kind, dtype)]
        print(
            f"largest: {worst.worst:.1e} ({worst.family}, {worst.kind}, {worst.route}); beyond tolerance: {len(over)}\n"
        )


if __name__ == "__main__":
    main()
