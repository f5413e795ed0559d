"""The reward over HTTP against a server in this process that fails, is slow, and answers wrongly."""

from __future__ import annotations

import base64
import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import tenacity
from PIL import Image

from smpo_common import retry
from smpo_common.errors import UserError
from smpo_pipeline.isolation import run_isolated
from smpo_pipeline.rewards import checked_scores, load_reward, parse_reward
from smpo_pipeline.served.client import NoAnswerError
from tests.pictures import picture
from tests.servers.json_server import json_server, late

PICTURES = [picture(20 + number, 9, seed=number) for number in range(4)]
PROMPTS = ["a cat", "", "Größe 東京 🐈", "a dog"]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(retry.TRANSIENT_RETRY, "wait", tenacity.wait_none())


def decoded(body) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(image))) for image in body["images"]]


def means(body):
    """The mean of each image, plus the number of characters of its prompt."""
    pairs = zip(decoded(body), body["prompts"], strict=True)
    return 200, {"scores": [float(np.asarray(image).mean()) + len(prompt) for image, prompt in pairs]}


def test_images_arrive_unchanged_and_scores_come_back_in_order():
    with json_server(means) as server:
        reward = load_reward(f"http={server.url}/score", "cpu")
        scores = reward.score(PICTURES, PROMPTS)
    expected = [np.asarray(image).mean() + len(prompt) for image, prompt in zip(PICTURES, PROMPTS, strict=True)]
    np.testing.assert_array_equal(scores, expected)
    (body,) = server.bodies
    assert body["prompts"] == PROMPTS
    for sent, image in zip(decoded(body), PICTURES, strict=True):
        np.testing.assert_array_equal(np.asarray(sent), np.asarray(image))
    assert reward.needs.remote


def test_the_server_names_its_weights_or_its_address_does():
    with json_server(means, lambda _path: (200, {"fingerprint": "abc"})) as server:
        assert load_reward(f"http={server.url}", "cpu").fingerprint == "abc"
    for answer in ((404, {}), (405, b"no"), (200, b"<html>"), (200, ["abc"]), (200, {"fingerprint": 7})):
        with json_server(means, lambda _path, answer=answer: answer) as server:
            assert load_reward(f"http={server.url}", "cpu").fingerprint == server.url


def test_an_option_names_the_columns():
    """Several servers can score in one command; the name of a built-in reward may be that of its published package."""
    with json_server(means) as server:
        reward = load_reward(f"http={server.url}/a,name=hpsv3,timeout=5", "cpu")
        assert (reward.name, reward.model) == ("hpsv3", f"{server.url}/a")
        assert parse_reward(f"http={server.url}")[0].name == "http"


@pytest.mark.parametrize("failure", [(503, {}), (429, b"slow down"), (0, None), "late"])
def test_what_passes_is_retried(failure):
    failures = [failure, failure]

    def flaky(body):
        if not failures:
            return means(body)
        return late(means(body), 0.4) if failures.pop() == "late" else failure

    with json_server(flaky) as server:
        scores = load_reward(f"http={server.url},timeout=0.2", "cpu").score(PICTURES, PROMPTS)
        np.testing.assert_array_equal(scores, means(server.bodies[-1])[1]["scores"])
        assert len(server.bodies) == 3


def test_an_image_without_a_score_has_a_reason():
    def partly(_body):
        return 200, b'{"scores": [1.5, null, NaN, Infinity]}'

    with json_server(partly) as server:
        reward = load_reward(f"http={server.url}", "cpu")
        scored = checked_scores(reward, PICTURES, PROMPTS)
    np.testing.assert_array_equal(scored.values, [1.5, math.nan, math.nan, math.nan])
    assert scored.reasons == {
        1: f"no answer: {server.url} has no score for this image",
        2: f"not finite: the score from {server.url} is nan",
        3: f"not finite: the score from {server.url} is inf",
    }


