import subprocess
import sys

import pytest

PRINTS = """
from fastvitc.programs.command import run_command
run_command("program", lambda: [print("line", i) for i in range(100_000)])
"""


def test_a_reader_that_has_seen_enough_ends_the_program_without_a_word():
    program = subprocess.Popen(
        [sys.executable, "-c", PRINTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout.readline() == "line 0\n"
    program.stdout.close()
    error = program.stderr.read()
    program.stderr.close()
    assert (program.wait(60), error) == (141, "")


COMPILES = """
import torch, fastvitc
layer = fastvitc.Mlp(8, 16)
torch.compile(layer, fullgraph=True)(torch.zeros(2, 8)).sum().backward()
print(fastvitc.convert.to_timm.__name__)
"""


def test_compiling_on_a_cpu_says_nothing_of_cuda_and_the_converters_come_with_the_package():
    done = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "to_timm\n"), done.stderr
    assert "CUDA" not in done.stderr


NO_MEMORY = """
import resource
import torch
from fastvitc.programs.command import run_command
resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
run_command("program", lambda: torch.empty(2**35, dtype=torch.uint8))
"""


@pytest.mark.parametrize(
    "code", [NO_MEMORY, NO_MEMORY.replace("torch.empty(2**35, dtype=torch.uint8)", "bytes(2**35)")]
)
def test_no_memory_is_one_line_that_says_what_needs_less(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.startswith("program: error: out of memory: ")
    assert "--batch-size" in done.stderr
    assert len(done.stderr.splitlines()) == 1
