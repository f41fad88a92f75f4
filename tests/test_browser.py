"""The report and the views in a real browser with the network off: what is seen is what the results say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_charts import collapse, grid
from small_results import EVIL, TOKENS, audit_result, profile, truth

from oversquash_lens.render.gallery import write_chart, write_index
from oversquash_lens.render.html import visible_token
from oversquash_lens.render.page import render_page
from oversquash_lens.render.views import layers, positions

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--window-size=1280,900",
    "about:blank",
)
CELLS = ".osl-stage > div:not([hidden]) .colored-tokens > span"
WAIT = 20  # seconds, for a busy machine; drawing takes well under one


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator:
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("no Chromium with its driver is installed (Debian: apt install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra 'dev')")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        driver.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        yield driver
    finally:
        driver.quit()


class Opened:
    """A page in the browser, drawn to the end."""

    def __init__(self, driver, path: Path) -> None:
        for kind in ("browser", "performance"):
            driver.get_log(kind)  # what came before is not this page's
        self.driver, self.url = driver, path.as_uri()
        driver.get(self.url)
        self.until("return !document.querySelector('.osl-stage:not(:has(.colored-tokens > span[aria-label]))')")

    def until(self, condition: str, *arguments: object) -> object:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, WAIT, 0.05).until(
            lambda driver: driver.execute_script(condition, *arguments), f"never came true: {condition}"
        )

    def ask(self, script: str, *arguments: object):
        return self.driver.execute_script(script, *arguments)

    def views(self) -> list:
        return self.driver.find_elements("css selector", ".osl-view")

    def tokens(self, view) -> list[str]:
        """The tokens one sees in a view, without the joiners that keep them from being markup."""
        script = "return [...arguments[0].querySelectorAll(arguments[1])].map(cell => cell.innerText)"
        return [re.sub(r"[\u2060\s]", "", text) for text in self.ask(script, view, CELLS)]

    def hover(self, view, i: int) -> str:
        """What the hover box over a view's token says."""
        from selenium.webdriver import ActionChains

        cell = view.find_elements("css selector", CELLS)[i]
        self.ask("arguments[0].scrollIntoView({block: 'center'})", cell)
        ActionChains(self.driver).move_to_element(cell).perform()
        return self.box(view, i)

    def box(self, view, i: int) -> str:
        box = (
            "const box = arguments[0].querySelector('.osl-stage > div:not([hidden]) .colored-tokens > div');"
            "return box && box.innerText.includes('token ' + arguments[1] + ':') && box.innerText"
        )
        return self.until(box, view, i).replace("\u2060", "")

    def share(self, view, i: int) -> float:
        return float(re.search(r"share (\S+)", self.hover(view, i))[1])

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and every request but the page itself."""
        said = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                said += [] if url == self.url or url.startswith("data:") else [f"request to {url}"]
        return said


@pytest.fixture
def opened(driver, tmp_path):
    def opened(html: str) -> Opened:
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        return Opened(driver, path)

    return opened


def seen(tokens) -> list[str]:
    return [visible_token(token).replace(" ", "") for token in tokens]


def test_the_report_shows_every_token_in_every_view(opened):
    page = opened(render_page(audit_result()))
    assert len(page.views()) == 5
    for view in page.views():
        assert page.tokens(view) == seen(TOKENS)
    assert audit_result().sentence in page.ask("return document.body.innerText")
    assert page.complaints() == []


def test_hover_shows_the_share_of_the_result(opened):
    result = audit_result()
    page = opened(render_page(result))
    for view, measured in zip(page.views(), (result.bounds["proof"], result.mean_field, result.truth), strict=False):
        for i in (0, 3, len(TOKENS) - 1):
            assert page.share(view, i) == pytest.approx(measured.share[i].item(), rel=5e-4)
    assert page.complaints() == []


def test_a_layer_can_be_picked_and_both_views_follow(opened):
    result = audit_result()
    page = opened(render_page(result))
    bound, estimate = page.views()[3:]
    bound.find_element("css selector", "input[aria-label='layer 2']").click()
    for view, measured in ((bound, result.bounds["proof"]), (estimate, result.mean_field)):
        page.until("return arguments[0].querySelector('.osl-now').textContent.startsWith('layer 2 of 3')", view)
        page.until("return arguments[0].querySelectorAll('.osl-stage > div:not([hidden])').length === 1", view)
        assert page.tokens(view) == seen(TOKENS)
        for i in (0, 4):
            assert page.share(view, i) == pytest.approx(measured.share_by_layer[2, i].item(), rel=5e-4)
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
    page = opened(render_page(audit_result(EVIL, model=EVIL[0]), title=EVIL[1]))
    for view in page.views():
        assert page.tokens(view) == seen(EVIL)
    assert visible_token(EVIL[0]) in page.hover(page.views()[0], 0)
    assert page.ask("return document.title") == EVIL[1]
    assert page.ask("return document.querySelectorAll('img, main svg').length") == 0
    assert page.complaints() == []


def test_the_policy_stops_markup_that_should_ever_get_through(opened):
    page = opened(render_page(audit_result()))
    page.ask(
        "document.body.insertAdjacentHTML('beforeend', arguments[0])",
        "<img src=data:, onerror=document.title=1>",
    )
    page.until("return document.querySelector('img').complete")
    assert page.ask("return document.title") == "What the last token hears"
    assert any("Content Security Policy" in line for line in page.complaints())


def test_views_stand_alone_several_in_one_document(opened):
    """As in a notebook: every output brings its own code, and each is drawn once."""
    one, other = positions(truth()), layers(profile())
    page = opened(f"<div>{one}</div><div>{other}</div><div>{one}</div>")
    assert [page.tokens(view) for view in page.views()] == [seen(TOKENS)] * 3
    assert page.share(page.views()[2], 0) == pytest.approx(truth().share[0].item(), rel=5e-4)
    assert page.complaints() == []


def test_a_page_that_the_browser_saved_still_works(opened):
    page = opened(render_page(audit_result()))
    page = opened("<!doctype html>" + page.ask("return document.documentElement.outerHTML"))
    assert [page.tokens(view) for view in page.views()] == [seen(TOKENS)] * 5
    assert page.share(page.views()[2], 1) == pytest.approx(truth().share[1].item(), rel=5e-4)
    assert page.complaints() == []


def test_a_phone_scrolls_down_only_and_a_tap_shows_the_share(opened, driver):
    screen = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        page = opened(render_page(audit_result((*(f" word{i}" for i in range(300)), "x" * 300))))
        assert page.ask("return document.documentElement.scrollWidth") == 390
        view = page.views()[0]
        middle = page.ask(
            "const cell = arguments[0].querySelectorAll(arguments[1])[20];"
            "cell.scrollIntoView({block: 'center'}); const at = cell.getBoundingClientRect();"
            "return {x: at.x + at.width / 2, y: at.y + at.height / 2}",
            view,
            CELLS,
        )
        for kind, points in (("touchStart", [middle]), ("touchEnd", [])):
            driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        assert "token 20: share" in page.box(view, 20)
        assert page.complaints() == []
    finally:
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


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
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == 400}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
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
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
