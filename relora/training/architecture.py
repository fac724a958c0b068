"""Exported models that are no plain Llama: their modelling file in the folder, and our own classes that load them."""

import json
import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM

from relora.common.errors import ConfigError
from relora.methods.registry import METHODS

if TYPE_CHECKING:
    from relora.config.run import RunConfig

CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What makes an exported model other than a plain Llama."""

    model_type: str
    module: ModuleType
    """It defines the model's classes (AUTO_CLASSES) and needs torch and transformers only."""
    config: dict[str, Any]
    """More entries of config.json."""

    @classmethod
    def of(cls, run: "RunConfig") -> "Architecture | None":
        """Return the architecture that the method of a run exports. None for a plain Llama."""
        method = run.method
        if method.model_type is None or method.modelling_module is None:
            return None
        return cls(
            model_type=method.model_type,
            module=import_module(method.modelling_module),
            config=method.exported_config(run),
        )

    def write(self, folder: Path) -> None:
        """Copy the modelling file into `folder`, and name it and its classes in the config.json there."""
        source = Path(self.module.__file__ or "")
        shutil.copyfile(source, folder / source.name)
        classes = self.module.AUTO_CLASSES
        config = json.loads((folder / CONFIG).read_text())
        config |= {
            **self.config,
            "model_type": self.model_type,
            "architectures": [classes["AutoModelForCausalLM"].__name__],
            "auto_map": {auto: f"{source.stem}.{kind.__name__}" for auto, kind in classes.items()},
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def register_own_classes(folder: Path) -> None:
    """Let transformers load the model in `folder` with the classes of the method that exports its model_type.

    Does nothing for other models. The folder's own modelling file is not run.
    """
    try:
        model_type = json.loads((folder / CONFIG).read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return  # the loading itself reports a wrong file
    for name in METHODS.names():
        try:
            kind = METHODS.find(name)
        except ConfigError:
            continue  # a package that cannot be loaded
        if kind.model_type is not None and kind.model_type == model_type and kind.modelling_module is not None:
            classes = import_module(kind.modelling_module).AUTO_CLASSES
            AutoConfig.register(model_type, classes["AutoConfig"], exist_ok=True)
            AutoModelForCausalLM.register(classes["AutoConfig"], classes["AutoModelForCausalLM"], exist_ok=True)
