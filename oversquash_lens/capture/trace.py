"""What one forward pass left behind: everything that the measures need, and no reference to the model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from oversquash_lens.capture.attention import AttentionRows, KeptAttention, RecomputedAttention
from oversquash_lens.capture.subject import MEASURES, RECORDED, STATES, SupportVerdict
from oversquash_lens.capture.weights import WeightGains
from oversquash_lens.errors import InputError, TraceFileError, one_line
from oversquash_lens.numerics import to_float64
from oversquash_lens.results import FINAL_GAIN, About, Result, in_a_cell
from oversquash_lens.storage import write_atomically

FORMAT = "oversquash-lens-trace"
FORMAT_VERSION = 5  # version 4 had no checksum
# As it stands in the file: a JSON text within JSON.
CHECKSUM = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')
UNSET = "0" * 64  # where the checksum is not counted in itself
ENDS = 6  # first and last tokens that a trace shows of itself


@dataclass(frozen=True)
class Gains:
    """What edges and nodes need beside the attention weights; `weights` depends on the model alone.

    Divisors r of the norms: `attention_scale`, `mlp_scale` (per layer and position), `final_scale` (last token).
    `attention_post_scale` divides what attention writes, `query_scale`, `key_scale` queries and keys: 1 where no norm
    does. `value`, `key`, `query_norm` (‖q‖), `key_norm` (‖k‖): as they enter the score, biases included, but not turned
    by their positions. `key_pull` is ‖diag(γ₁)W_K q‖, how far x̂ moves a score. `node_gain` is
    ‖I + J_MLP‖_F²/d_model at each position, `mlp_lipschitz` a rigorous bound on ‖J_MLP‖₂ there, norm included;
    `mlp_sigma` the paper's σ_ψ per layer, norm left out. `final_gain_max`, `final_gain_square`: max|γ₃|, mean γ₃².
    """

    weights: WeightGains
    attention_scale: Float[Tensor, "layer pos"]
    mlp_scale: Float[Tensor, "layer pos"]
    final_scale: float
    final_gain_max: float
    final_gain_square: float
    value: Float[Tensor, "layer kv_head pos d_head"]
    query_norm: Float[Tensor, "layer head pos"]
    key_norm: Float[Tensor, "layer kv_head pos"]
    key: Float[Tensor, "layer kv_head pos d_head"]
    key_pull: Float[Tensor, "layer head pos"]
    query_scale: Float[Tensor, "layer head pos"]
    key_scale: Float[Tensor, "layer kv_head pos"]
    attention_post_scale: Float[Tensor, "layer pos"]
    node_gain: Float[Tensor, "layer pos"]
    mlp_lipschitz: Float[Tensor, "layer pos"]
    mlp_sigma: Float[Tensor, " layer"]
    node_probes: int
    seed: int


@dataclass(frozen=True, repr=False)
class Trace(Result):
    """One prompt through one model: last-token residuals, attention, gains.

    `last_residuals[l]` is the last token's residual entering layer l (row n_layers: leaving the last layer);
    `prediction_input` is y_n, what the unembedding reads; `attention[l].rows(start, stop)` gives
    [head, dest, src]. `about` says which model, whether its norms were folded, whether BOS was there. `parallel`:
    attention and MLP of a layer both read what enters it; `support` says which measures hold on this architecture;
    `route_reason` why attention was recorded as it was, empty where that is not known.
    """

    about: About
    tokens: tuple[str, ...]
    token_ids: Int[Tensor, " pos"]
    last_residuals: Float[Tensor, "layer_plus_1 d_model"]
    prediction_input: Float[Tensor, " d_model"]
    attention: tuple[AttentionRows, ...]
    gains: Gains
    gated_mlp: bool
    parallel: bool
    support: dict[str, SupportVerdict]
    route_reason: str = ""

    def __post_init__(self) -> None:
        n, n_layers = len(self.tokens), len(self.attention)
        shapes = {
            "token_ids": (self.token_ids.shape, (n,)),
            "last_residuals": (self.last_residuals.shape[:1], (n_layers + 1,)),
            "attention": ({a.n_positions for a in self.attention}, {n}),
            "gains.node_gain": (self.gains.node_gain.shape, (n_layers, n)),
            "gains.value": (self.gains.value.shape[::2], (n_layers, n)),
        }
        if self.token_ids.is_floating_point() or self.token_ids.is_complex():
            raise InputError(
                f"expected whole numbers, got token_ids of {self.token_ids.dtype}: record the prompt again"
            )
        for name, (came, expected) in shapes.items():
            if tuple(came) != tuple(expected):
                raise InputError(
                    f"expected {tuple(expected)}, got a trace of {n} tokens and {n_layers} layers with {name} of "
                    f"shape {tuple(came)}: record it again"
                )

    @property
    def n_layers(self) -> int:
        return len(self.attention)

    @property
    def n_positions(self) -> int:
        return len(self.tokens)

    @property
    def route(self) -> str:
        """ "kept" where the patterns are kept, "recomputed" where rows are made anew from queries and keys."""
        return "kept" if any(isinstance(rows, KeptAttention) for rows in self.attention) else "recomputed"

    def __repr__(self) -> str:
        """Which model read what, how its attention is kept, and which measures hold: at most twelve lines."""
        shown = [in_a_cell(token) for token in self.tokens]
        shown = shown if len(shown) <= 2 * ENDS else [*shown[:ENDS], "…", *shown[-ENDS:]]
        lines = [self._title(), "tokens: " + " ".join(shown)]
        for state in ("supported", "approximate", "refused"):
            names = [name for name, verdict in self.support.items() if verdict.state == state]
            lines += [f"{state}: {', '.join(names)}"] if names else []
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Model, prompt, support and the numbers of `to_frame`, for JSON; None where a number is not known.

        `last_residual_norm` [layer + 1] is the length of the last token's residual entering each layer and leaving the
        last one.
        """
        return {
            "about": self.about.to_dict(),
            "route": self.route,
            "route_reason": self.route_reason,
            "support": {name: verdict._asdict() for name, verdict in self.support.items()},
            "last_residual_norm": _finite(to_float64(self.last_residuals).norm(dim=1)),
            "final_scale": self.gains.final_scale,
            **{name: _finite(column) for name, column in self._table().items()},
        }

    def _title(self) -> str:
        about = self.about
        return (
            f"Trace of {self.n_positions} tokens: {about}; {about.n_layers} layers of {about.n_heads} heads, "
            f"d_model {about.d_model}, attention {self.route}"
        )

    def _table(self) -> Mapping[str, Sequence[Any]]:
        """One row a position; norms and gains as their mean over layers (and heads)."""
        gains = self.gains
        by_position = {
            "attention_scale": gains.attention_scale,
            "mlp_scale": gains.mlp_scale,
            "query_norm": gains.query_norm.mean(1),
            "key_norm": gains.key_norm.mean(1),
            "value_norm": gains.value.norm(dim=-1).mean(1),
            "node_gain": gains.node_gain,
        }
        return {
            "position": range(self.n_positions),
            "token": self.tokens,
            "token_id": self.token_ids.tolist(),
            **{name: to_float64(values).mean(0).tolist() for name, values in by_position.items()},
        }

    def save(self, path: str | os.PathLike) -> Path:
        """Write one .safetensors file (no pickle), whole or not at all."""
        return write_atomically(path, packed(_header(self), _tensors(self)))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Trace:
        """Read what `save` wrote; a TraceFileError names what is wrong with anything else."""
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"expected the path of a trace, got a {type(path).__name__}: give what Trace.save gave")
        path = Path(path).expanduser()
        try:
            return _assemble(*_read(path))
        except TraceFileError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, InputError) as error:
            raise TraceFileError(
                f"{one_line(path, 200)} lacks a part of a trace ({type(error).__name__}: {one_line(error, 160)}); "
                "expected a file written by Trace.save: record the prompt again"
            ) from error


