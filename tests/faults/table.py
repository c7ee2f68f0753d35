"""All rows, and the table of what they found."""

from collections.abc import Sequence

from . import (
    cache,
    checkpoints,
    disk,
    divergence,
    exact,
    images,
    kills,
    network,
    ranks,
    saves,
    signals,
    steady,
)
from .row import Outcome, Row

ROWS = {
    row.name: row
    for row in [
        Row(
            "sigkill",
            "A run that is killed at random times and started again ends as the undisturbed one, bit for bit",
            kills.sigkill,
            200,
        ),
        Row(
            "save-kill",
            "A kill inside a write, fsync or rename of a save leaves the old state or the new one, and the run goes on",
            saves.save_kill,
            1000,
            warm=True,
        ),
        Row(
            "bit-exact",
            "A run that is cut within an epoch and resumed equals the undisturbed one, bit for bit",
            exact.exact,
            32,
        ),
        Row(
            "signals",
            "SIGTERM, SIGUSR1 and Ctrl-C end a run after its step, which is saved, with 75, 75 and 130",
            signals.stopped,
            10,
        ),
        Row("second-interrupt", "A second Ctrl-C ends a run at once", signals.second_interrupt, 10),
        Row("rank-crash", "Where one of two processes is killed the other ends too", ranks.rank_crash, 10),
        Row(
            "restarted-ranks",
            "Under torchrun --max-restarts 2, two processes of which one is killed end as the undisturbed run",
            ranks.restarted,
            4,
        ),
        Row(
            "corrupt",
            "Images that cannot be read are replaced, counted and listed, and end no run below --bad-share",
            images.corrupt,
            3,
        ),
        Row("corpus", "The same holds for Pillow's own broken images", images.corpus, 3),
        Row(
            "not-finite",
            "A run whose numbers are not finite ends with a message, and every state that is kept is finite",
            divergence.diverged,
            30,
        ),
        Row(
            "disk-full",
            "A full disk ends a run with one line; with more space it goes on and ends as the undisturbed one",
            disk.disk_full,
            10,
            mounts=True,
        ),
        Row(
            "read-only",
            "An output folder that cannot be written to ends a run with one line",
            disk.read_only,
            2,
            mounts=True,
        ),
        Row(
            "damaged",
            "A state that is cut or flipped is never loaded as another; the one before it is taken",
            checkpoints.damaged,
            50,
        ),
        Row(
            "malicious",
            "A pickle in place of a state is refused, and its code is not executed",
            checkpoints.malicious,
            3,
        ),
        Row(
            "foreign-cache",
            "Kernels in a cache folder that others can write to are not loaded",
            cache.foreign_cache,
            4,
        ),
        Row(
            "memory",
            "The resident memory of a run and its workers does not grow over the epochs",
            steady.memory,
            30,
        ),
        Row("recompiled", "A compiled run compiles nothing after its first epoch", steady.recompiled, 4),
        Row(
            "lost-machine",
            "Where the process on another machine is killed this one's ends, with one line",
            network.peer_killed,
            10,
            mounts=True,
        ),
        Row(
            "link-down",
            "A link that is down for some seconds changes nothing",
            network.link_down,
            2,
            mounts=True,
        ),
    ]
}


def table(results: Sequence[tuple[Row, Outcome | str]]) -> str:
    """The table in Markdown; a result that is text says why the row was not run."""
    lines = ["| | claim | N | held | found |", "|---|---|---|---|---|"]
    for row, result in results:
        if isinstance(result, str):
            lines.append(f"| {row.name} | {row.claim} | 0 | not run | {result} |")
        else:
            found = result.words.replace("|", "\\|")
            held = "yes" if result.held else "**no**"
            lines.append(f"| {row.name} | {row.claim} | {result.trials} | {held} | {found} |")
    return "\n".join(lines)
