"""The stem's two ends, shared by the backends of `conv_stem`: pixels in, the encoder's token tensor out.

B batch, C channels, H W image, d width, h w grid, T = h·w patch tokens, S = T plus one where there is a class token.
"""

import torch
from torch import Tensor


def scaled_pixels(image: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """(B, C, H, W), (C,), (C,) → scale·image + shift per channel, in the dtype of the vectors; image without them."""
    if scale is None or shift is None:
        return image
    return image * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def assemble(features: Tensor, class_token: Tensor | None, pos_embed: Tensor | None) -> Tensor:
    """(B, d, h, w), (1, 1, d) or None, (1, S, d) or None → (B, S, d): class token first, positions added."""
    tokens = features.flatten(2).transpose(1, 2)
    if class_token is not None:
        tokens = torch.cat([class_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens if pos_embed is None else tokens + pos_embed
