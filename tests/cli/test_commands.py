"""Commands against a running server with the bundled model, as a person types them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trimtab_client import Client, JobFailed, NotFound
from typer.testing import CliRunner, Result

from lab.datasets import load
from lab.paths import LAB_DIR
from server.cli import app

WIDTH = 128
Run = Callable[..., Result]


@pytest.fixture
def run(lab_url: str) -> Run:
    def typed(*words: str, answer: str | None = None) -> Result:
        return CliRunner().invoke(app, list(words), input=answer, env={"TRIMTAB_URL": lab_url, "COLUMNS": "200"})

    return typed


@pytest.fixture
def client(lab_url: str) -> Iterator[Client]:
    with Client(lab_url) as made:
        yield made


def store(client: Client, name: str, seed: float = -9) -> str:
    return client.create_artifact(
        {"name": name, "kind": "vector", "op": "add", "site": "resid_post", "description": f"{name} for tests"},
        {2: {"vector": [seed + i / 7 for i in range(WIDTH)]}}).ref


def test_chat_shows_both_sides_and_the_receipt(run: Run, client: Client) -> None:
    store(client, "cli-push")
    plain = client.chat("How do I bake a cake?", max_tokens=12, temperature=0).text.strip()
    done = run("chat", "How do I bake a cake?", "-s", "cli-push=2.5", "--max-tokens", "12")
    assert done.exit_code == 0, done.output
    assert " base " in done.output
    assert " steered " in done.output
    assert plain in done.output
    assert "cli-push@1 · add · resid_post layers 2 · 2.5 raw" in done.output


def test_chat_without_steering_shows_the_model_alone(run: Run) -> None:
    done = run("chat", "How do I bake a cake?", "--max-tokens", "5")
    assert done.exit_code == 0
    assert " base " in done.output
    assert " steered " not in done.output


def test_a_conversation_goes_on_until_an_empty_line(run: Run) -> None:
    done = run("chat", "--max-tokens", "5", answer="Hello.\nHow are you?\n\nnot said\n")
    assert done.exit_code == 0
    assert done.output.count(" base ") == 2


def test_a_name_that_two_models_have_is_listed_once_and_with_all_of_them_for_each(run: Run, client: Client) -> None:
    """The bundled `cheerful` of another model lies beside this model's own, and neither moves the other."""
    def listed(*options: str) -> list[tuple[str, str, list[str]]]:
        rows = json.loads(run("artifacts", "ls", "cheerful", "--json", *options).output)
        return [(one["ref"], one["model_id"], one["aliases"]) for one in rows
                if one["name"] == "cheerful"]

    before = listed()
    assert [model for _, model, _ in before] == ["lab-dense"]
    of_another = (LAB_DIR / "artifacts" / "smollm2" / "cheerful.safetensors").read_bytes()
    client.import_artifact(of_another)
    assert listed() == before and client.get_artifact("cheerful").model_id == "lab-dense"
    assert sorted(model for _, model, _ in listed("--all")) == ["lab-dense", "smollm2"]
    shown = run("artifacts", "ls", "cheerful", "--all").output
    assert "smollm2" in shown and "smollm2" not in run("artifacts", "ls", "cheerful").output


def test_library_commands(run: Run, client: Client, tmp_path: Path) -> None:
    ref = store(client, "cli-lib")
    listed = run("artifacts", "ls", "cli-lib").output
    assert ref in listed
    assert "cli-lib for tests" in listed
    found = json.loads(run("artifacts", "ls", "cli-lib", "--json").output)
    assert [one["ref"] for one in found] == [ref]
    assert json.loads(run("artifacts", "show", "cli-lib", "--json").output)["digest"] == found[0]["digest"]
    file = tmp_path / "out.safetensors"
    assert run("artifacts", "export", "cli-lib", "-o", str(file)).exit_code == 0
    assert "stored cli-copy@1" in run("artifacts", "import", str(file), "--name", "cli-copy").output
    assert client.get_artifact("cli-copy").digest == found[0]["digest"]
    assert "cli-copy@production is now cli-copy@1" in run("artifacts", "alias", "cli-copy", "production", "1").output
    refused = run("artifacts", "delete", "cli-copy", "--yes")
    assert refused.exit_code == 1
    assert "error conflict" in refused.output
    assert run("artifacts", "delete", "cli-copy", answer="n\n").exit_code == 1
    assert client.get_artifact("cli-copy").version == 1
    assert "deleted cli-copy@1" in run("artifacts", "delete", "cli-copy", "--force", "--yes").output


