"""What is counted of a model. Its parts count themselves; `fastvitc.models.complexity` adds them up.

The convention is that of the paper's code: one FLOP is one multiply-add or one bias addition of a convolution,
linear layer or attention product. Normalisation, activation functions, softmax and residual additions count as
nothing. Activations are the outputs of convolutions, linear layers and attention products.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Complexity:
    """Counts for one image. `flops` are multiply-adds plus bias additions; twice that is the usual count of
    floating-point operations in an MFU."""

    params: int = 0
    flops: int = 0
    acts: int = 0

    def __add__(self, other: "Complexity") -> "Complexity":
        return Complexity(self.params + other.params, self.flops + other.flops, self.acts + other.acts)

    def __mul__(self, times: int) -> "Complexity":
        return Complexity(self.params * times, self.flops * times, self.acts * times)


def linear(inputs: int, outputs: int, tokens: int) -> Complexity:
    weights = inputs * outputs
    return Complexity(weights + outputs, (weights + outputs) * tokens, outputs * tokens)
