"""What the Triton kernels share, and whether they can run. This file imports without Triton."""

from importlib.util import find_spec


def no_triton(device_type: str) -> str | None:
    """Why Triton kernels cannot run on a device type, None when they can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device_type == "cuda":
        return None
    from fastvitc.kernels.gpu.triton import INTERPRET  # imports Triton

    if device_type == "cpu" and INTERPRET:
        return None
    return "Triton kernels need a GPU (or, to test them slowly on a CPU, TRITON_INTERPRET=1)"
