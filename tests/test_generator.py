"""Replies: the same from every class of model, alone or in a batch, and picked by seeds of their own."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_generators import (
    KINDS,
    N_CTX,
    characters,
    generator,
    loaded,
    logits,
    model,
    other_architecture,
    plain_generator,
)
from transformers import MambaConfig, MambaForCausalLM

from oversquash_lens.capture import edits
from oversquash_lens.errors import InputError, ModelError
from oversquash_lens.models.loading import load_twin
from oversquash_lens.models.sources import Weights
from oversquash_lens.paper.backends import backend_for
from oversquash_lens.paper.generator import GREEDY, Completion, Draws, Generator, Sampling
from oversquash_lens.paper.prompts import copy_prompt, ones_prompt, trailing_zero

PROMPTS = ["11", "How many ones are in 111?", "x", "copy 10101 please", "1" * 60, "sum: 1 + 1 + 1"]
WARM = Sampling(temperature=1.3, seed=4, max_new_tokens=20)


def greedy_by_hand(who: Generator, prompt: str, limit: int) -> Completion:
    """One whole pass for each token: no cache, no batch, no padding."""
    ids, said = who.token_ids(who.render(prompt)), []
    while len(said) < limit:
        token = int(logits(who, ids + said)[-1].argmax())
        if token == who.tokenizer.eos_token_id:
            break
        said.append(token)
    return Completion(who.tokenizer.decode(said, skip_special_tokens=True), len(said), len(said) < limit)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_replies_are_those_of_one_pass_a_token(kind: str, dtype: str) -> None:
    who = generator(kind, dtype)
    assert who.completions(PROMPTS, Sampling(max_new_tokens=20)) == tuple(
        greedy_by_hand(who, each, 20) for each in PROMPTS
    )


@pytest.mark.parametrize("name", ["GPT2", "Bloom", "Gemma2", "Gemma3"])
def test_other_architectures_speak_too(name: str) -> None:
    who, sampling = other_architecture(name), Sampling(max_new_tokens=16)
    assert who.completions(PROMPTS, sampling) == tuple(greedy_by_hand(who, each, 16) for each in PROMPTS)


def test_the_tiny_models_replies_are_worth_comparing() -> None:
    replies = generator().completions(PROMPTS * 4, WARM, draws=[draw for draw in range(4) for _ in PROMPTS])
    assert len({reply.text for reply in replies}) > 20
    assert {reply.finished for reply in replies} == {True, False}
    assert len({reply.tokens for reply in replies if reply.finished}) > 2  # rows leave a batch at different times


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_hooked_models_say_what_their_twin_says(kind: str, sampling: Sampling) -> None:
    assert generator(kind).completions(PROMPTS, sampling) == generator("twin").completions(PROMPTS, sampling)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_does_not_depend_on_its_batch(kind: str, sampling: Sampling) -> None:
    together = generator(kind, batch_size=6).completions(PROMPTS, sampling)
    pairs = generator(kind, batch_size=2).completions(PROMPTS, sampling)
    alone = tuple(generator(kind).completions([prompt], sampling)[0] for prompt in PROMPTS)
    assert together == pairs == alone
    assert generator(kind).completions(PROMPTS[::-1], sampling) == together[::-1]


def test_the_users_hooks_act_on_replies() -> None:
    bridge = loaded("bridge")
    who, sampling = Generator(bridge), Sampling(max_new_tokens=5)
    before = who.completions(PROMPTS[:2], sampling)
    with bridge.hooks(fwd_hooks=[("unembed.hook_in", lambda value, hook: -value)]):
        assert who.completions(PROMPTS[:2], sampling) != before
    assert who.completions(PROMPTS[:2], sampling) == before


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("edit", [edits.window(3), edits.mask_position(1)], ids=["window", "position"])
def test_edits_of_attention_act_on_every_token_that_is_written(kind: str, edit: edits.Edit) -> None:
    """Against one whole pass a token under the same edit, in a batch of prompts of different lengths."""
    who, sampling = Generator(loaded(kind)), Sampling(max_new_tokens=12)
    before = who.completions(PROMPTS, sampling)
    with edits.edited_attention(loaded(kind), edit):
        found = who.completions(PROMPTS, sampling)
        assert found == tuple(greedy_by_hand(who, each, 12) for each in PROMPTS)
    assert found != before
    assert who.completions(PROMPTS, sampling) == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_random_state_is_neither_read_nor_moved(kind: str) -> None:
    who = generator(kind)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(who.completions(PROMPTS[:3], WARM))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


def test_what_the_models_own_file_asks_of_generation_does_not_count() -> None:
    """Penalties and suppressed tokens would make other answers than the model's likeliest."""
    asking = model().float()
    asking.generation_config.repetition_penalty = 3.0
    asking.generation_config.no_repeat_ngram_size = 1
    asking.generation_config.suppress_tokens = list(range(3, 20))
    kept = asking.generation_config
    found = Generator(asking, tokenizer=characters()).completions(PROMPTS, WARM)
    assert found == Generator(model().float(), tokenizer=characters()).completions(PROMPTS, WARM)
    assert asking.generation_config is kept


