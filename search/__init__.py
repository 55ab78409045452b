"""Everything with side effects: Ray, Tune, files, the command line."""
