"""A model and its training, chosen for a machine, a corpus and a time: what config/auto.py asks for.

The larger a model, the more it makes of a token, and the fewer tokens it sees in the time. So a ladder of
sizes is climbed as long as the next one, by the speed measured on this machine, would still see enough tokens
for each of its parameters. The ladder, and what is enough, come from the sweeps told in config/auto.py.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# What all sizes have in common; none of it is touched where it was set by hand.
COMMON: dict[str, Any] = {
    "position": "rope",
    "activation": "relu2",
    "optimizer": "muon",
    "muon_momentum": 0.9,
    "weight_decay": 0.0,
    "beta2": 0.95,
    "min_lr": 0.0,
    "lr_schedule": "wsd",
    "decay_frac": 0.8,
    "gradient_accumulation_steps": 1,
    "max_iters": 10**9,  # the clock ends the run
}
WARM_UP = 0.05  # part of the steps
EVALUATIONS = 4  # on the way, so that there is a curve to look at
LONGEST_TRIAL = 0.1  # part of the budget that measuring may take


@dataclass(frozen=True)
class Size:
    """A rung of the ladder: a shape, and what it is best trained with."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    learning_rate: float
    muon_learning_rate: float
    enough: float  # tokens for each parameter that make it better than the size below

    def __str__(self) -> str:
        return f"{self.n_layer} layers {self.n_embd} wide on {self.batch_size} x {self.block_size} tokens"


LADDER = (
    Size(3, 2, 64, 64, 16, 5e-3, 1e-2, 0.0),
    Size(4, 2, 128, 128, 8, 5e-3, 1e-2, 1.0),
    Size(4, 3, 192, 128, 16, 5e-3, 1e-2, 1.2),
    Size(5, 4, 256, 128, 24, 5e-3, 1e-2, 1.2),
    # from here on by the trend, not measured: for hours on a CPU, or minutes on a GPU
    Size(6, 6, 384, 256, 32, 3e-3, 1e-2, 2.0),
    Size(8, 8, 512, 512, 32, 2e-3, 1e-2, 4.0),
    Size(12, 12, 768, 1024, 32, 1e-3, 1e-2, 8.0),
)


@dataclass(frozen=True)
class Trial:
    """What some settings do on this machine."""

    parameters: int
    tokens_per_step: int
    step_seconds: float
    spent: float  # seconds since the start of the program, this trial included

    def steps(self, budget: float) -> int:
        """How many of them the rest of the budget has room for."""
        return max(1, int((budget - self.spent) / self.step_seconds))

    def share(self, budget: float) -> float:
        """Tokens for each parameter."""
        return self.steps(budget) * self.tokens_per_step / self.parameters


def choose(
    budget: float, fixed: dict[str, Any], measure: Callable[[dict[str, Any]], Trial]
) -> tuple[dict[str, Any], list[str]]:
    """Settings for `budget` seconds, and what to say of them. Those in `fixed`, set by hand, stay.

    `measure` tries the changes that it is given.
    """
    size, beyond = LADDER[0], ""
    trial = measure(changes_of(size, fixed))
    for larger in LADDER[1:]:
        if trial.spent > LONGEST_TRIAL * budget:
            beyond = "; no time was left to try a larger one"
            break
        tried = measure(changes_of(larger, fixed))
        if tried.share(budget) < larger.enough:
            beyond = f"; {larger} would see {tried.share(budget):.1f}, and wants {larger.enough:g}"
            break
        size, trial = larger, tried
    steps = trial.steps(budget)
    schedule = {
        "warmup_iters": max(1, int(WARM_UP * steps)),
        "eval_interval": max(1, steps // EVALUATIONS),
        "log_interval": max(1, steps // 100),
    }
    said = [
        f"auto: {size}, the largest that sees enough in {budget:.0f} s here: about {steps:,} steps of "
        f"{1000 * trial.step_seconds:.0f} ms, {trial.share(budget):.1f} tokens a parameter{beyond}"
    ]
    schedule = {key: value for key, value in schedule.items() if key not in fixed}
    return changes_of(size, fixed) | schedule, said


def changes_of(size: Size, fixed: dict[str, Any]) -> dict[str, Any]:
    """The settings that a size gives, beside those that are fixed: heads and width must go together."""
    given = COMMON | {key: value for key, value in asdict(size).items() if key != "enough"}
    if "n_embd" in fixed:
        fits = [n for n in range(1, size.n_head + 1) if fixed["n_embd"] % (2 * n) == 0]  # rope turns pairs
        given["n_head"] = max(fits, default=1)
    elif "n_head" in fixed:
        pair = 2 * fixed["n_head"]
        given["n_embd"] = -(-size.n_embd // pair) * pair
    return {key: value for key, value in given.items() if key not in fixed}
