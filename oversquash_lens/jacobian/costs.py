"""What each measure needs of memory and work beyond the recording: counts of the tensors and products it makes.

Where a count depends on the model class, it is because HookedTransformer copies more than a bridge does. All of them
were set against runs of SmolLM2 (`python -m benchmarks.forecast`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

from oversquash_lens.analyses.speed import Speed
from oversquash_lens.capture.fused import why_not_fused
from oversquash_lens.capture.route import foreign_hooks, planned_route
from oversquash_lens.capture.size import BASE, Size, device_of, kept_bytes, record_bytes, size_of
from oversquash_lens.capture.subject import Subject
from oversquash_lens.errors import InputError
from oversquash_lens.memory import MEMORY_VARIABLE, available_bytes, check_room, in_words
from oversquash_lens.paths.block import ENTRIES, MOST_ROWS

BATCH = 64  # backward products at a time even where memory allows more: no faster beyond, and the progress bar moves
TOGETHER = (
    1024  # positions of all products of a batch: where a few keep a processor busy, more only fight for its cache
)
TRUTH_ROUTES = ("whole", "blocks", "fused")  # the whole graph, one block's at a time, and that without [dest, src]
FUSED_FROM = 512  # tokens; shorter prompts gain nothing, and their truth is to the last digit what the class computes
COMFORT = 4  # a graph that takes less than one part in so many of the memory that is there is kept whole
CARRIED = 3  # rows of covectors from block to block, what becomes of them, and one batch's of each
# What autograd keeps of one layer: multiples of its activations, and of its [head, dest, src].
TAPE = {"bridge": (1, 1), "hooked": (2, 3)}
ALIVE = 0.4  # of the memory set aside for a batch of backward products, what they are seen to take
SPECTRAL = 4  # whole Jacobians, their copy, their Gram matrices and the eigenvalues' work space
MOST_FROZEN = 2048  # tokens; of more, the truth is measured as it is and not also with attention or norms frozen
MAPS = 8  # copies of a block of rows, all heads, that an estimate works with

# Time, in attentions of one layer (what Speed times) per [head, dest, src] of it.
FORWARD = {"kept": 1.2, "recomputed": 1.2, "fused": 0.3}
CHECKS = {"kept": 0.7, "recomputed": 0.5, "fused": 0.1}
BOUNDS = 1.0
ESTIMATE = 0.6
FLOW = 2.1
ANEW = {"kept": 0.0, "recomputed": 0.3, "fused": 0.3}  # a row of attention, made from queries and keys
BACKWARD = {"whole": 2.0, "blocks": 2.0, "fused": 0.6}
PAIRED = 150  # pairs of directions at the default number of probes, and what goes with them
EIGENVALUES = 3  # of a matrix, in products of it with itself
LAYER = 0.006  # seconds of Python per layer gone through: hooks, checks, one call after another


def truth_route(subject: Subject, n: int, freeze: Iterable[str] = ()) -> str:
    """One of `TRUTH_ROUTES`: how the truth of n tokens is measured with the memory that is there now."""
    model, size = subject.model, subject.size
    frozen = "attention" in freeze or next(foreign_hooks(model), None) is not None
    if n >= FUSED_FROM and not frozen and why_not_fused(model, subject.architecture) is None:
        return "fused"
    whole = sum(tape_bytes(size, n).values()) + product_bytes(size, n)
    return "whole" if COMFORT * whole <= available_bytes(subject.device) else "blocks"


def products_at_once(n: int, memory: int, one: int) -> int:
    """Backward products in a batch, each of which takes `one` bytes of `memory`."""
    return max(1, min(BATCH, memory // one, TOGETHER // n))


def product_bytes(size: Size, n: int, route: str = "whole") -> int:
    """About what one backward product keeps alive at its widest: attention of one layer, or its MLP."""
    attention = 0 if route == "fused" else 4 * size.n_heads * n * n
    widest = max(attention, 4 * n * (size.d_mlp or 4 * size.d_model))
    return (widest + 6 * n * size.d_model) * size.itemsize


def tape_bytes(size: Size, n: int, route: str = "whole") -> dict[str, int]:
    """One forward pass that can be differentiated, the backward products left out."""
    linear, square = TAPE[size.kind]
    layer = linear * size.position(n) + (0 if route == "fused" else square * size.scores(n))
    if size.kind == "hooked":  # grouped keys and values, repeated for every head, and their gradients' way back
        layer += 2 * size.d_model * size.d_head * size.n_heads * size.itemsize
    rest = {"the unembedding": size.unembedding, "the libraries": BASE}
    if route == "whole":
        return {"the graph of all layers": size.n_layers * layer} | rest
    residuals = (size.n_layers + 1) * n * size.d_model * size.itemsize
    return {"the graph of one layer": layer, "the residuals between layers": residuals} | rest


def truth_bytes(
    size: Size, n: int, products: int, memory: int, spectral: bool = False, route: str = "whole"
) -> dict[str, int]:
    """The most that measuring the truth by `products` backward products holds at once."""
    one, row = product_bytes(size, n, route), n * size.d_model * max(4, size.itemsize)
    chunk = min(products, products_at_once(n, memory, one))
    carried = chunk if route == "whole" else max(1, min(products, memory // (CARRIED * row)))
    at_once = round(ALIVE * chunk * one) + (2 if route == "whole" else CARRIED) * carried * row
    if spectral:
        at_once += SPECTRAL * min(max(memory, jacobian_bytes(size)), n * jacobian_bytes(size))
    return tape_bytes(size, n, route) | {"a batch of backward products": at_once}


def jacobian_bytes(size: Size) -> int:
    """∂y_n/∂v_i of one position."""
    return size.d_model**2 * size.itemsize


def edge_bytes(size: Size, n: int) -> dict[str, int]:
    """A block of rows at work; bounds, estimate and flows take one layer's after another's, all from the same block."""
    entries = min(ENTRIES["cpu"], size.n_heads * min(MOST_ROWS, n) * n)
    return {"a block of rows": MAPS * entries * max(4, size.itemsize), "the libraries": BASE}


def check_audit(model: Any, n: int, probes: int | None) -> None:
    """Refuse what would not fit even with one backward product at a time, before the recording that comes first."""
    size, recorded = size_of(model), planned_route(model, n)
    route = truth_route(Subject.of(model), n, ("attention",) if n <= MOST_FROZEN else ())
    needed = kept_bytes(size, n, recorded) | truth_bytes(size, n, 1, 0, probes is None, route)
    name = getattr(model.cfg, "model_name", None) or "this model"
    for parts in (record_bytes(size, n, recorded), needed):
        check_room(parts, device_of(model), f"recording {n} tokens with {name} and measuring their truth")


def fitting_memory(
    subject: Subject, n: int, memory: int, *, spectral: bool = False, freeze: Iterable[str] = ("attention",)
) -> int:
    """`memory` for backward products, or what of it there is room for: fewer products at a time are a little slower.

    Raises InputError where not even one fits beside the graph. Frozen attention needs most.
    """
    size, there = subject.size, available_bytes(subject.device)
    route = truth_route(subject, n, freeze)
    fixed = sum(tape_bytes(size, n, route).values())
    least = sum(truth_bytes(size, n, 1, 0, spectral, route).values())
    if least > there:
        raise InputError(
            f"the truth of {n} tokens needs at least {in_words(least)} of memory beyond what is in use, "
            f"{in_words(fixed)} of it for the graph, and {in_words(there)} are there; expected room for it: take a "
            f"shorter prompt, free some memory, or set {MEMORY_VARIABLE} if you know of more"
        )
    each = (ALIVE + 0.1 if route == "whole" else ALIVE + 1.1) + (SPECTRAL if spectral else 0)
    return max(1, min(memory, int((there - fixed) / each)))


@dataclass(frozen=True)
class Work:
    """Multiply-adds of products; entries of [head, dest, src] times attentions, whole and in blocks of rows;
    multiply-adds in float64; layers gone through in Python.
    """

    product: float | int = 0
    attention: float | int = 0
    blocked: float | int = 0
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
    return Work(product=products, attention=FORWARD["kept"] * _entries(size, n), layers=size.n_layers)


def record_work(size: Size, n: int, route: str = "kept") -> Work:
    """The pass, one row of logits; its checks; and the nodes' gains from pairs of directions."""
    products = n * size.n_layers * size.layer_weights
    pairs = size.matrices * PAIRED * size.n_layers * (n + size.d_model) * size.d_mlp
    passing = Work(product=products + pairs, attention=FORWARD[route] * _entries(size, n), layers=size.n_layers)
    return passing + Work(attention=CHECKS[route] * _entries(size, n), layers=size.n_layers)


