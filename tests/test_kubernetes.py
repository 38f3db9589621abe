"""What is deployed is in the form that Kubernetes and systemd take, and fits the server: its settings, ports, times.

Nothing of it is run here, because there is no cluster. kubectl renders the overlays, and the API's own schemas check
them.
"""

import copy
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from server.http import runner
from server.http.gate import HEALTH, READY
from server.settings import Settings, load_settings
from server.settings_file import FROM_FILE

DEPLOY = Path(__file__).parents[1] / "deploy"
OVERLAYS = sorted(path.name for path in (DEPLOY / "kubernetes" / "overlays").iterdir())
KUBECTL, ANALYZE = shutil.which("kubectl"), shutil.which("systemd-analyze")
VERSIONS = ("1.31", "1.34")
needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="Debian: apt-get install kubernetes-client")
Resource = dict[str, Any]

# Of resources that operators bring: their required fields, and those used here, as their documentation has them.
LABELS = {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}
MONITOR = {
    "type": "object", "required": ["apiVersion", "kind", "metadata", "spec"], "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"}, "spec": {
            "type": "object", "required": ["selector", "endpoints"], "additionalProperties": False, "properties": {
                "selector": {"type": "object", "required": ["matchLabels"], "properties": {"matchLabels": LABELS}},
                "endpoints": {"type": "array", "minItems": 1, "items": {
                    "type": "object", "additionalProperties": False, "properties": {
                        "port": {"type": "string"}, "path": {"type": "string"},
                        "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"}, "authorization": {
                            "type": "object", "additionalProperties": False, "properties": {
                                "type": {"type": "string"}, "credentials": {
                                    "type": "object", "required": ["key"], "properties": {
                                        "name": {"type": "string"}, "key": {"type": "string"}}}}}}}}}}}}
GROUP = {
    "type": "object", "required": ["apiVersion", "kind", "metadata", "spec"], "properties": {
        "apiVersion": {"const": "leaderworkerset.x-k8s.io/v1"}, "spec": {
            "type": "object", "required": ["leaderWorkerTemplate"], "additionalProperties": False, "properties": {
                "replicas": {"type": "integer"}, "leaderWorkerTemplate": {
                    "type": "object", "required": ["workerTemplate"], "additionalProperties": False, "properties": {
                        "size": {"type": "integer", "minimum": 1}, "leaderTemplate": {"type": "object"},
                        "workerTemplate": {"type": "object"},
                        "restartPolicy": {"enum": ["RecreateGroupOnPodRestart", "None"]}}}}}}}


@cache
def rendered(overlay: str) -> tuple[Resource, ...]:
    done = subprocess.run([str(KUBECTL), "kustomize", DEPLOY / "kubernetes" / "overlays" / overlay],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, kind: str) -> Resource | None:
    return next((one for one in rendered(overlay) if one["kind"] == kind), None)


def templates(overlay: str) -> list[Resource]:
    """Pod templates, that of the server first."""
    if group := of_kind(overlay, "LeaderWorkerSet"):
        inner = group["spec"]["leaderWorkerTemplate"]
        return [inner["leaderTemplate"], inner["workerTemplate"]]
    deployment = of_kind(overlay, "Deployment")
    assert deployment
    return [deployment["spec"]["template"]]


