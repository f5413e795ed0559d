from __future__ import annotations

from smpo_pipeline.jobs.score.job import choices
from smpo_pipeline.jobs.score.options import ScoreOptions


def test_the_job_prints_its_default_settings(tmp_path):
    """Batch sizes are the rewards' own unless the flag sets one."""
    running = {"device": "cpu", "dtype": "fp16"}
    options = ScoreOptions(pairs=[tmp_path], out=tmp_path, reward=[], running=running)
    specs = {"pickscore": "pickscore", "toy-truth": "toy-truth"}
    line = choices(options, specs, 77)
    for part in ("77 pairs", "cpu", "fp16", "pickscore 32", "toy-truth"):
        assert part in line
    assert "pickscore 5, toy-truth 5" in choices(options.replace(batch_size=5), specs, 77)
