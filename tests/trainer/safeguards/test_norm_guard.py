"""The hinge on norms, and both options of the loss through the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from smpo_common.errors import UserError
from smpo_schemas.manifest import write_manifest
from smpo_schemas.shards.reader import ShardDirectory
from smpo_trainer.experiment import resolve_experiment
from smpo_trainer.objectives import find_objective
from smpo_trainer.objectives.pair_loss import PairLoss
from smpo_trainer.objectives.timestep_weighting import TimestepWeighting
from smpo_trainer.safeguards.norm_guard import norm_excess, norm_growth
from tests.trainer.conftest import Train
from tests.trainer.helpers import PlainReference, arguments, metrics, resolve_settings, with_manifest
from tests.trainer.objectives.test_objectives import batch, float64, swap
from tests.trainer.objectives.test_timestep_weighting import schedule


def test_by_hand() -> None:
    norm = torch.tensor([[1.2, 0.5], [0.9, 1.3], [0.8, 0.7]], dtype=torch.float64, requires_grad=True)
    reference = torch.ones(3, 2, dtype=torch.float64)
    excess = norm_excess(norm, reference)
    assert excess.tolist() == pytest.approx([0.1, 0.15, 0], rel=1e-12)
    excess.sum().backward()
    assert norm.grad is not None
    assert norm.grad.tolist() == [[0.5, 0], [0, 0.5], [0, 0]]
    assert norm_growth(norm, 2 * reference).tolist() == pytest.approx([-0.575, -0.45, -0.625], rel=1e-12)


def test_it_is_added_times_half_of_beta_and_does_not_depend_on_the_order_of_images() -> None:
    generator = torch.Generator().manual_seed(1)
    norm, reference = torch.rand(2, 6, 2, generator=generator, dtype=torch.float64).unbind(0)
    kind, weight = find_objective("smpo"), float64(1, 2, 0.5, 1, 1, 1)

    def run(guard: float | None, *, swapped: bool = False) -> torch.Tensor:
        pairs = batch(norm_B2=norm, ref_norm_B2=reference)
        if swapped:
            pairs = type(pairs)(**{**vars(swap(batch())), "norm_B2": norm.flip(1), "ref_norm_B2": reference.flip(1)})
        objective, weighting = kind(kind.Options.parse("smpo", {}, beta=40)), TimestepWeighting("uniform", 5.0, 0.0)
        return PairLoss(objective, schedule("epsilon"), weighting, None, 1.0, norm_guard=guard)(pairs, weight)[0]

    wanted = [
        w * 3 * 20 * sum(max(0.0, float(v - r)) for v, r in zip(n, m, strict=True)) / 2
        for w, n, m in zip(weight.tolist(), norm, reference, strict=True)
    ]
    np.testing.assert_allclose(run(3) - run(None), wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(run(3), run(3, swapped=True), rtol=1e-12, atol=0)


@pytest.mark.slow
def test_a_step_has_the_numbers_of_plain_forwards(train: Train, shards: Path, model: Path, other_unet: Path) -> None:
    """Both options: all 18 states in two micro-batches, the stored norms of the reference, other weights."""
    # With noise of its own each, two images' differences from their targets are nearly orthogonal.
    options = {"unet": other_unet, "max_steps": 1, "lr": 0, "norm_guard": 2}
    out = train(batch_size=9, grad_accum=2, winner_preserving=0.98, **options)
    policy, reference = PlainReference(model, other_unet), PlainReference(model)
    scales, growths, excesses = [], [], []
    for sample in ShardDirectory(shards).samples():
        prompt = "" if sample.meta.prompt_dropped else sample.meta.prompt
        first, second = sample.meta.scores["taste"]
        for k, t in enumerate(sample.timestep_K.tolist()):
            states = [(sample.x0_2Chw[i], sample.noise_K2Chw[k, i], t, prompt) for i in (0, 1)]
            with torch.no_grad():
                outputs = [policy.output_and_target(*state) for state in states]
            residuals = [(output - target).flatten() for output, target in outputs]
            winner, loser = residuals if first > second else residuals[::-1]
            aligned = float(winner @ loser)
            scales.append(min(1.0, 0.02 * float(winner @ winner) / aligned) if aligned > 0 else 1.0)
            norms = [float(output.square().mean().sqrt()) for output, _ in outputs]
            before = [reference.error_and_norm(*state)[1] for state in states]
            growths.append(np.mean([new / old - 1 for new, old in zip(norms, before, strict=True)]))
            excesses.append(np.mean([max(0.0, new - old) for new, old in zip(norms, before, strict=True)]))
    record = metrics(out)[0]
    assert np.mean(scales) < 1
    assert record["winner_preserving/scale"] == pytest.approx(np.mean(scales), rel=1e-4)
    assert record["norm_growth"] == pytest.approx(np.mean(growths), rel=1e-3)
    assert record["norm_guard/excess"] == pytest.approx(np.mean(excesses), rel=1e-3)
    live = metrics(train("live", batch_size=18, reference="live", **options))[0]
    assert live["norm_guard/excess"] == pytest.approx(record["norm_guard/excess"], rel=1e-3)


@pytest.mark.parametrize("objective", ["sft", "mapo"])
@pytest.mark.parametrize("flag", ["winner_preserving", "norm_guard"])
def test_losses_without_a_reference_refuse_them(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, flag: str
) -> None:
    run = arguments(shards, model, tmp_path / "run", objective=objective, **{flag: 0.5})
    name = flag.replace("_", "-")
    with pytest.raises(UserError, match=f"^--{name} 0.5: --objective {objective} does not compare a pair with a ref"):
        resolve_experiment(resolve_settings(monkeypatch, run), print)


@pytest.fixture
def old(shards: Path, tmp_path: Path) -> Path:
    """Shards without norms, by their manifest."""
    folder = with_manifest(shards, tmp_path / "old")
    write_manifest(folder, ShardDirectory(folder).manifest.model_copy(update={"has_ref_norm": False}))
    return folder


def test_norms_are_measured_in_all_states_or_in_none(train: Train, shards: Path, old: Path) -> None:
    """Processes sum their metrics together, so each of them must have the same ones."""
    assert "norm_growth" in metrics(train("new", max_steps=1))[0]
    assert "norm_growth" not in metrics(train("mixed", on=[shards, old], max_steps=1))[0]


def test_shards_without_norms_are_refused_by_name(
    shards: Path, old: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(**options: object) -> None:
        run = arguments([shards, old], model, tmp_path / "run", norm_guard=1, **options)
        resolve_experiment(resolve_settings(monkeypatch, run), print)

    with pytest.raises(UserError, match=f"^--norm-guard 1: --shards {old} have no norms of the reference; make them"):
        resolve()
    resolve(reference="live")


def test_a_quantized_reference_has_no_stored_norms(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(**options: object) -> None:
        run = arguments(shards, model, tmp_path / "run", norm_guard=1, quantize="nf4", lora_rank=2, **options)
        resolve_experiment(resolve_settings(monkeypatch, run), print)

    with pytest.raises(UserError, match="^--norm-guard 1: norms in shards are those of the unquantized model; with"):
        resolve()
    resolve(reference="live")