def test_draws_and_seeds_vary_and_come_again() -> None:
    who = generator()
    one, two = who.completions(["11", "11"], WARM, draws=[0, 1])
    assert one != two
    assert who.completions(["11"], WARM, draws=[1]) == (two,)
    assert who.completions(["11"], Sampling(1.3, seed=5, max_new_tokens=20)) != (one,)


def test_picks_follow_the_softmax() -> None:
    """10,000 prompts' first draw against softmax(logits / T): every frequency within five standard errors."""
    row = torch.tensor([1.0, 0.0, -1.0, 2.5, -torch.inf, 0.3])
    share = (row / 0.8).softmax(0)
    n = 10_000
    found = Counter(Draws(Sampling(0.8), [(f"prompt {i}", 0)])(None, row[None]).argmax().item() for i in range(n))
    assert found[4] == 0
    for token, expected in enumerate(share.tolist()):
        assert abs(found[token] / n - expected) <= 5 * (expected * (1 - expected) / n) ** 0.5


def test_chat_template_or_plain_text() -> None:
    assert generator().render("11") == "[11]>"
    assert generator().settings["chat"] is True
    assert generator(chat=False).render("11") == "11\n"
    assert generator(chat=False).settings["chat"] is False
    bare = plain_generator(tokenizer=characters(template=None))
    assert bare.render("11") == "11\n"
    assert bare.settings == {"model": "tiny characters", "generator": "transformers", "dtype": "float64", "chat": False}
    with pytest.raises(InputError, match=r"chat=True .* without a chat template"):
        plain_generator(tokenizer=characters(template=None), chat=True)


def test_labels() -> None:
    assert generator("twin").label == generator("bridge").label == "tiny-characters"
    assert generator(label="mine").settings["model"] == "mine"
    assert Generator(model(), tokenizer=characters()).label == "LlamaForCausalLM"


def test_the_turns_end_stops_a_reply() -> None:
    """`?`, made the end of a turn by the model's own list or by name, ends it as </s> does."""
    who = plain_generator()
    assert who.stops == (1,)
    listed = model()
    stop = characters().convert_tokens_to_ids("a")
    listed.generation_config.eos_token_id = [1, stop]
    assert Generator(listed, tokenizer=characters()).stops == (1, stop)
    for reply in Generator(listed, tokenizer=characters()).completions(PROMPTS, WARM):
        assert "a" not in reply.text


def test_a_prompt_beyond_the_context_is_refused_before_anything_runs() -> None:
    who = generator()
    n = len(who.token_ids(who.render("1" * N_CTX)))
    for prompts in (["1" * N_CTX], ["1", "1" * N_CTX]):
        with pytest.raises(InputError, match=rf"a prompt of {n} tokens .* n_ctx = {N_CTX}"):
            who.completions(prompts)
    with pytest.raises(InputError, match=rf"n_ctx = {N_CTX}"):
        who.log_likelihoods("1" * (N_CTX - 8), ["0" * 20])


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_ends_where_the_context_ends(kind: str) -> None:
    who = generator(kind)
    long = "1" * (N_CTX - 3 - 5)  # with the template's three characters: room for five more
    reply, short = who.completions([long, "11"], Sampling(max_new_tokens=12))
    assert (reply.tokens, reply.finished) == (5, False) or reply.finished
    assert short == who.completions(["11"], Sampling(max_new_tokens=12))[0]


def test_batches_hold_to_memory_and_size() -> None:
    prompts = ["1" * n for n in (50, 3, 40, 7, 500, 9, 11)]
    who = generator(batch_size=3)
    assert generator(dtype="float64").batches(["1", "11", "0", "00"]) == [[0, 2], [1, 3]]  # no padding there
    assert who.batches(prompts) == [[1, 3, 5], [6, 2, 0], [4]]
    row = who.backend.cache_bytes(503 + 64) + who.backend.prompt_bytes(503)
    tight = generator(batch_size=3, memory=row)
    assert [4] in tight.batches(prompts)
    assert generator(memory=1).batches(prompts) == [[index] for index in (1, 3, 5, 6, 2, 0, 4)]
    many = generator(batch_size=4, memory=3 * row).batches(["1" * 500] * 7)
    assert [len(batch) for batch in many] == [3, 3, 1]


