"""Tasks: a network with its data, loss and score, built anywhere from a small description."""
