"""Random models for property tests: architecture, weights, prompt and number format drawn from one seed.

`draw(seed)` says what the case is (and can be printed), `build(case)` makes the model and its tokens. Weights are
drawn by kind: Gaussian ones, and the ways in which real weights are not (heavy tails, low rank, one huge coordinate,
dead heads, sharp attention, matrices of wildly different sizes, an output matrix that is nearly singular).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from small_models import D_VOCAB, N_CTX, has_hooked, hooked, random_spec, tokens_for
from zoo import CELLS, lacking, zoo

import oversquash_lens as osl
from oversquash_lens.errors import HookMismatchError, ModelError

SINK = 1  # the token that plays BOS
LENGTHS = (2, 3, 4, 5, 6, 7, 8, 12, 16)
DTYPES = {"float64": torch.float64, "float32": torch.float32}

LOCAL = {"use_local_attn": True, "window_size": 3}
# Name -> what it adds to the HookedTransformer that `random_spec` drew.
DRAWN: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "window": LOCAL,
    "alibi": {"positions": "alibi"},
    "inverse layer scale": {"scale_attn_by_inverse_layer_idx": True},
    "folded": {},
    "parallel": {"parallel_attn_mlp": True},
    "post-norms": {"use_normalization_before_and_after": True, "norm": "RMS"},
    "normalised queries": {"use_qk_norm": True, "norm": "RMS"},
    "capped scores": {"attn_scores_soft_cap": 1.5},
    "post-norms, normalised queries": {
        "use_normalization_before_and_after": True,
        "use_qk_norm": True,
        "norm": "RMS",
        "eps": 0.03,
    },
    "parallel, window, caps": {"parallel_attn_mlp": True, **LOCAL, "attn_scores_soft_cap": 1.5},
    "normalised queries, window, caps": {"use_qk_norm": True, "norm": "RMS", **LOCAL, "attn_scores_soft_cap": 1.5},
    "attention-only": {"attn_only": True},
    "no norms": {"norm": None},
}


@dataclass(frozen=True)
class Case:
    """One random model on one random prompt; everything follows from these fields."""

    seed: int
    architecture: str  # of DRAWN, or "family, kind" of the zoo
    weights: str  # of WEIGHTS
    prompt: str  # of PROMPTS
    n: int
    dtype: str  # of DTYPES

    def __str__(self) -> str:
        return f"draw({self.seed}): {self.architecture}, {self.weights}, {self.prompt} × {self.n}, {self.dtype}"

    @property
    def epsilon(self) -> float:
        """Of the coarsest format inside: Hugging Face's norms, softmax and rotations are float32 at best, and so
        are the experts of HookedTransformer.
        """
        widest = self.dtype if self.architecture in DRAWN else "float32"
        return torch.finfo(DTYPES[widest]).eps


@cache
def architectures() -> tuple[str, ...]:
    """What the installed TransformerLens can make and the package does not refuse."""
    drawn = tuple(DRAWN) if has_hooked() else ()
    cells = tuple(f"{name}, {kind}" for name, kind in CELLS if not lacking(name, kind))
    return tuple(name for name in drawn + cells if not refused(name))


@cache
def refused(architecture: str) -> str:
    """Why the package refuses to record this architecture; "" where it records it."""
    model, tokens = build(Case(0, architecture, "Gaussian", "random", 5, "float64"))
    try:
        osl.record(model, tokens)
    except (ModelError, HookMismatchError) as error:
        return str(error)
    return ""


def draw(seed: int, architecture: str | None = None, weights: str | None = None, dtype: str | None = None) -> Case:
    """A case: what is given is kept, the rest drawn; drawn structures and the cells of the zoo take turns."""
    rng = random.Random(f"case {seed}")
    halves = [[name for name in architectures() if (name in DRAWN) is drawn] for drawn in (True, False)]
    halves = [half for half in halves if half]
    half = halves[seed % len(halves)]
    chosen = half[seed // len(halves) % len(half)]
    return Case(
        seed,
        architecture or chosen,
        weights or rng.choice(list(WEIGHTS)),
        rng.choice(list(PROMPTS)),
        rng.choice(LENGTHS),
        dtype or rng.choice(list(DTYPES)),
    )


def build(case: Case) -> tuple[Any, torch.Tensor]:
    """(model, tokens [1, n])."""
    dtype, seed = DTYPES[case.dtype], case.seed
    if case.architecture in DRAWN:
        model = hooked(seed, dtype=dtype, **_drawn_config(case))
    else:
        model = zoo(*case.architecture.split(", "), seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in getattr(model, "original_model", model).named_parameters():
            parameter.copy_(WEIGHTS[case.weights](name, parameter.double(), generator))
    if case.architecture == "folded":
        model.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=seed % 2 == 0)
    return model, PROMPTS[case.prompt](seed, case.n)


def _drawn_config(case: Case) -> dict[str, Any]:
    config = random_spec(case.seed) | DRAWN[case.architecture]
    if "window_size" in config:
        config["attn_types"] = [("local", "global")[(layer + case.seed) % 2] for layer in range(config["n_layers"])]
    return config


# --- prompts ---


def _sink_first(seed: int, n: int) -> torch.Tensor:
    tokens = tokens_for(seed, n)
    tokens[0, 0] = SINK
    return tokens


PROMPTS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "random": tokens_for,
    "one token repeated": lambda seed, n: tokens_for(seed, 1).expand(1, n).clone(),
    "sink, then random": _sink_first,
    "two tokens in turn": lambda seed, n: tokens_for(seed, 2).repeat(1, n)[:, :n],
}
assert max(LENGTHS) <= N_CTX
assert SINK < D_VOCAB


# --- weights: (name, value in float64, generator) -> value ---

Reshaped = Callable[[str, torch.Tensor, torch.Generator], torch.Tensor]


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "wte", "wpe", "lm_head", "unembed", "word_embeddings"))


def _is_matrix(name: str, value: torch.Tensor) -> bool:
    """A matrix that multiplies activations; HookedTransformer's biases of all heads have two axes, too."""
    return value.ndim >= 2 and not _is_embedding(name) and not name.split(".")[-1].removeprefix("_").startswith("b_")


