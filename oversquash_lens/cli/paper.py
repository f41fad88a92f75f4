"""The commands of the paper's experiments: `collapse`, `tasks` and `reproduce`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from oversquash_lens.cli.common import (
    FAMILY_NAMES,
    FIGURE_NAMES,
    TASK_NAMES,
    check_figure,
    check_out,
    checked,
    deliver,
    load,
    model_command,
    planned,
    remark,
    show_plan,
)
from oversquash_lens.errors import InputError, one_of, visible

LONGEST = 1_000_000  # of a sequence; no model here reads so much
PER_LENGTH, QUESTION = 2, 64  # tokens of a sequence's element, and of what stands around it, for a plan
DTYPES = "float32,bfloat16"
DTYPES_HELP = (
    f"number formats, such as float32:store=float8_e4m3 or bfloat16:weights=int4, separated by commas ({DTYPES})"
)


def add_commands(commands: Any) -> None:
    _add_collapse(commands)
    _add_tasks(commands)
    _add_reproduce(commands)


def _add_collapse(commands: Any) -> None:
    collapse = model_command(commands, "collapse", run_collapse, "how far apart prompts end that differ by one token")
    collapse.add_argument("--family", default="counting", help=f"{', '.join(FAMILY_NAMES)} (default counting)")
    collapse.add_argument("--question", metavar="TEXT", help="what stands before the sequence (default: the paper's)")
    collapse.add_argument("--separator", default=",", help="between groups of `separated` (default a comma)")
    collapse.add_argument("--every", type=int, default=3, metavar="N", help="size of the groups (default 3)")
    collapse.add_argument("--counted-from", default="left", help="left (default) or right")
    collapse.add_argument("--step", type=int, default=1, metavar="N", help="set k against k + N (default 1)")
    collapse.add_argument("--spaced", action="store_true", help="counting: a space between the ones")
    collapse.add_argument("--words", metavar="LIST", help="the word list of `words`, separated by spaces")
    collapse.add_argument("--then", metavar="TEXT", help="text after the sequence (outside Theorem B.3)")
    collapse.add_argument("--prompts", nargs=2, metavar="TEXT", help="two prompts of your own instead of a family")
    collapse.add_argument("--lengths", default="1-101", help="such as 1-101 or 1,11,101 (default 1-101)")
    collapse.add_argument("--dtypes", default=DTYPES, help=DTYPES_HELP)
    collapse.add_argument("--no-floor", action="store_true", help="do not measure what rounding alone makes")
    collapse.add_argument("--out", metavar="FILE", help="write the result as JSON")
    collapse.add_argument("--figure", metavar="FILE", help="draw it: .png, .pdf or .svg")
    collapse.add_argument(
        "--curves", metavar="FILE", help="keep each format's curve as it is made (.parquet), and go on from there"
    )


def _add_tasks(commands: Any) -> None:
    tasks = model_command(commands, "tasks", run_tasks, "ask the model to count and copy, and score its answers")
    tasks.add_argument("--task", default="ones", help=f"{', '.join(TASK_NAMES)} (default ones)")
    tasks.add_argument("--cot", default="none", help="none (default), zero_shot or few_shot chain of thought")
    tasks.add_argument("--lengths", help="such as 5,15,25 or 5-95:10 (default: those of the paper's figure)")
    tasks.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    tasks.add_argument("--max-new-tokens", type=int, metavar="N", help="of one answer (default 64, with CoT 512)")
    tasks.add_argument("--samples", type=int, default=1, metavar="N", help="answers per length (default 1)")
    tasks.add_argument("--chat", action=argparse.BooleanOptionalAction, help="force the chat template on or off")
    tasks.add_argument("--answers", metavar="FILE", help="keep answers as they come (.parquet), and go on from there")
    tasks.add_argument("--out", metavar="FILE", help="write the scores as JSON")


def _add_reproduce(commands: Any) -> None:
    reproduce = model_command(commands, "reproduce", run_reproduce, "the paper's figures on your model, with verdicts")
    reproduce.add_argument("figures", nargs="+", metavar="FIGURE", help=f"{', '.join(FIGURE_NAMES)}, or all")
    reproduce.add_argument("--out", default="figures", metavar="DIR", help="folder of the results (default figures)")
    reproduce.add_argument("--quick", action="store_true", help="short lengths: minutes instead of an hour")
    reproduce.add_argument("--longest", type=int, metavar="N", help="leave out lengths beyond N")
    reproduce.add_argument("--samples", type=int, default=1, metavar="N", help="answers per length (default 1)")
    reproduce.add_argument("--temperature", type=float, default=0.0, metavar="T", help="of answers (default 0)")
    reproduce.add_argument("--probes", type=int, default=8, metavar="K", help="backward probes (default 8)")
    reproduce.add_argument("--chat", action=argparse.BooleanOptionalAction, help="tasks: force the chat template")
    reproduce.add_argument("--dtypes", default=DTYPES, help=DTYPES_HELP)


def run_collapse(options: argparse.Namespace) -> None:
    lengths = (1,) if options.prompts else lengths_of(options.lengths)
    one_of("family", options.family, FAMILY_NAMES)
    check_out(options)
    check_figure(options.figure)
    _check_kept(options.curves)
    from oversquash_lens.collapse.curve import kept_curve
    from oversquash_lens.collapse.precision import number_format

    dtypes = [number_format(each) for each in _dtypes(options)]
    model = load(options)
    if options.plan:
        from oversquash_lens.analyses.plan import plan_collapse

        return show_plan(options, plan_collapse(model, _family(model, options).pairs(lengths), dtypes))
    keeping = {"noise_floor": not options.no_floor, "out": options.curves, "progress": True}
    curve = kept_curve(model, _family(model, options), lengths, dtypes, **keeping)
    remark(curve.about)
    if options.figure:
        from oversquash_lens.viz.figures import collapse, save

        path = Path(options.figure)
        save(collapse(curve), path.parent, path.stem, (path.suffix[1:],))
        print(f"wrote {visible(options.figure)}", file=sys.stderr)
    deliver(options, curve.to_dict(), _collapse_table(curve))


def run_tasks(options: argparse.Namespace) -> None:
    lengths = lengths_of(options.lengths) if options.lengths is not None else None
    checked("samples", options.samples)
    one_of("task", options.task, TASK_NAMES)
    check_out(options)
    _check_kept(options.answers)
    from oversquash_lens.models.default_model import NAME
    from oversquash_lens.models.loading import load_twin
    from oversquash_lens.paper.generator import Generator, Sampling
    from oversquash_lens.paper.prompts import find_task
    from oversquash_lens.paper.tasks import NEW_TOKENS, run_task

    if options.kind != "auto":
        raise InputError(f"expected none, got --kind {options.kind!r}: answers come from the model without hooks")
    task = find_task(options.task)
    one_of("cot", options.cot, NEW_TOKENS)
    longest = NEW_TOKENS[options.cot] if options.max_new_tokens is None else options.max_new_tokens
    sampling = Sampling(options.temperature, options.seed, longest)
    if options.plan:
        return _plan_tasks(options, task, lengths, longest)
    name = options.model if options.model is not None else NAME
    print(f"loading {visible(name)} without hooks …", file=sys.stderr)
    place = {"device": options.device, "device_map": options.device_map}
    result = run_task(
        Generator(load_twin(name, dtype=options.dtype, **place), chat=options.chat),
        task,
        lengths,
        cot=options.cot,
        samples=options.samples,
        sampling=sampling,
        out=options.answers,
        progress=True,
    )
    deliver(options, result.to_dict(), _task_table(result))


def _plan_tasks(options: argparse.Namespace, task: Any, lengths: tuple[int, ...] | None, new_tokens: int) -> None:
    """A pass over the longest prompt with its reply, as often as there are replies."""
    from oversquash_lens.capture.subject import Subject
    from oversquash_lens.paper.prompts import questions

    asked = questions(task, lengths, options.cot, options.samples)
    model = load(options)
    subject = Subject.of(model)
    n = max(len(subject.tokenize(each.prompt, bos=options.bos).ids) for each in asked)
    most = subject.architecture.n_ctx - new_tokens
    planned(options, model, min(n, most), "generate", times=len(asked), new_tokens=new_tokens)


def run_reproduce(options: argparse.Namespace) -> None:
    if options.plan:
        return _plan_figures(options)
    from oversquash_lens.paper.reproduce import reproduce

    made = reproduce(
        options.figures,
        model=options.model,
        out=options.out,
        done=lambda one: print(one, flush=True) if not options.json else None,
        kind=options.kind,
        dtype=options.dtype,
        device=options.device,
        device_map=options.device_map,
        bos=options.bos,
        chat=options.chat,
        dtypes=_dtypes(options),
        quick=options.quick,
        longest=options.longest,
        samples=options.samples,
        temperature=options.temperature,
        probes=options.probes,
        seed=options.seed,
        progress=True,
    )
    index = Path(options.out).expanduser().absolute() / "index.html"
    if options.json:
        print(json.dumps({one.name: one.chart.to_dict() for one in made}))
    else:
        print(index)


def _plan_figures(options: argparse.Namespace) -> None:
    """A pass over the longest sequence of these figures, as often as they have lengths."""
    from oversquash_lens.capture.subject import Subject
    from oversquash_lens.paper.reproduce import LENGTHS, Options, chosen_figures

    asked = Options(quick=options.quick, longest=options.longest, samples=options.samples, dtypes=_dtypes(options))
    lengths = [length for name in chosen_figures(options.figures) if name in LENGTHS for length in asked.lengths(name)]
    if not lengths:
        print(f"figures {', '.join(options.figures)} run no model")
        return
    model = load(options)
    n = min(PER_LENGTH * max(lengths) + QUESTION, Subject.of(model).architecture.n_ctx)
    planned(options, model, n, "forward", times=len(lengths) * options.samples)


def _check_kept(file: str | None) -> None:
    if file is not None:
        from oversquash_lens.parts import check_results_file

        check_results_file(file)


def _dtypes(options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(each.strip() for each in options.dtypes.split(","))


def lengths_of(text: str) -> tuple[int, ...]:
    """'1,11,101', '1-101' and '5-95:10', or several of these.

    >>> lengths_of("1-3,10-30:10")
    (1, 2, 3, 10, 20, 30)
    """
    try:
        spans = [_span(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"expected numbers and ranges such as 1,11,101 or 5-95:10, got --lengths {text!r}") from None
    if any(span and span[-1] > LONGEST for span in spans):
        raise InputError(f"expected lengths of at most {LONGEST}, got --lengths {text!r}")
    found = [length for span in spans for length in span]
    if not found or found != sorted(set(found)) or found[0] < 1:
        raise InputError(f"expected increasing whole numbers from 1 on, got --lengths {text!r}")
    return tuple(found)


def _span(text: str) -> range:
    """'7', '1-101' or '5-95:10'."""
    ends, colon, step = text.partition(":")
    first, dash, last = ends.partition("-")
    return range(int(first), int(last if dash else first) + 1, int(step) if colon else 1)


def _family(model: Any, options: argparse.Namespace) -> Any:
    from oversquash_lens.collapse import families

    bos = options.bos
    if options.prompts:
        return families.two_prompts(model, *options.prompts, bos=bos)
    asked = {"question": options.question} if options.question else {}
    family = {
        "counting": lambda: families.counting(model, spaced=options.spaced, bos=bos, **asked),
        "copying": lambda: families.copying(model, bos=bos, **asked),
        "separated": lambda: families.separated(
            model,
            separator=options.separator,
            every=options.every,
            counted_from=options.counted_from,
            step=options.step,
            bos=bos,
            **asked,
        ),
        "digits": lambda: families.sampled_digits(model, seed=options.seed, bos=bos, **asked),
        "interleaved": lambda: families.alternating(model, step=options.step, bos=bos, **asked),
        "words": lambda: families.word_list(model, (options.words or "").split(), bos=bos, **asked),
    }[options.family]()
    return families.followed_by(model, family, options.then) if options.then else family


def _collapse_table(curve: Any) -> str:
    """One block per format: distances at a few lengths, and from where on the prompts are the same to it."""
    shown = _spread(len(curve.lengths), 12)
    lines = [f"{curve.about}", f"{curve.family}: {'; '.join(curve.notes)}"]
    for name in curve.l1:
        lines += ["", name]
        lines.append(f"{curve.unit:>8}  {'L1':>9}  {'L2':>9}  {'L∞':>9}  {'relative':>9}  {'heads L∞':>9}  same top-1")
        for i in shown:
            numbers = [row[name][i].item() for row in (curve.l1, curve.l2, curve.linf, curve.relative)]
            numbers.append(curve.per_head[name][i].mean().item())
            same = "yes" if curve.top1_agree[name][i] else "no"
            cells = "  ".join(f"{number:9.3g}" for number in numbers)
            lines.append(f"{curve.lengths[i]:8d}  {cells}  {same}")
        first = {criterion: curve.first_collapsed(name, criterion) for criterion in ("epsilon", "bits", "top1")}
        lines.append(
            "the same from: " + ", ".join(f"{key} {value if value else 'never'}" for key, value in first.items())
        )
    return "\n".join(lines)


def _task_table(result: Any) -> str:
    """One line per length: what was right, how it was read, and what the likelihoods say."""
    shown = ", ".join(f"{key} {value}" for key, value in result.settings.items())
    lines = [f"{result.task}, chain of thought: {result.cot}", shown, ""]
    head = ("length", "truth", "accuracy", "strict", "error", "unparsable", "expected", "p(right)", "rank")
    lines.append("  ".join(f"{each:>10}" for each in head))
    scores = [result.scores.mean(each) for each in ("expected_error", "probability", "rank")] if result.scores else []
    columns = (
        result.lengths,
        result.truths,
        result.accuracy(),
        result.accuracy("strict"),
        result.error(),
        result.unparsable(),
        *scores,
    )
    lines += ["  ".join(f"{each:>10.3g}" for each in row) for row in zip(*columns, strict=True)]
    lines.append("accuracy, error and unparsable: leniently read; expected: mean error under the numbers' likelihoods")
    return "\n".join(lines)


def _spread(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
