"""All checks, in order: correctness before speed, the small model before the large one."""

from __future__ import annotations

import time

from benchmarks.acceptance.checks.arithmetic import check_numbers, check_xl_numbers
from benchmarks.acceptance.checks.ceilings import measure_ceilings
from benchmarks.acceptance.checks.commands import check_evaluation, check_fsdp, check_plan, check_torchrun
from benchmarks.acceptance.checks.inverting import check_inversion, check_inversion_rate, check_xl_inversion
from benchmarks.acceptance.checks.memory import check_memory
from benchmarks.acceptance.checks.quantizing import check_quantization
from benchmarks.acceptance.checks.scoring import check_scoring
from benchmarks.acceptance.checks.stopping import check_overflow, check_resume
from benchmarks.acceptance.checks.training import check_compile, check_lora, check_training, check_xl_training
from benchmarks.acceptance.runner import Check, Report
from benchmarks.acceptance.world import World


def make_checks(began: float) -> list[Check]:
    """Return the checks with their budgets in seconds; ``began`` is the start of the process."""

    def start(world: World, report: Report) -> None:
        """Record the import time and make the first model."""
        report.note(seconds_of_imports=time.monotonic() - began, ray_is_stubbed=world.notes["ray is stubbed"])
        world.make_first_model()

    return [
        Check("start", start, 30),
        Check("ceilings", measure_ceilings, 12),
        Check("drawing SDXL and ViT-H", lambda world, _report: world.make_others(), 8),
        Check("SD 1.5: numbers", check_numbers, 25),
        Check("SD 1.5: inversion", check_inversion, 20),
        Check("SD 1.5: inversion rate", check_inversion_rate, 42),
        Check("SD 1.5: training", check_training, 42),
        Check("SD 1.5: stopped and resumed", check_resume, 48),
        Check("SD 1.5: overflow, average, held-out, pictures", check_overflow, 28),
        Check("SDXL: numbers", check_xl_numbers, 18),
        Check("SDXL: inversion", check_xl_inversion, 38),
        Check("SDXL: training", check_xl_training, 55),
        Check("LoRA", check_lora, 20),
        Check("memory runs out", check_memory, 22),
        Check("scoring", check_scoring, 26),
        Check("evaluate", check_evaluation, 28),
        Check("plan", check_plan, 25, optional=True),
        Check("torchrun", check_torchrun, 40),
        Check("FSDP", check_fsdp, 40, optional=True),
        Check("quantization", check_quantization, 40, optional=True),
        Check("compile", check_compile, 60, optional=True),
    ]
