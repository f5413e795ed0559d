"""From reward scores to the preference and the weight of each pair."""
