"""What keeps a run from going wrong: options of the loss, and what watches the run."""
