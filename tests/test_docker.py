"""What can be checked of the containers' files without a container engine."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata, util
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import fsspec
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.scripts.scripts import cli as ray_cli
from torch.distributed.run import get_args_parser
from typer.main import get_command

from smpo_pipeline.cli import app as pipeline
from smpo_trainer.cli import app as trainer
from tests.servers.object_store import object_store

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
EXTRAS = {"pipeline.Dockerfile": {"pipeline", "cluster", "s3"}, "trainer.Dockerfile": {"s3"}}
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
RAY_JOB = yaml.safe_load((DOCKER / "rayjob.yaml").read_text())
TRAIN_JOB = yaml.safe_load((DOCKER / "train-job.yaml").read_text())
PINS = {
    canonicalize_name(name): version
    for name, _, version in (
        line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"
    )
}


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", "\n".join(line for line in path.read_text().splitlines() if line[:1] != "#"))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def requirements(extras: set[str]) -> dict[str, list[Requirement]]:
    """What the project with these extras brings, and who asks for what of it; as far as it is installed here."""
    todo = [Requirement(text) for text in PROJECT["dependencies"]]
    todo += [Requirement(text) for extra in extras for text in PROJECT["optional-dependencies"][extra]]
    found: dict[str, list[Requirement]] = {}
    seen = set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        found.setdefault(name, []).append(wanted)
        for extra in {"", *wanted.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                texts = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            todo += [
                needed
                for needed in map(Requirement, texts)
                if needed.marker is None or needed.marker.evaluate({"extra": extra})
            ]
    return found


def flags_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def flags_in(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def parse_as_ours(words: list[str]) -> None:
    """As the command line does it: names, types and choices of its flags; their paths are those of the containers."""
    program, *arguments = words
    assert program in PROJECT["scripts"]
    command = get_command({"smpo-pipeline": pipeline, "smpo-train": trainer}[program])
    if program == "smpo-pipeline":
        name, *arguments = arguments
        command = command.commands[name]
    with patch.object(Path, "exists", return_value=True), patch.object(Path, "is_dir", return_value=True):
        command.make_context(program, arguments)


def pods() -> list[dict[str, Any]]:
    cluster = RAY_JOB["spec"]["rayClusterSpec"]
    groups = [TRAIN_JOB["spec"], cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_names_what_there_is(path: Path) -> None:
    lines = instructions(path)
    ignored = (ROOT / ".dockerignore").read_text().split()
    for name, rest in lines:
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignored
    installs = [rest for name, rest in lines if name == "RUN" and "pip install" in rest]
    assert installs
    assert all("-c constraints.txt" in install for install in installs)
    assert set(re.findall(r"\w+", "".join(re.findall(r"\[(.+)\]", " ".join(installs))))) == EXTRAS[path.name]
    words = [name for name, _ in lines]
    assert words.index("USER") < len(words) - 1
    assert dict(lines)["USER"] in re.findall(r"useradd .*--uid (\d+)", path.read_text())


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_passes_the_linter(path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("image", EXTRAS)
def test_an_image_installs_pinned_versions_alone(image: str) -> None:
    brought = requirements(EXTRAS[image])
    for name, wanted in brought.items():
        for requirement in wanted:
            assert name in PINS, requirement
            assert requirement.specifier.contains(PINS[name], prereleases=True), requirement


def test_the_trainer_image_has_the_compiler_that_compile_needs() -> None:
    (line,) = [rest for name, rest in instructions(DOCKER / "trainer.Dockerfile") if "apt-get install" in rest]
    packages = {word for word in shlex.split(line.partition("install")[2].partition("&&")[0]) if word[:1] != "-"}
    assert {"gcc", "g++", "libc6-dev"} <= packages


def test_the_trainer_image_is_without_ray_and_both_read_s3() -> None:
    assert "ray" not in requirements(EXTRAS["trainer.Dockerfile"])
    assert "ray" in requirements(EXTRAS["pipeline.Dockerfile"])
    assert all("s3fs" in requirements(extras) for extras in EXTRAS.values())


def test_the_pipeline_image_has_what_rays_dashboard_needs() -> None:
    """Without one of these Ray starts a dashboard that serves nothing, and KubeRay cannot submit a job."""
    brought = {name.replace("-", "_") for name in requirements(EXTRAS["pipeline.Dockerfile"])}
    source = Path(util.find_spec("ray").origin).parent / "dashboard" / "optional_deps.py"
    for node in ast.parse(source.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        for name in names:
            package = name.partition(".")[0]
            assert any(each.startswith(package) for each in brought), name
    assert not any(each.startswith("aiohttp_cors") for each in requirements({"pipeline"}))


def test_images_start_what_the_project_installs() -> None:
    scripts = set(PROJECT["scripts"])
    assert '"smpo-train"' in dict(instructions(DOCKER / "trainer.Dockerfile"))["ENTRYPOINT"]
    assert '"smpo-pipeline"' in dict(instructions(DOCKER / "pipeline.Dockerfile"))["CMD"]
    assert scripts == {"smpo-train", "smpo-pipeline"}


def test_the_ray_job_runs_a_command_of_ours_on_the_pinned_ray() -> None:
    parse_as_ours(shlex.split(RAY_JOB["spec"]["entrypoint"]))
    assert RAY_JOB["spec"]["rayClusterSpec"]["rayVersion"] == PINS["ray"]


def test_the_ray_job_grows_with_its_pool() -> None:
    """As Ray's autoscaler itself reads the manifest."""
    spec = RAY_JOB["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"]
    read = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "x", "namespace": "x"}, "spec": spec})
    assert read["available_node_types"]["headgroup"]["resources"]["CPU"] == 0
    gpu = read["available_node_types"]["gpu"]
    words = shlex.split(RAY_JOB["spec"]["entrypoint"])
    assert gpu["resources"]["GPU"] == 1
    assert gpu["resources"]["CPU"] > 0
    assert 1 <= gpu["min_workers"] < gpu["max_workers"] == int(words[words.index("--concurrency") + 1])
    assert spec["workerGroupSpecs"][0]["replicas"] == gpu["min_workers"]


