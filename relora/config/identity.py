"""The identity of a run: the fields that change its results, and their hash, with a numbered scheme.

Scheme 2 hashes every such field, so a changed default changes the hash. Scheme 1 (version 0.1 and the commits after it)
left out fields that had their default. `EARLIER_DEFAULTS` has the defaults of that time, so that the folders of earlier
runs are always found. Fields that are newer than scheme 2 are in `LATER_FIELDS`.
"""

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relora.config.run import RunConfig

SCHEME = 2
"""Increase it when the same fields get another hash. `hashes` must then also return the hash of the old scheme."""

EARLIER_DEFAULTS: dict[str, Any] = {
    "model.vocab_size": None,
    "model.max_position_embeddings": 1024,
    "model.rms_norm_eps": 1e-6,
    "data.path": None,
    "data.text_field": "text",
    "data.tokenizer": None,
    "data.vocab_size": 2048,
    "data.sequence_length_tokens": 128,
    "data.validation_fraction": 0.01,
    "data.test_fraction": 0.02,
    "schedule.name": "jagged_cosine",
    "schedule.restart_warmup_steps": 0,
    "schedule.min_lr_ratio": 0.1,
    "trainer.precision": "fp32",
    "trainer.seed": 0,
    "method.warm_start_steps": 0,
    "method.warm_start_learning_rate": None,
    "method.dropout": 0.0,
    "method.reinit": "kaiming",
    "method.trainable_scaling": False,
    "method.b_rate_ratio": 1.0,
    "method.optimizer_reset.mode": "magnitude",
    "method.optimizer_reset.pruning_ratio": 0.99,
    "method.optimizer_reset.moments": "joint",
    "method.optimizer_reset.reset_step": True,
    "method.update_interval_steps": 200,
    "method.scale": 0.25,
    "optimizer.name": "adamw",
    "optimizer.embedding_learning_rate": None,
    "optimizer.weight_decay": 0.0,
    "optimizer.max_grad_norm": 1.0,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.epsilon": 1e-8,
    "optimizer.momentum": 0.95,
    "optimizer.newton_schulz_steps": 5,
}
"""Fields and values that scheme 1 left out of its hash. Never change this or add new fields."""

LATER_FIELDS: dict[str, Any] = {
    "model.kv_heads": None,
    "data.limit_tokens": None,
    "data.held_out_tokens": None,
    "data.validation_path": None,
    "data.test_path": None,
    "data.packing": "packed",
    "data.attend_across_documents": True,
    "method.square_side": "right",
}
"""Fields that are newer than scheme 2, each with the value that means what relora did before the field existed.

A field with this value is left out of the hash, so that runs from before the field keep their hash. The value is not
the default: a new default is hashed. Never change a value here. Add every new field that changes results.
"""


def canonical(config: "RunConfig") -> dict[str, Any]:
    """Return the fields that change the results of a run, by dotted name. Values with the same meaning are equal.

    Fields that have no effect with the values of the other fields are left out.
    """
    fields = config.method.canonical(_written_out(config), config)
    interval, phase_steps = config.reset_interval_steps, config.total_steps - config.method.warm_start_steps
    if interval is None or interval >= phase_steps:  # no restart happens
        fields.pop("schedule.restart_warmup_steps", None)
    for name in config.data.without_effect():
        fields.pop(f"data.{name}", None)
    # -0.0 equals 0.0, but JSON writes them differently. Adding 0.0 turns -0.0 into 0.0.
    return {name: value + 0.0 if isinstance(value, float) else value for name, value in sorted(fields.items())}


def setting(config: "RunConfig") -> dict[str, Any]:
    """Return the fields that runs of one setting share: model, data, batch and precision, but not the budget."""
    batch = ("trainer.sequences_per_step", "trainer.precision")
    return {
        name: value
        for name, value in canonical(config).items()
        if name.startswith(("model.", "data.")) or name in batch
    }


def every_field(config: "RunConfig") -> dict[str, Any]:
    """Return all fields that can change the results, by dotted name, with the values that were set.

    Fields that have their value of `LATER_FIELDS` are left out. So is `model.kv_heads` where it equals `model.heads`,
    which means the same as not setting it.
    """
    absent = object()
    fields = _flat(config, "")
    if config.model.kv_heads == config.model.heads:
        fields["model.kv_heads"] = None
    return {name: value for name, value in fields.items() if value != LATER_FIELDS.get(name, absent)}


def spelled_out(config: "RunConfig") -> dict[str, Any]:
    """Return all fields that can change the results. Fields with an effect have their values of `canonical`."""
    return {**LATER_FIELDS, **every_field(config), **canonical(config), "model.name": config.model.name}


def digest(fields: dict[str, Any]) -> str:
    """Return the hash of `fields` in the current scheme: 8 hex digits."""
    return short_hash({"scheme": SCHEME, **fields})


def hashes(config: "RunConfig") -> list[str]:
    """Return the hash of a run, followed by the hashes that earlier versions gave the same run, the latest first."""
    fields, as_set = canonical(config), _written_out(config)
    if config.reset_interval_steps is None:
        as_set.pop("schedule.restart_warmup_steps", None)
    return list(dict.fromkeys([digest(fields), _without_defaults(fields), _without_defaults(as_set)]))


def _written_out(config: "RunConfig") -> dict[str, Any]:
    """Return all fields. A budget in tokens is converted to steps, and None to the value that it means."""
    fields = every_field(config)
    fields["trainer.total_steps"] = config.total_steps
    fields |= {f"data.{name}": value for name, value in config.data.written_out().items()}
    fields |= config.method.written_out
    rates = {config.optimizer.learning_rate}
    if config.method.warm_start_steps:
        fields["method.warm_start_learning_rate"] = config.warm_start_learning_rate
        rates.add(config.warm_start_learning_rate)
    else:
        fields.pop("method.warm_start_learning_rate", None)
    if rates == {config.optimizer.embedding_learning_rate}:
        fields["optimizer.embedding_learning_rate"] = None
    return fields


def _without_defaults(fields: dict[str, Any]) -> str:
    """Return the hash of scheme 1."""
    absent = object()
    return short_hash({name: value for name, value in fields.items() if value != EARLIER_DEFAULTS.get(name, absent)})


def short_hash(values: Any) -> str:
    """8 hex digits of a value that JSON can write. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _flat(node: Any, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in dataclasses.fields(node):
        if not item.metadata.get("identity", True):
            continue
        value, name = getattr(node, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            found.update(_flat(value, name + "."))
        else:
            found[name] = value
    return found
