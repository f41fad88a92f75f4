"""What every result says of itself: which model, which software, which convention of y."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oversquash_lens.capture.architecture import Architecture
    from oversquash_lens.capture.hooked_model import HookedModel

FINAL_GAIN = ("model", "restored", "unknown")


def software_versions() -> dict[str, str]:
    """Versions that a number depends on, for reports and saved traces."""
    found = {"python": platform.python_version()}
    for package in ("oversquash-lens", "transformer-lens", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass(frozen=True)
class About:
    """Where a number comes from; carried by every trace, profile and truth.

    `folded`: the model's LayerNorm gains were folded into its weights. `final_gain` says what then became of
    the last norm's gain γ₃ in y: "model" (the model applies it itself), "restored" (folded, but known, and
    multiplied back), "unknown" (folded and not recoverable: y lacks it; not comparable with the other two).
    """

    model: str
    model_class: str
    n_layers: int
    n_heads: int
    d_model: int
    dtype: str
    folded: bool
    final_gain: str
    bos: bool
    chat: bool
    versions: dict[str, str]

    def to_dict(self) -> dict:
        return asdict(self)

    def with_prompt(self, *, bos: bool, chat: bool) -> About:
        return replace(self, bos=bos, chat=chat)

    def __str__(self) -> str:
        parts = [f"{self.model} as {self.model_class} ({self.dtype})"]
        parts.append("starts with BOS" if self.bos else "no BOS")
        if self.chat:
            parts.append("chat template")
        if self.folded:
            parts.append(f"folded norms, final gain {self.final_gain}")
        return ", ".join(parts)


def describe(model: HookedModel, architecture: Architecture) -> About:
    """The label that every result carries."""
    return About(
        model=getattr(model.cfg, "model_name", None) or "unnamed",
        model_class=type(model).__name__,
        n_layers=architecture.n_layers,
        n_heads=architecture.n_heads,
        d_model=architecture.d_model,
        dtype=str(architecture.dtype).removeprefix("torch."),
        folded=architecture.folded,
        final_gain=architecture.final_gain_state,
        bos=False,
        chat=False,
        versions=software_versions(),
    )
