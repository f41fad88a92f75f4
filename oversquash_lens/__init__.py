"""What of its prompt can a Transformer's last token still hear?

Everything public is named here and imported when first used, so that `import oversquash_lens` costs nothing. What is
not named here is reached through its module: docs/architecture.md says which.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oversquash_lens.analyses.audit import audit
    from oversquash_lens.analyses.findings import findings
    from oversquash_lens.analyses.plan import plan
    from oversquash_lens.analyses.what_if import what_if
    from oversquash_lens.capture import edits
    from oversquash_lens.capture.batch import record_batch
    from oversquash_lens.capture.edits import edited_attention
    from oversquash_lens.capture.hooks import attention_path_hooks, last_token_residual_hooks
    from oversquash_lens.capture.recorder import record, recording
    from oversquash_lens.capture.subject import support
    from oversquash_lens.capture.trace import Trace
    from oversquash_lens.collapse import families
    from oversquash_lens.collapse.curve import collapse_curve
    from oversquash_lens.errors import OversquashError
    from oversquash_lens.jacobian.measured import measured_sensitivity, probe_corrected_sensitivity
    from oversquash_lens.jacobian.measured_flow import measured_flow
    from oversquash_lens.models.loading import load_model
    from oversquash_lens.paper.reproduce import reproduce
    from oversquash_lens.paper.tasks import run_task
    from oversquash_lens.paths.flow import flow
    from oversquash_lens.paths.heaviest import heaviest_edges, heaviest_paths
    from oversquash_lens.paths.profiles import (
        expected_error,
        mean_field_sensitivity,
        path_bound,
        path_products,
        profiles,
    )
    from oversquash_lens.paths.squashing import squashing
    from oversquash_lens.swaps.substitution import substitution
    from oversquash_lens.swaps.swap import swap
    from oversquash_lens.sweeps.run import sweep
    from oversquash_lens.viz import figures, views
    from oversquash_lens.viz.report import report
    from oversquash_lens.viz.reports import reports

__all__ = [
    "OversquashError",
    "Trace",
    "attention_path_hooks",
    "audit",
    "collapse_curve",
    "edited_attention",
    "edits",
    "expected_error",
    "families",
    "figures",
    "findings",
    "flow",
    "heaviest_edges",
    "heaviest_paths",
    "last_token_residual_hooks",
    "load_model",
    "mean_field_sensitivity",
    "measured_flow",
    "measured_sensitivity",
    "path_bound",
    "path_products",
    "plan",
    "probe_corrected_sensitivity",
    "profiles",
    "record",
    "record_batch",
    "recording",
    "report",
    "reports",
    "reproduce",
    "run_task",
    "squashing",
    "substitution",
    "support",
    "swap",
    "sweep",
    "views",
    "what_if",
]

# Where each public name is defined. The imports above say the same to type checkers; a test holds the two together.
_HOME = {
    "OversquashError": "errors",
    "Trace": "capture.trace",
    "attention_path_hooks": "capture.hooks",
    "audit": "analyses.audit",
    "collapse_curve": "collapse.curve",
    "edited_attention": "capture.edits",
    "edits": "capture",
    "expected_error": "paths.profiles",
    "families": "collapse",
    "figures": "viz",
    "findings": "analyses.findings",
    "flow": "paths.flow",
    "heaviest_edges": "paths.heaviest",
    "heaviest_paths": "paths.heaviest",
    "last_token_residual_hooks": "capture.hooks",
    "load_model": "models.loading",
    "mean_field_sensitivity": "paths.profiles",
    "measured_flow": "jacobian.measured_flow",
    "measured_sensitivity": "jacobian.measured",
    "path_bound": "paths.profiles",
    "path_products": "paths.profiles",
    "plan": "analyses.plan",
    "probe_corrected_sensitivity": "jacobian.measured",
    "profiles": "paths.profiles",
    "record": "capture.recorder",
    "record_batch": "capture.batch",
    "recording": "capture.recorder",
    "report": "viz.report",
    "reports": "viz.reports",
    "reproduce": "paper.reproduce",
    "run_task": "paper.tasks",
    "squashing": "paths.squashing",
    "substitution": "swaps.substitution",
    "support": "capture.subject",
    "swap": "swaps.swap",
    "sweep": "sweeps.run",
    "views": "viz",
    "what_if": "analyses.what_if",
}
_MODULES = {"edits", "families", "figures", "views"}  # public names that are modules
# Names of version 0.1.0 that are reached elsewhere now.
_MOVED = {
    "About": "oversquash_lens.results.About",
    "Audit": "oversquash_lens.analyses.audit.Audit",
    "CollapseCurve": "oversquash_lens.collapse.curve.CollapseCurve",
    "CorrectedSensitivity": "oversquash_lens.jacobian.measured.CorrectedSensitivity",
    "Edit": "oversquash_lens.capture.edits.Edit",
    "ExpectedError": "oversquash_lens.paths.profiles.ExpectedError",
    "Family": "oversquash_lens.collapse.families.Family",
    "Findings": "oversquash_lens.analyses.findings.Findings",
    "Flow": "oversquash_lens.paths.flow.Flow",
    "Forecast": "oversquash_lens.analyses.plan.Plan",
    "GateError": "oversquash_lens.errors.HookMismatchError",
    "HeavyEdge": "oversquash_lens.paths.heaviest.HeavyEdge",
    "HeavyPath": "oversquash_lens.paths.heaviest.HeavyPath",
    "InputError": "oversquash_lens.errors.InputError",
    "MeasuredSensitivity": "oversquash_lens.jacobian.measured.MeasuredSensitivity",
    "ModelError": "oversquash_lens.errors.ModelError",
    "NumberFormat": "oversquash_lens.collapse.precision.NumberFormat",
    "PathProfile": "oversquash_lens.paths.recursion.PathProfile",
    "Speaker": "oversquash_lens.paper.generator.Generator",
    "Squashing": "oversquash_lens.paths.squashing.Squashing",
    "SweepResult": "oversquash_lens.sweeps.result.SweepResult",
    "TraceFileError": "oversquash_lens.errors.TraceFileError",
    "Verdict": "oversquash_lens.capture.subject.SupportVerdict",
    "WhatIf": "oversquash_lens.analyses.what_if.WhatIf",
    "cached_models": "oversquash_lens.models.default_model.cached_models",
    "compare": "oversquash_lens.analyses.compare.compare",
    "computing_in": "oversquash_lens.collapse.precision.computing_in",
    "count_paths": "oversquash_lens.paths.squashing.count_paths",
    "flows": "oversquash_lens.paths.flow.flows",
    "forecast": "oversquash_lens.plan",
    "lemmas": "oversquash_lens.collapse.lemmas",
    "number_format": "oversquash_lens.collapse.precision.number_format",
    "uniform_causal": "oversquash_lens.paths.squashing.uniform_causal",
}


def _hint(name: str) -> str:
    """Where the name went, or which one was probably meant."""
    if name in _MOVED:
        return f"; it is {_MOVED[name]} now"
    from difflib import get_close_matches

    close = get_close_matches(name, [*__all__, *_MOVED], 1)
    return f"; did you mean {close[0]!r}?" if close else "; see docs/api.md for what is public"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("oversquash-lens")
    if name in _HOME:
        home = import_module(f"oversquash_lens.{_HOME[name]}")
        return import_module(f"{home.__name__}.{name}") if name in _MODULES else getattr(home, name)
    raise AttributeError(f"module 'oversquash_lens' has no attribute {name!r}{_hint(name)}", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
