"""What the browser tests share: Chromium with the network off, and a page opened in it that one can question."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from oversquash_lens.viz.html import View, page, runtime
from oversquash_lens.viz.words import visible_token

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


PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}


@contextmanager
def chromium(profile: Path) -> Iterator:
    """A selenium driver of headless Chromium that reaches no network; skips the test where there is none."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    chromedriver = shutil.which("chromedriver")
    if not binary or not chromedriver:
        pytest.skip("no Chromium with its driver is installed (Debian: apt install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra 'dev')")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
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


def page_of(*views: View, title: str = "views") -> str:
    """Views in a page such as a report is: one script for all of them, which the policy alone lets run."""
    return page("page.html.j2", title, script=runtime(), styles=("view.css", "page.css"), views=views)


@contextmanager
def screen(driver, size: dict) -> Iterator[None]:
    """Another screen, such as `PHONE`, for as long as the block lasts."""
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": size["mobile"]})
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@contextmanager
def dark(driver) -> Iterator[None]:
    """The reader prefers dark pages, for as long as the block lasts."""
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


class Opened:
    """A page in the browser, drawn to the end."""

    def __init__(self, driver, path: Path) -> None:
        for kind in ("browser", "performance"):
            driver.get_log(kind)  # what came before is not this page's
        self.driver, self.url = driver, path.as_uri()
        driver.get(self.url)
        self.until("return !document.querySelector('.osl-stage[aria-busy=\"true\"]')")

    def until(self, condition: str, *arguments: object) -> object:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, WAIT, 0.05).until(
            lambda driver: driver.execute_script(condition, *arguments), f"got never true: {condition}"
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

    def tap(self, view, i: int) -> str:
        """What the hover box says when a finger touches a view's token."""
        middle = self.ask(
            "const cell = arguments[0].querySelectorAll(arguments[1])[arguments[2]];"
            "cell.scrollIntoView({block: 'center'}); const at = cell.getBoundingClientRect();"
            "return {x: at.x + at.width / 2, y: at.y + at.height / 2}",
            view,
            CELLS,
            i,
        )
        for kind, points in (("touchStart", [middle]), ("touchEnd", [])):
            self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
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
        """Errors and warnings of the console, and every request of the page but for itself.

        What the browser asks for its own start page is not the page's, and comes when it likes.
        """
        said = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                url, asking = event["params"]["request"]["url"], event["params"]["documentURL"]
                own = url == self.url or url.startswith("data:") or asking.startswith(("chrome:", "chrome-untrusted:"))
                said += [] if own else [f"request to {url}"]
        return said


def seen(tokens) -> list[str]:
    return [visible_token(token).replace(" ", "") for token in tokens]


def luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
