"""Settings refuse what would be unsafe or meaningless, by name."""

import pytest

from server.errors import InvalidSettings
from server.settings import load_settings


def test_other_interfaces_need_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.org"):
        with pytest.raises(InvalidSettings) as caught:
            load_settings(host=host)
        assert "api_key" in caught.value.message
        assert load_settings(host=host, api_key="k").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert load_settings(host=host).api_key is None


@pytest.mark.parametrize(("name", "value"), [("port", 70000), ("slots", 0), ("device", "tpu"), ("api_key", ""),
                                             ("served_model_name", "a b"), ("prot", 1)])
def test_a_wrong_setting_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidSettings) as caught:
        load_settings(**{name: value})
    assert name in f"{caught.value.param} {caught.value.message}"


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_PORT", "9001")
    monkeypatch.setenv("TRIMTAB_DEFAULT_SPEC", '{"interventions": [{"artifact": "calm"}]}')
    settings = load_settings()
    assert settings.port == 9001
    assert settings.default_spec is not None
    assert settings.default_spec.interventions[0].artifact == "calm"
    assert load_settings(port=9002).port == 9002


def test_the_key_is_not_shown() -> None:
    assert "hush" not in repr(load_settings(api_key="hush"))


def test_the_model_name_comes_from_the_folder() -> None:
    assert load_settings(model="/models/Big Model").model_name == "Big-Model"
    assert load_settings(model="org/name", served_model_name="other").model_name == "other"


@pytest.mark.parametrize("names", [("a b",), ("name",), ("x", "x"), ("name:preset",), ("x", "x:y")])
def test_further_names_are_names_and_not_taken(names: tuple[str, ...]) -> None:
    assert load_settings(served_model_name="name", served_model_aliases=("x", "y")).model_names == ("name", "x", "y")
    with pytest.raises(InvalidSettings, match="served_model_aliases"):
        load_settings(served_model_name="name", served_model_aliases=names)
