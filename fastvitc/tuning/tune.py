"""Which backend of each op auto takes from now on: the one that was measured fastest on this device."""

from collections.abc import Mapping, Sequence

import torch

from fastvitc.errors import FastvitcError
from fastvitc.kernels import Choice, Measured, availability, measured, record
from fastvitc.kernels.choice.backends import parsed
from fastvitc.tuning.measure import CALLS, Result, Setting, compare

#: Of backends whose times differ by no more than this share, the one that comes first in the op's order is taken.
TIE = 0.02
ROUNDS = 15


def candidates(device: torch.device) -> dict[str, list[str]]:
    """{op: the backends to choose among on the device, the preferred ones first}; the reference is none of them."""
    return {
        op: [name for name, reason in backends.items() if reason is None and name != "reference"]
        for op, backends in availability(device).items()
    }


def measures_at_start(device: torch.device) -> bool:
    """Whether training measures by itself: on a GPU. On a CPU the fixed order holds until `fastvitc-tune` is run."""
    return device.type == "cuda"


def unmeasured(device: torch.device, dtype: torch.dtype, backend: Choice) -> bool:
    """Whether auto is asked for an op with several candidates, of which one at least was never measured here."""
    known, asked = measured(device, dtype), parsed(backend)
    return any(
        asked[op] == "auto"
        and len(names) > 1
        and not (op in known and known[op].milliseconds.keys() >= set(names))
        for op, names in candidates(device).items()
        if op in CALLS
    )


def fastest(results: Sequence[Result]) -> str | None:
    """The backend to take of results in the op's order of preference; None where none has a time."""
    times = {r.backend: r.milliseconds for r in results if r.milliseconds is not None}
    return next((b for b, ms in times.items() if ms <= (1 + TIE) * min(times.values())), None)


def tune(setting: Setting, rounds: int = ROUNDS) -> dict[str, list[Result]]:
    """Measure every op with a choice, record what is fastest, return {op: results in the order of preference}.

    Raises:
        FastvitcError: an op of which no backend could be measured; nothing is recorded then.
    """
    subject = {
        "model": setting.model,
        "batch_size": setting.batch_size,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "image_size": list(setting.config.image_size),
        "compile": setting.compile,
    }
    results, found = {}, {}
    for op, names in candidates(setting.device).items():
        if op not in CALLS:
            continue
        if len(names) > 1:
            results[op] = compare(setting, op, names, rounds)
        else:
            results[op] = [Result(names[0], reason="the only one; not measured")]
        best = fastest(results[op]) if len(names) > 1 else names[0]
        if best is None:
            reasons = "; ".join(f"{r.backend}: {r.reason}" for r in results[op])
            raise FastvitcError(f"{op}: no backend could be measured: {reasons}")
        times = {r.backend: None if r.milliseconds is None else round(r.milliseconds, 4) for r in results[op]}
        found[op] = Measured(best, times, subject)
    record(setting.device, setting.dtype, found)
    return results


def table(results: Mapping[str, Sequence[Result]]) -> str:
    """Results as text; the ratio is to the fastest."""
    lines = [f"{'op':<10} {'backend':<10} {'ms':>10} {'ratio':>6} {'error':>8}"]
    for op, rows in results.items():
        best = min((r.milliseconds for r in rows if r.milliseconds is not None), default=None)
        for r in rows:
            ms = "-" if r.milliseconds is None else f"{r.milliseconds:.3f}"
            ratio = "-" if r.milliseconds is None or best is None else f"{r.milliseconds / best:.2f}"
            error = "-" if r.error is None else f"{r.error:.1e}"
            lines.append(
                f"{op:<10} {r.backend:<10} {ms:>10} {ratio:>6} {error:>8}  {r.reason or ''}".rstrip()
            )
    return "\n".join(lines)
