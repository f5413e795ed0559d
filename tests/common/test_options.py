from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from smpo_common.commandline import VERSION, run_app
from smpo_common.errors import UserError
from smpo_common.options import Flag, Options, Overwrite, add_command, flag_name


def _weights(texts):
    if isinstance(texts, dict):
        return texts
    return {name: float(weight or 1) for name, _, weight in (text.partition(":") for text in texts)}


def _as_typed(weights):
    return [f"{name}:{weight:g}" for name, weight in weights.items()]


def _known(name):
    if name == "unknown":
        raise UserError("--model unknown: no such model")
    return name


class Speed(Options):
    model_config = ConfigDict(title="How fast")

    lr: Annotated[float | None, Field(ge=0, description="Learning rate.")] = None
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning
    rate."""
    json_: Annotated[Path | None, Field(description="Where to log, as JSON.")] = None


class Job(Options):
    shards: Annotated[tuple[str, ...], Flag(metavar="DIR", place=True), Field(description="What to read.")]
    model: Annotated[str, AfterValidator(_known), Flag(place=True), Field(description="What to train.")]
    out: Annotated[Path, Field(description="Where to.")]
    reward: Annotated[
        dict[str, float],
        BeforeValidator(_weights),
        PlainSerializer(_as_typed),
        Flag(typed=list[str], metavar="NAME[:WEIGHT]"),
        Field(description="Weights.", default_factory=dict),
    ]
    steps: Annotated[int, Field(ge=1, le=10, description="How many.")] = 5
    flip: Annotated[bool, Flag(off="--no-flip"), Field(description="Mirror.")] = True
    overwrite: Overwrite = False
    speed: Speed = Speed()
    secret: Annotated[int, Flag(hidden=True), Field(description="Not shown.")] = 1

    @model_validator(mode="after")
    def _refuse_two(self):
        if self.was_typed("steps") and self.was_typed("lr"):
            raise UserError("--steps and --lr: give one of them")
        return self


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a program with one command; return the options that its function got, the exit status and the output."""

    def call(*arguments):
        app, got = typer.Typer(pretty_exceptions_enable=False), []

        def train(job: Job) -> None:
            """Train a job.

            Examples:
                train --steps 3
            """
            got.append(job)

        add_command(app, train, actions={"version": VERSION})
        monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_app(app)
        printed = capfd.readouterr()
        return got, ended.value.code, re.sub(r"\x1b\[[0-9;]*m", "", printed.out + printed.err)

    return call


_LEAST = ("--shards", "a", "b", "--model", "m", "--out", "o")


def test_a_command_receives_its_options(run):
    (job,), status, _ = run(*_LEAST, "--reward", "x:2", "y", "--lr", "0.1", "--no-flip")
    assert status == 0
    made = Job(
        shards=("a", "b"),
        model="m",
        out=Path("o"),
        reward={"x": 2.0, "y": 1.0},
        flip=False,
        speed=Speed(lr=0.1),
    )
    assert job.model_dump() == made.model_dump()
    assert job.was_typed("reward")
    assert job.speed.was_typed("lr")
    assert not job.was_typed("steps")


def test_help_shows_groups_defaults_choices_and_examples(run):
    _, status, said = run("--help")
    assert status == 0
    for part in (
        "Train a job.",
        "How fast",
        "NAME[:WEIGHT]",
        "constant",
        "cosine",
        "1<=x<=10",
        "[default: 5]",
        "Course of the learning rate.",
    ):
        assert part in said
    assert said.rstrip().endswith("train --steps 3")
    assert "--secret" not in said
    assert "{}" not in said


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--steps", "11"), ("--steps", "less than or equal to 10")),
        (("--lr", "inf"), ("--lr inf", "finite")),
        (("--model", "unknown"), ("--model unknown: no such model",)),
        (("--reward", "x:y"), ("--reward", "x:y")),
        (("--schedule", "none"), ("--schedule", "none", "cosine")),
        (("--steps", "3", "--lr", "1"), ("--steps and --lr: give one of them",)),
    ],
)
def test_a_wrong_value_names_its_flag(run, flags, parts):
    got, status, said = run(*_LEAST, *flags)
    assert (got, status) == ([], 2)
    for part in parts:
        assert part in said


