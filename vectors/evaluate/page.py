"""An evaluation as a page to read: what was asked, what came out, and texts of every arm side by side."""

import base64

from jinja2 import Environment

from vectors.evaluate.picture import draw
from vectors.evaluate.report import EvaluationReport

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation {{ r.id }}</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
td, th { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #8884 }
img { max-width: 100%; background: #fff }
pre { overflow: auto; padding: .8rem; border: 1px solid #8886; border-radius: .3rem; font-size: .85rem }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; margin-bottom: 1.5rem }
.texts > div { border: 1px solid #8886; border-radius: .3rem; padding: .6rem; white-space: pre-wrap;
               overflow-wrap: anywhere }
.label { font-size: .8rem; opacity: .75; display: block }
</style>
</head>
<body>
<h1>Evaluation of {{ r.preset or ", ".join(r.artifacts) or "a spec" }}</h1>
<p>{{ r.prompts }} prompts on {{ r.model }} ({{ r.engine }} engine), {{ r.max_tokens }} tokens at temperature
{{ r.temperature }}, {{ r.draws }} random artifacts of equal size at each dose. {{ r.created_at.isoformat() }}.</p>
{% if r.mandatory %}<p>A policy has a mandatory spec for who asked, so {{ r.mandatory|join(", ") }} acted in front of
every arm, also of the one that is called untouched.</p>
{% endif %}{% for one in r.results %}<h2>Dose {{ one.steered.dose }}</h2>
<ul>{% for said in one.verdict %}
<li><strong>{{ r.graders[loop.index0].kind }}</strong>: {{ said }}</li>{% endfor %}</ul>
{% endfor %}
<p><img alt="Successes, broken texts and KL at each dose, beside random artifacts"
src="data:image/svg+xml;base64,{{ picture }}"></p>
<h2>Shares</h2>
<table><tr><th>arm</th>{% for g in r.graders %}<th>success: {{ g.kind }}</th>{% endfor %}<th>broken</th>
<th>KL, nats a token</th><th>perplexity</th><th>repetition</th>{% if r.controls %}<th>on controls</th>{% endif %}
{% if r.tasks %}<th>tasks right</th>{% endif %}</tr>
{% for name, arm in arms %}<tr><td>{{ name }}</td>{% for g in arm.graded %}<td>{{ share(g.success) }}</td>{% endfor %}
<td>{{ share(arm.graded[0].broken) }}</td><td>{{ "%.3f" % arm.kl }}</td><td>{{ "%.1f" % arm.perplexity }}</td>
<td>{{ "%.3f" % arm.repetition }}</td>{% if r.controls %}<td>{{ share(arm.controls.success) }}</td>{% endif %}
{% if r.tasks %}<td>{{ share(arm.tasks) }}</td>{% endif %}</tr>
{% endfor %}</table>
<h2>Texts</h2>
{% for prompt in r.shown %}{% set n = loop.index0 %}<h3>{{ prompt }}</h3>
<div class="texts">{% for name, arm in sampled %}{% if arm.samples|length > n %}<div><span class="label">{{ name }}:
{{ arm.samples[n].outcomes|join(", ") }}</span>{{ arm.samples[n].text }}</div>{% endif %}{% endfor %}</div>
{% endfor %}
<h2>Spec and graders</h2>
<pre>{{ r.spec|tojson(indent=1) }}</pre>
<pre>{{ r.graders|tojson(indent=1) }}</pre>
</body>
</html>
"""
# Whatever a model wrote, the page runs nothing and loads nothing.
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'none'")


def page(report: EvaluationReport) -> str:
    """The report as HTML that needs no other file and no script."""
    arms = [("untouched", report.untouched)]
    sampled = [("untouched", report.untouched)]
    for one in report.results:
        arms.append((f"dose {one.steered.dose:g}", one.steered))
        sampled.append((f"dose {one.steered.dose:g}", one.steered))
        arms += [(f"random {k + 1}, dose {one.steered.dose:g}", arm) for k, arm in enumerate(one.random)]
        sampled += [(f"random 1, dose {one.steered.dose:g}", arm) for arm in one.random[:1]]
    environment = Environment(autoescape=True)
    return environment.from_string(PAGE).render(
        r=report, arms=arms, sampled=sampled, picture=base64.b64encode(draw(report, "svg")).decode(),
        share=lambda one: f"{one.share:.0%} ({one.count} of {one.total}; {one.low:.0%} to {one.high:.0%})")
