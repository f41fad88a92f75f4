"""Replies: the same from every class of model, alone or in a batch, and picked by seeds of their own."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_speakers import KINDS, N_CTX, characters, loaded, logits, model, other_architecture, plain_speaker, speaker
from transformers import GPT2Config, MambaConfig, MambaForCausalLM

from oversquash_lens.errors import InputError, ModelError
from oversquash_lens.models.loading import load_twin
from oversquash_lens.models.sources import Weights
from oversquash_lens.paper.engines import engine_for
from oversquash_lens.paper.prompts import copy_prompt, ones_prompt, trailing_zero
from oversquash_lens.paper.sampling import GREEDY, Pick, Sampling
from oversquash_lens.paper.speakers import Reply, Speaker

PROMPTS = ["11", "How many ones are in 111?", "x", "copy 10101 please", "1" * 60, "sum: 1 + 1 + 1"]
WARM = Sampling(temperature=1.3, seed=4, max_new_tokens=20)


def greedy_by_hand(who: Speaker, prompt: str, limit: int) -> Reply:
    """One whole pass for each token: no cache, no batch, no padding."""
    ids, said = who.token_ids(who.render(prompt)), []
    while len(said) < limit:
        token = int(logits(who, ids + said)[-1].argmax())
        if token == who.tokenizer.eos_token_id:
            break
        said.append(token)
    return Reply(who.tokenizer.decode(said, skip_special_tokens=True), len(said), len(said) < limit)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_replies_are_those_of_one_pass_a_token(kind: str, dtype: str) -> None:
    who = speaker(kind, dtype)
    assert who.replies(PROMPTS, Sampling(max_new_tokens=20)) == tuple(greedy_by_hand(who, each, 20) for each in PROMPTS)


@pytest.mark.parametrize("name", ["GPT2", "Bloom", "Gemma2", "Gemma3"])
def test_other_architectures_speak_too(name: str) -> None:
    who, sampling = other_architecture(name), Sampling(max_new_tokens=16)
    assert who.replies(PROMPTS, sampling) == tuple(greedy_by_hand(who, each, 16) for each in PROMPTS)


def test_the_tiny_models_replies_are_worth_comparing() -> None:
    replies = speaker().replies(PROMPTS * 4, WARM, draws=[draw for draw in range(4) for _ in PROMPTS])
    assert len({reply.text for reply in replies}) > 20
    assert {reply.finished for reply in replies} == {True, False}
    assert len({reply.tokens for reply in replies if reply.finished}) > 2  # rows leave a batch at different times


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_hooked_models_say_what_their_twin_says(kind: str, sampling: Sampling) -> None:
    assert speaker(kind).replies(PROMPTS, sampling) == speaker("twin").replies(PROMPTS, sampling)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_does_not_depend_on_its_batch(kind: str, sampling: Sampling) -> None:
    together = speaker(kind, batch_size=6).replies(PROMPTS, sampling)
    pairs = speaker(kind, batch_size=2).replies(PROMPTS, sampling)
    alone = tuple(speaker(kind).replies([prompt], sampling)[0] for prompt in PROMPTS)
    assert together == pairs == alone
    assert speaker(kind).replies(PROMPTS[::-1], sampling) == together[::-1]


def test_the_users_hooks_act_on_replies() -> None:
    bridge = loaded("bridge")
    who, sampling = Speaker(bridge), Sampling(max_new_tokens=5)
    before = who.replies(PROMPTS[:2], sampling)
    with bridge.hooks(fwd_hooks=[("unembed.hook_in", lambda value, hook: -value)]):
        assert who.replies(PROMPTS[:2], sampling) != before
    assert who.replies(PROMPTS[:2], sampling) == before


def test_draws_and_seeds_vary_and_come_again() -> None:
    who = speaker()
    one, two = who.replies(["11", "11"], WARM, draws=[0, 1])
    assert one != two
    assert who.replies(["11"], WARM, draws=[1]) == (two,)
    assert who.replies(["11"], Sampling(1.3, seed=5, max_new_tokens=20)) != (one,)


def test_picks_follow_the_softmax() -> None:
    """10,000 prompts' first draw against softmax(logits / T): every frequency within five standard errors."""
    row = torch.tensor([1.0, 0.0, -1.0, 2.5, -torch.inf, 0.3])
    share = (row / 0.8).softmax(0)
    n = 10_000
    found = Counter(Pick(Sampling(0.8), f"prompt {i}", 0)(row) for i in range(n))
    assert found[4] == 0
    for token, expected in enumerate(share.tolist()):
        assert abs(found[token] / n - expected) <= 5 * (expected * (1 - expected) / n) ** 0.5