def test_the_training_job_runs_a_command_of_ours() -> None:
    container = TRAIN_JOB["spec"]["template"]["spec"]["containers"][0]
    launcher = get_args_parser().parse_args([*container["command"][1:], *container["args"]])
    assert container["command"][0] == "torchrun"
    assert (launcher.module, launcher.training_script) == (True, "smpo_trainer")
    assert launcher.nproc_per_node == container["resources"]["requests"]["nvidia.com/gpu"]
    assert 0 < launcher.shutdown_timeout < TRAIN_JOB["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    parse_as_ours(["smpo-train", *launcher.training_script_args])


def test_manifests_keep_kubernetes_schemas() -> None:
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(TRAIN_JOB, version, strict=True)
    for spec in pods():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(pod, version, strict=True)


def test_volumes_are_the_images_users() -> None:
    users = {int(dict(instructions(path))["USER"]) for path in DOCKERFILES}
    assert {spec["securityContext"]["fsGroup"] for spec in pods()} == users
    for spec in pods():
        names = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]} <= names


def test_compose_keeps_its_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, DOCKER / "compose.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_compose_builds_and_runs_what_there_is() -> None:
    for name, service in COMPOSE["services"].items():
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])
        if name == "store":
            continue
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
        if name != "bucket":
            program, command, *arguments = shlex.split(service["command"])
            assert program == "ray"
            assert flags_in(arguments) <= flags_of(ray_cli.commands[command])
    for port in COMPOSE["services"]["head"]["ports"]:
        assert port.startswith("127.0.0.1:")  # whoever reaches Ray's dashboard can run what he likes


def test_compose_shows_a_command_of_ours() -> None:
    lines = [line[1:].strip() for line in (DOCKER / "compose.yaml").read_text().splitlines() if line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    commands = re.findall(r"exec head (smpo-.*)", text)
    assert commands
    for command in commands:
        parse_as_ours(shlex.split(command))


@pytest.mark.slow
def test_composes_store_is_found_and_has_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    store, bucket = COMPOSE["services"]["store"], COMPOSE["services"]["bucket"]
    environment = bucket["environment"]
    assert environment == COMPOSE["services"]["head"]["environment"] == COMPOSE["services"]["worker"]["environment"]
    url = urlsplit(environment["AWS_ENDPOINT_URL"])
    assert COMPOSE["services"][url.hostname] is store
    assert f":{url.port}{store['environment']['VGW_HEALTH']}" in store["healthcheck"]["test"][-1]
    assert store["environment"]["ROOT_ACCESS_KEY"] == environment["AWS_ACCESS_KEY_ID"]
    assert store["environment"]["ROOT_SECRET_KEY"] == environment["AWS_SECRET_ACCESS_KEY"]
    program, *arguments = bucket["command"]
    assert program == "python"
    with object_store(monkeypatch.setenv):
        for _ in range(2):  # at each `up`
            subprocess.run([sys.executable, *arguments], check=True, env=dict(os.environ))
        assert "smpo" in fsspec.filesystem("s3", use_listings_cache=False).ls("")
    assert "s3://smpo/" in (DOCKER / "compose.yaml").read_text()
