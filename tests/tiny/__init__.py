"""Small random models of the real classes, made in a second, without the network."""
