"""The account of a training step against torch's memory tracker, a real step's tensors, and values by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from smpo_models.loading import load_family
from smpo_models.memory_account.backward import SavedForBackward
from smpo_models.memory_account.live import LiveTensors
from smpo_models.memory_account.quantized import quantized_bytes
from smpo_models.memory_account.training import TrainingRun, account_training, state_bytes
from tests.tiny.flow import make_tiny_flux
from tests.tiny.stable_diffusion import make_tiny_model, make_tiny_unet

PUBLISHED = Path(__file__).parents[3] / "benchmarks/published_configs"


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("memory") / "sd")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"gradient_checkpointing": True, "accumulates": True},
        {"optimizer": "adafactor", "averages": True},
        {"dtype": "fp32"},
        {"lora_rank": 4, "quantize": "nf4"},
        {"lora_rank": 4, "quantize": "int8", "gradient_checkpointing": True},
    ],
    ids=lambda flags: " ".join(map(str, flags.values())) or "full",
)
def test_torchs_tracker_sees_the_same_peak(sd: Path, flags: dict) -> None:
    from benchmarks.capacity.tracked_memory import tracked_step

    family, run = load_family(str(sd), ()), TrainingRun(128, 128, batch_size=2, **flags)
    assert account_training(family, run).total == pytest.approx(tracked_step(family, run), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_torchs_tracker_sees_the_same_peak_of_two_blocks_of_flux(tmp_path: Path, checkpointing: bool) -> None:
    from benchmarks.capacity.tracked_memory import tracked_step

    config = json.loads((PUBLISHED / "flux1-dev/transformer/config.json").read_text())
    config |= {"num_layers": 1, "num_single_layers": 2}
    model = make_tiny_flux(tmp_path / "flux")
    (model / "transformer/config.json").write_text(json.dumps(config))
    (model / "vae/config.json").write_text((PUBLISHED / "flux1-dev/vae/config.json").read_text())
    family = load_family(str(model), ())
    run = TrainingRun(1024, 1024, batch_size=1, lora_rank=16, gradient_checkpointing=checkpointing)
    assert account_training(family, run).total == pytest.approx(tracked_step(family, run), rel=0.1)


@pytest.mark.slow
def test_weights_gradients_and_moments_are_the_published_numbers() -> None:
    memory = account_training(load_family(str(PUBLISHED / "sd15"), ()), TrainingRun(256, 256, batch_size=1))
    weights = 859_520_964  # of SD 1.5's UNet
    assert memory.trained == weights
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * weights, 4 * weights, 8 * weights)
    assert (memory.result, memory.checkpoint) == (4 * weights, 12 * weights)


@pytest.mark.slow
def test_activations_grow_with_the_tokens_and_not_with_their_square(sd: Path) -> None:
    """Attention saves no matrix of all pairs of tokens."""
    family = load_family(str(sd), ())
    small, large = (account_training(family, TrainingRun(side, side, lora_rank=4)).activations for side in (256, 512))
    assert 3.5 < large / small < 4.5  # 16 with such matrices


def test_a_chain_of_layers_saves_what_one_counts_by_hand() -> None:
    layers = nn.Sequential(nn.Linear(8, 32), nn.Sigmoid(), nn.Linear(32, 1))
    saved = SavedForBackward(layers, recomputes=False)
    x_BD = torch.zeros(16, 8)
    with saved.recording():
        loss = layers(x_BD).sum()
    # The input of the first layer, and the sigmoid's output, which the last layer saves, too.
    assert saved.num_bytes == 4 * (16 * 8 + 16 * 32)
    # In the last layer's backward: both, the gradient of its output and of its input, and its weights' and bias'.
    at_last_layer = 4 * (16 * 8 + 16 * 32 + 16 + 16 * 32 + 32 + 1)
    # In the sigmoid's backward: its gradient instead.
    at_sigmoid = 4 * (16 * 8 + 16 * 32 + 2 * 16 * 32 + 32 + 1)
    assert saved.backward_peak(loss, accumulates=False) == max(at_last_layer, at_sigmoid)


def test_the_peak_of_living_tensors_is_counted_by_hand() -> None:
    x = torch.zeros(10)
    with LiveTensors() as live:
        y = x + 1
        z = (y * 2).sum()  # y and its double
        del y
        w = x - z
        w.view(2, 5)
    assert live.peak == 4 * 20 + 4


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_weights_take_what_bitsandbytes_stores(quantization: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    layer = nn.Linear(192, 100, bias=False)
    if quantization == "nf4":
        weight, state = functional.quantize_4bit(layer.weight.data, quant_type="nf4")
        stored = [weight, state.absmax, state.code]
    else:
        stored = functional.int8_vectorwise_quant(layer.weight.data.half())[:2]
    assert quantized_bytes(layer, quantization) == sum(each.numel() * each.element_size() for each in stored)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_optimizers_keep_what_the_account_says(optimizer: str) -> None:
    denoiser = make_tiny_unet()
    trained = list(denoiser.parameters())
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    if optimizer == "adamw":
        real: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=1e-3)
    else:
        real = Adafactor(trained, lr=1e-3, scale_parameter=False, relative_step=False)
    real.step()
    kept = [each for state in real.state.values() for each in state.values() if isinstance(each, torch.Tensor)]
    real_bytes = sum(each.numel() * each.element_size() for each in kept if each.ndim)
    assert sum(state_bytes(optimizer, tuple(parameter.shape)) for parameter in trained) == real_bytes


@pytest.mark.slow
def test_flux_trains_below_4_bit_weights_in_24_gb() -> None:
    run = TrainingRun(1024, 1024, batch_size=1, lora_rank=16, quantize="nf4", gradient_checkpointing=True)
    memory = account_training(load_family(str(PUBLISHED / "flux1-dev"), ()), run)
    # 11.9 billion weights in 4 bits and a scale in 32 for 64 of them.
    assert memory.weights == pytest.approx(11.9e9 * (0.5 + 4 / 64), rel=0.03)
    assert memory.total < 24e9
