"""Exported models give the same logits in transformers, and come back as they were."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from data.tokenizer import train_tokenizer
from model.build import build_decoder
from model.checkpoint import load_checkpoint, save_weights
from model.export import export, from_hf, import_hf
from model.generate import generate
from tests.eval.conftest import TEXT, run_script

transformers = pytest.importorskip("transformers", reason="needs pip install transformers")

SIZES = {
    "_target_": "model.decoder.Decoder", "dim": 48, "num_layers": 2, "num_heads": 4,
    "num_kv_heads": 2, "ffn_dim": 64, "head_dim": 16,
}  # fmt: skip
FULL = {"_target_": "model.attention.full.FullAttention"}
SLIDING = {"_target_": "model.attention.sliding.SlidingAttention", "window": 9}
NSA = {
    "_target_": "model.attention.nsa.NSAAttention", "compress_block": 8, "compress_stride": 4,
    "select_block": 16, "num_selected": 4, "window": 24,
}  # fmt: skip
STOCK = {"output_gate": False, "qk_norm": False}
CASES = {
    "llama": (FULL, STOCK, "LlamaForCausalLM"),
    "llama untied": (FULL, {**STOCK, "tie_embeddings": False}, "LlamaForCausalLM"),
    "qwen3": (FULL, {"output_gate": False}, "Qwen3ForCausalLM"),
    "mistral": (SLIDING, STOCK, "MistralForCausalLM"),
    "gated": (FULL, {}, "NsaLmForCausalLM"),
    "convolved": (FULL, {"output_gate": False, "kv_conv": 3}, "NsaLmForCausalLM"),
    "half turning": (FULL, {**STOCK, "rope_fraction": 0.5}, "NsaLmForCausalLM"),
    "nsa, half turning": (NSA, {"rope_fraction": 0.5, "yarn_factor": 4.0}, "NsaLmForCausalLM"),
    "yarn, capped": (SLIDING, {"yarn_factor": 4.0, "yarn_original_length": 64,
                               "logit_softcap": 5.0}, "NsaLmForCausalLM"),
    "nsa": (NSA, {}, "NsaLmForCausalLM"),
    "nsa, mlp": (NSA | {"compression": "mlp", "num_local": 1}, {**STOCK, "kv_conv": 4}, "NsaLmForCausalLM"),
    "nsa, one full": (NSA, {"full_layers": [0]}, "NsaLmForCausalLM"),
    "nsa, mean": (NSA | {"compression": "mean"}, {"tie_embeddings": False}, "NsaLmForCausalLM"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 400)


def make_checkpoint(folder, attention, extra, tokenizer, dtype=torch.float32):
    torch.manual_seed(0)
    config = {"model": SIZES | extra, "attention": attention, "train": {"seq_len": 512}}
    model = build_decoder(config["model"], attention, tokenizer.get_vocab_size())
    for parameter in model.parameters():  # nothing stays at one or zero; no softmax saturates
        torch.nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 1.0)
    save_weights(folder, model.to(dtype).state_dict(), config, tokenizer)
    return load_checkpoint(folder)


@pytest.mark.parametrize("case", CASES)
def test_same_logits_there_and_back(case, tokenizer, tmp_path):
    attention, extra, name = CASES[case]
    checkpoint = make_checkpoint(tmp_path / "step_00000007", attention, extra, tokenizer)
    assert export(checkpoint, tmp_path / "hf") == name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=name.startswith("Nsa")
    ).eval()
    assert type(theirs).__name__ == name
    ids = tokenizer.encode(TEXT).ids[:300]  # past two chunks, and every block and window
    with torch.no_grad():
        expected = checkpoint.model(
            torch.tensor(ids), torch.arange(300), torch.tensor([0, 300], dtype=torch.int32), 300
        )
        found = theirs(torch.tensor([ids])).logits[0]
    assert (found - expected).norm() < 1e-5 * expected.norm()

    back = load_checkpoint(import_hf(tmp_path / "hf", tmp_path / "back"))
    weights = back.model.state_dict()
    for key, weight in checkpoint.model.state_dict().items():
        assert torch.equal(weight, weights[key]), key
    with torch.no_grad():
        again = back.model(
            torch.tensor(ids), torch.arange(300), torch.tensor([0, 300], dtype=torch.int32), 300
        )
    assert torch.equal(again, expected)


def test_the_remote_model_generates_pads_and_trains(tokenizer, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "step_1", NSA, {}, tokenizer)
    export(checkpoint, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True
    )
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    end = tokenizer.token_to_id("<|endoftext|>")  # first, as in training and generation; once
    assert encode("It went.").input_ids == [end, *tokenizer.encode("It went.").ids]
    assert encode.eos_token_id == end
    import_hf(tmp_path / "hf", tmp_path / "back" / "step_1")
    export(load_checkpoint(tmp_path / "back" / "step_1"), tmp_path / "again")
    again = Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    assert again.encode("It went.").ids == encode("It went.").input_ids
    prompts = [tokenizer.encode(TEXT).ids[a:b] for a, b in ((0, 40), (50, 61))]
    expected = generate(checkpoint.model, prompts, 6, stop_tokens=[0])
    pad = [[0] * (40 - len(p)) + p for p in prompts]
    mask = [[0] * (40 - len(p)) + [1] * len(p) for p in prompts]
    out = theirs.generate(
        torch.tensor(pad), attention_mask=torch.tensor(mask), max_new_tokens=6, do_sample=False
    )
    for row, tokens in zip(out[:, 40:].tolist(), expected, strict=True):
        assert row[: len(tokens)] == tokens
    loss = theirs(torch.tensor([prompts[0]]), labels=torch.tensor([prompts[0]])).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in theirs.parameters())


def test_precision_is_kept(tokenizer, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "step_1", NSA, {}, tokenizer, torch.bfloat16)
    export(checkpoint, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True
    )
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}


def test_what_can_not_be_taken_over_says_so(tokenizer, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "step_1", FULL, STOCK, tokenizer)
    export(checkpoint, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    for change, message in (
        ({"model_type": "gpt2"}, "model_type=gpt2: only plain Llama"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling"),
        ({"mlp_bias": True}, "mlp_bias=True"),
    ):
        with pytest.raises(ValueError, match=message):
            from_hf(config | change, weights)
    save_file({**weights, "model.odd": torch.ones(1)}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match="model.odd is on one side"):
        import_hf(tmp_path / "hf", tmp_path / "back")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        import_hf(tmp_path, tmp_path / "back")


def test_the_scripts(tokenizer, tmp_path):
    make_checkpoint(tmp_path / "step_1", FULL, STOCK, tokenizer)
    hf, back = tmp_path / "hf, exported", tmp_path / "back"
    done = run_script("scripts/export_hf.py", f"checkpoint={tmp_path / 'step_1'}", f"hf_path={hf}")
    assert done.returncode == 0 and "LlamaForCausalLM" in done.stdout, done.stderr
    done = run_script("scripts/import_hf.py", f"hf_path={hf}", f"checkpoint={back}")
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr
    assert yaml.safe_load((back / "config.yaml").read_text())["train"]["seq_len"] == 512
    for source, target, message in (
        (back, tmp_path / "new", "has no config.json"),
        (hf, back, "exists; choose another folder"),
    ):
        done = run_script("scripts/import_hf.py", f"hf_path={source}", f"checkpoint={target}")
        assert done.returncode == 1 and message in done.stderr
        assert done.stderr.count("\n") == 1
