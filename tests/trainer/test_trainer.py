"""The numbers of a step, through the command line."""

from __future__ import annotations

import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from smpo_schemas.manifest import read_manifest
from smpo_schemas.shards.reader import ShardDirectory
from smpo_trainer.data.order import Order
from smpo_trainer.output.run_folder import REFERENCE_FILE
from tests.tiny.stable_diffusion import make_tiny_model
from tests.trainer.conftest import Train
from tests.trainer.helpers import PlainReference, column, make_shards, metrics

LN2 = math.log(2)


def hand_computed_loss(shards: Path, model: Path, unet: Path, beta: float, gamma: float) -> float:
    """Mean SmPO loss over a shard set, in float64 around plain forwards."""
    policy = PlainReference(model, unet)
    losses = []
    for sample in ShardDirectory(shards).samples():
        prompt = "" if sample.meta.prompt_dropped else sample.meta.prompt
        first, second = sample.meta.scores["taste"]
        p = 1 / (1 + math.exp(second - first))  # scores have minimum 0 and maximum 1
        for k, t in enumerate(sample.timestep_K.tolist()):
            e = [policy.error(sample.x0_2Chw[i], sample.noise_K2Chw[k, i], t, prompt) for i in (0, 1)]
            r = sample.ref_error_K2[k].double().tolist()
            h = -(beta / 2) * ((e[0] - e[1]) - (r[0] - r[1]))
            losses.append(math.log1p(math.exp(-gamma * (2 * p - 1) * h)))
    return float(np.mean(losses))


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("objective", ["smpo", "dpo"])
def test_first_loss_from_the_reference_is_ln_2(
    train: Train, tmp_path: Path, model: Path, v_model: Path, prediction_type: str, objective: str
) -> None:
    base = model if prediction_type == "epsilon" else v_model
    shards = make_shards(tmp_path / "shards", base, num_pairs=4)
    out = train(on=shards, base=base, objective=objective, max_steps=1, batch_size=12)
    first = metrics(out)[0]
    assert first["loss"] == pytest.approx(LN2, abs=1e-4)
    assert first["reference_noise/std"] < 1e-3


