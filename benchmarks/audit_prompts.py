"""Mean-field estimate and the paper's bound against the truth, on the seven prompts.

    python -m benchmarks.audit_prompts [--probes K] [--prompts NAME ...] [--out FOLDER]

Without --probes the truth is exact: 2·d_model backward products a prompt, half an hour in all on two cores.
"""

import argparse
import json
from pathlib import Path

import oversquash_lens as osl
from benchmarks.prompts import seven_prompts
from oversquash_lens.storage import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probes", type=int, help="estimate the truth instead of measuring it exactly")
    parser.add_argument("--prompts", nargs="+", default=list(seven_prompts()), choices=list(seven_prompts()))
    parser.add_argument("--out", type=Path, help="also write each audit as FOLDER/NAME.json")
    options = parser.parse_args()
    model = osl.load_model()
    print(f"{model.cfg.model_name}, {type(model).__name__}; ratios are log10(estimate/truth)")
    heads = ("prompt", "n", "rho", "median", "min", "max", "paper's rho", "(beta 1)", "violations")
    print(("{:8} {:>4}" + " {:>7}" * 4 + " {:>11} {:>9} {:>10}").format(*heads))
    for name in options.prompts:
        result = osl.audit(model, seven_prompts()[name], probes=options.probes, progress=True)
        if options.out:
            write_atomically(options.out / f"{name}.json", json.dumps(result.to_dict()).encode())
        rows = {row.name: row for row in result.rows}
        field, paper = rows["mean_field"], rows["proof"]
        broken = sum(row.violations for row in result.rows if row.promises_bound)
        ratios = (field.median_log10_ratio, field.min_log10_ratio, field.max_log10_ratio)
        numbers = (field.spearman, *ratios)
        print(
            f"{name:8} {len(result.tokens):4d}"
            + "".join(f" {x:7.2f}" for x in numbers)
            + f" {paper.spearman:11.2f} {rows['proof, β = 1'].spearman:9.2f} {broken:10d}",
            flush=True,
        )
        for each in ("calibrated", "calibrated_full"):
            low, high = rows[each].min_log10_ratio, rows[each].max_log10_ratio
            print(f"    {each}: log10 gap {low:.2f} … {high:.2f}", flush=True)


if __name__ == "__main__":
    main()
