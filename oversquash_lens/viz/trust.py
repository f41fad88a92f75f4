"""The sections on how far to trust a report: the audit, and the assumptions with what each does to the numbers."""

from __future__ import annotations

from oversquash_lens.analyses.assumptions import Assumption
from oversquash_lens.analyses.audit import AuditRow
from oversquash_lens.analyses.findings import Findings
from oversquash_lens.viz.captions import NAMES
from oversquash_lens.viz.document import DASH, cell, formula, guide, section, table
from oversquash_lens.viz.html import escape


def audited(found: Findings) -> str:
    """Every measure beside the truth."""
    audit = found.audit
    caption = (
        "Each measure held against J, the derivative of the last output by each token’s embedding that "
        "autograd finds. A rank correlation of 1 orders the tokens as ‖J‖_F does. A log₁₀ ratio of 0 has the "
        "true size, 1 is ten times as large; bounds speak of the spectral norm ‖J‖₂. – stands where the "
        "paper leaves the constant open, and where the truth that a bound speaks of was not measured."
    )
    rows = [_audit_row(row, len(audit.tokens)) for row in audit.rows]
    said = f"<p>{escape(audit.sentence)}</p>\n"
    return section("How far to trust these numbers", said + table("Audit", caption, _AUDIT_HEAD, rows), "trust")


_AUDIT_HEAD = """<tr>
<th scope="col" rowspan="2">measure</th>
<th scope="col" rowspan="2" class="n">rank correlation</th>
<th scope="colgroup" colspan="4" class="group">log&#8321;&#8320; of measure over truth</th>
<th scope="col" rowspan="2" class="n">tokens below the truth</th>
<th scope="col" rowspan="2">promises to be above</th>
</tr>
<tr>
<th scope="col" class="n">median</th>
<th scope="col" class="n">smallest</th>
<th scope="col" class="n">largest</th>
<th scope="col">truth</th>
</tr>
"""


def _audit_row(row: AuditRow, n: int) -> str:
    ratios = (row.median_log10_ratio, row.min_log10_ratio, row.max_log10_ratio)
    below = DASH if row.violations is None else f"{row.violations:,} of {n:,}"
    return (
        f'<tr><th scope="row">{escape(NAMES.get(row.name, row.name))} <code>{escape(row.name)}</code></th>'
        f"{cell(row.spearman, '.2f')}{''.join(cell(ratio, '+.2f') for ratio in ratios)}"
        f"<td>{formula(row.compared_with)}</td>"
        f'<td class="n">{below}</td><td>{"yes" if row.promises_bound else "no"}</td></tr>\n'
    )


def assumed(found: Findings) -> str:
    """What the theorem assumes and this model does not keep; then what each measure says of itself."""
    broken = "".join(map(_assumption, found.assumptions))
    text = (
        "The theorem behind the paper’s bound assumes what no trained model keeps. Here is what is true on this prompt "
        "instead, and what each assumption by itself does to the numbers."
    )
    content = (guide(text) + f'<dl class="assumptions">\n{broken}</dl>\n' if broken else "") + _notes(found)
    return section("Assumptions that do not hold here", content, "assumptions") if content else ""


def _assumption(each: Assumption) -> str:
    return f"<dt>{escape(each.claim)}</dt><dd>{escape(each.found)}</dd><dd>{escape(each.effect)}</dd>\n"


def _notes(found: Findings) -> str:
    audit = found.audit
    said: dict[tuple[str, ...], list[str]] = {}  # measures that assume the same are named together
    for name, profile in (*audit.bounds.items(), ("mean_field", audit.mean_field)):
        said.setdefault(tuple(profile.notes), []).append(NAMES.get(name, name))
    entries = "".join(
        f"<dt>{escape(', '.join(names))}</dt>{''.join(f'<dd>{escape(note)}</dd>' for note in notes)}\n"
        for notes, names in said.items()
        if notes
    )
    return f"<h3>What each measure says of itself</h3>\n<dl>\n{entries}</dl>\n" if entries else ""
