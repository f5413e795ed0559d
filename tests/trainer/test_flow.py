"""Training models with a transformer on shards that the inverter made, to what stock diffusers loads."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch.utils import checkpoint as torch_checkpoint

from smpo_models.draws import gaussian, named_stream
from smpo_models.loading import load_family
from smpo_pipeline.evaluation.model_sources import parse_models
from smpo_pipeline.generation.generator import load_generator
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.trained_model import LORA_FILE
from smpo_trainer import run as run_module
from smpo_trainer.model import policy as policy_module
from smpo_trainer.model.policy import Policy
from tests.models.stock import load_stock
from tests.tiny.families import FAMILIES
from tests.tiny.flow import make_tiny_flux
from tests.tiny.stable_diffusion import IMAGE_SIDE, LATENT_SHAPE
from tests.trainer.conftest import Train
from tests.trainer.helpers import column, invert_tiny, with_stored_text

PROMPTS = ("a cat", "a dog and " * 40)
"""The second has more tokens than schnell's T5 reads."""

BETA = 2000
"""Given, since for some of the families none is published."""

WITHOUT_LORA = "pixart-sigma"


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return invert_tiny(model, tmp_path_factory.mktemp("shards") / "flow")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"objective": "smpo"}, {"objective": "dpo", "lora_rank": 2}], ids=["full", "lora"])
def test_the_first_loss_is_ln_2_and_the_pipeline_loads_the_result(
    train: Train, model: Path, shards: Path, options: dict[str, object]
) -> None:
    """The stored reference errors are what the trainer's own forward finds; emptied prompts are among them."""
    if model.name == WITHOUT_LORA and "lora_rank" in options:
        pytest.skip("diffusers has no LoRA for it")
    out = train(on=shards, base=model, max_steps=3, batch_size=4, lr=1e-3, save_every=3, beta=BETA, **options)
    assert column(out, "loss")[0] == pytest.approx(math.log(2), abs=2e-4)
    assert column(out, "loss")[-1] != column(out, "loss")[0]
    pipeline = DiffusionPipeline.from_pretrained(model)
    before = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    if "lora_rank" in options:
        pipeline.load_lora_weights(str(out))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    else:
        pipeline.transformer = type(pipeline.transformer).from_pretrained(out / "transformer")
    after = pipeline.transformer.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith(".to_q.weight") for name in moved)
    for source in (out, out / "checkpoint-000003"):
        tuned = load_generator(*parse_models([f"tuned={source}"]), str(model), "cpu", "fp32")
        assert all(torch.equal(after[name], weight) for name, weight in tuned.denoiser.state_dict().items())
    if "lora_rank" in options:
        targets = load_family(str(model), ()).lora_targets
        assert all(any(f".{target}." in name for target in targets) for name in moved)


@pytest.mark.parametrize("model", [WITHOUT_LORA], indirect=True, scope="module")
def test_an_adapter_that_diffusers_does_not_have_is_one_line(
    train: Train, model: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        train(on=shards, base=model, max_steps=1, beta=BETA, lora_rank=2)
    error = capsys.readouterr().err
    assert f"--lora-rank 2: diffusers has no LoRA for the denoiser of --model {model} (pixart-sigma)" in error


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen-image", "pixart-sigma", "z-image", "sana"], indirect=True, scope="module")
def test_stored_texts_of_different_lengths_train_as_the_text_encoders_do(
    train: Train, model: Path, shards: Path, tmp_path: Path
) -> None:
    common = {"base": model, "max_steps": 2, "batch_size": 4, "beta": BETA}
    live = train("live", on=shards, **common)
    stored = train("stored", on=with_stored_text(shards, model, tmp_path / "shards"), **common)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(column(stored, name), column(live, name), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "source"), [("sd35", "renoise"), ("flux1-dev", "forward")], indirect=["model"])
def test_one_set_of_shards_trains_every_objective(train: Train, model: Path, tmp_path: Path, source) -> None:
    """A step of all states at the reference: ln 2, or for losses without a sigmoid what the stored errors give."""
    shards = invert_tiny(model, tmp_path / "shards", source=source)
    states = [
        sample.ref_error_K2[k, 0 if sample.meta.label == 1 else 1].item()
        for sample in ShardDirectory(shards).samples()
        for k in range(len(sample.timestep_K))
    ]
    expected = {"smpo": math.log(2), "dpo": math.log(2), "ipo": 1 / 4, "sft": sum(states) / len(states)}
    for objective, loss in expected.items():
        out = train(objective, on=shards, base=model, objective=objective, max_steps=1, batch_size=len(states))
        assert column(out, "loss")[0] == pytest.approx(loss, abs=3e-4), objective


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.mark.slow
def test_validation_images_are_those_of_the_stock_pipeline(
    train: Train, model: Path, shards: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"image_prompts": prompts, "image_sampling_steps": 2}
    out = train(on=shards, base=model, max_steps=1, batch_size=4, beta=BETA, **options)
    assert sorted(path.name for path in (out / "validation").iterdir()) == ["step-000000.png", "step-000001.png"]
    guidance = load_family(str(model), ()).usual_guidance
    assert guidance is not None
    sampler = "DPMSolverMultistepScheduler" if model.name in ("pixart-sigma", "sana") else "Euler"
    assert f"2 prompts, 2 {sampler} steps, guidance scale {guidance:g}" in capsys.readouterr().out
    grid = np.asarray(Image.open(out / "validation" / "step-000000.png"), dtype=float)
    for number, image in enumerate(by_a_stock_pipeline(model, guidance)):
        ours = grid[:, IMAGE_SIDE * number : IMAGE_SIDE * (number + 1)]
        assert np.abs(ours - 255 * image).max() <= 1.5


