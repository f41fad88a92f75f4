"""Does every damaged or hostile file end in one OversquashError, and does none load as something that it is not?

    python -m benchmarks.hostile_files [--cases 2400] [--seed 0]

Traces, files and parts of sweeps, run records, and files of prompts are mutated: bytes and stretches of them, and, with
checksums made right again, their JSON and their tensors. Outcomes are counted by kind of file and of mutation:
"refused", "the same" (nothing that is read has changed), "another" (a whole file of other content: what is made of it
must be finite or refused). Exit code 1 on any other exception, on an error of several lines, and on damage that loads
as other content. Run it from the repository.
"""

import argparse
import copy
import json
import math
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch

import oversquash_lens as osl
from oversquash_lens.capture.trace import FORMAT, packed
from oversquash_lens.errors import OversquashError
from oversquash_lens.parts import KEY
from oversquash_lens.storage import sealed
from oversquash_lens.sweeps.prompt_files import read_prompts
from oversquash_lens.sweeps.result import SweepResult

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from bad_days import PROMPT, fresh_model

PROMPTS = [PROMPT, [5, 9, 30], "w7 w8 w9"]
DEEP: list = []
for _ in range(400):
    DEEP = [DEEP]
VALUES: list[Any] = [None, True, -1, 0, 10**30, 0.5, math.nan, math.inf, -math.inf, 1e308, "", "\x1b[2J\u202e", [], {}]
VALUES += [[1, 2], {"a": 1}, ["a"] * 3, DEEP, "x" * 10_000, 2**63, "\ud800"]
NUMBERS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e38)
PIECES = (
    "\u2028",
    "\x85",
    "\x0b",
    "\r",
    "\n",
    "\r\n",
    "\0",
    '"',
    "'",
    ",",
    "\t",
    "\ufeff",
    "\x1b[2J",
    "\u202e",
    "é漢👩",
)
PIECES += (
    "[",
    "]",
    "{",
    "}",
    "null",
    "NaN",
    "1e999",
    "-1",
    "9" * 5000,
    "\ud800",
    "text",
    "=1+1",
    "[" * 5000,
    "\\u0000",
)
OUTCOMES = ("refused", "the same", "another", "WRONG")

# ---------------------------------------------------------------- mutations of bytes


def damaged(data: bytes, draw: random.Random) -> bytes:
    """One to three of: bits flipped, bytes set, cut, longer, a stretch gone, doubled, zeroed or moved."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        size = len(changed)
        start = draw.choice((draw.randrange(size + 1), draw.randrange(min(size, 2000) + 1), max(0, size - 40)))
        stop = min(size, start + draw.choice((1, 1, 2, 8, 100, 5000)))
        kind = draw.randrange(8)
        if kind <= 1 and start < size:
            changed[start] ^= 1 << draw.randrange(8)
        elif kind == 2:
            changed[start:stop] = draw.randbytes(stop - start)
        elif kind == 3:
            del changed[start:]
        elif kind == 4:
            changed[start:start] = draw.choice((b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 5000, draw.randbytes(9)))
        elif kind == 5:
            del changed[start:stop]
        elif kind == 6:
            changed[start:stop] = bytes(stop - start)
        else:
            changed[start:start] = changed[draw.randrange(size + 1) :][:200]
    return bytes(changed)


def written(data: bytes, draw: random.Random) -> bytes:
    """A text with one to three pieces put in, doubled or gone, each of them UTF-8."""
    text = data.decode()
    for _ in range(draw.choice((1, 1, 2, 3))):
        start = draw.randrange(len(text) + 1)
        stop = start + draw.choice((0, 0, 1, 3))
        text = text[:start] + draw.choice((*PIECES, text[:stop], "")) + text[stop:]
    return text.encode("utf-8", "surrogatepass")


def edited(found: Any, draw: random.Random) -> Any:
    """The same JSON with one place of it another value, or gone."""
    found = copy.deepcopy(found)
    places = list(_places(found))
    holder, key = draw.choice(places)
    if draw.random() < 0.2:
        del holder[key]
    else:
        holder[key] = draw.choice(VALUES)
    return found


def _places(found: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(found.items() if isinstance(found, dict) else enumerate(found)):
        yield found, key
        if isinstance(value, dict | list):
            yield from _places(value)


# ---------------------------------------------------------------- kinds of file


class Traces:
    """A trace on either route of attention."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load

        self.path, self.whole, self.parts = folder / "trace", [], []
        for route in ("kept", "recomputed"):
            osl.record(fresh_model(), PROMPT, attention=route).save(self.path)
            payload = self.path.read_bytes()
            header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])["__metadata__"][FORMAT]
            self.whole.append(payload)
            self.parts.append((json.loads(header), load(payload)))

    def mutants(self, draw: random.Random) -> dict[str, Callable[[], bytes]]:
        return {
            "bytes": lambda: damaged(draw.choice(self.whole), draw),
            "header": lambda: (lambda h, t: packed(edited(h, draw), t))(*draw.choice(self.parts)),
            "tensors": lambda: self._tensors(draw),
        }

    def _tensors(self, draw: random.Random) -> bytes:
        header, tensors = draw.choice(self.parts)
        name, changed = draw.choice(sorted(tensors)), dict(tensors)
        tensor, kind = tensors[name].clone(), draw.randrange(7)
        if kind <= 1 and tensor.is_floating_point():
            tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice(NUMBERS)
        elif kind == 2:
            tensor = tensor[..., :-1].contiguous()
        elif kind == 3:
            tensor = tensor.to(draw.choice((torch.int32, torch.bool, torch.float16, torch.int64)))
        elif kind == 4:
            tensor = torch.zeros([10**12, 0])
        elif kind == 5:
            tensor = tensor[None]
        del changed[name]
        if kind != 6:
            changed[draw.choice((name, name, name, "attention.9", "gains.x"))] = tensor
        return packed(header, changed)

    def read(self) -> Any:
        trace = osl.Trace.load(self.path)
        shown = json.dumps([trace.to_dict(), trace.token_ids.tolist(), trace.prediction_input.tolist()], sort_keys=True)
        return shown, trace

    def use(self, found: Any) -> None:
        trace = found[1]
        assert repr(trace)
        for kind in ("proof", "calibrated", "rollout"):
            assert not osl.path_bound(trace, kind).share.isnan().any(), kind
        assert not osl.mean_field_sensitivity(trace).share.isnan().any()
        assert not osl.flow(trace).node.isnan().any()
        osl.squashing(trace)

    def same(self, found: Any) -> bool:
        return found[0] in self._known()

    def _known(self) -> set[str]:
        if not hasattr(self, "_shown"):
            self._shown = set()
            for payload in self.whole:
                self.path.write_bytes(payload)
                self._shown.add(self.read()[0])
        return self._shown


