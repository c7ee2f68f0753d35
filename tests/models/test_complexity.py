import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvitc import complexity, create_model, list_models
from fastvitc.models.complexity import stem_complexity

# Parameters, GFLOPs, million activations; and the stem's MFLOPs, parameters and million activations.
ORACLE = {
    "vitp_1gf": (4_830_376, "1.0831", "5.521", "28.9", 147_648, "0.038"),
    "vitc_1gf": (4_567_936, "1.0792", "5.628", "112.9", 256_152, "0.602"),
    "vitp_4gf": (18_507_112, "3.9090", "11.040", "57.9", 295_296, "0.075"),
    "vitc_4gf": (17_754_136, "3.9657", "11.256", "435.4", 1_021_488, "1.204"),
    "vitp_18gf": (86_567_656, "17.5803", "23.896", "115.8", 590_592, "0.151"),
    "vitc_18gf": (81_573_160, "17.7266", "24.024", "1717.4", 2_683_968, "2.258"),
    "vitp_36gf": (178_364_392, "35.9972", "37.137", "154.3", 787_456, "0.201"),
    "vitc_36gf": (167_796_008, "35.0258", "36.606", "1743.1", 2_815_296, "2.308"),
}


@pytest.mark.parametrize("name", ORACLE)
def test_counts_equal_the_oracle_to_the_printed_digits(name):
    whole, stem = complexity(name, image_size=224), stem_complexity(name)
    assert (
        whole.params,
        f"{whole.flops / 1e9:.4f}",
        f"{whole.acts / 1e6:.3f}",
        f"{stem.flops / 1e6:.1f}",
        stem.params,
        f"{stem.acts / 1e6:.3f}",
    ) == ORACLE[name]


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_params_equal_the_built_models(name, pool):
    with torch.device("meta"):
        model = create_model(name, pool=pool, num_classes=10, backend="torch")  # whose ops it knows
    assert complexity(model).params == sum(p.numel() for p in model.parameters())


def bias_additions(model, image_size):
    """What the counter of PyTorch leaves out: bias additions of convolutions and linear layers."""
    total = 0

    def count(module, _, output):
        nonlocal total
        if getattr(module, "bias", None) is not None:
            total += output.numel()

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    with torch.device("meta"):
        model(torch.zeros(1, model.config.in_chans, *image_size))
    tokens = model.config.grid[0] * model.config.grid[1]
    return total + tokens * model.config.width  # the stem's closing convolution


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("scale", [(1, 1), (1, 2)])
def test_flops_agree_with_the_counter_of_pytorch(name, scale):
    stride = 8 if "nano" in name else 16
    image_size = (4 * stride * scale[0], 4 * stride * scale[1])
    with torch.device("meta"):
        model = create_model(name, image_size=image_size, backend="torch").eval()  # whose ops it knows
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, *image_size))
    expected = counter.get_total_flops() // 2 + bias_additions(model, image_size)
    assert complexity(model).flops == expected
    assert complexity(name, image_size=image_size).flops == expected


def test_counts_are_integers():
    counts = complexity("vitc_nano")
    assert all(type(value) is int for value in (counts.params, counts.flops, counts.acts))
