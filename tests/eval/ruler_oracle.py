"""Solves RULER's prompts by reading them: the published wording, whoever wrote the generator."""

import re
from collections import Counter


def solve(text):
    """The strings that answer the last question of the text, from what the text shows."""
    if "mentioned in the provided text" in text:
        asked = re.findall(r"for (.+?) mentioned in the provided text", text)[-1]
        keys = re.split(r",? and |, ", asked)
        return [v for k in keys for v in re.findall(rf"for {re.escape(k)} is: (\S+)\.(?!\S)", text)]
    if "VAR" in text:
        text = text.rpartition("Memorize and track")[2]
        known, names = {re.findall(r"assigned the value (\d+) in", text)[-1]}, []
        for name, value in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", text):
            if value in known:
                known.add(name)
                names.append(name)
        return names
    if "numbered list" in text:
        listed = text.rpartition("Below is a numbered list")[2].partition("Question:")[0]
        return [w for w, _ in Counter(re.findall(r"\d+\. (\S+)", listed)).most_common(10)]
    if "coded" in text:
        listed = text.rpartition("coded words. ")[2].partition("Question:")[0].split()
        return [w for w, _ in Counter(w for w in listed if w != "...").most_common(3)]
    place = re.findall(r"What is the capital of (\w+)\?", text)[-1]
    return re.findall(rf"The capital of {place} is (\w+)\.", text)
