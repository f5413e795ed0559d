"""Tests of voting in the browser."""
