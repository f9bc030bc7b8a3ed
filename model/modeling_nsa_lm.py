"""nsa-lm decoders for Hugging Face transformers: this one file goes with an exported checkpoint.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A pre-norm decoder with rotary positions, grouped-query attention, optional QK-norm, output gate and
convolution on keys and values, SwiGLU; attention is full, sliding, or Native Sparse Attention (arXiv
2502.11089). Plain torch: queries are taken a chunk at a time, so memory is linear in the length, time
quadratic. There is no key/value cache; generate() reads the whole text for each token. Parameters
have nsa-lm's own names.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

CHUNK = 256  # queries at a time


class NsaLmConfig(PretrainedConfig):
    """model and attention are nsa-lm's own config groups, every key given."""

    model_type = "nsa_lm"

    def __init__(self, model=None, attention=None, vocab_size=0, **kwargs):
        self.model, self.attention, self.vocab_size = model, attention, vocab_size
        super().__init__(**{"use_cache": False, **kwargs})


def rotary(config, positions):
    """cos and sin, fp32 [T, head_dim / 2]; YaRN (arXiv 2309.00071) when its factor is not 1."""
    half, factor = config["head_dim"] // 2, config["yarn_factor"]
    turning = round(config["rope_fraction"] * half)  # the others match by content (2410.06205)
    frequencies = [config["rope_base"] ** (-i / half) * (i < turning) for i in range(half)]
    if factor != 1.0:
        turns = [config["yarn_original_length"] * f / (2 * math.pi) for f in frequencies]
        keep = [min(max((t - 1) / 31, 0.0), 1.0) for t in turns]  # beta 1 and 32
        pairs = zip(frequencies, keep, strict=True)
        frequencies = [f * (k + (1 - k) / factor) for f, k in pairs]
    frequencies = torch.tensor(frequencies, dtype=torch.float32, device=positions.device)
    angles = positions[:, None].float() * frequencies
    magnitude = 0.1 * math.log(factor) + 1.0
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x, rope):
    """x [T, heads, D] turned by its positions."""
    cos, sin = (r[:, None] for r in rope)
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def attend(q, k, v, mask):
    """Softmax attention of q [R, H, D] to k, v [S, Hkv, D] where mask bool [Hkv or 1, R, S] allows.

    Returns [R, H, D], zero for a query that sees nothing, and the weights, fp32 [Hkv, G, R, S].
    """
    grouped = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).float()
    scores = grouped @ k.permute(1, 2, 0)[:, None].float() * q.shape[-1] ** -0.5
    p = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    out = p @ v.transpose(0, 1)[:, None].float()
    return out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype), p


class KeyValue(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config["num_kv_heads"] * config["head_dim"]
        self.heads = (config["num_kv_heads"], config["head_dim"])
        self.k_proj = nn.Linear(config["dim"], width, bias=False)
        self.v_proj = nn.Linear(config["dim"], width, bias=False)
        self.k_conv, self.v_conv = (short_conv(config["kv_conv"], width) for _ in "kv")
        self.k_norm = head_norm(config)

    def forward(self, x, rope):
        k, v = self.k_conv(self.k_proj(x)), self.v_conv(self.v_proj(x))
        k, v = k.unflatten(-1, self.heads), v.unflatten(-1, self.heads)
        return rotate(self.k_norm(k), rope), v


def short_conv(width, channels):
    return ShortConv(width, channels) if width else nn.Identity()


class ShortConv(nn.Module):
    """y_t = sum_j weight_j * x_(t - j), with zeros before the first token."""

    def __init__(self, width, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, channels))

    def forward(self, x):
        shifted = [F.pad(x, (0, 0, j, 0))[: len(x)] for j in range(len(self.weight))]
        pairs = zip(self.weight.float(), shifted, strict=True)
        return sum(weight * part for weight, part in pairs).to(x.dtype)


def head_norm(config):
    return (
        nn.RMSNorm(config["head_dim"], config["norm_eps"]) if config["qk_norm"] else nn.Identity()
    )


class Compression(nn.Module):
    """phi: the keys or values of a block [C, l, Hkv, D] become one [C, Hkv, D]."""

    def __init__(self, config, kind, length):
        super().__init__()
        heads, dim = config["num_kv_heads"], config["head_dim"]
        self.kind = kind
        if kind == "gated_mean":
            self.score = nn.Parameter(torch.zeros(heads, dim))
            self.position = nn.Parameter(torch.zeros(length, heads))
        elif kind == "mlp":
            self.position = nn.Parameter(torch.zeros(length, 1, dim))
            self.up_proj = nn.Linear(length * dim, 4 * dim, bias=False)
            self.down_proj = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, blocks):
        if self.kind == "mean":
            return blocks.mean(1)
        if self.kind == "gated_mean":
            score = (blocks * self.score).sum(-1).float() + self.position.float()
            return (blocks * score.softmax(1).to(blocks.dtype)[..., None]).sum(1)
        blocks = (blocks + self.position).transpose(1, 2).flatten(2)
        return self.down_proj(F.gelu(self.up_proj(blocks)))


