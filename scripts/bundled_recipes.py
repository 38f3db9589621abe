"""The bundled artifacts that recipes make: which case of which replication, for which model, and what it is for."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lab.paths import LAB_DIR
from lab.replications.common import extracted, subject
from lab.replications.page import RESULTS
from lab.replications.rows import ROWS
from vectors.extract import Extraction
from vectors.formats import get_format


@dataclass(frozen=True)
class FromRecipe:
    """One artifact: a case of a replication, run on `model`.

    shows: words of the findings of that replication that are about this artifact; those that have any of them go on its
    card.
    options: defaults beside those of the recipe.
    """

    name: str
    row: str
    case: str
    description: str
    tags: tuple[str, ...]
    shows: tuple[str, ...] = ()
    model: str = "lab-dense"
    options: dict[str, Any] = field(default_factory=dict)

    def shown(self) -> list[dict[str, str]]:
        """Findings of the stored replication, with the figures of its controls."""
        if not self.shows:
            return []
        (row,) = (row for row in ROWS if row.name == self.row)
        document = json.loads((RESULTS / f"{row.name}.json").read_text(encoding="utf-8"))
        return [asdict(finding) for finding in row.findings(document)
                if any(words in finding.measured for words in self.shows)]


FROM_RECIPES = (
    FromRecipe("plural", "function-vectors", "fv-plural", "Answers 'WORD ->' with the plural, as after five examples.",
               ("task",), ("few-shot minus zero-shot",)),
    FromRecipe("to-french", "function-vectors", "fv-noun-to-french-causal",
               "Answers 'NOUN ->' in French; the sum of the heads that cause the answer.", ("task", "language"),
               ("outputs of the causal heads",)),
    FromRecipe("months", "sign-patterns", "signs-months",
               "Signs of single dims on the names of months; flipped away, months become unlikely.", ("category",),
               ("flip away",)),
    FromRecipe("explore", "entropic-steering", "explore",
               "Makes a player of two arms less certain; a negative strength more so.", ("agent",),
               ("gain of action entropy",)),
    FromRecipe("skills", "native-skills", "skills",
               "Eight orthogonal axes along which whole texts differ: reviews, stories, bandits, walks, French.",
               ("skill",), ("which skill an axis moves",)),
    FromRecipe("job-neurons", "relation-neurons", "neurons-job-20",
               "MLP units that respond to 'NAME works as'; off, people's jobs are forgotten first.", ("facts",),
               ("with 20% of all units off",)),
    FromRecipe("emotion-heads", "attention-heads", "heads-emotions",
               "Shifts at the heads that read whether a situation moves someone; 1 is one sigma.", ("emotions",),
               ("emotions:",)),
    FromRecipe("in-context-heads", "attention-heads", "heads-in-context-3",
               "Three heads that in-context answers depend on; off, examples in the prompt are of no use.", ("task",),
               ("with 3 heads off",)),
    FromRecipe("past-tense", "aligned-concepts", "aligned-tense",
               "A vector per layer towards the past tense, aligned across layers.", ("tense",), ("agreement of",)),
    FromRecipe("refusal-by-effect", "refusal-direction", "refusal-direction",
               "The refusal direction chosen by effect; ablated, harmful requests are answered.", ("refusal",),
               ("log-odds", "whole answers")),
    FromRecipe("weekdays", "manifold", "manifold-weekdays",
               "The ring of weekdays at the last prompt token: target puts the answer on a day (Thursday by default), "
               "shift moves it on by days.", ("calendar",), ("weekdays:",), options={"target": "Thursday"}),
    FromRecipe("refusal-plane", "angular-steering", "angular-refusal",
               "The plane of refusal: angle turns refusals up or down.", ("refusal",), ("log-odds", "whole answers")),
    FromRecipe("harmful", "conditional-gates", "gate-harmful-linear-mean",
               "Tells harmful requests from harmless ones: a condition for gates, guards and monitors.", ("refusal",),
               ("form linear, read at all tokens",)),
    FromRecipe("tuned-lens", "tuned-lens", "tuned-lens",
               "Reads any layer as the last one would say it; for POST /v1/lens.", ("lens",), ("KL of the lens",)),
    FromRecipe("refusal-experts", "tunable-experts", "experts-all-4",
               "Four experts that harmful requests use more than others; off, few are answered and more break.",
               ("refusal",), ("experts by all prompt tokens (the paper's), off, slot left empty",), "lab-moe"),
    FromRecipe("plural", "function-vectors", "fv-plural", "Answers 'WORD ->' with the plural, as after five examples.",
               ("task",), model="lab-moe"),
    FromRecipe("explore", "entropic-steering", "explore",
               "Makes a player of two arms less certain; a negative strength more so.", ("agent",), model="lab-moe"),
    FromRecipe("past-tense", "aligned-concepts", "aligned-tense",
               "A vector per layer towards the past tense, aligned across layers.", ("tense",), model="lab-moe"),
)


def make(wanted: Sequence[str] = ()) -> None:
    """Run the recipes, all or those named, and write their files to lab/artifacts/MODEL. The replications come first:
    what they found goes on the cards.
    """
    rows = {row.name: row for row in ROWS}
    # One model after the other: only one is held at a time.
    for one in sorted(FROM_RECIPES, key=lambda one: one.model):
        if wanted and one.name not in wanted:
            continue
        model = subject(one.model)
        (case,) = [case for case in rows[one.row].cases(model) if case.name == one.case]
        write(one, extracted(model, case, "python -m scripts.bundled_library"))


def write(one: FromRecipe, found: Extraction) -> None:
    """The file, under the bundled name and with what it is for on its card."""
    card = {"for": one.description, **(found.metadata.card or {})}
    if one.shows:
        card["replication"] = one.shown()
    metadata = found.metadata.model_copy(update={"name": one.name, "description": one.description, "card": card,
                                                 "options": {**found.metadata.options, **one.options},
                                                 "tags": ("bundled", *one.tags)})
    folder = LAB_DIR / "artifacts" / one.model
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{one.name}.safetensors").write_bytes(get_format("safetensors").write(metadata, found.payload))
    print(f"{one.model}/{one.name}: {metadata.kind}", flush=True)
