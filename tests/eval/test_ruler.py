"""Every task's prompts fit, can be solved by reading, and score what they deserve."""

import json
import re
import statistics

import pytest
import yaml
from tokenizers import Tokenizer

from data.config import ROOT, from_config
from data.tokenizer import end_of_text_id, train_tokenizer
from eval import ruler
from eval.records import Records
from eval.ruler_tasks import NOISE, TASKS, Generator, Sources, read_questions, string_match
from eval.words import ADJECTIVES, NOUNS
from model.checkpoint import load_checkpoint, save_weights
from tests.eval.conftest import TEXT, run_script
from tests.eval.planted import Guesser, Reader
from tests.eval.ruler_oracle import solve
from tests.eval.test_needle import MODELS
from tests.eval.tiny import decoder

NEEDLES = [task for task in TASKS if task.startswith("niah")]
LENGTH = 2048


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """The same twenty facts in SQuAD's and in HotpotQA's form."""
    folder = tmp_path_factory.mktemp("questions")
    pairs = list(zip(NOUNS[:20], ADJECTIVES[:20], strict=True))
    texts = [f"{a} is a country. The capital of {a} is {b}. It is old." for a, b in pairs]
    queries = [f"What is the capital of {a}?" for a, _ in pairs]
    squad = {"data": [{"paragraphs": [
        {"context": text, "qas": [
            {"question": q, "answers": [{"text": "nowhere"}, {"text": b}], "is_impossible": False},
            {"question": "Why?", "answers": [], "is_impossible": True},
        ]} for text, q, (_, b) in zip(texts[i : i + 5], queries[i:], pairs[i:], strict=False)
    ]} for i in range(0, 20, 5)]}  # fmt: skip
    hotpot = [
        {"question": queries[i], "answer": pairs[i][1],
         "context": [[pairs[j % 20][0], [texts[j % 20]]] for j in (i, i + 7)]} for i in range(20)
    ]  # fmt: skip
    paths = {"qa_1": folder / "squad, dev.json", "qa_2": folder / "hotpot.json"}
    paths["qa_1"].write_text(json.dumps(squad))
    paths["qa_2"].write_text(json.dumps(hotpot))
    return paths


@pytest.fixture(scope="session")
def word_tokenizer():
    return train_tokenizer(
        [f"{TEXT} {NOISE}", *(" ".join(w * 3) for w in (NOUNS, ADJECTIVES))], 1024
    )


@pytest.fixture(scope="session")
def generator(word_tokenizer, questions):
    qa = {task: read_questions(path) for task, path in questions.items()}
    return Generator(ruler.token_counter(word_tokenizer), Sources(TEXT.split(), qa))


def measured(lm, tokenizer, generator, task, tmp_path, samples=4, length=LENGTH):
    records = Records(tmp_path / "none" / f"{task}.json", ruler.KEYS, {})
    return ruler.measure(lm, tokenizer, generator, task, length, samples, records)


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_reads_gets_everything_and_one_that_does_not_nothing(
    task, word_tokenizer, generator, tmp_path
):
    for lm, score in ((Reader(word_tokenizer, solve), 1.0), (Guesser(), 0.0)):
        records = measured(lm, word_tokenizer, generator, task, tmp_path / str(score))
        assert [record["score"] for record in records] == [score] * 4, records
        for record in records:
            assert record["prompt_tokens"] + TASKS[task].budget <= LENGTH
            if task not in ("qa_1", "qa_2"):  # they have no more documents
                assert record["prompt_tokens"] + TASKS[task].budget > 0.92 * LENGTH