def test_the_command_line_wins_over_the_config(run, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("steps: 2\nlr: 0.5\nreward: x:3\n")
    (job,), _, _ = run(*_LEAST, "--config", config, "--steps", "7")
    assert (job.steps, job.speed.lr, job.reward) == (7, 0.5, {"x": 3.0})
    assert job.was_typed("steps")
    assert not job.speed.was_typed("lr")
    config.write_text("step: 2\n")
    got, status, said = run(*_LEAST, "--config", config)
    assert (got, status) == ([], 2)
    assert "unknown key 'step'; did you mean 'steps'?" in said
    config.write_text("version: true\n")
    got, status, said = run(*_LEAST, "--config", config)
    assert (got, status) == ([], 2)
    assert "unknown key 'version'" in said


def test_the_resolved_config_repeats_the_run_from_anywhere(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "m"):
        (tmp_path / name).mkdir()
    (job,), _, _ = run(*_LEAST, "--reward", "x:2", "--overwrite", "--schedule", "cosine")
    job.write(tmp_path)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["shards"] == [str(tmp_path / "a"), "b"]
    assert written["out"] == str(tmp_path / "o")
    assert written["reward"] == ["x:2"]
    assert "overwrite" not in written
    monkeypatch.chdir("/")
    (again,), _, _ = run("--config", tmp_path / "config.yaml")
    assert again.model_dump(exclude={"shards", "model", "out", "overwrite"}) == job.model_dump(
        exclude={"shards", "model", "out", "overwrite"}
    )


def test_settings_made_in_python_are_written_as_a_config_too(run, tmp_path):
    made = Job(shards=("a",), model="m", out=Path("/o"), reward={"x": 2}, speed=Speed(lr=0.5))
    made.model_copy(update={"steps": 3}).write(tmp_path)
    (again,), _, _ = run("--config", tmp_path / "config.yaml")
    assert again.model_dump() == made.model_dump() | {"steps": 3}


def test_the_version_is_printed(run):
    got, status, said = run("--version")
    assert (got, status) == ([], 0)
    assert re.fullmatch(r"smpo-diffusion \d+\.\d+\.\d+\n", said)


def test_a_config_that_is_not_older_than_the_result_is_kept(run, tmp_path):
    (job,), _, _ = run(*_LEAST)
    result = tmp_path / "result"
    result.touch()
    job.write(tmp_path, result)
    written = (tmp_path / "config.yaml").read_bytes()
    (later,), _, _ = run(*_LEAST, "--steps", "9")
    later.write(tmp_path, result)
    assert (tmp_path / "config.yaml").read_bytes() == written
    os.utime(tmp_path / "config.yaml", ns=(0, 0))
    later.write(tmp_path, result)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["steps"] == 9


def test_python_gets_the_same_checks():
    with pytest.raises(ValidationError, match="steps"):
        Job(shards=("a",), model="m", out=Path("o"), steps=0)
    with pytest.raises(ValidationError, match="stepz"):
        Job(shards=("a",), model="m", out=Path("o"), stepz=3)


def test_an_underscore_at_the_end_is_in_neither_the_flag_nor_the_key(run, tmp_path):
    (job,), _, _ = run(*_LEAST, "--json", "/log")
    assert job.speed.json_ == Path("/log")
    job.write(tmp_path)
    (again,), _, _ = run("--config", tmp_path / "config.yaml")
    assert again.speed.json_ == Path("/log")
    assert flag_name("json_") == "--json"


def test_replace_sets_values_in_any_group(run):
    (job,), _, _ = run(*_LEAST, "--steps", "3")
    other = job.replace(steps=4, lr=0.5)
    assert (other.steps, other.speed.lr, other.was_typed("steps")) == (4, 0.5, True)
    assert (job.steps, job.speed.lr) == (3, None)
    with pytest.raises(TypeError, match="stepz"):
        job.replace(steps=4, stepz=5)