def _finite(column: Any) -> list[Any]:
    """A column as JSON has it."""
    values = column.tolist() if isinstance(column, Tensor) else column
    return [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]


def check_trace(came: Any) -> None:
    """What measures ask of what they are given."""
    if not isinstance(came, Trace):
        raise InputError(f"expected a Trace, got a {type(came).__name__}: call record(model, prompt) first")


_GAIN_TENSORS = [f.name for f in fields(Gains) if f.name not in ("weights",) and "Tensor" in str(f.type)]
_GAIN_NUMBERS = [f.name for f in fields(Gains) if f.name not in ("weights", *_GAIN_TENSORS)]
_ROW_TENSORS = [f.name for f in fields(RecomputedAttention) if "Tensor" in str(f.type)]
_ROW_OPTIONAL = [f.name for f in fields(RecomputedAttention) if f.name in _ROW_TENSORS and "None" in str(f.type)]
_ROW_NUMBERS = [f.name for f in fields(RecomputedAttention) if f.name not in _ROW_TENSORS]
_WEIGHT_TENSORS = [f.name for f in fields(WeightGains)]
OPTIONAL = [f.name for f in fields(WeightGains) if "None" in str(f.type)]


def _header(trace: Trace) -> dict:
    return {
        "version": FORMAT_VERSION,
        "about": trace.about.to_dict(),
        "tokens": list(trace.tokens),
        "gated_mlp": trace.gated_mlp,
        "parallel": trace.parallel,
        "support": trace.support,
        "route_reason": trace.route_reason,
        "attention": [{name: getattr(a, name, None) for name in _ROW_NUMBERS} for a in trace.attention],
        "gains": {name: getattr(trace.gains, name) for name in _GAIN_NUMBERS},
    }


