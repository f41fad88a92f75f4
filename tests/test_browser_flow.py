"""Views of a flow in a real browser with the network off: what one picks, points at and walks to is what it says."""

from __future__ import annotations

import re

import pytest
import torch
from browsing import CELLS, PHONE, Opened, contrast, dark, page_of, screen, seen
from small_results import EVIL, TOKENS, flow_result, profile

from oversquash_lens.paths.heaviest import heaviest_edges
from oversquash_lens.viz.views import activations, heads, layers, prompts, route
from oversquash_lens.viz.words import visible_token

pytestmark = pytest.mark.browser

VIEWS = (heads, route, activations, layers)
LONG = tuple(f" word{i}" for i in range(600))
MOVES = "return document.querySelector('.osl-moves:not(:has(button))').innerText"
PICTURES = "return document.querySelectorAll('.osl-pattern:not([hidden]) canvas').length"


def keys(page: Opened, *pressed: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(page.driver).send_keys(*pressed).perform()


def said(page: Opened, place: str = ".osl-now") -> str:
    return page.ask("return document.querySelector(arguments[0]).innerText", place).replace("\u2060", "")


def number_in(text: str) -> float:
    return float(re.search(r"share (\S+)", text)[1])


def head_cell(page: Opened, layer: int, column: int):
    label = "what stays" if column == 2 else f"head {column}"
    return page.driver.find_element("css selector", f"td[aria-label^='layer {layer}, {label}:']")


def choose(page: Opened, i: int, value: int) -> None:
    from selenium.webdriver.support.ui import Select

    Select(page.driver.find_elements("css selector", ".osl-activations select")[i]).select_by_value(str(value))


# -- heads ---------------------------------------------------------------------------------------------------


def test_every_cell_of_the_map_says_its_share(opened):
    flow = flow_result()
    page = opened(page_of(heads(flow)))
    cells = page.driver.find_elements("css selector", ".osl-grid td")
    assert len(cells) == 3 * 3
    for layer in range(3):
        shares = [*flow.head[layer].tolist(), flow.residual[layer].item()]
        for column, share in enumerate(shares):
            label = head_cell(page, layer, column).get_attribute("aria-label")
            assert number_in(label) == pytest.approx(share, rel=5e-3)
    assert page.complaints() == []


def test_a_click_picks_a_head_and_its_pattern_follows(opened):
    flow = flow_result()
    page = opened(page_of(heads(flow)))
    for layer, head in ((1, 0), (0, 1), (2, 1)):
        head_cell(page, layer, head).click()
        assert head_cell(page, layer, head).get_attribute("aria-selected") == "true"
        assert number_in(said(page)) == pytest.approx(flow.head[layer, head].item(), rel=5e-3)
        assert said(page).startswith(f"layer {layer}, head {head}:")
        page.until(PICTURES + " === 3")  # one for each head, and the enlarged one
        zoomed = "return document.querySelector('.osl-pattern:not([hidden]) h2').innerText.startsWith(arguments[0])"
        page.until(zoomed.replace("innerText", "textContent"), f"{head} ·")
        edges = flow.edge(layer).heads[head]
        dest, src = (int(i) for i in torch.unravel_index(edges.argmax(), edges.shape))
        to = "itself" if src == dest else f"token {dest} {visible_token(TOKENS[dest])}"
        words = said(page, ".osl-pattern:not([hidden]) .osl-words")
        found = re.search(r"heaviest edges: (\S+) from (.*?) to (.*?)[;.]", words)
        assert float(found[1]) == pytest.approx(edges.max().item(), rel=5e-3)
        assert found[2] == f"token {src} {visible_token(TOKENS[src])}"
        assert found[3] == to
    assert page.complaints() == []


def test_a_click_on_a_pattern_picks_its_head_in_the_map(opened):
    page = opened(page_of(heads(flow_result())))
    page.until(PICTURES + " === 3")
    layer = int(flow_result().head.sum(-1).argmax())
    for head in (0, 1):
        page.driver.find_elements("css selector", ".osl-pattern:not([hidden]) h4")[head].click()
        assert head_cell(page, layer, head).get_attribute("aria-selected") == "true"
        assert said(page).startswith(f"layer {layer}, head {head}:")
    assert page.complaints() == []


def test_the_keyboard_walks_the_map_and_picks(opened):
    from selenium.webdriver import Keys

    flow = flow_result()
    page = opened(page_of(heads(flow)))
    layer, head = heads(flow).payload["start"]
    keys(page, Keys.TAB)
    assert said(page).startswith(f"layer {layer}, head {head}:")
    keys(page, *[Keys.ARROW_DOWN] * 3, *[Keys.ARROW_LEFT] * 3)  # the edge holds
    assert said(page).startswith("layer 0, head 0:")
    keys(page, Keys.ARROW_UP, Keys.ARROW_RIGHT)
    assert number_in(said(page)) == pytest.approx(flow.head[1, 1].item(), rel=5e-3)
    assert head_cell(page, 1, 1).get_attribute("aria-selected") == "false"
    keys(page, Keys.ENTER)
    assert head_cell(page, 1, 1).get_attribute("aria-selected") == "true"
    keys(page, Keys.END)
    assert number_in(said(page)) == pytest.approx(flow.residual[1].item(), rel=5e-3)
    assert page.complaints() == []


def test_a_layer_without_patterns_says_so(opened):
    flow = flow_result(LONG[:48], n_layers=9, n_heads=9)
    shown = {int(layer) for layer in heads(flow).payload["patterns"]}
    missing = min(set(range(9)) - shown)
    page = opened(page_of(heads(flow)))
    head_cell(page, missing, 4).click()
    assert f"The patterns of layer {missing} are not in this view" in said(page, ".osl-none")
    assert number_in(said(page)) == pytest.approx(flow.head[missing, 4].item(), rel=5e-3)
    head_cell(page, min(shown), 4).click()
    page.until("return document.querySelector('.osl-none').hidden")
    page.until(PICTURES + " === 10")
    assert page.complaints() == []


def test_patterns_wait_until_one_comes_near_them(opened):
    view = heads(flow_result())
    page = opened(f"<!doctype html><body><div style='height: 9000px'></div>{view}")
    layer, head = view.payload["start"]
    assert said(page).startswith(f"layer {layer}, head {head}:")  # the map is there at once
    assert page.ask(PICTURES) == 0
    page.ask("document.querySelector('.osl-patterns').scrollIntoView()")
    page.until(PICTURES + " === 3")
    page.until("return document.querySelector('.osl-pattern h2').textContent.startsWith(arguments[0])", f"{head} ·")
    assert page.complaints() == []


# -- route ---------------------------------------------------------------------------------------------------


def test_the_route_shows_tokens_and_moves_of_the_picked_layer(opened):
    flow = flow_result(source=3)
    page = opened(page_of(route(flow)))
    (view,) = page.views()
    view.find_element("css selector", "input[aria-label='layer 2']").click()
    page.until(
        "return arguments[0].querySelectorAll('.osl-stage > div:not([hidden]) > div > .colored-tokens').length", view
    )
    page.until(MOVES + ".startsWith('Layer 2:')")
    assert page.tokens(view) == seen(TOKENS)
    for i in (3, 10):
        assert page.share(view, i) == pytest.approx(flow.node[2, i].item(), rel=5e-3)
    lines = [line.text for line in view.find_elements("css selector", ".osl-now + .osl-moves:not(:has(button)) li")]
    assert lines == [words.replace("\u2060", "") for words in route(flow).payload["moves"][2]]
    assert page.complaints() == []


def test_a_heavy_move_shows_its_layer(opened):
    flow = flow_result(source=3)
    edges = heaviest_edges(flow, 5)
    page = opened(page_of(route(flow)))
    buttons = page.driver.find_elements("css selector", ".osl-moves button")
    assert [button.text.split(" brings")[0] for button in buttons] == [
        f"layer {edge.layer}: head {edge.head}" for edge in edges
    ]
    buttons[1].click()
    page.until(MOVES + ".startsWith(arguments[0])", f"Layer {edges[1].layer}:")
    page.until("return document.querySelector('input:checked').value === arguments[0]", str(edges[1].layer))
    assert page.complaints() == []


def test_the_overview_is_pointed_at_walked_and_clicked(opened):
    from selenium.webdriver import ActionChains, Keys

    flow = flow_result(source=3)
    page = opened(page_of(route(flow)))
    box = page.driver.find_element("css selector", ".osl-overview")
    hint = said(page)
    width, height = box.size["width"], box.size["height"]
    to = (int((7.5 / 11 - 0.5) * width), int((0.5 - 1.5 / 4) * height))  # layer 1 of 0 … 3 from below, token 7
    ActionChains(page.driver).move_to_element_with_offset(box, *to).perform()
    assert said(page).startswith(f"layer 1, token 7 {visible_token(TOKENS[7])}:")
    assert number_in(said(page)) == pytest.approx(flow.node[1, 7].item(), rel=5e-3)
    ActionChains(page.driver).click().perform()
    page.until(MOVES + ".startsWith('Layer 1:')")
    keys(page, Keys.ARROW_UP, Keys.ARROW_RIGHT, Keys.ENTER)
    assert number_in(said(page)) == pytest.approx(flow.node[2, 8].item(), rel=5e-3)
    page.until(MOVES + ".startsWith('Layer 2:')")
    ActionChains(page.driver).move_by_offset(0, 300).perform()
    keys(page, Keys.TAB)
    assert said(page) == hint
    assert page.complaints() == []


def test_the_overview_is_as_dark_as_the_shares(opened):
    """The picture's own points: the larger a share, the darker, on the scale of the tokens."""
    flow = flow_result(source=3)
    page = opened(page_of(route(flow)))
    script = (
        "const canvas = document.querySelector('.osl-overview canvas'), pen = canvas.getContext('2d');"
        "const blue = (row, i) =>"
        " pen.getImageData((i + .5) * canvas.width / 11, (row + .5) * canvas.height / 4, 1, 1).data[2];"
        "return [0, 1, 2, 3].map(row => Array.from({length: 11}, (_, i) => blue(row, i)))"
    )
    blue = torch.tensor(page.ask(script), dtype=torch.float64).flip(0)  # layer 0 is the lowest row
    floor = 0.1 / len(TOKENS)
    shade = (1 - flow.node.clamp(min=floor).log() / torch.tensor(floor).double().log()).clamp(min=0)
    torch.testing.assert_close(blue, 255 - shade * (255 - 66), atol=1.0, rtol=0)


# -- activations ---------------------------------------------------------------------------------------------


def test_a_layer_and_a_head_can_be_picked(opened):
    flow = flow_result()
    page = opened(page_of(activations(flow)))
    (view,) = page.views()
    assert page.tokens(view) == seen(TOKENS)
    brought = torch.cat([flow.head_at, flow.residual_at[:, None]], dim=1)
    for layer, head in ((0, 0), (1, 1), (2, 2)):
        choose(page, 0, layer)
        choose(page, 1, head)
        for i in (0, 5, 10):
            share = brought[layer, head, i].item()
            label = "return [...arguments[0].querySelectorAll(arguments[1])][arguments[2]].getAttribute('aria-label')"
            page.until(label + ".includes('share ' + arguments[3])", view, CELLS, i, f"{float(f'{share:.3g}'):g}"[:4])
            assert number_in(page.ask(label, view, CELLS, i)) == pytest.approx(share, rel=5e-3, abs=6e-7)
    assert page.complaints() == []


def test_hover_shows_millionths_of_the_paths(opened):
    from selenium.webdriver import ActionChains

    flow = flow_result()
    page = opened(page_of(activations(flow)))
    (view,) = page.views()
    layer, head = activations(flow).payload["start"]
    cell = view.find_elements("css selector", CELLS)[10]
    ActionChains(page.driver).move_to_element(cell).perform()
    box = "const box = document.querySelector('.colored-tokens > div'); return box && box.innerText"
    text = page.until(box)
    assert float(text.split()[-1]) / 1e6 == pytest.approx(flow.head_at[layer, head, 10].item(), rel=5e-3)
    after = "return getComputedStyle(document.querySelector('.colored-tokens > div'), '::after').content"
    assert "millionths" in page.ask(after)
    assert page.complaints() == []


def test_two_views_of_activations_keep_their_menus_apart(opened):
    page = opened(page_of(activations(flow_result()), activations(flow_result(seed=5))))
    ids = page.ask("return [...document.querySelectorAll('.osl-activations select')].map(select => select.id)")
    labels = page.ask("return [...document.querySelectorAll('.osl-activations label')].map(label => label.htmlFor)")
    assert len(set(ids)) == 4
    assert labels == ids
    assert page.complaints() == []


# -- two prompts ---------------------------------------------------------------------------------------------


def test_two_prompts_follow_one_pick(opened):
    one, other = flow_result(), flow_result(tuple(f" t{i}" for i in range(6)), seed=7)
    page = opened(page_of(prompts(one, other)))
    first, second = page.views()
    first.find_element("css selector", "input[aria-label='layer 2']").click()
    for view, flow in ((first, one), (second, other)):
        page.until("return arguments[0].querySelector('.osl-now').textContent.startsWith('layer 2 of 3')", view)
        page.until("return arguments[0].querySelectorAll('.osl-stage > div:not([hidden])').length === 1", view)
        assert page.tokens(view) == seen(flow.tokens)
        assert page.share(view, 5) == pytest.approx(flow.node[2, 5].item(), rel=5e-3)
    assert page.complaints() == []


# -- all of them ---------------------------------------------------------------------------------------------


def test_tokens_that_bite_are_shown_as_text(opened):
    flow = flow_result(EVIL, source=1)
    page = opened(page_of(*(view(flow) for view in VIEWS), prompts(profile(tokens=EVIL), profile(tokens=EVIL))))
    page.until(PICTURES + " === 3")
    head_cell(page, 1, 1).click()
    assert page.ask("return document.title") == "views"
    assert page.ask("return document.querySelectorAll('img, svg').length") == 0
    for view in page.views()[1:]:
        assert page.tokens(view) == seen(EVIL)
    assert page.complaints() == []


@pytest.mark.parametrize("view", VIEWS)
def test_a_phone_scrolls_down_only(opened, driver, view):
    with screen(driver, PHONE):
        page = opened(page_of(view(flow_result((*LONG, "x" * 300), n_layers=12, n_heads=9))))
        if view is heads:
            page.ask("document.querySelector('.osl-patterns').scrollIntoView()")
            page.until(PICTURES + " === 10")
        assert page.ask("return document.documentElement.scrollWidth") == PHONE["width"]
        assert page.complaints() == []


@pytest.mark.parametrize("view", [route, activations, layers])
def test_text_is_readable_in_the_dark(opened, driver, view):
    """As JupyterLab says that it is dark; text against its own background, both seen through the same filter."""
    with dark(driver):
        page = opened(f'<body data-jp-theme-light="false" style="background: #111; color: #eee">{view(flow_result())}')
        (shown,) = page.views()
        colours = page.ask(
            "return [...arguments[0].querySelectorAll(arguments[1] + ' > span')].map(cell => {"
            "const style = getComputedStyle(cell); return [style.color, style.backgroundColor, style.filter]})",
            shown,
            CELLS,
        )
        assert len(colours) == len(TOKENS)
        assert all(contrast(text, background) >= 7 for text, background, _ in colours)
        assert all("invert" in filtered for *_, filtered in colours)


def test_the_map_of_a_dark_page_is_dark(opened, driver):
    page = opened(f'<body data-jp-theme-light="false" style="background: #111; color: #eee">{heads(flow_result())}')
    page.until(PICTURES + " === 3")
    for part in (".osl-grid td", ".osl-pattern canvas"):
        assert "invert" in page.ask("return getComputedStyle(document.querySelector(arguments[0])).filter", part)
    assert page.complaints() == []