def test_the_memory_estimate_counts_the_cache_exactly() -> None:
    who = generator()
    _, (_, (_, cache)) = who.backend.read(who.token_ids("11111"), 1)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert who.backend.cache_bytes(5) == held
    assert generator("hooked").backend.cache_bytes(5) == held
    assert generator("bridge").backend.cache_bytes(5) == held


def test_progress_is_shown_only_when_asked(capsys: pytest.CaptureFixture) -> None:
    who = generator()
    who.completions(["1"], Sampling(max_new_tokens=1))
    assert capsys.readouterr().err == ""
    who.completions(["1"], Sampling(max_new_tokens=1), progress=True)
    assert "tiny-characters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Generator(SimpleNamespace(tokenizer=characters())), "got a SimpleNamespace as the model"),
        (lambda: Generator(model()), "without a tokenizer"),
        (lambda: generator(batch_size=0), "batch_size=0"),
        (lambda: generator(memory=0), "memory=0"),
        (lambda: Sampling(temperature=-1.0), r"temperature=-1\.0"),
        (lambda: Sampling(temperature=float("nan")), "temperature=nan"),
        (lambda: Sampling(max_new_tokens=0), "max_new_tokens=0"),
        (lambda: generator().completions([""]), "the prompt ''"),
        (lambda: generator().completions(["1"], draws=[0, 1]), "got 2 draws with 1 prompts"),
        (lambda: generator().completions(["\ud800"]), "no valid Unicode"),
    ],
)
def test_what_cannot_be_is_refused(make: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


def test_a_model_that_keeps_no_cache_reads_everything_again() -> None:
    """As a bridge does whose attention does not know the cache's new name."""
    who, sampling = plain_generator(), Sampling(max_new_tokens=12)
    expected, likely = who.completions(PROMPTS, sampling), who.log_likelihoods(PROMPTS[1], ["12", "1", "x"])
    forgetful = plain_generator()
    forward = forgetful.backend.inner.forward

    def without_cache(ids: torch.Tensor | None = None, **options: object) -> object:
        options = {name: value for name, value in options.items() if name not in ("cache", "past_key_values")}
        return forward(ids if ids is not None else options.pop("input_ids"), **options | {"use_cache": False})

    forgetful.backend.inner.forward = without_cache
    assert not forgetful.backend.keeps_cache
    assert forgetful.completions(PROMPTS, sampling) == expected
    torch.testing.assert_close(forgetful.log_likelihoods(PROMPTS[1], ["12", "1", "x"]), likely, rtol=1e-6, atol=1e-6)


def test_a_model_whose_logits_are_no_numbers_is_refused() -> None:
    broken = model()
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    who = Generator(broken, tokenizer=characters())
    for ask in (lambda: who.completions(["11"]), lambda: who.log_likelihoods("11", ["1"])):
        with pytest.raises(ModelError, match="logits are no numbers"):
            ask()


def test_a_model_without_attention_is_refused() -> None:
    config = MambaConfig(vocab_size=110, hidden_size=8, num_hidden_layers=1)
    with pytest.raises(ModelError, match="MambaForCausalLM has no attention heads"):
        Generator(MambaForCausalLM(config), tokenizer=characters())


def test_a_bridge_without_a_cache_is_refused() -> None:
    native = SimpleNamespace(run_with_hooks=None, original_model=SimpleNamespace())
    with pytest.raises(InputError, match="keeps no key/value cache"):
        backend_for(native)


def test_no_replies_to_no_prompts() -> None:
    assert generator().completions([]) == ()


REAL_PROMPTS = (ones_prompt("1" * 5), copy_prompt(trailing_zero(12)))
SHORT = Sampling(max_new_tokens=16)


@pytest.fixture(scope="module")
def twin() -> Weights:
    return load_twin(device="cpu")


@pytest.fixture(scope="module")
def said(twin: Weights) -> tuple[Completion, ...]:
    return Generator(twin).completions(REAL_PROMPTS, SHORT)


def test_smollm2_says_what_transformers_own_generate_says(twin: Weights, said: tuple[Completion, ...]) -> None:
    for prompt, reply in zip(REAL_PROMPTS, said, strict=True):
        text = Generator(twin).render(prompt)
        assert text.endswith("<|im_start|>assistant\n")
        ids = twin.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        out = twin.model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert twin.tokenizer.decode(out, skip_special_tokens=True) == reply.text


def test_smollm2_as_a_bridge_says_the_same(smollm2: Any, said: tuple[Completion, ...]) -> None:
    assert Generator(smollm2).completions(REAL_PROMPTS, SHORT) == said


def test_smollm2_as_a_hooked_model_says_the_same(smollm2_hooked: Any, said: tuple[Completion, ...]) -> None:
    assert Generator(smollm2_hooked).completions(REAL_PROMPTS, SHORT) == said
