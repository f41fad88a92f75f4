"""What may be typed behind `oversquash-lens`: every command with every kind of mistake, run where no model is at hand.

`@` stands for the test's own folder; `FILES` lie in it.
"""

from __future__ import annotations

from dataclasses import dataclass

PROMPT = "w5 w9 w5 w30"
MODELLED = {  # the commands that run a model, with what they need beside
    "report": (),
    "bound": (),
    "audit": (),
    "flow": (),
    "what-if": ("--edit", "window:2"),
    "substitute": ("--draws", "2"),
    "swap": ("--change", "w30=w7"),
    "sweep": ("--prompts-file", "@/good.txt"),
    "collapse": ("--lengths", "1-3", "--no-floor"),
    "tasks": ("--lengths", "3"),
    "reproduce": ("5",),
}
PROMPTED = ("report", "bound", "audit", "flow", "what-if", "substitute", "swap")
FILES = {
    "empty.txt": b"",
    "good.txt": b"w5 w9 w5 w30\nw7 w8",
    "rows.jsonl": b'{"query": "w5 w9"}',
    "rows.csv": b"query,answer\nw5 w9,w7\n",
    "latin.txt": "w5 w9 \xe9".encode("latin-1"),
    "half.json": b'["w5 w9", "w',
    "numbers.json": b"[5, 9]",
    "one.json": b'"w5 w9"',
    "no-model/readme.txt": b"nothing here",
    "config-only/config.json": b"{}",
    "half-config/config.json": b'{"model_type": "lla',
    "pickled/config.json": b'{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}',
    "pickled/pytorch_model.bin": b"\x80\x04.",
    "model.bin": b"\x80\x04.",
    "half.gguf": b"GGUF\x03\x00\x00\x00",
    "foreign.gguf": b"<html>not found</html>",
    "foreign.parquet": b"my notes\nof today\n",
    "old.jsonl": b'{"settings": {"model": "other"}, "key": ["x"], "value": 1}\n',
    "taken": b"a file in a folder's place",
}


@dataclass(frozen=True)
class Command:
    """Arguments that are wrong, and what the one line must show of them."""

    arguments: tuple[str, ...]
    came: str

    def __str__(self) -> str:
        return " ".join(self.arguments)[:90]


def _model_options() -> list[Command]:
    wrong = {
        ("--model", "no/such/model.gguf"): "'no/such/model.gguf'",
        ("--model", ""): "''",
        ("--model", "a name with spaces"): "'a name with spaces'",
        ("--model", "@/no-model"): "no-model",
        ("--model", "@/half-config"): "half-config",
        ("--model", "@/model.bin"): "model.bin",
        ("--model", "@/half.gguf"): "half.gguf",
        ("--model", "@/foreign.gguf"): "foreign.gguf",
        ("--dtype", "float7"): "'float7'",
        ("--kind", "hoked"): "'hoked'",
        ("--device", "toaster"): "'toaster'",
        ("--device", "cuda:99"): "'cuda:99'",
        ("--device", "cpu", "--device-map", "auto"): "device_map='auto'",
        ("--seed", "zero"): "'zero'",
        ("--seed", "1.5"): "'1.5'",
        ("--nonsense",): "--nonsense",
    }
    files = [key for key in wrong if key[1:] and key[1].startswith("@") and not key[1].endswith("no-model")]
    cases = []
    for name, needed in MODELLED.items():
        for options, came in wrong.items():
            if (
                name in ("bound", "reproduce", "tasks") or options not in files
            ):  # one loader: the files thrice are enough
                cases.append(Command((name, *needed, *options), came))
    return cases


def _prompt_options() -> list[Command]:
    wrong = {
        ("--prompt", ""): "empty",
        ("--prompt", "w5 " * 17): "17 tokens",
        ("--prompt", "w5", "--no-bos"): "1 token",
        ("--prompt", "w5 \udcff w9"): "surrogates",
        ("--prompt", PROMPT, "--chat"): "chat=True",
        ("--prompt-file", "no-such-file.txt"): "no-such-file.txt",
        ("--prompt-file", "@"): "--prompt-file",
        ("--prompt-file", "@/empty.txt"): "empty",
        ("--prompt-file", "@/latin.txt"): "latin.txt",
        ("--prompt", PROMPT, "--prompt-file", "@/empty.txt"): "--prompt",
        ("--token-ids", "5 x"): "'5 x'",
        ("--token-ids", "5 9.5"): "'5 9.5'",
        ("--token-ids", "5 99"): "token id 99",
        ("--token-ids", "5 -1"): "token id -1",
        ("--token-ids", "5 9", "--chat"): "chat=",
        ("--token-ids", ""): "(0,)",
    }
    return [Command((name, *MODELLED[name], *options), came) for name in PROMPTED for options, came in wrong.items()]