@pytest.mark.parametrize("task", NEEDLES)
@pytest.mark.parametrize(("sight", "length"), [(900, LENGTH), (4096, 8192)])
def test_a_model_blind_beyond_k_tokens_gets_the_needles_within(
    task, word_tokenizer, generator, tmp_path, sight, length
):
    lm = Reader(word_tokenizer, solve, sight)
    records = measured(lm, word_tokenizer, generator, task, tmp_path, 8, length)
    for record in records:
        prompt = generator.example(task, length, record["index"]).prompt
        ids = word_tokenizer.encode(prompt).ids
        seen = word_tokenizer.decode(ids[-sight:])
        given = [re.search(rf"for \S+ is: {a}\.", prompt)[0] for a in record["answers"]]
        visible = [statement in seen for statement in given]
        assert record["score"] == statistics.fmean(visible)
    scores = [record["score"] for record in records]
    assert min(scores) < 1 and max(scores) > 0


def test_the_needle_tasks_are_the_published_eight(generator):
    """Keys, values, distractors and kinds of value, counted in the text."""
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    word, number = r"[a-z]+-[a-z]+", r"\d{7}"
    for task, keys, values, answers, key, value in (
        ("niah_single_1", 1, 1, 1, word, number), ("niah_single_2", 1, 1, 1, word, number),
        ("niah_single_3", 1, 1, 1, word, uuid), ("niah_multikey_1", 4, 4, 1, word, number),
        ("niah_multikey_2", 20, 20, 1, word, number), ("niah_multikey_3", 9, 9, 1, uuid, uuid),
        ("niah_multivalue", 1, 4, 4, word, number), ("niah_multiquery", 4, 4, 4, word, number),
    ):  # fmt: skip
        example = generator.example(task, LENGTH, 0)
        found = re.findall(
            r"One of the special magic \w+ for (\S+) is: (\S+)\.(?!\S)", example.prompt
        )
        assert all(re.fullmatch(key, k) and re.fullmatch(value, v) for k, v in found)
        if "multikey_2" in task or "multikey_3" in task:
            assert (
                len(found) > values
                and NOISE not in example.prompt
                and "Tilney" not in example.prompt
            )
            [(asked, _)] = [pair for pair in found if pair[1] == example.answers[0]]
            assert [k for k, _ in found].count(asked) == 1
        else:
            assert (len({k for k, _ in found}), len(found)) == (keys, values)
            assert (task == "niah_single_1") == (NOISE + "\n" + NOISE in example.prompt)
            assert (task != "niah_single_1") == ("Tilney" in example.prompt)
        assert len(example.answers) == answers


def test_lists_have_the_published_frequencies(generator):
    example = generator.example("cwe", 8192, 0)
    listed = re.findall(r"\d+\. (\S+)", example.prompt.rpartition("Below is")[2])
    counts = {word: listed.count(word) for word in listed}
    assert sorted(counts.values())[-10:] == [30] * 10 and set(counts.values()) == {3, 30}
    assert {word for word, count in counts.items() if count == 30} == set(example.answers)
    shown = re.findall(r"\d+\. (\S+)", example.prompt.partition("Question:")[0])
    assert len(shown) == 190 and sorted(shown.count(w) for w in set(shown)) == [3] * 30 + [10] * 10

    example = generator.example("fwe", LENGTH, 0)
    words = example.prompt.partition("coded words. ")[2].partition("\n")[0].split()
    noise, *ranks = [words.count(w) for w in ("...", *example.answers)]
    total = noise * 3.14159**2 / 6
    for rank, count in enumerate(ranks, 2):  # zeta(2) = pi^2 / 6
        assert abs(count - total / rank**2 / (3.14159**2 / 6)) <= 1.5
    example = generator.example("vt", LENGTH, 0)
    chain = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", example.prompt.rpartition("Memorize and")[2])
    assert len(chain) == 5 and [name for name, _ in chain] == example.answers
    assert [value for _, value in chain[1:]] == example.answers[:4]


def test_samples_differ_and_return(word_tokenizer, generator):
    again = Generator(generator.count, generator.sources)
    other = Generator(generator.count, generator.sources, seed=1)
    for task in TASKS:
        prompts = [generator.example(task, LENGTH, index).prompt for index in range(4)]
        assert len(set(prompts)) == 4 or task in ("qa_1", "qa_2")
        assert again.example(task, LENGTH, 3).prompt == prompts[3]
        assert other.example(task, LENGTH, 3).prompt != prompts[3]


