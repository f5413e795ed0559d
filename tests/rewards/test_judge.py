"""The judge against a vision model in this process that is late, fails, and answers nonsense."""

from __future__ import annotations

import json
import re
import threading

import numpy as np
import pytest
import tenacity

from smpo_common import retry
from smpo_common.errors import UserError
from smpo_pipeline.rewards import checked_scores, load_reward, parse_reward
from smpo_pipeline.served.unified_reward import UnreadableAnswerError, read_comparison, read_ratings
from smpo_pipeline.served.vision_model import KEY_VARIABLE
from tests.servers.json_server import late
from tests.servers.vision_server import completion, content, grey, rate, vision_server

IMAGES = [grey(level) for level in (0, 51, 102, 255)]
BRIGHTNESS = np.array([0.0, 0.2, 0.4, 1.0])
PROMPTS = ["a cat", "a {prompt} {} of braces", "Größe 東京", ""]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(retry.TRANSIENT_RETRY, "wait", tenacity.wait_none())


@pytest.fixture
def judge(tmp_path):
    """Load the judge of a server, with options."""
    return lambda server, **options: load_reward(
        ",".join([f"judge={server.url}", f"cache={tmp_path}/kept", *(f"{k}={v}" for k, v in options.items())]), "cpu"
    )


def test_the_score_is_the_mean_of_the_ratings_or_one_of_them(judge):
    with vision_server(rate) as server:
        reward = judge(server)
        assert (reward.name, reward.model, reward.needs.remote) == ("judge", "tiny", True)
        np.testing.assert_allclose(reward.score(IMAGES, PROMPTS), 1 + 3 * BRIGHTNESS, atol=2e-4)
        for axis, slope in {"alignment": 2, "coherence": 3, "style": 4}.items():
            one = judge(server, axis=axis, name=axis)
            assert one.name == axis
            np.testing.assert_allclose(one.score(IMAGES, PROMPTS), 1 + slope * BRIGHTNESS, atol=2e-4)
            assert one.fingerprint != reward.fingerprint
    # The rewards for single ratings have asked nothing: the answers were there.
    assert len(server.bodies) == len(IMAGES)


def test_what_is_sent(judge):
    with vision_server(rate, "tiny", "other") as server:
        judge(server, model="other").score(IMAGES[:2], PROMPTS[:2])
    assert sorted(content(body)[1][0] for body in server.bodies) == pytest.approx([0.0, 0.2], abs=0.01)
    for body in server.bodies:
        assert (body["model"], body["temperature"]) == ("other", 0)
    texts = {content(body)[0].rpartition("\n")[2] for body in server.bodies}
    assert texts == {"Text Caption: [a cat]", "Text Caption: [a {prompt} {} of braces]"}
    assert "Authorization" not in server.headers[0]


def test_answers_are_kept_by_image_prompt_and_model(judge, tmp_path):
    with vision_server(rate, "one", "two") as server:
        for asked, (model, images, prompts) in enumerate(
            [
                ("one", IMAGES[:1], ["a"]),
                ("one", IMAGES[:1], ["b"]),
                ("one", IMAGES[1:2], ["a"]),
                ("two", IMAGES[:1], ["a"]),
            ]
        ):
            for _ in range(2):
                reward = judge(server, model=model)
                first = reward.score(images, prompts)
                assert len(server.bodies) == asked + 1
                np.testing.assert_array_equal(reward.score(images, prompts), first)
    files = list((tmp_path / "kept").rglob("*.json"))
    assert len(files) == 4
    assert {json.loads(file.read_text())["root"] for file in files} == {"owner/one", "owner/two"}


@pytest.mark.parametrize("failure", [(503, {}), (500, {}), (429, {}), (0, None), "late"])
def test_failures_that_pass_are_retried_and_counted(judge, failure):
    lock, failed = threading.Lock(), set()

    def flaky(body):
        with lock:
            first = content(body)[0] not in failed
            failed.add(content(body)[0])
        if first:
            return late(rate(body), 0.6) if failure == "late" else failure
        return rate(body)

    with vision_server(flaky) as server:
        reward = judge(server, timeout=0.3)
        np.testing.assert_allclose(reward.score(IMAGES, PROMPTS), 1 + 3 * BRIGHTNESS, atol=2e-4)
        assert reward._model.requests == len(server.bodies) == 2 * len(IMAGES)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (completion("I like it."), "answer not readable: no alignment score from 1 to 5 in 'I like it.'"),
        (completion("Alignment Score (1-5): 3\nCoherence Score (1-5): 6\nStyle Score (1-5): 2"), "no coherence score"),
        (completion("Alignment Score (1-5): 3\nCoherence Score (1-5): 4"), "no style score"),
        (completion(None), "no answer: the answer has no text"),
        (completion("  "), "no answer: the answer has no text"),
        ((200, {"choices": []}), "no answer: the answer has no text"),
        ((200, ["text"]), "no answer: the answer has no text"),
        ((200, b"<html>"), "no answer: http.*answered 200: <html>, which is not JSON"),
        ((400, {"message": "too long"}), 'no answer: http.*answered 400: {"message": "too long"}'),
        ((500, {}), "no answer: http.*answered 500"),
        ("late", "no answer: http.*did not answer within 0.3 s"),
    ],
)
def test_an_image_without_a_readable_answer_has_a_reason_and_the_others_a_score(judge, answer, reason):
    def partly(body):
        if "東京" not in content(body)[0]:
            return rate(body)
        return late(rate(body), 0.6) if answer == "late" else answer

    with vision_server(partly) as server:
        scored = checked_scores(judge(server, timeout=0.3), IMAGES, PROMPTS)
    assert np.isnan(scored.values).tolist() == [False, False, True, False]
    assert scored.reasons.keys() == {2}
    assert re.search(reason, scored.reasons[2]), scored.reasons[2]


