"""Views: what they carry is what the results say, nothing in a token can act, and no network is asked."""

from __future__ import annotations

import json
import math
import re
import socket
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from circuitsvis.utils.render import RenderedHTML
from small_results import EVIL, TOKENS, profile, truth

from oversquash_lens.errors import InputError, OversquashError
from oversquash_lens.viz import html as html_module
from oversquash_lens.viz.html import LARGEST_PAYLOAD, View, inert, runtime, script_json
from oversquash_lens.viz.token_strips import LONG, MOST_BINS
from oversquash_lens.viz.views import layers, positions, side_by_side
from oversquash_lens.viz.words import visible_token


def data_in(html: str) -> dict:
    """What the last JSON block of a fragment holds, as a browser would read it."""
    return json.loads(re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)[-1])


def shares_of(view: View) -> list[float]:
    return data_in(view.fragment())["shares"][0]


@pytest.mark.parametrize("result", [profile(), truth(), truth(exact=False)], ids=["profile", "exact", "probes"])
def test_positions_carry_the_share_of_each_token(result):
    view = positions(result)
    assert shares_of(view) == pytest.approx(result.share.tolist(), rel=5e-4)
    assert sum(shares_of(view)) == pytest.approx(1, abs=1e-3)
    assert len(view.payload["tokens"]) == len(TOKENS)


def test_layers_carry_every_layer():
    result = profile(n_layers=3)
    payload = layers(result).payload
    assert payload["labels"] == ["layer 0", "layer 1", "layer 2", "layer 3"]
    assert "embeddings" in payload["notes"][0]
    for row, share in zip(payload["shares"], result.share_by_layer.tolist(), strict=True):
        assert row == pytest.approx(share, rel=5e-4)
    assert payload["shares"][-1] == [0.0] * (len(TOKENS) - 1) + [1.0]


def test_shares_keep_four_digits_however_small():
    tiny = replace(profile(), log_by_layer=torch.tensor([[0.0, -60.0, math.log(1 / 3)]]), tokens=("a", "b", "c"))
    assert shares_of(positions(tiny)) == [0.75, 6.567e-27, 0.25]


def test_colour_scale_starts_at_a_tenth_of_an_even_share():
    payload = positions(profile(tokens=tuple("abcdefghij"))).payload
    assert payload["floor"] == 0.01
    assert payload["key"] == [("≤ 0.01", 0.01), ("0.1", 0.1), ("1", 1.0)]


def test_the_guide_explains_the_marks_that_occur():
    assert "space" in positions(profile()).fragment()
    assert "space" not in positions(profile(tokens=("a", "b"))).fragment()


def test_caption_says_what_is_shown():
    assert "exact" in positions(truth()).caption
    assert "16 random probes" in positions(truth(exact=False)).caption
    assert "attention frozen" in positions(replace(truth(), freeze=("attention",))).caption
    assert "my own &lt;kind&gt;" in positions(profile(kind="my own <kind>")).fragment()


# -- one HTML, no network ------------------------------------------------------------------------------------


def test_every_way_to_the_html_gives_the_same_self_contained_text(monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a view asked the network")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr("circuitsvis.utils.render.internet_on", no_network)
    view = layers(profile())
    assert isinstance(view, RenderedHTML)
    text = view._repr_html_()
    assert view.__html__() == str(view) == view.show_code() == view.local_src == view.cdn_src == text
    assert "CircuitsVis" in text
    assert "unpkg" not in text
    assert not re.search(r"<script[^>]+src=|<link|@import|sourceMappingURL", text)
    assert text.isascii()  # nothing that a missing charset could garble


def test_html_is_well_formed():
    """Every element is closed, in order: CircuitsVis' own `<div …/>` leaves one open."""
    open_elements = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            open_elements.append(tag)

        def handle_endtag(self, tag):
            assert open_elements.pop() == tag

    Checker().feed(str(positions(profile())))
    assert not open_elements


def test_the_bundle_is_read_once_and_a_missing_one_is_named(monkeypatch, tmp_path):
    assert runtime() is runtime()
    monkeypatch.setattr(html_module.circuitsvis, "__file__", str(tmp_path / "__init__.py"))
    runtime.cache_clear()
    try:
        with pytest.raises(OversquashError, match=r"iife\.js.*reinstall"):
            runtime()
    finally:
        runtime.cache_clear()


# -- tokens that bite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", EVIL)
def test_no_token_can_leave_its_place(token):
    tokens = ("a", token, "b")
    view = positions(profile(tokens=tokens))
    assert view.fragment().count("</script") == 2  # the key's and the data's own
    assert "<img" not in view.fragment()
    shown = data_in(view.fragment())["tokens"]
    assert not re.search(r"<[a-zA-Z/!?]|&[a-zA-Z#]", "".join(shown))  # no tag, comment or entity for innerHTML
    assert shown[1].replace("\u2060", "") == visible_token(token)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "·the"),
        ("    ", "····"),
        ("\n\n", "↵↵"),
        ("\r\n\t", "␍↵⇥"),
        ("", "∅"),
        ("\x00", "‹U+0000›"),
        ("\ud800", "‹U+D800›"),
        ("\u00a0a", "‹U+00A0›a"),
        ("a\u202eb", "a‹U+202E›b"),
        ("\u200d", "‹U+200D›"),
        ("👩\u200d👧", "👩\u200d👧"),
        ("\u0301", "◌\u0301"),
        ("<|endoftext|>", "<|endoftext|>"),
        ("x" * 100, "x" * 64 + "… (+36 characters)"),
    ],
)
def test_white_space_and_unseen_characters_are_shown(token, shown):
    assert visible_token(token) == shown


