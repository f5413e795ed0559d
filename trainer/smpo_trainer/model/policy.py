"""The model in training: where it starts from, what of it is trained, and how it is saved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import safetensors.torch
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from smpo_common.errors import UserError
from smpo_models.family import Family
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_models.weights import variant_remark
from smpo_schemas.manifest import ModelInfo
from smpo_schemas.trained_model import LORA_FILE, UNET_FOLDER
from smpo_trainer.model.fsdp import like, plain_class
from smpo_trainer.model.text import CachedText
from smpo_trainer.settings import TrainSettings

_LORA_PREFIX = "unet"

_ATTENTION_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Policy:
    """What a run holds of the model.

    Attributes:
        family: text encoders and process; its ``denoiser`` is the one in training.
        denoiser: float32, in evaluation mode (no dropout: the reference had none); the trained weights, and only
            they, require gradients.
        reference: frozen, where it is not ``denoiser`` as it starts, or is needed beside it for ``--reference live``.
            Of an adapter that starts from it, it is ``denoiser`` itself, see :meth:`as_reference`.
        starts_from_reference: the margin at step 0 is 0 up to arithmetic noise.
        lora_rank: rank of the adapter in ``denoiser``, or None.
        encode_text: from B prompts to what the family's text encoders make of them.
    """

    family: Family
    denoiser: nn.Module
    reference: nn.Module | None
    starts_from_reference: bool
    lora_rank: int | None
    encode_text: Callable[[Sequence[str]], dict[str, torch.Tensor]]

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """While entered, ``reference`` is just that: where it is the denoiser itself, the adapter is switched off."""
        is_adapted = self.reference is self.denoiser
        if is_adapted:
            trained = self.trained().values()
            self.denoiser.disable_adapters()
            # PEFT freezes them, too, and later unfreezes what it finds: of a denoiser that is cut up, after a forward,
            # not these but what they were gathered into. They would be trained, and missing from checkpoints.
            for parameter in trained:
                parameter.requires_grad_(True)
        try:
            yield
        finally:
            if is_adapted:
                self.denoiser.enable_adapters()

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained weights by name, in a fixed order."""
        return {name: parameter for name, parameter in self.denoiser.named_parameters() if parameter.requires_grad}

    def compile(self) -> None:
        """Have torch compile the denoiser's forward and backward, at its first call; weights and names stay."""
        self.denoiser.compile()
        if self.reference is not None and self.reference is not self.denoiser:
            self.reference.compile()

    def with_cached_text(self, encoded: CachedText) -> Policy:
        """The same without its text encoders, which are freed."""
        self.family.text_modules = ()
        return replace(self, encode_text=encoded)

    def load_trained(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put saved weights in place.

        Raises:
            UserError: names or shapes are not those of this model.
        """
        trained = self.trained()
        if {n: p.shape for n, p in trained.items()} != {n: t.shape for n, t in tensors.items()}:
            raise UserError("the checkpoint's weights are not those of this model; start over with --overwrite")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(like(tensors[name], parameter))

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write a model that diffusers loads: a denoiser folder, or a LoRA file.

        The LoRA file is relative to the weights that training started from.

        Args:
            folder: a new one.
            weights: in place of the trained ones, by name, each whole.

        Raises:
            OSError, SafetensorError: it cannot be written.
        """
        if self.lora_rank:
            layers = {name: tensor.detach().cpu() for name, tensor in self._lora_layers(weights).items()}
            pipeline = getattr(diffusers, self.family.pipelines[0])
            pipeline.save_lora_weights(folder, unet_lora_layers=layers, weight_name=LORA_FILE)
            return
        # The denoiser itself may be cut up; this one borrows the weights.
        with torch.device("meta"):
            denoiser = plain_class(self.denoiser).from_config(self.denoiser.config)
        denoiser.load_state_dict({**self.denoiser.state_dict(), **weights}, assign=True)
        denoiser.save_pretrained(folder / UNET_FOLDER)

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """The trained weights by name, on the CPU, of a model that ``save`` has written.

        Raises:
            OSError, SafetensorError, KeyError: it cannot be read, or one of them is not there.
        """
        names = list(self.trained())
        if not self.lora_rank:
            # Several files where the weights are large.
            files = sorted((folder / UNET_FOLDER).glob("*.safetensors"))
            found = {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
            return {name: found[name] for name in names}
        layers = safetensors.torch.load_file(folder / LORA_FILE)
        number_of = self._lora_layers({name: torch.tensor(number) for number, name in enumerate(names)})
        return {names[number]: layers[f"{_LORA_PREFIX}.{layer}"] for layer, number in number_of.items()}

    def _lora_layers(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The adapter's weights by the names that diffusers gives them in a file."""
        return convert_state_dict_to_diffusers(get_peft_model_state_dict(self.denoiser, weights))


def load_policy(settings: TrainSettings, info: ModelInfo, device: torch.device, say: Callable[[str], None]) -> Policy:
    """Load the denoiser and the text encoders, check that they belong to the shards, and make ready what is trained.

    Args:
        settings: names the model and the weights to start from.
        info: what the shards were made with.
        device: for everything.
        say: takes a line where training starts from other weights than the reference.

    Raises:
        UserError: the model is not the one that the shards were made with.
    """
    start = settings.denoiser
    if remark := variant_remark(settings.model, start.variant):
        say(remark)
    family = load_family(
        settings.model,
        ("denoiser", "text"),
        denoiser=start.unet,
        variant=start.variant,
        device=device,
    )
    denoiser = family.denoiser
    if denoiser is None:
        raise UserError(f"--model {settings.model} has no denoiser")
    if family.process.fingerprint() != info.scheduler:
        raise UserError(_mismatch(settings, info, "its scheduler config has other noise levels or prediction type"))
    if fingerprint_module(*family.text_modules) != info.text:
        raise UserError(_mismatch(settings, info, "its text encoder has other weights"))
    is_reference = fingerprint_module(denoiser) == info.reference
    if not is_reference and start.unet is None:
        raise UserError(
            _mismatch(settings, info, "its denoiser is not the reference that their ref_error was measured with")
            + ", or start from other weights on purpose with --unet DIR"
        )
    if not is_reference:
        say(f"starting from --unet {start.unet}, which is not the shards' reference: the first margins are not 0")
    reference = None
    if settings.compute.reference == "live" and is_reference:
        reference = denoiser if start.lora_rank else copy.deepcopy(denoiser)
    elif settings.compute.reference in {"live", "recomputed"} and not is_reference:
        reference = _load_reference(settings, info, device)
    if start.lora_rank is None:
        denoiser.requires_grad_(True)
    else:
        add_lora(denoiser, start.lora_rank)
    return Policy(family, denoiser, reference, is_reference, start.lora_rank, family.encode_text)


def _mismatch(settings: TrainSettings, info: ModelInfo, reason: str) -> str:
    return (
        f"--model {settings.model} and --shards {settings.shards[0]} do not belong together: {reason}; "
        f"the shards were made with {info.id}: name that as --model"
    )


def _load_reference(settings: TrainSettings, info: ModelInfo, device: torch.device) -> nn.Module:
    """The model's own denoiser, if it is the reference."""
    reference = load_family(settings.model, ("denoiser",), variant=settings.denoiser.variant, device=device).denoiser
    if reference is None or fingerprint_module(reference) != info.reference:
        raise UserError(
            f"--reference {settings.compute.reference} needs the reference's weights, and neither --unet "
            f"{settings.denoiser.unet} nor the denoiser of --model {settings.model} are those; use --reference stored"
        )
    return reference


def add_lora(denoiser: nn.Module, rank: int) -> None:
    """An adapter on the attention projections, which changes nothing until it is trained (its B matrices are 0)."""
    config = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=_ATTENTION_PROJECTIONS, lora_dropout=0.0
    )
    denoiser.add_adapter(config)
