"""Files of finished rows, which runs in pieces add to."""