def test_chat_template_or_plain_text() -> None:
    assert speaker().render("11") == "[11]>"
    assert speaker().settings["chat"] is True
    assert speaker(chat=False).render("11") == "11\n"
    assert speaker(chat=False).settings["chat"] is False
    bare = plain_speaker(tokenizer=characters(template=None))
    assert bare.render("11") == "11\n"
    assert bare.settings == {"model": "tiny characters", "speaker": "twin", "dtype": "float64", "chat": False}
    with pytest.raises(InputError, match=r"chat=True .* without a chat template"):
        plain_speaker(tokenizer=characters(template=None), chat=True)


def test_labels() -> None:
    assert speaker("twin").label == speaker("bridge").label == "tiny-characters"
    assert speaker(label="mine").settings["model"] == "mine"
    assert Speaker(model(), tokenizer=characters()).label == "LlamaForCausalLM"


def test_the_turns_end_stops_a_reply() -> None:
    """`?`, made the end of a turn by the model's own list or by name, ends it as </s> does."""
    who = plain_speaker()
    assert who._stops == {1}
    listed = model()
    stop = characters().convert_tokens_to_ids("a")
    listed.generation_config.eos_token_id = [1, stop]
    assert Speaker(listed, tokenizer=characters())._stops == {1, stop}
    for reply in Speaker(listed, tokenizer=characters()).replies(PROMPTS, WARM):
        assert "a" not in reply.text


def test_a_prompt_beyond_the_context_is_refused_before_anything_runs() -> None:
    who = speaker()
    n = len(who.token_ids(who.render("1" * N_CTX)))
    for prompts in (["1" * N_CTX], ["1", "1" * N_CTX]):
        with pytest.raises(InputError, match=rf"a prompt of {n} tokens .* n_ctx = {N_CTX}"):
            who.replies(prompts)
    with pytest.raises(InputError, match=rf"n_ctx = {N_CTX}"):
        who.log_likelihoods("1" * (N_CTX - 8), ["0" * 20])


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_ends_where_the_context_ends(kind: str) -> None:
    who = speaker(kind)
    long = "1" * (N_CTX - 3 - 5)  # with the template's three characters: room for five more
    reply, short = who.replies([long, "11"], Sampling(max_new_tokens=12))
    assert (reply.tokens, reply.finished) == (5, False) or reply.finished
    assert short == who.replies(["11"], Sampling(max_new_tokens=12))[0]


def test_batches_hold_to_memory_and_size() -> None:
    prompts = ["1" * n for n in (50, 3, 40, 7, 500, 9, 11)]
    who = speaker(batch_size=3)
    assert speaker(dtype="float64").batches(["1", "11", "0", "00"]) == [[0, 2], [1, 3]]  # no padding there
    assert who.batches(prompts) == [[1, 3, 5], [6, 2, 0], [4]]
    row = who.engine.cache_bytes(503 + 64) + who.engine.prompt_bytes(503)
    tight = speaker(batch_size=3, memory=row)
    assert [4] in tight.batches(prompts)
    assert speaker(memory=1).batches(prompts) == [[index] for index in (1, 3, 5, 6, 2, 0, 4)]
    many = speaker(batch_size=4, memory=3 * row).batches(["1" * 500] * 7)
    assert [len(batch) for batch in many] == [3, 3, 1]


