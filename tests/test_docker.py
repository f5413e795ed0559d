"""What can be checked of the containers' files without a container engine."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from smpo_pipeline.cli import app as pipeline
from smpo_trainer.cli import app as trainer

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", "\n".join(line for line in path.read_text().splitlines() if line[:1] != "#"))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def flags_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


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
    extras = set(re.findall(r"\[(\w+)\]", " ".join(installs)))
    assert extras <= set(PROJECT["optional-dependencies"])
    assert extras == ({"pipeline"} if path.name.startswith("pipeline") else set())
    words = [name for name, _ in lines]
    assert words.index("USER") < len(words) - 1
    assert dict(lines)["USER"] != "root"


def test_images_start_what_the_project_installs() -> None:
    scripts = set(PROJECT["scripts"])
    assert '"smpo-train"' in dict(instructions(DOCKER / "trainer.Dockerfile"))["ENTRYPOINT"]
    assert '"smpo-pipeline"' in dict(instructions(DOCKER / "pipeline.Dockerfile"))["CMD"]
    assert scripts == {"smpo-train", "smpo-pipeline"}


def test_the_ray_job_runs_a_command_of_ours_on_the_pinned_ray() -> None:
    job = yaml.safe_load((DOCKER / "rayjob.yaml").read_text())
    program, name, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "smpo-pipeline"
    known = flags_of(get_command(pipeline).commands[name])
    assert {word for word in arguments if word.startswith("--")} <= known
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]


def test_the_training_job_runs_a_command_of_ours() -> None:
    job = yaml.safe_load((DOCKER / "train-job.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["command"][-2:] == ["-m", "smpo_trainer"]
    assert {argument.partition("=")[0] for argument in container["args"]} <= flags_of(get_command(trainer))


def test_compose_builds_from_files_that_there_are() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for service in compose["services"].values():
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
