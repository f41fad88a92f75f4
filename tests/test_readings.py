"""read(): however few the passes, each sequence's last token is what a pass of its own gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import N_CTX, NO_BRIDGE, NO_HOOKED, bridge, has_bridge, has_hooked, hooked, tokens_for
from zoo import zoo

import oversquash_lens as osl
from oversquash_lens.capture import prefixes, readings
from oversquash_lens.capture.prefixes import plan
from oversquash_lens.capture.readings import Readings, logits_of, read, read_alone
from oversquash_lens.capture.subject import Subject
from oversquash_lens.errors import HookMismatchError, ModelError

Model = Any
Watch = Callable[..., dict[str, torch.Tensor]]
Ids = tuple[int, ...]

HOOKED: dict[str, dict[str, Any]] = {
    "ln-learned": {"norm": "LN", "n_layers": 3},
    "ln-gated-rotary": {"norm": "LN", "gated": True, "positions": "rotary"},
    "rms-gated-rotary-gqa": {
        "norm": "RMS",
        "gated": True,
        "act": "silu",
        "positions": "rotary",
        "n_heads": 4,
        "kv_heads": 2,
        "d_model": 16,
    },
    "rms-learned-mqa": {"norm": "RMS", "act": "relu", "kv_heads": 1},
    "shortformer": {"positions": "shortformer"},
    "no-norms": {"norm": None, "strength": 0.3},
    "parallel": {"parallel_attn_mlp": True},
    "alibi": {"positions": "alibi"},
    "local": {"use_local_attn": True, "attn_types": ["global", "local"], "window_size": 4},
}
# How near two ways to the same number come with float64 weights. Hugging Face's classes but GPT-2 compute norms,
# softmax or rotations in float32 whatever the weights are.
EXACT, HALFWAY = 1e-12, 2e-6
SHARING = {
    **dict.fromkeys((f"hooked-{name}" for name in HOOKED if name not in ("alibi", "local")), EXACT),
    "bridge-gpt2": EXACT,
    **dict.fromkeys(("bridge-llama", "bridge-mistral", "bridge-qwen2", "bridge-gemma"), HALFWAY),
    # All layers see a window, or every second one.
    **dict.fromkeys(("bridge-mistral-window", "bridge-gemma2", "bridge-gemma3"), HALFWAY),
}
# Models that with a cache and a mask answer otherwise than without, or not at all.
NOT_SHARING = {
    "hooked-alibi": EXACT,  # counts the masked positions as distance
    "hooked-local": EXACT,  # … and in its window
    "bridge-bloom": HALFWAY,  # takes no mask of four axes
}
ALL = SHARING | NOT_SHARING
PARTS = ("residuals", "prediction_input", "heads", "attention_shift", "self_attention")


def made(name: str) -> Model:
    """A new model; skips the test where this TransformerLens lacks the class."""
    kind, _, label = name.partition("-")
    if kind == "hooked":
        if not has_hooked():
            pytest.skip(NO_HOOKED)
        return hooked(7, **HOOKED[label])
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    return bridge(8, label) if label in ("gpt2", "llama") else zoo(label, "bridge", 8)


def endings() -> list[Ids]:
    """Sequences up to the model's whole reach that leave one trunk early and late, with endings of several lengths."""
    whole = tuple(tokens_for(1, N_CTX)[0].tolist())
    found = [whole]
    for fork in (3, 6, 9, 12):
        found += [whole[:fork], (*whole[:fork], 7), (*whole[:fork], 7, 7), (*whole[:fork], 8, 9)]
    return [*found, (*whole[:12], 9, 9, 9)]


def asked(sequences: list[Ids]) -> list[bool]:
    return [i % 2 == 0 or len(ids) == 5 for i, ids in enumerate(sequences)]


