"""What changes from step to step of a run, beside weights and optimizer: state.json."""

import math
import reprlib
from dataclasses import Field, dataclass, field, fields
from typing import Any

from fradique import stability


@dataclass
class TrainState:
    """What changes from step to step, beside weights and optimizer: kept in state.json."""

    step: int = 0  # updates done
    best_val_loss: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    last_eval_step: int = -1
    seconds: float = 0.0  # spent in earlier processes of this run
    closing_seconds: float = 0.0  # that the end of the run was last expected to take
    writing_seconds: float = 0.0  # that the last sample took
    scaler: dict[str, float] = field(default_factory=dict)
    past: stability.Past = field(default_factory=stability.Past)

    @classmethod
    def read(cls, values: dict[str, Any]) -> "TrainState":
        """From what state.json holds. Raises ValueError, naming the fields that are missing or wrong."""
        wrong = [f"{f.name} = {reprlib.repr(values[f.name])}" for f in fields(cls) if not sound(f, values)]
        if wrong or "step" not in values:
            raise ValueError(
                f"state.json is damaged ({'; '.join(wrong) or 'no step'}): use an earlier checkpoint"
            )
        past = stability.Past.read(values.get("past", {}))
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values} | {"past": past})


def sound(one: Field, values: dict[str, Any]) -> bool:
    """Whether a field of TrainState, where `values` have it, is what such a field may be."""
    value = values.get(one.name, one.default)
    if one.name == "past":
        return stability.Past.read(values.get("past", {})) is not None
    if one.name == "scaler":  # torch's own, whose numbers have names
        there = values.get("scaler", {})
        return isinstance(there, dict) and all(
            type(v) in (int, float) and math.isfinite(v) for v in there.values()
        )
    if one.name in ("best_val_loss", "best_step") and value is None:
        return True
    if type(one.default) is float or one.name == "best_val_loss":
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is int and -1 <= value < 1 << 62 and (value >= 0 or one.name == "last_eval_step")
