"""What of its prompt can a Transformer's last token still hear?

Everything public is named here and imported when first used, so that `import oversquash_lens` costs nothing.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "About": "record.about",
    "Audit": "measure.audit",
    "GateError": "errors",
    "InputError": "errors",
    "MeasuredSensitivity": "measure.jacobian",
    "ModelError": "errors",
    "OversquashError": "errors",
    "PathProfile": "measure.paths",
    "Trace": "record.trace",
    "TraceFileError": "errors",
    "attention_path_hooks": "record.hooks",
    "audit": "measure.audit",
    "cached_models": "models",
    "compare": "measure.compare",
    "count_paths": "measure.paths",
    "last_token_residual_hooks": "record.hooks",
    "load_model": "models",
    "mean_field_sensitivity": "measure.mean_field",
    "measured_sensitivity": "measure.jacobian",
    "path_bound": "measure.bounds",
    "path_products": "measure.bounds",
    "record": "record",
    "recording": "record.recorder",
    "report": "render.page",
    "uniform_causal": "measure.paths",
    "views": "render.views",
}
_MODULES = {"record", "views"}  # the package `record` is callable: see there

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'oversquash_lens' has no attribute {name!r}")
    module = import_module(f"oversquash_lens.{_HOME[name]}")
    return module if name in _MODULES else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
