"""Packages whose public names are imported on first use, so that importing a package costs only what is used of it."""

import ast
import importlib
import inspect
import sys
import types
from typing import Any

from effscale.extras import EXTRAS, missing


def lazy_package(name: str) -> None:
    """Import the public names of a package on first use.

    The package's ``__init__.py`` lists them once, as imports that only type checkers execute, and in ``__all__``::

        from typing import TYPE_CHECKING

        from effscale.lazy import lazy_package

        if TYPE_CHECKING:
            from effscale.optim.lamb import LambState, lamb

        __all__ = ["LambState", "lamb"]

        lazy_package(__name__)

    A function may have the name of its module: after ``import effscale.optim.lamb``, ``effscale.optim.lamb`` is the function, as if the
    package had imported it.

    Args:
        name: ``__name__`` of the package, at the end of its ``__init__.py``.
    """
    package = sys.modules[name]
    package.__class__ = _LazyPackage


class _LazyPackage(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and name in self.__all__:
            try:
                module = importlib.import_module(self._module_of(name))
            except ModuleNotFoundError as error:
                lacking = (error.name or "").partition(".")[0]
                if lacking in EXTRAS:
                    raise missing(f"{self.__name__}.{name}", lacking) from error
                raise
            setattr(self, name, getattr(module, name))
            return self.__dict__[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # Once a submodule is imported, Python sets it as an attribute of its package.
        if isinstance(value, types.ModuleType) and name in self.__all__:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})

    def _module_of(self, name: str) -> str:
        if "_modules" not in self.__dict__:
            imports = ast.walk(ast.parse(inspect.getsource(self)))
            self.__dict__["_modules"] = {
                alias.name: statement.module
                for statement in imports
                if isinstance(statement, ast.ImportFrom)
                for alias in statement.names
            }
        return self.__dict__["_modules"][name]
