"""Byte-level BPE: tokenizer.json, the format of the hub's models, in and out of what tiktoken needs.

    words = read("smollm2/tokenizer.json")      # refuses, by name, what would not give the same ids
    json.dump(to_json(words), file)

The vocabulary maps bytes to ids. To encode, a text is split by a pattern, and in each piece the two
neighbours whose bytes together have the lowest id become one token, again and again: Sennrich et al. 2015,
arXiv:1508.07909. tokenizer.json lists which pairs are merged, in order; tiktoken needs the ids alone.
"""
import functools
import json
from typing import NamedTuple

import tiktoken

# What the hub's names for ways of splitting mean. GPT-2's has no name of its own: it is built into ByteLevel
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_APART = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


class Words(NamedTuple):
    ranks: dict             # bytes of a token -> its id
    pattern: str            # regular expression that splits a text
    control: dict           # tokens that text can never produce -> their ids
    atomic: dict = {}       # words that are one token wherever they occur, such as <think>
    normalizer: str = ""    # "NFC", or none


@functools.cache
def letters():
    """tokenizer.json writes bytes as printable characters -> {byte: character}: 188 stand for themselves, the
    other 68 are the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return dict(zip(printable + others, map(chr, [*printable, *range(256, 324)])))


def merges(ranks):
    """{bytes: id} -> [(left, right), ...]: of which two tokens each longer one is made, by id.

    To find them, the token's bytes are merged, the pair of the lowest id first, until two parts are left. A
    text is merged no differently: what stands around a token's bytes cannot change the order inside it.
    """
    out = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            if parts[i] + parts[i + 1] not in ranks:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 1:
            out.append(tuple(parts))
    return out


def read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise SystemExit(f"{path}: not readable as JSON ({error}).") from None
    if not isinstance(value, dict):
        raise SystemExit(f"{path}: not a JSON object.")
    return value


def find_pattern(pre_tokenizer):
    """tokenizer.json's "pre_tokenizer" -> the pattern that splits alike; None if none is known."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    *before, level = [dict(step or {}) for step in steps]
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space", True):
        return None
    before = [{name: value for name, value in step.items() if value is not False} for step in before]
    if level.get("use_regex", True):
        return (GPT2_PATTERN if not before else
                DIGITS_APART if before == [{"type": "Digits", "individual_digits": True}] else None)
    pattern = before[0].get("pattern", {}).get("Regex") if before else None
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return pattern if before == [split] else None


def read(path):
    """tokenizer.json -> Words. SystemExit that names what of it tiktoken cannot do exactly."""
    if not path.is_file():
        raise SystemExit(f"{path}: not there. (SentencePiece's tokenizer.model is not known here.)")
    stored = read_json(path)
    try:
        return parse(stored)
    except ValueError as error:
        raise SystemExit(f"{path}: {error}. Only byte-level BPE whose ids follow its merges is known here, "
                         "that of GPT-2, SmolLM2, Llama 3 and Qwen3.") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{path}: not a tokenizer ({type(error).__name__}: {error}).") from None


def parse(stored):
    """The object in tokenizer.json -> Words; ValueError that says what is not exactly representable."""
    model, normalizer = stored["model"], stored.get("normalizer")

    def need(condition, otherwise):
        if not condition:
            raise ValueError(otherwise)
    need(model["type"] == "BPE" and not model.get("byte_fallback"), "not byte-level BPE")
    for switch in "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix":
        need(not model.get(switch), f"{switch} is {model.get(switch)!r}")
    need(normalizer in (None, {"type": "NFC"}), f"the normalizer is {normalizer}")
    pattern = find_pattern(stored.get("pre_tokenizer"))
    need(pattern, f"the pre_tokenizer is {str(stored.get('pre_tokenizer'))[:200]}")
    tiktoken.Encoding("", pat_str=pattern, mergeable_ranks={b"a": 0}, special_tokens={})  # can it be read?
    control, atomic = {}, {}
    for token in stored.get("added_tokens", []):
        (control if token["special"] else atomic)[token["content"]] = token["id"]
        trims = [name for name in ("single_word", "lstrip", "rstrip") if token.get(name)]
        need(token["special"] or not trims, f"{token['content']!r} is added with {', '.join(trims)}")
    byte_of = {letter: byte for byte, letter in letters().items()}
    strange = {*"".join(model["vocab"].keys() - control.keys() - atomic.keys())} - byte_of.keys()
    need(not strange, f"its tokens hold {''.join(sorted(strange))[:20]!r}, which stand for no byte")
    spell = lambda token: bytes(map(byte_of.__getitem__, token))
    ranks = {spell(token): i for token, i in model["vocab"].items() if token not in control | atomic}
    ids = [*ranks.values(), *control.values(), *atomic.values()]
    need(len({*ids}) == len(ids) and all(type(i) is int and 0 <= i < 2**24 for i in ids),
         "its ids are not whole numbers, each of one token")
    listed = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    listed, made = [tuple(map(spell, pair)) for pair in listed], merges(ranks)
    wrong = next((there for here, there in zip(made, listed) if here != there), None)
    need(not wrong and len(made) == len(listed),
         f"its {len(listed)} merges are not those that the order of its ids asks for ({wrong or len(made)})")
    return Words(ranks, pattern, control, atomic, (normalizer or {}).get("type", ""))


def to_json(words):
    """Words -> tokenizer.json, with which transformers makes the same ids."""
    spell = lambda token: "".join(letters()[b] for b in token)
    split = {"type": "Split", "pattern": {"Regex": words.pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    exact = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": text, **exact, "special": text in words.control}
             for text, i in sorted((words.control | words.atomic).items(), key=lambda item: item[1])]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": words.normalizer} if words.normalizer else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
            "decoder": level, "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                # added tokens, too: those that it lacks get ids of their own
                "vocab": {spell(token): rank for token, rank in words.ranks.items()}
                | words.control | words.atomic,
                "merges": [[spell(part) for part in pair] for pair in merges(words.ranks)]}}