@pytest.mark.slow
def test_shards_in_bfloat16_begin_at_ln_2(train: Train, tmp_path: Path, model: Path) -> None:
    shards = make_shards(tmp_path / "shards", model, num_pairs=4, storage=torch.bfloat16)
    first = metrics(train(on=shards, max_steps=1, batch_size=12))[0]
    assert first["loss"] == pytest.approx(LN2, abs=1e-4)
    assert first["reference_noise/std"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("beta", [20, 2000, 50_000])
def test_bf16_begins_at_ln_2(train: Train, beta: float) -> None:
    out = train(dtype="bf16", beta=beta, max_steps=1)
    first = metrics(out)[0]
    assert first["loss"] == pytest.approx(LN2, abs=5e-3)
    assert (abs(first["reference_noise/loss"]) > 5e-3) == (beta > 20)
    assert (out / REFERENCE_FILE).is_file() == (beta > 20)  # kept for a resumed run


@pytest.mark.slow
def test_significant_noise_of_the_stored_reference_is_warned_of(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    # One step of all 18 states, so that its loss is over those that are measured.
    record = metrics(train("stored", dtype="bf16", reference="stored", max_steps=1, batch_size=18))[0]
    assert "WARNING: margins grow" in capsys.readouterr().out
    assert record["loss"] - LN2 == pytest.approx(record["reference_noise/loss"], abs=1e-6)
    train("quiet", dtype="bf16", reference="stored", beta=20, max_steps=1)
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.slow
def test_recomputed_equals_live_while_the_model_moves(train: Train, other_unet: Path) -> None:
    # 18 states, 7 steps of 4: the second epoch starts within a step, with other batches.
    options = {"beta": 200, "lr": 1e-5, "max_steps": 7, "batch_size": 4}
    for unet in (None, other_unet):
        live = train(f"live-{unet is None}", reference="live", unet=unet, **options)
        recomputed = train(f"recomputed-{unet is None}", reference="recomputed", unet=unet, **options)
        np.testing.assert_allclose(column(recomputed, "loss"), column(live, "loss"), atol=1e-5)


@pytest.mark.slow
def test_with_an_adapter_live_disables_it_and_loads_no_second_denoiser(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"lora_rank": 4, "lr": 1e-2, "beta": 20, "max_steps": 6, "val_fraction": 0.3, "val_every": 1}
    recomputed = train("recomputed", reference="recomputed", **options)

    def refuse(_: object) -> None:
        raise AssertionError("a second denoiser was made")

    monkeypatch.setattr("smpo_trainer.model.policy.copy", types.SimpleNamespace(deepcopy=refuse))
    live = train("live", reference="live", gradient_checkpointing=True, **options)
    assert abs(column(live, "error_minus_reference/image_0")[-1]) > 1e-3  # the adapter has changed
    for name in ("loss", "error_minus_reference/image_0", "val/loss"):
        np.testing.assert_allclose(column(live, name), column(recomputed, name), atol=1e-5)


@pytest.mark.slow
def test_first_loss_from_other_weights_is_the_hand_computed_mean(
    train: Train, shards: Path, model: Path, other_unet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(unet=other_unet, max_steps=1, batch_size=6, grad_accum=3, beta=100)
    said = capsys.readouterr().out
    assert f"--unet {other_unet}" in said
    assert "not the reference" in said
    wanted = hand_computed_loss(shards, model, other_unet, beta=100, gamma=10)
    assert abs(wanted - LN2) > 1e-3
    assert column(out, "loss")[0] == pytest.approx(wanted, abs=1e-5)
    assert "reference_noise/std" not in metrics(out)[0]


@pytest.mark.slow
def test_live_and_stored_reference_agree(train: Train, other_unet: Path) -> None:
    for start, options in (("reference", {"lr": 1e-5}), ("elsewhere", {"unet": other_unet})):
        stored = train(f"stored-{start}", beta=100, **options)
        live = train(f"live-{start}", beta=100, reference="live", **options)
        np.testing.assert_allclose(column(stored, "loss"), column(live, "loss"), atol=1e-4)
        np.testing.assert_allclose(column(stored, "grad_norm"), column(live, "grad_norm"), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["smpo", "dpo"])
def test_accumulation_equals_a_large_batch(train: Train, objective: str) -> None:
    # The shards have ties and unlabelled pairs, which dpo leaves out.
    # A small learning rate: Adam's first steps magnify rounding.
    gentle = {"objective": objective, "beta": 200, "lr": 1e-5, "max_steps": 3}
    large = train("large", batch_size=8, **gentle)
    small = train("small", batch_size=1, grad_accum=8, **gentle)
    for name in ("loss", "grad_norm", "rewards/chosen", "rewards/margins"):
        np.testing.assert_allclose(column(small, name), column(large, name), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_loader_workers_change_nothing(train: Train) -> None:
    none = train("none", workers=0)
    for workers in (1, 4):
        some = train(f"{workers}", workers=workers)
        for name in ("loss", "grad_norm"):
            assert column(some, name) == column(none, name)


@pytest.mark.slow
def test_the_environment_of_accelerate_does_not_scale_the_loss(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train("plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert column(train("set", grad_accum=1), "grad_norm") == column(plain, "grad_norm")


@pytest.mark.slow
def test_drift_is_the_mean_absolute_change_of_errors(train: Train, shards: Path, model: Path, other_unet: Path) -> None:
    # A learning rate of 0 keeps the initial weights; the only step has all 18 states.
    out = train(unet=other_unet, max_steps=1, batch_size=18, lr=0)
    plain = PlainReference(model, other_unet)
    moved = []
    for sample in ShardDirectory(shards).samples():
        prompt = "" if sample.meta.prompt_dropped else sample.meta.prompt
        for k, t in enumerate(sample.timestep_K.tolist()):
            for i in (0, 1):
                error = plain.error(sample.x0_2Chw[i], sample.noise_K2Chw[k, i], t, prompt)
                moved.append(error - float(sample.ref_error_K2[k, i]))
    assert min(moved) < 0 < max(moved)
    assert column(out, "drift")[0] == pytest.approx(np.abs(moved).mean(), rel=1e-3)
    assert column(train("start", max_steps=1), "drift")[0] < 1e-5


@pytest.mark.slow
def test_swapping_all_images_changes_nothing(train: Train, tmp_path: Path, model: Path) -> None:
    plain = train("plain", on=make_shards(tmp_path / "a", model), beta=200, lr=1e-5)
    swapped = train("swapped", on=make_shards(tmp_path / "b", model, swapped=True), beta=200, lr=1e-5)
    for name in ("loss", "grad_norm", "rewards/chosen", "rewards/margins"):
        np.testing.assert_allclose(column(swapped, name), column(plain, name), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_even_scores_train_nothing(train: Train, tmp_path: Path, model: Path) -> None:
    out = train(on=make_shards(tmp_path / "even", model, scores=[(0.5, 0.5)]), max_steps=2)
    np.testing.assert_allclose(column(out, "loss"), LN2, rtol=1e-7)
    assert column(out, "grad_norm") == [0, 0]
    assert metrics(out)[0]["rewards/margins"] is None


def test_two_tiny_models_differ(tmp_path: Path) -> None:
    unets = [PlainReference(make_tiny_model(tmp_path / str(seed), seed=seed)).unet for seed in (0, 1)]
    assert not torch.equal(unets[0].conv_in.weight, unets[1].conv_in.weight)


def plain_training(shards: Path, model: Path, steps: int, batch: int, beta: float, lr: float) -> list[torch.Tensor]:
    """The weights after a plain training loop, which shares only the order of states with the trainer."""
    plain = PlainReference(model)
    states = [
        (sample, k, 1 / (1 + math.exp(sample.meta.scores["taste"][1] - sample.meta.scores["taste"][0])))
        for sample in ShardDirectory(shards).samples()
        for k in range(len(sample.timestep_K))
    ]
    plain.unet.requires_grad_(True)
    optimizer = torch.optim.AdamW(plain.unet.parameters(), lr=lr, weight_decay=0.01)
    per_shard = [entry.states for entry in read_manifest(shards).shards]
    order = Order(per_shard, seed=0, window=65536)
    for step in range(steps):
        losses = []
        for position in range(step * batch, (step + 1) * batch):
            sample, k, p = states[order.state_at(position)]
            prompt = "" if sample.meta.prompt_dropped else sample.meta.prompt
            t = int(sample.timestep_K[k])
            errors = [plain.error_with_gradient(sample.x0_2Chw[i], sample.noise_K2Chw[k, i], t, prompt) for i in (0, 1)]
            reference = sample.ref_error_K2[k].double()
            margin = -(beta / 2) * ((errors[0] - errors[1]) - (reference[0] - reference[1]))
            losses.append(-torch.nn.functional.logsigmoid(10 * (2 * p - 1) * margin))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(plain.unet.parameters(), 1.0)
        optimizer.step()
    return [parameter.detach() for parameter in plain.unet.parameters()]


@pytest.mark.slow
def test_weights_equal_those_of_a_plain_loop(train: Train, shards: Path, model: Path) -> None:
    out = train(max_steps=6, batch_size=2, grad_accum=2, beta=200, lr=1e-5)
    ours = [parameter.detach() for parameter in UNet2DConditionModel.from_pretrained(out / "unet").parameters()]
    plain = plain_training(shards, model, steps=6, batch=4, beta=200, lr=1e-5)
    before = [parameter.detach() for parameter in PlainReference(model).unet.parameters()]
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(plain, before, strict=True)))
    apart = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(plain, ours, strict=True)))
    assert apart < 0.02 * moved, (apart, moved)