def test_an_image_that_the_server_fails_on_is_found():
    """A status of 500 is not retried: it says which image is wrong, once the batch is halved."""

    def touchy(body):
        return (500, {"error": "boom"}) if "a dog" in body["prompts"] else means(body)

    with json_server(touchy) as server:
        reward = load_reward(f"http={server.url}", "cpu")
        with pytest.raises(NoAnswerError, match="500"):
            reward.score(PICTURES, PROMPTS)
        items = list(zip(PICTURES, PROMPTS, strict=True))
        outcome = run_isolated(lambda items: checked_scores(reward, *zip(*items, strict=True)), items, "cpu")
    assert outcome.failed.keys() == {3}
    assert "fails alone: NoAnswerError: http://127.0.0.1:" in outcome.failed[3]
    assert '500: {"error": "boom"}' in outcome.failed[3]
    assert [positions for positions, _ in outcome.results] == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"scores": [1, 2, 3]}), "3 scores for 4 images"),
        ((200, {"scores": [1, 2, 3, "4"]}), "'4' as a score"),
        ((200, {"scores": [True] * 4}), "True as a score"),
        ((200, {"score": 1}), 'did not answer with {"scores"'),
        ((200, [1, 2, 3, 4]), 'did not answer with {"scores"'),
        ((401, b"who are you"), "answered 401: who are you"),
        ((404, b""), "answered 404$"),
        ((307, b""), "answered 307"),
        ((503, b"\x1b[2J" * 100), r"answered 503: \\x1b"),
        ((0, None), "no answer from"),
    ],
)
def test_a_wrong_server_is_one_line(answer, message):
    with json_server(lambda _body: answer) as server:
        reward = load_reward(f"http={server.url}", "cpu")
        with pytest.raises(UserError, match=f"--reward http: .*{message}"):
            checked_scores(reward, PICTURES, PROMPTS)


def test_a_server_that_is_always_late_is_one_line():
    with json_server(lambda body: late(means(body), 0.3)) as server:
        reward = load_reward(f"http={server.url},timeout=0.1", "cpu")
        with pytest.raises(UserError, match=r"did not answer within 0.1 s; use a smaller --batch-size"):
            reward.score(PICTURES[:1], PROMPTS[:1])
        assert len(server.bodies) == 6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("http", "give the server's address: http=http://"),
        ("http=ftp://host", "expected an address such as http://host:8000"),
        ("http=http://user:secret@host", "without user, password"),
        ("http=http://host?key=secret", "without user, password, query"),
        ("http=http://host,colour=red", "there is no option 'colour'; known: name, timeout"),
        ("http=http://host,timeout=soon", "timeout: Input should be a valid number"),
        ("http=http://host,timeout", "expected NAME=VALUE"),
        ("http=http://host,name=a:b", "name: String should match"),
    ],
)
def test_a_wrong_address_is_one_line_before_anything_is_asked(spec, message):
    with pytest.raises(UserError, match=f"--reward {spec.partition('?')[0]}.*{message}"):
        parse_reward(spec)


def test_no_server_is_one_line():
    with pytest.raises(UserError, match=r"--reward http: no server answers at http://127.0.0.1:1: .*refused"):
        load_reward("http=http://127.0.0.1:1", "cpu")


def test_the_example_server_gives_the_rewards_own_scores(folders, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    import reward_server

    local = load_reward(f"pickscore={folders['pickscore']}", "cpu")
    monkeypatch.delitem(sys.modules, "reward_server")
    handler = type("Quiet", (reward_server.Handler,), {"reward": local, "log_message": lambda *_: None})
    server = reward_server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    import threading

    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        served = load_reward(f"http=http://127.0.0.1:{server.server_port}", "cpu")
        assert served.fingerprint == local.fingerprint
        np.testing.assert_array_equal(served.score(PICTURES, PROMPTS), local.score(PICTURES, PROMPTS))
        monkeypatch.setattr(local, "score", lambda images, _prompts: np.array([1.0, math.nan] * (len(images) // 2)))
        assert np.isnan(served.score(PICTURES, PROMPTS)).tolist() == [False, True] * 2
        monkeypatch.setattr(local, "score", lambda *_: 1 / 0)
        with pytest.raises(NoAnswerError, match="ZeroDivisionError"):
            served.score(PICTURES, PROMPTS)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
