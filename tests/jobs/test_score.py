from __future__ import annotations

from smpo_pipeline.jobs.score.job import ScoreOptions, choices


def test_what_nobody_asked_for_is_said(tmp_path):
    """The batch sizes are the rewards' own unless the flag says another."""
    common = {
        "pairs": [tmp_path], "out": tmp_path, "reward": [], "columns": {}, "device": "cpu", "dtype": "fp16",
        "concurrency": [], "ray_address": None, "limit": None, "max_reject_rate": 1.0, "overwrite": False,
    }  # fmt: skip
    specs = {"pickscore": "pickscore", "toy-truth": "toy-truth"}
    line = choices(ScoreOptions(batch_size=None, **common), specs, 77)
    for part in ("77 pairs", "cpu", "fp16", "pickscore 32", "toy-truth"):
        assert part in line
    assert "pickscore 5, toy-truth 5" in choices(ScoreOptions(batch_size=5, **common), specs, 77)
