"""``smpo-pipeline select``: pairs out of scored candidates. Methods in ``methods/``, pairwise judges in ``judges/``."""
