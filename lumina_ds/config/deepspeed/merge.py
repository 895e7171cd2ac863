"""How the run's settings and a user's DeepSpeed JSON come together: imposed, proposed, and where they contradict."""

from __future__ import annotations

from typing import Any

from lumina_ds.config.deepspeed.tree import AUTO


class Merger:
    """Writes the run's settings over a user's file and notes where the two contradict."""

    def __init__(self, merged: dict[str, Any], source: str) -> None:
        self.merged = merged
        self.source = source
        self.faults: list[str] = []

    def impose(self, path: str, value: Any, owner: str) -> None:
        """Set what belongs to the run; a different value in the file is a fault that names the run's `owner`."""
        section, key = self._place(path)
        found = section.get(key, AUTO)
        if found not in (AUTO, None) and found != value:
            self.faults.append(
                f"{self.source}: {path} is {found!r}, but the run has {value!r} ({owner}); "
                'change one of them, or set the file\'s to "auto"'
            )
        section[key] = value

    def propose(self, path: str, value: Any) -> None:
        """Set what the file leaves open."""
        section, key = self._place(path)
        if section.get(key, AUTO) == AUTO:
            section[key] = value

    def _place(self, path: str) -> tuple[dict[str, Any], str]:
        *parents, key = path.split(".")
        section = self.merged
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        return section, key
