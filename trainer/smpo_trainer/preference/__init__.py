"""From scores of rewards to the preference and the weight of each pair."""
