"""What a label is: P(image_0 preferred) as people gave it."""

TIE = 0.5
"""The label of a pair whose images are equally good. 1 and 0 are decided; other values are shares of votes."""
