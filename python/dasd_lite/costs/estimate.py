"""What the trainings of a recipe will take, in lines for `check`: memory, hours, what to change when it is too much.

Input: a recipe and the card that is here, if any. Invariant: nothing is loaded and nothing is run; all figures are
predictions (memory.py, flops.py), and say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.costs.fit import OptionChange, sizes_that_fit, smallest_change
from dasd_lite.costs.flops import ASSUMED_MFU, training_hours
from dasd_lite.costs.hardware import GPU_SIZES, Gpu, Hardware, has_liger, peak_flops, visible_gpu
from dasd_lite.costs.memory import Prediction, predict
from dasd_lite.costs.shape import ModelShape, read_shape
from dasd_lite.data.hub import model_folder
from dasd_lite.errors import DasdError


@dataclass(frozen=True)
class Training:
    """Phases whose training needs the same memory, and how much."""

    phases: list[Phase]
    shape: ModelShape
    card: Gpu | None

    @property
    def num_processes(self) -> int:
        """Processes, one per GPU; one where none is seen and no number is given."""
        return self.phases[0].train.num_processes or (self.card.number if self.card else 1)

    @property
    def machine(self) -> Hardware:
        """The card that is here; without one a GPU with the packages that are installed."""
        return self.card.machine if self.card else Hardware(liger=has_liger())

    @cached_property
    def prediction(self) -> Prediction:
        """Memory that it needs."""
        phase = self.phases[0]
        return predict(
            self.shape,
            phase.train,
            seq_len=phase.pack.seq_len,
            num_processes=self.num_processes,
            machine=self.machine,
        )

    def change(self, card_bytes: float) -> OptionChange | None:
        """Return what to change for a card."""
        phase = self.phases[0]
        return smallest_change(
            self.shape,
            phase.train,
            seq_len=phase.pack.seq_len,
            card_bytes=card_bytes,
            num_processes=self.num_processes,
            machine=self.machine,
        )


def trainings_of(recipe: RecipeConfig) -> list[Training]:
    """Group the phases; none when the student's shape is not known, be it that `_models` tells of a fault."""
    try:
        shape = read_shape(model_folder(recipe.student.model))
    except DasdError:
        return []
    card = visible_gpu()
    found: list[Training] = []
    for one in (Training([phase], shape, card) for phase in recipe.phase):
        same = next((other for other in found if other.prediction == one.prediction), None)
        if same is None:
            found.append(one)
        else:
            same.phases.extend(one.phases)
    return found


def too_big(trainings: list[Training]) -> Iterator[str]:
    """Say which training the card that is here has no room for, and what would make it fit."""
    for training in trainings:
        card, needed = training.card, training.prediction.total
        if card is None or needed <= card.memory:
            continue
        change = training.change(card.memory)
        help_ = (
            f"smallest change that fits: {change}" if change else "nothing here makes it fit; take a smaller student"
        )
        names = ", ".join(repr(phase.name) for phase in training.phases)
        yield (
            f"train: phase {names} needs about {format_bytes(needed)}, the card ({card.name}) has"
            f" {format_bytes(card.memory)}; {help_}"
        )


def memory_line(training: Training) -> str:
    """Say what a training needs, and without a card on which it would fit."""
    found, names = training.prediction, ", ".join(phase.name for phase in training.phases)
    parts = {
        "weights": found.weights,
        "gradients": found.gradients,
        "optimiser": found.optimizer,
        "activations": found.activations,
        "loss": found.loss,
        "overhead": found.overhead,
    }
    told = ", ".join(f"{name} {format_bytes(value)}" for name, value in parts.items() if value)  # at the worst moment
    one = "the card" if training.card else "a card"
    where = one if training.num_processes == 1 else f"each of {training.num_processes} cards"
    line = f"{names}/train: about {format_bytes(found.total)} on {where} ({told})"
    line += f", {format_bytes(found.host)} of host memory" if found.host else ""
    if training.card is not None:
        return f"{line}; predicted"
    sizes = sizes_that_fit(found)
    fits = f"fits cards from {sizes[0]} GB on" if sizes else f"fits no card up to {GPU_SIZES[-1]} GB"
    return f"{line}; predicted, no card is seen here: {fits}"


def hours_line(trainings: list[Training], num_prompts: int) -> str | None:
    """Say how long training takes at most, when the card's speed is known and answers are still to be sampled."""
    card = trainings[0].card if trainings else None
    peak = peak_flops(card.name) if card else None
    phases = [phase for training in trainings for phase in training.phases]
    if card is None or peak is None or all(phase.source != "sample" for phase in phases):
        return None
    hours = 0.0
    for training in trainings:
        for phase in (p for p in training.phases if p.source == "sample"):
            length = min(phase.sample.max_tokens, phase.pack.seq_len)
            tokens = num_prompts * min(phase.select.keep, phase.sample.num_samples) * length
            epochs = phase.train.epochs
            hours += training_hours(training.shape, phase.train, length, tokens * epochs, peak, training.num_processes)
    rest = ", ".join(phase.name for phase in phases if phase.source != "sample")
    return (
        f"time: training takes at most {hours:,.1f} h if every answer kept is as long as it may be, at an assumed"
        f" {ASSUMED_MFU:.0%} of the {peak / 1e12:,.0f} TFLOP/s of {card.name}{f'; without {rest}' if rest else ''}"
    )


def format_bytes(num_bytes: float) -> str:
    """Write bytes as a person reads them."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
