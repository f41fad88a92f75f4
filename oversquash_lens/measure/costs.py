"""What each measure needs of memory and work beyond the recording: counts of the tensors and products it makes.

Where a count depends on the model class, it is because HookedTransformer copies more than a bridge does. All of them
were set against runs of SmolLM2 (`python -m benchmarks.forecast`).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from oversquash_lens.errors import InputError
from oversquash_lens.measure.speed import Speed
from oversquash_lens.record.room import MEMORY_VARIABLE, available_bytes, check_room, in_words
from oversquash_lens.record.size import BASE, Size, device_of, kept_bytes, record_bytes, size_of

BATCH = 64  # backward products at a time even where memory allows more: no faster beyond, and the progress bar moves
# What autograd keeps of one layer: multiples of its activations, and of its [head, dest, src].
TAPE = {"bridge": (1, 1), "hooked": (2, 3)}
ALIVE = 0.4  # of the memory set aside for a batch of backward products, what they are seen to take
SPECTRAL = 4  # whole Jacobians, their copy, their Gram matrices and the eigenvalues' work space
ROWS = 256  # rows of an edge matrix at a time: measure/paths.py
EDGES = 1 << 29  # bytes of edges that a flow remembers: measure/flow.py
MAPS = 8  # copies of a block of rows, all heads, that an estimate works with

# Time, in attentions of one layer (what Speed times) per [head, dest, src] of it.
FORWARD = 1.2
CHECKS = 0.7
BOUNDS = 2.2
ESTIMATE = 2.0
FLOW = 2.0
BACKWARD = 2.5
EIGENVALUES = 3  # of a matrix, in products of it with itself
LAYER = 0.006  # seconds of Python per layer gone through: hooks, checks, one call after another


def product_bytes(size: Size, n: int) -> int:
    """About what one backward product keeps alive at its widest: attention of one layer, or its MLP."""
    widest = max(4 * size.n_heads * n * n, 4 * n * (size.d_mlp or 4 * size.d_model))
    return (widest + 6 * n * size.d_model) * size.itemsize


def tape_bytes(size: Size, n: int) -> dict[str, int]:
    """One forward pass that can be differentiated, the backward products left out."""
    linear, square = TAPE[size.kind]
    layer = linear * size.position(n) + square * size.scores(n)
    if size.kind == "hooked":  # grouped keys and values, repeated for every head, and their gradients' way back
        layer += 2 * size.d_model * size.d_head * size.n_heads * size.itemsize
    return {
        "the graph of all layers": size.n_layers * layer,
        "the logits": 2 * size.logits(n) + size.unembedding,
        "the libraries": BASE,
    }


def truth_bytes(size: Size, n: int, products: int, memory: int, spectral: bool = False) -> dict[str, int]:
    """The most that measuring the truth by `products` backward products holds at once."""
    one = product_bytes(size, n)
    chunk = max(1, min(BATCH, products, memory // one))
    at_once = round(ALIVE * chunk * one) + 2 * chunk * n * size.d_model * size.itemsize
    if spectral:
        at_once += SPECTRAL * min(max(memory, jacobian_bytes(size)), n * jacobian_bytes(size))
    return tape_bytes(size, n) | {"a batch of backward products": at_once}


def jacobian_bytes(size: Size) -> int:
    """∂y_n/∂v_i of one position."""
    return size.d_model**2 * size.itemsize


def edge_bytes(size: Size, n: int) -> dict[str, int]:
    """A block of rows at work; bounds and the estimate take one layer's after another's."""
    block = MAPS * size.n_heads * min(ROWS, n) * n * max(4, size.itemsize)
    return {"a block of edges": block, "the libraries": BASE}


def flow_bytes(size: Size, n: int) -> dict[str, int]:
    """The edges that both sweeps share, and a block at work."""
    remembered = min(EDGES, size.n_layers * n * n * 8)
    return edge_bytes(size, n) | {"edges of both sweeps": remembered}


def check_audit(model: Any, n: int, probes: int | None) -> None:
    """Refuse what would not fit even with one backward product at a time, before the recording that comes first."""
    size = size_of(model)
    needed = kept_bytes(size, n) | truth_bytes(size, n, 1, 0, spectral=probes is None)
    name = getattr(model.cfg, "model_name", None) or "this model"
    for parts in (record_bytes(size, n), needed):
        check_room(parts, device_of(model), f"recording {n} tokens with {name} and measuring their truth")


def fitting_memory(model: Any, n: int, memory: int, *, spectral: bool = False) -> int:
    """`memory` for backward products, or what of it there is room for: fewer products at a time are a little slower.

    Raises InputError where not even one fits beside the graph.
    """
    size, there = size_of(model), available_bytes(device_of(model))
    fixed = sum(tape_bytes(size, n).values())
    least = sum(truth_bytes(size, n, 1, 0, spectral).values())
    if least > there:
        raise InputError(
            f"the truth of {n} tokens needs at least {in_words(least)} of memory beyond what is in use, "
            f"{in_words(fixed)} of it for the graph, and {in_words(there)} are there; expected room for it: take a "
            f"shorter prompt, free some memory, or set {MEMORY_VARIABLE} if you know of more"
        )
    each = ALIVE + 0.1 + (SPECTRAL if spectral else 0)
    return max(1, min(memory, int((there - fixed) / each)))


@dataclass(frozen=True)
class Work:
    """Multiply-adds of products; entries of [head, dest, src] times attentions, singly and in batches; multiply-adds in
    float64; layers gone through in Python.
    """

    product: float | int = 0
    attention: float | int = 0
    batched: float | int = 0
    double: float | int = 0
    layers: float | int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, factor: int) -> Work:
        return Work(*(factor * each for each in astuple(self)))

    def seconds(self, speed: Speed) -> float:
        units = (*astuple(speed), LAYER)
        return sum(count * unit for count, unit in zip(astuple(self), units, strict=True))


def _entries(size: Size, n: int) -> int:
    return size.n_layers * size.n_heads * n * n


def forward_work(size: Size, n: int) -> Work:
    """One plain forward pass, logits included."""
    products = n * (size.n_layers * size.layer_weights + size.d_model * size.d_vocab)
    return Work(product=products, attention=FORWARD * _entries(size, n), layers=size.n_layers)


def record_work(size: Size, n: int) -> Work:
    """The pass, its checks, and the nodes' gains from two probes."""
    probed = 2 * size.n_layers * n * size.d_mlp * size.d_model
    checks = Work(product=probed, attention=CHECKS * _entries(size, n), layers=size.n_layers)
    return forward_work(size, n) + checks


