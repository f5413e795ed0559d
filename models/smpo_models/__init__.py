"""What both stages must do alike with a diffusion model."""