def _heavy_tailed(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gaussian over the root of χ²₂/2: Student's t with 2 degrees of freedom, whose variance is infinite."""
    if not _is_matrix(name, value):
        return value
    uniform = torch.rand(value.shape, generator=generator, dtype=torch.float64).clamp(min=1e-9)
    return value / (-uniform.log()).sqrt()


def _rank_deficient(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not _is_matrix(name, value):
        return value
    u, s, v = torch.linalg.svd(value, full_matrices=False)
    s[..., 1 + int(torch.randint(0, 2, (), generator=generator)) :] = 0
    return u @ (s[..., None] * v)


def _massive(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One coordinate of the sink token's embedding is a few hundred times what the others are."""
    table = value.ndim == 2 and _is_embedding(name) and "unembed" not in name and "lm_head" not in name
    if table and "pos" not in name and "wpe" not in name:
        value = value.clone()
        value[SINK, int(torch.randint(0, value.shape[1], (), generator=generator))] = 300.0
    return value


def _nearly_zero(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return 1e-6 * value if _is_matrix(name, value) else value


def _badly_scaled(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every matrix, norm and bias by its own power of ten, 10^-2 … 10^2."""
    return value * 10 ** float(4 * torch.rand((), generator=generator) - 2)


def _dead_heads(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of every matrix's first axis is zero: heads, or outputs."""
    if not _is_matrix(name, value):
        return value
    alive = torch.rand(value.shape[0], generator=generator) < 0.5
    return value * alive.view(-1, *[1] * (value.ndim - 1))


def _sharp(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Queries and keys six times as long: attention on one position, but for a little."""
    names = ("W_Q", "W_K", "q_proj", "k_proj", "c_attn", "query_key_value")
    return 6 * value if any(part in name for part in names) else value


def _ill_conditioned(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The singular values of every matrix fall from 1 to 1e-6 of the largest."""
    if not _is_matrix(name, value):
        return value
    u, s, v = torch.linalg.svd(value, full_matrices=False)
    fall = torch.logspace(0, -6, s.shape[-1], dtype=torch.float64)
    return u @ ((s[..., :1] * fall)[..., None] * v)


def _alike(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Matrices as near to orthogonal as their shape allows: nothing is lost on the way, so bounds are tightest."""
    if not _is_matrix(name, value):
        return value
    u, _, v = torch.linalg.svd(value, full_matrices=False)
    return u @ v


WEIGHTS: dict[str, Reshaped] = {
    "Gaussian": lambda name, value, generator: value,
    "heavy-tailed": _heavy_tailed,
    "rank-deficient": _rank_deficient,
    "massive activation": _massive,
    "nearly zero": _nearly_zero,
    "badly scaled": _badly_scaled,
    "dead heads": _dead_heads,
    "sharp attention": _sharp,
    "ill-conditioned": _ill_conditioned,
    "orthogonal": _alike,
}
