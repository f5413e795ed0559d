from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from smpo_schemas.shards.reader import ShardDirectory
from smpo_trainer.monitoring.bands import BANDED, bands, by_band
from tests.trainer.conftest import Train
from tests.trainer.helpers import PlainReference, metrics

BETA = 200


@pytest.mark.parametrize("num", [4, 1000, 1001, 37])
def test_bands_are_every_timestep_once_and_equal(num: int) -> None:
    timesteps = bands(num)
    assert [t for band in timesteps for t in band] == list(range(num))
    assert {len(band) for band in timesteps} <= {num // 4, num // 4 + 1}


def test_values_are_in_their_band_only() -> None:
    t_B = torch.tensor([0, 249, 250, 999])
    values = {name: torch.tensor([1.0, math.nan, 3.0, 4.0]) for name in BANDED}
    banded = by_band(values, t_B, 1000)
    assert len(banded) == 4 * len(BANDED)
    for name in BANDED:
        rows = [banded[f"{name}/t{band}"].tolist() for band in ("0-249", "250-499", "500-749", "750-999")]
        wanted = [
            [1, math.nan, *[math.nan] * 2],
            [math.nan, math.nan, 3, math.nan],
            [math.nan] * 4,
            [*[math.nan] * 3, 4],
        ]
        np.testing.assert_array_equal(rows, wanted)


def test_bands_of_a_step_are_hand_computed_means(train: Train, shards, model, other_unet) -> None:
    out = train(unet=other_unet, beta=BETA, lr=0, max_steps=1, batch_size=6, grad_accum=3)
    plain = PlainReference(model, other_unet)
    states = []
    for sample in ShardDirectory(shards).samples():
        prompt = "" if sample.meta.prompt_dropped else sample.meta.prompt
        first, second = sample.meta.scores["taste"]
        for k, t in enumerate(sample.timestep_K.tolist()):
            e = [plain.error(sample.x0_2Chw[i], sample.noise_K2Chw[k, i], t, prompt) for i in (0, 1)]
            moved = [e[i] - float(sample.ref_error_K2[k, i]) for i in (0, 1)]
            states.append((t, moved, 0 if first > second else 1))
    record = metrics(out)[0]
    for start in (0, 250, 500, 750):
        inside = [(moved, w) for t, moved, w in states if start <= t < start + 250]
        band = f"t{start}-{start + 249}"
        assert inside  # of the shards that are tested with
        for i in (0, 1):
            wanted = np.mean([moved[i] for moved, _ in inside])
            assert record[f"error_minus_reference/image_{i}/{band}"] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
        margins = [-(BETA / 2) * (moved[w] - moved[1 - w]) for moved, w in inside]
        assert record[f"rewards/margins/{band}"] == pytest.approx(np.mean(margins), rel=1e-3, abs=1e-4)
        assert record[f"rewards/accuracies/{band}"] == pytest.approx(np.mean([margin > 0 for margin in margins]))
    for name, image in (("chosen", 0), ("rejected", 1)):
        wanted = np.mean([moved[w if image == 0 else 1 - w] for _, moved, w in states])
        assert record[f"error_minus_reference/{name}"] == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_a_band_without_states_has_no_value(train: Train) -> None:
    record = metrics(train(min_timestep=500, max_steps=1))[0]
    assert record["rewards/margins/t0-249"] is None
    assert record["rewards/margins/t750-999"] is not None
