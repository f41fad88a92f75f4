"""Prompts and a model on the disk for sweeps, and what has to hold of every file that a sweep wrote."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from small_models import D_VOCAB, _llama, tokenizer

MEASURES = ("mean_field", "proof", "flow")


def texts(n: int, seed: int = 0, longest: int = 9) -> list[str]:
    """Texts that the small tokenizer knows, none twice."""
    draw, found = random.Random(seed), {}
    while len(found) < n:
        found[" ".join(f"w{draw.randrange(3, D_VOCAB)}" for _ in range(draw.randrange(2, longest)))] = None
    return list(found)


def model_folder(folder: Path, seed: int = 5) -> Path:
    """A small random Llama as load_model finds it on the disk."""
    torch.manual_seed(seed)
    hf = _llama(2, 16).float()
    hf.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def exactly_once(result: Any, prompts: list[Any]) -> None:
    """Every prompt has one row, in order, in one file that plain pyarrow reads; nothing else is left."""
    table = pyarrow.parquet.read_table(result.path)
    assert table["index"].to_pylist() == list(range(len(prompts)))
    assert table["text"].to_pylist() == [each if isinstance(each, str) else None for each in prompts]
    assert set(table["status"].to_pylist()) <= {"done", "refused"}
    done = [row for row in table.to_pylist() if row["status"] == "done"]
    assert len(done) == result.done
    for row in done:
        assert len(row["token_ids"]) == len(row["tokens"]) == row["n_tokens"] == len(row["mean_field_share"])
        assert math.isclose(sum(row["mean_field_share"]), 1, rel_tol=1e-9)
        thirds = (row[f"mean_field_{third}_third"] for third in ("first", "middle", "last"))
        assert math.isclose(sum(thirds), 1, rel_tol=1e-9)
    assert not result.path.with_name(f"{result.path.name}.parts").exists()


def same_rows(one: Any, other: Any, relative: float = 2e-4) -> None:
    """Equal but for the seconds and for float32's rounding in batches that were put together otherwise."""
    assert one.schema.names == other.schema.names
    for name in one.schema.names:
        if name != "seconds":
            for here, there in zip(one[name].to_pylist(), other[name].to_pylist(), strict=True):
                assert close(here, there, relative), (name, here, there)


def close(here: Any, there: Any, relative: float) -> bool:
    if isinstance(here, list) and isinstance(there, list):
        return len(here) == len(there) and all(close(a, b, relative) for a, b in zip(here, there, strict=True))
    if isinstance(here, float) and isinstance(there, float):
        return math.isclose(here, there, rel_tol=relative, abs_tol=1e-6)
    return here == there
