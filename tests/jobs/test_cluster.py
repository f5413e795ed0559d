from __future__ import annotations

import errno
import os

import pytest
from ray.exceptions import RayTaskError

from smpo_pipeline.jobs.cluster import _plain_errors, share_gpus
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


def test_storage_that_goes_on_failing_under_a_worker_is_one_line_and_a_bug_is_not():
    failure = OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/pairs/a")
    words = "/pairs/a: Stale file handle, tried 6 times; the same command goes on"
    with pytest.raises(UserError, match=words), _plain_errors():
        raise RayTaskError("map", "", failure).as_instanceof_cause()
    with pytest.raises(RayTaskError), _plain_errors():
        raise RayTaskError("map", "", KeyError("a")).as_instanceof_cause()


@pytest.mark.parametrize("wanted", [{"a": (2, 1.0)}, {"a": (1, 0.6), "b": (1, 0.6)}, {"a": (5, 0.25)}])
def test_what_would_wait_forever_is_refused(wanted):
    with pytest.raises(UserError, match=r"Ray sees 1 GPUs, too few for the actors \(a "):
        share_gpus(wanted, 1)
    if wanted == {"a": (2, 1.0)}:
        with pytest.raises(UserError, match="too few"):
            share_gpus({"a": (1, 0.6), "b": (1, 0.6), "c": (1, 0.6)}, 2)


def test_concurrency_is_of_all_rewards_or_of_one():
    specs = {"a": "a", "b": "b=x"}
    assert _pool_sizes([], specs) == {}
    assert _pool_sizes(["2"], specs) == {"a": 2, "b": 2}
    assert _pool_sizes(["b=3", "2"], specs) == {"a": 2, "b": 3}
    for wrong in ("0", "c=1", "a=", "a=x", "=2"):
        with pytest.raises(UserError, match="a number from 1, or NAME=N"):
            _pool_sizes([wrong], specs)
