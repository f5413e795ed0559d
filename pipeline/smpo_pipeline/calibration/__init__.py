"""Fit rewards' temperatures and weights to people's labels, and measure each mix on held-out prompts.

Shape suffixes: P rows of a scores table (all, or those with a label), K rewards.
"""
