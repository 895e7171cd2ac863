"""How far a mixture has come, and by which weights: all that a checkpoint keeps of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Reached(_Part):
    """A position of the mixture, with the rows and tokens of each source that stand before it."""

    position: NonNegativeInt
    rows: dict[str, NonNegativeInt]
    tokens: dict[str, NonNegativeInt]


class Stretch(_Part):
    """Where the mixture goes by these weights; the last stretch has no end. `caps` are rows in the whole run, None for
    no cap."""

    begins: Reached
    weights: dict[str, Weight]
    caps: dict[str, NonNegativeInt | None]

    def shares(self) -> dict[str, float]:
        """Share of the tokens of each source, in its name's order."""
        total = sum(self.weights.values())
        return {name: weight / total for name, weight in self.weights.items()}


class MixtureState(_Part):
    """The stretches up to now, and the position that was reached."""

    stretches: Annotated[list[Stretch], Field(min_length=1)]
    reached: Reached

    @model_validator(mode="after")
    def _belongs_together(self) -> MixtureState:
        """A manifest may come from anywhere: the same sources throughout, some with a weight, from position 0 on."""
        names = set(self.reached.rows)
        places = [*(each.begins for each in self.stretches), self.reached]
        keys = [set(table) for place in places for table in (place.rows, place.tokens)]
        keys += [set(table) for each in self.stretches for table in (each.weights, each.caps)]
        if not names or any(each != names for each in keys):
            raise ValueError("its parts name different sources")
        if not all(sum(each.weights.values()) > 0 for each in self.stretches):
            raise ValueError("a stretch has no source with a weight")
        positions = [place.position for place in places]
        if (
            positions[0] != 0
            or positions != sorted(positions)
            or any(sum(p.rows.values()) != p.position for p in places)
        ):
            raise ValueError("its positions are not those of its rows")
        return self
