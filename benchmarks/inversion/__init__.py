"""How exact inverted trajectories are, and what they cost."""
