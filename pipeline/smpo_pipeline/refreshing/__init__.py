"""Refit a reward against samples of the policy: APO's reward player (arXiv 2311.08045)."""
