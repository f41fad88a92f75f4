"""Number formats: what computes, what numbers are rounded to when they are stored, and how weights are quantised.

These are three things and are kept apart. A model that computes in bfloat16 rounds after every operation;
rounding only what it hands on (a key/value cache in float8, say) rounds once; quantised weights are another,
slightly wrong model that computes as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import parse_shape, rearrange
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.weights import weight_holder, weight_matrices
from oversquash_lens.errors import InputError, one_line

COMPUTE = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
STORAGE = COMPUTE | {"float8_e4m3": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
# Bits and group of each kind of quantised weights; a group of None is a whole row, one scale per output.
WEIGHTS: dict[str, tuple[int, int | None]] = {"int8": (8, None), "int4": (4, 32)}
PARTS = {"store": "storage", "weights": "weights"}  # as the text has them -> as the fields are called


@dataclass(frozen=True, repr=False)
class NumberFormat:
    """What a model computes in, what its results are stored as, what its weights are quantised to.

    `storage` None stores as computed, `weights` None leaves the weights alone. Written "float32",
    "float32:store=float8_e4m3", "bfloat16:store=float8_e5m2:weights=int8"; `number_format` reads that.
    """

    compute: str
    storage: str | None = None
    weights: str | None = None

    def __repr__(self) -> str:
        return f"NumberFormat({self.name!r})"

    def __post_init__(self) -> None:
        if str(self.compute).startswith("float8_"):
            best = "float8_e5m2" if "e5m2" in self.compute else "float8_e4m3"
            raise InputError(
                f"expected one of {', '.join(COMPUTE)}, got {self.compute!r} as the format to compute in, and no "
                f"device here computes in it: to round results to it, use 'float32:store={best}'"
            )
        for part, came, known in (
            ("to compute in", self.compute, COMPUTE),
            ("to store in", self.storage, STORAGE),
            ("of weights", self.weights, WEIGHTS),
        ):
            if came is not None and came not in known:
                raise InputError(
                    f"expected one of {', '.join(known)}, as in 'float32', 'float32:store=float8_e4m3' or "
                    f"'bfloat16:weights=int4', got {one_line(repr(came), 60)} as the format {part}"
                )

    def to_dict(self) -> dict:
        """The format's parts, its machine epsilon and its largest number, as JSON takes them."""
        numbers = {"epsilon": self.epsilon, "largest": self.largest}
        return {"kind": "number_format", "name": self.name, **vars(self), **numbers}

    @property
    def name(self) -> str:
        """The format as text that `number_format` reads again: for the command line, files and tables."""
        parts = [self.compute, *(f"{key}={getattr(self, field)}" for key, field in PARTS.items())]
        return ":".join(part for part in parts if not part.endswith("=None"))

    @property
    def label(self) -> str:
        """The format as words: "float32, stored as float8_e4m3"."""
        storage = f", stored as {self.storage}" if self.storage else ""
        return self.compute + storage + (f", weights in {self.weights}" if self.weights else "")

    @property
    def dtype(self) -> torch.dtype:
        """What computes."""
        return COMPUTE[self.compute]

    @property
    def epsilon(self) -> float:
        """Machine epsilon, the spacing of numbers just above 1, of the coarser of compute and storage.

        Dimensionless; the spacing at x is between epsilon·|x|/2 and epsilon·|x|, a rounding at most half of it.
        """
        return max(torch.finfo(STORAGE[name]).eps for name in (self.compute, self.storage or self.compute))

    @property
    def largest(self) -> float:
        """Largest number that can be stored: ±448 in float8_e4m3, ±57344 in float8_e5m2, ±65504 in float16."""
        return torch.finfo(STORAGE[self.storage or self.compute]).max


