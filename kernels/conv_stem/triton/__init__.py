"""The stem on the GPU."""
