"""Settings from a file, and secrets from files of their own."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.errors import InvalidSettings
from server.settings import load_settings

YAML = ("port: 9000\nshadow_sample: 0.25\nallowed_hosts: [a.example, b.example]\n"
        "default_spec:\n  interventions:\n  - artifact: calm\n")
TOML = ('port = 9000\nshadow_sample = 0.25\nallowed_hosts = ["a.example", "b.example"]\n'
        '[[default_spec.interventions]]\nartifact = "calm"\n')


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "PORT", "API_KEY", "API_KEY_FILE", "SHADOW_SAMPLE"):
        monkeypatch.delenv(f"TRIMTAB_{name}", raising=False)


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.toml", TOML)])
def test_both_forms_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    found = load_settings(config=tmp_path / name)
    assert (found.port, found.shadow_sample, found.allowed_hosts) == (9000, 0.25, ("a.example", "b.example"))
    assert found.default_spec is not None and found.default_spec.interventions[0].artifact == "calm"


def test_options_win_over_the_environment_and_that_over_the_file(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("port: 9000\nshadow_sample: 0.25\ndata_dir: kept\n")
    monkeypatch.setenv("TRIMTAB_CONFIG", str(file))
    monkeypatch.setenv("TRIMTAB_PORT", "9001")
    monkeypatch.setenv("TRIMTAB_SHADOW_SAMPLE", "0.5")
    found = load_settings(port=9002)
    assert (found.port, found.shadow_sample, found.data_dir) == (9002, 0.5, Path("kept"))


def test_secrets_come_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("from a mount\n")
    file = tmp_path / "a.yaml"
    file.write_text("api_key_file: key\n")
    found = load_settings(config=file)
    assert found.api_key is not None and found.api_key.get_secret_value() == "from a mount"
    monkeypatch.setenv("TRIMTAB_API_KEY_FILE", str(tmp_path / "key"))
    found = load_settings(host="0.0.0.0")
    assert found.api_key is not None and found.api_key.get_secret_value() == "from a mount"


@pytest.mark.parametrize(("text", "message", "fix"), [
    ("prot: 1", "prot", "port"), ("port: 1\nport_file: key", "both port and port_file", "Leave one"),
    ("- port", "no table", "one setting in a line"), ("port: [", "no YAML", "TOML"),
    ("api_key_file: gone", "gone", "path"),
    ("port: many", "integer", "port in the file"), ("config: other.yaml", "config", "settings"),
])
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str, fix: str) -> None:
    (tmp_path / "key").write_text("1")
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(InvalidSettings) as caught:
        load_settings(config=file)
    assert message in caught.value.message and caught.value.fix is not None and fix in caught.value.fix


def test_a_file_that_is_not_there_is_no_file_without_settings(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="cannot be read"):
        load_settings(config=tmp_path / "gone.yaml")


def test_check_prints_what_is_set_and_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("host: 0.0.0.0\napi_key: very secret\nport: 8000\n")
    done = CliRunner().invoke(app, ["config", "check", "--config", str(file)])
    assert done.exit_code == 0, done.output
    assert "host: 0.0.0.0" in done.output and "secret" not in done.output and "port" not in done.output
    file.write_text("prot: 1\n")
    done = CliRunner().invoke(app, ["config", "check", "--config", str(file)])
    assert done.exit_code == 1 and "Did you mean port?" in done.output


def test_the_example_of_the_page_is_a_file_with_settings(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "key").write_text("hidden")
    (tmp_path / "a.yaml").write_text(example.replace("/run/secrets/trimtab-key", str(tmp_path / "key")))
    found = load_settings(config=tmp_path / "a.yaml")
    assert (found.model, found.host, found.shadow_sample) == ("smollm2", "0.0.0.0", 0.05)
    assert found.api_key is not None and found.api_key.get_secret_value() == "hidden"
