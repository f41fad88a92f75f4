"""From what the user typed to token ids: BOS, chat template, readable tokens, and every prompt that is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import NO_BRIDGE, NO_HOOKED, bridge, has_bridge, has_hooked

import oversquash_lens as osl
from oversquash_lens.capture.tokens import text_ids, token_strings, tokenize
from oversquash_lens.errors import InputError

D_VOCAB, N_CTX = 12, 8
TEMPLATE = "{% for m in messages %}u {{ m.content }} {% endfor %}{% if add_generation_prompt %}a{% endif %}"


class Stub:
    """As much of a hooked model as a prompt needs; BOS by TransformerLens' rule, from `cfg.default_prepend_bos`."""

    blocks = embed = unembed = None
    W_E = torch.zeros(1)

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        begins = tokenizer is not None and tokenizer("w3")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.cfg = SimpleNamespace(n_ctx=N_CTX, d_vocab=D_VOCAB, default_prepend_bos=begins)
        self.hook_dict: dict = {}

    def to_tokens(self, text: str, prepend_bos: bool | None = None, **options: Any) -> torch.Tensor:
        assert options == {"truncate": False, "move_to_device": False}
        wanted = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        ids = self.tokenizer(text)["input_ids"]
        begins = ids[:1] == [self.tokenizer.bos_token_id]
        ids = ids[1:] if begins and not wanted else ids
        return torch.tensor([[self.tokenizer.bos_token_id, *ids] if wanted and not begins else ids])

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("tokenizing runs no model")

    run_with_hooks = parameters = modules = __call__


