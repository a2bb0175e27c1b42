"""A run from outside: its settings, command line, folder; sweeps, comparisons, reports."""
