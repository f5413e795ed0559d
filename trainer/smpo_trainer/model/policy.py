"""The model in training: its start, its trainable parameters, and saving it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import safetensors.torch
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from torch import nn

from smpo_common.errors import UserError
from smpo_models.arithmetic import narrow_products
from smpo_models.family import Family
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_models.tuned.lora import LORA_SETTINGS, add_lora
from smpo_models.tuned.lora_formats import write_lora_format
from smpo_models.weights import DTYPES, variant_remark
from smpo_schemas.manifest import ModelInfo
from smpo_schemas.trained_model import LORA_FILE, UNET_FOLDER, LoraFormat
from smpo_trainer.model.fsdp import shard_like, unsharded_class
from smpo_trainer.model.quantization import CPU_REMARK, quantize
from smpo_trainer.settings import TrainSettings


@dataclass(frozen=True)
class Policy:
    """The models of a run.

    Attributes:
        family: text encoders and noise schedule; its ``denoiser`` is the one in training.
        denoiser: in evaluation mode (no dropout, as for the reference). Only the trained weights require gradients.
            They are in float32; with an adapter, the frozen weights of products are in the dtype of the run.
        reference: the frozen reference, if ``--reference live`` needs it or training starts from other weights. With an
            adapter on top of the reference it is ``denoiser`` itself, see :meth:`as_reference`.
        starts_from_reference: whether the margin at step 0 is 0 up to rounding.
        lora_rank: rank of the adapter in ``denoiser``, or None.
        lora_format: format in which the adapter is saved besides diffusers' own.
    """

    family: Family
    denoiser: nn.Module
    reference: nn.Module | None
    starts_from_reference: bool
    lora_rank: int | None
    lora_format: LoraFormat = "diffusers"

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Context in which ``reference`` is the reference: if it is the denoiser itself, its adapter is disabled."""
        is_adapted = self.reference is self.denoiser
        if is_adapted:
            trained = self.trainable_parameters().values()
            self.denoiser.disable_adapters()
            # PEFT also freezes the adapter, and unfreezes the current parameters later. In a sharded denoiser these
            # are, after a forward, the gathered ones, which must neither be trained nor replace those in checkpoints.
            for parameter in trained:
                parameter.requires_grad_(True)
        try:
            yield
        finally:
            if is_adapted:
                self.denoiser.enable_adapters()

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name, in a fixed order."""
        return {name: parameter for name, parameter in self.denoiser.named_parameters() if parameter.requires_grad}

    def compile(self) -> None:
        """Compile forward and backward of the denoiser at its first call; weights keep their names."""
        self.denoiser.compile()
        if self.reference is not None and self.reference is not self.denoiser:
            self.reference.compile()

    def load_weights(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load saved weights.

        Raises:
            UserError: names or shapes do not fit this model.
        """
        trained = self.trainable_parameters()
        if {n: p.shape for n, p in trained.items()} != {n: t.shape for n, t in tensors.items()}:
            raise UserError("the weights of the checkpoint do not fit this model; start over with --overwrite")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(shard_like(tensors[name], parameter))

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write a model that diffusers loads: a denoiser folder, or a LoRA file on top of the initial weights.

        Args:
            folder: a new folder.
            weights: full tensors by name, in place of the trained ones.

        Raises:
            OSError, SafetensorError: it cannot be written.
        """
        if self.lora_rank:
            layers = {name: tensor.detach().cpu() for name, tensor in self._lora_layers(weights).items()}
            pipeline = getattr(diffusers, self.family.pipelines[0])
            # diffusers' own function writes two entries into the header, which safetensors puts in a random order.
            save = partial(safetensors.torch.save_file, metadata={LORA_SETTINGS: json.dumps(self._adapter())})
            options = {f"{self._folder}_lora_layers": layers, "save_function": save}
            pipeline.save_lora_weights(folder, weight_name=LORA_FILE, **options)
            write_lora_format(folder, self.lora_format, unsharded_class(self.denoiser))
            return
        # The denoiser may be sharded: save an unsharded one that refers to the same weights.
        with torch.device("meta"):
            denoiser = unsharded_class(self.denoiser).from_config(self.denoiser.config)
        denoiser.load_state_dict({**self.denoiser.state_dict(), **weights}, assign=True)
        denoiser.save_pretrained(folder / self._folder)

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """Read the trained weights of a model that ``save`` has written, by name, on the CPU.

        Raises:
            OSError, SafetensorError, KeyError: the model cannot be read, or lacks a weight.
        """
        names = list(self.trainable_parameters())
        if not self.lora_rank:
            # diffusers splits large weights into several files.
            files = sorted((folder / self._folder).glob("*.safetensors"))
            tensors = {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
            return {name: tensors[name] for name in names}
        layers = safetensors.torch.load_file(folder / LORA_FILE)
        # Send numbers through the renaming, to invert it.
        numbers = self._lora_layers({name: torch.tensor(number) for number, name in enumerate(names)})
        return {names[number]: layers[f"{self._folder}.{layer}"] for layer, number in numbers.items()}

    @property
    def _folder(self) -> str:
        """The denoiser's folder in its pipeline, and the prefix of its layers in LoRA files."""
        return self.family.denoiser_folder

    def _adapter(self) -> dict[str, object]:
        """Return what diffusers reads of an adapter in a file's header; without alpha, it takes the rank for it."""
        config = self.denoiser.peft_config["default"]
        # In a fixed order: PEFT keeps the targets as a set.
        own = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
        return {f"{self._folder}.{name}": value for name, value in own.items()}

    def _lora_layers(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename the weights of the adapter as diffusers names them in a file."""
        layers = get_peft_model_state_dict(self.denoiser, weights)
        # Transformers' pipelines read PEFT's own names. The older ones do not cover all of their layers, and of a file
        # with names of both kinds diffusers loads only a part.
        return convert_state_dict_to_diffusers(layers) if self._folder == UNET_FOLDER else layers


def load_policy(
    settings: TrainSettings, info: ModelInfo, device: torch.device, say: Callable[[str], None], *, text: bool = True
) -> Policy:
    """Load denoiser and text encoders, check that they are those of the shards, and select what is trained.

    Args:
        settings: names the model and the weights to start from.
        info: model of the shards, from their manifest.
        device: device of all models.
        say: prints remarks for the user, for example that training does not start from the reference.
        text: whether to load the text encoders.

    Raises:
        UserError: the model is not the one that the shards were made with.
    """
    start, dtype = settings.denoiser, DTYPES[settings.compute.chosen_dtype]
    if remark := variant_remark(settings.model, start.variant):
        say(remark)
    family, is_reference = _load_start(settings, info, text=text)
    denoiser = _denoiser(family, settings)
    if family.noise_schedule.fingerprint() != info.scheduler:
        raise UserError(_mismatch(settings, info, "its scheduler config has another noise schedule or prediction type"))
    if text and fingerprint_module(*family.text_modules) != info.text:
        raise UserError(_mismatch(settings, info, "its text encoder has other weights"))
    if not is_reference and start.unet is None:
        raise UserError(
            _mismatch(settings, info, "its denoiser is not the reference of the shards")
            + ", or give other weights to start from with --unet DIR"
        )
    if not is_reference:
        say(f"starting from --unet {start.unet}, which is not the reference of the shards: the first margins are not 0")
    reference = _choose_reference(settings, info, denoiser, is_reference=is_reference)
    modules = [denoiser] if reference is None or reference is denoiser else [denoiser, reference]
    if start.quantize:
        # The reference, too: margins must not contain what rounding the weights does.
        millions = [quantize(module, start.quantize, dtype, device) / 1e6 for module in modules]
        say(
            f"{millions[0]:,.1f} million weights below the adapter are in {start.quantize}; `smpo-pipeline evaluate` "
            "adds the adapter to the unquantized model"
        )
        if device.type == "cpu":
            say(f"WARNING: {CPU_REMARK}")
    if start.lora_rank is None:
        _train_all_but(denoiser, family.idle_layers)
    else:
        add_lora(denoiser, family.lora_targets, start.lora_rank, start.lora_alpha, idle=family.idle_layers)
    # Cast on the CPU: in float32 they may be too large for the device.
    for module in modules:
        narrow_products(module, dtype)
        module.to(device)
    family.to(device)
    return Policy(family, denoiser, reference, is_reference, start.lora_rank, start.lora_format)


def _train_all_but(denoiser: nn.Module, idle: tuple[str, ...]) -> None:
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(not name.startswith(idle))


def _load_start(settings: TrainSettings, info: ModelInfo, *, text: bool) -> tuple[Family, bool]:
    """Load the model to start from; returns whether its denoiser has the weights of the reference.

    Weights are compared, not names: a hub id may get new weights, and --unet may hold the reference itself.
    """
    start = settings.denoiser
    family = load_family(
        settings.model,
        ("denoiser", "text") if text else ("denoiser",),
        denoiser=start.unet,
        variant=start.variant,
        denoiser_dtype=DTYPES[settings.compute.chosen_dtype] if start.lora_rank else torch.float32,
    )
    return family, fingerprint_module(_denoiser(family, settings)) == info.reference


def _denoiser(family: Family, settings: TrainSettings) -> nn.Module:
    if family.denoiser is None:
        raise UserError(f"--model {settings.model} has no denoiser")
    return family.denoiser


def _mismatch(settings: TrainSettings, info: ModelInfo, reason: str) -> str:
    return (
        f"--model {settings.model} is not the model of --shards {settings.shards[0]}: {reason}; "
        f"give the model they were made with, --model {info.id}"
    )


def _choose_reference(
    settings: TrainSettings, info: ModelInfo, denoiser: nn.Module, *, is_reference: bool
) -> nn.Module | None:
    """Return the frozen reference for ``--reference``; None where it is not needed."""
    # Copy the reference before training changes it; below an adapter its weights stay as they are.
    if settings.compute.reference == "live" and is_reference:
        return denoiser if settings.denoiser.lora_rank else copy.deepcopy(denoiser)
    if (settings.compute.reference == "live" or settings.recomputes_reference) and not is_reference:
        return _load_reference(settings, info)
    return None


def _load_reference(settings: TrainSettings, info: ModelInfo) -> nn.Module:
    """Load the denoiser of ``--model``, which must be the reference.

    Raises:
        UserError: it is not.
    """
    dtype = DTYPES[settings.compute.chosen_dtype]
    variant = settings.denoiser.variant
    reference = load_family(settings.model, ("denoiser",), variant=variant, denoiser_dtype=dtype).denoiser
    if reference is None or fingerprint_module(reference) != info.reference:
        raise UserError(
            f"--reference {settings.compute.reference} needs the reference's weights, but neither --unet "
            f"{settings.denoiser.unet} nor --model {settings.model} has them; use --reference stored"
        )
    return reference
