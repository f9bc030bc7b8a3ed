"""lm_eval's four kinds of task, from local JSON: planted models get what they deserve, and our
decoder what transformers' own model of the same weights gets."""

import json
import re

import pytest
import yaml

from data.tokenizer import train_tokenizer
from eval.lm import DecoderLM
from eval.words import NOUNS
from model.checkpoint import save_weights
from tests.eval.conftest import TEXT, run_script
from tests.eval.planted import Guesser, Reader
from tests.eval.test_needle import MODELS
from tests.eval.tiny import decoder

lm_eval = pytest.importorskip("lm_eval", reason="needs pip install lm_eval")
COUNT = 24


@pytest.fixture(scope="module")
def harness_tokenizer():
    """Each answer is one token of it."""
    names = "".join(f"The name of a ship is {name}. " * 60 for name in NOUNS[:10])
    tokenizer = train_tokenizer([TEXT[:9000], names], 500)
    assert all(len(tokenizer.encode(f" {name}").ids) == 1 for name in NOUNS[:10])
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions whose text tells the answer, at once or 200 words before, as four tasks."""
    folder = tmp_path_factory.mktemp("tasks, local")
    docs = []
    for i in range(COUNT):
        gap = " ".join(TEXT.split()[10 * i : 10 * i + (200 if i % 2 else 10)])
        choices = [NOUNS[0], NOUNS[1 + i % 8], NOUNS[9]]
        text = f"The name of a ship is {choices[1]}. {gap} Once more, the name of a ship is"
        docs.append({"text": text, "choices": choices, "answer": choices[1], "far": i % 2})
    (folder / "docs.json").write_text(json.dumps(docs))
    shared = {
        "dataset_path": "json", "test_split": "test", "doc_to_text": "{{text}}",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.json")}},
    }  # fmt: skip
    tasks = {
        "choose": {
            "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": 1,
            "metric_list": [{"metric": "acc"}],
        },
        "say": {
            "output_type": "generate_until", "doc_to_target": " {{answer}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
        "expect": {
            "output_type": "loglikelihood", "doc_to_target": " {{answer}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "read": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }  # fmt: skip
    for name, own in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **own}))
    return folder


def evaluate(lm, folder, limit=None):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from eval.harness import scores

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    return scores(simple_evaluate(
        model=lm, tasks=["choose", "say", "expect", "read"], task_manager=tasks, bootstrap_iters=0,
        limit=limit,
    ))  # fmt: skip


def answer(text):
    return [found + "." for found in re.findall(r"ship is (\w+)\.", text)[:1]]


def test_planted_behaviour(folder, harness_tokenizer):
    from eval.harness_model import HarnessLM

    docs = json.loads((folder / "docs.json").read_text())
    found = evaluate(HarnessLM(Reader(harness_tokenizer, answer), harness_tokenizer, 4096), folder)
    assert (found["choose/acc"], found["say/exact_match"], found["expect/acc"]) == (1, 1, 1)

    found = evaluate(HarnessLM(Guesser(), harness_tokenizer, 4096), folder)
    assert (found["choose/acc"], found["say/exact_match"], found["expect/acc"]) == (0, 0, 0)
    tokens = sum(len(harness_tokenizer.encode(d["text"]).ids) for d in docs)
    num_bytes = sum(len(d["text"].encode()) for d in docs)
    assert found["read/bits_per_byte"] == pytest.approx(
        7 * tokens / num_bytes / 0.69314718, rel=1e-6
    )

    # Blind beyond 150 tokens: half of the questions, whether the model or max_length is short.
    blind = Reader(harness_tokenizer, answer, sight=150)
    reader = Reader(harness_tokenizer, answer)
    for lm in (
        HarnessLM(blind, harness_tokenizer, 4096), HarnessLM(reader, harness_tokenizer, 150),
    ):  # fmt: skip
        found = evaluate(lm, folder)
        assert (found["choose/acc"], found["say/exact_match"], found["expect/acc"]) == (0.5,) * 3


def test_requests_in_a_batch_are_as_alone(harness_tokenizer):
    from lm_eval.api.instance import Instance

    from eval.harness_model import HarnessLM

    vocabulary = harness_tokenizer.get_vocab_size()
    lm = HarnessLM(DecoderLM(decoder(MODELS, vocabulary), {0}), harness_tokenizer, 64)
    pairs = [
        ("", " went"),
        (TEXT[:30], " Bath"),
        (TEXT[:400], " a"),
        ("x", TEXT[:40]),
        ("a b ", "c"),
    ]

    def requests(kind, arguments):
        return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]

    together = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for pair, found in zip(pairs, together, strict=True):
        [alone] = lm.loglikelihood(requests("loglikelihood", [pair]), disable_tqdm=True)
        assert found == (pytest.approx(alone[0], abs=1e-3), alone[1])
    texts = [(TEXT[:700],), (TEXT[:20],)]
    rolling = lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    for text, total in zip(texts, rolling, strict=True):
        tokens = [0, *harness_tokenizer.encode(text[0]).ids]
        expected = 0.0
        for start in range(0, len(tokens) - 1, 64):  # disjoint windows, each with all it can see
            window = tokens[start : start + 65]
            if len(window) < 65 and start:
                window = tokens[-65:]
            [(logprobs, _)] = lm.lm.logprobs([window])
            expected += logprobs[-(min(start + 64, len(tokens) - 1) - start) :].sum()
        assert total == pytest.approx(expected, abs=1e-2)
    how = [{"until": ["\n\n"], "max_gen_toks": n} for n in (3, 9, 3)]
    asked = [(TEXT[:n], h) for n, h in zip((10, 300, 50), how, strict=True)]
    together = lm.generate_until(requests("generate_until", asked))
    assert together == [lm.generate_until(requests("generate_until", [one]))[0] for one in asked]
    [free] = lm.generate_until(requests("generate_until", [("a", {"max_gen_toks": 9})]))
    stop = free[2]
    [cut] = lm.generate_until(
        requests("generate_until", [("a", {"max_gen_toks": 9, "until": stop})])
    )
    assert cut == free[: free.index(stop)]
    with pytest.raises(ValueError, match="only greedy"):
        lm.generate_until(requests("generate_until", [("a", {"do_sample": True})]))


def test_the_script(folder, harness_tokenizer, tmp_path):
    path = tmp_path / "run" / "checkpoints" / "step_00000007"
    model = decoder(MODELS, harness_tokenizer.get_vocab_size())
    save_weights(path, model.state_dict(), MODELS | {"train": {"seq_len": 512}}, harness_tokenizer)
    command = ["eval/harness.py", f"checkpoint={tmp_path / 'run'}", f"include_path={folder}"]
    done = run_script(*command, "tasks=[choose,read]", "limit=4")
    assert done.returncode == 0 and "read/bits_per_byte" in done.stdout, done.stderr
    kept = json.loads((tmp_path / "run/eval/harness/step_00000007.json").read_text())
    assert set(kept["results"]) == {"choose", "read"} and kept["step"] == 7
