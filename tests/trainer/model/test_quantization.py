"""``--quantize``: real 4 and 8 bit weights, on the CPU, against diffusers' own loading and plain arithmetic."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from smpo_common.errors import UserError
from smpo_models.arithmetic import narrow_products
from smpo_models.loading import load_family
from smpo_models.tuned.lora import add_lora
from smpo_models.weights import DTYPES
from smpo_pipeline.evaluation.model_sources import parse_models
from smpo_pipeline.generation.generator import load_generator
from smpo_schemas.trained_model import LORA_FILE
from smpo_trainer.model import policy as policy_module
from smpo_trainer.model.fsdp import fsdp_plugin
from smpo_trainer.model.quantization import _config, quantize
from smpo_trainer.output.checkpoints import Checkpoints
from tests.tiny.flow import make_tiny_flux, make_tiny_sd3
from tests.tiny.qwen import make_tiny_qwen_image
from tests.tiny.stable_diffusion import make_tiny_model, make_tiny_xl
from tests.tiny.transformers import make_tiny_z_image
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, dying_after, invert_tiny, make_settings, run_cli

MODELS = {
    "sd15": make_tiny_model,
    "sdxl": make_tiny_xl,
    "sd35": make_tiny_sd3,
    "flux1-dev": make_tiny_flux,
    "qwen": make_tiny_qwen_image,
    "z-image": make_tiny_z_image,
}

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution: https://arxiv.org/abs/2305.14314, appendix E."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp("models") / name) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def base(folders: dict[str, Path]) -> Path:
    return folders["sd35"]


@pytest.fixture(scope="module")
def flow_shards(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return invert_tiny(base, tmp_path_factory.mktemp("shards") / "flow")


def plain_nf4(weight: torch.Tensor) -> torch.Tensor:
    """The nearest of the 16 values, times the largest of each 64 weights in a row."""
    blocks = nn.functional.pad(weight.double().flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    code = torch.tensor(NF4, dtype=torch.float64)
    nearest = ((blocks / largest)[..., None] - code).abs().argmin(-1)
    return (code[nearest] * largest).flatten()[: weight.numel()].view_as(weight)


def plain_int8(weight: torch.Tensor) -> torch.Tensor:
    """A whole number of 127ths of each row's largest weight."""
    largest = weight.half().double().abs().amax(1, keepdim=True)
    return (weight.half().double() / largest * 127).round() / 127 * largest


