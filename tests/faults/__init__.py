"""What goes wrong around a run, made to go wrong: kills, broken files, full disks, lost processes.

Each row runs the real program as processes and says with how many trials what held. `pytest tests/faults` makes few
trials of each; `python -m tests.faults` makes all, and prints the table.
"""