def own_passes(model: Model, sequences: list[Ids], watch: Watch) -> dict[str, torch.Tensor]:
    """Every part read off each sequence's own pass, whole patterns kept, heads gone through one by one."""
    layers = range(len(model.blocks))
    residuals = [*(f"blocks.{i}.hook_resid_pre" for i in layers), f"blocks.{layers[-1]}.hook_resid_post"]
    patterns = [f"blocks.{i}.attn.hook_pattern" for i in layers]
    z = f"blocks.{layers[-1]}.attn.hook_z"
    found: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS}
    for ids in sequences:
        seen = watch(model, torch.tensor([ids]), *residuals, *patterns, z, "unembed.hook_in")
        found["residuals"].append(torch.stack([seen[name][0, -1] for name in residuals]))
        found["prediction_input"].append(seen["unembed.hook_in"][0, -1])
        found["heads"].append(seen[z][0, -1])
        shift, kept = [], []
        for pattern in (seen[name][0].double() for name in patterns):
            per_head = [sum(abs(a - b) for a, b in zip(*head[-2:].tolist(), strict=True)) for head in pattern]
            shift.append(sum(per_head) / len(per_head))
            kept.append(sum(head[-1, -1].item() for head in pattern) / len(pattern))
        found["attention_shift"].append(torch.tensor(shift, dtype=torch.float64))
        found["self_attention"].append(torch.tensor(kept, dtype=torch.float64))
    return {part: torch.stack(values, 0 if part in PARTS[1:3] else 1) for part, values in found.items()}


def off(found: Readings, truth: dict[str, torch.Tensor], compared: list[bool]) -> float:
    """Largest difference of any part, relative to its largest entry; what was not asked for is nan."""
    worst = 0.0
    for part in PARTS:
        a, b = getattr(found, part).double(), truth[part].double()
        if part in PARTS[3:]:
            assert a[:, [not one for one in compared]].isnan().all()
            a, b = a[:, compared], b[:, compared]
        assert a.shape == b.shape
        assert not a.isnan().any()
        worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
    return worst


# ---------------------------------------------------------------- as each sequence's own pass


@pytest.mark.parametrize("name", ALL)
def test_each_last_token_is_that_of_a_pass_of_its_own(name: str, watch: Watch) -> None:
    model, sequences = made(name), endings()
    truth = own_passes(model, sequences, watch)
    compared = asked(sequences)
    found = read(Subject.of(model), sequences, compared=compared)
    assert found.shared == (name in SHARING)
    assert off(found, truth, compared) <= ALL[name]
    apart = read(Subject.of(model), sequences, compared=compared, share=False)
    assert (apart.shared, apart.passes, apart.tokens) == (False, len(sequences), sum(map(len, sequences)))
    assert off(apart, truth, compared) <= 1e-15


@pytest.mark.parametrize("name", SHARING)
def test_a_trunk_and_its_endings_are_few_passes(name: str) -> None:
    model, sequences = made(name), endings()
    found, whole = read(Subject.of(model), sequences), plan(sequences)
    assert found.tokens == whole.tokens < sum(map(len, sequences)) / 3
    sizes = [{len(branch.suffix) for branch in trunk.branches} for trunk in whole.trunks]
    # A bridge runs all endings of a trunk at once, a HookedTransformer those of one length.
    assert found.passes == len(sizes) + sum(len(one) if name.startswith("hooked") else bool(one) for one in sizes)
    assert found.attention_shift.isnan().all()
    assert found.self_attention.isnan().all()


@pytest.mark.parametrize("name", NOT_SHARING)
def test_where_endings_cannot_be_shared_prefixes_still_are(name: str) -> None:
    model, sequences = made(name), endings()
    found = read(Subject.of(model), sequences)
    leaves = len(plan(sequences, branching=False).trunks)
    assert found.passes == leaves < len(sequences)


@pytest.mark.parametrize("name", ALL)
def test_a_chain_is_one_pass_on_every_model(name: str, watch: Watch) -> None:
    """Prefixes need no cache, so whatever the positions and the window, one pass is enough."""
    model = made(name)
    whole = tuple(tokens_for(2, N_CTX)[0].tolist())
    chain = [whole[:k] for k in range(2, N_CTX + 1)]
    found = read(Subject.of(model), chain, compared=[True] * len(chain))
    assert (found.shared, found.passes, found.tokens) == (True, 1, N_CTX)
    assert off(found, own_passes(model, chain, watch), [True] * len(chain)) <= ALL[name]


