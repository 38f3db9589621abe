"""No Docker engine runs in CI; these hold what building an image would notice first. hadolint runs in `make lint`."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from server.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
ALLOWED = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}


def test_all_that_the_build_needs_is_sent_to_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    needed = {*(path.split("/")[0] for path in included), project["project"]["readme"],
              *project["project"]["license-files"], "pyproject.toml", "constraints.txt", "clients",
              "scripts/install_torch.sh"}
    assert needed <= ALLOWED
    assert [path for path in ALLOWED if not (ROOT / path).exists()] == []


def test_named_files_are_copied_from_the_tree() -> None:
    sources = [source for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, flags=re.MULTILINE)
               for source in line.split()[:-1]]
    assert "constraints.txt" in sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_it_does_not_run_as_root_and_reports_its_health() -> None:
    last_stage = DOCKERFILE.rsplit("\nFROM ", 1)[1]
    assert re.search(r"^USER ([1-9]\d*):\1$", last_stage, flags=re.MULTILINE)
    assert "HEALTHCHECK" in last_stage
    assert "/health/live', " in last_stage


def test_compose_ends_what_only_a_new_process_helps_so_that_it_is_started_again() -> None:
    service = COMPOSE["services"]["trimtab"]
    check = service["healthcheck"]["test"]
    assert check[:3] == ["CMD", "python", "-c"] and "/health/live" in check[3]
    compile(check[3], "healthcheck", "exec")
    assert service["restart"] == "unless-stopped"


def test_every_variable_that_is_set_is_a_setting() -> None:
    known = {f"TRIMTAB_{name.upper()}" for name in Settings.model_fields}
    in_image = set(re.findall(r"TRIMTAB_[A-Z_]+(?==)", DOCKERFILE))
    assert in_image
    assert in_image <= known
    assert set(COMPOSE["services"]["trimtab"]["environment"]) <= known


def test_compose_asks_for_a_key() -> None:
    assert COMPOSE["services"]["trimtab"]["environment"]["TRIMTAB_API_KEY"].startswith("${TRIMTAB_API_KEY:?")
