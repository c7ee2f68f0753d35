"""One command that tests and measures the kernels and models on a machine with one NVIDIA GPU; see `__main__`."""
