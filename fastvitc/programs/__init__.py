"""The command-line programs: they read settings and put the rest together."""
