"""Files that are half there, of another kind or another's, and what reads or answers from files: models, run logs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad_days import Case, World
from small_generators import Parrot, characters
from small_generators import model as speaking_model

import oversquash_lens as osl
from oversquash_lens.capture.trace import packed
from oversquash_lens.errors import ModelError, TraceFileError
from oversquash_lens.models.sources import Weights
from oversquash_lens.paper.generator import Generator, Sampling

Call = Callable[[World], Any]

# ---------------------------------------------------------------- traces


def _loaded(damage: Callable[[bytes], bytes]) -> Call:
    def load(w: World) -> Any:
        path = w.trace.save(w.folder / "t.safetensors")
        path.write_bytes(damage(path.read_bytes()))
        return osl.Trace.load(path)

    return load


def _repacked(change: Callable[[dict, dict], None]) -> Call:
    """A whole safetensors file whose header or tensors are not a trace's."""

    def load(w: World) -> Any:
        from safetensors import safe_open

        path = w.trace.save(w.folder / "t.safetensors")
        with safe_open(str(path), framework="pt") as file:
            header = json.loads(file.metadata()["oversquash-lens-trace"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(header, tensors)
        path.write_bytes(packed(header, tensors))
        return osl.Trace.load(path)

    return load


def _number(name: str, value: float) -> Callable[[dict, dict], None]:
    """One number of a tensor that is another one."""

    def change(header: dict, tensors: dict) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] = value

    return change


def _header(change: Callable[[dict], Any]) -> Call:
    return _repacked(lambda header, tensors: change(header))


def _deep(w: World) -> Any:
    """JSON that nests deeper than Python reads it."""
    from safetensors.torch import save_file

    path = w.folder / "t.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"oversquash-lens-trace": "[" * 100_000})
    return osl.Trace.load(path)


def _other_dtype(header: dict, tensors: dict) -> None:
    tensors["token_ids"] = tensors["token_ids"].to(torch.float32)


def _other_shape(header: dict, tensors: dict) -> None:
    tensors["gains.node_gain"] = tensors["gains.node_gain"][:, 1:].contiguous()


TRACES: dict[str, tuple[Call, str]] = {
    "an empty file": (_loaded(lambda data: b""), "t.safetensors"),
    "a text": (_loaded(lambda data: b"not a trace"), "t.safetensors"),
    "cut in the header": (_loaded(lambda data: data[:40]), "t.safetensors"),
    "cut in the middle": (_loaded(lambda data: data[: len(data) // 2]), "t.safetensors"),
    "one byte short": (_loaded(lambda data: data[:-1]), "t.safetensors"),
    "one byte long": (_loaded(lambda data: data + b"\0"), "t.safetensors"),
    "zeros": (_loaded(lambda data: bytes(len(data))), "t.safetensors"),
    "a pickle": (_loaded(lambda data: b"\x80\x04K\x07."), "t.safetensors"),
    "somebody's weights": (_loaded(lambda data: data.replace(b"oversquash", b"undersquas")), "KeyError"),
    "another version": (_repacked(lambda header, tensors: header.update(version=99)), "version 99"),
    "no version": (_repacked(lambda header, tensors: header.pop("version")), "version None"),
    "a tensor less": (_repacked(lambda header, tensors: tensors.pop("gains.value")), "gains.value"),
    "a header without tokens": (_repacked(lambda header, tensors: header.pop("tokens")), "tokens"),
    "an origin of other fields": (_repacked(lambda header, tensors: header["about"].update(surprise=1)), "surprise"),
    "more layers than it has": (_repacked(lambda header, tensors: header["about"].update(n_layers=9)), "sizes"),
    "token ids of another dtype": (_repacked(_other_dtype), "float32"),
    "gains of another shape": (_repacked(_other_shape), "node_gain"),
    "a header that is deep": (_deep, "RecursionError"),
    "a byte that flipped": (
        _loaded(lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
        "its checksum is not that of its content",
    ),
    "a layer's scale that is 0": (_repacked(_number("gains.mlp_scale", 0.0)), "numbers of gains.mlp_scale"),
    "a scale that is not a number": (_repacked(_number("gains.attention_scale", math.nan)), "gains.attention_scale"),
    "a gain below 0": (_repacked(_number("gains.node_gain", -1.0)), "numbers of gains.node_gain"),
    "a weight's norm that is infinite": (_repacked(_number("weights.ov_norm", math.inf)), "weights.ov_norm"),
    "a residual that is not a number": (_repacked(_number("last_residuals", math.nan)), "last_residuals"),
    "a tensor more": (_repacked(lambda header, tensors: tensors.update(x=torch.zeros(1))), "no tensor 'x'"),
    "a token below 0": (_repacked(_number("token_ids", -5)), "token_ids"),
    "tokens that are none": (_header(lambda h: h.update(tokens=[[], {}, None, 5])), "tokens"),
    "a text in the tokens' place": (_header(lambda h: h.update(tokens="four")), "tokens"),
    "an origin that is a list": (_header(lambda h: h.update(about=[1])), "AttributeError"),
    "a model that is no text": (_header(lambda h: h["about"].update(model={})), "about.model"),
    "heads that are a text": (_header(lambda h: h["about"].update(n_heads="4")), "about.n_heads"),
    "layers beyond all measure": (_header(lambda h: h["about"].update(n_layers=10**18)), "sizes"),
    "no layer": (_header(lambda h: h["about"].update(n_layers=0)), "sizes"),
    "a final scale of null": (_header(lambda h: h["gains"].update(final_scale=None)), "gains.final_scale"),
    "a final scale of 0": (_header(lambda h: h["gains"].update(final_scale=0.0)), "gains.final_scale"),
    "a final scale of NaN": (_header(lambda h: h["gains"].update(final_scale=math.nan)), "gains.final_scale"),
    "half a probe": (_header(lambda h: h["gains"].update(node_probes=0.5)), "gains.node_probes"),
    "support of nothing": (_header(lambda h: h.update(support={})), "support"),
    "support in other words": (_header(lambda h: h["support"].update(truth=["fine", ""])), "support"),
    "attention without its scale": (_header(lambda h: h["attention"][0].update(scale=math.inf)), "attention.0"),
}

# ---------------------------------------------------------------- models


def _model(name: Any, **options: Any) -> Call:
    return lambda w: osl.load_model(name, device="cpu", **options)


def _file(name: str, content: bytes) -> Call:
    return lambda w: osl.load_model(w.file(name, content), device="cpu")


def _folder(**files: bytes) -> Call:
    def load(w: World) -> Any:
        for name, content in files.items():
            w.file(name.replace("_json", ".json").replace("_safetensors", ".safetensors"), content)
        return osl.load_model(w.folder, device="cpu")

    return load


GPT2 = b'{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_embd": 8, "n_head": 2}'
MODELS = [
    Case("load_model", "no name", "NoneType", _model(None)),
    Case("load_model", "a number", "int", _model(7)),
    Case("load_model", "a list", "list", _model(["gpt2"])),
    Case("load_model", "an empty name", "''", _model(""), ModelError),
    Case("load_model", "a path out of the hub", "'../../secret'", _model("../../secret"), ModelError),
    Case("load_model", "two lines", "'gpt2 other'", _model("gpt2\nother"), ModelError),
    Case("load_model", "a surrogate", "U+D800", _model("gpt2\ud800"), ModelError),
    Case("load_model", "a name beyond all measure", "xxx", _model("x" * 5000), ModelError),
    Case("load_model", "a GGUF file that is not there", "'missing.gguf'", _model("missing.gguf"), ModelError),
    Case("load_model", "a path that is not there", "'nowhere'", _model(Path("nowhere")), ModelError),
    Case("load_model", "unknown kind", "'hooky'", _model("gpt2", kind="hooky")),
    Case("load_model", "a kind that is true", "True", _model("gpt2", kind=True)),
    Case("load_model", "unknown dtype", "'int8'", _model("gpt2", dtype="int8")),
    Case("load_model", "no dtype", "None", _model("gpt2", dtype=None)),
    Case("load_model", "unknown device", "'gpu'", lambda w: osl.load_model("gpt2", device="gpu")),
    Case("load_model", "a device of words", "[1]", lambda w: osl.load_model("gpt2", device=[1])),
    Case("load_model", "the device without numbers", "'meta'", lambda w: osl.load_model("gpt2", device="meta")),
    Case("load_model", "a device that is not there", "cuda:99", lambda w: osl.load_model("gpt2", device="cuda:99")),
    Case("load_model", "device and device_map", "'auto'", _model("gpt2", device_map="auto")),
    Case("load_model", "fold_ln for a bridge", "fold_ln=True", _model("gpt2", kind="bridge", fold_ln=True)),
    Case("load_model", "an empty GGUF file", "m.gguf", _file("m.gguf", b""), ModelError),
    Case("load_model", "half a GGUF header", "m.gguf", _file("m.gguf", b"GGUF\x03\0\0\0\xff"), ModelError),
    Case("load_model", "a page named GGUF", "m.gguf", _file("m.gguf", b"<html>404</html>"), ModelError),
    Case(
        "load_model",
        "a GGUF of endless counts",
        "m.gguf",
        _file("m.gguf", b"GGUF\x03\0\0\0" + b"\xff" * 64),
        ModelError,
    ),
    Case("load_model", "a file of another kind", "model.bin", _file("model.bin", b"\x80\x04."), ModelError),
    Case("load_model", "weights for the folder", "m.safetensors", _file("m.safetensors", b""), ModelError),
    Case("load_model", "an empty folder", "config.json", _folder(), ModelError),
    Case("load_model", "half a config", "could not be loaded", _folder(config_json=b'{"model_'), ModelError),
    Case("load_model", "a config of no model", "could not be loaded", _folder(config_json=b"{}"), ModelError),
    Case("load_model", "a config that is a list", "could not be loaded", _folder(config_json=b"[1]"), ModelError),
    Case("load_model", "no weights", "could not be loaded", _folder(config_json=GPT2), ModelError),
    Case(
        "load_model",
        "half of its weights",
        "could not be loaded",
        _folder(config_json=GPT2, model_safetensors=b"\xff" * 40),
        ModelError,
    ),
]

# ---------------------------------------------------------------- who answers, and the log of answers


def _generator(**options: Any) -> Call:
    return lambda w: Generator(Weights(speaking_model(), characters(), "small"), **options)


def _task(task: Any = "ones", lengths: Any = (3,), generator: Any = None, **options: Any) -> Call:
    return lambda w: osl.run_task(generator or Parrot(lambda prompt: "1"), task, lengths, **options)


def _log(content: bytes) -> Call:
    def run(w: World) -> Any:
        return osl.run_task(Parrot(lambda prompt: "1"), "ones", (3,), out=w.file("log.parquet", content))

    return run


def _of_another(w: World) -> Any:
    parrot = Parrot(lambda prompt: "1")
    osl.run_task(parrot, "ones", (3,), out=w.folder / "log.parquet")
    return osl.run_task(parrot, "ones", (3,), sampling=Sampling(0.5), out=w.folder / "log.parquet")


def _part(content: bytes) -> Call:
    def run(w: World) -> Any:
        folder = w.folder / "log.parquet.parts"
        folder.mkdir()
        (folder / "run.json").write_bytes(content)
        return osl.run_task(Parrot(lambda prompt: "1"), "ones", (3,), out=w.folder / "log.parquet")

    return run


ANSWERS = [
    Case("Generator", "no model", "NoneType", lambda w: Generator(None)),
    Case("Generator", "a model's name", "str", lambda w: Generator("gpt2")),
    Case("Generator", "no tokenizer", "GPT2LMHeadModel", lambda w: Generator(w.plain)),
    Case("Generator", "chat without a template", "chat=True", lambda w: Generator(w.model, chat=True)),
    Case("Generator", "no batch", "batch_size=0", _generator(batch_size=0)),
    Case("Generator", "half a batch", "batch_size=1.5", _generator(batch_size=1.5)),
    Case("Generator", "no memory", "memory=-1", _generator(memory=-1)),
    Case("Generator", "an empty prompt", "''", lambda w: _generator()(w).render("")),
    Case("Generator", "no prompt", "None", lambda w: _generator()(w).render(None)),
    Case("Generator", "a surrogate", "Unicode", lambda w: _generator(chat=False)(w).token_ids("a\ud800")),
    Case("Generator", "draws for other prompts", "2", lambda w: _generator()(w).completions(["a"], draws=[0, 1])),
    Case("Generator", "no candidates", "no candidate", lambda w: _generator()(w).log_likelihoods("a", [])),
    Case("run_task", "unknown task", "'sing'", _task("sing")),
    Case("run_task", "a list of tasks", "['ones']", _task(["ones"])),
    Case("run_task", "unknown chain of thought", "'much'", _task(cot="much")),
    Case("run_task", "no samples", "samples=0", _task("bernoulli", samples=0)),
    Case("run_task", "half a sample", "samples=1.5", _task("bernoulli", samples=1.5)),
    Case("run_task", "no lengths", "()", _task(lengths=())),
    Case("run_task", "a length twice", "(3, 3)", _task(lengths=(3, 3))),
    Case("run_task", "half a length", "(2.5,)", _task(lengths=(2.5,))),
    Case("run_task", "length 0", "0", _task(lengths=(0,))),
    Case("run_task", "nobody to answer", "NoneType", lambda w: osl.run_task(None, "ones", (3,))),
    Case(
        "run_task",
        "a model in the generator's place",
        "as the generator",
        lambda w: osl.run_task(w.model, "ones", (3,)),
    ),
    Case("run_task", "temperature below 0", "temperature=-1", lambda w: Sampling(-1)),
    Case("run_task", "temperature NaN", "temperature=nan", lambda w: Sampling(math.nan)),
    Case("run_task", "no tokens", "max_new_tokens=0", lambda w: Sampling(max_new_tokens=0)),
    Case("run_task", "a log that is a folder", "is a folder", lambda w: _task(out=w.folder)(w)),
    Case("run_task", "a log in no folder", "nowhere", lambda w: _task(out=w.folder / "nowhere" / "log")(w)),
    Case("run_task", "a log that is a device", "/dev/full", _task(out="/dev/full")),
    Case("run_task", "somebody's notes for a log", "log.parquet", _log(b"my notes\n")),
    Case("run_task", "a log of an earlier version", "log.jsonl", lambda w: _task(out=w.folder / "log.jsonl")(w)),
    Case("run_task", "a log of other settings", "temperature: 0.0 there, 0.5 now", _of_another),
    Case("run_task", "half an identity of a run", "log.parquet.parts", _part(b'{"model')),
    Case("run_task", "an identity that is deep", "log.parquet.parts", _part(b"[" * 100_000)),
    Case("run_task", "a log of zeros", "log.parquet", _log(bytes(64))),
    # figures of the paper
    Case("reproduce", "unknown figure", "13", lambda w: osl.reproduce("13", out=w.folder)),
    Case("reproduce", "no figure", "(none)", lambda w: osl.reproduce([], out=w.folder)),
    Case("reproduce", "an unknown option", "'hurry'", lambda w: osl.reproduce("8", out=w.folder, hurry=True)),
    Case("reproduce", "half a sample", "samples=1.5", lambda w: osl.reproduce("3", out=w.folder, samples=1.5)),
    Case("reproduce", "too short", "longest length of 0", lambda w: osl.reproduce("5", out=w.folder, longest=0)),
    Case("reproduce", "into a file", "taken", lambda w: osl.reproduce("8", out=w.file("taken"))),
    Case("reproduce", "into no path", "NoneType", lambda w: osl.reproduce("8", out=None)),
    Case("reproduce", "a model of no name", "''", lambda w: osl.reproduce("5", "", out=w.folder / "f"), ModelError),
    # what a model can be measured by
    Case("support", "no model", "NoneType", lambda w: osl.support(None)),
    Case("support", "a model's name", "str", lambda w: osl.support("gpt2")),
]

CASES = [
    *(Case("Trace", mistake, came, call, TraceFileError) for mistake, (call, came) in TRACES.items()),
    *MODELS,
    *ANSWERS,
]
