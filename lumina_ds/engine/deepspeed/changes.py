"""How DeepSpeed and torch are changed: by one function that says so when what it is to change is not there.

Every other file of this package has a reason, a change, and `NEEDS`: the functions and attributes that the change
relies on. The contract test goes through all of them, so that another version fails there by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lumina_ds.errors import MachineError


@dataclass(frozen=True)
class Need:
    """One place in DeepSpeed or torch.

    `target` is "module:Class.attribute"; an attribute that only instances have counts when the class assigns it.
    `parameters` are the names of the function's first ones, separated by spaces; `contains` is text of its source.
    """

    target: str
    parameters: str = ""
    contains: str = ""

    def fault(self) -> str | None:
        """What is not as this package expects it, in one line, or None."""
        module, _, path = self.target.partition(":")
        try:
            owner: Any = import_module(module)
            *parents, last = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            if not hasattr(owner, last):
                if inspect.isclass(owner) and f"self.{last} = " in inspect.getsource(owner):
                    return None
                return f"{self.target} is not there"
        except (ImportError, AttributeError) as error:
            return f"{self.target} is not there ({error})"
        return self._difference(getattr(owner, last))

    def _difference(self, found: Any) -> str | None:
        if self.parameters:
            names = list(inspect.signature(found).parameters)[: len(self.parameters.split())]
            if names != self.parameters.split():
                return f"{self.target} takes {' '.join(names)}, not {self.parameters}"
        if self.contains and self.contains not in inspect.getsource(found):
            return f"{self.target} no longer has `{self.contains}`"
        return None


def replace(owner: Any, name: str, value: Any) -> Any:
    """Set an attribute of DeepSpeed's or torch's and return what it was; MachineError where there is none."""
    was = existing(owner, name)
    setattr(owner, name, value)
    return was


def existing(owner: Any, name: str) -> Any:
    """An attribute of DeepSpeed's or torch's; MachineError, a line that names it, where there is none."""
    if not hasattr(owner, name):
        kind = owner if inspect.isclass(owner) or inspect.ismodule(owner) else type(owner)
        raise MachineError(
            f"what is installed has no {name} in {kind.__name__} ({getattr(kind, '__module__', 'a module')}), which "
            "lumina_ds/engine/deepspeed changes; install the versions of constraints.txt, and run `lumina doctor`"
        )
    return getattr(owner, name)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the attribute is `value`."""
    # Not getattr, which unwraps the methods of classes made in C++ and binds those of instances.
    own = vars(owner).get(name)
    was = replace(owner, name, value)
    try:
        yield
    finally:
        if own is None and not inspect.isclass(owner) and not inspect.ismodule(owner):
            delattr(owner, name)
        else:
            setattr(owner, name, was if own is None else own)


def wrapped(function: Callable[..., Any], around: Callable[[], Any]) -> Callable[..., Any]:
    """`function` inside the context manager that `around` makes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with around():
            return function(*args, **kwargs)

    return call