@pytest.mark.parametrize("name", SHARING)
def test_many_endings_go_through_in_chunks(name: str, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """More endings than one pass takes: the cache must be as before for each further one."""
    monkeypatch.setattr(prefixes, "TOKENS", 5)
    model, sequences = made(name), endings()
    compared = asked(sequences)
    found = read(Subject.of(model), sequences, compared=compared)
    assert found.shared
    assert found.passes > 4
    assert off(found, own_passes(model, sequences, watch), compared) <= ALL[name]


@pytest.mark.parametrize("name", ["hooked-ln-learned", "bridge-llama"])
def test_rows_are_compared_in_pieces(name: str, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "ROWS", 3)
    model = made(name)
    whole = tuple(tokens_for(2, N_CTX)[0].tolist())
    chain = [whole[:k] for k in (2, 3, 4, 5, 6, 11, 12, 15, 16)]
    found = read(Subject.of(model), chain, compared=[True] * len(chain))
    assert off(found, own_passes(model, chain, watch), [True] * len(chain)) <= ALL[name]


@pytest.mark.parametrize("name", ["hooked-ln-learned", "bridge-gpt2", "bridge-llama"])
def test_it_meets_what_record_gives(name: str) -> None:
    model, sequences = made(name), endings()
    found = read(Subject.of(model), sequences, compared=[True] * len(sequences))
    for i in (0, 3, 7, len(sequences) - 1):
        trace = osl.record(model, list(sequences[i]))
        n = trace.n_positions
        assert torch.allclose(found.prediction_input[i].double(), trace.prediction_input, rtol=0, atol=1e-5)
        assert torch.allclose(found.residuals[:, i].double(), trace.last_residuals, rtol=0, atol=1e-5)
        for layer in range(trace.n_layers):
            before, last = trace.attention[layer].rows(n - 2, n).double().unbind(1)
            assert found.attention_shift[layer, i].item() == pytest.approx(
                (last - before).abs().sum(1).mean().item(), abs=1e-6
            )


def test_a_pair_beside_a_longer_trunk_has_its_attention_row_before(watch: Watch) -> None:
    """(…, 1) and (…, 1, 1) where the trunk goes on otherwise: the row before the second 1 is in the branch's pass."""
    model = made("bridge-gpt2")
    lead = tuple(tokens_for(4, 8)[0].tolist())
    sequences = [(*lead, 9), (*lead, 9, 9), (*lead, 9, 3, 4, 5), (*lead, 8), (*lead, 8, 8)]
    compared = [False, True, False, False, True]
    found = read(Subject.of(model), sequences, compared=compared)
    assert found.shared
    assert off(found, own_passes(model, sequences, watch), compared) <= EXACT


def test_the_same_sequence_twice_is_read_twice() -> None:
    model = made("bridge-gpt2")
    sequences = [(5, 6, 7), (5, 6), (5, 6, 7)]
    found = read(Subject.of(model), sequences, compared=[True] * 3)
    assert torch.equal(found.prediction_input[0], found.prediction_input[2])
    assert torch.equal(found.attention_shift[:, 0], found.attention_shift[:, 2])
    assert not found.attention_shift.isnan().any()


@pytest.mark.parametrize("name", ["hooked-rms-gated-rotary-gqa", "bridge-llama"])
def test_bfloat16_shares_too(name: str) -> None:
    model = made(name).to(torch.bfloat16)
    sequences = endings()
    shared = read(Subject.of(model), sequences, compared=[True] * len(sequences))
    alone = read(Subject.of(model), sequences, compared=[True] * len(sequences), share=False)
    assert shared.shared
    assert shared.prediction_input.dtype == shared.residuals.dtype == torch.bfloat16
    gap = (shared.prediction_input.double() - alone.prediction_input.double()).norm(dim=1)
    assert (gap <= 0.03 * alone.prediction_input.double().norm(dim=1)).all()
    assert torch.allclose(shared.attention_shift, alone.attention_shift, atol=0.05)


@pytest.mark.parametrize("name", ["hooked-ln-learned", "bridge-gpt2"])
def test_a_batch_and_the_model_s_own_logits(name: str, watch: Watch) -> None:
    model, ids = made(name), (5, 9, 7, 7)
    subject = Subject.of(model)
    truth = own_passes(model, [ids], watch)
    for batch in (1, 3):
        y, heads = read_alone(subject, ids, batch=batch)
        assert torch.allclose(y, truth["prediction_input"][0], rtol=0, atol=1e-12)
        assert torch.allclose(heads, truth["heads"][0], rtol=0, atol=1e-12)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    assert torch.allclose(logits_of(subject, y[None])[0], logits, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- when the cache lies


@pytest.mark.parametrize("name", ["hooked-ln-learned", "bridge-gpt2"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_cache_that_lies_is_found_out(name: str, layer: int, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of one layer's cache a tenth too large: no ending is read from it."""
    model, sequences = made(name), endings()
    run_trunk = readings.run_trunk

    def lying(*arguments: Any, **options: Any) -> Any:
        cache = run_trunk(*arguments, **options)
        if options.get("cached"):
            if name.startswith("hooked"):
                cache.entries[layer].past_values = cache.entries[layer].past_values * 1.1
            else:
                cache.layers[layer].values = cache.layers[layer].values * 1.1
        return cache

    monkeypatch.setattr(readings, "run_trunk", lying)
    compared = asked(sequences)
    found = read(Subject.of(model), sequences, compared=compared)
    assert not found.shared
    assert off(found, own_passes(model, sequences, watch), compared) <= EXACT


@pytest.mark.parametrize("wrong", [-1, 1])
def test_positions_that_are_off_are_found_out(wrong: int, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sequences = made("bridge-llama"), endings()
    positions = prefixes.branch_positions
    monkeypatch.setattr(prefixes, "branch_positions", lambda branches: positions(branches) + wrong)
    found = read(Subject.of(model), sequences)
    assert not found.shared
    truth = own_passes(model, sequences, watch)
    assert torch.allclose(found.prediction_input, truth["prediction_input"], rtol=0, atol=1e-5)


def test_an_error_with_the_cache_only_does_not_stop_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: Any) -> None:
        raise RuntimeError("no mask of four axes here")

    model, sequences = made("bridge-gpt2"), endings()
    monkeypatch.setattr(readings, "run_branches", refuses)
    found = read(Subject.of(model), sequences)
    assert not found.shared
    alone = read(Subject.of(model), sequences, share=False)
    assert torch.allclose(found.prediction_input, alone.prediction_input, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- beside the user's own hooks


@pytest.mark.parametrize("name", SHARING)
def test_what_is_read_is_what_the_user_s_edits_make(name: str, watch: Watch) -> None:
    """Edits that every position gets alike, in the residual stream, the heads and the final norm, leave sharing be."""
    model, sequences = made(name), endings()
    subject = Subject.of(model)
    plain = read(subject, sequences)
    edits = {
        "blocks.1.hook_resid_pre": lambda value, hook: 1.5 * value,
        "blocks.1.attn.hook_z": lambda value, hook: value + 0.25,
        "ln_final.hook_normalized": lambda value, hook: value + 0.125,
    }
    for point, edit in edits.items():
        if point in model.hook_dict:  # a model without norms has no final one
            model.hook_dict[point].add_hook(edit)
    compared = asked(sequences)
    found = read(subject, sequences, compared=compared)
    assert found.shared
    assert off(found, own_passes(model, sequences, watch), compared) <= ALL[name]
    assert (found.prediction_input - plain.prediction_input).abs().max() > 0.1


@pytest.mark.parametrize("name", ["hooked-ln-learned", "bridge-gpt2", "bridge-llama"])
def test_an_edit_of_one_position_is_not_shared(name: str, watch: Watch) -> None:
    """In a branch's pass column 2 is not position 2."""
    model, sequences = made(name), endings()

    def louder(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[:, 2] = 3 * value[:, 2]
        return value

    model.hook_dict["blocks.1.hook_resid_pre"].add_hook(louder)
    found = read(Subject.of(model), sequences)
    assert not found.shared
    truth = own_passes(model, sequences, watch)
    assert torch.allclose(found.prediction_input, truth["prediction_input"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["hooked-ln-learned", "bridge-gpt2", "bridge-llama"])
def test_an_edited_pattern_is_the_one_compared(name: str, watch: Watch) -> None:
    model, sequences = made(name), endings()

    def halfway(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        """Half of each row goes to the position itself."""
        past = pattern.shape[3] - pattern.shape[2]
        own = torch.ones_like(pattern).triu(past).tril(past)
        return (pattern + own) / 2

    for layer in range(len(model.blocks)):
        model.hook_dict[f"blocks.{layer}.attn.hook_pattern"].add_hook(halfway)
    compared = asked(sequences)
    found = read(Subject.of(model), sequences, compared=compared)
    assert found.shared
    assert (found.self_attention[:, compared] >= 0.5).all()
    assert off(found, own_passes(model, sequences, watch), compared) <= ALL[name]


@pytest.mark.parametrize("name", [*SHARING, "bridge-bloom", "hooked-local"])
def test_no_hook_of_ours_is_left_and_the_user_s_are(name: str, count_hooks: Callable[[Any], int]) -> None:
    model, sequences = made(name), endings()
    fired: list[str] = []
    model.hook_dict["blocks.0.hook_resid_pre"].add_hook(lambda value, hook: fired.append("temporary"))
    model.hook_dict["blocks.1.hook_resid_pre"].add_hook(lambda value, hook: fired.append("kept"), is_permanent=True)
    with torch.no_grad():
        model(tokens_for(1, 4))  # a bridge's first pass installs hooks of its own
    before = count_hooks(model)
    subject = Subject.of(model)
    read(subject, sequences, compared=asked(sequences))
    read(subject, sequences, share=False)
    read_alone(subject, sequences[0], batch=2)
    assert count_hooks(model) == before
    fired.clear()
    with torch.no_grad():
        model(tokens_for(1, 4))
    assert fired == ["temporary", "kept"]


@pytest.mark.parametrize("name", ["hooked-ln-learned", "bridge-gpt2", "bridge-llama"])
@pytest.mark.parametrize("only_branches", [False, True])
def test_nor_after_an_exception(name: str, only_branches: bool, count_hooks: Callable[[Any], int]) -> None:
    """A user's hook that raises in every pass raises; one that raises in the branches' passes makes them whole."""
    model, sequences = made(name), endings()

    def fail(value: torch.Tensor, hook: Any) -> None:
        if not only_branches or value.shape[-1] != value.shape[-2]:
            raise ZeroDivisionError("the user's own")

    with torch.no_grad():
        model(tokens_for(1, 4))
    model.hook_dict["blocks.1.attn.hook_pattern"].add_hook(fail)
    before = count_hooks(model)
    subject = Subject.of(model)
    if only_branches:
        assert not read(subject, sequences, compared=asked(sequences)).shared
    else:
        for share in (True, False):
            with pytest.raises(ZeroDivisionError, match="the user's own"):
                read(subject, sequences, compared=asked(sequences), share=share)
        with pytest.raises(ZeroDivisionError, match="the user's own"):
            read_alone(subject, sequences[0])
    assert count_hooks(model) == before


# ---------------------------------------------------------------- never a silent number


def test_weights_that_are_no_numbers_are_told() -> None:
    model = made("bridge-gpt2")
    subject = Subject.of(model)
    with torch.no_grad():
        model.blocks[1].mlp.out.bias[0] = torch.nan
    with pytest.raises(HookMismatchError, match="NaN or infinite"):
        read(subject, endings())
    with pytest.raises(ModelError, match=r"the weights blocks\.1\.mlp\..*bias hold NaN or infinite"):
        Subject.of(model)


@pytest.mark.parametrize("silent", ["attn.hook_pattern", "hook_resid_pre", "attn.hook_z"])
def test_a_hook_that_does_not_fire_is_told(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sequences = made("bridge-gpt2"), endings()
    attached = readings.attached
    monkeypatch.setattr(
        readings,
        "attached",
        lambda model, hooks: attached(model, [(n, h) for n, h in hooks if n != f"blocks.1.{silent}"]),
    )
    with pytest.raises(HookMismatchError, match="hook did not fire"):
        read(Subject.of(model), sequences, compared=[True] * len(sequences))


def test_a_pattern_that_is_no_softmax_is_told() -> None:
    model, sequences = made("bridge-gpt2"), endings()
    model.hook_dict["blocks.1.attn.hook_pattern"].add_hook(lambda value, hook: 2 * value)
    with pytest.raises(HookMismatchError, match="sums to 1 ± 1"):
        read(Subject.of(model), sequences, compared=[True] * len(sequences))
