"""Makes a copy of the embedded world's model whose VAE has a thin posterior, for benchmarks/inversion/trajectories.py.

The world's VAE is made with a posterior of standard deviation 0.35, which gives flat pictures the thickness that grain
gives to photographs (toy_world/autoencoder.py). Here that number is replaced (0.05 by default), and the UNet is
trained on from the shipped one, on latents sampled from the new posterior, with the base's own captions and losses. The
encoder's means, the decoder and the text encoder stay as they are.

    python -m benchmarks.toy_world.thin --out DIR [--std 0.05] [--steps 800]

About four minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.toy_world.autoencoder import LATENT_CHANNELS
from benchmarks.toy_world.base import DROPPED_SHARE
from benchmarks.toy_world.training import steps, to_pixels, training_renders
from smpo_pipeline.toy.create import ASSETS
from smpo_pipeline.toy.sampling import load_pipeline

_BATCH, _POOL, _LR = 64, 8192, 5e-4


def main() -> None:
    """Thin the posterior, train the UNet on, save the whole model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--std", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    pipeline = load_pipeline(ASSETS / "model")
    unet, vae, scheduler = pipeline.unet, pipeline.vae, pipeline.scheduler
    with torch.no_grad():
        vae.quant_conv.bias[LATENT_CHANNELS:] = 2 * math.log(arguments.std)
        images, captions = training_renders(_POOL, rng)
        posteriors = [vae.encode(batch).latent_dist for batch in to_pixels(images).split(256)]
        mean = torch.cat([posterior.mean for posterior in posteriors])
        std = torch.cat([posterior.std for posterior in posteriors])
        distinct = sorted({"", *captions})
        tokens = pipeline.tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = torch.cat([pipeline.text_encoder(part).last_hidden_state for part in tokens.split(256)])
    place = {caption: index for index, caption in enumerate(distinct)}
    unet.train().requires_grad_(requires_grad=True)
    begin = time.monotonic()

    def report(line: str) -> None:
        print(f"{time.monotonic() - begin:5.0f} s  {line}", flush=True)

    for make_step in steps("thin", unet.parameters(), arguments.steps, _LR, report):
        chosen = rng.integers(_POOL, size=_BATCH)
        latents = mean[chosen] + std[chosen] * torch.randn(_BATCH, *mean.shape[1:])
        words = ["" if rng.random() < DROPPED_SHARE else captions[index] for index in chosen]
        noise, t = torch.randn_like(latents), torch.randint(scheduler.config["num_train_timesteps"], (_BATCH,))
        predicted = unet(scheduler.add_noise(latents, noise, t), t, text[[place[each] for each in words]]).sample
        make_step((predicted - noise).square().mean())
    unet.eval()
    pipeline.save_pretrained(arguments.out)
    report(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
