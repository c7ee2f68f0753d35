"""The backend `xformers` against a stand-in for xFormers' two functions with their layouts and checks."""

import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch
from oracle import outputs_and_gradients

from fastvitc.kernels import BackendUnavailable, attention
from fastvitc.kernels.attention import _BACKENDS

MODULE = "fastvitc.kernels.attention.xformers"


class Fmha(ModuleType):
    """(B, T, N, D) tensors; a log-sum-exp (B, N, T padded to a multiple of 32); gradients packed as q, k, v are."""

    padding, shared = 32, True

    def __init__(self):
        super().__init__("xformers.ops.fmha")
        self.seen = []

    def check(self, q, k, v):
        if q.shape[-1] % 8:
            raise NotImplementedError("No operator found for\n    `query.shape[-1] % 8 != 0`")
        assert q.dim() == 4
        assert q.shape == k.shape == v.shape
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        self.seen.append({t.untyped_storage().data_ptr() for t in (q, k, v)})

    def memory_efficient_attention_forward_requires_grad(self, query, key, value, *, scale):
        self.check(query, key, value)
        q, k, v = (t.transpose(1, 2).float() for t in (query, key, value))
        scores = scale * q @ k.mT
        lse = scores.logsumexp(-1)
        out = (scores.softmax(-1) @ v).transpose(1, 2).to(query.dtype)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % self.padding), value=torch.inf)

    def memory_efficient_attention_backward(self, grad, output, lse, query, key, value, *, scale):
        self.check(query, key, value)
        assert grad.shape == output.shape == query.shape
        assert grad.is_contiguous()
        assert lse.dtype == torch.float32
        assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
        q, k, v, do, o = (t.transpose(1, 2).float() for t in (query, key, value, grad, output))
        p = (scale * q @ k.mT - lse.unsqueeze(-1)).exp()
        ds = scale * p * (do @ v.mT - (do * o).sum(-1, keepdim=True))
        found = [g.transpose(1, 2).to(query.dtype) for g in (ds @ k, ds.mT @ q, p.mT @ do)]
        if not self.shared:
            return tuple(found)
        self.packed = torch.stack(found, dim=2)
        return self.packed.unbind(2)


@pytest.fixture
def fmha(monkeypatch):
    fake = Fmha()
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.fmha = fake
    for name, module in {"xformers": package, "xformers.ops": ops, "xformers.ops.fmha": fake}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setitem(_BACKENDS.unavailable, "xformers", lambda device_type: None)
    yield fake
    sys.modules.pop(MODULE, None)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [1, 32, 50])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients_equal_the_references(fmha, shared, tokens, scale):
    fmha.shared = shared
    qkv, grad = torch.randn(2, tokens, 3 * 3 * 16), torch.randn(2, tokens, 3 * 16)
    expected, found = (
        outputs_and_gradients(lambda x, b=b: attention(x, 3, scale=scale, backend=b), [qkv], [grad])
        for b in ("reference", "xformers")
    )
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e)


def test_it_reads_the_packed_projection_in_place_and_copies_no_packed_gradient(fmha):
    module = import_module(MODULE)
    qkv, dout = torch.randn(2, 5, 3 * 32), torch.randn(1, 1, 32).expand(2, 5, 32)
    out, lse = module.forward(qkv, 2, 0.25)
    assert out.shape == (2, 5, 32)
    assert lse.shape == (2, 2, 5)
    assert all(t.is_contiguous() for t in (out, lse))
    dqkv = module.backward(dout, qkv, out, lse, 2, 0.25)
    assert fmha.seen == [{qkv.data_ptr()}] * 2
    assert dqkv.data_ptr() == fmha.packed.data_ptr()
    assert dqkv.is_contiguous()
    assert dqkv.shape == qkv.shape


def test_registration_passes_opcheck(fmha):
    qkv = torch.randn(2, 5, 48, requires_grad=True)
    torch.library.opcheck(torch.ops.fastvitc.attention.default, (qkv, 2, 0.3, "xformers"))


def test_it_compiles_as_one_graph(fmha):
    def run(x):
        return attention(x, 2, backend="xformers")

    qkv = torch.randn(2, 5, 96)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for e, f in zip(outputs_and_gradients(run, [qkv]), outputs_and_gradients(compiled, [qkv]), strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize(
    "qkv", [torch.zeros(1, 2, 3 * 16, dtype=torch.float64), torch.zeros(1, 2, 3 * 2 * 6)], ids=["f64", "6"]
)
def test_an_input_that_it_does_not_take_is_refused(fmha, qkv):
    with pytest.raises(
        BackendUnavailable, match=r"xFormers does not take torch.float.* use the backend torch"
    ):
        attention(qkv, 2, backend="xformers")


def test_an_input_that_none_of_its_kernels_takes_is_refused_in_one_line(fmha):
    with pytest.raises(
        BackendUnavailable, match="xFormers has no kernel for this input: No operator"
    ) as raised:
        attention(torch.zeros(1, 2, 3 * 2 * 4), 2, backend="xformers")
    assert "\n" not in str(raised.value)
