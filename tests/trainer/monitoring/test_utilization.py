"""Counted operations against a count by hand, layer by layer; memory; compiling; TF32."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from smpo_models.families.stable_diffusion import StableDiffusion
from smpo_models.family import Conditioning
from smpo_models.loading import load_family
from smpo_models.tuned.lora import add_lora
from smpo_trainer.model.policy import Policy
from smpo_trainer.monitoring import utilization
from smpo_trainer.monitoring.utilization import Utilization, operations
from smpo_trainer.runtime import launch
from tests.tiny.stable_diffusion import LATENT_SHAPE
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, make_settings, metrics, run_cli


def policy_of(model: Path, lora_rank: int | None) -> Policy:
    family = load_family(str(model))
    if lora_rank:
        add_lora(family.denoiser, family.lora_targets, lora_rank)
    else:
        family.denoiser.requires_grad_(True)
    return Policy(family, family.denoiser, None, True, lora_rank)


def by_hand(policy: Policy, conditioning: Conditioning) -> int:
    """Count 2 per multiply-and-add. A backward pass costs the forward of a layer once for its weights, if they are
    trained, and once for its inputs, if an earlier layer is trained."""
    total = 0

    def of_layer(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            per_output = 2 * layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
        else:
            per_output = 2 * layer.in_features
        needed = 1 + layer.weight.requires_grad + inputs[0].requires_grad
        total += output.numel() * per_output * needed

    def of_attention(
        layer: Attention, inputs: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], _: object
    ) -> None:
        """Two products of every query with every key, and each twice in the backward pass."""
        nonlocal total
        queries = inputs[0].shape[1]
        text = kwargs.get("encoder_hidden_states")
        keys = queries if text is None else text.shape[1]
        total += 3 * 2 * 2 * queries * keys * layer.inner_dim

    for layer in policy.denoiser.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(of_layer)
        elif isinstance(layer, Attention):
            layer.register_forward_hook(of_attention, with_kwargs=True)
    policy.family.denoise(policy.denoiser, torch.zeros(1, *LATENT_SHAPE), torch.tensor([5]), conditioning)
    return total


def test_operations_by_hand(model: Path) -> None:
    policy = policy_of(model, None)
    conditioning = policy.family.condition(["a cat"], [(32, 32)], [(0, 0)])
    assert operations(policy, LATENT_SHAPE, conditioning) == by_hand(policy, conditioning)


def test_an_adapter_saves_the_gradients_of_the_frozen_weights(model: Path) -> None:
    full, adapted = policy_of(model, None), policy_of(model, 2)
    conditioning = full.family.condition(["a cat"], [(32, 32)], [(0, 0)])
    whole, part = (operations(policy, LATENT_SHAPE, conditioning) for policy in (full, adapted))
    assert 0.55 * whole < part < 0.8 * whole


def test_counting_draws_no_random_numbers(model: Path) -> None:
    policy = policy_of(model, 2)
    conditioning = policy.family.condition(["a cat"], [(32, 32)], [(0, 0)])
    before = torch.get_rng_state()
    operations(policy, LATENT_SHAPE, conditioning)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_share_of_a_known_peak(model: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(model, None)
    conditioning = policy.family.condition(["a cat"], [(32, 32)], [(0, 0)])
    of_row = operations(policy, LATENT_SHAPE, conditioning)
    monkeypatch.setattr(Utilization, "on_device", classmethod(lambda cls, policy, _: cls(policy, 1e12)))
    out = train(max_steps=3, batch_size=2, grad_accum=3, val_fraction=0.3, val_every=1)
    for record in metrics(out):
        seconds = 6 / record["states_per_second"]
        assert record["mfu_percent"] == pytest.approx(100 * of_row * 12 / (seconds * 1e12), rel=1e-6)


def test_a_denoiser_that_reads_values_is_not_counted(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device it cannot; training continues without the share."""
    denoise = StableDiffusion.denoise

    def reading(self, denoiser, x_BChw, t_B, conditioning):
        x_BChw.sum().item()
        return denoise(self, denoiser, x_BChw, t_B, conditioning)

    monkeypatch.setattr(StableDiffusion, "denoise", reading)
    monkeypatch.setattr(Utilization, "on_device", classmethod(lambda cls, policy, _: cls(policy, 1e12)))
    records = metrics(train(max_steps=2))
    assert len(records) == 2
    assert all("mfu_percent" not in record for record in records)


@pytest.mark.parametrize(
    ("precision", "tf32", "peak"), [("bf16", False, 165.2e12), ("no", True, 82.6e12), ("no", False, 82.6e12)]
)
def test_the_peak_depends_on_the_precision(
    precision: str, tf32: bool, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.backends, "cuda", SimpleNamespace(matmul=SimpleNamespace(allow_tf32=tf32)))
    accelerator = SimpleNamespace(device=torch.device("cuda"), mixed_precision=precision)
    assert Utilization.on_device(None, accelerator)._peak == pytest.approx(peak)


@pytest.mark.parametrize("name", utilization._PEAKS)
def test_peaks_are_dense_ones(name: str) -> None:
    """On every card since Ampere, TF32's rate is half that of half precision: a mix with sparse numbers would show."""
    half, tf32, fp32 = utilization._PEAKS[name]
    assert tf32 == pytest.approx(half / 2, rel=0.02)
    assert fp32 <= tf32


def test_without_a_known_peak_mfu_is_not_logged(train: Train) -> None:
    record = metrics(train(max_steps=1))[0]
    assert "mfu_percent" not in record
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert 0.5 * peak < record["memory_gib"] <= peak


def test_tf32_needs_a_gpu(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "run", tf32=True)) == 2
    assert "--tf32 needs an NVIDIA GPU, the device is cpu" in capsys.readouterr().err


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_off_by_default(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(device=torch.device("cuda"), is_fsdp2=False)
    monkeypatch.setattr(launch, "Accelerator", lambda **_: gpu)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    launch.make_accelerator(make_settings(device="cpu", dtype="fp32", tf32=tf32))
    assert torch.backends.cudnn.allow_tf32 == tf32
    # Matrix products are in float32 by default.
    assert asked == ["high"] * tf32


@pytest.mark.slow
def test_compiling_changes_nothing_but_rounding(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated by torch.compile, without its code generator, which takes minutes."""
    compiled: list[nn.Module] = []
    compile_module = nn.Module.compile

    def trace(self: nn.Module) -> None:
        compiled.append(self)
        compile_module(self, backend="aot_eager")

    plain = train("plain", max_steps=2, lr=1e-5)
    assert not compiled
    monkeypatch.setattr(nn.Module, "compile", trace)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    drawing = {"image_prompts": prompts, "image_sampling_steps": 2}
    out = train("compiled", max_steps=2, lr=1e-5, compile=True, **drawing)
    assert len(compiled) == 1
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(column(out, name), column(plain, name), rtol=1e-4, atol=1e-6)
    assert (out / "unet" / "config.json").is_file()
