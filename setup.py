"""Package metadata. `fastvitc/kernels` is a symlink to `kernels`, so the ops are packaged as `fastvitc.kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

peers = ["timm>=1.0.15"]
runtimes = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5", "openvino>=2025.0"]
dali = ["nvidia-dali-cuda130>=2.4; platform_system == 'Linux'"]
wandb = ["wandb>=0.18"]
xformers = ["xformers>=0.0.33; platform_system == 'Linux'"]
test = [
    "hypothesis>=6.100",
    "import-linter>=2.1",
    "pytest>=8.2",
    "pytest-benchmark>=5.1",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "setuptools>=77",
    *peers,
    *runtimes,
    *dali,
]

setup(
    name="fastvitc",
    version="0.1.0",
    description="Vision Transformers with an early-convolution stem: exact models, fused ops, fast training",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["fastvitc", "fastvitc.*"]),
    package_data={"fastvitc": ["py.typed"], "": ["*.cpp", "*.h"]},
    python_requires=">=3.10",
    install_requires=[
        "matplotlib>=3.8",
        "ninja>=1.11",
        "numpy>=1.26",
        "pillow>=10",
        "pyyaml>=6",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "tensorboard>=2.16",
        "torch>=2.9",
        "torchvision>=0.24",
        "tqdm>=4.66",
        "triton>=3.5; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "tyro>=0.9",
    ],
    extras_require={
        "dali": dali,
        "xformers": xformers,
        "timm": peers,
        "wandb": wandb,
        "bench": [*peers, *runtimes, "fonttools>=4.50"],
        "test": test,
        "dev": [*test, "ruff>=0.9", "build>=1.2"],
    },
    entry_points={
        "console_scripts": [
            "fastvitc-train=fastvitc.programs.train:cli",
            "fastvitc-evaluate=fastvitc.programs.evaluate:cli",
            "fastvitc-info=fastvitc.programs.info:cli",
            "fastvitc-tune=fastvitc.programs.tune:cli",
        ]
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
