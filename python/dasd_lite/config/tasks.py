"""The names of benchmarks that are loaded by name; `data/tasks/tasks.toml` says what each is."""

TASKS = (
    "aime24",
    "aime25",
    "aime26",
    "hmmt-feb-2025",
    "hmmt-nov-2025",
    "hmmt-feb-2026",
    "gpqa-diamond",
    "lcb-v5",
    "lcb-v6",
    "math-500",
    "gsm8k",
)