def test_a_pt_file_is_converted_here(run: Run, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "vectors.pt"
    torch.save({1: torch.ones(WIDTH), 3: torch.full((WIDTH,), 2.0)}, path)
    done = run("artifacts", "import", str(path), "--name", "cli-pt", "--metadata",
               '{"op": "add", "site": "resid_post", "kind": "vector"}')
    assert done.exit_code == 0, done.output
    assert client.get_artifact("cli-pt").stored_layers == [1, 3]


def test_preset_commands(run: Run, client: Client) -> None:
    store(client, "cli-preset-vector")
    done = run("presets", "create", "cli-preset", "-s", "cli-preset-vector=-2rel", "--description", "Down.")
    # The artifact records no norm, so the unit cannot be used: refused before it is stored.
    assert done.exit_code == 1
    assert "strength.unit" in done.output
    assert "served as lab-dense:cli-preset" in run("presets", "create", "cli-preset", "-s",
                                                   "cli-preset-vector=-2unit").output
    assert "lab-dense:cli-preset" in run("presets", "ls").output
    spec = json.loads(run("presets", "show", "cli-preset").output)["spec"]
    assert spec["interventions"][0]["strength"] == {"value": -2.0, "unit": "unit"}
    assert "deleted cli-preset@1" in run("presets", "delete", "cli-preset", "-y").output


def test_switches_effects_and_aliases_of_presets(run: Run, client: Client) -> None:
    store(client, "cli-switch")
    assert json.loads(run("default-spec", "set", "-s", "cli-switch=0.5").output)["interventions"]
    assert json.loads(run("default-spec", "show").output)["interventions"][0]["artifact"] == "cli-switch"
    run("default-spec", "clear")
    assert json.loads(run("default-spec", "show").output) is None
    assert "nothing is steered" in run("kill-switch", "on").output
    assert json.loads(run("kill-switch", "show").output)["on"] is True
    run("kill-switch", "off")
    assert client.kill_switch().on is False
    assert run("effects").exit_code == 0 and set(json.loads(run("effects", "--json").output)) == {
        "data", "outcomes"}
    told = json.loads(run("effects", "--group", "arm", "--rollout", "ro-none", "--arm", "stable", "--json").output)
    assert told == {"data": [], "outcomes": []}
    run("presets", "create", "cli-aliased", "-s", "cli-switch=1")
    assert "cli-aliased@stable is now cli-aliased@1" in run("presets", "alias", "cli-aliased", "stable", "1").output
    assert client.get_preset("cli-aliased@stable").version == 1
    assert "is gone" in run("presets", "alias", "cli-aliased", "stable").output
    run("presets", "delete", "cli-aliased", "-y")


def test_the_settings_of_a_server_are_shown_and_read_again(run: Run) -> None:
    shown, everything = (json.loads(run("config", "show", *more).output) for more in ((), ("--all",)))
    assert "data_dir" in shown and "max_choices" not in shown and everything["max_choices"] == 16
    assert shown.items() < everything.items()
    assert "no setting changed" in run("config", "reload").output


def test_what_was_stored_is_told_with_what_the_bare_name_means(run: Run, client: Client, tmp_path: Path) -> None:
    store(client, "cli-hint")
    file = tmp_path / "hint.safetensors"
    file.write_bytes(client.download_artifact("cli-hint"))
    client.set_alias("cli-hint", "production", 1)
    done = run("artifacts", "import", str(file), "--metadata", '{"description": "another one"}').output
    assert "stored cli-hint@2; cli-hint alone still means cli-hint@1" in done
    assert "trimtab artifacts alias cli-hint production 2 moves it" in done


def test_the_library_says_what_it_holds_and_is_collected(run: Run, client: Client) -> None:
    store(client, "cli-library-vector")
    held = client.library()
    assert held.names >= 1 and held.max_names == 10_000
    done = run("library", "usage")
    assert done.exit_code == 0 and f"{held.bytes:,}" in done.output
    assert "removed 0 unused blobs" in run("library", "gc").output
    assert run("library", "gc", "--min-age-s", "5").exit_code != 0


def test_extract_prints_its_report_and_writes_the_file(run: Run, client: Client, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"positive": f"Item {n} was a joy.", "negative": f"Item {n} was a shame.",
                                         "label": "not used"}) + "\n" for n in range(30)))
    file = tmp_path / "mood.safetensors"
    done = run("extract", "pca_pairwise", "--pairs", str(pairs), "--name", "cli-mood", "--layer", "2", "--layer", "3",
               "--token", "-2", "--tag", "cli", "-o", str(file))
    assert done.exit_code == 0, done.output
    assert "pca_pairwise at resid_post" in done.output
    # Without a terminal, too, it is seen what happens.
    assert "% reading activations" in done.output and "this will take about" in done.output
    assert "stored cli-mood@1" in done.output
    stored = client.get_artifact("cli-mood")
    assert (stored.stored_layers, stored.tags) == ([2, 3], ["cli"])
    assert client.download_artifact("cli-mood@1") == file.read_bytes()


