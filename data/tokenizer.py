"""Rows -> token ids with a loss mask: encodings, the chat format, the files that transformers reads.

    "Hi" / "Hello."   ->   <|user|> Hi <|assistant|> Hello. <|end|>          learned: Hello. <|end|>
"""
import base64
import functools
import re
from pathlib import Path

import tiktoken

CONTROL = ("<|user|>", "<|assistant|>", "<|end|>")
TINY_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tiktoken fails at a million blanks in a row. No token reaches from a letter across a blank: cut there
PIECES = re.compile(r".{1,500000}(?:\Z|(?<=\S)(?=[ \n]))|.{1,500000}", re.DOTALL)
VOCAB_SIZE = {"tiny": 1024, "gpt2": 50304}  # padded to a multiple of 64, for fast matrix products
NO_NETWORK = """the GPT-2 encoding could not be fetched ({error}).
Without a network, place the two files of https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/ in
a folder as tiktoken names them, and set TIKTOKEN_CACHE_DIR to that folder:
    vocab.bpe    -> 6d1cbeee0f20b3d9449abfede4726ed8212e3aee
    encoder.json -> 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6
Or use --tokenizer=tiny, which is bundled."""


class Tokenizer:
    """tiktoken's encoding `name`, tiny or gpt2, plus three control tokens, which text can never produce."""
    def __init__(self, name):
        if name == "tiny":
            lines = (Path(__file__).parent / "tiny/tiny.tiktoken").read_text().splitlines()
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
            pattern, special = TINY_PATTERN, {}
        elif name == "gpt2":
            try:
                base = tiktoken.get_encoding("gpt2")
            except Exception as error:  # requests, urllib3 and tiktoken have exceptions of their own for this
                raise SystemExit(NO_NETWORK.format(error=type(error).__name__)) from None
            ranks, pattern, special = base._mergeable_ranks, base._pat_str, base._special_tokens
        else:
            raise SystemExit(f"--tokenizer={name}: unknown. Choose tiny or gpt2.")
        n = len(ranks) + len(special)
        self.name, self.vocab_size, self.ordinary = name, VOCAB_SIZE[name], len(ranks)
        self.user, self.assistant, self.end = n, n + 1, n + 2
        special = special | dict(zip(CONTROL, range(n, n + 3)))
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special)

    def encode(self, text):
        # the spelling of a control token is ordinary text
        return [i for piece in PIECES.findall(text) for i in self.encoding.encode_ordinary(piece)]

    def bytes(self, ids):
        """The bytes of ordinary tokens; control tokens, GPT-2's <|endoftext|> and the padding have none."""
        return b"".join(self.encoding.decode_single_token_bytes(i) for i in ids if i < self.ordinary)

    def decode(self, ids):
        return self.bytes(ids).decode("utf-8", errors="replace")

    def render(self, messages):
        """[{"role", "content"}, ...] -> (ids, loss_mask), two lists of one length. The mask is true for what
        the assistant says, <|end|> included."""
        ids, loss_mask = [], []
        for message in messages:
            content = self.encode(message["content"])
            if message["role"] == "user":
                ids += [self.user, *content]
                loss_mask += [False] * (1 + len(content))
            elif message["role"] == "assistant":
                ids += [self.assistant, *content, self.end]
                loss_mask += [False] + [True] * (len(content) + 1)
            else:
                raise SystemExit(f"role {message['role']!r}: only user and assistant can speak. Put a system "
                                 "message before the next user's.")
        return ids, loss_mask

    def prompt(self, messages, max_prompt_tokens):
        """Ids that end in <|assistant|>, where the reply begins; a longer prompt loses its beginning."""
        return (self.render(messages)[0] + [self.assistant])[-max_prompt_tokens:]


def encode_demonstration(row, tokenizer, block_size):
    """A row of sft.jsonl -> [(idx, targets), ...], two lists of one length, at most block_size: targets[t] is
    the token after idx[t], or -1 where there is nothing to learn.

    Of messages only what the assistant says is a target; long ones lose their beginning. Of text every token
    is, in as many windows as it takes.
    """
    if "text" in row:
        edge = {side: [tokenizer.end] * row.get(side, True) for side in ("begins", "ends")}
        ids = edge["begins"] + tokenizer.encode(row["text"]) + edge["ends"]  # <|end|> also begins a text
        idx, targets = ids[:-1], ids[1:]
        return [(idx[i:i + block_size], targets[i:i + block_size]) for i in range(0, len(idx), block_size)]
    ids, loss_mask = tokenizer.render(row["messages"])
    targets = [token if learned else -1 for token, learned in zip(ids[1:], loss_mask[1:])]
    return [(ids[:-1][-block_size:], targets[-block_size:])]


def count_targets(examples):
    """[(idx, targets), ...] -> how many targets there are."""
    return sum(t >= 0 for _, targets in examples for t in targets)


# --- the same encoding as files for transformers ------------------------------------------------------------

# as data/prepare.py: a system message goes before the next user's
CHAT_TEMPLATE = (
    "{% set before = namespace(text='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set before.text = before.text + m['content'] + '\\n\\n' %}"
    "{% elif m['role'] == 'user' %}<|user|>{{ before.text + m['content'] }}{% set before.text = '' %}"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% else %}{{ raise_exception('only system, user and assistant can speak, not ' ~ m['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if before.text %}{{ raise_exception('no user speaks after the system message') }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@functools.cache
def tokenizer_files(name, n_positions):
    """-> {file name: JSON}. transformers' apply_chat_template() then gives the ids of Tokenizer.render()."""
    encoding = Tokenizer(name).encoding
    # GPT-2 writes bytes as printable characters: these as themselves, the other 68 as characters 256 to 323
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = dict(zip(printable + others, map(chr, [*printable, *range(256, 324)])))
    spell = lambda token: "".join(letters[b] for b in token)
    ranks = encoding._mergeable_ranks
    merges = []
    # tiktoken keeps tokens, transformers the two parts that were merged into each. To find them, encode the
    # token's bytes, merging the pair of the lowest rank first, until two parts are left.
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append([spell(part) for part in parts])
    split = {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated",
             "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    exact = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": text, **exact}
             for text, i in sorted(encoding._special_tokens.items(), key=lambda item: item[1])]
    return {"tokenizer.json": {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
        "decoder": level, "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "vocab": {spell(token): rank for token, rank in ranks.items()}, "merges": merges}},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|user|>",
            "model_max_length": n_positions, "chat_template": CHAT_TEMPLATE}}
