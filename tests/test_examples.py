"""Every example of the documentation runs as it is printed, on a fresh server with the bundled artifacts, and says what
the page says. Those artifacts are afterwards what they were before.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from trimtab_client import Client

from scripts.docs import DOCS
from tests.conftest import serving
from vectors.evaluate.graders import Answer, LanguageGrader, RefusalGrader, SentimentGrader, Verdict, grade

ROOT = DOCS.parent
ADDRESS = "http://127.0.0.1:8000"
OPENING = "Review of a hotel. I stayed at it with my team on Monday."
# Pages whose blocks are no commands for a server on lab-dense, and the test that holds them instead.
ELSEWHERE = {"extending": "tests/test_extending.py", "verify": "tests/verify", "vllm": "tests/engines/vllm", "cli":
             "tests/test_docs.py", "errors": "tests/test_docs.py", "clients": "tests/clients/real",
             "security": "tests/server/test_keys.py", "settings": "tests/server/test_settings_file.py",
             "rollouts": "tests/server/test_rollouts.py", "replicas": "tests/server/test_replicas.py",
             "saes": "tests/engines/test_sae.py"}
TIMEOUT_S = 900
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Ran:
    """What one block of a page printed. last: the last JSON value of it."""

    language: str
    code: str
    said: str

    def values(self) -> list[Any]:
        found, at, decoder = [], 0, json.JSONDecoder()
        while (match := re.compile(r"[{\[]").search(self.said, at)) is not None:
            try:
                value, at = decoder.raw_decode(self.said, match.start())
                found.append(value)
            except ValueError:
                at = match.start() + 1
        return found

    @property
    def last(self) -> Any:
        return self.values()[-1]


def text_of(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def verdict(text: str, grader: Any) -> Verdict:
    return grade(grader, [Answer(text)])[0]


def steers_cheerfully(ran: Ran) -> None:
    assert verdict(text_of(ran.last), SentimentGrader()).outcome == "positive"
    applied = ran.last["steering"]["applied"][0]
    assert applied["artifact"] == "cheerful@1" and applied["tokens"]["generation"] > 0


def has_the_shape_of_a_response(ran: Ran) -> None:
    """The page's sample has no field that an answer lacks."""
    answer = httpx.post(f"{os.environ['URL']}/v1/completions", timeout=60, json={
        "model": "lab-dense", "prompt": OPENING, "max_tokens": 8, "temperature": 0, "steering": {
            "interventions": [{"artifact": "cheerful@production"}]}})
    same_fields(json.loads(ran.code), answer.json())


def same_fields(sample: Any, answer: Any) -> None:
    if isinstance(sample, dict) and "…" not in sample:
        assert sample.keys() <= answer.keys() or any(key.isdigit() for key in sample)
        for key in sample.keys() & answer.keys():
            same_fields(sample[key], answer[key])
    elif isinstance(sample, list) and sample and isinstance(sample[0], dict) and answer:
        same_fields(sample[0], answer[0])


def answers_instead_of_refusing(text: str) -> None:
    assert verdict(text, RefusalGrader()).outcome != "refusal"


def is_a_spec(ran: Ran) -> None:
    """A JSON example is accepted by a completion."""
    body = json.loads(ran.code)
    spec = body.get("steering", {"interventions": [body]})
    with Client(os.environ["URL"]) as client:
        assert client.complete(OPENING, steering=spec, max_tokens=8).steering.applied


def says(*wanted: str) -> Callable[[Ran], None]:
    def check(ran: Ran) -> None:
        for text in wanted:
            assert text in ran.said, f"{text!r} is not in {ran.said[-2000:]!r}"

    return check


def artifacts_as_told(ran: Ran) -> None:
    created, imported, listed, one, versions, patched, moved = ran.values()[:7]
    assert created["ref"] == "calm@1" and imported["ref"] == "calm@2"
    assert [entry["name"] for entry in listed["data"]] == ["calm"] and one["version"] == 2
    assert [version["version"] for version in versions["data"]] == [2, 1]
    assert patched["description"] == "Keeps calm." and moved["aliases"] == ["production"]


def presets_as_told(ran: Ran) -> None:
    stored, models, default, _, on, off = ran.values()
    assert stored["name"] == "sunny" and "lab-dense:sunny" in [model["id"] for model in models["data"]]
    assert default["spec"]["interventions"][0]["artifact"] == "cheerful" and on["on"] is True and off["on"] is False


def an_opened_gate(ran: Ran) -> None:
    answers_instead_of_refusing(text_of(ran.last))
    assert ran.last["steering"]["applied"][0]["choices"][0]["gate"]["open"] is True


def a_read_along(ran: Ran) -> None:
    assert {probe.split("@")[0] for probe in (entry["probe"] for entry in ran.last["steering"]["monitor"])} == {
        "harmful", "cheerful"}


def a_lens_that_finds_the_plural(ran: Ran) -> None:
    layers = next(value for value in ran.values() if isinstance(value, dict) and "layers" in value)["layers"]
    assert layers[-1]["positions"][0]["top"][0]["text"].strip() == "horses"
    assert "horses" in ran.said.rsplit("}", 1)[1]


def a_reconstruction_instead(ran: Ran) -> None:
    assert ran.last["steering"]["applied"][0]["options"]["error"] == "drop" and text_of(ran.last)


def a_job(ran: Ran) -> None:
    assert ran.last["id"].startswith("job-")


