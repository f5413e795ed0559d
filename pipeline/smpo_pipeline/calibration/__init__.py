"""Rewards against people's labels: temperatures, shares, and how well each mix does on prompts it was not fitted to.

Shape suffixes: P rows of a scores table (all, or those with a label), K rewards.
"""
