"""What an inversion of given settings will cost: exact sizes, a measured rate; plain torch, no Ray."""