def test_string_match():
    assert string_match("the Answer is\x07 12, 34", ["12", "34"], part=False) == 1
    assert string_match("it is ANN", ["ann", "bob", "cid", "dan"], part=False) == 0.25
    assert string_match("it is ANN", ["ann", "bob", "cid", "dan"], part=True) == 1
    assert string_match("", ["ann"], part=True) == 0


def test_what_does_not_fit_or_is_no_question_says_so(generator, tmp_path):
    with pytest.raises(ValueError, match="cwe needs more than length=256"):
        generator.example("cwe", 256, 0)
    for content in ("[]", "{}", "[1]", "no", '{"data": []}'):
        (tmp_path / "q.json").write_text(content)
        with pytest.raises(ValueError, match="holds no questions"):
            read_questions(tmp_path / "q.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_questions(tmp_path / "none.json")
    settings = yaml.safe_load((ROOT / "conf/ruler.yaml").read_text())
    for key in ("defaults", "hydra", "checkpoint", "device"):
        settings.pop(key)
    for change, message in (
        ({"tasks": ["niah"]}, "there is no niah"), ({"tasks": ["qa_1"]}, "qa_1_path=questions.json"),
        ({"samples": 0}, "samples=0"), ({"lengths": []}, "token counts"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            from_config(ruler.RulerSettings, settings | change, "ruler")


def test_lengths_are_checked_before_anything_is_measured(generator):
    tasks = [task for task in TASKS if task not in ("qa_1", "qa_2")]
    generator.check(tasks, [LENGTH], 4)
    with pytest.raises(
        ValueError, match="256 tokens are too few .* niah_multikey_3, .*cwe"
    ) as caught:
        generator.check(tasks, [LENGTH, 256], 4)
    start = int(re.search(r"(\d+) would be a start", str(caught.value))[1])
    for task in tasks:
        assert all(generator.example(task, start, index) for index in range(4))


def test_the_script(tmp_path, word_tokenizer, questions):
    folder = tmp_path / "run" / "checkpoints" / "step_00000007"
    model = decoder(MODELS, word_tokenizer.get_vocab_size())
    save_weights(folder, model.state_dict(), MODELS, word_tokenizer)
    text = tmp_path / "held_out.txt"
    text.write_text(TEXT)
    command = [
        "eval/ruler.py", f"checkpoint={tmp_path / 'run'}", "lengths=[1024]", "samples=1",
        "tasks=[niah_single_1,fwe,qa_1]", f"haystack={text}", f"qa_1_path={questions['qa_1']}",
    ]  # fmt: skip
    done = run_script(*command)
    assert done.returncode == 0 and "mean of 3" in done.stdout, done.stderr
    stem = tmp_path / "run" / "eval" / "ruler" / "step_00000007"
    first = json.loads(stem.with_suffix(".json").read_text())
    assert [c["task"] for c in first["cells"]] == ["niah_single_1", "fwe", "qa_1"]
    assert stem.with_suffix(".csv").read_text().startswith("task,1024")
    checkpoint = load_checkpoint(folder)
    assert end_of_text_id(checkpoint.tokenizer) == 0
    done = run_script(*command, "samples=0")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "samples=0" in done.stderr


def test_any_tokenizer(generator, tokenizer, word_tokenizer):
    for one in (tokenizer, Tokenizer.from_str(word_tokenizer.to_str())):
        count = ruler.token_counter(one)
        other = Generator(count, generator.sources)
        for task in ("niah_single_2", "niah_multikey_3", "fwe"):
            assert 0.9 * LENGTH < count(other.example(task, LENGTH, 0).prompt) + TASKS[task].budget
            assert count(other.example(task, LENGTH, 1).prompt) + TASKS[task].budget <= LENGTH
