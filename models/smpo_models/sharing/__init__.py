"""Trained models and data sets on the hub: repositories, and the cards that describe them."""