class Sweeps:
    """A finished sweep's file; `parts`: one that was broken off, gone on with."""

    def __init__(self, folder: Path, parts: bool) -> None:
        self.model, self.path = fresh_model(), folder / "rows.parquet"
        osl.sweep(self.model, PROMPTS, ["mean_field", "proof"], self.path)
        self.whole, self.rows = self.path.read_bytes(), self._read_rows()
        self.table = pyarrow.parquet.read_table(self.path)
        self.identity = json.loads(self.table.schema.metadata[KEY])
        self.kept = self.path.with_name("rows.parquet.parts") if parts else None
        self.path.unlink()
        self.place = self.path if self.kept is None else self.kept / "1.parquet"

    def mutants(self, draw: random.Random) -> dict[str, Callable[[], bytes]]:
        return {
            "bytes": lambda: damaged(self.whole, draw),
            "identity": lambda: self._with_identity(json.dumps(edited(self.identity, draw))),
            "identity as bytes": lambda: self._with_identity(damaged(json.dumps(self.identity).encode(), draw)),
            "columns": lambda: self._columns(draw),
        }

    def _with_identity(self, text: str | bytes) -> bytes:
        return self._parquet(self.table.replace_schema_metadata({KEY: text}))

    def _columns(self, draw: random.Random) -> bytes:
        name, kind = draw.choice(self.table.column_names), draw.randrange(3)
        at = self.table.column_names.index(name)
        if kind == 0:
            return self._parquet(self.table.drop_columns([name]))
        if kind == 1:
            return self._parquet(self.table.rename_columns([c if c != name else "x" for c in self.table.column_names]))
        return self._parquet(self.table.set_column(at, name, [draw.choice((["a"] * 3, [1] * 3, [None] * 3))]))

    @staticmethod
    def _parquet(table: Any) -> bytes:
        out = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, out)
        return sealed(out.getvalue().to_pybytes())

    def read(self) -> Any:
        if self.kept is not None:
            (self.kept / "run.json").write_text(json.dumps(self.identity))
            osl.sweep(self.model, PROMPTS, ["mean_field", "proof"], self.path)
        result = SweepResult.load(self.path)
        assert repr(result)
        assert str(result)
        json.dumps(result.to_dict())
        return self._read_rows()

    def _read_rows(self) -> Any:
        rows = SweepResult.load(self.path).table().to_pylist()
        return json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in rows])

    def use(self, found: Any) -> None:
        SweepResult.load(self.path).bands("proof")

    def same(self, found: Any) -> bool:
        return found == self.rows


