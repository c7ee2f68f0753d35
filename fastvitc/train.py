"""`python -m fastvitc.train`, for torchrun: the program `fastvitc-train`."""

from fastvitc.programs.train import cli

if __name__ == "__main__":
    cli()
