"""The command line ``smpo-pipeline``."""

from __future__ import annotations

import logging
import sys

import typer

from smpo_common.commandline import run_app
from smpo_common.options import add_command
from smpo_pipeline.commands.models.evaluate import evaluate
from smpo_pipeline.commands.models.merge import merge
from smpo_pipeline.commands.models.push import push
from smpo_pipeline.commands.pairs.calibrate import calibrate
from smpo_pipeline.commands.pairs.generate import generate
from smpo_pipeline.commands.pairs.refresh import refresh
from smpo_pipeline.commands.pairs.score import score
from smpo_pipeline.commands.pairs.select import select
from smpo_pipeline.commands.pairs.vote import vote
from smpo_pipeline.commands.pairs.weigh import weigh
from smpo_pipeline.commands.runs.inspect import inspect
from smpo_pipeline.commands.runs.rounds import rounds
from smpo_pipeline.commands.runs.status import status
from smpo_pipeline.commands.runs.toy import toy
from smpo_pipeline.commands.shards.invert import invert
from smpo_pipeline.commands.shards.plan import plan
from smpo_pipeline.commands.shards.steps import steps

app = typer.Typer(
    help="Stages of SmPO-Diffusion: generate images, score pairs, invert them into shards; evaluate and inspect.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
# Headings of `smpo-pipeline --help`, in the order of a user's work; the folders of commands/ are the same.
_COMMANDS = {
    "Make, score and choose pairs": (generate, score, calibrate, weigh, refresh, select, vote),
    "Turn them into shards, which smpo-train reads": (plan, invert, steps),
    "Compare, merge and share models": (evaluate, merge, push),
    "Follow, inspect, repeat and try runs": (status, inspect, rounds, toy),
}
for heading, commands in _COMMANDS.items():
    for command in commands:
        add_command(app, command, heading=heading)


def main() -> None:
    """Entry point."""
    # matplotlib warns if it cannot cache fonts in the home directory, which does not matter here.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    sys.argv[1:] = _plan_of_generation(sys.argv[1:])
    run_app(app)


def _plan_of_generation(arguments: list[str]) -> list[str]:
    """Replace ``plan --prompts ...`` by ``generate --plan`` with the same flags."""
    if arguments[:1] != ["plan"] or not any(word.partition("=")[0] == "--prompts" for word in arguments):
        return arguments
    out = [] if any(word.partition("=")[0] == "--out" for word in arguments) else ["--out", "candidates"]
    return ["generate", *arguments[1:], *out, "--plan"]
