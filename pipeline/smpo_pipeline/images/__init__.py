"""From image files to pixels at the model's resolution."""
