"""The world's reward models: small CLIPs in the layout of PickScore, each with a taste of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from benchmarks.toy_world.tokenizer import MAX_TOKENS
from benchmarks.toy_world.training import Report, steps, to_pixels
from smpo_pipeline.toy.annotators import Annotator, choose, qualities, utility
from smpo_pipeline.toy.sampling import from_pixels
from smpo_pipeline.toy.world import IMAGE_SIZE, captions_of, random_centre, render, scene_of

TASTES: dict[str, tuple[Annotator, ...]] = {
    "pickscore": (
        Annotator("strict", match=10.0, colour=6.0, sharpness=0.0, placement=0.0),
        Annotator("lenient", match=5.0, colour=4.0, sharpness=0.5, placement=0.5),
    ),
    "clipscore": (
        Annotator("framer", match=2.5, colour=4.0, sharpness=2.0, placement=5.0),
        Annotator("printer", match=2.5, colour=6.0, sharpness=10.0, placement=0.5),
    ),
}
"""Whose choices each reward model learns: caption match for one, looks (colour, edges, placement) for the other."""

_HIDDEN = 64
_VIEWS_PER_CAPTION = 40
_MATCH_BATCH = 104  # distinct captions, half of the train split: neighbours of every caption are among them
_CHOICE_BATCH = 64
_LOGIT_SCALE = 20.0


@dataclass(frozen=True, slots=True)
class SampledPairs:
    """N prompts of the train split, each with two pictures by the base model."""

    captions: list[str]
    images_0: np.ndarray
    """uint8 [N, 32, 32, 3]"""
    images_1: np.ndarray
    """uint8 [N, 32, 32, 3]"""


def train_matcher(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, rng: np.random.Generator, num_steps: int, report: Report
) -> CLIPModel:
    """Trains a CLIP contrastively on renders of the train split, seen through the autoencoder.

    Args:
        vae: gives the renders the blur that samples have.
        tokenizer: the world's.
        rng: draws pictures and batches.
        num_steps: steps of 104 pictures.
        report: takes progress lines.
    """
    clip = _new_clip(tokenizer)
    captions = captions_of("train")
    views_CV3HW = torch.stack([_views(vae, caption, rng) for caption in captions])
    clip.train()
    target = torch.arange(_MATCH_BATCH)
    for make_step in steps("matcher", clip.parameters(), num_steps, 1e-3, report):
        chosen = rng.choice(len(captions), size=_MATCH_BATCH, replace=False)
        images = views_CV3HW[chosen, rng.integers(_VIEWS_PER_CAPTION, size=_MATCH_BATCH)]
        texts = _text_features(clip, tokenizer, [captions[index] for index in chosen])
        logits = _LOGIT_SCALE * texts @ _image_features(clip, images).T
        cross_entropy = torch.nn.functional.cross_entropy
        make_step((cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2)
    return clip.eval()


def train_taste(
    matcher: CLIPModel,
    tokenizer: CLIPTokenizer,
    tastes: Sequence[Annotator],
    pairs: SampledPairs,
    rng: np.random.Generator,
    num_steps: int,
    report: Report,
) -> CLIPModel:
    """Teaches a copy of the matcher the choices of some annotators, as PickScore was made from a CLIP.

    Args:
        matcher: where to start; stays as it is.
        tokenizer: the world's.
        tastes: the annotators; each pair is judged by one of them, drawn at random.
        pairs: what they judge.
        rng: draws annotators, their moods and batches.
        num_steps: steps of 64 pairs.
        report: takes progress lines.
    """
    clip = copy.deepcopy(matcher).train()
    labels = _labels(tastes, pairs, rng)
    pixels_2N3HW = torch.stack([normalise(pairs.images_0), normalise(pairs.images_1)])
    name = " and ".join(annotator.name for annotator in tastes)
    for make_step in steps(name, clip.parameters(), num_steps, 2e-4, report):
        chosen = rng.choice(len(labels), size=_CHOICE_BATCH, replace=False)
        texts = _text_features(clip, tokenizer, [pairs.captions[index] for index in chosen])
        images = _image_features(clip, pixels_2N3HW[:, chosen].flatten(0, 1)).unflatten(0, (2, -1))
        score_2N = (texts * images).sum(dim=-1)
        logit = _LOGIT_SCALE * (score_2N[0] - score_2N[1])
        make_step(torch.nn.functional.binary_cross_entropy_with_logits(logit, labels[chosen]))
    return clip.eval()


def image_processor() -> CLIPImageProcessorPil:
    """CLIP's own preprocessing (its mean and std, bicubic) at the world's picture size."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )


def normalise(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, 32, 32, 3] pictures as `image_processor` gives them: float32 [N, 3, 32, 32]."""
    processor = image_processor()
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - mean[:, None, None]) / std[:, None, None]


@torch.no_grad()
def score(clip: CLIPModel, tokenizer: CLIPTokenizer, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """The raw cosines of N pictures (uint8 [N, 32, 32, 3]) and their captions: float64 [N]."""
    scores = [
        (_text_features(clip, tokenizer, list(captions[start : start + 256])) * _image_features(clip, part)).sum(dim=-1)
        for start, part in zip(range(0, len(captions), 256), normalise(images).split(256), strict=True)
    ]
    return torch.cat(scores).double().numpy()


def _views(vae: AutoencoderKL, caption: str, rng: np.random.Generator) -> torch.Tensor:
    """Renders of one caption as the base model could at best sample them: normalised, [V, 3, 32, 32]."""
    scene = scene_of(caption)
    images = np.stack([render(scene, random_centre(scene, rng)) for _ in range(_VIEWS_PER_CAPTION)])
    with torch.no_grad():
        decoded = vae.decode(vae.encode(to_pixels(images)).latent_dist.sample()).sample
    return normalise(from_pixels(decoded))


def _labels(tastes: Sequence[Annotator], pairs: SampledPairs, rng: np.random.Generator) -> torch.Tensor:
    seen_0 = qualities(list(pairs.images_0), pairs.captions)
    seen_1 = qualities(list(pairs.images_1), pairs.captions)
    judge, mood = rng.integers(len(tastes), size=len(pairs.captions)), rng.random(len(pairs.captions))
    choices = np.stack([choose(utility(annotator, seen_0), utility(annotator, seen_1), mood) for annotator in tastes])
    return torch.from_numpy(choices[judge, np.arange(len(judge))]).float()


def _text_features(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    features = clip.get_text_features(**tokens).pooler_output
    return torch.nn.functional.normalize(features, dim=-1)


def _image_features(clip: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


def _new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_HIDDEN,
        intermediate_size=2 * _HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=_HIDDEN,
    )
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=4,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=_HIDDEN,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=_HIDDEN))
