"""Where weights come from: a GGUF file, a local Hugging Face folder or the hub, as a transformers model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oversquash_lens.errors import ModelError, OversquashError, one_line
from oversquash_lens.models import gguf

HUB_TIMEOUT = 10  # seconds, for the one question whether the hub answers and lets us in
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # weights as a pickle, which is a program: never read
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # how configs call their number of layers


@dataclass(frozen=True)
class Loading:
    """How weights are to be loaded; `device_map` (None or as transformers takes it) overrides `device`."""

    dtype: torch.dtype
    device: torch.device
    device_map: Any = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Weights:
    """A transformers model in eval mode with its tokenizer; `hub_name` is None for local files."""

    model: Any
    tokenizer: Any
    label: str
    hub_name: str | None = None

    @property
    def architecture(self) -> str:
        return self.model.config.architectures[0]


def from_gguf(path: Path, label: str, loading: Loading) -> Weights:
    """Weights and tokenizer of one GGUF file, dequantised; touches no network."""
    source = {"gguf_file": path.name, "local_files_only": True}
    try:
        gguf.check_header(path)
        with gguf.read_once(show_progress=_terminal()):
            tokenizer, model = _pretrained(
                str(path.parent),
                loading,
                source,
                for_tokenizer=gguf.bos(path),
                for_model=gguf.dense(),
            )
            gguf.notice_scaled_rope(path)
    except OversquashError:
        raise
    except Exception as error:  # transformers and gguf raise whatever the broken bytes lead them to
        raise ModelError(
            f"The GGUF file {path} could not be read ({why(error)}). Expected a whole file of an "
            "architecture that transformers reads from GGUF. If it is damaged or half-downloaded, get it "
            "again; if its architecture is new, convert it to a Hugging Face folder."
        ) from error
    if hasattr(model.config, "quantization_config"):  # the weights are dense now; others refuse on this mark
        del model.config.quantization_config
    return Weights(model, tokenizer, label)


def from_folder(path: Path, label: str, loading: Loading) -> Weights:
    """Weights and tokenizer of a local Hugging Face folder; touches no network."""
    if not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        hint = f" It holds {found[0].name}: pass that file itself." if found else ""
        raise ModelError(
            f"The folder {one_line(path, 120)} holds no model: config.json is missing. Expected config.json, "
            "*.safetensors and the tokenizer's files (tokenizer.json …), as save_pretrained writes them: "
            f"pass the folder that holds these.{hint}"
        )
    try:
        _check_weights(path)
        tokenizer, model = _pretrained(str(path), loading, {"local_files_only": True})
    except OversquashError:
        raise
    except Exception as error:
        _raise_if_own_code(path, error)
        raise ModelError(
            f"The model in the folder {one_line(path, 200)} could not be loaded ({why(error)}). Expected the "
            "files of one causal language model, as save_pretrained writes them: get the folder again."
        ) from error
    return Weights(model, tokenizer, label)


def from_hub(name: str, label: str, loading: Loading) -> Weights:
    """Weights and tokenizer of a hub name: from the hub, or from its cache if it does not answer."""
    unreachable = _ask_hub(name)
    try:
        tokenizer, model = _pretrained(name, loading, {"local_files_only": unreachable is not None})
    except OversquashError:
        raise
    except Exception as error:
        if unreachable is not None:
            raise ModelError(
                f"The hub does not answer ({why(unreachable)}) and its local cache does not hold {name} "
                "whole. Expected one of the two: go online once, or pass a local folder or a .gguf file."
            ) from error
        _raise_if_refused(name, error)
        _raise_if_own_code(name, error)
        if isinstance(error, OSError) and "use_safetensors" in str(error):
            raise pickled_weights(
                name, "has no safetensors file on the hub (older ones have pytorch_model.bin)"
            ) from error
        raise ModelError(
            f"The hub model {name} could not be loaded ({why(error)}). Expected a causal language model with "
            "a tokenizer, both known to this transformers: pass another model, or upgrade transformers."
        ) from error
    return Weights(model, tokenizer, label, hub_name=name)


def _ask_hub(name: str) -> Exception | None:
    """Whether the hub gives us this model: None if it does, the trouble if it does not answer.

    One plain request: huggingface_hub's own would be retried for most of a minute before they give up.
    """
    from huggingface_hub import errors, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    try:
        url = hf_hub_url(name, "config.json")
        hf_raise_for_status(get_session().head(url, headers=build_hf_headers(), timeout=HUB_TIMEOUT))
    except errors.HFValidationError as error:
        raise unknown_model(name, "no hub name is written so") from error
    except Exception as error:  # of huggingface_hub, or of whichever HTTP library its version uses
        _raise_if_refused(name, error)
        return error
    return None


def _raise_if_refused(name: str, error: BaseException) -> None:
    """Raise one clear error if the hub said no: gated, unknown, or without a config."""
    from huggingface_hub import errors

    link: BaseException | None = error
    while link is not None and not isinstance(link, errors.HfHubHTTPError):
        link = link.__cause__ or link.__context__
    status = getattr(getattr(link, "response", None), "status_code", None)
    licence = (
        f"Accept its licence at https://huggingface.co/{name} and set HF_TOKEN to a token of that account "
        "(or run `hf auth login`)."
    )
    if isinstance(link, errors.GatedRepoError):
        raise ModelError(
            f"{name} is a gated model: the hub answered {status}, expected access to it. {licence}"
        ) from error
    if isinstance(link, errors.RepositoryNotFoundError):
        raise unknown_model(name, f"the hub answered {status}; if it is private, set HF_TOKEN") from error
    if isinstance(link, errors.EntryNotFoundError):
        raise ModelError(
            f"The hub model {name} has no config.json; expected a transformers model. If it holds GGUF "
            "files, download one and pass its path."
        ) from error
    if status in (401, 403):
        raise ModelError(f"The hub refused {name} with {status}; expected access to it. {licence}") from error


def unknown_model(name: str, came: str) -> ModelError:
    """The one error for a name that leads nowhere; `came` says what was tried."""
    return ModelError(
        f"Unknown model {one_line(name, 100)!r} ({came}). Expected 'smollm2-135m' (the embedded default), "
        "a .gguf file, a local Hugging Face folder, or a hub name such as 'gpt2' or 'Qwen/Qwen3-0.6B'."
    )


def pickled_weights(source: str, came: str) -> ModelError:
    """The one error for weights that only a pickle holds, and how to be rid of it."""
    return ModelError(
        f"{one_line(source, 200)} {came}; expected *.safetensors, for a pickle can run code when it is read. If you "
        f"trust where it is from, convert it once: AutoModelForCausalLM.from_pretrained({one_line(source, 200)!r}, "
        "weights_only=True).save_pretrained(FOLDER), the same with AutoTokenizer, and pass FOLDER."
    )


def _raise_if_own_code(source: Any, error: BaseException) -> None:
    if "trust_remote_code" in str(error):
        raise ModelError(
            f"{one_line(source, 200)} can only be loaded by running Python code that comes with it; expected a model "
            "that transformers knows by itself: read that code, and if you trust it, pass trust_remote_code=True."
        ) from error


def why(error: BaseException) -> str:
    """Kind and first words of another library's error."""
    return f"{type(error).__name__}: {one_line(error, 120)}".rstrip(": ")