class RunRecords(Sweeps):
    """The run.json of a sweep that was broken off."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, parts=True)
        assert self.kept is not None
        self.place = self.kept / "run.json"

    def mutants(self, draw: random.Random) -> dict[str, Callable[[], bytes]]:
        text = json.dumps(self.identity)
        return {
            "bytes": lambda: damaged(text.encode(), draw),
            "values": lambda: json.dumps(edited(self.identity, draw)).encode(),
        }

    def read(self) -> Any:
        osl.sweep(self.model, PROMPTS, ["mean_field", "proof"], self.path)
        return self._read_rows()


class Prompts:
    """Files of prompts, whose content may be any: what is read is held against a reading of our own."""

    FILES = {  # noqa: RUF012
        "a.txt": "w5 w9\u2028w7\r\nw8\n\nw3 w4\n".encode(),
        "a.csv": b'name,text\r\nx,"w5, ""w9""\nw7"\r\ny,w3\r\n',
        "a.tsv": b"text\tid\nw5 w9\t7\n",
        "a.json": b'{"x": "w5 w9", "y": [5, 9]}',
        "a.jsonl": b'"w5"\n[5, 9]\n{"text": "w9", "name": "x"}\n[{"role": "user", "content": "w5"}]\n',
    }

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pyarrow.parquet.write_table(pyarrow.table({"text": ["w5 w9", "w3"], "id": [1, 2]}), folder / "a.parquet")
        self.files = self.FILES | {"a.parquet": (folder / "a.parquet").read_bytes()}

    def mutants(self, draw: random.Random) -> dict[str, Callable[[], bytes]]:
        name = draw.choice(sorted(self.files))
        self.place = self.folder / name
        damage = damaged if name == "a.parquet" or draw.random() < 0.3 else written
        return {f"bytes of .{name[2:]}": lambda: damage(self.files[name], draw)}

    def read(self) -> Any:
        found = [(each.name, each.prompt) for each in read_prompts(self.place)]
        if self.place.suffix == ".txt":
            text = self.place.read_bytes()
            coding = "utf-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
            lines = re.split("\r\n|\n|\r", text.decode(coding))
            assert found == [(None, line) for line in lines if line.strip()], "other lines than the file has"
        return found

    def use(self, found: Any) -> None:
        pass

    def same(self, found: Any) -> bool:
        return False


KINDS: dict[str, Callable[[Path], Any]] = {
    "trace": Traces,
    "sweep": lambda folder: Sweeps(folder, parts=False),
    "part": lambda folder: Sweeps(folder, parts=True),
    "run record": RunRecords,
    "prompts": Prompts,
}


def tried(kind: Any, payload: bytes, whole: bool) -> tuple[str, str]:
    """The outcome of one file, and what to say of a wrong one; `whole`: its checksum is right."""
    place = getattr(kind, "place", None) or kind.path
    if getattr(kind, "kept", None) is not None:
        kind.path.unlink(missing_ok=True)
        shutil.rmtree(kind.kept, ignore_errors=True)
        kind.kept.mkdir()
    place.write_bytes(payload)
    try:
        found = kind.read()
        if kind.same(found):
            return "the same", ""
        if not whole:
            return "WRONG", "damage that loads as other content"
        kind.use(found)
    except OversquashError as error:
        return ("refused", "") if str(error).isprintable() else ("WRONG", f"an error of several lines: {error}")
    except Exception as error:
        return "WRONG", f"{type(error).__name__}: {str(error)[:200]}"
    return "another", ""


def run(cases: int, seed: int = 0, only: str | None = None) -> tuple[dict[str, Counter], list[str]]:
    """Outcomes by kind of file and mutation, and what was wrong; `only` one kind of file."""
    counted: dict[str, Counter] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        kinds = {}
        for name, make in KINDS.items():
            if only not in (None, name):
                continue
            (Path(folder) / name).mkdir()
            kinds[name] = make(Path(folder) / name)
        for number in range(cases):
            draw = random.Random(f"{seed} {number}")
            name = list(kinds)[number % len(kinds)]
            mutation, mutate = draw.choice(sorted(kinds[name].mutants(draw).items()))
            outcome, why = tried(kinds[name], mutate(), mutation != "bytes" or name == "run record")
            counted.setdefault(f"{name}: {mutation}", Counter())[outcome] += 1
            if why:
                wrong.append(f"case {number} of seed {seed} ({name}: {mutation}): {why}")
    return counted, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counted, wrong = run(options.cases, options.seed)
    print(f"{'':28}{'cases':>9}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES))
    total: Counter = Counter()
    for name, outcomes in sorted(counted.items()):
        total += outcomes
        print(f"{name:28}{outcomes.total():9}" + "".join(f"{outcomes[outcome]:10}" for outcome in OUTCOMES))
    print(f"{'all':28}{total.total():9}" + "".join(f"{total[outcome]:10}" for outcome in OUTCOMES))
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
