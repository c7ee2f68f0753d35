"""How a command-line program begins and ends: settings from its flags, one message and an exit code for what a user can
mend, a traceback for a bug."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import tyro

from fastvitc.errors import FastvitcError, Interrupted
from fastvitc.kernels import BackendUnavailable

Settings = TypeVar("Settings")
_NO_MEMORY = "can't allocate memory"  # PyTorch's words for a CPU


def run_command(name: str, body: Callable[[], None]) -> None:
    """Run a program's body; exit 1 for a failure and 2 for a usage error, with one line on stderr.

    Without a word exit 141 where nobody reads the output any more, as other programs do by SIGPIPE.
    """
    try:
        try:
            body()
        finally:
            sys.stdout.flush()  # a reader that has gone shows here, not at the interpreter's end
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `head` does. What is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Interrupted as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        sys.exit(stopped.exit_code)
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
    except (MemoryError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "no more memory"
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _NO_MEMORY in str(error)):
            raise
        print(
            f"{name}: error: out of memory: {reason}. A smaller --batch-size needs less; --grad-accum-steps keeps "
            "the images of an optimiser step, --grad-checkpointing takes time for memory",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def parse(
    settings: type[Settings], name: str, args: Sequence[str] | None = None, default: Settings | None = None
) -> Settings:
    """Settings from the command line over defaults; prints help or the usage error and exits by itself."""
    extra = {} if default is None else {"default": default}
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs, tyro.conf.DisallowNone)
    return tyro.cli(settings, prog=name, args=args, config=config, **extra)
