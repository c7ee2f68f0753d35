"""Whole training steps on the Triton kernels, in the interpreter where there is no GPU, against the reference."""

import few_steps
import pytest
import torch

from fastvitc import StemConfig, VisionTransformer, ViTConfig, create_model
from fastvitc.kernels import Layers, attention, bn_relu, conv_stem

pytestmark = pytest.mark.slow
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Small enough for the interpreter.
SMALL = ViTConfig(
    StemConfig((16, 32, 32), (3, 3, 1), (2, 2, 1)),
    32,
    64,
    heads=2,
    depth=2,
    image_size=(16, 16),
    num_classes=10,
)
CONFIG = few_steps.NANO if DEVICE.type == "cuda" else SMALL
IMAGES = torch.randint(256, (2, 3, *CONFIG.image_size), generator=torch.Generator().manual_seed(0))
IMAGES = IMAGES.to(DEVICE, torch.uint8)
BATCH = [(IMAGES, torch.tensor([1, 4], device=DEVICE))]


def trained(backend, optimizer, lr, steps, dtype=torch.float32, compile=False):
    options = {"dtype": dtype, "compile": compile, "config": CONFIG}
    return few_steps.trained(BATCH * steps, backend, optimizer, lr, **options)


def test_three_steps_end_at_the_weights_and_statistics_of_the_reference():
    (_, expected), (_, found) = (trained(backend, "sgd", 0.05, 3) for backend in ("reference", "triton"))
    for (name, e), f in zip(expected.state_dict().items(), found.state_dict().values(), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    moved = VisionTransformer(CONFIG).stem.norms[0].running_mean
    assert not torch.equal(found.stem.norms[0].running_mean.cpu(), moved)


def test_ten_steps_follow_the_loss_curve_of_the_reference():
    expected, found = (torch.tensor(trained(b, "adamw", 1e-3, 10)[0]) for b in ("reference", "triton"))
    assert (found - expected).abs().max() < 2e-3
    assert found[-1] < found[0] / 2


def test_bfloat16_steps_stay_near_the_float32_curve():
    expected = torch.tensor(trained("reference", "adamw", 1e-3, 2)[0])
    found = torch.tensor(trained("triton", "adamw", 1e-3, 2, torch.bfloat16)[0])
    assert (found - expected).abs().max() < 0.1


def test_a_step_compiles_its_stem_and_one_block_and_nothing_in_the_next_step():
    torch.compiler.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled, _ = trained("triton", "adamw", 1e-3, 2, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 2
    eager, _ = trained("reference", "adamw", 1e-3, 2)
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_float64_is_refused_before_any_launch():
    qkv = torch.zeros(1, 4, 48, dtype=torch.float64, device=DEVICE)
    x, vector = torch.zeros(2, 3, 4, 4, dtype=torch.float64, device=DEVICE), torch.ones(3, device=DEVICE)
    image, weight = (
        torch.zeros(2, 3, 8, 8, dtype=torch.float64, device=DEVICE),
        torch.zeros(4, 3, 4, 4).double(),
    )
    weight = weight.to(DEVICE)
    layers = Layers([], [], [], [], [], weight, weight[:, 0, 0, 0], (4,), (0,))
    calls = (
        lambda: attention(qkv, 1, backend="triton"),
        lambda: bn_relu(x, vector, vector, vector, vector, backend="triton"),
        lambda: conv_stem(image, layers, backend="triton"),
    )
    for call in calls:
        with pytest.raises(TypeError, match="triton backend takes float32, float16 or bfloat16"):
            call()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CUDA graph is captured on a GPU")
def test_a_captured_step_replays_to_the_gradients_of_an_eager_one():
    model = create_model("vitc_nano", num_classes=10, backend="triton").to(DEVICE)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    image = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, device=DEVICE)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            return torch.autograd.grad(model(image).float().square().sum(), list(model.parameters()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for e, f in zip(expected, captured, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-2, atol=1e-2)