def measured_effects(ran: Ran) -> None:
    assert ran.last["steering"]["effects"]["choices"][0]["total"]["kl"]["mean"] >= 0


def graded_as_the_text_reads(ran: Ran) -> None:
    """The receipt says of the answer what its text says."""
    outcomes, text = ran.last["steering"]["outcomes"], text_of(ran.last)
    told = {one["grader"]: one["choices"][0]["outcome"] for one in outcomes["graders"]}
    assert outcomes["status"] == "graded" and told.keys() == {"refusal", "sentiment"}
    names = {"refusal": "refused", "compliance": "answered"}
    read = verdict(text, RefusalGrader()).outcome
    # How likely the text is counts, too, so a text whose words are whole may still be a broken one.
    assert told["refusal"] in (names.get(read, read), "broken"), (told, text)


def graded_french(ran: Ran) -> None:
    french = [line for line in ran.said.splitlines() if verdict(line, LanguageGrader(language="fr")).success]
    assert french, ran.said[-3000:]


def is_more_cheerful_than_without(ran: Ran) -> None:
    """The text is positive, and that of the same vector without the contrast is another one."""
    assert verdict(text_of(ran.last), SentimentGrader()).outcome == "positive"
    assert ran.last["steering"]["contrast"] == {"weak": [], "alpha": 0.1, "beta": 2.0}
    with Client(os.environ["URL"]) as client:
        alone = client.complete(OPENING, max_tokens=32, temperature=0,
                                steering={"artifact": "cheerful", "strength": 0.5})
    assert alone.text != text_of(ran.last) and alone.steering.contrast is None


CHECKS: dict[str, list[Callable[[Ran], None]]] = {
    "api": [steers_cheerfully, has_the_shape_of_a_response, lambda ran: answers_instead_of_refusing(ran.said),
            artifacts_as_told, presets_as_told, a_job, a_job, says("past-by-command", "month-signs"),
            says("past-by-python@1"), steers_cheerfully,
            says("True"), says('"custom_id": "first"')],
    "calibration": [says("past@1", "KL per token", "0.1 kl"), is_a_spec],
    "concepts": [says("upbeat@1", "upbeat@2"), is_a_spec],
    "contrast": [is_more_cheerful_than_without, says("cheerful@1", "against the untouched model: alpha 0.1, beta 2"),
                 says("french@1 0.5")],
    "effects": [measured_effects, graded_as_the_text_reads],
    "gates": [an_opened_gate, a_job],
    "graders": [says("[('wanted', True), ('broken', False)]"), graded_french],
    "guards": [is_a_spec],
    "library": [says("calm@1"), says('"controls"')],
    "patching": [says(" Tuesday  Friday True"), says("its visible part", "20 random", "faithful. no_effect:")],
    "reading": [a_read_along, says("True"), a_lens_that_finds_the_plural, a_job,
                says("2 torch.Size([2, 128]) [0, 1]", "['cheerful@1 (add)'] True"), says("2 rows of 2 texts", "act-")],
    "sae-training": [says("recovered_of_mean", "said@1", "feature"), a_reconstruction_instead],
    "spec": [is_a_spec],
    "stacks": [says("KL alone", "cheerful", "leaves 0.00", "reorder:")],
}


def blocks(page: str) -> list[tuple[str, str]]:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    # What is marked as text needs something that a fresh server does not have.
    return [(language, code) for language, code in found if language != "text"]


def test_every_page_with_examples_has_checks_for_all_of_them() -> None:
    with_blocks = {path.stem for path in DOCS.glob("*.md") if blocks(path.stem)}
    assert with_blocks == {*CHECKS, *ELSEWHERE}
    assert {page: len(blocks(page)) for page in CHECKS} == {page: len(checks) for page, checks in CHECKS.items()}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("examples"), "lab-dense") as url:
        yield url


@pytest.fixture
def place(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout, with the commands of this environment on the path."""
    (tmp_path / "lab").symlink_to(ROOT / "lab")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "trimtab"
    command.write_text(f"#!{sys.executable}\nfrom server.cli import app\napp()\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "clients/python"),
                                                      os.environ.get("PYTHONPATH", "")]))
    for name in ("URL", "TRIMTAB_URL"):
        monkeypatch.setenv(name, url)
    return tmp_path


@pytest.mark.parametrize("page", CHECKS)
def test_the_examples_of_a_page_run_in_order_and_say_what_it_says(page: str, place: Path, url: str) -> None:
    bundled = contents(url)
    for number, ((language, code), check) in enumerate(zip(blocks(page), CHECKS[page], strict=True)):
        ran = Ran(language, code, "" if language == "json" else printed(language, code.replace(ADDRESS, url), place))
        try:
            check(ran)
        except Exception as error:
            error.add_note(f"example {number} of docs/{page}.md printed:\n{ran.said[-4000:]}")
            raise
    after = contents(url)
    assert {name: after[name] for name in bundled} == bundled, "an example changed what was there"


def printed(language: str, code: str, place: Path) -> str:
    command = [sys.executable, "-c", code] if language == "python" else [shutil.which("bash") or "bash", "-ec", code]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def contents(url: str) -> dict[str, Any]:
    """Names with what they stand for."""
    with Client(url) as client:
        return {artifact.name: (artifact.ref, artifact.digest) for artifact in client.list_artifacts(limit=100).data}