def make_denoiser(name: str) -> nn.Module:
    """A random denoiser whose layers have a multiple of 64 inputs.

    Of other multiples of 16, bitsandbytes 0.50.2 reads 4 bit weights back wrongly on CPUs.
    """
    torch.manual_seed(0)
    if name == "unet":
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(64, 64), layers_per_block=1, cross_attention_dim=64, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    return SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=64, pooled_projection_dim=64, pos_embed_max_size=16,
    )  # fmt: skip


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    """Random inputs of its forward."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    text = {"encoder_hidden_states": normal(2, 5, 64)}
    if name == "unet":
        return {"sample": normal(2, 4, 8, 8), "timestep": torch.tensor([500, 30]), **text}
    added = {"timestep": torch.tensor([500.0, 30.0]), "pooled_projections": normal(2, 64)}
    return {"hidden_states": normal(2, 4, 8, 8), **added, **text}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [*((name, "bf16") for name in MODELS), ("sd35", "fp32")])
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_weights_are_those_of_diffusers_own_loading(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, method: str, dtype: str
) -> None:
    """``from_pretrained`` with a ``BitsAndBytesConfig``, which refuses CPUs although bitsandbytes computes there."""
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda *_: {"": "cpu"})
    family = load_family(str(folders[name]), ("denoiser",))
    ours, kind = family.denoiser, type(family.denoiser)
    linear = sum(module.weight.numel() for module in ours.modules() if isinstance(module, nn.Linear))
    assert quantize(ours, method, DTYPES[dtype], torch.device("cpu")) == linear
    narrow_products(ours, DTYPES[dtype])
    source = folders[name] / family.denoiser_folder
    stock = kind.from_pretrained(
        source, quantization_config=_config(method, DTYPES[dtype]), torch_dtype=DTYPES[dtype]
    ).state_dict()
    assert set(ours.state_dict()) == set(stock)
    narrow = {
        f"{name}.{each}"
        for name, module in ours.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        for each, _ in module.named_parameters()
    }
    for key, tensor in ours.state_dict().items():
        # Norms keep float32 here, as in every training.
        exact = key in narrow or dtype == "fp32"
        tolerance = 0 if exact else 1e-2
        theirs = stock[key] if exact else stock[key].to(tensor.dtype)
        torch.testing.assert_close(tensor, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["unet", "transformer"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_outputs_and_gradients_of_nf4_are_those_of_the_rounded_weights(name: str, gradient_checkpointing: bool) -> None:
    """Against the stock class in float64 with weights that were rounded by hand, below the same adapter."""
    ours, plain = (make_denoiser(name).requires_grad_(False).eval() for _ in range(2))
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(plain_nf4(module.weight))
    quantize(ours, "nf4", torch.float32, torch.device("cpu"))
    for denoiser in (ours, plain):
        add_lora(denoiser, ("to_q", "to_k", "to_out.0"), 2)
        for key, parameter in denoiser.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key))) / 4
    plain.double()
    if gradient_checkpointing:
        ours.enable_gradient_checkpointing()
    given = inputs_of(name)
    # As a pass over the reference does it first, without gradients.
    with torch.no_grad():
        first = ours(**given).sample
    output = ours(**given).sample
    expected = plain(**{key: value.double() if value.is_floating_point() else value for key, value in given.items()})
    torch.testing.assert_close(output.double(), expected.sample, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first, output)
    output.square().mean().backward()
    expected.sample.square().mean().backward()
    for key, parameter in plain.named_parameters():
        if parameter.requires_grad:
            theirs = ours.get_parameter(key).grad
            torch.testing.assert_close(theirs.double(), parameter.grad, rtol=1e-2, atol=1e-5)
    assert set(get_peft_model_state_dict(ours)) == set(get_peft_model_state_dict(plain))


def test_int8_weights_are_127ths_of_their_row(base: Path) -> None:
    denoiser = load_family(str(base), ("denoiser",)).denoiser
    expected = {
        name: plain_int8(module.weight) for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)
    }
    quantize(denoiser, "int8", torch.float32, torch.device("cpu"))
    for name, weight in expected.items():
        module = denoiser.get_submodule(name)
        ours = module.weight.data.double() * module.weight.SCB.double()[:, None] / 127
        assert ((ours - weight).abs() > 1e-6).float().mean() < 0.01  # ties
        torch.testing.assert_close(ours, weight, rtol=0, atol=float(weight.abs().max()) / 100)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dtype"), [("nf4", "bf16"), ("int8", "fp32")])
def test_a_run_starts_at_the_quantized_reference_and_saves_an_adapter(
    train: Train, base: Path, flow_shards: Path, capsys: pytest.CaptureFixture[str], method: str, dtype: str
) -> None:
    options = {"on": flow_shards, "base": base, "lora_rank": 2, "quantize": method, "lr": 1e-2, "batch_size": 4}
    out = train("run", **options, max_steps=3, dtype=dtype, gradient_checkpointing=True, lora_format="comfyui")
    said = capsys.readouterr().out
    assert f"0.1 million weights below the adapter are in {method}" in said
    assert f"--quantize {method}: the reference errors are those of the quantized weights" in said
    assert (out / "reference.safetensors").is_file()
    assert column(out, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert column(out, "loss")[2] != pytest.approx(math.log(2), abs=1e-5)
    # The stored errors are of other weights.
    stored = train("stored", **options, max_steps=1, dtype=dtype, reference="stored")
    assert abs(column(stored, "loss")[0] - math.log(2)) > 1e-5
    assert column(stored, "reference_noise/std")[0] > 1e-3
    # The adapter of another reference in memory is disabled: the quantized weights once more.
    live = train("live", **options, max_steps=3, dtype=dtype, reference="live")
    np.testing.assert_allclose(column(live, "loss"), column(out, "loss"), rtol=1e-4)
    # evaluate adds it to the unquantized model.
    tensors = load_file(out / LORA_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    weights = DiffusionPipeline.from_pretrained(base).transformer.state_dict()
    tuned = load_generator(*parse_models([f"tuned={out}"]), str(base), "cpu", "fp32").denoiser.state_dict()
    for key, down in tensors.items():
        if ".lora_A." in key:
            name = key.removeprefix("transformer.").replace(".lora_A.", ".")
            expected = weights[name] + tensors[key.replace(".lora_A.", ".lora_B.")] @ down
            torch.testing.assert_close(tuned[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_stopped_run_ends_at_the_same_bits(
    train: Train, base: Path, flow_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"lora_rank": 2, "quantize": "nf4", "max_steps": 4, "save_every": 1, "lr": 1e-2}
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dying_after(2))
        assert run_cli(patch, arguments(flow_shards, base, tmp_path / "cut", **options)) == 2
    cut, whole = (train(name, on=flow_shards, base=base, **options) for name in ("cut", "whole"))
    assert column(cut, "loss") == column(whole, "loss")
    assert (cut / LORA_FILE).read_bytes() == (whole / LORA_FILE).read_bytes()


def test_an_unet_is_quantized_too(train: Train, model: Path) -> None:
    out = train(lora_rank=2, quantize="nf4", lr=1e-2, max_steps=2)
    assert column(out, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert column(out, "loss")[1] != pytest.approx(math.log(2), abs=1e-4)
    DiffusionPipeline.from_pretrained(model).load_lora_weights(out)


@pytest.mark.slow
def test_starting_elsewhere_both_denoisers_are_quantized(train: Train, other_unet: Path) -> None:
    """So that a margin at the start is what the weights differ by, not what rounding them does."""
    plain = train("plain", lora_rank=2, unet=other_unet, reference="recomputed", max_steps=1)
    int8 = train("int8", lora_rank=2, unet=other_unet, quantize="int8", max_steps=1)
    assert (int8 / "reference.safetensors").is_file()
    for name in ("rewards/margins", "drift"):
        assert column(int8, name)[0] == pytest.approx(column(plain, name)[0], rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, {"quantize": "nf4"}], ids=["frozen", "nf4"])
def test_files_in_half_precision_are_never_held_in_float32(
    train: Train, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, object]
) -> None:
    narrow = tmp_path / "narrow"
    DiffusionPipeline.from_pretrained(base, torch_dtype=torch.bfloat16).save_pretrained(narrow)
    shards = invert_tiny(narrow, tmp_path / "shards")
    loaded = []

    def load(*given: object, **named: object) -> object:
        family = load_family(*given, **named)
        loaded.append({parameter.dtype for parameter in family.denoiser.parameters()})
        return family

    monkeypatch.setattr(policy_module, "load_family", load)
    options = {"on": shards, "lora_rank": 2, "max_steps": 1, "batch_size": 4, "dtype": "bf16", **method}
    half = train("half", base=narrow, **options)
    assert loaded == [{torch.bfloat16}]
    loaded.clear()
    # The same numbers as where the reference needs float32 to be recognised.
    monkeypatch.setattr(policy_module, "_load_start", lambda settings, *_, **__: (load_family(settings.model), True))
    whole = train("whole", base=narrow, **options)
    assert column(half, "loss") == column(whole, "loss")
    assert column(half, "grad_norm") == column(whole, "grad_norm")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--quantize nf4: quantized weights cannot be trained; give --lora-rank too"),
        ({"lora_rank": 2, "compile": True}, "--quantize nf4 is not supported with --compile"),
        ({"lora_rank": 2}, "needs bitsandbytes, which is not installed: pip install 'smpo-diffusion[quantize]'"),
    ],
)
def test_what_cannot_be_quantized_is_refused_before_a_model_is_loaded(
    base: Path, flow_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: dict[str, object], words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("smpo_trainer.run.load_policy", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert run_cli(monkeypatch, arguments(flow_shards, base, tmp_path / "run", quantize="nf4", **options)) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_fsdp_cannot_shard_quantized_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="does not support FSDP with --quantize$"):
        fsdp_plugin(make_settings(lora_rank=2, quantize="nf4", optimizer="adamw"))
    assert fsdp_plugin(make_settings(lora_rank=2, optimizer="adamw"))
