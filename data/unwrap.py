"""Text that was broken into lines at a fixed width, as paragraphs again.

A decoder that reads wrapped text learns to end its lines after so many characters, also where it
should go on with what a question asks for: in a prompt, questions stand on lines of any length.
"""

import re
from itertools import pairwise

WIDEST = 100  # characters; longer lines were not broken by hand or mail program
FULL = 0.93  # of the width: a shorter line that had room for the next word ends a paragraph
WRAPPED = 0.25  # of the lines that others follow are full in wrapped prose; in code .05 to .18
MARKER = re.compile(r"\s*([-*+•>|#]|\d+[.)])\s")  # of a list, a quotation, a table


def unwrap(text: str) -> str:
    """The text with its full lines joined to the next; itself where its lines were not wrapped.

    A line is full if the first word of the next had no room on it. Lists, headings, verse and code
    of shorter lines stay, and so do documents of which only few lines are full, such as source code.
    """
    lines = [line.rstrip() for line in text.split("\n")]
    lengths = sorted(len(line) for line in lines if line)
    width = lengths[int(0.98 * len(lengths))] if lengths else 0
    followed = [bool(line and after) for line, after in pairwise(lines)]
    full = [
        both and len(line) + 1 + len(after.split(None, 1)[0]) > FULL * width
        for both, (line, after) in zip(followed, pairwise(lines), strict=True)
    ]
    if width > WIDEST or sum(full) <= WRAPPED * sum(followed):
        return text
    parts = lines[:1]
    for goes_on, (line, after) in zip(full, pairwise(lines), strict=True):
        if goes_on and not MARKER.match(after):
            parts += ["" if line.endswith("-") else " ", after.lstrip()]
        else:
            parts += ["\n", after]
    return "".join(parts)
