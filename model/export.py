"""Checkpoints as Hugging Face transformers has them, and back.

A decoder that is one of transformers' own (full or sliding attention, all dimensions rotary, no output
gate, convolution, soft-cap or YaRN) becomes a Llama, Qwen3 or Mistral; any other keeps nsa-lm's names and
brings model/modeling_nsa_lm.py with it. Only files are written and read: transformers is not needed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import Sequence, TemplateProcessing
from torch import Tensor

from model.build import build_decoder, with_defaults
from model.checkpoint import TOKENIZER, WEIGHTS, Checkpoint, save_weights
from model.decoder import Decoder

END_OF_TEXT = "<|endoftext|>"
MODELING = "modeling_nsa_lm"
# (attention, QK-norm) -> transformers' model type and class.
STOCK = {
    ("FullAttention", False): ("llama", "LlamaForCausalLM"),
    ("FullAttention", True): ("qwen3", "Qwen3ForCausalLM"),
    ("SlidingAttention", False): ("mistral", "MistralForCausalLM"),
}
# Our names and theirs; of a layer after "blocks.<i>." and "model.layers.<i>.".
OUTSIDE = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
           "head.weight": "lm_head.weight"}  # fmt: skip
INSIDE = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.kv.k_proj": "self_attn.k_proj",
    "attention.kv.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.kv.k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.gate_proj": "mlp.gate_proj",
    "feed_forward.up_proj": "mlp.up_proj",
    "feed_forward.down_proj": "mlp.down_proj",
}


def export(checkpoint: Checkpoint, folder: Path) -> str:
    """Write config.json, model.safetensors, the tokenizer and, where needed, the modelling file.

    Returns the name of the class that opens it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config(checkpoint)
    weights = {name: w.contiguous().cpu() for name, w in checkpoint.model.state_dict().items()}
    if "auto_map" in config:
        shutil.copy(Path(__file__).with_name(f"{MODELING}.py"), folder)
    else:
        weights = {_theirs(name): w for name, w in weights.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    _write(folder / "config.json", config)
    end = {key: config[key] for key in ("bos_token_id", "eos_token_id", "use_cache")}
    _write(folder / "generation_config.json", end)
    _with_document_start(checkpoint.tokenizer).save(str(folder / TOKENIZER))
    _write(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    })  # fmt: skip
    return config["architectures"][0]


