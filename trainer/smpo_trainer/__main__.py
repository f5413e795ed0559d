"""``python -m smpo_trainer``, for torchrun and accelerate launch."""

from smpo_trainer.cli import main

main()
