"""``python -m smpo_pipeline``."""

from smpo_pipeline.cli import main

main()
