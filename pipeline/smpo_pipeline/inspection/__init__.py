"""``smpo-pipeline inspect``: what is in pairs, scores or shards, in words and as a contact sheet."""
