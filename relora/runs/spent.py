"""The machines and switches that a run's seconds were spent under, and whether those of two runs can be compared."""

from collections.abc import Mapping, Sequence
from typing import Any

from relora.config.run import RunConfig

SECONDS = "seconds"
"""The key, in a record, of what was spent under its conditions; all other keys are conditions."""
NEGLIGIBLE = 0.01
"""Conditions that took less than this share of a run's seconds do not count."""

MACHINE = ("host", "device", "cpu", "torch", "threads", "ranks")
OF_MEMORY = ("device", "ranks")
"""Of MACHINE, what peak memory depends on."""


def conditions(
    config: RunConfig, machine: Mapping[str, Any], *, sequences_per_micro_step: int | None, warm_start: bool
) -> dict[str, Any]:
    """The machine, by MACHINE's names as far as it is known, and the switches that change speed and memory alone.

    In the warm start the method's own switches do nothing, so they are left out, as is a micro-batch that is not known.
    """
    settings = config.trainer
    found = {name: machine[name] for name in MACHINE if machine.get(name) not in ("", None)}
    found["trainer.compile"] = settings.compile
    found["trainer.activation_checkpointing"] = settings.activation_checkpointing
    found["trainer.update_in_backward"] = settings.update_in_backward
    if sequences_per_micro_step is not None:
        found["trainer.sequences_per_micro_step"] = sequences_per_micro_step
    return found if warm_start else {**found, **config.method.switches}


def spend(record: list[dict[str, Any]], under: Mapping[str, Any], seconds: float) -> None:
    """Add `seconds` to the entry of `record` with these conditions, which is made where there is none."""
    for entry in record:
        if {name: value for name, value in entry.items() if name != SECONDS} == under:
            entry[SECONDS] += seconds
            return
    record.append({**under, SECONDS: seconds})


def differences(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], *, memory: bool = False) -> str:
    """Why the seconds (with `memory`, the peak memory) of two runs cannot be compared, in words; "" where they can.

    Conditions that one of the two does not have, or that are not known, are not compared.
    """
    machine, switches = dict[str, str](), dict[str, str]()
    for a in _that_count(one):
        for b in _that_count(other):
            for name in a.keys() & b.keys() - {SECONDS}:
                if a[name] == b[name] or (memory and name in MACHINE and name not in OF_MEMORY):
                    continue
                (machine if name in MACHINE else switches)[name] = f"{name} {a[name]} against {b[name]}"
    parts = [
        f"{what} ({', '.join(told for _, told in sorted(found.items()))})"
        for what, found in (("another machine or device", machine), ("other switches", switches))
        if found
    ]
    return "; ".join(parts)


def other_switches(config: RunConfig, record: Sequence[Mapping[str, Any]]) -> str:
    """What a finished run's switches were against those that `config` asks for now, in words; "" where they are equal.

    A micro-batch counts where it was larger than `config` allows: several ranks, or too little memory, make it smaller.
    """
    most = config.trainer.sequences_per_micro_step
    taken = max((entry.get("trainer.sequences_per_micro_step", 0) for entry in record), default=0)
    size = most if most is not None and taken > most else None
    return differences(
        record, [{**conditions(config, {}, sequences_per_micro_step=size, warm_start=False), SECONDS: 1.0}]
    )


def _that_count(record: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    whole = sum(entry[SECONDS] for entry in record)
    return [entry for entry in record if entry[SECONDS] >= NEGLIGIBLE * whole]
