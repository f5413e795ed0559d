"""One file a model family; a new file here is found by itself."""
