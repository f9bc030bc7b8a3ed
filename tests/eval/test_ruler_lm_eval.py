"""Our RULER prompts against those of lm_eval's own implementation, where that needs no download.

Needs lm_eval[ruler]. Six of its tasks make their own haystack: niah_single_1, niah_multikey_2 and 3,
variable tracking, common words (which it asks without the published example) and frequent words.
"""

import random
import re

import numpy as np
import pytest

from data.tokenizer import train_tokenizer
from eval.ruler import token_counter
from eval.ruler_tasks import NOISE, Generator, Sources, string_match
from tests.eval.conftest import TEXT
from tests.eval.ruler_oracle import solve

pytest.importorskip("lm_eval", reason="needs pip install lm_eval[ruler]")
wonderwords = pytest.importorskip("wonderwords", reason="needs pip install lm_eval[ruler]")
transformers = pytest.importorskip("transformers", reason="needs pip install lm_eval[ruler]")

LENGTH, SAMPLES = 4096, 3


@pytest.fixture(scope="module")
def words_known():
    """A tokenizer that knows the words they draw: theirs loops forever where prompts can't shrink."""
    categories = wonderwords.RandomWord()._categories
    words = [w for c in ("noun", "adjective", "verb") for w in categories[c]]
    return train_tokenizer([f"{TEXT} {NOISE}\n{NOISE}", *(f" {w} {w}" for w in words)], 6000)


@pytest.fixture(scope="module")
def theirs(words_known):
    """make(task) -> their samples, each (prompt, answers, tokens they count)."""
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, prepare_niah, vt_utils

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words_known)
    random.seed(0)
    np.random.seed(0)

    def niah(haystack, keys, values):
        return prepare_niah.generate_samples(
            prepare_niah.get_haystack(type_haystack=haystack), max_seq_length=LENGTH,
            template=niah_utils.TEMPLATE, type_haystack=haystack, type_needle_k=keys,
            type_needle_v=values, num_samples=SAMPLES, TOKENIZER=tokenizer,
        )  # fmt: skip

    def tracking():
        some = vt_utils.sys_vartrack_w_noise_random
        [shown] = some(tokenizer, 1, 500, incremental=5)
        return some(tokenizer, SAMPLES, LENGTH, icl_example=shown)

    makers = {
        "niah_single_1": lambda: niah("repeat", "words", "numbers"),
        "niah_multikey_2": lambda: niah("needle", "words", "numbers"),
        "niah_multikey_3": lambda: niah("needle", "uuids", "uuids"),
        "vt": tracking,
        "cwe": lambda: cwe_utils.sys_word_pair_random(SAMPLES, LENGTH, tokenizer),
        "fwe": lambda: fwe_utils.sys_kwext(tokenizer, LENGTH, SAMPLES),
    }

    def make(task):
        return [
            (f"{s['input']} {s['gen_prefix']}", s["outputs"], s["length"]) for s in makers[task]()
        ]

    return make


def skeleton(task, prompt):
    """What is left of a prompt when all that is drawn is masked; lists keep their first entry."""
    prompt = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", prompt)
    if task.startswith("niah"):
        # Their words may hold blanks and capitals.
        prompt = re.sub(r"(?<=for )(?!UUID)\S.*?(?= (is:|mentioned))", "KEY", prompt)
        prompt = re.sub(r"\d{7}", "NUMBER", prompt)
        head, *lines = prompt.split("\n")
        return head, set(lines[:-1]), lines[-1]
    if task == "vt":
        parts = re.split(r"(?=Memorize and track)", re.sub(r"\d{5}", "NUMBER", prompt))[1:]
        assert len(parts) == 2  # the example, then the task
        shown = parts[0].rpartition("\n")[0].strip().rpartition("\n")[2]
        shown = shown.partition("they are:")[0]  # of the example its question, whatever its noise
        mask = [re.sub(r"VAR [A-Z]+( = VAR [A-Z]+| = NUMBER) ?", "", line).strip()
                for line in (shown, *parts[1].split("\n"))]  # fmt: skip
        names = [sorted(map(len, re.findall(r"VAR ([A-Z]+) =", part))) for part in parts]
        return set(mask), names
    if task == "cwe":
        prompt = "Below is" + prompt.rpartition("Below is")[2]
        return re.sub(r"1\. .*?(?=\nQuestion)", "LIST", prompt)
    return re.sub(r"(?<=coded words\. ).*?(?=\nQuestion)", "LIST", prompt)


TASKS = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"]


@pytest.mark.parametrize("task", TASKS)
def test_same_wording_same_answers_same_length(task, theirs, words_known):
    from lm_eval.tasks.ruler.common_utils import string_match_all

    plain = [w for w in wonderwords.RandomWord()._categories["noun"] if w.isalpha()]
    generator = Generator(token_counter(words_known), Sources([w.lower() for w in plain]))
    ours = [generator.example(task, LENGTH, index) for index in range(SAMPLES)]
    for example, (prompt, answers, length) in zip(ours, theirs(task), strict=True):
        assert skeleton(task, example.prompt) == skeleton(task, prompt)
        assert len(example.answers) == len(answers)
        # One reader solves both, and both scorers say so.
        assert sorted(solve(prompt)) == sorted(answers)
        for expected in (example.answers, answers):
            said = [" ".join(expected), expected[0].upper(), "none of it"]
            for text in said:
                assert string_match(text, expected, part=False) == string_match_all(
                    [text], [expected]
                )
        tokens = generator.count(example.prompt)
        # Theirs counts the budget in, not always the answer's prefix, and shrinks in steps of up to
        # 25 haystack units; ours is as full at least.
        assert length - 0.1 * LENGTH < tokens <= LENGTH
