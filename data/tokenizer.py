"""Rows -> token ids with a loss mask: encodings, chat formats, the files that transformers reads.

    "Hi" / "Hello."   ->   <|user|> Hi <|assistant|> Hello. <|end|>          learned: Hello. <|end|>
"""
import base64
import functools
import math
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import tiktoken

from data import bpe

TINY_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tiktoken fails at a million blanks in a row. No token reaches from a letter across a blank: cut there
PIECES = re.compile(r".{1,500000}(?:\Z|(?<=[a-zA-Z])(?=[ \n]))|.{1,500000}", re.DOTALL)
VOCAB_SIZE = {"tiny": 1024, "gpt2": 50304}  # padded to a multiple of 64, for fast matrix products
NO_NETWORK = """the GPT-2 encoding could not be fetched ({error}).
Without a network, place the two files of https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/ in
a folder as tiktoken names them, and set TIKTOKEN_CACHE_DIR to that folder:
    vocab.bpe    -> 6d1cbeee0f20b3d9449abfede4726ed8212e3aee
    encoder.json -> 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6
Or use --tokenizer=tiny, which is bundled."""


# --- chat formats -------------------------------------------------------------------------------------------

class Chat(NamedTuple):
    """How a dialogue is written: `begin`, then turns with `between` between them; of each the header, the
    words and, for some roles, the end."""
    begin: str
    header: str
    end: str
    between: str
    roles: tuple = ("system", "user", "assistant")  # who has turns
    ended: tuple = ("system", "user", "assistant")  # whose turns have an end

    def control_tokens(self):
        headers = [self.header.format(role=role) for role in self.roles]
        return re.findall(r"<\|\w+\|>", "".join([self.begin, *headers, self.end]))


OURS = Chat("", "<|{role}|>", "<|end|>", "", ("user", "assistant"), ("assistant",))
CHATML = Chat("", "<|im_start|>{role}\n", "<|im_end|>", "\n")  # SmolLM2, Qwen3
LLAMA3 = Chat("<|begin_of_text|>", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "")


def default_system_text(folder):
    """What the folder's chat template tells an instruct model where a dialogue has no system turn, or ""."""
    template = ""
    for path in folder / "tokenizer_config.json", folder / "chat_template.jinja":
        if path.is_file():
            template += (str(bpe.read_json(path).get("chat_template", "")) if path.suffix == ".json" else
                         path.read_text(encoding="utf-8", errors="replace"))
    found = re.search(r"<\|im_start\|>system(?:\\n|\n)((?:\\'|[^{}'\"])+?)<\|im_end\|>", template)
    return found[1].replace("\\n", "\n").replace("\\'", "'") if found else ""


# --- the tokenizer ------------------------------------------------------------------------------------------

@functools.cache
def read_words(name):
    """tiny, gpt2, or a folder with a tokenizer.json -> (bpe.Words, default system text)."""
    if name == "tiny":
        lines = (Path(__file__).parent / "tiny/tiny.tiktoken").read_text().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
        return bpe.Words(ranks, TINY_PATTERN, {}), ""
    if name == "gpt2":
        try:
            base = tiktoken.get_encoding("gpt2")
        except Exception as error:  # requests, urllib3 and tiktoken have exceptions of their own for this
            raise SystemExit(NO_NETWORK.format(error=type(error).__name__)) from None
        return bpe.Words(base._mergeable_ranks, base._pat_str, base._special_tokens), ""
    return bpe.read(Path(name) / "tokenizer.json"), default_system_text(Path(name))


