"""``smpo-pipeline evaluate``: images of several models from the same prompts and noise, scored and compared."""
