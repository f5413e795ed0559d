"""Run whole commands: evaluate and plan in this process, training under torchrun."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence

from benchmarks.acceptance.checks.training import arguments, records_of
from benchmarks.acceptance.runner import Report
from benchmarks.acceptance.world import World
from smpo_common.files import read_json
from smpo_pipeline.cli import app


def check_evaluation(world: World, report: Report) -> None:
    """Evaluate SD 1.5 before and after training, scored by a random ViT-H."""
    steps, prompts, images = world.size.sampling
    out, file = world.work / "report", world.work / "evaluated.txt"
    file.write_text("".join(f"a circle number {number}\n" for number in range(prompts)), encoding="utf-8")
    models = [f"base={world.model('sd15')}", f"tuned={world.work / 'whole'}"]
    flags = ["--prompts", file, "--images-per-prompt", images, "--steps", steps, "--dtype", "bf16", "--out", out]
    flags += ["--reward", f"pickscore={world.model('clip')}", "--device", world.device.name]
    _pipeline(world, "evaluate", *[each for model in models for each in ("--model", model)], *flags)
    report.judge("report.html", (out / "report.html").is_file(), least=1)
    findings = read_json(out / "results.json")["findings"]
    finite = sum(math.isfinite(each["mean"]) and math.isfinite(each["std"]) for each in findings)
    report.judge("models with finite scores", finite, least=len(models), most=len(models))


def check_plan(world: World, report: Report) -> None:
    """Compare plan's measured rate with the actor's."""
    out = world.work / "plan.json"
    size = world.size
    pairs = world.pairs("sd15", size.units * size.unit) / "pairs.parquet"
    flags = ["--pairs", pairs, "--model", world.model("sd15"), "--seconds", size.plan_seconds, "--json", out]
    flags += ["--batch-size", min(size.unit, size.batches[-1]), "--steps", size.steps, "--dtype", "bf16"]
    _pipeline(world, "plan", *flags, "--device", world.device.name)
    rate = read_json(out)["pairs_per_second"]
    report.note(pairs_per_second=rate)
    inverted = world.notes.get("inverted")
    report.judge("plan's rate over the actor's", inverted and rate / inverted, least=0.9, most=1.1, on_cpu=False)


def _pipeline(world: World, *flags: object) -> None:
    app([str(each) for each in flags], standalone_mode=False)
    world.device.clean()


def check_torchrun(world: World, report: Report) -> None:
    """Train SD 1.5 in a process group of one: NCCL and DDP, or the device's equivalents."""
    _judge_launched(world, report, "torchrun", {})


def check_fsdp(world: World, report: Report) -> None:
    """Train with FSDP and a single shard."""
    if not world.device.fsdp:
        report.judge("fsdp: exit status", None, least=0, most=0)
        return
    _judge_launched(world, report, "fsdp", world.device.fsdp)


def _judge_launched(world: World, report: Report, name: str, environment: Mapping[str, str]) -> None:
    size, out = world.size, world.work / name
    steps = min(3, size.train_steps)
    flags = ["--batch-size", size.pairs, "--max-steps", steps, "--save-every", steps]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += ["-m", "smpo_trainer", *arguments(world, "sd15", out, *flags)]
    done = _run(command, environment)
    report.judge(f"{name}: exit status", done.returncode, least=0, most=0)
    if done.returncode:
        report.note(said=done.stderr[-600:])
        return
    launched, alone = records_of(out), world.notes["whole"]
    apart = max(abs(one["loss"] - other["loss"]) for one, other in zip(launched, alone, strict=False))
    report.judge(f"{name}: largest difference of a loss", apart, most=1e-2)
    report.note(states_per_second=[each["states_per_second"] for each in launched])
    shutil.rmtree(out)


def _run(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run in a session of its own, so that an alarm leaves no process behind that holds the device."""
    paths = os.pathsep.join(path for path in sys.path if path)
    given = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(
        command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            said, errors = child.communicate()
        except BaseException:
            os.killpg(child.pid, 9)
            raise
    return subprocess.CompletedProcess(command, child.returncode, said, errors)
