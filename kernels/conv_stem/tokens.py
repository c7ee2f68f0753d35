"""The end of the stem: the encoder's token tensor from the last convolution's output.

B batch, d width, h w grid, S = h·w tokens plus one where there is a class token.
"""

import torch
from torch import Tensor


def assemble(features: Tensor, class_token: Tensor | None, pos_embed: Tensor | None) -> Tensor:
    """(B, d, h, w), (1, 1, d) or None, (1, S, d) or None → (B, S, d): class token first, positions added."""
    tokens = features.flatten(2).transpose(1, 2)
    if class_token is not None:
        tokens = torch.cat([class_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens if pos_embed is None else tokens + pos_embed