def by_a_stock_pipeline(model: Path, guidance: float) -> list[np.ndarray]:
    stock, images = load_stock(model, own_scheduler=True), []
    stock.shape = (IMAGE_SIDE, IMAGE_SIDE)
    for number, prompt in enumerate(PROMPTS):
        noise = gaussian(named_stream(f"validation\n0\n{number}"), LATENT_SHAPE)[None]
        images.append(stock.run([prompt], noise, guidance, 2, "np")[0])
    return images


@pytest.mark.slow
@pytest.mark.parametrize("model", ["flux1-dev"], indirect=True, scope="module")
def test_schnells_images_read_texts_as_in_training_and_take_no_guidance(
    train: Train, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny_flux(tmp_path / "model", guided=False)
    shards = invert_tiny(model, tmp_path / "shards")
    options = {"max_steps": 1, "batch_size": 4, "image_prompts": prompts}
    out = train(on=shards, base=model, **options, image_sampling_steps=2)
    grid = np.asarray(Image.open(out / "validation" / "step-000000.png"), dtype=float)
    for number, image in enumerate(by_a_stock_pipeline(model, 0.0)):
        ours = grid[:, IMAGE_SIDE * number : IMAGE_SIDE * (number + 1)]
        assert np.abs(ours - 255 * image).max() <= 1.5
    capsys.readouterr()
    with pytest.raises(AssertionError):
        train("refused", on=shards, base=model, **options, image_guidance_scale=3.5)
    assert "--image-guidance-scale 3.5" in capsys.readouterr().err
    assert not (tmp_path / "refused" / "config.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["flux1-dev"], indirect=True, scope="module")
def test_the_model_is_told_the_guidance_of_the_shards(train: Train, tmp_path: Path) -> None:
    model = make_tiny_flux(tmp_path / "model")
    losses = {}
    # Of two manifests for the same states, the second one is false.
    for name, told in (("true", 3.5), ("false", None)):
        shards = invert_tiny(model, tmp_path / name, guidance=3.5, recorded=told)
        out = train(f"run-{name}", on=shards, base=model, max_steps=1, batch_size=4, reference="stored")
        losses[name] = column(out, "loss")[0]
    assert losses["true"] == pytest.approx(math.log(2), abs=2e-4)
    assert abs(losses["false"] - math.log(2)) > 2e-3


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("model", ["qwen-image"], indirect=True, scope="module")
def test_idle_layers_are_not_trained(train: Train, model: Path, shards: Path, options: dict[str, object]) -> None:
    """Data-parallel training would wait for their gradients."""
    out = train(on=shards, base=model, max_steps=1, batch_size=4, beta=BETA, save_every=1, lr=1e-3, **options)
    before = DiffusionPipeline.from_pretrained(model).transformer.state_dict()
    file = LORA_FILE if options else "transformer/diffusion_pytorch_model.safetensors"
    trained = load_file(out / file)
    idle = [name for name in trained if ".1.txt_mlp." in name or ".1.attn.to_add_out." in name]
    assert len(idle) == (0 if options else 6)
    assert all(torch.equal(trained[name], before[name]) for name in idle)
    assert any(".0.attn.to_add_out." in name for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"), [("flux1-dev", {"lora_rank": 2}), ("sd35", {"reference": "live"})], indirect=["model"]
)
def test_frozen_weights_are_kept_narrow_without_changing_a_bit(
    train: Train, model: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    """The reference errors are measured in the same arithmetic, so that the first margins are 0 up to rounding."""
    policies: list[Policy] = []

    def load(*given: object, **named: object) -> Policy:
        policies.append(policy_module.load_policy(*given, **named))
        return policies[-1]

    monkeypatch.setattr(run_module, "load_policy", load)
    common = {"on": shards, "base": model, "max_steps": 3, "batch_size": 4, "dtype": "bf16", "lr": 1e-3, **options}
    narrow = train("narrow", **common)
    with monkeypatch.context() as patch:
        patch.setattr(policy_module, "narrow_products", lambda *_: None)
        whole = train("whole", **common)
    for name in ("loss", "grad_norm", "drift"):
        assert column(narrow, name) == column(whole, name)
    file = LORA_FILE if "lora_rank" in options else "transformer/diffusion_pytorch_model.safetensors"
    tensors, expected = load_file(narrow / file), load_file(whole / file)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    frozen, unchanged = (policy.denoiser if "lora_rank" in options else policy.reference for policy in policies)
    trained = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    dtypes = {name: parameter.dtype for name, parameter in frozen.named_parameters()}
    assert {dtypes[name] for name in trained} <= {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name.endswith(("to_k.weight", "to_k.base_layer.weight"))} == {
        torch.bfloat16
    }
    assert {parameter.dtype for parameter in unchanged.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "options"), [("sd35", {}), ("flux1-dev", {"lora_rank": 2})], indirect=["model"])
def test_gradient_checkpointing_changes_nothing_but_memory(
    train: Train, model: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    calls, compute = [], torch_checkpoint.checkpoint
    monkeypatch.setattr(torch_checkpoint, "checkpoint", lambda *a, **k: (calls.append(1), compute(*a, **k))[1])
    common = {"on": shards, "base": model, "max_steps": 3, "batch_size": 4, "lr": 1e-3, "beta": BETA, **options}
    stored = train("stored", **common)
    assert not calls
    recomputed = train("recomputed", gradient_checkpointing=True, **common)
    assert len(calls) == 3 * 2  # two blocks
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(column(recomputed, name), column(stored, name), rtol=1e-5)