def number_format(spec: Any) -> NumberFormat:
    """The format that a text, a torch.dtype (as what computes) or a NumberFormat names.

    >>> number_format("float32:weights=int4:store=float8_e4m3").name
    'float32:store=float8_e4m3:weights=int4'
    >>> number_format(torch.bfloat16).epsilon
    0.0078125
    """
    if isinstance(spec, NumberFormat):
        return spec
    if not isinstance(spec, str | torch.dtype):
        raise InputError(f"expected a text such as 'bfloat16', got {one_line(repr(spec), 60)} as a number format")
    compute, *options = str(spec).removeprefix("torch.").split(":")
    chosen: dict[str, str] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in PARTS or PARTS[key] in chosen:
            raise InputError(
                "expected store=FORMAT and weights=FORMAT, each at most once, as in 'float32:store=float8_e4m3', "
                f"got {one_line(repr(option), 60)} in the number format {one_line(repr(spec), 60)}"
            )
        chosen[PARTS[key]] = value
    return NumberFormat(compute, **chosen)


def stored(x: Float[Tensor, "*shape"], fmt: Any) -> Float[Tensor, "*shape"]:
    """x as it comes back from storage: rounded to the storage format; in float64, on x's own device.

    To nearest, ties to even (PyTorch's cast, which takes float64 by way of float32). Beyond the format's range
    numbers saturate at its largest one, in every format; PyTorch's own cast makes infinity of them in float8_e5m2
    and float16, and saturates or makes NaN in float8_e4m3 as its version has it. `overflowing` counts them. NaN
    stays NaN. A format that asks for no storage leaves x as it is.

    >>> stored(torch.tensor([0.3, 1.7, -1000.0]), "float32:store=float8_e4m3").tolist()
    [0.3125, 1.75, -448.0]
    """
    fmt = number_format(fmt)
    if fmt.storage is None:
        return x.double()
    return x.double().clamp(-fmt.largest, fmt.largest).to(STORAGE[fmt.storage]).double()


def overflowing(x: Float[Tensor, "*shape"], fmt: Any) -> int:
    """How many entries of x lie beyond the storage format's range, so that `stored` saturates them.

    >>> overflowing(torch.tensor([448.0, 449.0, -1000.0]), "float32:store=float8_e4m3")
    2
    """
    fmt = number_format(fmt)
    return 0 if fmt.storage is None else int((x.double().abs() > fmt.largest).sum())


def fake_quantised(
    weight: Float[Tensor, "*outputs inputs"], bits: int, group: int | None = None
) -> Float[Tensor, "*outputs inputs"]:
    """A weight matrix rounded to `bits`-bit integers times a scale, and written as ordinary numbers again.

    Symmetric round-to-nearest: the largest weight of a group maps to ±127 (8 bits) or ±7 (4 bits), so no weight moves
    by more than half a step, max|group|/254 or max|group|/14. A group is `group` neighbours along the last axis (its
    last group may be shorter), which must be the input's, as torch.nn.Linear has it; None takes the whole axis: one
    scale per output. Scales are float32 or wider and not quantised themselves.

    >>> fake_quantised(torch.tensor([[7.0, 1.4, -3.6], [0.0, 0.0, 0.0]]), bits=4)
    tensor([[ 7.,  1., -4.],
            [ 0.,  0.,  0.]])
    """
    if bits not in (8, 4) or (group is not None and group < 1) or weight.ndim < 2:
        raise InputError(
            f"expected 8 or 4 bits, a group of at least 1 or None, and a matrix, got bits={bits}, group={group} and "
            f"a weight of shape {tuple(weight.shape)}"
        )
    steps = 2 ** (bits - 1) - 1
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    parts = []
    for part in wide.split(group or wide.shape[-1], dim=-1):
        scale = part.abs().amax(-1, keepdim=True) / steps
        parts.append((part / scale.where(scale > 0, torch.ones_like(scale))).round() * scale)
    return torch.cat(parts, dim=-1).to(weight.dtype)


