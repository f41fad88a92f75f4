"""Two small language models of bytes, trained here in minutes, so that nothing is fitted to one model only.

    OMP_NUM_THREADS=1 python -m benchmarks.trained [--folder build/trained]

"learned" is of GPT-2's kind, "deep" of Llama's. They read what every machine with Python has: the standard library
(code), its docstrings, and what the installed packages say of themselves (prose); half of all windows are prose. Every
20th file is held out. Another Python or other packages are another text, and so give other weights.
"""

from __future__ import annotations

import argparse
import ast
import math
import re
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tqdm import tqdm

from oversquash_lens.errors import InputError, one_line
from oversquash_lens.storage import check_place, write_atomically

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

MODELS = ("learned", "deep")
FOLDER = Path("build/trained")
SHAPES: dict[str, dict[str, Any]] = {
    "learned": {"n_layers": 6, "d_model": 192, "d_mlp": 768, "act_fn": "gelu", "normalization_type": "LN"},
    "deep": {
        "n_layers": 14,
        "d_model": 128,
        "d_mlp": 352,
        "act_fn": "silu",
        "gated_mlp": True,
        "normalization_type": "RMS",
        "final_rms": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": 32,
        "rotary_adjacent_pairs": False,
    },
}
SEED = 20261122
D_HEAD, D_VOCAB, N_CTX = 32, 256, 512
# One step reads this many bytes: windows of 256, and in every fourth step of 512, so that all positions are trained.
BYTES_PER_STEP, WINDOW, LONG_EVERY = 2048, 256, 4
STEPS = {"learned": 600, "deep": 600}
WARMUP, PEAK_RATE, LAST_RATE = 50, 2e-3, 1e-4
HELD_OUT_EVERY = 20  # documents
HELD_OUT_WINDOWS = 32  # of 512 bytes, of each kind of text
# Folders of the standard library that are no sources of it, or tables of characters.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
PROSE_FILES = re.compile(r"(licen[cs]e|copying|notice|readme)[^/]*(?<!\.py)$", re.IGNORECASE)
PROMPT = "The function returns a list of "

Texts = dict[str, Tensor]  # kind -> bytes


def trained(name: str, folder: Path = FOLDER) -> HookedTransformer:
    """The model of that name, in eval mode: from `folder` if it is there, else trained now and kept there."""
    if name not in MODELS:
        raise InputError(
            f"{one_line(repr(name), 60)} came as a small trained model; expected one of {', '.join(MODELS)}: give one"
        )
    path = check_place(folder, f"{name}.safetensors")
    if not path.exists():
        model = untrained(name)
        write_atomically(path, save(dict(model.named_parameters()), metadata=train(model, name)))
    return loaded(name, path)


def untrained(name: str) -> HookedTransformer:
    """Random weights, always the same; what attention and MLP write is smaller in a deeper model, as in GPT-2."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape = SHAPES[name]
    cfg = HookedTransformerConfig(
        model_name=f"trained {name}",
        n_heads=shape["d_model"] // D_HEAD,
        d_head=D_HEAD,
        d_vocab=D_VOCAB,
        n_ctx=N_CTX,
        default_prepend_bos=False,
        device="cpu",
        dtype=torch.float32,
        **shape,
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.x announces that 4.x has no such class
        torch.manual_seed(SEED)
        model = HookedTransformer(cfg)
        for block in model.blocks:
            block.attn.W_O /= math.sqrt(2 * cfg.n_layers)
            block.mlp.W_out /= math.sqrt(2 * cfg.n_layers)
    return model


def loaded(name: str, path: Path) -> HookedTransformer:
    model = untrained(name)
    model.load_state_dict({**model.state_dict(), **load_file(path)})
    return model.eval()


def ids_of(text: str) -> Tensor:
    """A text as these models read it: its bytes, [1, pos]."""
    return torch.tensor([list(text.encode())])


# The text


def texts() -> tuple[Texts, Texts]:
    """What is trained on and what is held out, by kind of text."""
    code = list(sources())
    prose = list(once([*map(docstrings, code), *map(own_words, packages())]))  # a file's docstrings at its own place
    kinds = {"code": code, "prose": prose}
    held_out = {kind: joined(documents[::HELD_OUT_EVERY]) for kind, documents in kinds.items()}
    for documents in kinds.values():
        del documents[::HELD_OUT_EVERY]
    return {kind: joined(documents) for kind, documents in kinds.items()}, held_out


def sources() -> Iterator[str]:
    """The standard library's modules, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED.intersection(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="ignore")


def docstrings(source: str) -> str:
    """All docstrings of a module, without its code."""
    try:
        nodes = ast.walk(ast.parse(source))
    except SyntaxError:  # a template, or for another Python
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))
    return "\n\n".join(filter(None, found))


