"""Tables and records about scores: the scores table, calibrations, weights, refreshed rewards."""
