"""Tests of all packages; their environment, set before anything reads it."""

import os
import secrets

# Tiny models run fastest on one thread; several busy test processes on two cores would otherwise stall each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Of every Ray that this process starts; what connects to the shared one has it too.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# By default Ray's workers are niced: beside other test processes on two cores they hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")
