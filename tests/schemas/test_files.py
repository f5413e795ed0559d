from __future__ import annotations

from typing import Annotated

import pytest
import typer

from smpo_schemas.commandline import ConfigOption, expand_repeated, run_app, write_resolved_config
from smpo_schemas.errors import UserError
from smpo_schemas.files import atomic_path, read_json, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(target) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]


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


@pytest.fixture
def app(tmp_path):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def work(
        context: typer.Context,
        pairs: Annotated[list[str], typer.Option()],
        number: int = 3,
        config: ConfigOption = None,
    ) -> None:
        if number == 13:
            raise UserError("two\n  lines")
        write_resolved_config(context, tmp_path)
        typer.echo(f"{pairs} {number}")

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


def test_mistakes_are_one_line_and_status_2(app, tmp_path, monkeypatch, capsys):
    assert run(app, monkeypatch, "--pairs", "a", "--number", "13") == 2
    assert capsys.readouterr().err == "error: two lines\n"
    bad = tmp_path / "bad.yaml"
    bad.write_text("nummer: 3")
    assert run(app, monkeypatch, "--config", str(bad)) == 2
    assert "unknown key 'nummer'" in capsys.readouterr().err


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
