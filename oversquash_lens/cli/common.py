"""What the commands share: options of the model and the prompt, what a run would take, and where results go."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from oversquash_lens.errors import InputError, visible
from oversquash_lens.storage import check_place, check_writable, write_atomically
from oversquash_lens.sweeps.prompt_files import SweepPrompt, messages_in, read_prompt

# Names of registries whose modules need torch, which a command's help must not wait for; a test holds them equal.
FAMILY_NAMES = ("counting", "copying", "separated", "digits", "interleaved", "words")
TASK_NAMES = (
    *("sum", "ones", "bernoulli", "word", "copy_last", "copy_first", "copy_last_hint"),
    *("interleaved_01", "interleaved_10", "type_1", "type_2", "copy_last_control"),
)
FIGURE_NAMES = (*map(str, range(1, 13)), "ushape", "window", "remedies")
FIGURE_FILES = (".png", ".pdf", ".svg")

# A fact at the beginning, a long middle, and a question that asks for the fact.
DEFAULT_PROMPT = (
    "The captain of the Merry Agnes is called Rosalind. The ship left the harbour at dawn with a crew of nine and a "
    "hold full of salt, wool and copper wire. For three days the wind was fair and the sea was calm. The cook baked "
    "bread every morning, the sailors mended the nets and told each other stories, and in the evening somebody always "
    "played the fiddle. On the fourth day a storm came up from the west and broke the smaller of the two masts, but "
    "nobody was hurt. The captain of the Merry Agnes is called"
)


def prompt_command(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    """A command that runs a model on one prompt."""
    command = model_command(commands, name, run, about)
    source = command.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="a text, or messages as JSON; '-' reads standard input")
    source.add_argument("--prompt-file", metavar="FILE", help="'-' reads standard input")
    source.add_argument("--token-ids", metavar="IDS", help="the prompt as numbers: '504 4922 2271'")
    command.add_argument("--chat", action="store_true", help="apply the model's chat template")
    return command


def model_command(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    """A command that runs a model, with the options that all of these share."""
    command = commands.add_parser(name, help=about, description=about)
    command.set_defaults(run=run)
    command.add_argument("--model", help="hub name, Hugging Face folder or .gguf file")
    command.add_argument("--kind", default="auto", help="model class: hooked, bridge or auto (default)")
    command.add_argument("--bos", action=argparse.BooleanOptionalAction, help="force BOS on or off")
    command.add_argument("--device", help="cpu, cuda, mps … (default: cuda where there is one)")
    command.add_argument("--device-map", help="transformers' device_map, such as auto (bridge only)")
    command.add_argument("--dtype", default="float32", help="float64, float32 (default), bfloat16, float16")
    command.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument("--plan", action="store_true", help="say what memory and time it would take, and stop")
    return command


def verify_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--verify",
        action="store_true",
        help="check at every position that the hooks describe the model (two passes more)",
    )


def target_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--target",
        nargs="+",
        metavar="TOKEN",
        help='a number of the prediction: a token, "top", two tokens (their logits\' contrast), or "log p(token)"',
    )


def target_options(options: argparse.Namespace) -> dict[str, Any]:
    """The target, and how the prompt is read, as every function that takes a target takes them."""
    given = options.target
    if given is not None and len(given) > 2:
        raise InputError(f"expected one token or two, got --target {' '.join(given)}")
    target = given if given is None or len(given) == 2 else given[0]
    return {"target": target, "chat": options.chat, "bos": options.bos}


def attention_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--attention",
        default="auto",
        help="kept (every pattern), recomputed (rows made anew, for long prompts) or auto (default)",
    )


def recording_options(options: argparse.Namespace) -> dict[str, Any]:
    """How to record, as every door that records takes it; `attention` of the commands that have it."""
    how = {"chat": options.chat, "bos": options.bos, "seed": options.seed, "verify": options.verify}
    return how | ({"attention": options.attention} if hasattr(options, "attention") else {})


def planned(
    options: argparse.Namespace,
    model: Any,
    prompt: Any,
    measure: str,
    probes: int | None = None,
    times: int = 1,
    new_tokens: int = 0,
) -> bool:
    """With --plan print what the measure would take, `times` over, in place of the result; says whether it did.

    `prompt`: a prompt, or a number of tokens; `new_tokens`: of each completion.
    """
    if not options.plan:
        return False
    from oversquash_lens.analyses.plan import plan

    how = {} if isinstance(prompt, int) else SweepPrompt(0, None, prompt).options(options.chat, options.bos)
    show_plan(options, plan(model, prompt, measure, probes=probes, times=times, new_tokens=new_tokens, **how))
    return True


def show_plan(options: argparse.Namespace, plan: Any) -> None:
    print(json.dumps(plan.to_dict()) if options.json else plan)


def load(options: argparse.Namespace) -> Any:
    from oversquash_lens.models.default_model import NAME
    from oversquash_lens.models.loading import load_model

    name = options.model if options.model is not None else NAME
    print(f"loading {visible(name)} …", file=sys.stderr)
    place = {"device": options.device, "device_map": options.device_map}
    return load_model(name, kind=options.kind, dtype=options.dtype, **place)


def prompt_of(options: argparse.Namespace) -> Any:
    """The prompt; read before any model is loaded, so that a wrong path costs no waiting."""
    if options.token_ids is not None:
        try:
            return [int(each) for each in options.token_ids.replace(",", " ").split()]
        except ValueError:
            raise InputError(f"expected whole numbers, '504 4922', got --token-ids {options.token_ids!r}") from None
    if options.prompt_file is not None:
        return _written(read_prompt(options.prompt_file, "--prompt-file"))
    if options.prompt == "-":
        return _written(read_prompt("-"))
    if options.prompt is None:
        return DEFAULT_PROMPT
    if not options.prompt:
        raise InputError("expected a text of at least two tokens, got an empty --prompt")
    return _written(options.prompt)


def _written(prompt: Any) -> Any:
    """The prompt; messages where that is what the text is, which is said."""
    found = messages_in(prompt) if isinstance(prompt, str) else None
    if found is not None:
        print("the prompt is a list of messages: the model's chat template makes its text", file=sys.stderr)
    return prompt if found is None else found


def checked(name: str, came: int | None, least: int = 1) -> None:
    """Refuse a number that is too small, by its option's name."""
    if came is not None and came < least:
        raise InputError(f"expected at least {least}, got --{name} {came}")


def check_figure(path: str | None) -> None:
    """Known before the work: a picture's file that can be written."""
    if path is None:
        return
    target = Path(path)
    if target.suffix not in FIGURE_FILES:
        raise InputError(f"expected a file that ends in one of {', '.join(FIGURE_FILES)}, got --figure {path}")
    check_writable(path)
    check_place(target.parent, target.name)


def check_out(options: argparse.Namespace) -> None:
    if options.out:
        check_writable(options.out)


def remark(about: Any) -> None:
    """Say what of the prompt may not be meant as it came; `about` is the label of a result."""
    if about.remark:
        print(f"oversquash-lens: {about.remark}", file=sys.stderr)


def deliver(options: argparse.Namespace, result: dict, table: str) -> None:
    if options.out:
        write_atomically(options.out, json.dumps(result, indent=1).encode())
        print(f"wrote {visible(options.out)}", file=sys.stderr)
    print(json.dumps(result) if options.json else table)
