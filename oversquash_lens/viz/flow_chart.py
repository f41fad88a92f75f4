"""A flow as charts: where the paths run by position, by head and by route, and how wide they are by depth."""

from __future__ import annotations

from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import InputError
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.recursion import ROWS
from oversquash_lens.paths.squashing import Squashing
from oversquash_lens.viz.captions import NAMES
from oversquash_lens.viz.chart import Chart, Panel, Series
from oversquash_lens.viz.diagrams import Heat, Route
from oversquash_lens.viz.html import visible_token
from oversquash_lens.viz.scales import short

FEW = 12  # positions that a route draws all of
MOST_ALONE = 12  # positions of a longer prompt that have a column of their own, besides the source and the last token
MATTERS = 0.03  # share at some layer from which on a position may have one
SEEN = 0.005  # share from which on a route draws a line
WIDTH, THROUGH = "effective width", "share of the paths"


def map_chart(flow: Flow) -> Chart:
    """Layer × position map of node shares, the effective width beside it."""
    return _chart("flow", f"Where the paths run: {_of(flow)}", flow, map_panel(flow))


def heads_chart(flow: Flow) -> Chart:
    """Layer × head map of flow, what stays in the residual stream beside it."""
    return _chart("heads", f"Which heads carry it: {_of(flow)}", flow, heads_panel(flow))


def width_chart(flow: Flow) -> Chart:
    """Effective width by depth."""
    return _chart("width", f"Where it narrows: {_of(flow)}", flow, width_panel(flow))


def squashing_chart(squashing: Squashing) -> Chart:
    """Effective width by depth beside that of even attention: what the causal mask alone would make of it."""
    found = squashing.flow
    layer, relative = squashing.narrowest, squashing.relative_width
    said = f"narrowest against even attention on entering layer {layer}: {relative[layer].item():.2f} times as wide"
    panel = width_panel(found, squashing.null, note=said)
    return _chart("width", f"Where it narrows: {_of(found)}", found, panel)


def route_chart(flow: Flow) -> Chart:
    """The flow as a diagram of positions and layers, faint positions gathered."""
    return _chart("route", f"The route: {_of(flow)}", flow, route_panel(flow))


def map_panel(flow: Flow, title: str = "") -> Panel:
    _check(flow)
    return Panel(
        title,
        "token",
        "layer",
        (Series(WIDTH, tuple(range(flow.n_layers + 1)), tuple(flow.effective_width.tolist())),),
        heat=Heat(_rows(flow.node), low=0.1 / len(flow.tokens), high=1.0, label=THROUGH),
        x_names=tuple(map(visible_token, flow.tokens)),
    )


def heads_panel(flow: Flow, title: str = "") -> Panel:
    _check(flow)
    heads = flow.head.shape[1]
    most = flow.head.max().item()
    return Panel(
        title,
        "head",
        "layer",
        (Series("residual stream", tuple(range(flow.n_layers)), tuple(flow.residual.tolist())),),
        heat=Heat(
            _rows(flow.head),
            low=0.1 / (heads + 1),  # an even share: heads and residual stream together are 1
            high=next((end for end in (0.2, 0.5) if most <= end), 1.0),
            label=THROUGH,
        ),
        x_names=tuple(map(str, range(heads))),
    )


def width_panel(flow: Flow, null: Flow | None = None, title: str = "", note: str = "") -> Panel:
    """`null`: the flow of a null model on the same prompt, as a second line."""
    layers = tuple(range(flow.n_layers + 1))
    flows = {WIDTH: flow} if null is None else {"this model": flow, "even attention, all else the same": null}
    for each in flows.values():
        _check(each)
    series = tuple(Series(label, layers, tuple(each.effective_width.tolist())) for label, each in flows.items())
    return Panel(title, "layer", f"{WIDTH}, of {len(flow.tokens)} positions", series, note=note)


def route_panel(flow: Flow, title: str = "") -> Panel:
    return Panel(title, "token", "layer", route=route_of(flow))


def route_of(flow: Flow) -> Route:
    """The flow with faint positions gathered, and its moves split by head."""
    _check(flow)
    spans = _spans(flow)
    belongs = torch.zeros(len(flow.tokens), len(spans), dtype=torch.float64)
    for stop, (start, end) in enumerate(spans):
        belongs[start:end, stop] = 1
    node = flow.node.double() @ belongs
    stays, moves = [], []
    for layer in range(flow.n_layers):
        shares = _moved(flow, layer, belongs)
        whole = shares.sum(0)
        stays.append(flow.residual_at[layer].double() @ belongs + whole.diagonal())
        for to, source in (whole.fill_diagonal_(0) >= SEEN).nonzero().tolist():
            head = shares[:, to, source].argmax().item()
            others = shares[head, to, source] < 0.5 * whole[to, source]
            moves.append((layer, source, to, whole[to, source].item(), f"{layer}.{head}" + "+" * bool(others)))
    names = tuple(_name(flow, span, node[:, i].max().item()) for i, span in enumerate(spans))
    source = None
    if flow.source is not None:
        source = next(i for i, (start, end) in enumerate(spans) if start <= flow.source < end)
    return Route(names, tuple(spans), _rows(node), _rows(torch.stack(stays)), tuple(moves), source, SEEN)


def _spans(flow: Flow) -> list[tuple[int, int]]:
    """Runs of positions from left to right: those that matter alone, the others between them together."""
    n = len(flow.tokens)
    peak = flow.node.amax(0)
    alone = set(range(n)) if n <= FEW else {i for i in peak.topk(MOST_ALONE).indices.tolist() if peak[i] >= MATTERS}
    alone |= {n - 1} if flow.source is None else {n - 1, flow.source}
    runs = [list(run) for _, run in groupby(range(n), key=lambda i: i if i in alone else -1)]
    return [(run[0], run[-1] + 1) for run in runs]


def _name(flow: Flow, span: tuple[int, int], most: float) -> str:
    start, end = span
    if end - start == 1:
        return short([visible_token(flow.tokens[start])])[0]
    return f"… {end - start} others, " + (f"{most:.0%} at most" if most >= 0.005 else "below 1%" if most else "none")


def _moved(flow: Flow, layer: int, belongs: Float[Tensor, "pos stop"]) -> Float[Tensor, "head to stop"]:
    """What each head moves from stop to stop in a layer, a block of rows at a time."""
    n, stops = belongs.shape
    moved = torch.zeros(flow.head_at.shape[1], stops, stops, dtype=torch.float64)
    for start in range(0, n, ROWS):
        end = min(start + ROWS, n)
        moved += belongs[start:end].T @ (flow.edge_rows(layer, start, end) @ belongs[:end])
    return moved


def _chart(name: str, title: str, flow: Flow, panel: Panel) -> Chart:
    data = {"paths": flow.kind, "source": flow.source}
    return Chart(name, title, (panel,), (), str(flow.about), notes=flow.notes, data=data)


def _of(flow: Flow) -> str:
    name = NAMES.get(flow.kind, flow.kind)
    if flow.source is None:
        return f"{name}, from all tokens"
    return f"{name}, from {short([visible_token(flow.tokens[flow.source])])[0]} (token {flow.source})"


def _check(flow: Flow) -> None:
    for shares in (flow.node, flow.head_at, flow.residual_at):
        if not ((shares >= 0) & (shares <= 1 + 1e-9)).all():
            raise InputError(
                f"this flow ({flow.kind}) has NaN, negative or infinite shares; expected shares from 0 to 1: look for "
                "NaN or infinite values in the model's activations, and record again in float32"
            )


def _rows(values: Float[Tensor, "row column"]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, values.tolist()))
