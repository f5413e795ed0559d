"""One file per model family; a new file here is found automatically."""
