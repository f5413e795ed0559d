"""Tests of the page that an evaluation writes."""
