"""Each op, and the stem and an encoder block as modules, forward and forward + backward."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from bench.contest import Candidate, Contest
from bench.least import stem_bytes
from bench.models import PEERS, image_batch, mix_of, one_block, trained_like
from bench.peers import FromPixels
from fastvitc.kernels import add_layer_norm, attention, availability, bias_gelu, bn_relu
from fastvitc.models.complexity import block_complexity, stem_complexity


def _candidate(build, inputs, backward, compile):
    """What the function that `build` makes gives; with `backward` also the gradients of inputs that require one, and
    the norm of all parameters'."""
    function = build()
    run = torch.compile(function, fullgraph=True, dynamic=False) if compile else function
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    leaves = [t.detach().requires_grad_(backward and t.requires_grad) for t in inputs]
    wanted = [t for t in leaves if t.requires_grad]

    def outputs():
        found = run(*leaves)
        return [found] if isinstance(found, torch.Tensor) else list(found)

    def forward():
        with torch.no_grad():
            return outputs()

    def forward_backward():
        found = outputs()
        ones = [torch.ones_like(t) for t in found]
        return [*found, *torch.autograd.grad(found, [*wanted, *parameters], ones)]

    def tensors():
        if not backward:
            return forward()
        results = forward_backward()
        count = len(results) - len(parameters)
        norms = [t.float().norm() for t in results[count:]]
        return results[:count] + ([torch.linalg.vector_norm(torch.stack(norms))] if norms else [])

    return Candidate(forward_backward if backward else forward, tensors)


def _contest(name, builds, reference, inputs, backward, **figures):
    """`builds`: name → what makes a function, timed eager and compiled. `reference` makes the truth's, in float32."""
    wide = [t.detach().float() if t.is_floating_point() else t for t in inputs]
    wide = [w.requires_grad_(t.requires_grad) for w, t in zip(wide, inputs, strict=True)]
    contenders = {
        f"{contender}{' compiled' if compile else ''}": partial(_candidate, build, inputs, backward, compile)
        for contender, build in builds.items()
        for compile in (False, True)
    }
    direction = "forward + backward" if backward else "forward"

    def truth():
        return _candidate(reference, wide, backward, compile=False).tensors()

    return Contest(f"{name}, {direction}", truth, contenders, **figures)


def _own(op, device):
    return [b for b, obstacle in availability(device)[op].items() if obstacle is None]


def _sdpa(qkv, heads):
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width // 3)


def attention_contests(name, config, batch_size, device, dtype):
    """Bytes: forward reads qkv and writes the output; backward reads qkv, output and its gradient and writes dqkv."""
    torch.manual_seed(0)
    tokens, width, heads = config.tokens, config.width, config.heads
    qkv = torch.randn(batch_size, tokens, 3 * width, device=device).to(dtype)

    def ours(backend):
        return partial(attention, num_heads=heads, backend=backend)

    builds = {f"fastvitc {b}": partial(ours, b) for b in _own("attention", device)}
    builds["scaled_dot_product_attention"] = lambda: partial(_sdpa, heads=heads)
    products = 4 * batch_size * tokens**2 * width
    for backward in (False, True):
        yield _contest(
            f"attention, {name}, batch {batch_size}, {tokens} tokens, {heads} heads of {width // heads}",
            builds,
            partial(ours, "reference"),
            [qkv.requires_grad_()],
            backward,
            flops=products * (3 if backward else 1),
            bytes=qkv.nbytes // 3 * (12 if backward else 4),
        )


