"""Licences of published instruction sets, by how their sources are named (forms.py)."""

import re

LICENCES = (  # by the first word of a source's name, a number behind it apart
    ("dolly", "CC BY-SA 3.0"),
    ("p3", "Apache-2.0"),
    ("cot", "Apache-2.0"),
    ("flan", "Apache-2.0"),
    ("oasst", "Apache-2.0"),
    ("arc", "CC BY-SA 4.0"),
    ("mmlu", "MIT"),
    ("alpaca", "CC BY-NC 4.0"),
)


def licence(source: str) -> str:
    """What is known of a source's licence."""
    word = re.split(r"[-_/. ]", source.lower())[0]
    return next((name for start, name in LICENCES if re.fullmatch(rf"{start}\d*", word)), "that of the source")