def made_tokenizer(*, adds_bos: bool, has_bos: bool = True, template: str | None = None) -> Any:
    """Words w3 … w11, `u` and `a`; <s> is BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "u": 1, "a": 2, **{f"w{i}": i for i in range(3, D_VOCAB)}}
    made = Tokenizer(models.WordLevel(words, unk_token="u"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="u", **({"bos_token": "<s>"} if has_bos else {}))
    fast.chat_template = template
    return fast


PLAIN, WITH_BOS = Stub(made_tokenizer(adds_bos=False)), Stub(made_tokenizer(adds_bos=True))
CHATTY = Stub(made_tokenizer(adds_bos=True, template=TEMPLATE))


@pytest.mark.parametrize(
    ("model", "bos", "ids", "starts"),
    [
        (PLAIN, None, [3, 4], False),
        (PLAIN, True, [0, 3, 4], True),
        (PLAIN, False, [3, 4], False),
        (WITH_BOS, None, [0, 3, 4], True),
        (WITH_BOS, True, [0, 3, 4], True),
        (WITH_BOS, False, [3, 4], False),
    ],
)
def test_bos_is_the_tokenizers_own_or_forced(model: Stub, bos: bool | None, ids: list[int], starts: bool) -> None:
    found = tokenize(model, "w3 w4", bos=bos)
    assert found.ids.tolist() == ids
    assert (found.bos, found.chat) == (starts, False)
    assert found.ids.dtype == torch.long


def test_chat_goes_through_the_template() -> None:
    found = tokenize(CHATTY, "w3 w4", chat=True)
    assert found.ids.tolist() == [1, 3, 4, 2]  # u w3 w4 a: the template writes its own start
    assert (found.bos, found.chat) == (False, True)
    assert tokenize(CHATTY, "w3 w4", chat=True, bos=True).ids.tolist() == [0, 1, 3, 4, 2]


@pytest.mark.skipif(not has_bridge(), reason=NO_BRIDGE)
def test_bos_and_chat_are_in_every_result() -> None:
    model = bridge(2, "llama")
    model.tokenizer.chat_template, before = "u {{ messages[0].content }} w9", model.tokenizer.chat_template
    try:
        for chat, bos, expected in (
            (False, None, (True, False)),
            (False, False, (False, False)),
            (True, None, (False, True)),
        ):
            options = {"chat": chat, "bos": bos}
            audit = osl.audit(model, "w3 w4", probes=2, **options)
            trace = osl.record(model, "w3 w4", **options)
            truth = osl.measured_sensitivity(model, "w3 w4", probes=2, **options)
            for about in (trace.about, truth.about, audit.about, audit.truth.about, audit.mean_field.about):
                assert (about.bos, about.chat) == expected
            assert audit.tokens == trace.tokens == truth.tokens
            assert audit.to_dict()["about"]["bos"] is expected[0]
            assert ("starts with BOS" in str(audit.about), "chat template" in str(audit.about)) == expected
    finally:
        model.tokenizer.chat_template = before


@pytest.mark.parametrize(
    "ids",
    [
        [3, 4, 5],
        (3, 4, 5),
        [[3, 4, 5]],
        torch.tensor([3, 4, 5]),
        torch.tensor([[3, 4, 5]]),
        torch.tensor([3, 4, 5], dtype=torch.int32),
        torch.tensor([3, 4, 5], dtype=torch.uint8).numpy(),
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_token_ids_of_every_kind(ids: Any) -> None:
    found = tokenize(PLAIN, ids)
    assert found.ids.tolist() == [3, 4, 5]
    assert found.ids.dtype == torch.long
    assert found.tokens == ("w3", "w4", "w5")


def test_ids_that_start_with_bos_are_said_to() -> None:
    assert tokenize(PLAIN, [0, 3]).bos
    assert not tokenize(PLAIN, [3, 0]).bos


def test_the_given_ids_are_not_the_traces_own() -> None:
    ids = torch.tensor([3, 4, 5])
    found = tokenize(PLAIN, ids)
    ids[0] = 7
    assert found.tokens[0] == "w3"
    assert found.ids.tolist() == [3, 4, 5]


def test_without_a_tokenizer_tokens_are_numbers() -> None:
    assert tokenize(Stub(None), [3, 4]).tokens == ("3", "4")


def test_a_token_that_is_half_a_character_keeps_its_name(smollm2: Any) -> None:
    text = "naïve 👩‍👧 漢字"
    ids = tokenize(smollm2, text).ids
    tokens = token_strings(smollm2, ids)
    assert len(tokens) == len(ids)
    assert not any("\ufffd" in token for token in tokens)
    assert smollm2.tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize(
    ("model", "prompt", "options", "said"),
    [
        (PLAIN, "", {}, "empty prompt"),
        (PLAIN, "   ", {}, "got a prompt of 0 tokens"),
        (PLAIN, "w3", {}, "got a prompt of 1 token"),
        (WITH_BOS, "w3", {"bos": False}, "got a prompt of 1 token"),
        (PLAIN, "w3 " * 9, {}, "expected at most n_ctx = 8 tokens, got 9 tokens"),
        (WITH_BOS, "w3 " * 8, {}, "got 9 tokens"),
        (PLAIN, [3] * 9, {}, "got 9 tokens"),
        (PLAIN, [3], {}, "got a prompt of 1 token"),
        (PLAIN, [], {}, "shape (0,)"),
        (PLAIN, 3, {}, "shape ()"),
        (PLAIN, [3, 12], {}, "expected ids in 0 … 11, this model's vocabulary, got token id 12"),
        (PLAIN, [-1, 3], {}, "got token id -1"),
        (PLAIN, [3.0, 4.0], {}, "float32"),
        (PLAIN, [True, False], {}, "bool"),
        (PLAIN, [[3, 4], [5, 6]], {}, "one prompt at a time"),
        (PLAIN, torch.zeros(1, 1, 3, dtype=torch.long), {}, "(1, 1, 3)"),
        (PLAIN, [[3, 4], [5]], {}, "type list"),
        (PLAIN, ["w3", "w4"], {}, "type list"),
        (PLAIN, None, {}, "type NoneType"),
        (PLAIN, b"w3 w4", {}, "type bytes"),
        (PLAIN, {3, 4}, {}, "type set"),
        (PLAIN, [2**70, 3], {}, "type list"),
        (PLAIN, [3, 4], {"bos": True}, "for texts and messages only"),
        (PLAIN, [3, 4], {"chat": True}, "for texts and messages only"),
        (PLAIN, "w3 w4", {"chat": True}, "without a chat template"),
        (Stub(None), "w3 w4", {}, "without tokenizer"),
        (Stub(made_tokenizer(adds_bos=False, has_bos=False)), "w3 w4", {"bos": True}, "without a BOS token"),
        (PLAIN, "w3 \ud800 w4", {}, "expected"),
    ],
    ids=lambda value: repr(value)[:24] if not isinstance(value, Stub) else "",
)
def test_prompts_that_are_refused(model: Stub, prompt: Any, options: dict, said: str) -> None:
    with pytest.raises(InputError) as caught:
        tokenize(model, prompt, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the model's own rule


def loaded_with(single: str, folder: Path, kind: str, **special: str) -> Any:
    """A tiny Llama by `load_model`, with a tokenizer of words w3 … that puts special tokens where `single` says."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=D_VOCAB, num_key_value_heads=2, max_position_embeddings=N_CTX, **size)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "u": 2, **{f"w{i}": i for i in range(3, D_VOCAB)}}
    made = Tokenizer(models.WordLevel(words, unk_token="u"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "u"} | special
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return osl.load_model(folder, kind=kind, device="cpu")


KINDS = [
    pytest.param("hooked", marks=pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)),
    pytest.param("bridge", marks=pytest.mark.skipif(not has_bridge(), reason=NO_BRIDGE)),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prepend", [None, True, False])
@pytest.mark.parametrize("single", ["$A", "<s> $A"])
def test_a_text_becomes_what_the_model_itself_makes_of_it(
    single: str, prepend: bool | None, kind: str, tmp_path: Path
) -> None:
    model = loaded_with(single, tmp_path, kind)
    if prepend is not None:
        model.cfg.default_prepend_bos = prepend
    text = "w3 w4 w5"
    expected = model.to_tokens(text)[0].tolist()
    with osl.recording(model) as recorder, torch.no_grad():
        model(text)
    assert recorder.trace().token_ids.tolist() == expected
    assert osl.record(model, text).token_ids.tolist() == expected
    assert list(osl.measured_sensitivity(model, text, probes=2).tokens) == list(osl.record(model, text).tokens)
    assert osl.record(model, text, bos=True).token_ids.tolist() == [0, 3, 4, 5]
    assert osl.record(model, text, bos=False).token_ids.tolist() == [3, 4, 5]
    assert text_ids(model, text) == (3, 4, 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("single", ["$A </s>", "<s> $A </s>"])
def test_a_special_token_behind_the_last_word_is_never_added_in_silence(single: str, kind: str, tmp_path: Path) -> None:
    """A bridge's own rule takes it off; where the class leaves it, the text is refused, and says so."""
    model = loaded_with(single, tmp_path, kind)
    own = model.to_tokens("w3 w4 w5")[0].tolist()
    if own[-1] == 1:
        with pytest.raises(InputError, match=r"puts '</s>' behind it: give token ids.*\[0, :-1\]"):
            osl.record(model, "w3 w4 w5")
        assert osl.record(model, own[:-1]).token_ids.tolist() == own[:-1]
    else:
        assert osl.record(model, "w3 w4 w5").token_ids.tolist() == own
    assert text_ids(model, "w4 w5") == (4, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_that_was_typed_stays(kind: str, tmp_path: Path) -> None:
    model = loaded_with("<s> $A", tmp_path, kind)
    assert osl.record(model, "w3 w4 </s>").token_ids.tolist()[-1] == 1


@pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)
def test_of_two_special_tokens_behind_a_piece_the_typed_one_stays(tmp_path: Path) -> None:
    """The tokenizer puts its own behind the one that was typed; a bridge's own rule takes off both."""
    model = loaded_with("<s> $A </s>", tmp_path, "hooked")
    assert model.to_tokens("w4 </s>")[0].tolist() == [0, 4, 1, 1]
    assert text_ids(model, "w4 </s>", bos=None) == (0, 4, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_longer_than_the_model_reads_is_refused_and_not_cut(kind: str, tmp_path: Path) -> None:
    model = loaded_with("<s> $A", tmp_path, kind)
    with pytest.raises(InputError, match=r"at most n_ctx = 8 tokens, got 9 tokens"):
        osl.record(model, "w3 " * 8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_chat_template_keeps_its_own_tokens(kind: str, tmp_path: Path) -> None:
    model = loaded_with("<s> $A", tmp_path, kind)
    model.tokenizer.chat_template = "<s> w5 {{ messages[0].content }} </s>"
    assert osl.record(model, "w3 w4", chat=True).token_ids.tolist() == [0, 5, 3, 4, 1]
    assert osl.record(model, "w3 w4", chat=True, bos=False).token_ids.tolist() == [5, 3, 4, 1]


# ---------------------------------------------------------------- messages, and BOS that is there already

TURNS = (
    "<s>{% for message in messages %} {{ message.content }} {% if message.role == 'user' %}w9{% else %}w5{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} a{% endif %}"
)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_are_what_transformers_makes_of_them(kind: str, tmp_path: Path) -> None:
    model = loaded_with("<s> $A", tmp_path, kind)
    model.tokenizer.chat_template = TURNS
    user, answer = {"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}
    for messages in ([user], [user, answer], (user, answer, user)):
        last = messages[-1]["role"] == "assistant"
        text = model.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=not last, continue_final_message=last
        )
        expected = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        trace = osl.record(model, messages)
        assert trace.token_ids.tolist() == expected
        assert (trace.about.chat, trace.about.bos, trace.about.doubled_bos) == (True, True, False)
        assert osl.measured_sensitivity(model, messages, probes=1).tokens == trace.tokens
        assert osl.record(model, messages, bos=False).token_ids.tolist() == expected[1:]
    assert osl.record(model, "w3", chat=True).token_ids.tolist() == osl.record(model, [user]).token_ids.tolist()


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "user"}], "message 0 whose 'content' is None"),
        ([{"content": "w3"}], "message 0 whose 'role' is None"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0 whose 'content' is"),
        ([{"role": "user", "content": "w3"}, {"text": "w3"}], "message 1 whose 'role' is None"),
        ([{"role": "user", "content": "\ud800"}], "no valid Unicode"),
        ([{"role": "fool", "content": "w3"}], "roles fool and TemplateError: no fools"),
    ],
)
def test_messages_that_are_none(messages: list, said: str) -> None:
    template = "{% if messages[0].role == 'fool' %}{{ raise_exception('no fools') }}{% endif %}" + TURNS
    with pytest.raises(InputError, match=said):
        tokenize(Stub(made_tokenizer(adds_bos=True, template=template)), messages)
    with pytest.raises(InputError, match="without a chat template"):
        tokenize(PLAIN, [{"role": "user", "content": "w3"}])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_begins_with_bos_twice_is_remarked_by_every_door(kind: str, tmp_path: Path) -> None:
    """Text that a chat template has made, given as a text: every token after it is read as never in training."""
    model = loaded_with("<s> $A", tmp_path, kind)
    twice, once = [0, 0, 3, 4], "w3 w4"
    rendered = "<s> w3 w4"
    prompt = rendered if osl.record(model, rendered).token_ids.tolist() == twice else twice
    with osl.recording(model) as recorder, torch.no_grad():
        model(torch.tensor([twice]))
    doors = {
        "record": lambda prompt: osl.record(model, prompt),
        "record_batch": lambda prompt: osl.record_batch(model, [prompt])[0],
        "measured": lambda prompt: osl.measured_sensitivity(model, prompt, probes=1),
        "bound": lambda prompt: osl.path_bound(osl.record(model, prompt)),
        "audit": lambda prompt: osl.audit(model, prompt, probes=1),
        "findings": lambda prompt: osl.findings(model, prompt, probes=1),
        "what_if": lambda prompt: osl.what_if(model, prompt, osl.edits.window(2), probes=1),
    }
    for name, door in doors.items():
        assert door(prompt).about.doubled_bos, name
        assert "starts with BOS twice" in str(door(prompt).about), name
        assert not door(once).about.doubled_bos, name
    assert recorder.trace().about.doubled_bos
    assert osl.Trace.load(recorder.trace().save(tmp_path / "t")).about.remark.startswith("the prompt begins with BOS")
    curve = osl.collapse_curve(model, lambda k: [0, 0] + [3] * k, (1, 2), ("float32",))
    assert curve.about.doubled_bos
    swept = osl.sweep(model, [prompt, once], ["proof"], tmp_path / "rows.parquet")
    assert [remark is not None for remark in swept.table()["remark"].to_pylist()] == [True, False]
    assert "1  remarked: the prompt begins with BOS twice" in str(swept)
