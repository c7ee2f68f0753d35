"""How a command-line program ends: one message and an exit code for what a user can mend, a traceback for a bug."""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from fastvitc.errors import FastvitcError
from fastvitc.kernels import BackendUnavailable

Settings = TypeVar("Settings")


def run_command(name: str, body: Callable[[], None]) -> None:
    """Run a program's body; exit 1 for a failure and 2 for a usage error, with one line on stderr."""
    # torch.compile for a CPU looks for CUDA and warns that there is a toolkit but no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        body()
    except FastvitcError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BackendUnavailable as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno is None:
            raise
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def parse(
    settings: type[Settings], name: str, args: Sequence[str] | None = None, default: Settings | None = None
) -> Settings:
    """Settings from the command line over defaults; prints help or the usage error and exits by itself."""
    extra = {} if default is None else {"default": default}
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs)
    return tyro.cli(settings, prog=name, args=args, config=config, **extra)
