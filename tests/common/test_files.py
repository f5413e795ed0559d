from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Annotated

import pytest
import safetensors.torch
import tenacity
import torch
import typer
import yaml

from smpo_common import retry
from smpo_common.commandline import expand_repeated, run_app
from smpo_common.errors import UserError
from smpo_common.files import atomic_path, follow_umask, read_json, write_json
from smpo_common.options import Flag, Options, add_command


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(target) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture
def umask():
    """Set the usual umask, 022."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_files_of_safetensors_get_the_usual_mode(tmp_path):
    """safetensors replaces the file at a path by one of mode 0600."""
    tensors = {"a": torch.zeros(2)}
    with atomic_path(tmp_path / "whole.safetensors") as temporary:
        safetensors.torch.save_file(tensors, temporary)
    safetensors.torch.save_file(tensors, tmp_path / "tree.safetensors")
    (tmp_path / "tree.json").write_text("{}")
    follow_umask(tmp_path)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {
        "whole.safetensors": "0o644",
        "tree.safetensors": "0o644",
        "tree.json": "0o644",
    }


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "file" / "a.json", {})


def test_repeated_options():
    arguments = ["score", "--pairs", "a", "b", "--out", "x", "--reward=p", "q", "--reward", "r", "s", "--flag"]
    assert expand_repeated(arguments, {"--pairs", "--reward"}) == [
        *("score", "--pairs", "a", "--pairs", "b", "--out", "x", "--reward=p", "q", "--reward", "r"),
        *("--reward", "s", "--flag"),
    ]


class Work(Options):
    pairs: tuple[str, ...]
    number: int = 3


@pytest.fixture
def app(tmp_path):
    app = typer.Typer(pretty_exceptions_enable=False)

    def work(options: Work) -> None:
        if options.number == 13:
            raise UserError("two\n  lines")
        if options.number == 17:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "/there/a")
        options.write(tmp_path)
        typer.echo(f"{list(options.pairs)} {options.number}")

    add_command(app, work)
    return app


def run(app, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["program", *arguments])
    with pytest.raises(SystemExit) as caught:
        run_app(app)
    return caught.value.code


def test_a_resolved_config_repeats_the_run_and_flags_override_it(app, tmp_path, monkeypatch, capsys):
    assert run(app, monkeypatch, "--pairs", "a", "b", "--number", "5") == 0
    config = tmp_path / "mine.yaml"
    (tmp_path / "config.yaml").rename(config)
    assert run(app, monkeypatch, "--config", str(config)) == 0
    assert run(app, monkeypatch, "--config", str(config), "--number", "6") == 0
    assert capsys.readouterr().out.splitlines() == ["['a', 'b'] 5", "['a', 'b'] 5", "['a', 'b'] 6"]


class Places(Options):
    pairs: Annotated[tuple[str, ...], Flag(place=True)]
    model: Annotated[tuple[str, ...], Flag(place=True)]
    reward: Annotated[tuple[str, ...], Flag(place="named")]
    prompt_column: str
    unet: Path
    cache: Path = Path("~/cache")


def test_a_resolved_config_means_the_same_from_elsewhere(tmp_path, monkeypatch):
    app = typer.Typer(pretty_exceptions_enable=False)

    def work(options: Places) -> None:
        options.write(Path("run"))

    add_command(app, work)
    for name in ("a", "org", "run", "x=a"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    args = ["--pairs", "a", "s3://there/a", "--model", "a", "x=a", "org/name", "--reward", "a", "p=a", "q=org/r"]
    assert run(app, monkeypatch, *args, "--prompt-column", "a", "--unet", "not-yet") == 0
    here = str(tmp_path)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == {
        "pairs": [f"{here}/a", "s3://there/a"],
        "model": [f"{here}/a", f"{here}/x=a", "org/name"],
        "reward": ["a", f"p={here}/a", "q=org/r"],
        "prompt_column": "a",
        "unet": f"{here}/not-yet",
        "cache": "~/cache",
    }


def test_mistakes_are_one_line_and_status_2(app, tmp_path, monkeypatch, capsys):
    assert run(app, monkeypatch, "--pairs", "a", "--number", "13") == 2
    assert capsys.readouterr().err == "error: two lines\n"
    bad = tmp_path / "bad.yaml"
    bad.write_text("nummer: 3")
    assert run(app, monkeypatch, "--config", str(bad)) == 2
    assert "unknown key 'nummer'; did you mean 'number'?" in capsys.readouterr().err
    bad.write_text("zebra: 3")
    assert run(app, monkeypatch, "--config", str(bad)) == 2
    assert "number, pairs" in capsys.readouterr().err


def test_a_config_may_name_one_of_several(app, tmp_path, monkeypatch, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text("pairs: abc")
    assert run(app, monkeypatch, "--config", str(config)) == 0
    assert capsys.readouterr().out == "['abc'] 3\n"


class Rate(Options):
    lr: float = 1.0


def test_names_of_other_programs_are_known(tmp_path, monkeypatch, capsys):
    app = typer.Typer(pretty_exceptions_enable=False)

    def work(options: Rate) -> None:
        typer.echo(options.lr)

    add_command(app, work)
    config = tmp_path / "mine.yaml"
    config.write_text("learning_rate: 3")
    for arguments in (["--config", str(config)], ["--learning-rate", "3"], ["--learning-rate=3"]):
        assert run(app, monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert "learning" in error
        assert "did you mean" in error
        assert "lr" in error


def test_a_failure_of_storage_is_one_line(app, monkeypatch, capsys):
    assert run(app, monkeypatch, "--pairs", "a", "--number", "17") == 2
    assert re.fullmatch("error: /there/a: Input/output error.*same command.*\n", capsys.readouterr().err)


def test_only_transient_errors_are_retried(monkeypatch):
    monkeypatch.setattr(retry.TRANSIENT_RETRY, "wait", tenacity.wait_none())
    failures: list[Exception] = []

    @retry.retry_transient
    def work() -> str:
        if failures:
            raise failures.pop()
        return "done"

    def write(number: int) -> UserError:
        error = UserError("cannot write a")
        error.__cause__ = OSError(number, "")
        return error

    failures += [OSError(errno.ESTALE, ""), write(errno.EIO)]
    assert work() == "done"
    for last in (OSError(errno.ENOSPC, ""), write(errno.EROFS), UserError("another"), KeyError()):
        failures += [last, OSError(errno.EIO, "")]
        with pytest.raises(type(last)) as caught:
            work()
        assert caught.value is last
        failures.clear()
    failures += [OSError(errno.EIO, "") for _ in range(7)]
    with pytest.raises(OSError, match=r"Errno 5"):
        work()
    assert len(failures) == 1


def test_a_flag_repeats_only_in_the_command_where_it_may(monkeypatch, capsys):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def many(model: Annotated[list[str], typer.Option()]) -> None:
        typer.echo(f"many {model}")

    @app.command()
    def one(path: str, model: Annotated[str, typer.Option()]) -> None:
        typer.echo(f"one {path} {model}")

    assert run(app, monkeypatch, "many", "--model", "a", "b") == 0
    assert run(app, monkeypatch, "one", "--model", "a", "b") == 0
    assert capsys.readouterr().out.splitlines() == ["many ['a', 'b']", "one b a"]
