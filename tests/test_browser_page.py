"""The report in a real browser with the network off, from a small random model: what is seen is what was found."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browsing import PHONE, Opened, contrast, dark, screen, seen
from small_findings import findings_result
from small_models import hooked, tokens_for
from small_results import EVIL, TOKENS

from oversquash_lens.analyses.findings import Findings, findings
from oversquash_lens.viz.report import TITLE, render_page
from oversquash_lens.viz.reports import reports

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")]
DESKTOP = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
NARROW = PHONE | {"width": 360}


@pytest.fixture(scope="module")
def found() -> Findings:
    """A model of 3 layers and 2 heads on 14 tokens, measured exactly."""
    return findings(hooked(21, n_layers=3, gated=True, act="silu", norm="RMS", positions="rotary"), tokens_for(8, 14))


@pytest.fixture
def page(opened, found) -> Opened:
    return opened(render_page(found))


def inside(page: Opened, anchor: str) -> list:
    return page.driver.find_elements("css selector", f"#{anchor} .osl-view")


@pytest.fixture
def whole(page) -> Opened:
    """The page with all that is folded open."""
    page.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.until("return !document.querySelector('.osl-stage[aria-busy=\"true\"]')")
    return page


def test_every_view_shows_every_token(whole, found):
    estimates = inside(whole, "estimate")
    views = [*inside(whole, "tokens"), inside(whole, "where")[1], *estimates[:3], *estimates[4:]]
    assert len(views) == 3 + 1 + 3 + len(found.routes)
    for view in views:
        assert whole.tokens(view) == seen(found.tokens)
    assert whole.complaints() == []


def test_hover_shows_the_share_of_the_result(page, found):
    measures = (found.answer.sensitivity, found.answer.replaced, found.audit.truth)
    for view, measured in zip(inside(page, "tokens"), measures, strict=True):
        for i in (0, 7, 13):
            assert page.share(view, i) == pytest.approx(measured.share[i].item(), rel=5e-4)
    assert page.complaints() == []


def test_a_layer_picked_shows_its_flow(whole, found):
    estimates = inside(whole, "estimate")
    views = [inside(whole, "where")[1], estimates[2], *estimates[4:]]
    flows = [found.answer.flow, found.squashing.flow, *found.routes.values()]
    for view, flow in zip(views, flows, strict=True):
        view.find_element("css selector", "input[aria-label='layer 2']").click()
        whole.until("return arguments[0].querySelectorAll('.osl-stage [hidden]:not(.osl-cell-mark)').length > 0", view)
        for i in (2, 13):
            assert whole.share(view, i) == pytest.approx(float(f"{flow.node[2, i].item():.3g}"), rel=5e-4, abs=2e-6)
    assert whole.complaints() == []


@pytest.mark.parametrize("measured", [True, False])
def test_a_head_clicked_says_its_share(whole, found, measured):
    flow = found.answer.flow if measured else found.squashing.flow
    view = inside(whole, "where")[0] if measured else inside(whole, "estimate")[3]
    for layer, head in ((0, 1), (2, 0), (1, 1)):
        (cell,) = view.find_elements("css selector", f".osl-grid td[aria-label^='layer {layer}, head {head}:']")
        whole.ask("arguments[0].scrollIntoView({block: 'center'})", cell)
        cell.click()
        told = whole.until(
            "const text = arguments[0].querySelector('.osl-now').textContent;"
            "return text.startsWith(arguments[1]) && text",
            view,
            f"layer {layer}, head {head}",
        )
        assert float(re.search(r"share (\S+)", told)[1]) == pytest.approx(flow.head[layer, head].item(), rel=6e-3)
    assert whole.complaints() == []


def test_numbers_read_back_are_those_found(whole, found):
    answer = found.answer
    told = whole.ask("return [...document.querySelectorAll('.numbers dd')].map(one => one.innerText)")
    wanted = [
        answer.effective_tokens,
        found.effective_tokens,
        found.squashing.null_effective_tokens,
        answer.widest,
    ]
    assert [float(text.replace("−", "-")) for text in told[:4]] == pytest.approx(wanted, abs=0.051)
    titles = whole.ask("return [...document.querySelectorAll('.curve title')].map(one => one.textContent)")
    widths = [float(re.search(r": (\S+) positions", text)[1]) for text in titles]
    assert widths == pytest.approx(answer.flow.width.tolist(), rel=1e-3)
    rows = whole.ask(
        "const rows = [...document.querySelectorAll('#numbers tbody tr')];"
        "return rows.map(row => [...row.cells].map(cell => cell.innerText))"
    )
    assert [float(row[2]) for row in rows] == pytest.approx(answer.sensitivity.values.tolist(), rel=1e-3)
    assert [float(row[5]) for row in rows] == pytest.approx(found.audit.truth.values.tolist(), rel=1e-3)
    assert whole.complaints() == []


def test_tokens_are_named_below_the_map(page, found):
    names = page.ask("return [...document.querySelectorAll('#where .osl-names span')].map(one => one.textContent)")
    assert 0 < len(names) <= len(found.tokens)
    assert set(names) <= set(seen(found.tokens))
    layers = page.ask("return [...document.querySelectorAll('#where .osl-layers span')].map(one => one.textContent)")
    assert layers == ["0", "1", "2", "3"]


def test_the_keyboard_reaches_everything(page):
    from selenium.webdriver import ActionChains, Keys

    reached = []
    for _ in range(120):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        what = page.ask(
            "const at = document.activeElement; const region = at.closest('section');"
            "return at === document.body ? null : [at.tagName, region ? region.id : 'top']"
        )
        if what is None:
            break
        reached.append(tuple(what))
    assert {place for _, place in reached} >= {
        "top",
        "tokens",
        "where",
        "trust",
        "estimate",
        "numbers",
    }
    assert ("SUMMARY", "numbers") in reached
    assert ("DIV", "trust") in reached  # the audit's table, which scrolls
    assert page.complaints() == []


def test_links_lead_to_their_sections(page):
    for link in page.driver.find_elements("css selector", "nav a"):
        anchor = link.get_attribute("href").split("#")[1]
        link.click()
        assert abs(page.ask("return document.getElementById(arguments[0]).getBoundingClientRect().top", anchor)) < 900
    assert page.complaints() == []


@pytest.mark.parametrize("shade", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, NARROW], ids=["desktop", "phone"])
def test_screenshots(opened, driver, found, size, shade, tmp_path):
    """No page is wider than its screen, nothing is cut off, and words can be read on their ground."""
    with screen(driver, size), dark(driver) if shade == "dark" else screen(driver, size):
        page = opened(render_page(found, title="A title that is long enough to fill more than a single line of it"))
        page.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.ask("return document.documentElement.scrollWidth") <= size["width"]
        wide = page.ask(
            "return [...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll, svg, .osl-stage')"
            " && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 80))"
        )
        assert wide == []
        colours = page.ask(
            "return ['.lead', '.about', '.guide', '.numbers dt', 'nav a', 'td', '.assumptions dd'].map(name => {"
            "const one = document.querySelector(name); let ground = one;"
            "while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;"
            "return [name, getComputedStyle(one).color, getComputedStyle(ground).backgroundColor]})"
        )
        for name, ink, ground in colours:
            assert contrast(ink, ground) >= 4.5, (name, ink, ground)
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        picture = tmp_path / f"{shade}.png"
        picture.write_bytes(base64.b64decode(shot["data"]))
        assert picture.stat().st_size > 20_000
        assert page.complaints() == []


def test_it_prints_without_what_paper_cannot_do(opened, driver, found):
    page = opened(render_page(found))
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert page.ask("return getComputedStyle(document.querySelector('nav')).display") == "none"
        assert page.ask("return getComputedStyle(document.querySelector('.osl-stage fieldset')).display") == "none"
        printed = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
        assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert page.complaints() == []


def test_a_tap_shows_the_share(opened, driver):
    with screen(driver, NARROW):
        page = opened(render_page(findings_result((*(f" word{i}" for i in range(60)), "x" * 300))))
        assert page.ask("return document.documentElement.scrollWidth") == 360
        assert "token 20: share" in page.tap(page.views()[0], 20)
        assert page.complaints() == []


def test_a_page_that_the_browser_saved_still_works(opened, found):
    page = opened(render_page(found))
    page = opened("<!doctype html>" + page.ask("return document.documentElement.outerHTML"))
    assert page.share(inside(page, "tokens")[0], 1) == pytest.approx(found.answer.share[1].item(), rel=5e-4)
    assert page.tokens(inside(page, "where")[1]) == seen(found.tokens)
    assert page.complaints() == []


def test_the_policy_stops_markup_that_should_ever_get_through(page):
    page.ask(
        "document.body.insertAdjacentHTML('beforeend', arguments[0])",
        "<img src=data:, onerror=document.title=1>",
    )
    page.until("return document.querySelector('img').complete")
    assert page.ask("return document.title") == TITLE
    assert any("Content Security Policy" in line for line in page.complaints())


def test_tokens_that_bite_are_shown_as_text(opened):
    page = opened(render_page(findings_result(EVIL, model=EVIL[0]), title=EVIL[1]))
    for view in inside(page, "tokens"):
        assert page.tokens(view) == seen(EVIL)
    assert page.ask("return document.title") == EVIL[1]
    assert page.complaints() == []


def test_the_index_leads_to_the_pages(driver, tmp_path):
    model = hooked(21, n_layers=2)
    prompts = [("first <b>", tokens_for(1, 5)), ("broken", [1]), ("third", tokens_for(2, 6))]
    with screen(driver, NARROW):
        page = Opened(driver, Path(reports(model, prompts, tmp_path, probes=2)))
        assert page.ask("return document.documentElement.scrollWidth") == 360
        rows = page.ask("return [...document.querySelectorAll('tbody tr')].map(row => row.cells[0].innerText)")
        assert rows == ["first <b>", "broken", "third"]
        assert "expected at least two" in page.ask("return document.querySelector('.error').innerText")
        assert page.complaints() == []
        page.driver.find_elements("css selector", "tbody a")[1].click()
        assert page.until("return document.title === 'third'")


def test_text_stays_readable_in_a_page_of_one_loud_token(opened):
    """Also where nearly everything is one token's, and the rest has no share that shows."""
    loud = findings_result(TOKENS)
    values = torch.full_like(loud.answer.sensitivity.values, 1e-9)
    values[0] = 1.0
    answer = replace(loud.answer, sensitivity=replace(loud.answer.sensitivity, values=values))

    page = opened(render_page(replace(loud, answer=answer)))
    assert "depends most on The (100 %)" in page.ask("return document.querySelector('.lead').innerText")
    assert page.complaints() == []
