from __future__ import annotations

import traceback

import pytest
import torch
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from smpo_pipeline.jobs.cluster import _reason, share_gpus, use_threads
from smpo_pipeline.jobs.score import _pool_sizes
from smpo_schemas.errors import UserError


def test_gpus_are_shared_so_that_no_stage_waits_for_another():
    assert share_gpus({"a": (1, 0.25)}, 1) == {"a": 1.0}
    assert share_gpus({"a": (8, 0.25)}, 8) == {"a": 1.0}
    assert share_gpus({"a": (1, 0.25), "b": (1, 0.25), "c": (1, 0.25)}, 1) == dict.fromkeys("abc", 0.3333)
    assert share_gpus({"a": (4, 0.25), "b": (1, 0.25)}, 4) == dict.fromkeys("ab", 0.5)
    assert share_gpus({"a": (16, 0.25)}, 8) == {"a": 0.5}
    shares = share_gpus({"small": (2, 0.2), "large": (2, 0.6)}, 2)
    assert list(shares.items()) == [("large", 0.75), ("small", 0.25)]
    assert share_gpus({"a": (1, 1.0), "b": (1, 1.0)}, 2) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("wanted", [{"a": (2, 1.0)}, {"a": (1, 0.6), "b": (1, 0.6)}, {"a": (5, 0.25)}])
def test_what_would_wait_forever_is_refused(wanted):
    with pytest.raises(UserError, match=r"Ray sees 1 GPUs, too few for the actors \(a "):
        share_gpus(wanted, 1)
    if wanted == {"a": (2, 1.0)}:
        with pytest.raises(UserError, match="too few"):
            share_gpus({"a": (1, 0.6), "b": (1, 0.6), "c": (1, 0.6)}, 2)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("--reward a: no such file"), "--reward a: no such file"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("one\ntwo"), "ValueError: one two"),
    ],
)
def test_what_a_constructor_raised_is_said(error, said):
    """As Ray hands it over: one text, with the traceback before it."""
    try:
        raise error
    except type(error):
        cause = RayTaskError("A.__init__", traceback.format_exc(), error, proctitle="A", pid=1, ip="127.0.0.1")
    assert _reason(ActorDiedError(cause)) == said
    assert _reason(RayError("first\nsecond")) == "first"


def test_float32_is_float32_in_workers(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    use_threads("cuda", 1)
    assert not torch.backends.cudnn.allow_tf32
    # Of matrix products this is the default.
    assert torch.get_float32_matmul_precision() == "highest"


def test_concurrency_is_of_all_rewards_or_of_one():
    specs = {"a": "a", "b": "b=x"}
    assert _pool_sizes([], specs) == {}
    assert _pool_sizes(["2"], specs) == {"a": 2, "b": 2}
    assert _pool_sizes(["b=3", "2"], specs) == {"a": 2, "b": 3}
    for wrong in ("0", "c=1", "a=", "a=x", "=2"):
        with pytest.raises(UserError, match="a number from 1, or NAME=N"):
            _pool_sizes([wrong], specs)
