"""The README's commands and code are run as they stand, against a server on another port."""

import contextlib
import io
import json
import re
import subprocess

import pytest
from trimtab_client import Client

from lab.corpus.sentiment import polarity
from scripts.docs import DOCS
from scripts.readme import REAL, real
from vectors.evaluate.graders import Answer, SentimentGrader, grade

README = (DOCS.parent / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
OPENING = "Review of a hotel. I stayed at it with my team on Monday."


MEANT = {"cheerful": SentimentGrader(wanted="positive"), "gloomy": SentimentGrader(wanted="negative")}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def part(name: str) -> str:
    return README.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]


def test_the_opening_shows_texts_of_the_results_that_are_as_it_says() -> None:
    assert part("real").strip() == real()
    rows = [row.strip("| ").split(" | ") for row in real().splitlines()[2:]]
    assert [name.strip("`") for *_, name in rows] == [name for name, *_ in REAL]
    for _, untouched, steered, name in rows:
        (before, after) = grade(MEANT[name.strip("`")], [Answer(untouched), Answer(steered)])
        assert after.success and not before.success


def test_the_curl_line_steers_as_the_vector_says(lab_url: str) -> None:
    (command,) = [block for block in blocks("sh") if block.startswith("curl")]
    done = subprocess.run(["bash", "-c", command.replace(ADDRESS, lab_url)], capture_output=True, check=True, text=True)
    answer = json.loads(done.stdout)
    with Client(lab_url) as client:
        base = client.complete(OPENING, max_tokens=28, temperature=0).text
    assert answer["choices"][0]["text"] != base
    assert polarity(answer["choices"][0]["text"]) == "positive"
    (applied,) = answer["steering"]["applied"]
    assert applied["artifact"].startswith("cheerful@")
    assert applied["tokens"]["prompt"] == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("code", blocks("python"), ids=["openai", "client"])
def test_the_python_code_runs(code: str, lab_url: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace(ADDRESS, lab_url), "README.md", "exec"), {})
    said = printed.getvalue()
    if "OpenAI" in code:
        whole, receipt, streamed, cheerful = said.strip().splitlines()
        assert polarity(whole) == polarity(streamed) == "negative"
        assert streamed.strip() == whole.strip()
        assert polarity(cheerful) == "positive"
        assert receipt.startswith("cheerful@")
    else:
        assert "cheerful@1" in said


def test_the_transcript_is_what_the_software_says(lab_url: str) -> None:
    """Word for word up to the first word, beyond which rounding on another machine may choose differently."""
    told = dict(re.findall(r"^\| (base|cheerful|gloomy) \| (.+) \|$", part("transcript"), flags=re.MULTILINE))
    assert set(told) == {"base", "cheerful", "gloomy"}
    models = {"base": "lab-dense", "cheerful": "lab-dense:cheerful", "gloomy": "lab-dense:gloomy"}
    with Client(lab_url) as client:
        for name, model in models.items():
            text = client.complete(OPENING, model=model, max_tokens=28, temperature=0).text
            assert text.split()[0] == told[name].split()[0]
            assert polarity(text) == polarity(told[name])