def _tensors(trace: Trace) -> dict[str, Tensor]:
    n = trace.n_positions
    names = ("token_ids", "last_residuals", "prediction_input")
    tensors: dict[str, Tensor | None] = {name: getattr(trace, name) for name in names}
    for i, attention in enumerate(trace.attention):
        if isinstance(attention, RecomputedAttention):
            tensors |= {f"attention.{i}.{name}": getattr(attention, name) for name in _ROW_TENSORS}
        else:
            tensors |= {f"attention.{i}": attention.rows(0, n), f"attention.{i}.mixed": attention.mixed}
    tensors |= {f"gains.{name}": getattr(trace.gains, name) for name in _GAIN_TENSORS}
    tensors |= {f"weights.{name}": getattr(trace.gains.weights, name) for name in _WEIGHT_TENSORS}
    return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}


def packed(header: dict, tensors: dict[str, Tensor]) -> bytes:
    """A trace's file: safetensors, with a checksum of all of it in the header."""
    from safetensors.torch import save

    payload = save(tensors, metadata={FORMAT: json.dumps(header | {"sha256": UNSET})})
    found = CHECKSUM.search(payload)
    assert found is not None
    return payload[: found.start(1)] + hashlib.sha256(payload).hexdigest().encode() + payload[found.end(1) :]


def _sum(payload: bytes, found: re.Match[bytes]) -> bytes:
    """The checksum of a file in which it is not counted; without a copy of the file."""
    view, digest = memoryview(payload), hashlib.sha256()
    for piece in (view[: found.start(1)], UNSET.encode(), view[found.end(1) :]):
        digest.update(piece)
    return digest.hexdigest().encode()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.is_file():
        raise TraceFileError(
            f"{one_line(path, 200)} is not a file; expected a trace written by Trace.save: give its path"
        )
    try:
        payload = path.read_bytes()
        length = int.from_bytes(payload[:8], "little")
        header = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"][FORMAT])
        version = header.get("version") if isinstance(header, dict) else header
        if version != FORMAT_VERSION or not isinstance(header, dict):
            raise TraceFileError(
                f"{one_line(path, 200)} has trace format version {one_line(repr(version), 60)}; expected version "
                f"{FORMAT_VERSION}, which this oversquash-lens reads: record the prompt again, or use the release that "
                "wrote it"
            )
        found = CHECKSUM.search(payload, 8, 8 + length)
        if found is None or _sum(payload, found) != found[1]:
            raise ValueError("its checksum is not that of its content")
        # Copied: products of unaligned memory, as a file gives it, are rounded otherwise.
        return header, {name: tensor.clone() for name, tensor in load(payload).items()}
    except (SafetensorError, KeyError, TypeError, ValueError, OSError, RecursionError, MemoryError) as error:
        raise TraceFileError(
            f"{one_line(path, 200)} is damaged or not a trace ({type(error).__name__}: {one_line(error, 120)}); "
            "expected a file written by Trace.save: record the prompt again"
        ) from error


