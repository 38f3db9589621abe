"""Random histories: the library against a model of it in plain dictionaries."""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from steering.language.errors import Conflict, NotFound
from steering.language.spec import Spec
from tests.vectors.making import metadata, open_library, same_numbers, vector_payload
from vectors import Filter, Patch

NAMES = st.sampled_from(["anna", "bert", "carl"])
ALIASES = st.sampled_from(["production", "canary"])
NUMBERS = st.integers(1, 5)
SELECTORS = st.sampled_from(["", "@production", "@canary", "@latest", "@1", "@2", "@3"])


@dataclass
class Entry:
    """What the model knows of one name."""

    versions: dict[int, tuple[int, str]] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    tags: dict[int, tuple[str, ...]] = field(default_factory=dict)
    last: int = 0

    def resolve(self, selector: str) -> int | None:
        if selector == "@latest":
            return max(self.versions, default=None)
        if selector == "":
            return self.aliases.get("production", max(self.versions, default=None))
        wanted = selector[1:]
        number = int(wanted) if wanted.isdigit() else self.aliases.get(wanted)
        return number if number in self.versions else None


class LibraryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.library = open_library(self.folder)
        self.model: dict[str, Entry] = {}
        self.presets: list[tuple[str, str]] = []

    def teardown(self) -> None:
        self.library.close()
        shutil.rmtree(self.folder)

    @rule(name=NAMES, seed=st.integers(0, 3), words=st.sampled_from(["", "words"]))
    def create(self, name: str, seed: int, words: str) -> None:
        entry = self.model.setdefault(name, Entry())
        known = [n for n, content in sorted(entry.versions.items()) if content == (seed, words)]
        artifact = self.library.create(metadata(name, description=words), vector_payload(seed))
        if known:
            assert artifact.version == known[0]
            return
        entry.last += 1
        assert artifact.version == entry.last
        entry.versions[entry.last] = (seed, words)
        entry.tags[entry.last] = ()

    @rule(name=NAMES, alias=ALIASES, number=NUMBERS)
    def set_alias(self, name: str, alias: str, number: int) -> None:
        entry = self.model.get(name, Entry())
        if number not in entry.versions:
            with pytest.raises(NotFound):
                self.library.set_alias(name, alias, number)
            return
        self.library.set_alias(name, alias, number)
        entry.aliases[alias] = number

    @rule(name=NAMES, alias=ALIASES)
    def remove_alias(self, name: str, alias: str) -> None:
        if alias not in self.model.get(name, Entry()).aliases:
            with pytest.raises(NotFound):
                self.library.remove_alias(name, alias)
            return
        self.library.remove_alias(name, alias)
        del self.model[name].aliases[alias]

    @rule(name=NAMES, selector=SELECTORS, tag=st.sampled_from(["x", "y"]))
    def patch(self, name: str, selector: str, tag: str) -> None:
        number = self.model.get(name, Entry()).resolve(selector)
        if number is None:
            with pytest.raises(NotFound):
                self.library.patch(name + selector, Patch(tags=(tag,)))
            return
        assert self.library.patch(name + selector, Patch(tags=(tag,))).version == number
        self.model[name].tags[number] = (tag,)

    @rule(name=NAMES, selector=SELECTORS)
    def store_preset(self, name: str, selector: str) -> None:
        spec = Spec.model_validate({"interventions": [{"artifact": name + selector}]})
        if self.model.get(name, Entry()).resolve(selector) is None:
            with pytest.raises(NotFound):
                self.library.presets.create("preset", spec)
            return
        self.library.presets.create("preset", spec)
        if (name, selector) not in self.presets:
            self.presets.append((name, selector))

    @rule()
    def drop_presets(self) -> None:
        if self.presets:
            self.library.presets.delete("preset")
            self.presets = []

    @rule(name=NAMES, selector=SELECTORS, force=st.booleans())
    def delete(self, name: str, selector: str, force: bool) -> None:
        entry = self.model.get(name, Entry())
        number = entry.resolve(selector)
        doomed = set(entry.versions) if selector == "" else {number} & set(entry.versions)
        if not doomed:
            with pytest.raises(NotFound):
                self.library.delete(name + selector, force=force)
            return
        pinned = any(used == name and (doomed == set(entry.versions) or used_selector[1:] in map(str, doomed))
                     for used, used_selector in self.presets)
        if not force and (pinned or doomed & set(entry.aliases.values())):
            with pytest.raises(Conflict):
                self.library.delete(name + selector)
            return
        self.library.delete(name + selector, force=force)
        entry.versions = {n: content for n, content in entry.versions.items() if n not in doomed}
        entry.aliases = {alias: n for alias, n in entry.aliases.items() if n not in doomed}

    @rule()
    def collect(self) -> None:
        self.library.gc(min_age_s=-1)
        assert self.library.damaged() == []

    @rule()
    def reopen(self) -> None:
        self.library.close()
        self.library = open_library(self.folder)

    @rule(tag=st.sampled_from(["x", "y"]))
    def filter_by_tag(self, tag: str) -> None:
        found = {a.metadata.name for a in self.library.list(Filter(tag=tag)).items}
        assert found == {name for name, entry in self.model.items()
                         if entry.versions and tag in entry.tags[entry.resolve("") or 0]}

    @rule(name=NAMES, selector=SELECTORS)
    def resolve(self, name: str, selector: str) -> None:
        number = self.model.get(name, Entry()).resolve(selector)
        if number is None:
            with pytest.raises(NotFound):
                self.library.source(name + selector)
            return
        source = self.library.source(name + selector)
        assert source.ref == f"{name}@{number}"
        assert same_numbers(source.payload, vector_payload(self.model[name].versions[number][0]))

    @invariant()
    def lists_what_the_model_lists(self) -> None:
        listed = {a.metadata.name: a.version for a in self.library.list().items}
        assert listed == {name: entry.resolve("") for name, entry in self.model.items() if entry.versions}
        for name in listed:
            entry = self.model[name]
            for artifact in self.library.versions(name):
                assert artifact.metadata.tags == entry.tags[artifact.version]
                assert set(artifact.aliases) == {a for a, n in entry.aliases.items() if n == artifact.version}
            assert {a.version for a in self.library.versions(name)} == set(entry.versions)


def test_random_histories_are_those_of_the_model() -> None:
    run_state_machine_as_test(LibraryMachine, settings=settings(max_examples=8, stateful_step_count=25, deadline=None))
