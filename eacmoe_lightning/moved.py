"""Old module names: class paths in configs of earlier versions keep working after their modules have moved."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "eacmoe_lightning.checkpoint_io": "eacmoe_lightning.job.checkpoint_io",
    "eacmoe_lightning.data": "eacmoe_lightning.job.data",
    "eacmoe_lightning.qesc": "eacmoe_lightning.job.qesc",
    "eacmoe_lightning.recipe": "eacmoe_lightning.calibration.recipe",
    "eacmoe_lightning.router_loss": "eacmoe_lightning.routers.losses",
}


class MovedModules(MetaPathFinder, Loader):
    """Imports a module of `MOVED` under its old name; the result is the same module object as under the new name."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(MOVED[module.__name__])


def keep_old_names() -> None:
    """Makes the old names importable."""
    sys.meta_path.append(MovedModules())
