"""Servers that score or judge images: their addresses and options, requests, and questions to vision models."""
