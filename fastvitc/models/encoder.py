"""The transformer encoder's modules. B batch, T tokens, C width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvitc.errors import UsageError
from fastvitc.kernels import Choice, add_layer_norm, attention, bias_gelu
from fastvitc.kernels.choice.backends import parsed, resolve


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection for queries, keys and values (Vaswani et al. 2017).

    Args:
        width: C, a multiple of `heads`.
        heads: number of heads.
        backend: passed to `fastvitc.kernels.attention`.
    """

    def __init__(self, width: int, heads: int, *, backend: Choice = "auto") -> None:
        super().__init__()
        if width % heads:
            raise UsageError(f"heads must divide width, got width={width} and heads={heads}")
        self.heads = heads
        self.backend = parsed(backend)["attention"]
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        return self.proj(attention(self.qkv(x), self.heads, backend=self.backend))


class Mlp(nn.Module):
    """Linear, exact GELU, linear.

    Args:
        width: C.
        hidden: outputs of the first layer.
        backend: passed to `fastvitc.kernels.bias_gelu`.
    """

    def __init__(self, width: int, hidden: int, *, backend: Choice = "auto") -> None:
        super().__init__()
        self.backend = parsed(backend)["bias_gelu"]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        # PyTorch's own product adds the bias in passing.
        if resolve("bias_gelu", self.backend, x.device.type, x.dtype) == "torch":
            return self.fc2(F.gelu(self.fc1(x)))
        hidden = F.linear(x, self.fc1.weight)
        return self.fc2(bias_gelu(hidden, self.fc1.bias, backend=self.backend))


class DropPath(nn.Module):
    """In training, zeroes a residual branch for a whole sample with probability `rate`, else scales it by
    1/(1 − rate) (stochastic depth; Huang et al. 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self._drops = rate > 0.0
        # A tensor, so that blocks of different rates share one compiled graph.
        self.register_buffer("_rate", torch.tensor(rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) → (B, ...)."""
        if not self._drops or not self.training:
            return x
        keep = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= self._rate
        return x * (keep / (1.0 - self._rate)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class Block(nn.Module):
    """Pre-norm transformer block: x + Attention(LN x), then x + Mlp(LN x) (Dosovitskiy et al. 2021, equations 2, 3).

    The ops take the parameters of `norm1`, `norm2` and `mlp.fc1`: hooks on these modules are not called.
    """

    def __init__(
        self, width: int, heads: int, mlp_width: int, drop_path: float = 0.0, *, backend: Choice = "auto"
    ) -> None:
        super().__init__()
        backends = parsed(backend)
        self.backend = backends["add_layer_norm"]
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, backend=backends)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_width, backend=backends)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        x, y = self._add_norm(x, None, self.norm1)
        x, y = self._add_norm(x, self.drop_path(self.attn(y)), self.norm2)
        return x + self.drop_path(self.mlp(y))

    def _add_norm(self, x: Tensor, branch: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, backend=self.backend)
