"""A recipe with two phases, for the tests of this folder."""

RECIPE = """\
out = "run"
seed = 1

[prompts]
path = "questions.jsonl"

[teacher]
kind = "transformers"
model = "demo:teacher"

[student]
kind = "transformers"
model = "./student"

[sample]
num_samples = 3

[select]
keep = 1
budget = { math = 10 }

[train]
method = { kind = "lora", rank = 4 }
learning_rate = 1e-3

[[phase]]
name = "low"
sample.temperature = 0.6

[[phase]]
name = "high"
[phase.sample]
temperature = 1
"""
