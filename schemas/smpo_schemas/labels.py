"""Labels: P(image_0 preferred), as people gave it."""

TIE = 0.5
"""The images are equally good. 1 and 0 are decided labels; other values are shares of votes."""
