"""Alert rules and board: read by the real program where it is installed, and naming metrics and labels that exist."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from server.background.housekeeping import Housekeeping
from server.effects.metrics import EffectMetrics, OutcomeMetrics
from server.identity.keys import Keys
from server.observability.instruments import Registry
from server.observability.metrics import Metrics
from server.observability.routing import RoutingMetrics
from server.requests.admission.queue import AdmissionQueue
from server.requests.killswitch import KillSwitch
from server.requests.steering_audit import SteeringAudit
from server.rollouts.measuring import Measuring
from server.rollouts.rollouts import Rollouts
from server.rollouts.shadowing import ShadowArms
from server.settings import Settings

DEPLOY = Path(__file__).parents[1] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((DEPLOY / "grafana").glob("*.json"))}
PROMTOOL = shutil.which("promtool")
METRIC = re.compile(r"\b(trimtab_[a-z0-9_]+)(?:\{([^}]*)\})?")
# Labels that Prometheus adds.
SCRAPED = {"instance"}
GROUPING = re.compile(r"\bby \(([a-z_, ]+)\)")


def rollouts(registry: Registry) -> None:
    """All that counts for roll-outs."""
    running = Rollouts(cast(Any, None), registry)
    ShadowArms(running, Measuring(running, cast(Any, None), registry), lambda: False, registry)


def known() -> dict[str, set[str]]:
    """Every series name that the server may expose, with its labels."""
    metrics = Metrics()
    EffectMetrics(metrics.registry, "m")
    OutcomeMetrics(metrics.registry, "m")
    KillSwitch(cast(Any, None), metrics.registry, always=False)
    RoutingMetrics(metrics.registry, cast(Any, None), lambda: 0, list)
    Keys(cast(Any, None), None, metrics.registry)
    AdmissionQueue(metrics.registry, places=1, most_requests=1, most_tokens=1)
    Housekeeping(cast(Any, None), metrics.registry, 0)
    SteeringAudit(cast(Any, None), metrics.registry, cast(Any, None), Settings())
    rollouts(metrics.registry)
    found: dict[str, set[str]] = {}
    for collector in metrics.registry._collector_to_names:
        for family in collector.describe():  # type: ignore[attr-defined]
            labels = set(collector._labelnames)  # type: ignore[attr-defined]
            endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
            if any(bound < 0 for bound in getattr(collector, "_upper_bounds", ())):
                endings = ("_bucket", "_count")
            found |= {family.name + end: labels | ({"le"} if end == "_bucket" else set()) for end in endings}
    return found


def expressions() -> list[str]:
    rules = [rule["expr"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    return rules + [target["expr"] for board in BOARDS.values() for panel in board["panels"]
                    for target in panel["targets"]] + [
        variable["query"]["query"] for board in BOARDS.values() for variable in board["templating"]["list"]
        if isinstance(variable["query"], dict)]


@pytest.mark.parametrize("expression", expressions())
def test_every_query_names_metrics_and_labels_that_exist(expression: str) -> None:
    series = known()
    used = METRIC.findall(expression)
    assert used
    labels = set()
    for name, selector in used:
        assert name in series, name
        labels |= series[name]
        assert set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", selector)) <= series[name] | SCRAPED
    added = set(re.findall(r'label_replace\(.*?, "([a-z_]+)",', expression))
    for group in GROUPING.findall(expression):
        assert set(group.replace(" ", "").split(",")) <= labels | added | SCRAPED
    if asked := re.fullmatch(r"label_values\((\w+), (\w+)\)", expression):
        assert asked[2] in series[asked[1]] | SCRAPED


def test_the_check_above_finds_what_is_not_there() -> None:
    with pytest.raises(AssertionError):
        test_every_query_names_metrics_and_labels_that_exist("rate(trimtab_effect_kl_sum[5m])")
    with pytest.raises(AssertionError):
        test_every_query_names_metrics_and_labels_that_exist("sum by (shape) (trimtab_effect_kl_nats_sum)")
    with pytest.raises(AssertionError):
        test_every_query_names_metrics_and_labels_that_exist('trimtab_effect_kl_nats_sum{shape="round"}')


@pytest.mark.parametrize(("board", "kinds"), [
    ("trimtab-effects", ("trimtab_effect", "trimtab_shadow", "trimtab_outcome")),
    ("trimtab-rollouts", ("trimtab_rollout",))])
def test_the_board_shows_every_metric_of_effects(board: str, kinds: tuple[str, ...]) -> None:
    registry = Registry()
    EffectMetrics(registry, "m")
    OutcomeMetrics(registry, "m")
    rollouts(registry)
    names = {family.name for collector in registry._collector_to_names
             for family in collector.describe()}  # type: ignore[attr-defined]
    shown = " ".join(target["expr"] for panel in BOARDS[board]["panels"] for target in panel["targets"])
    wanted = {name for name in names if name.startswith(kinds)}
    assert wanted and {name for name in wanted if name not in shown} == set()


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_overlap_and_have_ids_of_their_own(name: str) -> None:
    cells: set[tuple[int, int]] = set()
    for panel in BOARDS[name]["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells and at["x"] + at["w"] <= 24
        cells |= own
    assert len({panel["id"] for panel in BOARDS[name]["panels"]}) == len(BOARDS[name]["panels"])
    assert BOARDS[name]["uid"] == name


def promtool(*words: Any) -> str:
    done = subprocess.run([str(PROMTOOL), *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: apt-get install prometheus)")
def test_prometheus_takes_rules_and_configuration_and_the_rules_fire(tmp_path: Path) -> None:
    count = sum(len(group["rules"]) for group in yaml.safe_load(ALERTS.read_text())["groups"])
    assert f"{count} rules found" in promtool("check", "rules", ALERTS)
    promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")
    assert "SUCCESS" in promtool("test", "rules", DEPLOY / "prometheus" / "alerts_test.yml")

    # Against rules that never fire, and against rules that always do, the same tests fail.
    for number in ("1e9", "-1"):
        folder = tmp_path / number
        folder.mkdir()
        (folder / "alerts.yml").write_text(re.sub(r"> [0-9.]+", f"> {number}", ALERTS.read_text()))
        shutil.copy(DEPLOY / "prometheus" / "alerts_test.yml", folder)
        done = subprocess.run([str(PROMTOOL), "test", "rules", str(folder / "alerts_test.yml")], capture_output=True,
                              timeout=120)
        assert done.returncode != 0


def test_every_alert_has_a_test() -> None:
    tested = {case["alertname"] for test in yaml.safe_load(
        (DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"] for case in test["alert_rule_test"]
        if case["exp_alerts"]}
    rules = {rule["alert"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
    assert tested == rules


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: apt-get install prometheus)")
def test_prometheus_reads_what_the_server_exposes() -> None:
    from prometheus_client import generate_latest

    metrics = Metrics()
    EffectMetrics(metrics.registry, "m")
    metrics.answered("/v1/completions", "POST", 200, 0.1)
    done = subprocess.run([str(PROMTOOL), "check", "metrics"], input=generate_latest(metrics.registry),
                          capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
