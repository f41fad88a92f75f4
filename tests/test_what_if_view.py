"""The view of edits: every token before and after, what an edit put in marked, the numbers those of the result."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from small_results import EVIL, TOKENS, about, profile, truth

from oversquash_lens.analyses.what_if import Outcome, WhatIf
from oversquash_lens.errors import InputError
from oversquash_lens.viz.html import View, Views
from oversquash_lens.viz.views import NEW, what_if


def outcome(label: str, tokens: tuple[str, ...], places: tuple[int | None, ...], seed: int = 0) -> Outcome:
    bounds = [profile(kind, tokens, seed=seed + i, constant=2.0) for i, kind in enumerate(("proof", "calibrated_full"))]
    return Outcome(label, tokens, places, *bounds, profile("mean_field", tokens, seed=seed), truth(tokens), 12.5, 0.25)


def with_commas(tokens: tuple[str, ...] = TOKENS, every: int = 3) -> WhatIf:
    """The prompt, the prompt with commas, and the prompt without its first token."""
    after: list[tuple[str, int | None]] = []
    for place, token in enumerate(tokens):
        after += [(token, place)] + [(",", None)] * (place % every == every - 1)
    n = len(tokens)
    return WhatIf(
        about(),
        outcome("as it is", tokens, tuple(range(n))),
        (
            outcome("commas", *(tuple(part) for part in zip(*after, strict=True)), seed=5),
            outcome("<b>one fewer", tokens[1:], tuple(range(1, n)), seed=9),
        ),
    )


def test_one_view_for_each_outcome_on_one_colour_scale() -> None:
    result = with_commas()
    view = what_if(result)
    assert isinstance(view, Views)
    assert isinstance(view, View)
    assert len(view.views) == 3
    floors = {part.payload["floor"] for part in view.views}
    assert floors == {float(f"{0.1 / len(result.after[0].tokens):.4g}")}
    for part, each in zip(view.views, result.outcomes, strict=True):
        assert part.payload["shares"][0] == pytest.approx(each.truth.share.tolist(), rel=1e-3)
    text = view.fragment()
    assert text in str(view)
    assert text.count('<figure class="osl-view">') == 3
    assert text.count("osl-guide") > 0
    assert "&lt;b&gt;one fewer" in text
    assert "<b>one" not in text


def test_tokens_that_an_edit_put_in_are_marked_and_the_others_say_what_they_were() -> None:
    result = with_commas()
    plain, commas, fewer = what_if(result).views
    before = result.before.truth.share.tolist()
    assert not any(text.startswith(NEW) for text in plain.payload["tokens"])
    for i, place in enumerate(result.after[0].places):
        text, said = commas.payload["tokens"][i], commas.payload["places"][i]
        assert text.startswith(NEW) == (place is None)
        if place is None:
            assert said == f"token {i} (put in)"
        else:
            where = "before" if place == i else f"before token {place}"
            assert said == f"token {i} ({where}: share {float(f'{before[place]:.4g}'):g})"
    assert fewer.payload["places"][0].startswith("token 0 (before token 1: share ")
    assert f"{NEW} stands before" in what_if(result).guide


def test_nothing_is_said_of_marks_where_nothing_was_put_in() -> None:
    result = with_commas()
    assert "stands before" not in what_if(WhatIf(result.about, result.before, result.after[1:])).guide


@pytest.mark.parametrize(
    ("of", "name"),
    [
        ("truth", "Measured sensitivity"),
        ("estimate", "Mean-field estimate"),
        ("bound", "bound"),
        ("calibrated", "Calibrated"),
    ],
)
def test_any_measure_can_colour(of: str, name: str) -> None:
    result = with_commas()
    view = what_if(result, of)
    assert name in view.guide
    for part, each in zip(view.views, result.outcomes, strict=True):
        assert part.payload["shares"][0] == pytest.approx(getattr(each, of).share.tolist(), rel=1e-3)


def test_the_captions_hold_the_numbers() -> None:
    result = with_commas()
    for part, each, change in zip(what_if(result).views, result.outcomes, (None, *result.changes), strict=True):
        assert f"effective number {each.measured_tokens:.1f} of {len(each.tokens)} tokens" in part.caption
        assert "collapse distance 12.5" in part.caption
        if change is not None:
            assert f"{10 ** change.median('truth'):.2f} times as large" in part.caption
            assert f"estimated {10 ** change.median('estimate'):.2f})" in part.caption


def test_long_prompts_are_binned_and_nothing_is_lost() -> None:
    tokens = tuple(f" w{i}" for i in range(900))
    result = with_commas(tokens, every=4)
    for part, each in zip(what_if(result).views, result.outcomes, strict=True):
        payload = part.payload
        assert len(payload["tokens"]) == len(payload["places"]) == len(payload["shares"][0]) <= 512
        assert sum(payload["widths"]) == len(each.tokens)
        assert sum(payload["shares"][0]) == pytest.approx(1, abs=1e-2)
        assert "tokens:" in part.caption
    places = what_if(result).views[1].payload["places"]
    some = [place for place in places if "put in; the others before: share" in place]
    assert len(some) > 20
    widths = what_if(result).views[1].payload["widths"]
    alone = sum("(put in)" in place for place in places)
    said = sum(int(place.split("summed (")[1].split()[0]) for place in some)
    bins_of_none = [p for p, width in zip(places, widths, strict=True) if width > 1 and "(before:" in p]
    assert alone + said == 225  # every comma is in one cell or another
    assert all("put in" not in place for place in bins_of_none)


class Elements(HTMLParser):
    """Which elements there are, outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.add(tag)


def test_evil_tokens_and_labels_are_shown_and_not_run() -> None:
    result = with_commas(tuple(EVIL))
    evil = WhatIf(about(EVIL[0]), result.before, (outcome(EVIL[0], tuple(EVIL), tuple(range(len(EVIL)))),))
    for view in (what_if(result), what_if(evil)):
        found = Elements(view.fragment()).found
        assert found == {"div", "figure", "figcaption", "strong", "span", "p", "noscript", "script"}


@pytest.mark.parametrize("wrong", [None, 3, truth(), with_commas().before])
def test_a_view_of_something_else(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"expected a WhatIf, got .*: call what_if"):
        what_if(wrong)


def test_a_measure_that_is_none() -> None:
    with pytest.raises(InputError, match="expected one of bound, calibrated, estimate, truth, got of='loudness'"):
        what_if(with_commas(), "loudness")


def test_shares_that_are_no_numbers() -> None:
    result = with_commas()
    result.before.truth.values[2] = torch.nan
    with pytest.raises(InputError, match="got nan"):
        what_if(result)


@pytest.mark.browser
def test_the_browser_shows_before_and_after(opened: Callable) -> None:
    from selenium.webdriver import ActionChains

    result = with_commas()
    page = opened(str(what_if(result)))
    assert len(page.views()) == 3
    for view, each in zip(page.views(), result.outcomes, strict=True):
        assert len(page.tokens(view)) == len(each.tokens)
    assert page.tokens(page.views()[1])[3] == f"{NEW},"
    cell = page.views()[1].find_elements("css selector", ".colored-tokens > span")[4]
    ActionChains(page.driver).move_to_element(cell).perform()
    box = "return arguments[0].querySelector('.colored-tokens > div')?.innerText"
    said = page.until(box, page.views()[1])
    share, before = (
        float(f"{each.truth.share[i].item():.4g}") for each, i in ((result.after[0], 4), (result.before, 3))
    )
    assert f"token 4 (before token 3: share {before:g}): share {share:g}" in said
    assert page.complaints() == []
