"""The machines and switches under which a run spent its seconds, and whether two runs can be compared by them."""

from collections.abc import Mapping, Sequence
from typing import Any

from relora.config.run import RunConfig

SECONDS = "seconds"
"""The key of the seconds in an entry of a record. All other keys of the entry are conditions."""
NEGLIGIBLE = 0.01
"""Conditions are ignored if they hold for less than this share of a run's seconds."""

MACHINE = ("host", "device", "cpu", "torch", "threads", "ranks")
MICRO_STEP, CHOSEN = "trainer.sequences_per_micro_step", "chosen_to_fit"
"""The sequences in a micro-step, and whether relora has chosen this number to fit the device's memory.

A method that needs less memory may have larger micro-steps on the same device, and this is a part of its speed. So
chosen numbers are no reason against a comparison of seconds. They are one against a comparison of peak memory.
"""
CONDITIONS_OF_MEMORY = ("device", "ranks")
"""The names in MACHINE that peak memory depends on."""


def conditions(
    config: RunConfig, machine: Mapping[str, Any], *, sequences_per_micro_step: int | None, warm_start: bool
) -> dict[str, Any]:
    """Return the conditions of training seconds: the machine, and the switches that change only speed and memory.

    Args:
        config: The run's config.
        machine: The machine, by the names in MACHINE. Unknown values are left out.
        sequences_per_micro_step: The sequences in one micro-step. None, for an unknown number, is left out.
        warm_start: Whether the seconds belong to the warm start. The method's own switches have no effect there, so
            they are left out.
    """
    settings = config.trainer
    found = {name: machine[name] for name in MACHINE if machine.get(name) not in ("", None)}
    found["trainer.compile"] = settings.compile
    found["trainer.activation_checkpointing"] = settings.activation_checkpointing
    found["trainer.update_in_backward"] = settings.update_in_backward
    if sequences_per_micro_step is not None:
        found[MICRO_STEP] = sequences_per_micro_step
        if settings.sequences_per_micro_step is None:
            found[CHOSEN] = True
    return found if warm_start else {**found, **config.method.switches}


def spend(record: list[dict[str, Any]], under: Mapping[str, Any], seconds: float) -> None:
    """Add seconds to the entry with these conditions.

    Args:
        record: The entries. It is changed in place, and gets a new entry if none has these conditions.
        under: The conditions.
        seconds: The training seconds to add.
    """
    for entry in record:
        if {name: value for name, value in entry.items() if name != SECONDS} == under:
            entry[SECONDS] += seconds
            return
    record.append({**under, SECONDS: seconds})


def differences(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], *, memory: bool = False) -> str:
    """Explain why two runs cannot be compared by their seconds.

    A condition is compared only if both runs have it.

    Args:
        one: The record of one run.
        other: The record of the other run.
        memory: Compare what peak memory depends on, instead of what seconds depend on.

    Returns:
        The reason as text for the user; "" if the runs can be compared.
    """
    machine, switches = dict[str, str](), dict[str, str]()
    for a in _with_training(one):
        for b in _with_training(other):
            both_chosen = CHOSEN in a and CHOSEN in b
            for name in a.keys() & b.keys() - {SECONDS}:
                if name == MICRO_STEP and both_chosen and not memory:
                    continue
                if a[name] == b[name] or (memory and name in MACHINE and name not in CONDITIONS_OF_MEMORY):
                    continue
                (machine if name in MACHINE else switches)[name] = f"{name} {a[name]} against {b[name]}"
    parts = [
        f"{what} ({', '.join(told for _, told in sorted(found.items()))})"
        for what, found in (("another machine or device", machine), ("other switches", switches))
        if found
    ]
    return "; ".join(parts)


def other_switches(config: RunConfig, record: Sequence[Mapping[str, Any]]) -> str:
    """List the switches of a finished run that differ from those in `config`, as text; "" if all are equal.

    The size of the micro-step is compared only if it was larger than `config` allows. A smaller one is no difference,
    because several processes or too little memory make it smaller.
    """
    most = config.trainer.sequences_per_micro_step
    taken = max((entry.get(MICRO_STEP, 0) for entry in record), default=0)
    size = most if most is not None and taken > most else None
    return differences(
        record, [{**conditions(config, {}, sequences_per_micro_step=size, warm_start=False), SECONDS: 1.0}]
    )


def _with_training(record: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    whole = sum(entry[SECONDS] for entry in record)
    return [entry for entry in record if entry[SECONDS] >= NEGLIGIBLE * whole]