def test_requests_overlap_up_to_the_limit(judge):
    """Each waits until three are there."""
    three = threading.Barrier(3, timeout=20)

    def together(body):
        three.wait()
        return rate(body)

    with vision_server(together) as server:
        judge(server, concurrency=3).score([grey(level) for level in range(0, 90, 10)], ["a"] * 9)
    assert (len(server.bodies), server.most_at_once) == (9, 3)


def test_a_budget_ends_the_command_and_the_next_one_continues(judge, tmp_path):
    with vision_server(rate) as server:
        with pytest.raises(
            UserError, match=f"budget of 3 requests is used up; the answers are kept in {tmp_path}/kept"
        ):
            judge(server, budget=3, concurrency=1).score(IMAGES, PROMPTS)
        assert len(server.bodies) == 3
        scores = judge(server, budget=3).score(IMAGES, PROMPTS)
        np.testing.assert_allclose(scores, 1 + 3 * BRIGHTNESS, atol=2e-4)
        assert len(server.bodies) == 4


def test_a_key_is_sent_to_the_server_alone(judge, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    with vision_server(lambda _body: (307, {})) as server:
        with pytest.raises(UserError, match="answered 307"):
            judge(server).score(IMAGES[:1], PROMPTS[:1])
        assert server.headers[0]["Authorization"] == "Bearer secret"
        server.on_get = lambda _path: (401, {"error": "bad key"})
        with pytest.raises(UserError, match='--reward judge: .*answered 401: {"error": "bad key"}'):
            judge(server)


def test_the_model_is_found_or_named(judge):
    with vision_server(rate, "one", "two") as server:
        with pytest.raises(UserError, match="name a model by the option model=ID; the server lists: one, two"):
            judge(server)
        with pytest.raises(UserError, match="there is no model 'three'; the server lists: one, two"):
            judge(server, model="three")
        assert judge(server, model="two").model == "two"
        server.on_get = lambda _path: (404, {})
        assert judge(server, model="unlisted").model == "unlisted"
        with pytest.raises(UserError, match="name a model by the option model=ID; the server lists: none"):
            judge(server)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("axis=beauty", "axis: Input should be 'mean', 'alignment'"),
        ("concurrency=0", "concurrency: Input should be greater"),
        ("budget=-1", "budget: Input should be greater"),
        ("cache=here", "cache: .*absolute path"),
        (
            "temperature=1",
            "there is no option 'temperature'; known: axis, budget, cache, concurrency, model, name, timeout",
        ),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(UserError, match=f"--reward judge=http://host,{options}: {message}"):
        parse_reward(f"judge=http://host,{options}")


def test_a_server_that_goes_away_is_one_line(judge):
    with vision_server(rate) as server:
        reward = judge(server)
    with pytest.raises(UserError, match="--reward judge: no answer from http://127.0.0.1"):
        reward.score(IMAGES, PROMPTS)


def test_ratings_are_read_from_what_models_write():
    text = (
        "<think>Alignment Score: 1</think>**Alignment Score (1-5):** 3.5/5\ncoherence score (1-5) : 2\nStyle Score: 5"
    )
    assert read_ratings(text) == {"alignment": 3.5, "coherence": 2.0, "style": 5.0}


def test_shares_are_read_from_what_models_write():
    text = (
        "Alignment Score:\n Image 1: 0.4357\n Image 2: 0.5643\n\n**Coherence Score:**\nImage 1: 1\nImage 2: 0\n\n"
        "Style Score:\n Image 1: 0.5\n Image 2: 0.49"
    )
    assert read_comparison(text) == pytest.approx({"alignment": 0.4357, "coherence": 1.0, "style": 0.5 / 0.99})
    for first, second in ((0.5, 0.4), (-0.5, 1.5), (1.5, -0.5)):
        with pytest.raises(UnreadableAnswerError, match="no two style scores that sum to 1"):
            read_comparison(text.replace("0.5\n Image 2: 0.49", f"{first}\n Image 2: {second}"))
    with pytest.raises(UnreadableAnswerError, match="no two alignment scores"):
        read_comparison("Image 1 is better.")
