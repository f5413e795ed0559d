"""The acceptance script for a GPU, as far as a CPU can run it: every check's code, and what lies around it."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.forking import forking_python

ROOT = Path(__file__).parents[1]
GIB = 2**30

WITHOUT_RAY = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.partition(".")[0] == "ray" else find(name, *more)
runpy.run_module("benchmarks.gpu_acceptance", run_name="__main__", alter_sys=True)
"""
"""As on the machine that the script is for."""


@pytest.fixture
def module():
    """Imports one of the script's modules."""

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.acceptance.{name}")

    return load


@pytest.mark.slow
def test_every_check_runs_on_a_cpu(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    flags = ["--out", out, "--work", work, "--device", "cpu", "--shape", "tiny", "--budget", "5000"]
    paths = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
    python = forking_python()
    done = subprocess.run(
        [python, "-c", WITHOUT_RAY, *flags],
        env={**os.environ, "PYTHON_EXEC": python, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["name"]: row["verdict"] for row in rows} == dict.fromkeys((row["name"] for row in rows), "pass")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(rows) == 21
    verdicts = {f"{row['name']}, {each['name']}": each["verdict"] for row in rows for each in row["criteria"]}
    # What does not need a GPU is judged.
    for name in (
        "SD 1.5: numbers, UNet bf16",
        "SD 1.5: numbers, pair_errors under autocast are float32",
        "SD 1.5: inversion, batch of 2 against 1, bf16: tau",
        "SD 1.5: stopped and resumed, update, relative difference",
        "SD 1.5: overflow, average, held-out, pictures, overflown step leaves weights bit-equal",
        "SDXL: inversion, sdxl: rejected",
        "memory runs out, of them not recognised",
        "torchrun, torchrun: largest difference of a loss",
        "quantization, nf4: first loss over ln 2",
        "quantization, int8: weights unlike diffusers'",
    ):
        assert verdicts[name] == "pass", name
    # Rates and memory are not.
    for name in ("SD 1.5: training, pairs/s", "SDXL: training, memory of smpo-train, GiB"):
        assert verdicts[name] == "not judged", name
    table = (out / "table.md").read_text()
    assert "Cuda.short_of_memory" in table
    assert "| ray is stubbed | True |" in table
    assert "| LoRA |" in table
    assert not list(work.iterdir())


def test_no_gpu_is_one_line(module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module("ray_stubs")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", "--out", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("benchmarks.gpu_acceptance").main()
    assert "--device cuda" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("nowhere").exists()


def _world(module, device: object = None) -> SimpleNamespace:
    cpu = module("device").Cpu()
    return SimpleNamespace(device=device or cpu, describe=lambda: {"device": "here"})


def test_a_check_that_raises_or_overruns_is_a_row_and_the_next_goes_on(module, tmp_path: Path) -> None:
    runner = module("runner")

    def raises(_world: object, report: object) -> None:
        report.judge("before", 1.0, most=2)
        raise ValueError("two\nlines")

    def hangs(_world: object, _report: object) -> None:
        try:
            time.sleep(30)
        except Exception as error:  # what a library might do
            raise AssertionError from error

    def misses(_world: object, report: object) -> None:
        report.judge("too large", 3.0, most=2)
        report.judge("no number", float("nan"), most=2)
        report.judge("not known", None, most=2)
        report.judge("a rate", 1.0, least=2, on_cpu=False)

    checks = [
        runner.Check("raises", raises, 10),
        runner.Check("hangs", hangs, 0.3),
        runner.Check("misses", misses, 10),
        runner.Check("does not fit", misses, 400, optional=True),
        runner.Check("passes", lambda _world, report: report.note(found=1), 200),
    ]
    rows = runner.run_checks(checks, _world(module), tmp_path, runner.BUDGET, time.monotonic())
    assert [row["verdict"].partition(":")[0] for row in rows] == ["failed", "failed", "FAIL", "skipped", "pass"]
    assert rows[0]["verdict"] == "failed: ValueError: two lines"
    assert rows[2]["verdict"] == "FAIL: too large, no number"
    assert [json.loads(line)["name"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == [
        check.name for check in checks
    ]
    assert rows[0]["criteria"][0]["verdict"] == "pass"
    assert [each["verdict"] for each in rows[2]["criteria"]] == ["FAIL", "FAIL", "not judged", "not judged"]


def test_a_budget_that_is_used_up_fails_what_is_left(module, tmp_path: Path) -> None:
    runner = module("runner")
    checks = [runner.Check("late", lambda *_: None, 10)]
    rows = runner.run_checks(checks, _world(module), tmp_path, 10.0, time.monotonic() - 9)
    assert rows[0]["verdict"].startswith("failed")


def test_all_that_the_gpu_layer_names_in_torch_is_there(module) -> None:
    """On the CPU nothing would tell of a name that is wrong."""
    device = module("device")
    tree = ast.parse(inspect.getsource(device.Cuda))
    named = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    chains = sorted(each for each in named if each.startswith("torch.") and each.replace(".", "_").isidentifier())
    assert "torch.cuda.set_per_process_memory_fraction" in chains
    for chain in chains:
        found = torch
        for name in chain.split(".")[1:]:
            found = getattr(found, name)
    assert {each for each in vars(device.Cpu) if not each.startswith("_")} == {
        each for each in vars(device.Cuda) if not each.startswith("_")
    } | {"rounds", "turns", "warm_up"}


@pytest.fixture
def cuda(module, monkeypatch: pytest.MonkeyPatch):
    """The GPU layer over a memory of 100 GiB of which 17 are taken, and the fractions that were set."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [each.allow_tf32 for each in switches]
    fractions: list[float] = []
    for name, fake in {
        "init": lambda: None,
        "mem_get_info": lambda: (80 * GIB, 100 * GIB),
        "memory_reserved": lambda: 17 * GIB,
        "reset_peak_memory_stats": lambda: None,
        "set_per_process_memory_fraction": fractions.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    device = module("device").Cuda()
    device.fractions = fractions
    yield device
    for each, value in zip(switches, before, strict=True):
        each.allow_tf32 = value


def test_memory_of_the_gpu_is_given_back_whatever_happens(cuda) -> None:
    with pytest.raises(RuntimeError), cuda.short_of_memory(3 * GIB, 1) as short:
        assert short(len) is len
        raise RuntimeError
    assert cuda.fractions == [pytest.approx(0.2), 1.0]


def test_tf32_is_off_but_where_it_is_asked_for(cuda) -> None:
    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    assert flags() == (False, False)
    with pytest.raises(RuntimeError), cuda.tf32():
        assert flags() == (True, True)
        raise RuntimeError
    assert flags() == (False, False)


def test_the_overflow_that_is_forced_is_one_and_ends(cuda) -> None:
    """With torch's own scaler, driven as the trainer does it."""
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    accelerator = SimpleNamespace(scaler=scaler)
    cuda.begin_scale(accelerator)

    def gradient() -> torch.Tensor:
        optimizer.zero_grad()
        scaler.scale((weight * 3).float().sum()).backward()
        return weight.grad.clone()

    assert torch.equal(gradient(), torch.full((2,), 3 * 64, dtype=torch.float16))
    scale = cuda.overflow(accelerator, weight)
    assert scaler.get_scale() == scale
    assert not gradient().isfinite().any()
    cuda.end_overflow(accelerator)
    assert gradient().isfinite().all()