def test_inert_text_reads_the_same():
    assert inert("if a < b && c").replace("\u2060", "") == "if a < b && c"


def test_json_survives_the_way_into_a_script_element():
    value = {"text": "".join(EVIL), "number": 1.5}
    text = script_json(value)
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == value


# -- long prompts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [512, 513, 700, 2000, 9000])
def test_long_prompts_are_binned_and_nothing_is_dropped(n):
    result = profile(tokens=tuple(f" w{i}" for i in range(n)), n_layers=1)
    payload = positions(result).payload
    assert len(payload["tokens"]) <= MOST_BINS
    assert sum(payload["widths"]) == n
    assert sum(payload["shares"][0]) == pytest.approx(1, abs=1e-3)
    loudest = result.share.topk(min(n, 192 if n <= LONG else 96)).indices.tolist()
    assert {f"token {i}" for i in loudest} <= set(payload["places"])
    assert ("summed" in positions(result).caption) == (n > MOST_BINS)


def test_a_bin_holds_the_sum_of_its_tokens():
    result = profile(tokens=tuple(f" w{i}" for i in range(1500)), n_layers=1)
    payload = positions(result).payload
    start = 0
    for width, share in zip(payload["widths"], payload["shares"][0], strict=True):
        assert share == pytest.approx(result.share[start : start + width].sum().item(), rel=5e-4)
        start += width


def test_views_side_by_side_are_binned_alike():
    tokens = tuple(f" w{i}" for i in range(1500))
    one, other = side_by_side(profile(tokens=tokens), truth(tokens))
    assert one.payload["places"] == other.payload["places"]
    assert one.payload["key"] == other.payload["key"]


def test_a_view_too_large_is_refused():
    with pytest.raises(InputError, match=r"MB of data.*fewer layers"):
        View({"tokens": ["x" * LARGEST_PAYLOAD]}, "", "")


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, "a prompt", {"share": [1.0]}, torch.ones(3)])
def test_what_is_no_result_is_refused(wrong):
    with pytest.raises(InputError, match="expected a result of"):
        positions(wrong)
    with pytest.raises(InputError, match="expected a PathProfile"):
        layers(wrong)


def test_a_truth_has_no_layers():
    with pytest.raises(InputError, match=r"MeasuredSensitivity.*: use positions"):
        layers(truth())


def test_nan_is_refused_and_named():
    values = truth().values.clone()
    values[2] = math.nan
    with pytest.raises(InputError, match=r"got nan as the share of token 0 \(The\).*float32"):
        positions(replace(truth(), values=values))
    silent = replace(profile(), log_by_layer=torch.full((2, len(TOKENS)), -math.inf, dtype=torch.float64))
    with pytest.raises(InputError, match="got nan"):
        layers(silent)


def test_nothing_cannot_stand_side_by_side():
    with pytest.raises(InputError, match="got no result"):
        side_by_side()


def test_results_on_different_prompts_do_not_stand_side_by_side():
    with pytest.raises(InputError, match="different tokens"):
        side_by_side(profile(tokens=("a", "b")), truth(("a", "c")))
