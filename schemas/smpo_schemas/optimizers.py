"""Optimizers by their names on command lines."""

from typing import Literal

OptimizerName = Literal["adamw", "adafactor", "adamw8bit"]
