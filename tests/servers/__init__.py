"""Servers on this machine that stand for the hub, an object store and reward models on the network."""
