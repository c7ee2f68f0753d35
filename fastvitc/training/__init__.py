"""Training: settings and recipes, the compiled step, evaluation, the run and its state."""
