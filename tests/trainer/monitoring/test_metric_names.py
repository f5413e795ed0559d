"""The declared metrics are those that runs write."""

from __future__ import annotations

import re
from unittest.mock import patch

import pytest

from smpo_trainer.monitoring.metric_names import METRICS
from smpo_trainer.monitoring.utilization import Utilization
from tests.trainer.conftest import Train
from tests.trainer.helpers import metrics

BAND = re.compile(r"/t\d+-\d+$")


@pytest.mark.slow
def test_a_run_with_everything_writes_exactly_the_declared_metrics(train: Train) -> None:
    with patch.object(Utilization, "on_device", classmethod(lambda cls, policy, _accelerator: cls(policy, peak=1e12))):
        terms = {"budget": 0.1, "robust": 1, "winner_preserving": 0, "norm_guard": 1, "beta_decay": "0:2:0.5"}
        out = train(max_steps=2, **terms, val_fraction=0.3, val_every=1, reference="stored")
    written = {name for record in metrics(out) for name in record}
    plain = {BAND.sub("", name.removeprefix("val/")) for name in written}
    assert plain == set(METRICS) - {"validation_reward", "validation_reward/start"}  # of test_best_checkpoint
    assert any(name.startswith("val/") for name in written)
    assert any(BAND.search(name) for name in written)


@pytest.mark.slow
def test_runs_of_all_kinds_write_no_other_metric(train: Train) -> None:
    for number, options in enumerate(({"objective": "dpo"}, {"objective": "mapo", "ema_decay": 0.9}, {"lora_rank": 2})):
        for record in metrics(train(f"{number}", max_steps=1, **options)):
            assert {BAND.sub("", name) for name in record} <= set(METRICS)