def weights_work(size: Size) -> Work:
    """Norms and Grams of the weights: a Gram matrix and its eigenvalues per matrix, once per model."""
    small, large = sorted((size.d_model, max(size.d_mlp, 1)))
    mlp = size.matrices * (small**2 * large + EIGENVALUES * small**3)
    heads = size.d_model * size.d_head**2 * (size.n_heads + size.n_kv_heads) * EIGENVALUES
    grams = 2 * size.d_model * (size.d_head * size.n_heads) ** 2
    return Work(double=size.n_layers * (mlp + heads + grams))


def bounds_work(size: Size, n: int) -> Work:
    """All seven variants of the bound."""
    return Work(attention=BOUNDS * _entries(size, n), layers=size.n_layers)


def estimate_work(size: Size, n: int) -> Work:
    """The mean-field estimate."""
    return Work(attention=ESTIMATE * _entries(size, n), layers=size.n_layers / 4)


def flow_work(size: Size, n: int) -> Work:
    """Where the paths run: both sweeps over the estimate's edges, with the parts of every head."""
    return Work(attention=FLOW * _entries(size, n), layers=size.n_layers / 4)


def truth_work(size: Size, n: int, products: int) -> Work:
    """A pass with its graph, and backward products, each a pass without logits and twice its attention."""
    each = Work(product=n * size.n_layers * size.layer_weights, batched=BACKWARD * _entries(size, n))
    graph = Work(attention=FORWARD * _entries(size, n), layers=size.n_layers * (1 + -(-products // BATCH)))
    return forward_work(size, n) + graph + each.times(products)