def _places() -> list[Command]:
    wrong = {"@": "is a folder", "/no/such/folder/x": "/no/such/folder", "@/taken/x": "taken", "x" * 300: "xxx"}
    return [
        Command((name, *MODELLED[name], "--out", out), came)
        for name in MODELLED
        if name != "reproduce"  # its --out is a folder, which it makes
        for out, came in wrong.items()
    ]


SINGLE = [
    Command((), "COMMAND"),
    Command(("nonsense",), "'nonsense'"),
    Command(("models", "all"), "all"),
    # report
    Command(("report", "--prompt", PROMPT, "--probes", "0"), "--probes 0"),
    Command(("report", "--prompt", PROMPT, "--probes", "many"), "'many'"),
    Command(("report", "--prompts-file", "nowhere.txt"), "nowhere.txt"),
    Command(("report", "--prompts-file", "@/empty.txt"), "empty.txt"),
    Command(("report", "--prompts-file", "@/half.json"), "half.json"),
    Command(("report", "--prompts-file", "@/numbers.json"), "numbers.json"),
    Command(("report", "--prompts-file", "@/one.json"), "one.json"),
    Command(("report", "--prompts-file", "@/latin.txt"), "latin.txt"),
    Command(("report", "--prompts-file", "@/taken", "--json"), "--json"),
    Command(("report", "--prompts-file", "@/taken", "--out", "@/taken"), "taken"),
    # bound
    *(
        Command((name, "--prompt", PROMPT, "--attention", "sparse"), "'sparse'")
        for name in ("report", "bound", "audit")
    ),
    Command(("flow", "--prompt", PROMPT, "--estimate", "--attention", "sparse"), "'sparse'"),
    Command(("flow", "--prompt", PROMPT, "--edges", "-1"), "edges=-1"),
    Command(("bound", "--prompt", PROMPT, "--variant", "theorem_9"), "'theorem_9'"),
    Command(("bound", "--prompt", PROMPT, "--beta", "much"), "'much'"),
    Command(("bound", "--prompt", PROMPT, "--beta", "0"), "beta=0"),
    Command(("bound", "--prompt", PROMPT, "--beta=-1"), "beta=-1"),
    Command(("bound", "--prompt", PROMPT, "--beta", "nan"), "beta=nan"),
    Command(("bound", "--prompt", PROMPT, "--beta", "inf"), "beta=inf"),
    Command(("bound", "--prompt", PROMPT, "--beta", "2", "--variant", "rollout"), "'rollout'"),
    Command(("bound", "--prompt", PROMPT, "--beta", "2", "--variant", "mean_field"), "--beta 2"),
    Command(("bound", "--prompt", PROMPT, "--top", "0"), "--top 0"),
    # audit
    Command(("audit", "--prompt", PROMPT, "--probes", "-3"), "--probes -3"),
    Command(("audit", "--prompt", PROMPT, "--probes", "2", "--seed", str(2**80)), str(2**80)),
    # flow
    Command(("flow", "--prompt", PROMPT, "--variant", "median"), "'median'"),
    Command(("flow", "--prompt", PROMPT, "--source", "99"), "99"),
    Command(("flow", "--prompt", PROMPT, "--source", "w44"), "'w44'"),
    Command(("flow", "--prompt", PROMPT, "--source", "w5"), "'w5'"),
    Command(("flow", "--prompt", PROMPT, "--source=-1"), "'-1'"),
    Command(("flow", "--prompt", PROMPT, "--top", "0"), "--top 0"),
    Command(("flow", "--prompt", PROMPT, "--figures", "@/taken"), "taken"),
    Command(("flow", "--prompt", PROMPT, "--estimate", "--source", "99"), "99"),
    Command(("flow", "--prompt", PROMPT, "--estimate", "--probes", "2"), "--probes"),
    Command(("flow", "--prompt", PROMPT, "--target", "top", "--probes", "2"), "--probes"),
    Command(("flow", "--prompt", PROMPT, "--target", "w5 w9"), "2 tokens"),
    Command(("flow", "--prompt", PROMPT, "--target", "w5", "w9", "w7"), "w5 w9 w7"),
    Command(("flow", "--prompt", PROMPT, "--probes", "0"), "--probes 0"),
    Command(("what-if", "--prompt", PROMPT, "--edit", "window:2", "--target", "w5 w9"), "2 tokens"),
    Command(("report", "--prompt", PROMPT, "--target", "w5 w9"), "2 tokens"),
    Command(("report", "--prompt", PROMPT, "--draws", "-1"), "--draws -1"),
    Command(("audit", "--prompt", PROMPT, "--draws", "-1"), "--draws -1"),
    # substitute and swap
    Command(("swap", "--prompt", PROMPT, "--change", "w30=w7", "--target", "w5", "w5"), "the same"),
    Command(("substitute", "--prompt", PROMPT, "--draws", "0"), "--draws 0"),
    Command(("substitute", "--prompt", PROMPT, "--method", "guess"), "'guess'"),
    Command(("substitute", "--prompt", PROMPT, "--top", "0"), "--top 0"),
    Command(("substitute", "--prompt", PROMPT, "--positions", "w5"), "'w5'"),
    Command(("substitute", "--prompt", PROMPT, "--positions", "77"), "77"),
    Command(("substitute", "--prompt", PROMPT, "--target", "w5", "w5"), "the same"),
    Command(("substitute", "--prompt", PROMPT, "--keep", "@/taken/x.parquet"), "taken"),
    Command(("swap", "--prompt", PROMPT), "--change"),
    Command(("swap", "--prompt", PROMPT, "--change", "w30"), "w30"),
    Command(("swap", "--prompt", PROMPT, "--change", "w30=w7 w8"), "which is 2"),
    Command(("swap", "--prompt", PROMPT, "--change", "w5=w7"), "'w5'"),
    Command(("swap", "--prompt", PROMPT, "--with-prompt", "w5 w9"), "another prompt"),
    Command(("swap", "--prompt", PROMPT, "--with-prompt", PROMPT), "same tokens"),
    Command(("swap", "--prompt", PROMPT, "--change", "w30=w7", "--patches=-1"), "--patches -1"),
    # what-if
    Command(("what-if", "--prompt", PROMPT), "--edit"),
    Command(("what-if", "--prompt", PROMPT, "--edit", "nonsense"), "'nonsense'"),
    Command(("what-if", "--prompt", PROMPT, "--edit", "window:wide"), "'window:wide'"),
    Command(("what-if", "--prompt", PROMPT, "--edit", "window:0"), "window of 0"),
    Command(("what-if", "--prompt", PROMPT, "--edit", "ablate:9.0"), "layer 9"),
    Command(("what-if", "--prompt", PROMPT, "--edit", "ablate:0.9"), "head 9"),
    Command(("what-if", "--prompt", PROMPT, "--edit", "mask:30"), "position 30"),
    Command(("what-if", "--prompt", PROMPT, "--edit", "sharpen:nan"), "nan"),
    Command(("what-if", "--prompt", PROMPT, "--edit", "separators:0"), "every 0"),
    Command(("what-if", "--prompt", PROMPT, "--edit", "without-bos"), "BOS"),
    Command(("what-if", "--prompt", PROMPT, "--edit", "window:2", "--variant", "median"), "'median'"),
    Command(("what-if", "--prompt", PROMPT, "--edit", "window:2", "--probes", "0"), "probes"),
    # sweep
    Command(("sweep",), "--prompts-file"),
    Command(("sweep", "--prompts-file", "nowhere.txt"), "nowhere.txt"),
    Command(("sweep", "--prompts-file", "@/empty.txt"), "empty.txt"),
    Command(("sweep", "--prompts-file", "@/half.json"), "half.json"),
    Command(("sweep", "--prompts-file", "@/latin.txt"), "latin.txt"),
    Command(("sweep", "--prompts-file", "@/rows.jsonl"), "rows.jsonl"),
    Command(("sweep", "--prompts-file", "@/rows.jsonl", "--column", "text"), "'text'"),
    Command(("sweep", "--prompts-file", "@/good.txt", "--column", "text"), "column='text'"),
    Command(("report", "--prompts-file", "@/good.txt", "--column", "text"), "column='text'"),
    Command(("report", "--prompt", PROMPT, "--column", "text"), "--column"),
    Command(("sweep", "--prompts-file", "@/rows.csv"), "rows.csv"),
    Command(("report", "--prompts-file", "@/rows.csv"), "rows.csv"),
    Command(("sweep", "--prompts-file", "@/good.txt", "--measures", "median"), "'median'"),
    Command(("sweep", "--prompts-file", "@/good.txt", "--measures", ""), "''"),
    Command(("sweep", "--prompts-file", "@/good.txt", "--probes", "0"), "probes=0"),
    Command(("sweep", "--prompts-file", "@/good.txt", "--figure", "bands.gif"), "bands.gif"),
    Command(("sweep", "--prompts-file", "@/good.txt", "--figure", "no/such/bands.png"), "no/such"),
    Command(("sweep", "--prompts-file", "@/good.txt", "--ray", ""), "ray=''"),
    Command(("sweep", "--prompts-file", "@/good.txt", "--attention", "sparse"), "'sparse'"),
    Command(("sweep", "--prompts-file", "@/good.txt", "--out", "@/taken"), "taken"),
    # collapse
    Command(("collapse", "--family", "sheep"), "'sheep'"),
    Command(("collapse", "--lengths", "3-1"), "'3-1'"),
    Command(("collapse", "--lengths", "0-3"), "'0-3'"),
    Command(("collapse", "--lengths", f"1-{10**15}"), "1000000000000000"),
    Command(("collapse", "--dtypes", "float32,float7"), "'float7'"),
    Command(("collapse", "--dtypes", "float8_e5m2"), "'float8_e5m2'"),
    Command(("collapse", "--dtypes", ""), "''"),
    Command(("collapse", "--figure", "curve.gif"), "curve.gif"),
    Command(("collapse", "--curves", "/no/such/folder/c.parquet"), "/no/such/folder"),
    Command(("collapse", "--prompts", "w5 w9", "w5 w8", "--curves", "@/foreign.parquet"), "foreign.parquet"),
    Command(("collapse", "--prompts", "w5 w9", "w5 w8", "--curves", "@/old.jsonl"), "old.parquet"),
    Command(("collapse", "--figure", "no/such/curve.png"), "no/such"),
    Command(("collapse", "--figure", "a curve.png"), "'a curve.png'"),
    Command(("collapse", "--prompts", "w5 w9"), "--prompts"),
    Command(("collapse", "--prompts", "w5 w9", "w5 w9"), "equal"),
    Command(("collapse", "--prompts", "w5 w9", ""), "empty"),
    Command(("collapse", "--family", "separated", "--counted-from", "top"), "'top'"),
    Command(("collapse", "--family", "separated", "--every", "0"), "every=0"),
    Command(("collapse", "--family", "separated", "--every", "half"), "'half'"),
    Command(("collapse", "--family", "interleaved", "--step", "0"), "step=0"),
    Command(("collapse", "--family", "words"), "[]"),
    Command(("collapse", "--prompts", "w5 " * 17, "w5 w9"), "n_ctx = 16"),
    # tasks
    Command(("tasks", "--task", "sing"), "'sing'"),
    Command(("tasks", "--cot", "much"), "much"),
    Command(("tasks", "--lengths", ""), "''"),
    Command(("tasks", "--temperature", "-1"), "temperature=-1.0"),
    Command(("tasks", "--temperature", "nan"), "temperature=nan"),
    Command(("tasks", "--temperature", "warm"), "'warm'"),
    Command(("tasks", "--samples", "0"), "--samples 0"),
    Command(("tasks", "--max-new-tokens", "0"), "max_new_tokens=0"),
    Command(("tasks", "--answers", "/no/such/folder/x.parquet"), "/no/such/folder"),
    Command(("tasks", "--answers", "@"), "is a folder"),
    Command(("tasks", "--lengths", "3", "--answers", "@/foreign.parquet"), "foreign.parquet"),
    Command(("tasks", "--lengths", "3", "--answers", "@/old.jsonl"), "old.parquet"),
    Command(("tasks", "--lengths", "3", "--answers", "/dev/full"), "/dev/full"),
    # reproduce
    Command(("reproduce",), "FIGURE"),
    Command(("reproduce", "13"), "13"),
    Command(("reproduce", "5", "--longest", "0"), "0"),
    Command(("reproduce", "5", "--dtypes", "float7"), "'float7'"),
    Command(("reproduce", "3", "--samples", "-1"), "samples=-1"),
    Command(("reproduce", "window", "--probes", "0"), "probes=0"),
    Command(("reproduce", "3", "--temperature", "inf"), "temperature=inf"),
    Command(("reproduce", "5", "--out", "@/taken"), "taken"),
    Command(("reproduce", "5", "--out", "@/taken/below"), "taken"),
]

COMMANDS = [*_model_options(), *_prompt_options(), *_places(), *SINGLE]
