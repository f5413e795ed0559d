"""``smpo-pipeline inspect``: describe pairs, scores or shards, with a contact sheet of images."""
