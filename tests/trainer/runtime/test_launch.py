"""The device and the processes of a run, from flags and the environment."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from smpo_models import devices
from smpo_trainer.runtime import launch
from smpo_trainer.settings import Device
from tests.forking import forking_python
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, make_settings, run_cli
from tests.trainer.output.test_resume import ENVIRONMENT, TWO_PROCESSES

Refused = Callable[..., str]


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment variable that asks for the CPU."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def refused(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Run ``smpo-train``, which must fail with one line; returns the line."""

    def run(**options: object) -> str:
        assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "run", **options)) == 2
        error = capsys.readouterr().err.strip()
        assert error.count("\n") == 0
        assert not (tmp_path / "run").exists()
        return error

    return run


def test_the_first_line_names_device_and_dtype(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(max_steps=1, dtype="bf16")
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("device: cpu")
    assert "dtype: bf16" in first


@pytest.mark.parametrize(
    ("launched", "device", "gpu", "dtype"),
    [
        (None, None, "no GPU", "fp32"),
        (None, None, "bfloat16", "bf16"),
        (None, None, "no bfloat16", "fp32"),
        (None, "cpu", "bfloat16", "fp32"),
        ("no", None, "bfloat16", "fp32"),
        ("fp16", None, "bfloat16", "fp16"),
    ],
)
@pytest.mark.usefixtures("unasked")
def test_the_default_dtype(
    launched: str | None, device: Device | None, gpu: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu != "no GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: gpu == "bfloat16")
    assert launch.choose_dtype(make_settings(device=device)).compute.dtype == dtype
    assert launch.choose_dtype(make_settings(device=device, dtype="fp16")).compute.dtype == "fp16"


@pytest.mark.usefixtures("unasked")
def test_on_a_machine_with_a_gpu_the_cpu_needs_a_flag(
    train: Train, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_DEVICES", tmp_path)
    train("without", max_steps=1)
    (tmp_path / "nvidiactl").touch()
    train("driver", max_steps=1)
    (tmp_path / "nvidia0").touch()
    error = refused()
    assert str(tmp_path / "nvidia0") in error
    assert "--device cpu" in error
    train("asked", max_steps=1, device="cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train("hidden", max_steps=1)


@pytest.mark.usefixtures("unasked")
def test_several_processes_without_gpus_need_a_flag(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    error = refused()
    assert "2 processes" in error
    assert "--device cpu" in error


def test_a_missing_gpu_is_refused(refused: Refused) -> None:
    assert "--device cuda" in refused(device="cuda")


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR"])
def test_an_incomplete_environment_of_a_launcher_is_refused(
    refused: Refused, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in {"RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    error = refused()
    assert "WORLD_SIZE=2" in error
    assert missing in error


def test_a_process_that_waits_for_others_prints_a_line(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = {"WORLD_SIZE": "3", "RANK": "1", "MASTER_ADDR": "node", "MASTER_PORT": "29500"}
    for name, value in stale.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "_PATIENCE_SECONDS", 0.01)

    def wait(**_: object) -> None:
        deadline = time.monotonic() + 10
        said = ""
        while not said and time.monotonic() < deadline:
            said = capsys.readouterr().err
            time.sleep(0.01)
        assert "process 1 of 3 waits" in said
        assert "node:29500" in said
        raise ValueError("enough")

    monkeypatch.setattr(launch, "Accelerator", wait)
    refused()


def test_the_precision_of_accelerate_launch_is_used(
    train: Train, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def precision(out: Path) -> str:
        return str(yaml.safe_load((out / "config.yaml").read_text())["dtype"])

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    out = train("launched", max_steps=1)
    assert precision(out) == "bf16"
    assert precision(train("flag", max_steps=1, dtype="fp32")) == "fp32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert precision(train("config", config=out / "config.yaml", max_steps=1)) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "fp8" in refused()


def test_without_a_compiler_compiling_is_refused_before_training(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--compile" in refused(compile=True)


_TIMEOUT = """
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import _get_default_group

from smpo_trainer.runtime.launch import make_accelerator
from smpo_trainer.settings import TrainSettings

settings = TrainSettings(shards=("shards",), model="model", out=Path("out"))
make_accelerator(settings.replace(device="cpu", dtype="fp32"))
timeout = _get_default_group()._get_backend(torch.device("cpu")).options._timeout
# In one write, so that the lines of two processes do not mix.
print(f"{timeout.total_seconds()}\\n", end="")
"""


@pytest.mark.slow
def test_processes_wait_for_hours(tmp_path: Path) -> None:
    """One may work alone for long; by default NCCL ends the run after ten minutes, gloo after thirty."""
    program = tmp_path / "program.py"
    program.write_text(_TIMEOUT)
    python = forking_python()
    done = subprocess.run(
        [python, *TWO_PROCESSES, program], check=False, capture_output=True, text=True, timeout=400,
        env={**os.environ, **ENVIRONMENT, "PYTHON_EXEC": python},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == [6 * 3600.0] * 2