def test_the_memory_estimate_counts_the_cache_exactly() -> None:
    who = speaker()
    cache = who.engine.cache(1)
    ids = torch.tensor([who.token_ids("11111")])
    who.engine.forward(ids, cache, torch.ones_like(ids), torch.arange(5)[None], last=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert who.engine.cache_bytes(5) == held
    assert speaker("hooked").engine.cache_bytes(5) == held
    assert speaker("bridge").engine.cache_bytes(5) == held


def test_progress_is_shown_only_when_asked(capsys: pytest.CaptureFixture) -> None:
    who = speaker()
    who.replies(["1"], Sampling(max_new_tokens=1))
    assert capsys.readouterr().err == ""
    who.replies(["1"], Sampling(max_new_tokens=1), progress=True)
    assert "tiny-characters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Speaker(SimpleNamespace(tokenizer=characters())), "got SimpleNamespace as the model"),
        (lambda: Speaker(model()), "without a tokenizer"),
        (lambda: speaker(batch_size=0), "batch_size=0"),
        (lambda: speaker(memory=0), "memory=0"),
        (lambda: Sampling(temperature=-1.0), r"temperature=-1\.0"),
        (lambda: Sampling(temperature=float("nan")), "temperature=nan"),
        (lambda: Sampling(max_new_tokens=0), "max_new_tokens=0"),
        (lambda: speaker().replies([""]), "the prompt ''"),
        (lambda: speaker().replies(["1"], draws=[0, 1]), "got 2 draws with 1 prompts"),
        (lambda: speaker().replies(["\ud800"]), "no valid Unicode"),
    ],
)
def test_what_cannot_be_is_refused(make: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


def test_a_model_that_keeps_no_cache_is_refused() -> None:
    class Forgetful(torch.nn.Module):
        config = GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=110)
        generation_config = None

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def generate(self) -> None: ...

        def forward(self, ids: torch.Tensor, **ignored: object) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(*ids.shape, 110))

    who = Speaker(Weights(Forgetful(), characters(), "forgetful"))
    with pytest.raises(ModelError, match="kept 0 positions in its key/value cache after 5 tokens"):
        who.replies(["11"])


def test_a_model_whose_logits_are_no_numbers_is_refused() -> None:
    broken = model()
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    who = Speaker(broken, tokenizer=characters())
    for ask in (lambda: who.replies(["11"]), lambda: who.log_likelihoods("11", ["1"])):
        with pytest.raises(ModelError, match="logits are no numbers"):
            ask()


def test_a_model_without_attention_is_refused() -> None:
    config = MambaConfig(vocab_size=110, hidden_size=8, num_hidden_layers=1)
    with pytest.raises(ModelError, match="MambaForCausalLM has no attention heads"):
        Speaker(MambaForCausalLM(config), tokenizer=characters())


def test_a_bridge_without_a_cache_is_refused() -> None:
    native = SimpleNamespace(run_with_hooks=None, original_model=SimpleNamespace())
    with pytest.raises(InputError, match="keeps no key/value cache"):
        engine_for(native)


def test_no_replies_to_no_prompts() -> None:
    assert speaker().replies([]) == ()


REAL_PROMPTS = (ones_prompt("1" * 5), copy_prompt(trailing_zero(12)))
SHORT = Sampling(max_new_tokens=16)


@pytest.fixture(scope="module")
def twin() -> Weights:
    return load_twin(device="cpu")


@pytest.fixture(scope="module")
def said(twin: Weights) -> tuple[Reply, ...]:
    return Speaker(twin).replies(REAL_PROMPTS, SHORT)


def test_smollm2_says_what_transformers_own_generate_says(twin: Weights, said: tuple[Reply, ...]) -> None:
    for prompt, reply in zip(REAL_PROMPTS, said, strict=True):
        text = Speaker(twin).render(prompt)
        assert text.endswith("<|im_start|>assistant\n")
        ids = twin.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        out = twin.model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert twin.tokenizer.decode(out, skip_special_tokens=True) == reply.text


def test_smollm2_as_a_bridge_says_the_same(smollm2: Any, said: tuple[Reply, ...]) -> None:
    assert Speaker(smollm2).replies(REAL_PROMPTS, SHORT) == said


def test_smollm2_as_a_hooked_model_says_the_same(smollm2_hooked: Any, said: tuple[Reply, ...]) -> None:
    assert Speaker(smollm2_hooked).replies(REAL_PROMPTS, SHORT) == said
