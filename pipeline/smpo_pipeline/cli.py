"""The command line ``smpo-pipeline``."""

from __future__ import annotations

import logging
import sys

import typer

from smpo_common.commandline import run_app
from smpo_common.options import add_command
from smpo_pipeline.commands.calibrate import calibrate
from smpo_pipeline.commands.evaluate import evaluate
from smpo_pipeline.commands.generate import generate
from smpo_pipeline.commands.inspect import inspect
from smpo_pipeline.commands.invert import invert
from smpo_pipeline.commands.merge import merge
from smpo_pipeline.commands.plan import plan
from smpo_pipeline.commands.push import push
from smpo_pipeline.commands.refresh import refresh
from smpo_pipeline.commands.rounds import rounds
from smpo_pipeline.commands.score import score
from smpo_pipeline.commands.select import select
from smpo_pipeline.commands.status import status
from smpo_pipeline.commands.steps import steps
from smpo_pipeline.commands.toy import toy
from smpo_pipeline.commands.vote import vote
from smpo_pipeline.commands.weigh import weigh

app = typer.Typer(
    help="Stages of SmPO-Diffusion: generate images, score pairs, invert them into shards; evaluate and inspect.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_EXAMPLES = {
    "refresh": "Example: smpo-pipeline refresh --reward pickscore --scores scores --pairs pairs/ "
    "--candidates candidates --out refreshed",
    "rounds": "Example: smpo-pipeline rounds --config examples/rounds/rounds.yaml --rounds 2 --out runs/rounds",
    "steps": "Example: smpo-pipeline steps --model MODEL --prompts prompts.txt --reward pickscore --out shards",
    "weigh": "Example: smpo-pipeline weigh --scores scores --pairs pairs/ --golden-column human --source-column site",
}
for command in (
    *(generate, score, calibrate, weigh, refresh, select, plan, invert, steps, status),
    *(evaluate, inspect, rounds, merge, push, vote, toy),
):
    add_command(app, command, examples=_EXAMPLES.get(command.__name__, ""))


def main() -> None:
    """Entry point."""
    # matplotlib warns if it cannot cache fonts in the home directory, which does not matter here.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    sys.argv[1:] = _plan_of_generation(sys.argv[1:])
    run_app(app)


def _plan_of_generation(arguments: list[str]) -> list[str]:
    """Make ``plan --prompts`` what it stands for: ``generate --plan`` with the same flags."""
    if arguments[:1] != ["plan"] or not any(word.partition("=")[0] == "--prompts" for word in arguments):
        return arguments
    out = [] if any(word.partition("=")[0] == "--out" for word in arguments) else ["--out", "candidates"]
    return ["generate", *arguments[1:], *out, "--plan"]
