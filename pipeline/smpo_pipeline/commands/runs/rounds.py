"""``smpo-pipeline rounds``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from smpo_pipeline.rounds.options import RoundsOptions
from smpo_pipeline.terminal import print_next

if TYPE_CHECKING:
    from smpo_pipeline.rounds.record import RoundsRecord
    from smpo_pipeline.rounds.stages import Plan


def rounds(options: RoundsOptions) -> None:
    """Train in rounds on the model's own images: generate, score, select, invert, train, evaluate, and again.

    Each stage is a command of its own, with flags from the config file: `smpo-pipeline rounds --config rounds.yaml`
    (examples/rounds). Writes OUT/round-000/{candidates,refreshed,scores,pairs,shards,run,evaluation} and so on,
    OUT/rounds.json after each stage, and OUT/rounds.md, which compares the rounds. The same command continues an
    interrupted run.

    Examples:
        smpo-pipeline rounds --config examples/rounds/rounds.yaml --rounds 2 --out runs/rounds
    """
    from smpo_pipeline.jobs.record.lock import locked  # noqa: PLC0415  (keeps --help quick)
    from smpo_pipeline.rounds.check import check_stages, write_flags  # noqa: PLC0415
    from smpo_pipeline.rounds.children import resolve_training, run_child  # noqa: PLC0415
    from smpo_pipeline.rounds.record import ROUNDS_FILE  # noqa: PLC0415
    from smpo_pipeline.rounds.run import Rounds  # noqa: PLC0415
    from smpo_pipeline.rounds.stages import FLAGS_FOLDER, Plan  # noqa: PLC0415

    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    plan = Plan(options, check_stages(options, resolve_training), options.out / FLAGS_FOLDER)
    if options.dry_run:
        if not (options.out / ROUNDS_FILE).is_file():  # those of an earlier run stay as they are
            write_flags(options, plan.flags)
        for number in range(options.rounds):
            for stage in plan.stages(number):
                console.print(stage.typed)
        return
    with locked(options.out):
        record = Rounds(plan, run_child, console.print).go_on()
    _show(plan, record, console)


def _show(plan: Plan, record: RoundsRecord, console: Console) -> None:
    """Print what the rounds gained, and the next command."""
    from smpo_pipeline.rounds.report import REPORT_FILE, table_rows  # noqa: PLC0415

    options = plan.options
    last = sum(bool(each.stages) for each in record.rounds) - 1
    model = plan.policy(last)
    console.print(f"trained model: {model}")
    if options.stages.evaluate is None:
        models = ("--model", f"base={options.base}", f"tuned={model}")
        print_next(console, "smpo-pipeline", "evaluate", *models, "--prompts", "PROMPTS", "--reward", "REWARD",
                   "--out", "report")  # fmt: skip
        return
    for reward, number, mean, _, base, previous, _ in table_rows(plan, last):
        wins = f"{base} against the base, {previous} against the one before"
        console.print(f"round {number}, {reward}: mean {mean}, win rate {wins}")
    console.print(f"{options.out / REPORT_FILE}, with a link to each round's report")
    if plan.merges:
        return  # push takes outputs of smpo-train: LoRAs, of which the last alone is not the model
    evaluation = plan.folder(last) / "evaluation"
    print_next(console, "smpo-pipeline", "push", plan.folder(last) / "run", "OWNER/NAME", "--evaluation", evaluation)
