r"""How the questions of benchmarks are asked: the words around them.

They ask for what the graders look for: a final answer or letter in `\boxed{…}`, or one block of code. Changing one
changes the benchmark.
"""

from __future__ import annotations

from dasd_lite.data.references import Kind

QUESTION = "{question}"

MATH = QUESTION + "\n\nThink step by step, and put the final answer into \\boxed{}."
CHOICE = (  # the options must be the end of the question
    "One of the options of the following question is right. Think step by step, and put the letter of that option into"
    " \\boxed{}.\n\n" + QUESTION
)
PROGRAM = (
    QUESTION
    + "\n\nWrite a Python program that solves this problem. It reads the input from standard input and prints the"
    " result, and nothing else, to standard output. Think first, then give the whole program in one block:\n\n"
    "```python\n# the program\n```"
)
FUNCTION = (
    QUESTION
    + "\n\nSolve this problem in Python. Begin with the code above and keep its names and parameters; it will be"
    " imported and called, so it reads and prints nothing. Think first, then give the whole code in one block:\n\n"
    "```python\n# the code\n```"
)


def asked(question: str, kind: Kind, function: str | None = None) -> str:
    """Return a question with the words around it.

    Args:
        question: The question, with its options at the end if it has any.
        kind: How the answer is graded.
        function: Name of the function that tests call; None for a program.
    """
    code = PROGRAM if function is None else FUNCTION
    before, after = {"math": MATH, "choice": CHOICE, "code": code}[kind].split(QUESTION)
    return before + question.strip() + after
