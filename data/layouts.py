"""What the hub's layouts call things, in our names and back: config.json's sizes and switches, tensors.

    GPT-2           our names behind "transformer."; its matrices are (in, out), ours (out, in)
    Llama, Qwen3    names of their own; queries, keys and values, and an MLP's two halves, are apart

No file is touched here. config is model.py's GPTConfig as a dict.
"""
import math
import re

import torch

# --- models by name: (the hub's repository, config), all that a dry run needs -------------------------------


def gpt2(n_layer, n_head, n_embd):
    return {"vocab_size": 50304, "n_positions": 1024, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}


def llama(n_layer, heads, n_embd, n_inner, vocab_size, n_positions, rope_theta, **other):
    return {"model_type": "llama", "vocab_size": vocab_size, "n_positions": n_positions, "n_layer": n_layer,
            "n_head": heads[0], "n_kv_head": heads[1], "n_embd": n_embd, "n_inner": n_inner,
            "rope_theta": rope_theta, **other}


def llama3(factor):
    return {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}


SMOLLM2 = {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", llama(30, (9, 3), 576, 1536, 49152, 8192, 1e5)),
           "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M", llama(32, (15, 5), 960, 2560, 49152, 8192, 1e5)),
           "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B",
                            llama(24, (32, 32), 2048, 8192, 49152, 8192, 1.3e5))}
MODELS = {
    "gpt2": ("openai-community/gpt2", gpt2(12, 12, 768)),
    "gpt2-medium": ("openai-community/gpt2-medium", gpt2(24, 16, 1024)),
    "gpt2-large": ("openai-community/gpt2-large", gpt2(36, 20, 1280)),
    "gpt2-xl": ("openai-community/gpt2-xl", gpt2(48, 25, 1600)),
    **SMOLLM2, **{f"{name}-instruct": (f"{repo}-Instruct", sizes) for name, (repo, sizes) in SMOLLM2.items()},
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", llama(28, (16, 8), 1024, 3072, 151936, 40960, 1e6, model_type="qwen3",
                                            head_dim=128, norm_eps=1e-6)),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", llama(16, (32, 8), 2048, 8192, 128256, 131072, 5e5,
                                                      rope_scaling=llama3(32.0))),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", llama(32, (32, 8), 4096, 14336, 128256, 131072, 5e5,
                                                      rope_scaling=llama3(8.0), tied=False))}

SCRATCH = {"scratch": "gpt2", "scratch-llama": "llama", "scratch-qwen3": "qwen3"}  # --init: model_type


