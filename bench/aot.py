"""Compiles the Triton kernels for GPUs that are not there, and reads what the compiled code uses.

A launcher is called on tensors without memory (device "meta"); each kernel it starts is compiled for the target with
the specialisation that a real launch would get: pointers and sizes divisible by 16, sizes equal to 1.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastvitc.kernels.gpu.triton import launches_to


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor: bytes of shared memory for a program and in all, resident warps."""

    shared: int
    shared_total: int
    warps: int


#: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA3 ISA guide.
LIMITS = {
    "sm_80": Limits(163 << 10, 164 << 10, 64),
    "sm_86": Limits(99 << 10, 100 << 10, 48),
    "sm_89": Limits(99 << 10, 100 << 10, 48),
    "sm_90": Limits(227 << 10, 228 << 10, 64),
    "sm_100": Limits(227 << 10, 228 << 10, 64),
    "sm_120": Limits(99 << 10, 100 << 10, 48),
    "gfx942": Limits(64 << 10, 64 << 10, 32),
}
_REGISTERS = 65536  # of an NVIDIA multiprocessor

#: What this process has compiled; launches of several configurations are often of one kernel.
_COMPILED: dict[tuple[str, str, str], "Kernel"] = {}

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Kernel:
    """What one compiled kernel uses: `spills` and `stack` in bytes per thread, `shared` in bytes per program.

    `channels` are those of a row that it reads.
    """

    kernel: str
    arch: str
    num_warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    resident_warps: int
    tensor_core: str
    tensor_core_instructions: int
    load_bits: int
    channels: int

    @property
    def streams(self) -> bool:
        """Whether it reads activations, with channels enough for wide loads, and not only vectors or pixels."""
        return "merge" not in self.kernel and self.channels >= 8

    @property
    def multiplies(self) -> bool:
        """Whether it is made of matrix products."""
        return self.kernel.startswith(("_attention", "_conv", "_tokens"))

    def faults(self) -> list[str]:
        """Why this kernel must not ship; empty when it may."""
        found = []
        if self.spills or self.stack:
            found.append(f"spills {self.spills} B, stack {self.stack} B")
        if self.shared > LIMITS[self.arch].shared:
            found.append(f"shared memory {self.shared} B over the limit of {LIMITS[self.arch].shared} B")
        return found


def compiled(arch: str, call: Callable[[], object]) -> Iterator[Kernel]:
    """Every kernel that `call` launches, compiled for `arch` (sm_XX or gfxXXX)."""
    launches: list[tuple] = []
    with launches_to(lambda *args, **options: launches.append((args, options)), arch):
        call()
    for args, options in launches:
        yield _compile(arch, *args, options=options)


def _target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def _compile(arch: str, kernel, grid: tuple[int, ...], *args: object, options: dict) -> Kernel:
    names = kernel.arg_names
    choices = (
        ("num_warps", "num_stages", "maxnreg") if arch.startswith("sm_") else ("num_warps", "num_stages")
    )
    launch = {k: options[k] for k in choices if k in options}
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
    values["INTERPRET"] = False
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif kernel.params[i].is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    key = arch, kernel.__name__, repr((signature, constants, attributes, launch))
    if key not in _COMPILED:
        source = ASTSource(kernel, signature, constants, attributes)
        binary = triton.compile(source, target=_target(arch), options=launch)
        read = _read_cuda if arch.startswith("sm_") else _read_hip
        _COMPILED[key] = read(kernel.__name__, arch, binary, values.get("C", values.get("D")))
    return _COMPILED[key]


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_cuda(name: str, arch: str, binary, channels: int) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))
    spills = 4 * len(re.findall(r"\b(?:STL|LDL)\b", sass))
    instructions = re.findall(r"\b(HGMMA|UTC\w*MMA|HMMA|QGMMA)\b", sass)
    widths = [
        int(bits) if bits else 32 for bits in re.findall(r"\b(?:LDG|LDGSTS)\S*?(?:\.(64|128))?\s", sass)
    ]
    return Kernel(
        name,
        arch,
        binary.metadata.num_warps,
        registers,
        spills,
        stack,
        binary.metadata.shared,
        _resident(arch, binary.metadata.num_warps, registers, binary.metadata.shared),
        instructions[0] if instructions else "",
        len(instructions),
        max(widths, default=0),
        channels,
    )


def _read_hip(name: str, arch: str, binary, channels: int) -> Kernel:
    text = binary.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    instructions = re.findall(r"\bv_mfma\w*", text)
    widths = {"dwordx4": 128, "dwordx2": 64, "dword": 32}
    loads = [widths[w] for w in re.findall(r"(?:global|buffer)_load_(dwordx4|dwordx2|dword)\b", text)]
    registers = number("vgpr_count")
    return Kernel(
        name,
        arch,
        binary.metadata.num_warps,
        registers,
        4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        number("private_segment_fixed_size"),
        binary.metadata.shared,
        min(LIMITS[arch].warps, 4 * (512 // max(registers, 1))),
        "MFMA" if instructions else "",
        len(instructions),
        max(loads, default=0),
        channels,
    )


def _resident(arch: str, num_warps: int, registers: int, shared: int) -> int:
    """Warps that a multiprocessor can hold at once."""
    limits = LIMITS[arch]
    by_registers = _REGISTERS // (32 * -(-registers // 8) * 8) // num_warps
    by_shared = limits.shared_total // (shared + 1024)
    return num_warps * min(by_registers, by_shared, limits.warps // num_warps)
