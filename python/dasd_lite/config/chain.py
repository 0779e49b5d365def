"""The stages of a phase, in the order in which they run: the one list that everything else is derived from.

Plain Python without imports, so that `dasd-lite --help` stays instant.
"""

STAGES = {
    "sample": "Sample the teacher: k answers per prompt.",
    "ingest": "Take existing answers from files instead of a teacher.",
    "mix": "Let the student start answers and the teacher finish them.",
    "score": "Score the rollouts with the student: p per sentence of both models.",
    "select": "Filter the rollouts and keep the best-ranked of each prompt.",
    "pack": "Pack the kept rollouts into training rows.",
    "train": "Train the student on the rows: full, LoRA or QLoRA.",
    "evaluate": "Measure accuracy on questions with answers.",
}
"""Each stage with one line about it. A stage is a command, a table of the recipe and a folder of a phase."""

SOURCES = ("sample", "ingest", "mix")
"""Stages that rollouts come from; a phase has one of them."""

ASKING = ("sample", "mix")
"""Stages that ask the teacher for answers."""

BASE = "base"
"""Stands for a phase where the student before training is evaluated."""

TEACHER = "teacher"
"""Stands for a phase where the teacher is evaluated."""

REUSED = ("sample", "mix", "score", "evaluate")
"""Stages whose rows another run can take over."""
