"""The comparison as a page of its own, for people: `quantization-report.html`. Called by `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from jinja2 import Environment

from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.gate import Estimate, Evaluation
from tunesmith_server.evaluation.figures import Candidate
from tunesmith_server.evaluation.rows import Row

__all__ = ["page_of"]

MOST_DIFFERENT = 30

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<title>{{ plan.quantization }} of {{ plan.model_uri }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2433; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid #d8dce4; vertical-align: top }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
footer { color: #5c667a }
</style></head><body>
<h1>{{ plan.quantization }} against the unquantized model</h1>
<p>{{ plan.model_uri }}, revision {{ plan.revision }}: both models as served, asked the same
{{ found.examples }} held-out rows{% if found.skipped %}; {{ found.skipped }} more don't fit into the context of
{{ plan.context_length }} tokens{% endif %}.</p>
<table><tr><th></th><th>unquantized</th><th>{{ plan.quantization }}</th><th>difference, 95 % interval</th></tr>
{% for name, before, after, difference in lines %}<tr><th>{{ name }}</th><td class="number">{{ before }}</td>
<td class="number">{{ after }}</td><td class="number">{{ difference }}</td></tr>
{% endfor %}</table>
{% if different %}<h2>Rows that they answer differently</h2>
<table><tr><th>question</th><th>reference</th><th>unquantized</th><th>{{ plan.quantization }}</th></tr>
{% for question, reference, one, other in different %}<tr><td class="text">{{ question }}</td>
<td class="text">{{ reference }}</td>
<td class="text">{{ one }}</td><td class="text">{{ other }}</td></tr>
{% endfor %}</table>
{% endif %}<footer>Intervals: score interval of paired proportions (Newcombe 1998, method 10) for exact matches,
Wilson's for agreement, bootstrap over rows for F1 and perplexity. Perplexity is of the reference answers,
teacher-forced.</footer>
</body></html>
"""


def page_of(
    plan: ServingPlan, found: Evaluation, rows: Sequence[Row], baseline: Candidate, quantized: Candidate
) -> str:
    """Return the page; what the rows and the models say is escaped."""
    asked = zip(rows, baseline.answers.answers, quantized.answers.answers, strict=True)
    different = (
        (row.question, row.reference, one.text, other.text) for row, one, other in asked if one.text != other.text
    )
    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(
        plan=plan, found=found, lines=_lines(found), different=list(islice(different, MOST_DIFFERENT))
    )


def _lines(found: Evaluation) -> list[tuple[str, str, str, str]]:
    one, other = found.baseline, found.quantized
    lines = []
    if one.perplexity and other.perplexity:
        change = _range(found.perplexity_increase_percent, "% higher")
        lines.append(("perplexity", one.perplexity, other.perplexity, change))
    if one.accuracy_percent and other.accuracy_percent:
        name = f"{found.metric}, %"
        change = _range(found.accuracy_drop_percent, "points lower")
        lines.append((name, one.accuracy_percent, other.accuracy_percent, change))
    if found.agreement_percent:
        lines.append(("answers alike", "", "", _range(found.agreement_percent, "%")))
    lines.append(("tokens per second", one.tokens_per_second, other.tokens_per_second, ""))
    lines.append(("file, MB", f"{one.size_bytes / 1e6:.1f}", f"{other.size_bytes / 1e6:.1f}", ""))
    lines.append(("resident memory, MB", f"{one.memory_bytes / 1e6:.0f}", f"{other.memory_bytes / 1e6:.0f}", ""))
    return lines


def _range(estimate: Estimate | None, unit: str) -> str:
    return f"{estimate.value} {unit} ({estimate.low} to {estimate.high})" if estimate is not None else ""
