"""The lens on a GPU: time and peak memory over the forward pass's own, and how far the sweep is from its floor.

    python -m benchmarks.gpu [--models smollm2 llama3-8b] [--lengths 8192 32768] [--repeats 5]
    python -m benchmarks.gpu --device cpu --tiny

bfloat16. `llama3-8b` is a Llama-3-8B's shape with random weights, made on the device: no hub. `forward` is Hugging
Face's own pass with fused attention and the last position's logits alone, before the model is bridged; the lens is
record, every bound and the mean-field estimate, attention recomputed. The sweep's floor is what its least work
would take at the speeds that this device shows on one large float32 product (the sweep computes in float32) and one
large copy: the causal half of two products of the attention's own shape, and q, k and v of each layer read once.
`--tiny` shows that it runs, no more.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import oversquash_lens as osl
from benchmarks.table import DASH, gigabytes, markdown
from oversquash_lens.models.loading import load_twin
from oversquash_lens.models.sources import Weights
from oversquash_lens.paths.kinds import VARIANTS
from oversquash_lens.paths.profiles import profiles

SHAPES = {
    "llama3-8b": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0},
    },
    "tiny": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000.0},
    },
}
NEAR = 1.5  # times the floor: beyond it a kernel of our own would be worth writing
PRODUCT, COPY = 8192, 1 << 30  # side of the product and bytes of the copy that time the device
KINDS = (*VARIANTS, "mean_field")


@dataclass(frozen=True)
class Speeds:
    """What the device does in a second."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Measured:
    """Median seconds of a step, and the most memory it held, weights included: None where the device keeps no count."""

    seconds: float
    peak: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2", "llama3-8b"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short prompts, to see that it runs")
    options = parser.parse_args()
    device = torch.device(options.device)
    models, lengths = (["tiny"], [32, 64]) if options.tiny else (options.models, options.lengths)
    speeds = speeds_of(device, 256 if options.tiny else PRODUCT, 1 << 20 if options.tiny else COPY)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"{name}, torch {torch.__version__}: {speeds.flops / 1e12:.3g} TFLOP/s, {speeds.bytes / 1e9:.3g} GB/s\n")
    rows = [("model", "n", "forward", "lens", "lens over forward", "peak memory", "over forward’s", "sweep over floor")]
    for each in models:
        rows += rows_of(each, lengths, device, options.repeats, speeds)
    print(markdown(rows, words=1))


def rows_of(name: str, lengths: list[int], device: torch.device, repeats: int, speeds: Speeds) -> list[tuple[str, ...]]:
    """One line for each length; bridging changes the modules in place, so the plain passes come first."""
    weights = plain_model(name, max(lengths), device)
    tokens = {n: torch.randint(5, 200, (n,), generator=torch.Generator().manual_seed(0)) for n in lengths}
    forward = {n: measured(partial(read, weights.model, tokens[n]), device, repeats) for n in lengths}
    model = bridged(weights)
    del weights
    return [row(name, model, tokens[n], forward[n], repeats, speeds) for n in lengths]


def plain_model(name: str, longest: int, device: torch.device) -> Weights:
    """SmolLM2, or a random Llama of a known shape, as transformers has it."""
    if name == "smollm2":
        weights = load_twin(dtype="bfloat16", device=str(device))
        # Rotary positions go on beyond what it was trained on: its words are nonsense there, its time is not.
        config = weights.model.config
        config.max_position_embeddings = max(longest, config.max_position_embeddings)
        return weights
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(SHAPES[name])
    rope = {"rope_theta": shape.pop("rope_theta"), "rope_type": "default"}
    config = LlamaConfig(**shape, rope_parameters=rope, max_position_embeddings=longest, tie_word_embeddings=False)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # no float32 copy on the way
    try:
        with device:
            llama = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return Weights(llama, spelling(), f"{name}, random weights")


def bridged(weights: Weights) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    place = {"dtype": torch.bfloat16, "device": str(weights.model.device)}
    model = TransformerBridge.boot_transformers(
        weights.label, hf_model=weights.model, tokenizer=weights.tokenizer, **place
    )
    model.cfg.model_name = weights.label
    return model.eval()


def spelling() -> Any:
    """As much of a tokenizer as a bridge asks for: its words are the numbers of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(256)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="1", eos_token="2", pad_token="2", unk_token="0"
    )
    # Else TransformerLens looks for its source, to load it anew.
    tokenizer.init_kwargs |= {"add_bos_token": True, "name_or_path": ""}
    return tokenizer


def row(
    name: str, model: Any, tokens: torch.Tensor, forward: Measured, repeats: int, speeds: Speeds
) -> tuple[str, ...]:
    """The trace of the sweep that is timed alone is let go before the lens is."""
    device = next(model.parameters()).device
    trace = osl.record(model, tokens, attention="recomputed")
    sweep = measured(partial(profiles, trace, KINDS), device, repeats)
    near = sweep.seconds / sweep_floor(trace, speeds)
    del trace
    lens = measured(lambda: profiles(osl.record(model, tokens, attention="recomputed"), KINDS), device, repeats)
    return (
        *(name, f"{len(tokens):,}", f"{forward.seconds:.3g} s", f"{lens.seconds:.3g} s"),
        f"{lens.seconds / forward.seconds:.2f}",
        gigabytes(lens.peak),
        DASH if lens.peak is None else f"{lens.peak / forward.peak:.2f}",
        f"{near:.2f} ({'within' if near <= NEAR else '**beyond**'} {NEAR})",
    )


def read(model: Any, tokens: torch.Tensor) -> None:
    """One pass of the plain transformers model, as a prompt is read."""
    with torch.no_grad():
        model(tokens[None].to(model.device), use_cache=False, logits_to_keep=1)


def sweep_floor(trace: osl.Trace, speeds: Speeds) -> float:
    """Seconds that the least work of the sweep takes, at the device's speed: whichever of products and bytes is slower.

    Causal half of the scores q·k and, for the key side's distances, of one product with the values.
    """
    n, about = trace.n_positions, trace.about
    value = trace.gains.value
    width = about.n_heads * value.shape[-1]
    flops = trace.n_layers * 2 * (2 * n * n * width) / 2
    held = trace.n_layers * n * (width + 2 * value.shape[1] * value.shape[-1]) * value.element_size()
    return max(flops / speeds.flops, held / speeds.bytes)


def measured(step: Callable[[], object], device: torch.device, repeats: int) -> Measured:
    """The first run warms up; the device is asked to finish before the clock is read."""
    step()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    taken = []
    for _ in range(repeats):
        wait(device)
        begun = time.perf_counter()
        step()
        wait(device)
        taken.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    return Measured(statistics.median(taken), peak)


def speeds_of(device: torch.device, side: int, size: int) -> Speeds:
    """Timed on one product of float32 matrices and one copy: what a kernel can hope for here."""
    one = torch.randn(side, side, device=device)
    block = torch.empty(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    product = measured(lambda: one @ one, device, 5).seconds
    copy = measured(lambda: other.copy_(block), device, 5).seconds
    return Speeds(2 * side**3 / product, 2 * size / copy)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