def check(resource: Resource) -> None:
    """Raises ValidationError."""
    own = {"ServiceMonitor": MONITOR, "LeaderWorkerSet": GROUP}.get(resource["kind"])
    if own is not None:
        Draft202012Validator(own).validate(resource)
        return
    for version in VERSIONS:
        kubernetes_validate.validate(resource, version, strict=True)


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_all_of_it_fits_the_schemas_of_the_api(overlay: str) -> None:
    for resource in rendered(overlay):
        check(resource)
    for template in templates(overlay):
        check({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template})
    wrong = copy.deepcopy(rendered(overlay)[-1])
    wrong["spec"]["noSuchField"] = 1
    with pytest.raises(ValidationError):
        check(wrong)


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_contained_and_probed(overlay: str) -> None:
    for template in templates(overlay):
        spec, [container] = template["spec"], template["spec"]["containers"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        inside = container["securityContext"]
        assert inside == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                          "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"]["cpu"]
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        # What the server writes has a place, as the root of its file system takes nothing.
        assert {"/tmp", "/home/trimtab"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert re.fullmatch(r"trimtab:[0-9.]+(-\w+)?", container["image"])
    server = templates(overlay)[0]["spec"]["containers"][0]
    paths = {probe: server[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/health/live", "livenessProbe": "/health/live", "readinessProbe": "/health/ready"}
    assert paths["readinessProbe"] in READY and set(paths.values()) <= HEALTH
    start = server["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= Settings.model_fields["vllm_start_s"].default


# Secrets of which a setting demands how they begin.
SCHEMES = {"quota_store_url": "redis://"}


def settings_of(overlay: str, folder: Path) -> Settings:
    """What the server in the pod reads, secrets aside."""
    config = of_kind(overlay, "ConfigMap")
    assert config
    (folder / "trimtab.yaml").write_text(config["data"]["trimtab.yaml"])
    given: dict[str, Any] = {}
    for variable in templates(overlay)[0]["spec"]["containers"][0]["env"]:
        name = variable["name"].removeprefix("TRIMTAB_").lower()
        if name.removesuffix(FROM_FILE) in Settings.model_fields and name.endswith(FROM_FILE):
            secret = name.removesuffix(FROM_FILE)
            given[secret] = f"{SCHEMES.get(secret, '')}from-a-secret"
        elif name != "config":
            assert name in Settings.model_fields, name
            value = variable["value"]
            given[name] = json.loads(value) if value.startswith("{") else value
    return load_settings(**{**given, "config": folder / "trimtab.yaml"})


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_set_are_settings_and_the_end_of_a_pod_leaves_time_for_every_stream(overlay: str, tmp_path: Path
                                                                                    ) -> None:
    settings, spec = settings_of(overlay, tmp_path), templates(overlay)[0]["spec"]
    server = spec["containers"][0]
    assert settings.api_key is not None and settings.host == "0.0.0.0"
    assert server["ports"] == [{"name": "http", "containerPort": settings.port}]
    [_, pause] = server["lifecycle"]["preStop"]["exec"]["command"]
    # Readiness is asked often enough that nobody new is sent here when the pause is over.
    assert int(pause) >= 5 * server["readinessProbe"]["periodSeconds"]
    after = runner.RUNS_END_S + runner.REQUESTS_END_S + runner.BYTES_END_S + runner.ENGINE_STOP_S
    assert spec["terminationGracePeriodSeconds"] >= int(pause) + settings.shutdown_s + after
    gpus = server["resources"]["limits"].get("nvidia.com/gpu")
    if settings.engine == "vllm":
        assert int(gpus) == settings.vllm_args["tensor_parallel_size"]
        assert any(mount["mountPath"] == "/dev/shm" for mount in server["volumeMounts"])


@needs_kubectl
@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "vllm-multinode"])
def test_everything_means_the_pods_of_the_server(overlay: str) -> None:
    found = {resource["kind"]: resource for resource in rendered(overlay)}
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [found[kind]["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")]
    selectors += [found["Service"]["spec"]["selector"], found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]]
    for selector in selectors:
        assert selector and selector.items() <= labels.items()
    assert found["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items() <= (
        found["Service"]["metadata"]["labels"].items())
    assert found["ServiceMonitor"]["spec"]["endpoints"][0]["port"] == found["Service"]["spec"]["ports"][0]["name"]
    # Clients, names and the monitoring are others' pods.
    assert "app.kubernetes.io/name" not in json.dumps([found["NetworkPolicy"]["spec"][way]
                                                       for way in ("ingress", "egress")])
    assert found["NetworkPolicy"]["spec"]["policyTypes"] == ["Ingress", "Egress"]


@needs_kubectl
def test_replicas_keep_nothing_in_a_pod_and_are_rolled_and_scaled() -> None:
    overlay = "replicas-postgresql"
    deployment, scale = of_kind(overlay, "Deployment"), of_kind(overlay, "HorizontalPodAutoscaler")
    assert deployment and scale and of_kind(overlay, "PersistentVolumeClaim") is None
    spec = deployment["spec"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    assert "replicas" not in spec, "the number is the autoscaler's"
    assert not any("persistentVolumeClaim" in volume for volume in spec["template"]["spec"]["volumes"])
    [metric] = scale["spec"]["metrics"]
    source = (Path(__file__).parents[1] / "server" / "observability" / "routing.py").read_text()
    assert f'"{metric["pods"]["metric"]["name"]}"' in source
    assert scale["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment",
                                               "name": deployment["metadata"]["name"]}
    assert scale["spec"]["minReplicas"] > 1
    # One server on a volume of one node is never two.
    single = of_kind("cpu", "Deployment")
    assert single and single["spec"]["strategy"] == {"type": "Recreate"} and single["spec"]["replicas"] == 1


UNIT = DEPLOY / "systemd" / "trimtab.service"


@pytest.mark.skipif(ANALYZE is None, reason="Debian: apt-get install systemd")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    def verified(text: str) -> int:
        # The program is not installed here.
        (tmp_path / "trimtab.service").write_text(text.replace("/opt/trimtab/bin/trimtab", "/bin/true"))
        done = subprocess.run([str(ANALYZE), "verify", "--man=no", tmp_path / "trimtab.service"], capture_output=True,
                              text=True, timeout=120)
        return done.returncode or bool(done.stderr.strip())

    text = UNIT.read_text()
    assert verified(text) == 0
    assert verified(text.replace("KillMode=mixed", "KillMode=some")) != 0


def test_the_unit_fits_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.partition("=")[::2] for line in UNIT.read_text().splitlines() if "=" in line and line[0] != "#"]
    unit = dict(lines)
    monkeypatch.setenv("TRIMTAB_API_KEY", "k")
    settings = load_settings(config=DEPLOY / "systemd" / "trimtab.yaml")
    after = runner.RUNS_END_S + runner.REQUESTS_END_S + runner.BYTES_END_S + runner.ENGINE_STOP_S
    assert int(unit["TimeoutStopSec"]) >= settings.shutdown_s + after
    assert unit["KillMode"] == "mixed" and "HUP" in unit["ExecReload"]
    for name, value in lines:
        if name == "Environment" and value.startswith("TRIMTAB_"):
            setting = value.partition("=")[0].removeprefix("TRIMTAB_").lower()
            assert setting.removesuffix(FROM_FILE) in Settings.model_fields
