"""Rows of data to what each stage learns from, in token ids; what is cut or dropped on the way is said.

    stage 1   load_examples        (idx, targets)                          what the assistant says is a target
    stage 2   load_pairs           row["ids"] = (prompt, chosen, rejected)
    stage 3   load_prompts         row["ids"], a prompt that ends where the reply begins
              load_demonstrations  stage 1's, for --ptx_coef
"""
import os

from tqdm import tqdm

from data import prepare
from data.run import require
from data.tokenizer import count_targets, encode_demonstration
from memory import QUIET


def load_examples(cfg, tokenizer):
    """-> (train, val, characters): lists of (idx, targets), and how many characters val has if it is text."""
    splits = prepare.load(cfg.data, "sft")
    encoded, cut = [], 0
    for rows in splits:
        examples = []
        for row in tqdm(rows, desc="encoding", leave=False, disable=QUIET):
            examples += encode_demonstration(row, tokenizer, cfg.block_size)
            first_token = examples[-1][0][0]
            cut += "messages" in row and first_token != tokenizer.first  # with which a whole dialogue begins
        encoded.append([example for example in examples if count_targets([example])])
        if len(encoded[-1]) < len(examples):
            print(f"dropped {len(examples) - len(encoded[-1])} rows with nothing to learn from")
    train, val = encoded
    require(train, f"{cfg.data}: no row has anything to learn from at --block_size={cfg.block_size}.")
    tokens, learned = sum(len(idx) for idx, _ in train), count_targets(train)
    print(f"{len(train):,} rows, {tokens:,} tokens, {100 * learned / tokens:.0f} % of them with a loss; "
          f"{len(val):,} rows held out; {cut:,} longer than {cfg.block_size} tokens lost their beginning")
    is_text = all("text" in row for row in splits[1])
    return train, val, sum(len(row["text"]) for row in splits[1]) if is_text else 0


def encode_pair(row, tokenizer, block_size):
    """-> ids of (prompt, chosen, rejected). A prompt that is too long loses its beginning, as much as the
    longer reply asks for; None if only its last token would be left, <|assistant|>, or less."""
    replies = [tokenizer.reply(row[side]) for side in ("chosen", "rejected")]
    room = block_size - max(map(len, replies))
    return (tokenizer.prompt(row["prompt"], room), *replies) if room > 1 else None


def load_pairs(cfg, tokenizer):
    """-> (train rows, val rows), each row with its `ids`. Ties teach nothing and are dropped."""
    out, cut = [], 0
    for rows in prepare.load(cfg.data, "preferences"):
        for row in tqdm(rows, desc="encoding", leave=False, disable=QUIET):
            row["ids"] = encode_pair(row, tokenizer, cfg.block_size)
        fit = [row for row in rows if row["ids"]]
        out.append([row for row in fit if row["ids"][1] != row["ids"][2]])
        first_tokens = [row["ids"][0][0] for row in out[-1]]
        cut += sum(token != tokenizer.first for token in first_tokens)  # with which a whole dialogue begins
        if len(fit) < len(rows):
            print(f"dropped {len(rows) - len(fit):,} pairs whose longer reply alone fills {cfg.block_size} "
                  "tokens")
        if len(out[-1]) < len(fit):
            print(f"dropped {len(fit) - len(out[-1]):,} pairs of equal replies")
    require(out[0], f"{cfg.data}: no pair to learn from at --block_size={cfg.block_size}.")
    print(f"{len(out[0]):,} pairs, {len(out[1]):,} held out; in {cut:,} the prompt lost its beginning to fit "
          f"{cfg.block_size} tokens")
    return out


def tokens_of_pair(pair):
    """What the two dialogues take as one row: see branching()."""
    return sum(map(len, pair)) - len(os.path.commonprefix(pair[1:]))


def load_prompts(cfg, tokenizer):
    """-> (train rows, val rows), each with its `ids`."""
    max_prompt_tokens = cfg.block_size - cfg.max_new_tokens
    out = prepare.load(cfg.data, "prompts")
    trimmed = 0
    for row in out[0] + out[1]:
        ids = tokenizer.prompt(row["prompt"], 10**9)  # uncut
        row["ids"] = tokenizer.cut(ids, max_prompt_tokens)
        trimmed += len(ids) > max_prompt_tokens
    require(out[0], f"{cfg.data}: no prompts.")
    require(cfg.reward != "check" or all("check" in row for row in out[0] + out[1]),
            f"--reward=check: some prompts of {cfg.data} have no \"check\".")
    print(f"{len(out[0]):,} prompts, {len(out[1]):,} held out; "
          f"{trimmed} longer than {max_prompt_tokens} tokens lost their beginning")
    return out


def load_demonstrations(cfg, tokenizer):
    """-> stage 1's examples, which --ptx_coef learns from, too."""
    if not cfg.ptx_coef:
        return None
    examples = []
    for row in prepare.load(cfg.data, "sft")[0]:
        examples += encode_demonstration(row, tokenizer, cfg.block_size)
    examples = [example for example in examples if count_targets([example])]
    require(examples, f"--ptx_coef: no row of {cfg.data} has anything to learn from.")
    return examples