def bn_relu_contests(name, config, batch_size, device, dtype):
    """Bytes: forward reads x and writes y; backward reads dy and x and writes dx."""
    torch.manual_seed(0)
    channels = config.stem.channels[0]
    height, width = (side // config.stem.strides[0] for side in config.image_size)
    x = torch.randn(batch_size, channels, height, width, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)
    statistics = torch.zeros(channels, device=device), torch.ones(channels, device=device)

    def peer(x, weight, bias):
        return F.relu(F.batch_norm(x, *statistics, weight, bias, True))

    def ours(backend):
        return lambda x, weight, bias: bn_relu(x, *statistics, weight, bias, True, backend=backend)

    builds = {f"fastvitc {b}": partial(ours, b) for b in _own("bn_relu", device)}
    builds["batch_norm, relu"] = lambda: peer
    for backward in (False, True):
        yield _contest(
            f"bn_relu, {name}, batch {batch_size}, {channels} channels of {height}x{width}",
            builds,
            partial(ours, "reference"),
            [t.requires_grad_() for t in (x, weight, bias)],
            backward,
            bytes=x.nbytes * (5 if backward else 2),
        )


def add_layer_norm_contests(name, config, batch_size, device, dtype):
    """The float32 residual stream and a branch of the autocast dtype → their sum, and in that dtype its LayerNorm.

    Bytes: forward reads both and writes both results; backward reads both gradients and the sum and writes the stream's
    gradient, which is the branch's too where their dtypes are one, else it writes both.
    """
    torch.manual_seed(0)
    shape = batch_size, config.tokens, config.width
    x, branch = torch.randn(shape, device=device), torch.randn(shape, device=device).to(dtype)
    weight, bias = torch.rand(config.width, device=device) + 0.5, torch.randn(config.width, device=device)

    def peer(x, branch, weight, bias):
        total = x + branch
        return total, F.layer_norm(total, weight.shape, weight, bias, 1e-6).to(branch.dtype)

    def ours(backend, x, branch, weight, bias):
        with torch.autocast(device.type, branch.dtype, enabled=branch.dtype != torch.float32):
            return add_layer_norm(x, branch, weight, bias, 1e-6, backend=backend)

    builds = {f"fastvitc {b}": partial(partial, ours, b) for b in _own("add_layer_norm", device)}
    builds["add, layer_norm"] = lambda: peer
    forward = 2 * x.nbytes + 2 * branch.nbytes
    dbranch = 0 if branch.dtype == x.dtype else branch.nbytes
    for backward in (False, True):
        yield _contest(
            f"add_layer_norm, {name}, batch {batch_size}, {config.tokens} tokens of {config.width}",
            builds,
            partial(partial, ours, "reference"),
            [t.requires_grad_() for t in (x, branch, weight, bias)],
            backward,
            bytes=forward + backward * (3 * x.nbytes + branch.nbytes + dbranch),
        )


def bias_gelu_contests(name, config, batch_size, device, dtype):
    """Bytes: forward reads x and writes y; backward reads dy and x and writes dx."""
    torch.manual_seed(0)
    x = torch.randn(batch_size, config.tokens, config.mlp_width, device=device).to(dtype)
    bias = torch.randn(config.mlp_width, device=device)

    def peer(x, bias):
        return F.gelu(x + bias.to(x.dtype))

    builds = {f"fastvitc {b}": partial(partial, bias_gelu, backend=b) for b in _own("bias_gelu", device)}
    builds["add, gelu"] = lambda: peer
    for backward in (False, True):
        yield _contest(
            f"bias_gelu, {name}, batch {batch_size}, {config.tokens} tokens of {config.mlp_width}",
            builds,
            partial(partial, bias_gelu, backend="reference"),
            [t.requires_grad_() for t in (x, bias)],
            backward,
            bytes=x.nbytes * (5 if backward else 2),
        )


class _Tokens(nn.Module):
    """A peer's stem from a uint8 image to the token tensor, with class token and positions."""

    def __init__(self, peer, config):
        super().__init__()
        own = trained_like(config)
        self.class_token, self.pos_embed = own.class_token, own.pos_embed
        model = PEERS[peer](config)
        self.stem = FromPixels(model.patch_embed if peer == "timm" else model.conv_proj)

    def forward(self, image, mix):
        tokens = self.stem(image, mix)
        if tokens.dim() == 4:  # torchvision leaves them in rows and columns
            tokens = tokens.flatten(2).mT
        return torch.cat([self.class_token.expand(len(image), -1, -1), tokens], 1) + self.pos_embed


class _OwnTokens(nn.Module):
    def __init__(self, backend, config):
        super().__init__()
        own = trained_like(config, backend=backend)
        self.stem, self.class_token, self.pos_embed = own.stem, own.class_token, own.pos_embed

    def forward(self, image, mix):
        return self.stem(image, self.class_token, self.pos_embed, mix)


class _Autocast(nn.Module):
    def __init__(self, module, dtype):
        super().__init__()
        self.module, self.dtype = module.to(memory_format=torch.channels_last), dtype

    def forward(self, x, *rest):
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.module(x, *rest)


def _module(make, device, dtype):
    return _Autocast(make().to(device).train(), dtype)


def stem_contests(name, config, batch_size, device, dtype):
    """From uint8 images, mixed, to tokens with class token and positions."""
    single = one_block(config)
    makes = {f"fastvitc {b}": partial(_OwnTokens, b, single) for b in _own("conv_stem", device)}
    makes |= {peer: partial(_Tokens, peer, single) for peer in PEERS}
    forward, backward_only = stem_bytes(config)
    for backward in (False, True):
        yield _contest(
            f"stem, {name}, batch {batch_size}",
            {name: partial(_module, make, device, dtype) for name, make in makes.items()},
            partial(_module, partial(_OwnTokens, "reference", single), device, torch.float32),
            [image_batch(config, batch_size, device), mix_of(config, device)],
            backward,
            flops=2 * stem_complexity(config).flops * batch_size * (3 if backward else 1),
            bytes=batch_size * (forward + backward_only * backward),
            images=batch_size,
            tolerance=5e-2,
        )


def _block(library, config):
    model = trained_like(config) if library == "fastvitc" else PEERS[library](config)
    return model.encoder.layers[0] if library == "torchvision" else model.blocks[0]


def block_contests(name, config, batch_size, device, dtype):
    single = one_block(config)
    torch.manual_seed(0)
    tokens = torch.randn(batch_size, config.tokens, config.width, device=device, requires_grad=True)

    def reference():
        return trained_like(single, backend="reference").blocks[0]

    for backward in (False, True):
        yield _contest(
            f"block, {name}, batch {batch_size}",
            {k: partial(_module, partial(_block, k, single), device, dtype) for k in ("fastvitc", *PEERS)},
            partial(_module, reference, device, torch.float32),
            [tokens],
            backward,
            flops=2 * block_complexity(config).flops * batch_size * (3 if backward else 1),
            images=batch_size,
            tolerance=5e-2,
        )


def contests(scale, device, dtype):
    parts = (
        attention_contests,
        bn_relu_contests,
        add_layer_norm_contests,
        bias_gelu_contests,
        stem_contests,
        block_contests,
    )
    return [
        contest
        for name, config in scale.models.items()
        for part in parts
        for contest in part(name, config, scale.batch_size, device, dtype)
    ]


def test_op(entry, timed):
    timed(entry)