class Tokenizer:
    """The encoding `name`: tiny, gpt2, or a folder's tokenizer.json; and the chat format whose control tokens
    it has: ChatML's, Llama 3's, or ours, which are added where none are. Text never makes a control token."""
    def __init__(self, name):
        self.name, (words, self.system) = str(name), read_words(str(name))
        n = 1 + max([*words.ranks.values(), *words.control.values(), *words.atomic.values()])
        has = lambda chat: words.control.keys() >= {*chat.control_tokens()}
        self.chat = next(filter(has, (CHATML, LLAMA3, OURS)), OURS)
        if not has(self.chat):
            ours = dict(zip(OURS.control_tokens(), range(n, n + 3)))
            n, words = n + 3, words._replace(control=words.control | ours)
        self.words, self.n, self.vocab_size = words, n, math.ceil(n / 64) * 64
        self.absent = {b for b in range(256) if bytes([b]) not in words.ranks}  # SmolLM2 lacks 21 bytes
        self.encoding = tiktoken.Encoding(self.name, pat_str=words.pattern, mergeable_ranks=words.ranks,
                                          special_tokens=words.control | words.atomic)
        self.ordinary = {*words.ranks.values(), *words.atomic.values()}  # ids that text can have
        self.end = words.control[self.chat.end]
        written = self.chat.begin + self.chat.header.format(role="".join(self.chat.roles)) + self.chat.between
        if not self.absent.isdisjoint(written.encode()):
            raise SystemExit(f"{name}/tokenizer.json: no token for a letter of the chat format. Fetch it "
                             "anew.")
        self.begin = self.encoding.encode(self.chat.begin, allowed_special="all")
        self.first = self.header("user", first=True)[0]  # with which every dialogue begins

    def rows(self, stored):
        """How many rows the vocabulary has of which so many are stored."""
        return stored if self.n <= stored else self.vocab_size

    def encode(self, text):
        # the spelling of a control token is ordinary text
        if self.words.normalizer:
            text = unicodedata.normalize(self.words.normalizer, text)
        if self.absent and not self.absent.isdisjoint(text.encode("utf-8", "replace")):
            return self.encode_without_absent(text)
        return [i for piece in PIECES.findall(text) for i in self.encoding.encode(
            piece, allowed_special={*self.words.atomic}, disallowed_special=())]

    def encode_without_absent(self, text):
        """Bytes that have no token are left out, once the text is split, as transformers does."""
        import regex  # tiktoken depends on it
        pieces = (piece.encode("utf-8", "replace") for piece in regex.findall(self.words.pattern, text))
        kept = (bytes(b for b in piece if b not in self.absent) for piece in pieces)
        return [i for piece in kept if piece for i in self.encoding._encode_single_piece(piece)]

    def bytes(self, ids):
        """The bytes of ordinary tokens; control tokens and the vocabulary's padding have none."""
        return b"".join(self.encoding.decode_single_token_bytes(i) for i in ids if i in self.ordinary)

    def decode(self, ids):
        return self.bytes(ids).decode("utf-8", errors="replace")

    def header(self, role, first):
        """The ids before a turn's words."""
        before = self.chat.begin if first else self.chat.between
        return self.encoding.encode(before + self.chat.header.format(role=role), allowed_special="all")

    def reply(self, text):
        """The ids that a model has to say."""
        return self.encode(text.strip()) + [self.end]

    def turns(self, messages):
        """Messages as the chat format has them: the default system text is put in, and where the system has
        no turn, its text goes before the user's."""
        has_system = messages and messages[0]["role"] == "system"
        if "system" in self.chat.roles:
            default = [{"role": "system", "content": self.system}]
            return messages if has_system or not self.system else default + messages
        if has_system and len(messages) > 1:
            content = "\n\n".join(message["content"].strip() for message in messages[:2])
            return [messages[1] | {"content": content}, *messages[2:]]
        return messages

    def render(self, messages):
        """[{"role", "content"}, ...] -> (ids, loss_mask), two lists of one length. The mask is true for what
        the assistant says, its end token included, but for turns of weight 0."""
        ids, loss_mask = [], []
        for message in self.turns(messages):
            role = message["role"]
            if role not in self.chat.roles:
                raise SystemExit(f"role {role!r}: only user and assistant can speak, and one system message "
                                 "before them.")
            header = self.header(role, first=not ids)
            said = self.reply(message["content"])[:None if role in self.chat.ended else -1]
            ids += header + said
            learned = role == "assistant" and message.get("weight") != 0
            loss_mask += [False] * len(header) + [learned] * len(said)
        return ids, loss_mask

    def prompt(self, messages, max_prompt_tokens):
        """Ids that end in the assistant's header, where the reply begins; a longer prompt is cut()."""
        ids = self.render(messages)[0] + self.header("assistant", first=False)
        return self.cut(ids, max_prompt_tokens)

    def cut(self, ids, n):
        """The last n; but what every dialogue of Llama 3's format begins with stays."""
        return ids if len(ids) <= n else self.begin + ids[len(self.begin) - n:]


