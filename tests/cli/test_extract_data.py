"""Users' data files, in the forms of public data sets, become what methods take; what cannot is refused by place."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.cli.records import read_records
from server.cli.shapes import entries
from steering.language.errors import InvalidRequest
from vectors.extract import get_recipe, parse_request

PAIRS = get_recipe("mean_difference").request.model_json_schema()


def schema(method: str) -> dict[str, Any]:
    return get_recipe(method).request.model_json_schema()


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def stimuli(emotions: tuple[str, ...] = ("rage", "grief"), domains: int = 3, versions: int = 2) -> list[dict[str, Any]]:
    """In the form of AIPsy-Affect: vignettes, neutral twins, and others without a twin."""
    found: list[dict[str, Any]] = []
    for emotion in emotions:
        for domain in range(1, domains + 1):
            for n in range(1, versions + 1):
                ids = f"B-{emotion}-d{domain}-v{n}", f"N-{emotion}-d{domain}-c{n}"
                for mine, other, label in ((*ids, emotion), (*reversed(ids), "neutral")):
                    found.append({"id": mine, "text": f"The text of {mine}.", "emotion": label, "domain": domain,
                                  "stimulus_set": "B_clinical" if label == emotion else "neutral",
                                  "matched_control_id": other, "has_emotion_keyword": None})
        found.append({"id": f"A-{emotion}-01", "text": f"I felt {emotion}.", "emotion": emotion, "domain": None,
                      "stimulus_set": "A_standard", "matched_control_id": None, "has_emotion_keyword": True})
    return found


RECORDS = [{"positive": "a", "negative": "b", "item": "x", "label": 1, "n": 1},
           {"positive": "c", "negative": "d", "item": "y", "label": 2, "n": 2}]


@pytest.mark.parametrize(("name", "text"), [
    ("list.json", json.dumps(RECORDS, indent=4)),
    ("lines.jsonl", "\n".join(map(json.dumps, RECORDS)) + "\n\n"),
    ("table.csv", "positive,negative,item,label,n\r\na,b,x,1,1\r\nc,d,y,2,2\r\n"),
    ("table.tsv", "\ufeffpositive\tnegative\titem\tlabel\tn\na\tb\tx\t1\t1\nc\td\ty\t2\t2\n"),
])
def test_every_form_of_file_gives_the_same_pairs(tmp_path: Path, name: str, text: str) -> None:
    found = entries(read_records(written(tmp_path, name, text)), PAIRS, "pairs")
    assert found == [{"positive": "a", "negative": "b", "item": "x"}, {"positive": "c", "negative": "d", "item": "y"}]


def test_conversations_win_over_rendered_texts() -> None:
    turns = [{"role": "user", "content": "a"}]
    (found,) = entries([{"positive": "rendered", "positive_messages": turns, "negative": "b", "split": "dev"}],
                       PAIRS, "pairs", suffix=" so")
    assert found == {"positive": turns, "negative": "b so", "split": "dev"}


def test_word_pairs_as_function_vector_data_sets_have_them(tmp_path: Path) -> None:
    path = written(tmp_path, "antonym.json", json.dumps([{"input": "flawed", "output": "perfect"}] * 2, indent=4))
    assert entries(read_records(path), schema("function_vector"), "pairs") == [
        {"input": "flawed", "output": "perfect"}] * 2
    country = written(tmp_path, "c.csv", "country,capital\nNorland,Yarrow\n")
    records = read_records(country, columns=["input=country", "output=capital"])
    assert entries(records, schema("function_vector"), "pairs") == [{"input": "Norland", "output": "Yarrow"}]


@pytest.mark.parametrize(("name", "text"), [("w.txt", "cat\ndog\n"), ("w.json", '["cat", "dog"]'),
                                            ("w.csv", "word,count\ncat,3\ndog,4\n")])
def test_words_as_anchors(tmp_path: Path, name: str, text: str) -> None:
    found = entries(read_records(written(tmp_path, name, text)), schema("sign_pattern"), "anchors", prefix=" ")
    assert found == [" cat", " dog"]


def test_only_entries_with_a_value_are_kept(tmp_path: Path) -> None:
    path = written(tmp_path, "s.json", json.dumps(stimuli()))
    kept = read_records(path, where=["domain=2", "emotion=rage", "emotion=grief"])
    assert {(r["domain"], r["emotion"]) for r in kept} == {(2, "rage"), (2, "grief")}
    assert {r["id"][0] for r in read_records(path, where=["domain=null"])} == {"A"}
    for where, param in (("domain=9", "--where"), ("nothing=1", "--where"), ("domain", "--where")):
        with pytest.raises(InvalidRequest) as refused:
            read_records(path, where=[where])
        assert refused.value.param == param


def test_stimuli_are_paired_with_their_controls_and_split_by_domain() -> None:
    found = entries(stimuli(), PAIRS, "pairs", target="rage", suffix=" He felt")
    assert len(found) == 6
    assert found[0] == {"positive": "The text of B-rage-d1-v1. He felt",
                        "negative": "The text of N-rage-d1-c1. He felt", "item": "rage:1", "split": "train"}
    assert {(pair["item"], pair["split"]) for pair in found} == {("rage:1", "train"), ("rage:2", "dev"),
                                                                 ("rage:3", "test")}


def test_many_groups_of_stimuli_are_split_by_the_server() -> None:
    found = entries(stimuli(("rage", "grief", "terror", "awe")), PAIRS, "pairs")
    assert (len(found), len({pair["item"] for pair in found})) == (24, 12)
    assert not any("split" in pair for pair in found)


def test_stimuli_as_labelled_texts_keep_twins_together() -> None:
    found = entries(stimuli(), schema("native_skills"), "sequences")
    assert len(found) == 26
    by_text = {entry["text"]: entry for entry in found}
    twin = by_text["The text of N-rage-d1-c1."]
    assert (twin["label"], twin["item"]) == ("neutral", "rage:1")
    assert "item" not in by_text["I felt rage."]


def test_broken_stimuli_are_refused() -> None:
    lonely = [record for record in stimuli() if record["id"] != "N-rage-d1-c1"]
    moved = [{**record, "domain": 3} if record["id"] == "N-rage-d1-c1" else record for record in stimuli()]
    for records, target in ((lonely, None), (moved, None), ([*stimuli(), stimuli()[0]], None), (stimuli(), "joy")):
        with pytest.raises(InvalidRequest):
            entries(records, PAIRS, "pairs", target=target)


def test_labelled_texts_become_pairs_within_an_item() -> None:
    records = [{"text": f"{label} {n}", "label": label, "item": n} for n in range(3)
               for label in ("up", "down", "flat")]
    found = entries(records, PAIRS, "pairs", target="up")
    assert found == [{"positive": f"up {n}", "negative": f"down {n}", "item": str(n)} for n in range(3)]
    with pytest.raises(InvalidRequest, match="which label") as refused:
        entries(records, PAIRS, "pairs")
    assert refused.value.param == "--target"
    apart = [{"text": str(n), "label": "up" if n else "down", "item": n} for n in range(2)]
    with pytest.raises(InvalidRequest, match="no item"):
        entries(apart, PAIRS, "pairs", target="up")


@pytest.mark.parametrize(("name", "content", "said"), [
    ("x.json", b'[{"positive": "a"}]', "entry 0 has no negative"),
    ("x.jsonl", b'{"positive": "a", "negative": "b"}\nx', "line 2 is no JSON"),
    ("x.json", b"[1]", "entry 0 is no object"),
    ("x.json", b"[]", "holds nothing"),
    ("x.json", b"\xff\xfe", "no UTF-8"),
    ("x.csv", b"positive,negative\na\n", "line 2 has another number of columns"),
    ("x.csv", b"left,right\na,b\n", "neither positive and negative"),
])
def test_what_cannot_be_read_is_refused_by_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidRequest) as refused:
        entries(read_records(path), PAIRS, "pairs")
    assert said in refused.value.message


def test_columns_of_csv_become_numbers_where_the_method_wants_them(tmp_path: Path) -> None:
    path = written(tmp_path, "log.csv", "text,episode,step\nI choose,7,3\n")
    (entry,) = entries(read_records(path), schema("entropic_steering"), "prompts")
    assert entry == {"text": "I choose", "episode": "7", "step": 3}
    parse_request("entropic_steering", {"name": "x", "prompts": [entry], "actions": ["a", "b"]})


@pytest.mark.parametrize(("text", "advice"), [
    ('{"pairs": [{"positive": "a", "negative": "b"}]}', "list under 'pairs' alone"),
    ('{\n "pairs": [\n  {"positive": "a", "negative": "b"}\n ]\n}', "list under 'pairs' alone"),
    ('{\n "positive": "a",\n "negative": "b"\n}', "one object a line")])
def test_an_object_where_a_list_is_wanted_is_one_sentence_with_a_fix(tmp_path: Path, text: str, advice: str) -> None:
    with pytest.raises(InvalidRequest, match="one JSON object where a list of entries is wanted") as caught:
        read_records(written(tmp_path, "pairs.json", text))
    assert advice in str(caught.value.fix) and caught.value.param == "--data"


def test_one_object_on_one_line_is_one_entry(tmp_path: Path) -> None:
    assert read_records(written(tmp_path, "x.jsonl", '{"positive": "a", "ids": [1, 2]}\n')) == [
        {"positive": "a", "ids": [1, 2]}]
