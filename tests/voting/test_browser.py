"""The command and its page in a real browser: keys, a reload, a kill, two annotators at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests.voting.helpers import COUNT, is_red, rows

pytestmark = pytest.mark.browser

SHOWN = "#ballot[data-pair]"


class Server:
    """The command, which can be killed and started again at the same address."""

    def __init__(self, pairs: Path, out: Path) -> None:
        self.out, self.address, self._pairs, self._port = out, "", pairs, "0"
        self.start()

    def start(self) -> None:
        code = "import sys; sys.argv[0] = 'smpo-pipeline'; from smpo_pipeline.cli import main; main()"
        command = ["vote", "--pairs", self._pairs, "--out", self.out, "--port", self._port]
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, command)], stdout=subprocess.PIPE, text=True
        )
        line = next(line for line in self._process.stdout if line.startswith("open http"))
        self.address = line.split()[1]
        self._port = self.address.rstrip("/").rpartition(":")[2]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def server(pairs: Path, tmp_path: Path) -> Iterator[Server]:
    running = Server(pairs, tmp_path / "labels.parquet")
    yield running
    running.kill()


def enter(browser: Browser, address: str, name: str) -> Page:
    """Open the page in a window of its own and give a name."""
    page = browser.new_context().new_page()
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.on("request", lambda request: request.url.startswith((address, "data:")) or pytest.fail(request.url))
    page.goto(address)
    page.fill("#name", name)
    page.press("#name", "Enter")
    page.wait_for_selector(SHOWN)
    return page


def shown(page: Page) -> str:
    return str(page.get_attribute("#ballot", "data-pair"))


def press(page: Page, key: str) -> None:
    """Press a key and wait for what it changes."""
    before = shown(page)
    page.keyboard.press(key)
    page.wait_for_selector(f'{SHOWN}:not([data-pair="{before}"]), #finished:not([hidden])')


def key_of_red(page: Page, address: str, name: str) -> str:
    answer = page.request.get(f"{address}picture", params={"pair": shown(page), "side": "left", "annotator": name})
    return "1" if is_red(answer.body()) else "2"


def test_thirty_votes_of_two_annotators_with_a_reload_and_a_kill_between(browser: Browser, server: Server) -> None:
    address, path = server.address, server.out
    ann, ben = enter(browser, address, "Ann"), enter(browser, address, "Ben")
    expected = []
    for number in range(15):
        for name, page in (("Ann", ann), ("Ben", ben)):
            red = key_of_red(page, address, name)
            key, label = (
                ("0", 0.5) if number == 7 else (red, 1.0) if name == "Ann" else ({"1": "2", "2": "1"}[red], 0.0)
            )
            expected.append((shown(page), name, label))
            press(page, key)
        if number == 4:
            ann.reload()
            ann.wait_for_selector(SHOWN)
        if number == 9:
            server.kill()
            server.start()
    assert [(row["pair_id"], row["annotator"], row["label"]) for row in rows(path)] == expected
    assert ann.inner_text("#count").startswith(f"15 of {COUNT - 1}")
    assert ann.inner_text("#agreement") == "agrees with 1 of 14 votes of others"  # the tie; Ben has voted since
    undone = expected[-2][0]
    press(ann, "u")
    assert shown(ann) == undone
    assert len(rows(path)) == 29
    ann.click("#left")
    ann.wait_for_selector(f'{SHOWN}:not([data-pair="{undone}"])')
    assert len(rows(path)) == 30


def test_a_vote_that_is_not_written_is_said(browser: Browser, server: Server) -> None:
    address, path = server.address, server.out
    page = enter(browser, address, "Ann")
    path.mkdir()  # the file cannot take this name
    page.keyboard.press("1")
    page.wait_for_selector("#error:not([hidden])")
    assert "cannot write" in page.inner_text("#error")