def same_tokens(a, b):
    """Do two names, of which each may be a folder, mean the same tokens?"""
    if a == b or {a, b} & VOCAB_SIZE.keys():
        return a == b
    a, b = Tokenizer(a), Tokenizer(b)
    return (a.words, a.system) == (b.words, b.system)


def encode_demonstration(row, tokenizer, block_size):
    """A row of sft.jsonl -> [(idx, targets), ...], two lists of one length, at most block_size: targets[t] is
    the token after idx[t], or -1 where there is nothing to learn.

    Of messages only what the assistant says is a target; long ones lose their beginning. Of text every token
    is, in as many windows as it takes.
    """
    if "text" in row:
        edge = {side: [tokenizer.end] * row.get(side, True) for side in ("begins", "ends")}
        # the end token also begins a text
        ids = edge["begins"] + tokenizer.encode(row["text"]) + edge["ends"]
        idx, targets = ids[:-1], ids[1:]
        return [(idx[i:i + block_size], targets[i:i + block_size]) for i in range(0, len(idx), block_size)]
    ids, loss_mask = tokenizer.render(row["messages"])
    targets = [token if learned else -1 for token, learned in zip(ids[1:], loss_mask[1:])]
    return [(ids[:-1][-block_size:], targets[-block_size:])]


def count_targets(examples):
    """[(idx, targets), ...] -> how many targets there are."""
    return sum(t >= 0 for _, targets in examples for t in targets)


# --- the same for transformers ------------------------------------------------------------------------------

OUR_TEMPLATE = (
    "{% set before = namespace(text='') %}{% for m in messages %}"
    "{% if loop.first and not loop.last and m['role'] == 'system' %}"
    "{% set before.text = m['content'] | trim + '\\n\\n' %}"
    "{% elif m['role'] == 'user' %}<|user|>{{ before.text + m['content'] | trim }}"
    "{% set before.text = '' %}"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] | trim }}<|end|>"
    "{% else %}{{ raise_exception('only user and assistant can speak, and one system message before them') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
TEMPLATE = (  # words in capitals are replaced
    "{{ BEGIN }}{% if messages[0]['role'] != 'system' %}{{ SYSTEM }}{% endif %}"
    "{% for m in messages %}{{ HEADER + m['content'] | trim + END }}"
    "{% if not loop.last or add_generation_prompt %}{{ BETWEEN }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ASSISTANT }}{% endif %}")


def chat_template(chat, system):
    """-> the Jinja template with which transformers' apply_chat_template() gives the ids of render()."""
    if chat == OURS:
        return OUR_TEMPLATE
    default = chat.header.format(role="system") + system + chat.end + chat.between if system else ""
    texts = {"BEGIN": chat.begin, "SYSTEM": default, "HEADER": chat.header, "END": chat.end,
             "BETWEEN": chat.between, "ASSISTANT": chat.header.format(role="assistant")}
    template = TEMPLATE
    for name, text in texts.items():
        text = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        template = template.replace(name, f"'{text}'".replace("{role}", "' + m['role'] + '"))
    return template


@functools.cache
def tokenizer_files(name, n_positions):
    """-> {file name: JSON}, with which transformers makes the same ids."""
    tokenizer = Tokenizer(name)
    first = next(token for token, i in tokenizer.words.control.items() if i == tokenizer.first)
    return {"tokenizer.json": bpe.to_json(tokenizer.words), "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.chat.end, "pad_token": first,
        "model_max_length": n_positions, "chat_template": chat_template(tokenizer.chat, tokenizer.system)}}
