# SPDX-License-Identifier: Apache-2.0
"""deploy/k8s: against Kubernetes' schemas, its own settings, and what kustomize makes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lynx_connector.config import LynxConfig

ROOT = Path(__file__).parents[3] / "deploy" / "k8s"
BASE = ROOT / "base"
KUBERNETES = "1.32"
Manifest = dict[str, Any]


def load(text: str) -> list[Manifest]:
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]


KUSTOMIZATION = load((BASE / "kustomization.yaml").read_text())[0]
MANIFESTS = {
    (manifest["kind"], manifest["metadata"]["name"]): manifest
    for name in KUSTOMIZATION["resources"]
    for manifest in load((BASE / name).read_text())
}
SETTINGS = MANIFESTS["ConfigMap", "lynx-settings"]["data"]
PODS = {role: MANIFESTS["Deployment", role]["spec"]["template"] for role in ("prefill", "decode")}
SERVERS = {role: pod["spec"]["containers"][0] for role, pod in PODS.items()}


def rendered(folder: str) -> list[Manifest]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl here to render with")
    done = subprocess.run(
        [kubectl, "kustomize", str(ROOT / folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return load(done.stdout)


def validate(manifest: Manifest) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="its schemas are not installed")
    schemas.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize(("kind", "name"), MANIFESTS)
def test_base_fits_the_schema(kind: str, name: str) -> None:
    validate(MANIFESTS[kind, name])


def test_the_schema_refuses_what_kubernetes_would() -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="its schemas are not installed")
    broken = yaml.safe_load(yaml.safe_dump(MANIFESTS["Deployment", "prefill"]))
    broken["spec"]["template"]["spec"]["terminationGracePeriod"] = 30
    with pytest.raises(schemas.ValidationError, match="terminationGracePeriod"):
        schemas.validate(broken, KUBERNETES, strict=True)


def test_rendered_base_is_what_is_written() -> None:
    """So that the files can be read, and checked, where there is no kustomize."""
    found = {(m["kind"], m["metadata"]["name"]): m for m in rendered("base")}
    assert found == MANIFESTS


def test_rendered_overlay_fits_the_schema_and_llm_d() -> None:
    found = rendered("llm-d")
    for manifest in found:
        validate(manifest)
    of = {(m["kind"], m["metadata"]["name"].rpartition("-")[2]): m for m in found}
    decode = of["Deployment", "decode"]["spec"]["template"]
    labels = decode["metadata"]["labels"]
    assert labels["llm-d.ai/role"] == "decode"
    assert labels["llm-d.ai/guide"] == "pd-disaggregation"
    assert labels["llm-d.ai/inference-serving"] == "true"
    (sidecar,) = decode["spec"]["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    assert SETTINGS["DECODE_HTTP_PORT"] == "8200"  # where the sidecar looks for vLLM by default
    kv, http = of["NetworkPolicy", "decode"]["spec"]["ingress"]
    assert [port["port"] for port in http["ports"]] == [int(SETTINGS["DECODE_HTTP_PORT"]), 8000]
    assert kv["ports"][0]["port"] == int(SETTINGS["DATA_PORT_FIRST"])
    (client,) = http["from"]
    assert client["podSelector"]["matchLabels"] == {"lynx-client": "true"}  # and no label more
    references = re.findall(r"'configMapKeyRef': {[^}]*'name': '([^']*)'", str(found))
    assert set(references) == {of["ConfigMap", "settings"]["metadata"]["name"]}


def field(manifest: Any, path: str) -> Any:
    """What a kustomize field path names."""
    for step in re.findall(r"\[([^\]]*)\]|([^.\[]+)", path):
        chosen, plain = step
        if chosen:
            key, value = chosen.split("=")
            (manifest,) = [item for item in manifest if item[key] == value]
        else:
            manifest = manifest[int(plain)] if plain.isdigit() else manifest[plain]
    return manifest


@pytest.mark.parametrize("replacement", KUSTOMIZATION["replacements"])
def test_settings_stand_where_they_are_copied_to(replacement: dict[str, Any]) -> None:
    value = SETTINGS[replacement["source"]["fieldPath"].removeprefix("data.")]
    for target in replacement["targets"]:
        manifest = MANIFESTS[target["select"]["kind"], target["select"]["name"]]
        for path in target["fieldPaths"]:
            assert field(manifest, path) == int(value), path


def test_no_policy_has_a_port_of_its_own() -> None:
    """Every number in a policy is one that a replacement writes."""
    written = {
        (target["select"]["name"], path)
        for replacement in KUSTOMIZATION["replacements"]
        for target in replacement["targets"]
        if target["select"]["kind"] == "NetworkPolicy"
        for path in target["fieldPaths"]
    }
    there = {
        (role, f"spec.ingress.{i}.ports.{j}.{key}")
        for role in PODS
        for i, rule in enumerate(MANIFESTS["NetworkPolicy", role]["spec"]["ingress"])
        for j, port in enumerate(rule["ports"])
        for key in ("port", "endPort")
        if key in port
    }
    assert written == there


@pytest.mark.parametrize("role", PODS)
def test_arguments_name_keys_and_variables_that_exist(role: str) -> None:
    server = SERVERS[role]
    assert server["command"] == ["lynx", "serve", role]
    prefix = "--kv-transfer-config.kv_connector_extra_config."
    keys = [a.removeprefix(prefix).split("=")[0] for a in server["args"] if a.startswith(prefix)]
    assert set(keys) <= set(LynxConfig.model_fields) and "secret_file" in keys
    seen: set[str] = set()
    for variable in server["env"]:  # one may use those before it
        assert set(re.findall(r"\$\((\w+)\)", variable.get("value", ""))) <= seen
        seen.add(variable["name"])
        source = variable.get("valueFrom", {}).get("configMapKeyRef")
        assert source is None or source["key"] in SETTINGS
    assert set(re.findall(r"\$\((\w+)\)", " ".join(server["args"]))) <= seen


@pytest.mark.parametrize("role", PODS)
def test_a_pod_has_time_to_drain(role: str) -> None:
    sleep = int(SERVERS[role]["lifecycle"]["preStop"]["exec"]["command"][1])
    (timeout,) = [
        int(argument.split("=")[1])
        for argument in SERVERS[role]["args"]
        if argument.startswith("--shutdown-timeout=")
    ]
    assert PODS[role]["spec"]["terminationGracePeriodSeconds"] >= sleep + timeout + 15
    assert timeout >= LynxConfig().lease_seconds


@pytest.mark.parametrize("role", PODS)
def test_policies_budgets_and_services_select_the_pods(role: str) -> None:
    labels = PODS[role]["metadata"]["labels"].items()
    selectors = [
        MANIFESTS["Deployment", role]["spec"]["selector"]["matchLabels"],
        MANIFESTS["NetworkPolicy", role]["spec"]["podSelector"]["matchLabels"],
        MANIFESTS["PodDisruptionBudget", role]["spec"]["selector"]["matchLabels"],
        MANIFESTS["Service", role]["spec"]["selector"],
    ]
    other = PODS["decode" if role == "prefill" else "prefill"]["metadata"]["labels"].items()
    for selector in selectors:
        assert selector.items() <= labels and not selector.items() <= other
    peers = MANIFESTS["NetworkPolicy", role]["spec"]["ingress"][0]["from"]
    assert [peer["podSelector"]["matchLabels"].items() <= other for peer in peers] == [True]


@pytest.mark.parametrize("role", PODS)
def test_pods_have_no_rights_that_they_do_not_need(role: str) -> None:
    spec, container = PODS[role]["spec"], SERVERS[role]["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
    assert container["readOnlyRootFilesystem"] and not container["allowPrivilegeEscalation"]
    assert container["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["name"] for mount in SERVERS[role]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["volumes"]}
