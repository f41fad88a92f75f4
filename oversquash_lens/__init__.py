"""What of its prompt can a Transformer's last token still hear?

Everything public is named here and imported when first used, so that `import oversquash_lens` costs nothing.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "About": "record.about",
    "Audit": "measure.audit",
    "CollapseCurve": "measure.collapse",
    "CorrectedSensitivity": "measure.corrected",
    "Edit": "record.edits",
    "ExpectedError": "measure.expected",
    "Family": "measure.family",
    "Findings": "measure.findings",
    "Flow": "measure.flow",
    "Forecast": "measure.forecast",
    "GateError": "errors",
    "HeavyEdge": "measure.heaviest",
    "HeavyPath": "measure.heaviest",
    "InputError": "errors",
    "MeasuredSensitivity": "measure.jacobian",
    "ModelError": "errors",
    "NumberFormat": "measure.precision",
    "OversquashError": "errors",
    "PathProfile": "measure.paths",
    "Speaker": "paper.speakers",
    "Squashing": "measure.squashing",
    "SweepResult": "measure.sweep_result",
    "Trace": "record.trace",
    "TraceFileError": "errors",
    "Verdict": "record.support",
    "WhatIf": "measure.what_if",
    "attention_path_hooks": "record.hooks",
    "audit": "measure.audit",
    "cached_models": "models",
    "collapse_curve": "measure.collapse",
    "compare": "measure.compare",
    "computing_in": "measure.precision",
    "count_paths": "measure.paths",
    "edits": "record.edits",
    "edited_attention": "record.edits",
    "expected_error": "measure.expected",
    "families": "paper.families",
    "findings": "measure.findings",
    "figures": "render.figures",
    "flow": "measure.flow",
    "flows": "measure.flow",
    "forecast": "measure.forecast",
    "heaviest_edges": "measure.heaviest",
    "heaviest_paths": "measure.heaviest",
    "last_token_residual_hooks": "record.hooks",
    "lemmas": "measure.lemmas",
    "load_model": "models",
    "mean_field_sensitivity": "measure.mean_field",
    "measured_sensitivity": "measure.jacobian",
    "number_format": "measure.precision",
    "path_bound": "measure.bounds",
    "path_products": "measure.bounds",
    "probe_corrected_sensitivity": "measure.corrected",
    "profiles": "measure.profiles",
    "record": "record",
    "record_batch": "record.batch",
    "recording": "record.recorder",
    "report": "render.page",
    "reports": "render.reports",
    "reproduce": "paper.experiments",
    "run_task": "paper.tasks",
    "squashing": "measure.squashing",
    "support": "record.support",
    "sweep": "measure.sweep",
    "uniform_causal": "measure.paths",
    "views": "render.views",
    "what_if": "measure.what_if",
}
_MODULES = {"edits", "families", "figures", "lemmas", "record", "views"}  # the package `record` is callable: see there

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'oversquash_lens' has no attribute {name!r}")
    module = import_module(f"oversquash_lens.{_HOME[name]}")
    return module if name in _MODULES else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
