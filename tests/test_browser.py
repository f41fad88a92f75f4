"""The views in a real browser with the network off: what is seen is what the results say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from browsing import CELLS, Opened, contrast, luminance, page_of, screen, seen
from small_charts import collapse, grid
from small_results import EVIL, TOKENS, flow_result, profile, truth

from oversquash_lens.viz.reports import write_chart, write_index
from oversquash_lens.viz.views import heads, layers, positions, side_by_side
from oversquash_lens.viz.words import visible_token

pytestmark = pytest.mark.browser


def test_every_view_shows_every_token(opened):
    page = opened(page_of(*side_by_side(profile(), truth()), layers(profile())))
    assert [page.tokens(view) for view in page.views()] == [seen(TOKENS)] * 3
    assert page.complaints() == []


def test_hover_shows_the_share_of_the_result(opened):
    results = (profile(), truth(), truth(exact=False))
    page = opened(page_of(*side_by_side(*results)))
    for view, result in zip(page.views(), results, strict=True):
        for i in (0, 3, len(TOKENS) - 1):
            assert page.share(view, i) == pytest.approx(result.share[i].item(), rel=5e-4)
    assert page.complaints() == []


def test_a_layer_can_be_picked_and_views_together_follow(opened):
    results = (profile(), profile("mean_field", seed=9))
    page = opened("<div class='osl-together'>" + "".join(str(layers(result)) for result in results) + "</div>")
    page.views()[0].find_element("css selector", "input[aria-label='layer 2']").click()
    for view, result in zip(page.views(), results, strict=True):
        page.until("return arguments[0].querySelector('.osl-now').textContent.startsWith('layer 2 of 3')", view)
        page.until("return arguments[0].querySelectorAll('.osl-stage > div:not([hidden])').length === 1", view)
        assert page.tokens(view) == seen(TOKENS)
        for i in (0, 4):
            assert page.share(view, i) == pytest.approx(result.share_by_layer[2, i].item(), rel=5e-4)
    assert page.complaints() == []


def test_the_keyboard_reaches_layers_and_tokens(opened):
    from selenium.webdriver import ActionChains, Keys

    result = profile()
    page = opened(str(layers(result)))
    (view,) = page.views()
    keys = lambda *pressed: ActionChains(page.driver).send_keys(*pressed).perform()  # noqa: E731
    keys(Keys.TAB, Keys.ARROW_RIGHT)
    page.until("return arguments[0].querySelector('.osl-now').textContent.startsWith('layer 1 of 3')", view)
    page.until("return arguments[0].querySelectorAll('.osl-stage > div:not([hidden])').length === 1", view)
    keys(Keys.TAB, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert f"share {result.share_by_layer[1, 2].item():.4g}" in page.box(view, 2)
    keys(Keys.HOME)
    assert visible_token(TOKENS[0]) in page.box(view, 0)
    label = page.ask("return document.activeElement.getAttribute('aria-label')")
    assert label == f"The, token 0: share {result.share_by_layer[1, 0].item():.4g}"
    assert page.complaints() == []


def test_tokens_that_bite_are_shown_as_text(opened):
    page = opened(page_of(*side_by_side(profile(tokens=EVIL), truth(EVIL)), layers(profile(kind=EVIL[0], tokens=EVIL))))
    for view in page.views():
        assert page.tokens(view) == seen(EVIL)
    assert visible_token(EVIL[0]) in page.hover(page.views()[0], 0)
    assert EVIL[0] in page.ask("return document.body.innerText")  # the kind's name, as text
    assert page.ask("return document.title") == "views"
    assert page.ask("return document.querySelectorAll('img, main svg').length") == 0
    assert page.complaints() == []


def test_the_policy_stops_markup_that_should_ever_get_through(opened):
    page = opened(page_of(positions(truth())))
    page.ask(
        "document.body.insertAdjacentHTML('beforeend', arguments[0])",
        "<img src=data:, onerror=document.title=1>",
    )
    page.until("return document.querySelector('img').complete")
    assert page.ask("return document.title") == "views"
    assert any("Content Security Policy" in line for line in page.complaints())


def test_views_stand_alone_several_in_one_document(opened):
    """As in a notebook: every output brings its own code, and each is drawn once."""
    one, other = positions(truth()), layers(profile())
    page = opened(f"<div>{one}</div><div>{other}</div><div>{one}</div>")
    assert [page.tokens(view) for view in page.views()] == [seen(TOKENS)] * 3
    assert page.share(page.views()[2], 0) == pytest.approx(truth().share[0].item(), rel=5e-4)
    assert page.complaints() == []


def test_a_page_that_the_browser_saved_still_works(opened):
    page = opened(page_of(positions(truth()), layers(flow_result()), heads(flow_result())))
    page = opened("<!doctype html>" + page.ask("return document.documentElement.outerHTML"))
    assert [page.tokens(view) for view in page.views()[:2]] == [seen(TOKENS)] * 2
    assert page.ask("return document.querySelectorAll('.osl-grid td').length") == 3 * 3
    assert page.share(page.views()[0], 1) == pytest.approx(truth().share[1].item(), rel=5e-4)
    assert page.complaints() == []


def test_a_phone_scrolls_down_only_and_a_tap_shows_the_share(opened, driver):
    with screen(driver, {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}):
        page = opened(page_of(positions(truth((*(f" word{i}" for i in range(300)), "x" * 300)))))
        assert page.ask("return document.documentElement.scrollWidth") == 390
        assert "token 20: share" in page.tap(page.views()[0], 20)
        assert page.complaints() == []


def test_text_stays_readable_on_every_colour(opened):
    """Contrast of at least 7 (WCAG AAA) from no share to all of it."""
    shares = torch.tensor([[0.6, 0.2, 0.1, 0.05, 0.03, 0.02]]).log().double()
    tokens = tuple("abcdef")
    page = opened(str(positions(type(profile())("proof", tokens, shares, 0.0))))
    colours = page.ask(
        "return [...document.querySelectorAll(arguments[0] + ' > span')].map(cell => {"
        "const style = getComputedStyle(cell); return [style.color, style.backgroundColor]})",
        CELLS,
    )
    backgrounds = [background for _, background in colours]
    assert len(set(backgrounds)) == len(tokens)
    assert all(contrast(*pair) >= 7 for pair in colours)
    assert sorted(backgrounds, key=luminance) == backgrounds  # the larger the share, the darker


@pytest.mark.parametrize("width", [1200, 400])
def test_the_figures_page_shows_every_figure(driver, tmp_path, width):
    for chart in (collapse(), replace(grid(), title=EVIL[0], setup=EVIL)):
        write_chart(chart, tmp_path)
    with screen(driver, {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == 400}):
        page = Opened(driver, write_index(tmp_path))
        images = page.ask("return [...document.images].map(one => [one.complete, one.naturalWidth, one.clientWidth])")
        assert len(images) == 2
        assert all(complete and natural > 1000 and shown > 300 for complete, natural, shown in images)
        assert page.ask("return document.documentElement.scrollWidth") <= width
        text = page.ask("return document.body.innerText")
        assert "did not hold: the count survives" in text
        assert visible_token(EVIL[0], 100).replace("·", " ") in text
        assert "pwned" not in page.ask("return document.title")
        assert page.complaints() == []
