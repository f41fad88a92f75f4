"""The report of a prompt of thousands of tokens: a page of a few megabytes, and nothing of n² on the way."""

from __future__ import annotations

import re

import pytest
import torch
from browsing import PHONE, screen
from long_findings import long_findings
from small_results import EVIL, TOKENS, profile
from test_page import Outline

from oversquash_lens.analyses.findings import Findings
from oversquash_lens.viz.report import MOST_ROWS, render_page
from oversquash_lens.viz.token_strips import FEW_BINS, MOST_BINS, MOST_INSIDE, context_windows
from oversquash_lens.viz.views import layers, positions, route
from oversquash_lens.viz.words import visible_token

N, LAYERS = 8192, 30


@pytest.fixture(scope="module")
def found() -> Findings:
    return long_findings(N, n_layers=3)


@pytest.fixture(scope="module")
def page(found) -> str:
    return render_page(found)


# -- its size --------------------------------------------------------------------------------------------------


def test_eight_thousand_tokens_make_a_page_of_a_few_megabytes(page, found):
    assert len(page) < 3e6
    asked = found.squashing.flow.edges.largest
    assert max(asked) <= 2 * 256 * N  # blocks of rows, never a whole pattern


def test_each_layer_adds_little():
    short, long = (len(render_page(long_findings(2100, n_layers=layers, n_heads=1))) for layers in (2, 6))
    assert short + (long - short) / 4 * (LAYERS - 2) < 5e6


def test_a_prompt_twice_as_long_makes_a_page_not_much_larger(page):
    assert len(page) < 1.3 * len(render_page(long_findings(N // 2, n_layers=3)))


# -- what stands on it -----------------------------------------------------------------------------------------


def test_the_largest_shares_are_listed_and_it_is_said_that_others_are_not(page, found):
    outline = Outline(page)
    numbers = [row for row in outline.rows if len(row) == 11 and row[0].isdigit()]
    assert len(numbers) == MOST_ROWS
    places = [int(row[0]) for row in numbers]
    assert places == sorted(places)
    for share in (found.answer.share, found.audit.truth.share):
        assert set(share.topk(20).indices.tolist()) <= set(places)
    assert f"The {MOST_ROWS} tokens of the largest shares, of {N:,}, in numbers" in "".join(outline.text)


def test_a_short_prompt_lists_every_token_and_no_context_windows():
    outline = Outline(render_page(long_findings(MOST_BINS, n_layers=2)))
    text = "".join(outline.text)
    assert "Every token in numbers" in text
    assert "in the text around them" not in text


def test_context_windows_hold_the_largest_shares_with_their_neighbours():
    share = torch.full((100,), 1e-3)
    share[[2, 40, 50, 99]] = torch.tensor([0.1, 0.3, 0.2, 0.05])
    assert context_windows(share, picked=4, around=5) == [(35, 56, (40, 50)), (0, 8, (2,)), (94, 100, (99,))]
    assert context_windows(torch.tensor([0.5, 0.5]), picked=4) == [(0, 2, (0, 1))]


def test_the_context_windows_on_the_page_mark_the_largest_shares(page, found):
    largest = int(found.answer.share.argmax())
    marked = re.findall(r"<mark>(.*?)</mark>", page)
    assert len(marked) == 16
    token = found.tokens[largest]
    first = next(row for row in Outline(page).rows if len(row) == 6 and row[1].isdigit())
    assert int(first[1]) <= largest <= int(first[2])
    assert visible_token(token.strip() or token) in first[0]


def test_nothing_in_a_context_window_or_a_bin_becomes_markup():
    tokens = tuple(EVIL[i % len(EVIL)] + str(i) for i in range(600))
    outline = Outline(render_page(long_findings(600, n_layers=2, tokens=tokens)))
    assert not {"img", "b", "iframe"} & {tag for tag, _ in outline.tags}
    assert not [name for _, attrs in outline.tags for name in attrs if name.startswith("on")]


# -- its strips ------------------------------------------------------------------------------------------------


def long_profile(n: int):
    return profile(tokens=tuple(f" w{i}" for i in range(n)), n_layers=2)


def test_a_long_strip_has_fewer_bins_and_says_where_its_bins_are():
    payload = positions(long_profile(3000)).payload
    assert len(payload["tokens"]) <= FEW_BINS
    bins = [place for place, width in zip(payload["places"], payload["widths"], strict=True) if width > 1]
    for place in bins:
        start, stop, first = re.fullmatch(r"tokens (\d+) to (\d+) “w(\d+) .*”, summed", place).groups()
        assert start == first
        assert f"w{stop}”" in place


def test_what_is_inside_a_bin_is_every_token_s_own_share():
    result = long_profile(3000)
    inside = positions(result).payload["inside"]
    assert inside["tokens"][:2] == ["·w0", "·w1"]
    assert torch.tensor(inside["shares"]) == pytest.approx(result.share, rel=6e-3)


@pytest.mark.parametrize(("n", "carried"), [(MOST_BINS, False), (MOST_BINS + 1, True), (MOST_INSIDE + 1, False)])
def test_bins_can_be_opened_where_there_are_any_and_a_page_can_carry_them(n, carried):
    view = positions(long_profile(n))
    assert ("inside" in view.payload) == carried == ("its tokens open" in view.caption)


def test_strips_of_many_layers_do_not_carry_every_token(found):
    assert "inside" not in layers(long_profile(3000)).payload
    assert "inside" not in route(found.squashing.flow).payload


# -- seen ------------------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("size", [None, PHONE], ids=["desktop", "phone"])
def test_a_bin_opens_by_click_and_by_key_and_the_page_fits(driver, opened, page, found, size):
    with screen(driver, size or {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}):
        shown = opened(page)
        assert shown.complaints() == []
        assert shown.ask("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        view = shown.views()[0]
        assert shown.ask("return arguments[0].querySelectorAll('.osl-ribbon').length", view) == 1
        bins = view.find_elements("css selector", ".osl-bin")
        texts = [shown.ask("return arguments[0].getAttribute('aria-label')", each) for each in bins[:2]]
        for each, how in zip(bins[:2], ("click", "key"), strict=True):
            start, stop = map(int, re.match(r"\[.*?\], tokens (\d+) to (\d+) ", texts[bins.index(each)]).groups())
            event = "new MouseEvent('click')" if how == "click" else "new KeyboardEvent('keydown', {key: 'Enter'})"
            shown.ask(f"arguments[0].dispatchEvent({event})", each)
            shown.until(
                "return arguments[0].querySelectorAll('.osl-inside .colored-tokens > span').length === arguments[1]",
                view,
                stop + 1 - start,
            )
            first = shown.ask("return arguments[0].querySelector('.osl-inside .colored-tokens > span').ariaLabel", view)
            share = float(first.split("share ")[1])
            assert share == pytest.approx(found.answer.share[start].item(), rel=6e-3)
            assert f"Tokens {start} to {stop}, one by one:" in view.text


def test_short_views_are_as_they_were():
    assert "inside" not in positions(profile(tokens=TOKENS)).payload
