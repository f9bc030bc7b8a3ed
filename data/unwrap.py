"""Prose that was broken into lines at a fixed width, as paragraphs again.

A decoder that reads wrapped text learns to end its lines after so many characters, also where a
question on a longer line is to be answered.
"""

import re
from itertools import pairwise

WIDTHS = range(40, 101)  # characters; other lines were hardly broken to fit a page
FULL = 0.93  # of the width: a shorter line that had room for the next word ends a paragraph
WRAPPED = 0.5  # of the lines that have a next one are full in prose, hardly ever in source code
FEWEST = 5  # lines that have a next one; of fewer, nothing can be told
RULE = r"(\W)\1{2,}\s*$"  # a heading's underline, a fence
# Lists, headings, tables and fences begin a line of their own.
APART = re.compile(rf"\s*(?:{RULE}|(?:[-*+•>]|#+|\d+[.)])\s|[|#>]|```)")


def unwrap(text: str) -> str:
    """The text with its full lines joined to the next; itself where most of its lines are not full.

    A line is full if the first word of the next had no room on it. Lists, headings, tables and
    shorter lines within prose stay; of source code, verse and tables alone next to all stay, but
    verse of even lines and code of mostly comments can be taken for prose. Words that were broken
    at a hyphen keep it.
    """
    lines = [line.rstrip() for line in text.split("\n")]
    lengths = sorted(len(line) for line in lines if line)
    width = lengths[int(0.98 * len(lengths))] if lengths else 0
    pairs = list(pairwise(lines))
    followed = sum(bool(line and after) for line, after in pairs)
    full = [
        bool(line and after) and len(line) + 1 + len(after.split(None, 1)[0]) > FULL * width
        for line, after in pairs
    ]
    if width not in WIDTHS or followed < FEWEST or sum(full) < WRAPPED * followed:
        return text
    parts = lines[:1]
    for (line, after), goes_on in zip(pairs, full, strict=True):
        if goes_on and not APART.match(after) and not re.match(RULE, line):
            parts += ["" if re.search(r"(\w-|--)$", line) else " ", after.lstrip()]
        else:
            parts += ["\n", after]
    return "".join(parts)