def _pretrained(
    source: str,
    loading: Loading,
    where: dict[str, Any],
    *,
    for_tokenizer: dict[str, Any] | None = None,
    for_model: dict[str, Any] | None = None,
) -> tuple[Any, Any]:
    """(tokenizer, model) by transformers, of safetensors or GGUF alone: a pickle is a program."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    trust = {"trust_remote_code": loading.trust_remote_code}
    placing = {} if loading.device_map is None else {"device_map": loading.device_map}
    # Where PEFT is installed transformers looks for an adapter, too, and would ask the hub for it six times over.
    here = {"adapter_kwargs": {"local_files_only": True}} if where.get("local_files_only") else {}
    with _quiet():
        if "gguf_file" not in where:  # of these the header is checked already
            _check_depth(AutoConfig.from_pretrained(source, **where, **trust))
        tokenizer = AutoTokenizer.from_pretrained(source, **where, **trust, **(for_tokenizer or {}))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=loading.dtype,
            attn_implementation="eager",  # the fused ones give no patterns
            output_loading_info=True,
            use_safetensors="gguf_file" not in where or None,
            **where,
            **here,
            **trust,
            **placing,
            **(for_model or {}),
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise ModelError(
            f"The weights of {source} are not whole: {len(missing)} tensors are missing, such as "
            f"{missing[0]}. Expected every weight of the config's architecture: get the model again."
        )
    if not model.config.architectures:  # not written in some GGUF files
        model.config.architectures = [type(model).__name__]
    if loading.device_map is None:
        model = model.to(loading.device)
    return tokenizer, model.eval()


def _check_weights(folder: Path) -> None:
    """Safetensors in this very folder: transformers would follow an index out of it, and into a pickle."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        for shard in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ValueError(f"{index.name} names {one_line(shard, 80)!r}, expected *.safetensors beside it")
    pickled = [file.name for file in sorted(folder.iterdir()) if file.suffix.lower() in PICKLED]
    if pickled and not any(folder.glob("*.safetensors")):
        raise pickled_weights(str(folder), f"holds its weights as a pickle, {one_line(pickled[0], 100)}")


