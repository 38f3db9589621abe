"""A stored vector is tried again over HTTP: another version whose default does what the grader asks for."""

import json
from pathlib import Path

import pytest
from trimtab_client import BadRequest, Client, NotFound
from typer.testing import CliRunner

from lab.datasets import load
from server.cli import app

PROMPTS = [[{"role": "user", "content": f"Tell me about {thing}."}]
           for thing in ("the harbour", "an old clock", "winter", "the market")]


@pytest.mark.slow
def test_a_vector_is_tuned_for_other_prompts(lab_url: str, tmp_path: Path) -> None:
    with Client(lab_url) as client:
        pairs = [{name: record[name] for name in ("positive", "negative")} for record in load("language_french")[:60]]
        made = client.extract(pairs, name="to-tune", trial={"effort": "none"})
        with pytest.raises(NotFound):
            client.trial_picture(made.artifact)
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("\n".join(json.dumps({"messages": prompt}) for prompt in PROMPTS))
        done = CliRunner().invoke(app, ["tune", made.artifact, "--prompts", str(prompts), "--grader",
                                        '{"kind": "language", "language": "fr"}'],
                                  env={"TRIMTAB_URL": lab_url, "COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        assert "stored to-tune@2" in done.output
        before, after = client.get_artifact(made.artifact), client.get_artifact("to-tune@2")
        card = after.card or {}
        assert "trial" not in (before.card or {}) and card["trial"]["surface"]
        assert client.trial_picture("to-tune@2").startswith(b"\x89PNG")
        report = client.evaluate(PROMPTS, [{"kind": "language", "language": "fr"}],
                                 spec={"interventions": [{"artifact": "to-tune@2"}]}, draws=0, max_tokens=20)
        shares = [arm["graded"][0]["success"]["share"]
                  for arm in (report["untouched"], report["results"][0]["steered"])]
        # A draft says of itself that nothing beat the random vectors; anything else writes French.
        assert shares[0] == 0 and (shares[1] >= 0.5 or "draft" in card)


def test_what_cannot_be_tuned_is_refused_at_once(lab_url: str) -> None:
    with Client(lab_url) as client:
        with pytest.raises(BadRequest, match="nothing says which answers are a success"):
            client.start_tuning("french", trial={"effort": "quick"})
        with pytest.raises(NotFound):
            client.start_tuning("nowhere", trial={"grader": {"kind": "whole"}, "prompts": PROMPTS})