def _with_document_start(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that puts end-of-text first, where every document has it in training and generation."""
    tokenizer, end = Tokenizer.from_str(tokenizer.to_str()), tokenizer.token_to_id(END_OF_TEXT)
    if tokenizer.encode("").ids != [end]:
        first = TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, end)])
        own = tokenizer.post_processor
        tokenizer.post_processor = Sequence([own, first]) if own else first
    return tokenizer


def hf_config(checkpoint: Checkpoint) -> dict:
    """config.json of a checkpoint."""
    model, attention = (with_defaults(checkpoint.config[g], g) for g in ("model", "attention"))
    model["head_dim"] = model["head_dim"] or model["dim"] // model["num_heads"]
    end = checkpoint.tokenizer.token_to_id(END_OF_TEXT)
    config = {
        "vocab_size": len(checkpoint.model.embedding.weight),
        "hidden_size": model["dim"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "max_position_embeddings": checkpoint.config["train"]["seq_len"],
        "tie_word_embeddings": model["tie_embeddings"],
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": str(checkpoint.model.embedding.weight.dtype).removeprefix("torch."),
    }
    kind = attention["_target_"].rpartition(".")[2]
    extras = ("output_gate", "kv_conv", "logit_softcap", "full_layers")
    plain = not any(model[key] for key in extras)
    plain = plain and model["yarn_factor"] == model["rope_fraction"] == 1
    stock = STOCK.get((kind, model["qk_norm"])) if plain else None
    if stock is None:
        names = {"AutoConfig": "NsaLmConfig", "AutoModelForCausalLM": "NsaLmForCausalLM"}
        return config | {
            "model_type": "nsa_lm",
            "architectures": ["NsaLmForCausalLM"],
            "auto_map": {auto: f"{MODELING}.{name}" for auto, name in names.items()},
            "model": model,
            "attention": attention,
            "use_cache": False,
        }
    return config | {
        "model_type": stock[0],
        "architectures": [stock[1]],
        "num_key_value_heads": model["num_kv_heads"],
        "head_dim": model["head_dim"],
        "intermediate_size": model["ffn_dim"],
        "hidden_act": "silu",
        "rms_norm_eps": model["norm_eps"],
        "rope_theta": model["rope_base"],
        "rope_parameters": {"rope_type": "default", "rope_theta": model["rope_base"]},
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": attention.get("window"),
        "use_cache": True,
    }


def import_hf(source: Path, folder: Path) -> Path:
    """Write the model of a transformers folder (config.json, *.safetensors, tokenizer.json) as one of
    our checkpoints: full-attention Llama, Qwen3, Mistral, or what `export` wrote.

    Raises FileNotFoundError or ValueError with one sentence if it is none of these, or if the folder
    holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists; choose another folder for the checkpoint.")
    for name in ("config.json", TOKENIZER):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source} has no {name}; it is not a model of transformers.")
    config = json.loads((source / "config.json").read_text())
    weights = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}
    tokenizer = Tokenizer.from_file(str(source / TOKENIZER))
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise ValueError(
            f"The tokenizer of {source} has no {END_OF_TEXT}, which ends documents here."
        )
    groups, weights = from_hf(config, weights)
    save_weights(folder, weights, groups, tokenizer)
    return folder


def from_hf(config: Mapping, weights: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """config.json and weights of transformers -> our config groups (model, attention, train) and
    weights.

    Raises ValueError with one sentence for what our decoder does not have.
    """
    length = {"train": {"seq_len": config["max_position_embeddings"]}}
    if config["model_type"] == "nsa_lm":
        return {key: config[key] for key in ("model", "attention")} | length, dict(weights)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = {names[0]: key for key, names in STOCK.items()}
    foreign = {
        "model_type": config["model_type"] not in kinds,
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "attention_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "sliding_window": bool(window) and config["model_type"] == "qwen3",
    }
    for key, is_foreign in foreign.items():
        if is_foreign:
            raise ValueError(
                f"{key}={config.get(key)}: only plain Llama, Qwen3 and Mistral models can be taken "
                "over."
            )
    attention = {"_target_": "model.attention.full.FullAttention"}
    if window:
        attention = {"_target_": "model.attention.sliding.SlidingAttention", "window": window}
    tied = config.get("tie_word_embeddings", False)
    model = {
        "_target_": "model.decoder.Decoder",
        "dim": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": config.get("head_dim"),
        "ffn_dim": config["intermediate_size"],
        "qk_norm": kinds[config["model_type"]][1],
        "output_gate": False,
        "tie_embeddings": tied,
        "norm_eps": config["rms_norm_eps"],
        "rope_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
    }
    ours = {_ours(name): w for name, w in weights.items() if "rotary_emb" not in name}
    if tied:
        ours.pop("head.weight", None)
    with torch.device("meta"):
        decoder: Decoder = build_decoder(model, attention, config["vocab_size"])
    different = ours.keys() ^ decoder.state_dict().keys()
    if different:
        raise ValueError(
            f"The weights do not fit the config: {sorted(different)[0]} is on one side."
        )
    return {"model": model, "attention": attention} | length, ours


def _theirs(name: str) -> str:
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name):
        return f"model.layers.{match[1]}.{INSIDE[match[2]]}.weight"
    return OUTSIDE[name]


def _ours(name: str) -> str:
    outside, inside = ({b: a for a, b in table.items()} for table in (OUTSIDE, INSIDE))
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
        return f"blocks.{match[1]}.{inside.get(match[2], match[2])}.weight"
    return outside.get(name, name)


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
