"""By which route the derivatives of a prompt are taken, and the bytes that each route needs."""

from __future__ import annotations

from collections.abc import Iterable

from oversquash_lens.capture.fused import foreign_hooks, why_not_fused
from oversquash_lens.capture.subject import Subject
from oversquash_lens.errors import InputError
from oversquash_lens.memory import BASE, MEMORY_VARIABLE, Size, available_bytes, in_words
from oversquash_lens.paths.blocks import ENTRIES, MOST_ROWS

BATCH = 64  # backward products at a time even where memory allows more: no faster beyond, and the progress bar moves
TOGETHER = (
    1024  # positions of all products of a batch: where a few keep a processor busy, more only fight for its cache
)
TRUTH_ROUTES = ("whole", "blocks", "fused")  # the whole graph, one block's at a time, and that without [dest, src]
FUSED_FROM = 512  # tokens; shorter prompts gain nothing, and their truth is to the last digit what the class computes
COMFORT = 4  # a graph that takes less than one part in so many of the memory that is there is kept whole
CARRIED = 3  # rows of covectors from block to block, what becomes of them, and one batch's of each
# What autograd keeps of one layer: multiples of its activations, and of its [head, dest, src].
GRAPH = {"bridge": (1, 1), "hooked": (2, 3)}
FUSED = 8  # vectors of all heads that fused attention keeps besides: turned, repeated for each head, mixed
ALIVE = 0.4  # of the memory set aside for a batch of backward products, what they are seen to take
SPECTRAL = 4  # whole Jacobians, their copy, their Gram matrices and the eigenvalues' work space
MAPS = 8  # copies of a block of rows, all heads, that bounds and estimate work with
MOST_FROZEN = 2048  # tokens; of more, the truth is measured as it is and not also with attention or norms frozen


def truth_route(subject: Subject, n: int, freeze: Iterable[str] = ()) -> str:
    """One of `TRUTH_ROUTES`: how the truth of n tokens is measured with the memory that is there now."""
    model, size = subject.model, subject.size
    frozen = "attention" in freeze or next(foreign_hooks(model), None) is not None
    if n >= FUSED_FROM and not frozen and why_not_fused(model, subject.architecture) is None:
        return "fused"
    if not subject.function.shown.linked:
        return "whole"  # a block is no function of the one before it alone
    whole = sum(graph_bytes(size, n).values()) + product_bytes(size, n)
    return "whole" if COMFORT * whole <= available_bytes(subject.device) else "blocks"


def products_at_once(n: int, memory: int, one: int) -> int:
    """Backward products in a batch, each of which takes `one` bytes of `memory`."""
    return max(1, min(BATCH, memory // one, TOGETHER // n))


def product_bytes(size: Size, n: int, route: str = "whole") -> int:
    """About what one backward product keeps alive at its widest: attention of one layer, or its MLP."""
    attention = 0 if route == "fused" else 4 * size.n_heads * n * n
    widest = max(attention, 4 * n * (size.d_mlp or 4 * size.d_model))
    return (widest + 6 * n * size.d_model) * size.itemsize


def graph_bytes(size: Size, n: int, route: str = "whole") -> dict[str, int]:
    """One forward pass that can be differentiated, the backward products left out."""
    linear, square = GRAPH[size.kind]
    heads = n * size.n_heads * size.d_head * size.itemsize
    layer = linear * size.position(n) + (FUSED * heads if route == "fused" else square * size.scores(n))
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
    return graph_bytes(size, n, route) | {"a batch of backward products": at_once}


def jacobian_bytes(size: Size) -> int:
    """∂y_n/∂v_i of one position."""
    return size.d_model**2 * size.itemsize


def block_bytes(size: Size, n: int) -> dict[str, int]:
    """A block of rows at work: bounds, estimate and flows take one layer after another, all through the same block."""
    entries = min(ENTRIES["cpu"], size.n_heads * min(MOST_ROWS, n) * n)
    return {"a block of rows": MAPS * entries * max(4, size.itemsize), "the libraries": BASE}


def fitting_memory(
    subject: Subject, n: int, memory: int, *, spectral: bool = False, freeze: Iterable[str] = ("attention",)
) -> int:
    """`memory` for backward products, or what of it there is: fewer products at a time are a little slower.

    Raises InputError where not even one fits beside the graph. Frozen attention needs most.
    """
    size, there = subject.size, available_bytes(subject.device)
    route = truth_route(subject, n, freeze)
    fixed = sum(graph_bytes(size, n, route).values())
    least = sum(truth_bytes(size, n, 1, 0, spectral, route).values())
    if least > there:
        raise InputError(
            f"the truth of {n} tokens needs at least {in_words(least)} of memory beyond what is in use, "
            f"{in_words(fixed)} of it for the graph, and {in_words(there)} are there; expected less than that: take a "
            f"shorter prompt, free some memory, or set {MEMORY_VARIABLE} if you know of more"
        )
    each = (ALIVE + 0.1 if route == "whole" else ALIVE + 1.1) + (SPECTRAL if spectral else 0)
    return max(1, min(memory, int((there - fixed) / each)))