class Attention(nn.Module):
    def __init__(self, config, kind):
        super().__init__()
        self.kind, self.name = kind, kind["_target_"].rpartition(".")[2]
        width = config["num_heads"] * config["head_dim"]
        self.heads = (config["num_heads"], config["head_dim"])
        self.q_proj = nn.Linear(config["dim"], width, bias=False)
        self.q_norm = head_norm(config)
        gated = config["output_gate"]
        self.gate_proj = nn.Linear(config["dim"], width, bias=False) if gated else None
        self.out_proj = nn.Linear(width, config["dim"], bias=False)
        if self.name == "NSAAttention":
            self.compressed, self.selected, self.local = (KeyValue(config) for _ in range(3))
            phi = config, kind["compression"], kind["compress_block"]
            self.compress_k, self.compress_v = Compression(*phi), Compression(*phi)
            self.branch_gates = nn.Linear(config["dim"], 3 * config["num_heads"])
        else:
            self.kv = KeyValue(config)

    def forward(self, x, rope):
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, self.heads)), rope)
        out = (self.nsa if self.name == "NSAAttention" else self.dense)(x, q, rope).flatten(1)
        if self.gate_proj is not None:
            out = out * torch.sigmoid(self.gate_proj(x))
        return self.out_proj(out)

    def dense(self, x, q, rope):
        window = self.kind["window"] if self.name == "SlidingAttention" else len(x)
        return torch.cat(list(windowed(q, *self.kv(x, rope), window)))

    def nsa(self, x, q, rope):
        kind, tokens = self.kind, torch.arange(len(x), device=x.device)
        length, stride, size = (
            kind[key] for key in ("compress_block", "compress_stride", "select_block")
        )
        starts = torch.arange(0, max(len(x) - length + 1, 0), stride, device=x.device)
        inside = starts[:, None] + torch.arange(length, device=x.device)
        phi = self.compress_k, self.compress_v
        raw = self.compressed(x, rope)
        k_cmp, v_cmp = (compress(part[inside]) for compress, part in zip(phi, raw, strict=True))
        k_sel, v_sel = self.selected(x, rope)
        # Importance of a selection block: weights of the compressed blocks, by the tokens they share.
        first = torch.arange(0, len(x), size, device=x.device)
        shared = torch.minimum(starts[:, None] + length, first + size)
        shared = (shared - torch.maximum(starts[:, None], first)).clamp(min=0) / stride

        near = windowed(q, *self.local(x, rope), kind["window"])
        gates = torch.sigmoid(self.branch_gates(x)).unflatten(-1, (self.heads[0], 3))
        outputs = []
        for t, o_win, gate in zip(tokens.split(CHUNK), near, gates.split(CHUNK), strict=True):
            queries, seen = q[t], slice(0, int(t[-1]) + 1)
            complete = starts + length - 1 <= t[:, None]
            o_cmp, p = attend(queries, k_cmp, v_cmp, complete[None])
            block, own = first // size, (t // size)[:, None]
            forced = (block < kind["num_initial"]) | (block > own - kind["num_local"])
            importance = (p.sum(1) @ shared).masked_fill(forced, float("inf"))
            importance = importance.masked_fill(block > own, -1.0)
            # Stable: equal importance goes to the lower block.
            best = importance.sort(dim=-1, descending=True, stable=True).indices
            best = best[..., : kind["num_selected"]]
            chosen = torch.zeros_like(importance, dtype=torch.bool).scatter(-1, best, True)
            mask = chosen[..., tokens[seen] // size] & (tokens[seen] <= t[:, None])
            o_sel, _ = attend(queries, k_sel[seen], v_sel[seen], mask)
            g = gate.unsqueeze(-1).unbind(2)
            outputs.append((g[0] * o_cmp + g[1] * o_sel + g[2] * o_win).to(q.dtype))
        return torch.cat(outputs)


def windowed(q, k, v, window):
    """Attention to the last `window` tokens, a chunk of queries at a time."""
    tokens = torch.arange(len(q), device=q.device)
    for t in tokens.split(CHUNK):
        seen = slice(max(0, int(t[0]) - window + 1), int(t[-1]) + 1)
        distance = t[:, None] - tokens[seen]
        yield attend(q[t], k[seen], v[seen], ((distance >= 0) & (distance < window))[None])[0]


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config["dim"], config["ffn_dim"], bias=False)
        self.up_proj = nn.Linear(config["dim"], config["ffn_dim"], bias=False)
        self.down_proj = nn.Linear(config["ffn_dim"], config["dim"], bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, kind):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config["dim"], config["norm_eps"])
        self.attention = Attention(config, kind)
        self.ffn_norm = nn.RMSNorm(config["dim"], config["norm_eps"])
        self.feed_forward = FeedForward(config)

    def forward(self, x, rope):
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.feed_forward(self.ffn_norm(x))


class NsaLmForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NsaLmConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        sizes = config.model
        self.embedding = nn.Embedding(config.vocab_size, sizes["dim"])
        full = {"_target_": "FullAttention"}
        self.blocks = nn.ModuleList(
            Block(sizes, full if i in sizes.get("full_layers", ()) else config.attention)
            for i in range(sizes["num_layers"])
        )
        self.norm = nn.RMSNorm(sizes["dim"], sizes["norm_eps"])
        tied = sizes["tie_embeddings"]
        self.head = None if tied else nn.Linear(sizes["dim"], config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        """input_ids [B, T]; attention_mask [B, T] marks padding, on either side, with 0.

        Logits [B, T, vocab]; with labels [B, T] (-100 is left out) also the mean loss.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.embedding(input_ids)
        rows = []
        for hidden, real in zip(x, attention_mask.bool(), strict=True):  # each sequence alone
            own = hidden[real]
            rope = rotary(self.config.model, torch.arange(len(own), device=own.device))
            for block in self.blocks:
                own = block(own, rope)
            rows.append(torch.zeros_like(hidden).index_put((real,), self.norm(own)))
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = torch.stack(rows) @ weight.T
        if cap := self.config.model["logit_softcap"]:
            logits = torch.tanh(logits / cap) * cap
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def get_input_embeddings(self):
        return self.embedding