# ---------------------------------------------------------------- what a file must hold, or it is no trace

VALUES, SCORES = ("d_head of values",), ("d_head of scores",)  # two widths of heads, which need not be one
WIDTHS = {"value": VALUES, "output_factor": VALUES, "worst_output_factor": VALUES, "mixed": VALUES}
WIDTHS |= {"key": SCORES, "query": SCORES, "key_factor": SCORES}
SIGNED = ("ov_trace", "ov_gram", "output_factor", "worst_output_factor", "key_factor", "score_scale", "value", "key")
UNKNOWN_TO_EXPERTS = ("mlp_", "node_gain")  # nan where a measure of a mixture of experts is refused


def _check(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Types and ranges of the header, shapes and numbers of the tensors; ValueError names the first that is wrong."""
    about, tokens, gains = header["about"], header["tokens"], header["gains"]
    kinds = {"str": str, "int": int, "bool": bool, "dict[str, str]": dict}
    for each in fields(About):
        came = about.get(each.name, each.default)
        _expect(type(came) is kinds[str(each.type)], f"about.{each.name}", came)
    _expect(all(isinstance(text, str) for pair in about["versions"].items() for text in pair), "about.versions")
    _expect(about["final_gain"] in FINAL_GAIN, "about.final_gain", about["final_gain"])
    _expect(isinstance(tokens, list) and all(isinstance(token, str) for token in tokens), "tokens", tokens)
    _expect(type(header["gated_mlp"]) is bool and type(header["parallel"]) is bool, "gated_mlp or parallel")
    _expect(isinstance(header.get("route_reason", ""), str), "route_reason")
    verdicts = header["support"]
    _expect(isinstance(verdicts, dict) and set(RECORDED) <= set(verdicts) <= set(MEASURES), "support", verdicts)
    _expect(all(len(v) == 2 and v[0] in STATES and isinstance(v[1], str) for v in verdicts.values()), "support")
    for name in _GAIN_NUMBERS:
        number, whole = gains[name], name in ("node_probes", "seed")
        _expect(type(number) is int if whole else isinstance(number, float | int), f"gains.{name}", number)
        _expect(math.isfinite(number) and (name == "seed" or number > 0 or "gain" in name), f"gains.{name}", number)
    sizes = {"layer": about["n_layers"], "head": about["n_heads"], "head2": about["n_heads"], "pos": len(tokens)}
    sizes |= {"d_model": about["d_model"], "layer_plus_1": about["n_layers"] + 1}
    _expect(min(sizes.values()) > 0 and len(header["attention"]) == sizes["layer"], "sizes", sizes)
    axes = _axes(sizes["layer"])
    if unknown := set(tensors) - set(axes):
        raise ValueError(f"expected no tensor {one_line(unknown.pop(), 60)!r}")
    experts = verdicts["calibrated"][0] == "refused"
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, axes[name], sizes)
        last = name.rpartition(".")[2]
        known = tensor if not (experts and last.startswith(UNKNOWN_TO_EXPERTS)) else tensor[~tensor.isnan()]
        _expect(bool(known.isfinite().all()), f"numbers of {name}")
        if name.startswith(("gains.", "weights.")) and last not in SIGNED:
            _expect(bool((known > 0 if last.endswith("_scale") else known >= 0).all()), f"numbers of {name}")
    ids = tensors["token_ids"]
    _expect(not ids.is_floating_point() and bool((ids >= 0).all()), "token_ids", ids.dtype, int(ids.min()))


def _axes(n_layers: int) -> dict[str, list[str]]:
    """Every tensor that a file may hold, and its axes, as the classes have them."""
    found = {"token_ids": ["pos"], "last_residuals": ["layer_plus_1", "d_model"], "prediction_input": ["d_model"]}
    found |= {f"gains.{f.name}": _annotated(f) for f in fields(Gains) if f.name in _GAIN_TENSORS}
    found |= {f"weights.{f.name}": _annotated(f) for f in fields(WeightGains)}
    rows = {f.name: _annotated(f) for f in fields(RecomputedAttention) if f.name in _ROW_TENSORS}
    for i in range(n_layers):
        found |= {f"attention.{i}.{name}": axes for name, axes in rows.items()}
        found[f"attention.{i}"] = ["head", "pos", "pos"]
    return found


def _annotated(field: Any) -> list[str]:
    return re.split("['\"]", str(field.type))[1].split()  # an annotation, as text or resolved


def _check_tensor(name: str, tensor: Tensor, axes: Sequence[str], sizes: dict[str, int]) -> None:
    """The shape is that of its axes, whose sizes are those of other tensors; those that are new are remembered."""
    _expect(tensor.ndim == len(axes) and min(tensor.shape) > 0, f"axes of {name}", tuple(tensor.shape))
    for axis, size in zip(axes, tensor.shape, strict=True):
        (width,) = WIDTHS.get(name.rpartition(".")[2], ("d_head",)) if axis == "d_head" else (axis,)
        if width != "rank" and sizes.setdefault(width, size) != size:
            raise ValueError(f"expected {sizes[width]} on the axis {axis!r} of {name}, got {tuple(tensor.shape)}")
    _expect(sizes["head"] % sizes.get("kv_head", 1) == 0, "number of key heads")
    _expect(tensor.is_floating_point() or name == "token_ids", f"type of {name}", tensor.dtype)


def _expect(fine: bool, what: str, *came: Any) -> None:
    if not fine:
        shown = "".join(f" {one_line(repr(each), 60)}" for each in came)
        raise ValueError(f"no trace has such {what}{':' if came else ''}{shown}")


def _attention(header: dict, tensors: dict[str, Tensor], layer: int) -> AttentionRows:
    name = f"attention.{layer}"
    if name in tensors:
        return KeptAttention(tensors[name], tensors.get(f"{name}.mixed"))
    parts: dict[str, Any] = {part: tensors[f"{name}.{part}"] for part in _ROW_TENSORS if part not in _ROW_OPTIONAL}
    parts |= {part: tensors.get(f"{name}.{part}") for part in _ROW_OPTIONAL}
    numbers = header["attention"][layer]
    known = [number for number in numbers.values() if number is not None]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in known):
        raise TypeError(f"{name} with a header that holds more than numbers")
    return RecomputedAttention(**parts, **numbers)


def _assemble(header: dict, tensors: dict[str, Tensor]) -> Trace:
    _check(header, tensors)
    weights: dict[str, Any] = {name: tensors[f"weights.{name}"] for name in _WEIGHT_TENSORS if name not in OPTIONAL}
    weights |= {name: tensors.get(f"weights.{name}") for name in OPTIONAL}
    gains: dict[str, Any] = {name: tensors[f"gains.{name}"] for name in _GAIN_TENSORS}
    gains |= {name: header["gains"][name] for name in _GAIN_NUMBERS}
    n_layers = header["about"]["n_layers"]
    return Trace(
        about=About(**header["about"]),
        tokens=tuple(header["tokens"]),
        token_ids=tensors["token_ids"],
        last_residuals=tensors["last_residuals"],
        prediction_input=tensors["prediction_input"],
        attention=tuple(_attention(header, tensors, i) for i in range(n_layers)),
        gains=Gains(weights=WeightGains(**weights), **gains),
        gated_mlp=header["gated_mlp"],
        parallel=header["parallel"],
        support={measure: SupportVerdict(*verdict) for measure, verdict in header["support"].items()},
        route_reason=str(header.get("route_reason", "")),
    )
