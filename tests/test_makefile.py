"""The Makefile: which Python it takes, and what each target installs. Nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"

FAKE = """#!/bin/sh
exec {python} -c "import sys; sys.version_info = {version}; {venv}; $2"
"""
NO_VENV = "sys.modules['ensurepip'] = None"

DryRun = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def dry_run(tmp_path: Path) -> DryRun:
    """``make -n`` in a clean checkout, where only the named Pythons are on PATH, of the given versions."""
    checkout, programs = tmp_path / "checkout", tmp_path / "bin"
    for path in ("pyproject.toml", "constraints.txt", "tests/authors.txt", "tests/torchvision_beside_cpu_torch.py"):
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).touch()
    shutil.copy(MAKEFILE, checkout)
    programs.mkdir()
    for program in ("make", "sh"):
        (programs / program).symlink_to(str(shutil.which(program)))

    def run(*words: str, without_venv: str = "", **versions: tuple[int, int, int]) -> subprocess.CompletedProcess[str]:
        for name, version in versions.items():
            fake = programs / name.replace("_", ".")
            venv = NO_VENV if name == without_venv else "pass"
            fake.write_text(FAKE.format(python=sys.executable, version=version, venv=venv))
            fake.chmod(0o755)
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "MAKEFLAGS")}
        return subprocess.run(
            ["make", "-n", *words],
            cwd=checkout,
            env=environment | {"PATH": str(programs)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_first_suitable_python_is_taken(dry_run: DryRun) -> None:
    assert "python3.11 -m venv" in dry_run("demo", python3=(3, 11, 7), python3_11=(3, 11, 7)).stdout
    assert "python3.13 -m venv" in dry_run("demo", python3_12=(3, 12, 1), python3_13=(3, 13, 0)).stdout


@pytest.mark.parametrize("unsuitable", [(3, 10, 9), (3, 14, 0)])
def test_the_version_counts_not_the_name(dry_run: DryRun, unsuitable: tuple[int, int, int]) -> None:
    assert "python3 -m venv" in dry_run("demo", python3_13=unsuitable, python3=(3, 12, 4)).stdout


def test_a_python_without_venv_is_passed_over(dry_run: DryRun) -> None:
    found = dry_run("demo", without_venv="python3_12", python3_12=(3, 12, 4), python3=(3, 11, 2)).stdout
    assert "python3 -m venv" in found


def test_without_a_suitable_python_one_line_says_what_to_do(dry_run: DryRun) -> None:
    ended = dry_run("demo", python3=(3, 9, 2))
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "No Python 3.11, 3.12 or 3.13" in line
    assert "make PYTHON=/path/to/python3 demo" in line


def test_python_can_be_named(dry_run: DryRun) -> None:
    assert "/opt/python -m venv" in dry_run("demo", "PYTHON=/opt/python", python3_11=(3, 11, 7)).stdout


def test_the_demo_installs_no_test_lab(dry_run: DryRun) -> None:
    commands = dry_run("demo", python3=(3, 11, 7)).stdout
    assert "-e '.[pipeline]'" in commands
    assert "[dev]" not in commands
    assert "tests/" not in commands


@pytest.mark.parametrize("target", ["lint", "test", "test-fast", "setup"])
def test_development_installs_both_into_one_environment(dry_run: DryRun, target: str) -> None:
    commands = dry_run(target, python3=(3, 11, 7)).stdout
    assert commands.count("-m venv") == 1
    assert commands.index("-e '.[pipeline]'") < commands.index("-e '.[dev]'") < commands.index("tests/authors.txt")