def test_a_recipe_from_word_pairs_by_its_hyphened_name(run: Run, client: Client, tmp_path: Path) -> None:
    words = tmp_path / "plural.json"
    words.write_text(json.dumps([{"input": r["input"], "output": r["output"].strip()} for r in load("task_pairs")
                                 if r["task"] == "plural"], indent=4))
    done = run("extract", "function-vector", "--data", str(words), "--name", "cli-plural", "--layer", "2", "--set",
               "shots=5", "--set", "num_prompts=8", "--set", "strengths=[2.0]", "--also", f"other_pairs={words}")
    assert done.exit_code == 0, done.output
    assert "controls.random_vectors" in done.output
    assert "stored cli-plural@1" in done.output
    assert "warning" not in done.output
    stored = client.get_artifact("cli-plural")
    assert (stored.stored_layers, stored.strength["value"]) == ([2], 2.0)


def test_words_that_the_model_does_not_know_are_refused_or_warned_of(run: Run, tmp_path: Path) -> None:
    words = tmp_path / "odd.json"
    words.write_text(json.dumps([{"input": f"zyx{n}", "output": f"qwv{n}"} for n in range(20)]))
    done = run("extract", "function-vector", "--data", str(words), "--name", "cli-odd")
    assert done.exit_code == 1
    assert "begin with the same token" in done.output
    pairs = tmp_path / "odd.csv"
    pairs.write_text("positive,negative\n" + "".join(f"Zyxq {n} wkjv.,Qvbm {n} tplk.\n" for n in range(20)))
    done = run("extract", "mean-difference", "--data", str(pairs), "--name", "cli-odd", "--layer", "2")
    assert done.exit_code == 0, done.output
    assert "warning" in done.output
    assert "has no tokens for most words" in done.output


def test_methods_and_their_fields_are_listed(run: Run) -> None:
    listed = run("extract", "--list").output
    assert all(name in listed for name in ("mean_difference", "function_vector", "tunable_experts", "examples"))
    fields = run("extract", "relation-neurons", "--fields").output
    assert all(name in fields for name in ("target", "facts", "answer", "share"))


