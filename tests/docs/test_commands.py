"""Every command of README.md, docs/guide and `--help` is one that the programs take."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
import typer

from smpo_common.commandline import run_app
from smpo_common.options import Options
from smpo_pipeline.cli import app as pipeline
from smpo_trainer.cli import app as trainer
from tests.docs.snippets import PAGES, ROOT, commands

APPS = {"pipeline": pipeline, "train": trainer}
EXAMPLES = list(commands(ROOT / "docs" / "reference" / "cli.md"))
COMMANDS = [*(each for page in PAGES for each in commands(page)), *EXAMPLES]

OTHERS = {
    *("--num_processes", "--use_fsdp", "--mixed_precision"),  # accelerate launch
    "--shutdown-timeout",  # torchrun
    "--work",  # benchmarks/gpu_acceptance.py
    "--shape",  # benchmarks/speed/train.py
}
"""Flags of other programs in the pages' text."""


class Parsed(BaseException):
    """A command line that was taken, before its command ran."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands end where their settings have been parsed and validated, in a folder with two configs alone."""
    parse, depth = Options.parse.__func__, 0

    def parse_and_end(cls: type[Options], typed: Mapping[str, Any], given: frozenset[str] = frozenset()) -> Self:
        nonlocal depth
        depth += 1
        try:
            settings = parse(cls, typed, given)
        finally:
            depth -= 1
        if depth == 0:  # not those of a group of flags
            raise Parsed
        return settings

    monkeypatch.setattr(Options, "parse", classmethod(parse_and_end))
    for user in ("smpo_models.hub", "smpo_pipeline.rewards"):  # hub ids are not in this machine's cache
        monkeypatch.setattr(f"{user}.require_source", lambda *_: None)
    config = tmp_path / "demo" / "tuned" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("shards: [demo/shards]\nmodel: demo/world/model\nout: demo/tuned\n", encoding="utf-8")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "rounds").symlink_to(ROOT / "examples" / "rounds")
    monkeypatch.chdir(tmp_path)


def flags(app: typer.Typer) -> Iterator[str]:
    """All flags of a program."""
    command: Any = typer.main.get_command(app)
    for each in getattr(command, "commands", {"": command}).values():
        for parameter in each.params:
            yield from (*parameter.opts, *parameter.secondary_opts)


def refusal(program: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """What the program says against a command line; None: it takes it. Input files are made where it asks for them."""
    while True:
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [program, *arguments])
                run_app(APPS[program])
        except Parsed:
            return None
        except SystemExit as ended:
            said = capsys.readouterr().err
            missing = re.search(r"(\S+) does not exist$", said.strip())
            if not missing:
                return said if ended.code else None
            path = Path(missing[1])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch() if path.suffix else path.mkdir()


@pytest.mark.slow
@pytest.mark.parametrize(("place", "program", "arguments"), COMMANDS, ids=[each[0] for each in COMMANDS])
@pytest.mark.usefixtures("parse_only")
def test_a_command_is_taken(place: str, program: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if "..." in arguments:  # only a part of a command
        given = {each.partition("=")[0] for each in arguments if each.startswith("--")}
        assert given <= set(flags(APPS[program])), place
    else:
        assert refusal(program, arguments, capsys) is None, place


def test_commands_of_both_programs_are_found() -> None:
    assert {program for _, program, _ in COMMANDS} == set(APPS)


def test_every_command_has_an_example() -> None:
    group: Any = typer.main.get_command(pipeline)
    assert {arguments[0] for _, program, arguments in EXAMPLES if program == "pipeline"} == set(group.commands)


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("pipeline", ["score", "--pairs", "a", "--reward", "pickscore", "--out", "b", "--nothing"]),
        ("pipeline", ["score", "--pairs", "a", "--reward", "pickscore", "--out", "b", "--batch-size", "many"]),
        ("pipeline", ["inspekt", "shards"]),
        ("train", ["--shards", "a", "--model", "b"]),
        ("train", ["--shards", "a", "--model", "b", "--out", "c", "--lr-schedule", "none"]),
    ],
)
@pytest.mark.usefixtures("parse_only")
def test_other_commands_are_refused(program: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(program, arguments, capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_flags_in_the_text_exist(page: Any) -> None:
    known = {flag for app in APPS.values() for flag in flags(app)} | OTHERS
    named = re.findall(r"`[^`\n]*`", page.read_text(encoding="utf-8"))
    unknown = {flag for text in named for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)} - known
    assert not unknown