def scratch(kind, n_layer, n_head, n_embd):
    """Sizes of random weights: a Llama's MLP has three matrices with as many weights as GPT-2's two, and half
    as many heads of keys."""
    sizes = {"model_type": kind, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    if kind == "gpt2":
        return sizes
    return sizes | {"n_inner": math.ceil(8 * n_embd / 3 / 64) * 64,
                    "n_kv_head": n_head // 2 if n_head % 2 == 0 else n_head}


# --- config.json --------------------------------------------------------------------------------------------

GPT2_SIZES = "vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "n_inner"
LLAMA_SIZES = {"vocab_size": "vocab_size", "n_positions": "max_position_embeddings",
               "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
               "n_kv_head": "num_key_value_heads", "head_dim": "head_dim", "n_embd": "hidden_size",
               "n_inner": "intermediate_size"}
# ours: the hub's
SIZES = {"gpt2": dict(zip(GPT2_SIZES, GPT2_SIZES)), "llama": LLAMA_SIZES, "qwen3": LLAMA_SIZES}
# Switches with what is implemented of them; the first is what transformers takes where nothing is said
COMMON = {"quantization_config": [None], "num_experts": [None, 0], "num_local_experts": [None, 0]}
LLAMA_SWITCHES = COMMON | {"hidden_act": ["silu"], "attention_bias": [False], "mlp_bias": [False],
                           "use_sliding_window": [False], "rope_interleaved": [False]}
SWITCHES = {
    "gpt2": COMMON | {
        "activation_function": ["gelu_new", "gelu_pytorch_tanh"],  # two names of one function
        "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True], "add_cross_attention": [False],
        "scale_attn_by_inverse_layer_idx": [False]},
    "llama": LLAMA_SWITCHES | {"sliding_window": [None]}, "qwen3": LLAMA_SWITCHES}


def read_config(stored):
    """The object in config.json -> config. ValueError that names the key, its value and what is known."""
    kind = stored.get("model_type")
    if kind not in SIZES:
        raise ValueError(f"model_type is {kind}; known here: {', '.join(SIZES)}")
    for name, values in SWITCHES[kind].items():
        value = stored.get(name, values[0])
        if value not in values:
            raise ValueError(f"{name} is {value}; known here: {', '.join(map(str, values))}")
    if {*map(str, stored.get("layer_types") or [])} - {"full_attention"}:
        raise ValueError("layer_types: only full_attention is known here")
    sizes = read_sizes({ours: stored.get(theirs) for ours, theirs in SIZES[kind].items()}, kind)
    if kind == "gpt2":
        return {"model_type": kind, **sizes, "tied": True}
    return {"model_type": kind, **sizes, **read_rope(stored),
            "norm_eps": float(stored.get("rms_norm_eps", 1e-6)),
            "tied": bool(stored.get("tie_word_embeddings", False))}


def read_sizes(sizes, kind):
    """-> the same with what follows from others in place of None."""
    is_size = lambda n: type(n) is int and 0 < n < 10**6
    C, H = sizes["n_embd"], sizes["n_head"]
    if is_size(C) and is_size(H):
        follows = {"vocab_size": 50257, "n_inner": 4 * C, "n_kv_head": H,
                   "head_dim": 128 if kind == "qwen3" else C // H}
        sizes = follows | {name: n for name, n in sizes.items() if n is not None or name not in follows}
    if not all(map(is_size, sizes.values())) or H % sizes["n_kv_head"] or kind == "gpt2" and C % H:
        raise ValueError(f"{sizes}: not the sizes of a {kind}")
    return sizes


def read_rope(stored):
    """-> rope_theta and rope_scaling. (transformers 5 has both in one object, rope_parameters.)"""
    rope = {"rope_theta": stored.get("rope_theta", 1e4), **(stored.get("rope_scaling") or {}),
            **(stored.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_scaling is of the kind {kind}; known here: default, llama3")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']}; known here: 1")
    scaling = {name: float(rope[name]) for name in llama3(1)} if kind == "llama3" else None
    return {"rope_theta": float(rope["rope_theta"]), "rope_scaling": scaling}


def write_config(config, scorer):
    """config -> the object in config.json: for transformers' ...ForCausalLM, or ...ForSequenceClassification
    if it is a scorer."""
    kind = config["model_type"]
    architecture = {"gpt2": "GPT2", "llama": "Llama", "qwen3": "Qwen3"}[kind]
    head = "ForSequenceClassification" if scorer else "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    out = {"model_type": kind, "architectures": [architecture + head],
           **{theirs: config[ours] for ours, theirs in SIZES[kind].items()},
           "tie_word_embeddings": config["tied"]}
    if kind == "gpt2":
        return out | {"n_ctx": config["n_positions"], "activation_function": "gelu_new",
                      "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    scaling = config["rope_scaling"]
    return out | {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
                  "rms_norm_eps": config["norm_eps"], "rope_theta": config["rope_theta"],
                  "rope_scaling": {"rope_type": "llama3", **scaling} if scaling else None}


def block_weights(config):
    """-> how many weights the matrices of one block have."""
    C, D, gated = config["n_embd"], config["head_dim"], config["model_type"] != "gpt2"
    return C * (2 * (config["n_head"] + config["n_kv_head"]) * D + (2 + gated) * config["n_inner"])


# --- tensors ------------------------------------------------------------------------------------------------

# GPT-2's matrices that are stored as (in, out)
TRANSPOSED = "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"
# Llama's and Qwen3's names; i is the layer's number, and several tensors stand side by side in one of ours
LLAMA = {
    "wte.weight": ["model.embed_tokens.weight"],
    "h.i.ln_1.weight": ["model.layers.i.input_layernorm.weight"],
    "h.i.attn.c_attn.weight": [f"model.layers.i.self_attn.{x}_proj.weight" for x in "qkv"],
    "h.i.attn.q_norm.weight": ["model.layers.i.self_attn.q_norm.weight"],
    "h.i.attn.k_norm.weight": ["model.layers.i.self_attn.k_norm.weight"],
    "h.i.attn.c_proj.weight": ["model.layers.i.self_attn.o_proj.weight"],
    "h.i.ln_2.weight": ["model.layers.i.post_attention_layernorm.weight"],
    "h.i.mlp.c_fc.weight": [f"model.layers.i.mlp.{x}_proj.weight" for x in ("gate", "up")],
    "h.i.mlp.c_proj.weight": ["model.layers.i.mlp.down_proj.weight"],
    "ln_f.weight": ["model.norm.weight"],
    "lm_head.weight": ["lm_head.weight"],
    "score.weight": ["score.weight"]}
OURS = {theirs: ours for ours, names in LLAMA.items() for theirs in names}


def split_layer(name):
    """"h.3.ln_1.weight" -> ("h.i.ln_1.weight", "3")"""
    number = re.search(r"\.(\d+)\.", name)
    return (name, "") if not number else (name.replace(number[0], ".i.", 1), number[1])


def read_tensors(stored, config):
    """The hub's {name: tensor} -> ours. Names that no layout has stay as they are."""
    out = {}
    if config["model_type"] == "gpt2":
        for name, t in stored.items():
            name = name.removeprefix("transformer.")
            if not re.search(r"\.attn\.(bias|masked_bias)$", name):  # the causal mask (not c_attn.bias!)
                out[name] = t.T if name.endswith(TRANSPOSED) else t
        return out
    # a base model's names lack the first word
    stored = {name if name.startswith(("model.", "lm_head.", "score.")) else f"model.{name}": t
              for name, t in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    for name in stored:
        pattern, i = split_layer(name)
        ours = OURS.get(pattern, pattern).replace(".i.", f".{i}.")
        parts = [theirs.replace(".i.", f".{i}.") for theirs in LLAMA.get(OURS.get(pattern), [pattern])]
        if ours not in out and stored.keys() >= {*parts}:
            out[ours] = torch.cat([stored[part] for part in parts]) if len(parts) > 1 else stored[name]
    return out


def write_tensors(tensors, config):
    """The opposite of read_tensors."""
    out = {}
    for name, t in tensors.items():
        if config["model_type"] == "gpt2":
            out[name if name.startswith("score.") else f"transformer.{name}"] = (
                t.T if name.endswith(TRANSPOSED) else t)
            continue
        pattern, i = split_layer(name)
        parts, rows = LLAMA[pattern], [len(t)]
        if len(parts) == 2:
            rows = [len(t) // 2] * 2
        elif len(parts) == 3:
            rows = [config[heads] * config["head_dim"] for heads in ("n_head", "n_kv_head", "n_kv_head")]
        out |= {theirs.replace(".i.", f".{i}."): part for theirs, part in zip(parts, t.split(rows))}
    return out