def test_ctrl_c_cancels_the_job(run: Run, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"positive": f"Item {n} was a joy.", "negative": f"Item {n} was a shame."})
                             + "\n" for n in range(400)))

    def interrupted(self: Any, job_id: str, **_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # Methods of a client are descriptors, which have no value on the class itself.
        patch.setattr(Client, "wait", interrupted, raising=False)
        done = run("extract", "pca_repe", "--data", str(pairs), "--name", "cli-stopped")
    assert done.exit_code == 130
    job = client.jobs().data[0]
    assert job.id in done.output and "cancelled" in run("jobs", "ls", "--all").output
    assert json.loads(run("jobs", "show", job.id).output)["about"] == "cli-stopped"
    with pytest.raises(JobFailed, match="cancelled"):
        client.wait(job.id)
    with pytest.raises(NotFound):
        client.get_artifact("cli-stopped")


def test_capabilities(run: Run) -> None:
    table = run("capabilities").output
    assert "resid_post" in table
    assert "0-5" in table
    assert json.loads(run("capabilities", "--json").output)["num_layers"] == 6


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("chat", "Hi", "-s", "cli-nothing"), "steering.interventions[0].artifact"),
    (("chat", "Hi", "-s", "bad name=x=y"), "--steer"),
    (("artifacts", "show", "../secret"), "error"),
    (("artifacts", "import", __file__), "error invalid_payload"),
    (("artifacts", "import", __file__, "--metadata", "[1]"), "--metadata"),
    (("extract", "mean_difference", "--pairs", __file__, "--name", "x"), "is no JSON"),
    (("extract", "no-such-method"), "there is no extraction method"),
    (("extract",), "name a method"),
    (("extract", "sign-pattern", "--name", "x"), "--data"),
    (("extract", "sign-pattern", "--data", __file__, "--name", "x", "--set", "shots"), "--set"),
    (("presets", "create", "x"), "--steer"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_refusals_are_one_line_and_status_1(run: Run, words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert done.exit_code == 1
    assert said in done.output
    assert "Traceback" not in done.output


def test_nobody_there_is_said_with_the_way_out() -> None:
    done = CliRunner().invoke(app, ["artifacts", "ls", "--url", "http://127.0.0.1:1"])
    assert done.exit_code == 1
    assert "trimtab serve" in done.output


def test_a_whole_spec_from_a_file(run: Run, client: Client, tmp_path: Path) -> None:
    store(client, "cli-spec")
    spec: dict[str, Any] = {"interventions": [{"artifact": "cli-spec", "scope": {"prompt": "none"}}]}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec))
    assert "0 prompt and" in run("chat", "Hi there", "--spec", str(path), "--max-tokens", "4").output
    assert run("chat", "Hi", "--spec", str(path), "-s", "cli-spec").exit_code == 1


def test_lens_lists_what_each_layer_would_say(run: Run) -> None:
    done = run("lens", "dog -> dogs , cat ->", "--group", "answer= cats,cats", "--layer", "5", "--top-k", "2")
    assert done.exit_code == 0, done.output
    assert "logit lens" in done.output and "answer" in done.output and "rank" in done.output
    whole = run("lens", "How do I bake a cake?", "--chat", "--json")
    assert whole.exit_code == 0 and len(json.loads(whole.output)["layers"]) == 6
    wrong = run("lens", "dog", "--group", "answer")
    assert wrong.exit_code == 1 and "NAME=SPELLING" in wrong.output


def test_an_import_says_where_its_layer_comes_from_or_asks_for_it(run: Run, client: Client, tmp_path: Path) -> None:
    torch.save({"vector": torch.ones(WIDTH), "coeff": 3.0}, tmp_path / "task_vector_layer-2.pt")
    done = run("artifacts", "import", str(tmp_path / "task_vector_layer-2.pt"), "--name", "cli-named")
    assert done.exit_code == 0 and "layers 2, as the file's name says" in done.output and "strength 3.0" in done.output
    stored = client.get_artifact("cli-named")
    assert (stored.stored_layers, stored.strength["value"]) == ([2], 3.0)
    torch.save(torch.stack([torch.zeros(WIDTH), torch.ones(WIDTH)]), tmp_path / "rows.pt")
    asked = run("artifacts", "import", str(tmp_path / "rows.pt"), "--name", "cli-rows")
    assert asked.exit_code == 1 and "--first-layer" in asked.output
    done = run("artifacts", "import", str(tmp_path / "rows.pt"), "--name", "cli-rows", "--first-layer", "0")
    assert done.exit_code == 0 and "left out, as they hold nothing: layers 0" in done.output
    torch.save({1: torch.ones(WIDTH + 1)}, tmp_path / "wide.pt")
    wide = run("artifacts", "import", str(tmp_path / "wide.pt"), "--name", "cli-wide")
    assert wide.exit_code == 1 and f"{WIDTH + 1} wide" in wide.output.replace("\n", " ")
