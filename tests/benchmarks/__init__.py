"""Benchmarks: ``make bench-NAME`` runs one, prints a table and writes build/bench/NAME.json."""
