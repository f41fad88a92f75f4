"""What of its prompt can a Transformer's last token still hear?

Everything public is named here and imported when first used, so that `import oversquash_lens` costs nothing.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "About": "capture.about",
    "Audit": "analyses.audit",
    "CollapseCurve": "collapse.curve",
    "CorrectedSensitivity": "jacobian.correction",
    "Edit": "capture.edits",
    "ExpectedError": "paths.expected_error",
    "Family": "collapse.families",
    "Findings": "analyses.findings",
    "Flow": "paths.flow",
    "HookMismatchError": "errors",
    "HeavyEdge": "paths.heaviest",
    "HeavyPath": "paths.heaviest",
    "InputError": "errors",
    "MeasuredSensitivity": "jacobian.measured",
    "ModelError": "errors",
    "NumberFormat": "collapse.precision",
    "OversquashError": "errors",
    "PathProfile": "paths.recursion",
    "Generator": "paper.generator",
    "Squashing": "paths.squashing",
    "SweepResult": "sweeps.result",
    "Trace": "capture.trace",
    "TraceFileError": "errors",
    "Verdict": "capture.support",
    "WhatIf": "analyses.what_if",
    "attention_path_hooks": "capture.hooks",
    "audit": "analyses.audit",
    "cached_models": "models.loading",
    "collapse_curve": "collapse.curve",
    "compare": "analyses.audit",
    "computing_in": "collapse.precision",
    "count_paths": "paths.null",
    "edits": "capture.edits",
    "edited_attention": "capture.edits",
    "expected_error": "paths.expected_error",
    "families": "collapse.families",
    "findings": "analyses.findings",
    "figures": "viz.figures",
    "flow": "paths.flow",
    "flows": "paths.flow",
    "heaviest_edges": "paths.heaviest",
    "heaviest_paths": "paths.heaviest",
    "last_token_residual_hooks": "capture.hooks",
    "lemmas": "collapse.lemmas",
    "load_model": "models.loading",
    "mean_field_sensitivity": "paths.profiles",
    "measured_sensitivity": "jacobian.measured",
    "number_format": "collapse.precision",
    "Plan": "analyses.plan",
    "plan": "analyses.plan",
    "path_bound": "paths.profiles",
    "path_products": "paths.profiles",
    "probe_corrected_sensitivity": "jacobian.correction",
    "profiles": "paths.profiles",
    "record": "capture.recorder",
    "record_batch": "capture.batch",
    "recording": "capture.recorder",
    "report": "viz.report",
    "reports": "viz.reports",
    "reproduce": "paper.reproduce",
    "run_task": "paper.tasks",
    "squashing": "paths.squashing",
    "support": "capture.subject",
    "sweep": "sweeps.run",
    "uniform_causal": "paths.null",
    "views": "viz.views",
    "what_if": "analyses.what_if",
}
_MODULES = {"edits", "families", "figures", "lemmas", "views"}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'oversquash_lens' has no attribute {name!r}")
    module = import_module(f"oversquash_lens.{_HOME[name]}")
    return module if name in _MODULES else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
