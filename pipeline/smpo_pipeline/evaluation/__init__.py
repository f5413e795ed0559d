"""``smpo-pipeline evaluate``: generate images of several models from the same prompts and noise, score and compare."""