def packages() -> list[Distribution]:
    return sorted(distributions(), key=lambda found: (found.metadata["Name"] or "").lower())


def own_words(package: Distribution) -> str:
    """A package's long description and its licences."""
    description = (package.read_text("METADATA") or "").partition("\n\n")[2]
    files = [file.locate() for file in package.files or () if PROSE_FILES.search(file.as_posix())]
    files = sorted(Path(file) for file in files if Path(file).is_file())
    return "\n\n".join([description, *(file.read_text(encoding="utf-8", errors="ignore") for file in files)])


def once(documents: Iterable[str]) -> Iterator[str]:
    """Every paragraph where it comes first only: packages share their licences."""
    seen: set[str] = set()
    for document in documents:
        paragraphs = [each for each in document.split("\n\n") if each not in seen]
        seen.update(paragraphs)
        yield "\n\n".join(paragraphs)


def joined(documents: list[str]) -> Tensor:
    """One row of bytes, [byte]."""
    return torch.frombuffer(bytearray("\n\n".join(documents).encode()), dtype=torch.uint8)


def windows(found: Texts, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` windows of each kind at random places: ids [window, length + 1], the last byte to be predicted only."""
    rows = []
    for text in found.values():
        starts = torch.randint(len(text) - length, (count, 1), generator=generator)
        rows.append(text[starts + torch.arange(length + 1)])
    return torch.cat(rows).long()


# Training


def train(model: HookedTransformer, name: str) -> dict[str, str]:
    """Train in place; returns what the file says of it: seconds, and bits per byte of held-out text."""
    reading, held_out = texts()
    began, steps = time.perf_counter(), STEPS[name]
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    bar = tqdm(range(steps), desc=f"training {name!r}", unit="step")
    for step in bar:
        length = N_CTX if step % LONG_EVERY == LONG_EVERY - 1 else WINDOW
        ids = windows(reading, BYTES_PER_STEP // length // len(reading), length, generator)
        loss = cross_entropy(logits(model, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"{loss.item() / math.log(2):.2f} bits per byte")
    said = {"seconds": f"{time.perf_counter() - began:.0f}"}
    return said | {kind: f"{bits(model, {kind: text}):.3f}" for kind, text in held_out.items()}


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a straight line up, half a cosine down."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    least = LAST_RATE / PEAK_RATE
    return least + (1 - least) * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))) / 2


def logits(model: HookedTransformer, ids: Tensor) -> Tensor:
    """The model's own forward pass with fused attention, which keeps no pattern."""
    residual = model.embed(ids)
    if model.cfg.positional_embedding_type == "standard":
        residual = residual + model.pos_embed(ids)
    for block in model.blocks:
        residual = residual + attended(block.attn, block.ln1(residual))
        residual = residual + block.mlp(block.ln2(residual))
    return model.unembed(model.ln_final(residual))


def attended(attention: Any, normed: Tensor) -> Tensor:
    """What an attention layer writes."""
    query, key, value = attention.calculate_qkv_matrices(normed, normed, normed)
    if attention.cfg.positional_embedding_type == "rotary":
        query, key = attention.apply_rotary(query), attention.apply_rotary(key)
    heads_first = (each.transpose(1, 2) for each in (query, key, value))
    mixed = scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    return mixed.flatten(2) @ attention.W_O.flatten(0, 1) + attention.b_O


@torch.no_grad()
def bits(model: HookedTransformer, held_out: Texts) -> float:
    """Bits per byte of held-out windows, by the hooked model itself."""
    ids = windows(held_out, HELD_OUT_WINDOWS, N_CTX, torch.Generator().manual_seed(SEED))
    losses = [cross_entropy(model(row[None, :-1])[0], row[1:]) for row in ids]
    return torch.stack(losses).mean().item() / math.log(2)


@torch.no_grad()
def continuation(model: HookedTransformer, prompt: str, count: int) -> str:
    """`count` bytes, drawn as the model says, and the prompt before them."""
    generator, ids = torch.Generator().manual_seed(SEED), ids_of(prompt)
    for _ in range(count):
        following = torch.multinomial(model(ids)[0, -1].softmax(0), 1, generator=generator)
        ids = torch.cat([ids, following[None]], dim=1)
    return bytes(ids[0].tolist()).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    for name in MODELS:
        model = trained(name, options.folder)
        size = sum(parameter.numel() for parameter in model.parameters())
        with safe_open(options.folder / f"{name}.safetensors", "pt") as file:
            said = file.metadata()
        print(f"{model.cfg.model_name}: {size:,} parameters, trained in {said['seconds']} s")
        print(f"    bits per byte, held out: code {said['code']}, prose {said['prose']}")
        print(f"    {continuation(model, PROMPT, 100)!r}", flush=True)


if __name__ == "__main__":
    main()
