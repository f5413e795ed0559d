from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time

import pytest
import typer

from smpo_common.commandline import run_app


@pytest.fixture
def interruptible():
    """Handle SIGINT as at a terminal; a shell's background processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_cleans_up_says_how_to_resume_and_exits_with_the_signal(number, status, monkeypatch, capfd):
    app, done = typer.Typer(), []
    before = signal.getsignal(signal.SIGTERM)

    @app.command()
    def work() -> None:
        assert signal.getsignal(number) is not signal.SIG_DFL  # which would end the tests
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        finally:
            if number == signal.SIGTERM:
                os.kill(os.getpid(), number)  # as schedulers do, to a process that is already ending
            done.append("in order")

    monkeypatch.setattr(sys, "argv", ["work"])
    with pytest.raises(SystemExit) as ended:
        run_app(app)
    assert ended.value.code == status
    assert done == ["in order"]
    printed = capfd.readouterr()
    assert printed.out == ""
    assert re.fullmatch("stopped.*same command.*\n", printed.err)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "transient"), [(errno.EIO, True), (errno.ENOTDIR, False)])
def test_only_a_transient_error_says_to_run_the_same_command_again(number, transient, monkeypatch, capfd):
    app = typer.Typer()

    @app.command()
    def work() -> None:
        raise OSError(number, os.strerror(number), "/there/a")

    monkeypatch.setattr(sys, "argv", ["work"])
    with pytest.raises(SystemExit, match="2"):
        run_app(app)
    error = capfd.readouterr().err
    assert error.startswith(f"error: /there/a: {os.strerror(number)}")
    assert ("same command" in error) is transient
