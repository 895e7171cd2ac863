"""The sources of a mixture and the named evaluation sets, as `data.sources` and `data.eval_sets` hold them.

An entry is a mapping; on the command line it may be one text, name=chats,paths=chats.jsonl,weight=2, in which `paths`
may stand several times. What contradicts itself within an entry or among them is mixture_checks.py's.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# Of the three, a source has one at most.
AmountKind = Literal["weight", "tokens", "repeats"]
AMOUNTS: tuple[AmountKind, ...] = ("weight", "tokens", "repeats")
# What data.eval_data, data.eval_shards or the held-out part is called beside named sets, and the mean of all sets.
PLAIN_EVAL_SET, MEAN_OF_SETS = "eval", "mean"

_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def as_list(value: Any) -> Any:
    """Accept one path, or several separated by commas, where a list of paths is wanted."""
    if isinstance(value, str):
        return [part for part in value.split(",") if part]
    return value


def as_entry(value: Any) -> Any:
    """The mapping that a text of name=VALUE parts stands for; anything else as it is. ValueError for other parts."""
    if not isinstance(value, str):
        return value
    entry: dict[str, Any] = {}
    for part in value.split(","):
        key, equals, text = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{part!r} is not KEY=VALUE; write name=chats,paths=chats.jsonl,weight=2")
        if key == "paths":
            entry.setdefault(key, []).append(text)
        elif key in entry:
            raise ValueError(f"{key} stands twice")
        else:
            entry[key] = text
    return entry


def as_tokens(value: Any) -> Any:
    """A count, which may be written with a unit (250M, 1.5B) or an exponent (2e9). ValueError on other texts."""
    if isinstance(value, str):
        text = value.strip().upper()
        unit = _UNITS.get(text[-1:], 1)
        try:
            number = Fraction(text[:-1] if unit > 1 else text) * unit
        except (ValueError, ZeroDivisionError):
            raise ValueError("give a number of tokens, such as 250M") from None
        value = int(number) if number.denominator == 1 else float(number)
    return value


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("give a number, not true or false")
    return value


PathList = Annotated[list[str], BeforeValidator(as_list)]
EntryName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}$")]
Number = Annotated[float, BeforeValidator(_no_truth)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    name: EntryName = Field(description="name in metrics, console and report")
    paths: PathList = Field(default_factory=list, description="files, as for train_data; or else `shards`")
    shards: str | None = Field(None, description="folder of preprocessed shards; or else `paths`")
    format: str | None = Field(None, description="format of its lines; that of data.format when unset")


class SourceConfig(_Entry):
    """One source of a mixture. Without `weight`, `tokens` and `repeats` it is seen once in a pass of the mixture."""

    weight: Number | None = Field(
        None, ge=0, le=1e9, description="share of the tokens, relative to the other sources' weights"
    )
    tokens: Annotated[int, BeforeValidator(_no_truth), BeforeValidator(as_tokens)] | None = Field(
        None, gt=0, le=10**15, description="its tokens in one pass of the mixture; 250M and 1.5B are understood"
    )
    repeats: Number | None = Field(None, gt=0, le=1e6, description="how often one pass of the mixture sees its rows")
    cap: Number | None = Field(
        None,
        gt=0,
        le=1e6,
        description="most passes over its own rows in the whole run; then the others share its place",
    )

    @property
    def amount(self) -> AmountKind | None:
        """Which of the three it names; None for none."""
        return next((name for name in AMOUNTS if getattr(self, name) is not None), None)


class EvalSetConfig(_Entry):
    """One named evaluation set."""

    weight: Number = Field(1.0, ge=0, le=1e9, description="weight of its loss in the mean of all sets")


Source = Annotated[SourceConfig, BeforeValidator(as_entry)]
EvalSet = Annotated[EvalSetConfig, BeforeValidator(as_entry)]