def _check_depth(config: Any) -> None:
    """A loader builds every layer that a config names before it looks for a weight: hours, and all memory."""
    for name in DEPTHS:
        depth = getattr(config, name, None)
        if isinstance(depth, int) and not 0 < depth <= gguf.MOST_LAYERS:
            raise ValueError(f"its config names {name}={depth}, expected 1 … {gguf.MOST_LAYERS}")


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' progress bars only where somebody watches."""
    from transformers.utils import logging

    hide = not _terminal() and logging.is_progress_bar_enabled()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()


def _terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


CONVERTERS = {"LlamaForCausalLM": "convert_llama_weights", "Qwen2ForCausalLM": "convert_qwen2_weights"}
# Largest difference from Hugging Face's logits as a share of the largest: room for rounding, not for a wrong
# conversion.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def obstacle(config: Any, architecture: str) -> str | None:
    """Why these weights cannot be converted here, in words; None if they can."""
    if architecture not in CONVERTERS:
        return f"{architecture} is none of {', '.join(CONVERTERS)}"
    if architecture == "LlamaForCausalLM" and getattr(config, "attention_bias", False):
        return "its attention has biases"
    if getattr(config, "mlp_bias", False):
        return "its MLP has biases"
    if getattr(config, "use_sliding_window", False):
        return "its attention has a sliding window"
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"its rotary positions are of the kind {rope['rope_type']!r}"
    return None


def converted(model_class: Any, found: Weights, loading: Loading, fold_ln: bool) -> Any:
    """The same model as a HookedTransformer on `loading.device`, checked against Hugging Face's logits."""
    import transformer_lens.pretrained.weight_conversions as conversions

    cfg = _config(found, loading, "RMSPre" if fold_ln else "RMS")
    model = model_class(cfg)
    convert = getattr(conversions, CONVERTERS[cfg.original_architecture])
    with torch.no_grad():
        state = convert(found.model, cfg)
        if fold_ln:
            model.load_and_process_state_dict(
                state, fold_ln=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False
            )
        else:  # what the other branch does with every flag off, but there once for each of 500 tensors: 6 s
            model.load_state_dict(model.fill_missing_keys(state), strict=False)
    for block in model.blocks:  # TransformerLens 2 makes one n_ctx² table a layer: 2 GB for SmolLM2
        block.attn.mask = model.blocks[0].attn.mask
    model.set_tokenizer(found.tokenizer)
    _check_logits(model.eval(), found)
    return model


def _config(found: Weights, loading: Loading, normalization_type: str) -> Any:
    from transformer_lens import HookedTransformerConfig

    config = found.model.config
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = _rope(config)
    scaled = {}
    if rope["rope_type"] == "llama3":
        scaled = {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_by_parts_factor": rope["factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    return HookedTransformerConfig(
        model_name=found.label,
        original_architecture=config.architectures[0],
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        d_head=d_head,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size,
        act_fn=config.hidden_act,
        gated_mlp=True,
        normalization_type=normalization_type,
        final_rms=True,
        eps=config.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_adjacent_pairs=False,
        rotary_base=rope["rope_theta"],
        init_weights=False,  # random numbers that would be overwritten at once
        dtype=loading.dtype,
        device=str(loading.device),
        **scaled,
    )


def _rope(config: Any) -> dict[str, Any]:
    """Rotary parameters in one form: transformers 5 has one dictionary, 4 a base and an optional scaling."""
    found = getattr(config, "rope_parameters", None)
    if found is None:
        scaling = getattr(config, "rope_scaling", None) or {}
        found = {"rope_theta": getattr(config, "rope_theta", 10_000.0), **scaling}
    kind = found.get("rope_type") or found.get("type") or "default"
    return {"rope_theta": 10_000.0, **found, "rope_type": kind}


def _check_logits(model: Any, found: Weights) -> None:
    """A wrong conversion must not pass: eight tokens through both, before Hugging Face's copy goes away."""
    tokens = torch.arange(1, 9).remainder(found.model.config.vocab_size)[None]
    with torch.no_grad():
        expected = found.model(tokens).logits
        came = model(tokens.to(model.cfg.device)).to(expected.device)
    apart = ((came - expected).abs().max() / expected.abs().max()).item()
    if apart > TOLERANCE[came.dtype]:
        raise ModelError(
            f"{found.label} as a HookedTransformer differs from Hugging Face's logits by {apart:.2g} of the "
            f"largest, expected at most {TOLERANCE[came.dtype]:.2g}. Use kind='bridge'."
        )
