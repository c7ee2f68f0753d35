"""Runs of the program that begin at once: forked from a process that has imported it."""

import ctypes
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

_IMPORTED = [
    "fastvitc.programs.train",
    "fastvitc.data.pil",
    "fastvitc.data.dali",
    "matplotlib.figure",
    "torch.utils.tensorboard",
]


def start(
    args: Sequence[str], env: Mapping[str, str], out: Path, preload: Path | None, network: str | None
) -> BaseProcess:
    """Begin a run in a process of its own.

    Args:
        args: the program's.
        env: the process's environment.
        out: where its output goes; errors go to the same name with ".err".
        preload: a library that is loaded before all others, by the first process that is started.
        network: the name of a network namespace to run in.
    """
    context = multiprocessing.get_context("forkserver")
    _end_foreign_server()
    context.set_forkserver_preload(_IMPORTED)
    process = context.Process(target=_run, args=([*args], {**env}, str(out), network))
    preloaded = {} if preload is None else {"LD_PRELOAD": str(preload)}
    with patch.dict(os.environ, {**env, **preloaded}, clear=True):
        process.start()
    return process


@cache
def _end_foreign_server() -> None:
    """Another test may have begun a server that has imported nothing and preloaded nothing."""
    forkserver._forkserver._stop()


def _run(args: list[str], env: dict[str, str], out: str, network: str | None) -> None:
    os.setsid()
    if network is not None:
        with open(f"/run/netns/{network}") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
    os.environ.clear()
    os.environ.update(env)
    for descriptor, name in ((1, out), (2, out + ".err")):
        file = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = ["fastvitc-train", *args]
    from fastvitc.programs import train

    train.cli()
