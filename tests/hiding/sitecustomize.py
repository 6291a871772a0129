"""Hides modules and their attributes from every Python process that has this folder on its path.

HIDDEN_MODULES and HIDDEN_ATTRIBUTES (module.attribute) list them, separated by spaces.
"""

import importlib
import os
import sys

MODULES = os.environ.get("HIDDEN_MODULES", "").split()
ATTRIBUTES = os.environ.get("HIDDEN_ATTRIBUTES", "").split()


class Hider:
    """A finder that stands before all others and finds none of MODULES."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """Raise what a missing module raises."""
        if name.partition(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hider)
for name in MODULES:
    sys.modules.pop(name, None)
for name in ATTRIBUTES:
    module, _, attribute = name.rpartition(".")
    loaded = importlib.import_module(module)
    if hasattr(loaded, attribute):
        delattr(loaded, attribute)
