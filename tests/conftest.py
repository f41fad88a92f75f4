"""Fixtures that several test modules share: the embedded default as both classes, and small random models."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import shape_checks  # noqa: F401  # before the package
import torch
from bad_summary import bad_days
from browsing import Opened, chromium
from small_models import NO_BRIDGE, NO_HOOKED, bridge, has_bridge, has_hooked, hooked, tokens_for

# Models made anew for each test, which may change them: both classes, LayerNorm and RMSNorm, plain and gated.
FRESH = {
    "hooked-ln": lambda: hooked(11, n_heads=4, d_model=16),
    "hooked-rms": lambda: hooked(
        12, norm="RMS", gated=True, act="silu", positions="rotary", n_heads=4, kv_heads=2, d_model=16
    ),
    "bridge-gpt2": lambda: bridge(13, "gpt2"),
    "bridge-llama": lambda: bridge(14, "llama"),
}


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The embedded default as a TransformerBridge."""
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    import oversquash_lens

    return oversquash_lens.load_model(kind="bridge", device="cpu")


@pytest.fixture(scope="session")
def smollm2_hooked() -> Any:
    """The embedded default as a HookedTransformer; skipped where TransformerLens has no such class."""
    if not has_hooked():
        pytest.skip(NO_HOOKED)
    import oversquash_lens

    return oversquash_lens.load_model(kind="hooked", device="cpu")


@pytest.fixture
def make() -> Callable[[str], Any]:
    """Name -> a new model of `FRESH`; skips the test where this TransformerLens lacks the class."""

    def made(name: str) -> Any:
        if name.startswith("hooked") and not has_hooked():
            pytest.skip(NO_HOOKED)
        if name.startswith("bridge") and not has_bridge():
            pytest.skip(NO_BRIDGE)
        return FRESH[name]()

    return made


@pytest.fixture(params=FRESH)
def fresh(request: pytest.FixtureRequest, make: Callable[[str], Any]) -> tuple[Any, torch.Tensor]:
    """(model, tokens [1, 6]) of every kind in turn; the model is this test's own.

    It has made one pass: a bridge's first one installs hooks of its own, for good.
    """
    model, tokens = make(request.param), tokens_for(5, 6)
    with torch.no_grad():
        model(tokens)
    return model, tokens


@pytest.fixture
def watch() -> Callable[..., dict[str, torch.Tensor]]:
    """watch(model, tokens, *hook names) -> what these hooks see, batch and all."""

    def watched(model: Any, tokens: torch.Tensor, *names: str) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Callable:
            def hook(value: torch.Tensor, hook: Any = None) -> None:
                seen[name] = value.detach().clone()

            return hook

        with torch.no_grad():
            model.run_with_hooks(tokens, fwd_hooks=[(name, keep(name)) for name in names])
        return seen

    return watched


@pytest.fixture
def count_hooks() -> Callable[[Any], int]:
    """count_hooks(model) -> every hook of any kind on any of its modules."""

    def counted(model: Any) -> int:
        modules = {id(module): module for module in [*model.modules(), *model.hook_dict.values()]}
        original = getattr(model, "original_model", None)
        if original is not None:
            modules |= {id(module): module for module in original.modules()}
        torch_hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        lists = ("fwd_hooks", "bwd_hooks")
        return sum(len(getattr(module, kind, ())) for module in modules.values() for kind in (*torch_hooks, *lists))

    return counted


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium with the network off, one for each module."""
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def opened(driver: Any, tmp_path: Path) -> Callable[[str], Opened]:
    """opened(html) -> the page in the browser, drawn to the end."""

    def opened(html: str) -> Opened:
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        return Opened(driver, path)

    return opened


@pytest.fixture(scope="module")
def tiny() -> Any:
    """A small random model as a TransformerBridge."""
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    return bridge(17, "llama")


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> Callable[..., SimpleNamespace]:
    """cli(*arguments) -> code, out, err; run in an empty folder. The model is the real one unless `tiny` is used."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> SimpleNamespace:
        from oversquash_lens.cli import main

        capsys.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def on_tiny(cli: Callable, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """As `cli`, with a small random model in place of the default; `.asked` says how it was asked for."""

    def load_model(name: str, **options: Any) -> Any:
        on_tiny.asked = {"name": name, **options}
        return tiny

    monkeypatch.setattr("oversquash_lens.models.loading.load_model", load_model)

    def on_tiny(*arguments: str) -> SimpleNamespace:
        return cli(*arguments)

    on_tiny.asked = None
    return on_tiny


@pytest.fixture(autouse=True, scope="module")
def _models_leave_with_their_module() -> Iterator[None]:
    yield
    gc.collect()  # bridges are cyclic; several SmolLM2 at once would be gigabytes


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the soundness tests and the bad days tried, added up over all test processes."""
    if days := bad_days(terminalreporter.stats):
        terminalreporter.write_line(days)
    found = [
        json.loads(value)
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, value in report.user_properties
        if name == "soundness"
    ]
    if found:
        from soundness import Tally

        tally = Tally()
        for figures in found:
            tally.merge(figures)
        terminalreporter.write_line(str(tally))
