"""Reasoning models that think in states: operators, models, training and step-wise decoding.  (arXiv 2602.01198)

`import statecore` loads the C++ operators and nothing else. The models register themselves with transformers' Auto
classes as soon as transformers is imported, before or after: `AutoModelForCausalLM.from_pretrained` knows
state-transition checkpoints, and a program that only wants the operators does not wait for transformers.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

from . import ops

__all__ = ["ops"]
MODELS = "statecore.ssd"  # imports statecore.modeling, and so all of our models
PARTS = {MODELS, "statecore.families", "statecore.modeling", "statecore.cache", "statecore.config"}


class _ThenRegister(Loader):
    """Runs transformers' own loader, then imports our models, which register themselves."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        self.loader.exec_module(module)
        # Not from inside the models or what they are made of: those are what is importing transformers right now.
        if not PARTS & sys.modules.keys():
            importlib.import_module(MODELS)


class _WaitForTransformers(MetaPathFinder):
    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


if "transformers" in sys.modules:
    importlib.import_module(MODELS)
else:
    sys.meta_path.insert(0, _WaitForTransformers())