@contextmanager
def computing_in(model: Any, fmt: Any) -> Iterator[None]:
    """Within the block the model computes in `fmt`, with quantised weights if it says so; then it is as it was.

    For hooked models and any other torch.nn.Module. Gives the same numbers, bit for bit, as the model loaded in
    that dtype (an upcast keeps what rounding the weights and rotary tables once went through has lost). Afterwards
    the very same tensors are back, after an error too. Inside, the weights are in memory twice: as they were, and
    recast. Storage is not rounded here: see `stored`.

    Quantised are the matrices that multiply activations, each along its input's axis (`weight_matrices`). Embedding
    and unembedding tables, norms and biases keep their numbers. Buffers that a checkpoint does not hold, such as
    Hugging Face's rotary frequencies, keep their own dtype, as they do in loading.
    """
    fmt = number_format(fmt)
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"expected a hooked model or another torch.nn.Module, got a {type(model).__name__}: load one with "
            "oversquash_lens.load_model()"
        )
    holder = weight_holder(model)
    for device in {parameter.device for parameter in holder.parameters()}:
        _check_computes(device, fmt.dtype)
    with_the_weights = _weight_like_buffers(holder, fmt.dtype)
    with ExitStack() as afterwards:
        for parameter, data in _recast_parameters(model, fmt):
            afterwards.callback(setattr, parameter, "data", parameter.data)
            parameter.data = data
        for buffers, name in with_the_weights:
            afterwards.callback(buffers.__setitem__, name, buffers[name])
            buffers[name] = buffers[name].to(fmt.dtype)
        config = getattr(model, "cfg", None)
        if config is not None and hasattr(
            config, "dtype"
        ):  # one object that HookedTransformer's components read while they compute
            afterwards.callback(setattr, config, "dtype", config.dtype)
            config.dtype = fmt.dtype
        yield


def in_format(subject: Subject, fmt: NumberFormat) -> Subject:
    """The subject while its model computes in another format; what was proven of it stays."""
    return replace(subject, architecture=replace(subject.architecture, dtype=fmt.dtype))


def _recast_parameters(model: torch.nn.Module, fmt: NumberFormat) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Every parameter whose numbers change, with the new ones; quantised as they are, then cast."""
    axes = {id(weight): pattern for weight, pattern in weight_matrices(model)} if fmt.weights else {}
    if fmt.weights and not axes:
        raise InputError(
            f"expected HookedTransformer's matrices, or torch.nn.Linear or Conv1D layers, got {fmt.name!r} with a "
            f"{type(model).__name__} that has no weight matrix to quantise: leave weights= out"
        )
    for parameter in weight_holder(model).parameters():
        data = parameter.data
        if fmt.weights and id(parameter) in axes:
            yield parameter, _quantised(data, axes[id(parameter)], *WEIGHTS[fmt.weights]).to(fmt.dtype)
        elif data.is_floating_point() and data.dtype != fmt.dtype:
            yield parameter, data.to(fmt.dtype)


def _quantised(weight: Tensor, axes: str, bits: int, group: int | None) -> Tensor:
    """`fake_quantised` of a matrix that the pattern `axes` turns to [outputs, inputs], turned back."""
    stands, turned = axes.split(" -> ")
    rows = fake_quantised(rearrange(weight, axes), bits, group)
    return rearrange(rows, f"{turned} -> {stands}", **parse_shape(weight, stands))


def _weight_like_buffers(holder: torch.nn.Module, dtype: torch.dtype) -> list[tuple[dict[str, Any], str]]:
    """Where the buffers lie that a checkpoint holds in the weights' own format, if that is not `dtype` already."""
    formats = {parameter.dtype for parameter in holder.parameters() if parameter.is_floating_point()} - {dtype}
    return [
        (module._buffers, name)
        for module in holder.modules()
        for name, buffer in module._buffers.items()
        if name not in module._non_persistent_buffers_set and buffer is not None and buffer.dtype in formats
    ]


def _check_computes(device: torch.device, dtype: torch.dtype) -> None:
    """Found out by a tiny product, before anything is swapped."""
    if device.type == "meta":
        raise InputError(
            "some weights are off-loaded (on the device 'meta') and cannot be recast; expected all of them in "
            "memory: load the model in the format itself (dtype=), or without off-loading"
        )
    try:
        one = torch.ones(2, 2, dtype=dtype, device=device)
        one @ one
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise InputError(
            f"the device {str(device)!r} does not compute in {dtype} ({one_line(error, 120)}); expected a format "
            "that it can: choose another one, or load the model with device='cpu'"
        ) from error
