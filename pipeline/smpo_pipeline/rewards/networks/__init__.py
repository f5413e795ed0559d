"""Parts that rewards are built from: networks, preprocessing of images and prompts, weight files."""
