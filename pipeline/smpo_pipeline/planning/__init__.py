"""Predict the cost of an inversion: sizes by formula, speed by measurement. No Ray."""
