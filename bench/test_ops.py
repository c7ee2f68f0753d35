"""Each op, and the stem and an encoder block as modules, forward and forward + backward."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from bench.contest import Candidate, Contest
from bench.models import MODELS, one_block, trained_like
from fastvitc.complexity import block_complexity, stem_complexity
from fastvitc.kernels import attention, availability, bn_relu


def _candidate(function, inputs, backward, compile):
    """The output; with `backward` also the gradients of inputs that require one, and the norm of all parameters'."""
    run = torch.compile(function, fullgraph=True, dynamic=False) if compile else function
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    leaves = [t.detach().requires_grad_(backward and t.requires_grad) for t in inputs]
    wanted = [t for t in leaves if t.requires_grad]

    def forward():
        with torch.no_grad():
            return [run(*leaves)]

    def forward_backward():
        out = run(*leaves)
        return [out, *torch.autograd.grad(out, [*wanted, *parameters], torch.ones_like(out))]

    def tensors():
        if not backward:
            return forward()
        results = forward_backward()
        count = 1 + len(wanted)
        norms = [t.float().norm() for t in results[count:]]
        return results[:count] + ([torch.linalg.vector_norm(torch.stack(norms))] if norms else [])

    return Candidate(forward_backward if backward else forward, tensors)


def _contest(name, functions, reference, inputs, backward, **figures):
    """`functions`: name → function; each is timed eager and compiled. The truth is the reference in float32."""
    wide = [t.detach().float().requires_grad_(t.requires_grad) for t in inputs]
    contenders = {
        f"{contender}{' compiled' if compile else ''}": partial(
            _candidate, function, inputs, backward, compile
        )
        for contender, function in functions.items()
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


def _attention_contests(name, config, batch_size, device, dtype):
    torch.manual_seed(0)
    tokens, width, heads = config.tokens, config.width, config.heads
    qkv = torch.randn(batch_size, tokens, 3 * width, device=device).to(dtype)
    functions = {
        f"fastvitc {b}": partial(attention, num_heads=heads, backend=b) for b in _own("attention", device)
    }
    functions["scaled_dot_product_attention"] = partial(_sdpa, heads=heads)
    reference = partial(attention, num_heads=heads, backend="reference")
    products = 4 * batch_size * tokens**2 * width
    for backward in (False, True):
        yield _contest(
            f"attention, {name}, batch {batch_size}, {tokens} tokens, {heads} heads of {width // heads}",
            functions,
            reference,
            [qkv.requires_grad_()],
            backward,
            flops=products * (3 if backward else 1),
        )


def _bn_relu_contests(name, config, batch_size, device, dtype):
    torch.manual_seed(0)
    channels = config.stem.channels[0]
    height, width = (side // config.stem.strides[0] for side in config.image_size)
    x = torch.randn(batch_size, channels, height, width, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)
    statistics = torch.zeros(channels, device=device), torch.ones(channels, device=device)

    def peer(x, weight, bias):
        return F.relu(F.batch_norm(x, *statistics, weight, bias, True))

    def ours(backend, x, weight, bias):
        return bn_relu(x, *statistics, weight, bias, True, backend=backend)

    functions = {f"fastvitc {b}": partial(ours, b) for b in _own("bn_relu", device)}
    functions["batch_norm, relu"] = peer
    for backward in (False, True):
        yield _contest(
            f"bn_relu, {name}, batch {batch_size}, {channels} channels of {height}x{width}",
            functions,
            partial(ours, "reference"),
            [t.requires_grad_() for t in (x, weight, bias)],
            backward,
            bytes=x.nbytes * (5 if backward else 2),
        )


def _modules(part, config, device):
    """The same part of each library's model with equal weights."""
    return {library: part(library, build(config)).to(device).train() for library, build in MODELS.items()}


def _stem_of(library, model):
    if library == "fastvitc":
        return model.stem
    return model.patch_embed if library == "timm" else _TorchvisionStem(model)


class _TorchvisionStem(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.conv_proj = model.conv_proj

    def forward(self, image):
        return self.conv_proj(image).flatten(2).mT


def _block_of(library, model):
    if library == "torchvision":
        return model.encoder.layers[0]
    return model.blocks[0]


class _Autocast(nn.Module):
    def __init__(self, module, dtype):
        super().__init__()
        self.module, self.dtype = module.to(memory_format=torch.channels_last), dtype

    def forward(self, x):
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.module(x)


def _module_contests(name, config, batch_size, device, dtype):
    single = one_block(config)
    torch.manual_seed(0)
    image = torch.randn(batch_size, config.in_chans, *config.image_size, device=device)
    image = image.contiguous(memory_format=torch.channels_last)
    tokens = torch.randn(batch_size, config.tokens, config.width, device=device, requires_grad=True)
    for part, x, flops in (
        (_stem_of, image, stem_complexity(config).flops),
        (_block_of, tokens, block_complexity(config).flops),
    ):
        modules = {k: _Autocast(m, dtype) for k, m in _modules(part, single, device).items()}
        if part is _stem_of:
            del modules["fastvitc"]
            for backend in _own("conv_stem", device):
                stem = trained_like(single, backend=backend).stem.to(device).train()
                modules[f"fastvitc {backend}"] = _Autocast(stem, dtype)
        truth = part("fastvitc", trained_like(single, backend="reference")).to(device).train()
        for backward in (False, True):
            yield _contest(
                f"{'stem' if part is _stem_of else 'block'}, {name}, batch {batch_size}",
                modules,
                truth,
                [x],
                backward,
                flops=2 * flops * batch_size * (3 if backward else 1),
                images=batch_size,
                tolerance=5e-2,
            )


def contests(scale, device, dtype):
    parts = (_attention_contests, _bn_relu_contests, _module_contests)
    return [
        contest
        for name, config in scale.models.items()
        for part in parts
        for contest in part(name, config, scale.batch_size, device, dtype)
    ]


def test_op(entry, timed):
    timed(entry)