def weights_work(size: Size) -> Work:
    """Norms and Grams of the weights: a Gram matrix and its eigenvalues per matrix, once per model."""
    small, large = sorted((size.d_model, max(size.d_mlp, 1)))
    mlp = size.matrices * (small**2 * large + EIGENVALUES * small**3)
    heads = size.d_model * size.d_head**2 * (size.n_heads + size.n_kv_heads) * EIGENVALUES
    grams = 2 * size.d_model * (size.d_head * size.n_heads) ** 2
    return Work(double=size.n_layers * (mlp + heads + grams))


def bounds_work(size: Size, n: int, route: str = "kept") -> Work:
    """All seven variants of the bound and the mean-field estimate, in one sweep."""
    return Work(blocked=(BOUNDS + ANEW[route]) * _entries(size, n), layers=size.n_layers)


def estimate_work(size: Size, n: int, route: str = "kept") -> Work:
    """The mean-field estimate alone."""
    return Work(blocked=(ESTIMATE + ANEW[route]) * _entries(size, n), layers=size.n_layers / 4)


def flow_work(size: Size, n: int, route: str = "kept") -> Work:
    """Where the paths run: both sweeps over the estimate's edges, with the parts of every head."""
    return Work(blocked=(FLOW + 2 * ANEW[route]) * _entries(size, n), layers=size.n_layers / 4)


def truth_work(size: Size, n: int, products: int, route: str = "whole") -> Work:
    """A pass with its graph (once more, a block at a time), and backward products: each a pass without logits, its
    attention dearer.
    """
    attention = {"whole": "kept", "blocks": "kept", "fused": "fused"}[route]
    passing = Work(product=n * size.n_layers * size.layer_weights, layers=size.n_layers)
    graph = passing + Work(attention=FORWARD[attention] * _entries(size, n))
    batches = size.n_layers * -(-products // max(1, min(BATCH, TOGETHER // n)))
    back = Work(product=n * size.n_layers * size.layer_weights)
    back += Work(attention=BACKWARD[route] * _entries(size, n))
    return graph.times(1 if route == "whole" else 2) + back.times(products) + Work(layers=batches)
