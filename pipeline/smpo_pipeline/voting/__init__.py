"""Label pairs in the browser."""
