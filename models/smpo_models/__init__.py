"""What both stages must do alike with a diffusion model."""

from __future__ import annotations

from transformers.utils import logging

# A bar for every weight file would tear our own progress bars apart; what is wrong with a checkpoint, the code that
# loads it checks and says itself.
logging.disable_progress_bar()
logging.set_verbosity_error()
