# ruff: noqa: F401
"""What programs of the tests import and takes long.

Not Ray: it keeps the environment in which it was imported, and each worker's is another.
"""

import matplotlib.figure
import pandas as pd
import pyarrow.dataset
import scipy.stats
import transformers.models.clip.modeling_clip
import transformers.models.clip.tokenization_clip

import smpo_pipeline.cli
import smpo_pipeline.evaluation.run
import smpo_pipeline.inversion.inverter
import smpo_pipeline.rewards
import smpo_trainer.cli
import smpo_trainer.run
