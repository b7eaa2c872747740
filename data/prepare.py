"""Turns what people have into the three files that the stages read.

    python data/prepare.py FILE... --out=DIR

Reads HH-RLHF, Alpaca, prompt/completion, prompt/response, Dolly, question/answer, OpenAI messages, ShareGPT
conversations, UltraFeedback and TRL preferences, output_1/output_2/preference, and plain text; .json, .jsonl,
.txt, each also .gz. Writes sft.jsonl, preferences.jsonl and prompts.jsonl, with *.val.jsonl beside them:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}  or  {"text": ...}
    {"prompt": [messages], "chosen": "...", "rejected": "..."}
    {"prompt": [messages]}          and, where a right answer is known, "check": a regular expression
"""
import argparse
import gzip
import hashlib
import json
import os
import re
import sqlite3
import sys
import zlib
from collections import Counter
from pathlib import Path

KINDS = "sft", "preferences", "prompts"
FORMATS = """Known formats: chosen/rejected (strings or message lists), instruction/output,
instruction/response, prompt/completion, prompt/response, question/answer, messages, conversations,
output_1/output_2/preference, text."""


class Unusable(ValueError):
    """A row that nothing can be learned from; the message is the reason that gets counted."""


# --- messages -----------------------------------------------------------------------------------------------

ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
         "model": "assistant"}


def as_messages(turns):
    """OpenAI's or ShareGPT's turns -> our messages. A system message goes before the next user's."""
    out, system = [], ""
    for turn in turns:
        if not isinstance(turn, dict):
            raise Unusable("a turn is not an object")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(content, str) or not isinstance(role, str):
            raise Unusable("a turn without role or text")
        role = ROLES.get(role.lower(), role.lower())
        if role == "system":
            system += content + "\n\n"
        elif role in ("user", "assistant"):
            out.append({"role": role, "content": (system if role == "user" else "") + content})
            system = "" if role == "user" else system
        else:
            raise Unusable(f"unknown role {role!r}")
    return out


def check_turns(messages, last):
    """user and assistant take turns, the user begins, `last` ends, and nobody is silent."""
    roles = [message["role"] for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise Unusable("turns do not alternate from user to assistant")
    if roles[-1] != last:
        raise Unusable(f"the last turn is not the {last}'s")
    if last == "assistant" and not messages[-1]["content"].strip():
        raise Unusable("empty reply")
    return messages


def hh_messages(dialogue):
    """Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ..." -> messages."""
    parts = re.split(r"\n\n(Human|Assistant):", dialogue)
    if parts[0].strip():
        raise Unusable("a dialogue that does not begin with Human:")
    return [{"role": "user" if who == "Human" else "assistant", "content": text.strip()}
            for who, text in zip(parts[1::2], parts[2::2])]


def ask(*parts):
    return [{"role": "user", "content": "\n\n".join(part for part in parts if part)}]


# --- formats: a record -> [(kind, row), ...] ----------------------------------------------------------------

def demonstration(messages, **extra):
    check_turns(messages, "assistant")
    return [("sft", {"messages": messages, **extra}), ("prompts", {"prompt": messages[:-1]})]


def preference(prompt, chosen, rejected, **extra):
    check_turns(prompt, "user")
    if not chosen.strip() or not rejected.strip():
        raise Unusable("empty reply")
    if chosen == rejected:
        raise Unusable("both replies are equal")
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extra}
    good = [*prompt, {"role": "assistant", "content": chosen}]
    return [("preferences", row), ("sft", {"messages": good}), ("prompts", {"prompt": prompt})]


def dialogues(chosen, rejected):
    """Two whole dialogues that share everything but the last reply."""
    check_turns(chosen, "assistant")
    check_turns(rejected, "assistant")
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("the prompts of chosen and rejected differ")
    return preference(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def convert_preference(r):
    chosen, rejected, prompt = r["chosen"], r["rejected"], r.get("prompt", r.get("question"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        before = as_messages(prompt) if isinstance(prompt, list) else []
        chosen, rejected = as_messages(chosen), as_messages(rejected)
        if len(chosen) == 1:  # only the reply: the prompt is apart
            before = before or ask(prompt)
        else:  # the list repeats the prompt
            before = []
        return dialogues(before + chosen, before + rejected)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise Unusable("chosen and rejected are neither strings nor message lists")
    if prompt is None:
        return dialogues(hh_messages(chosen), hh_messages(rejected))
    extra = {k: r[k] for k in ("agreement", "skill") if k in r}
    return preference(as_prompt(prompt), chosen, rejected, **extra)


def as_prompt(prompt):
    if isinstance(prompt, list):
        return as_messages(prompt)
    if not isinstance(prompt, str):
        raise Unusable("the prompt is neither a string nor a message list")
    if prompt.startswith("\n\nHuman:"):
        return hh_messages(prompt.removesuffix("\n\nAssistant:"))
    return ask(prompt)


def convert_ranked(r):
    """output_1, output_2 and which of them is preferred: 1 or 2."""
    if r["preference"] not in (1, 2, "1", "2"):
        raise Unusable("no clear preference")
    first, second = text_of(r, "output_1"), text_of(r, "output_2")
    pair = (first, second) if str(r["preference"]) == "1" else (second, first)
    return preference(ask(r.get("instruction") or r.get("prompt"), r.get("input")), *pair)


def convert_prompt(r):
    extra = {k: r[k] for k in ("check", "skill") if k in r}
    prompt = check_turns(as_prompt(r["prompt"]), "user")
    if "check" in extra:
        try:
            re.compile(extra["check"])
        except (re.error, TypeError) as error:
            raise Unusable(f"check is not a regular expression ({error})") from None
    return [("prompts", {"prompt": prompt, **extra})]


def text_of(r, *names):
    """The first of `names` that the record has, as text."""
    value = next(r[name] for name in names if name in r)
    if not isinstance(value, str):
        raise Unusable(f"{names[0]} is not text")
    return value


def reply(text):
    return [{"role": "assistant", "content": text}]


def convert(r):
    """A record in any known format -> [(kind, row), ...]; raises Unusable with the reason."""
    has = lambda *names: all(name in r for name in names)
    if not isinstance(r, dict):
        raise Unusable("not a JSON object")
    if has("chosen", "rejected"):
        return convert_preference(r)
    if has("output_1", "output_2", "preference"):
        return convert_ranked(r)
    if has("messages") or has("conversations"):
        turns = r.get("messages", r.get("conversations"))
        if not isinstance(turns, list):
            raise Unusable("messages is not a list")
        return demonstration(as_messages(turns), **{k: r[k] for k in ("skill",) if k in r})
    if has("instruction") and (has("output") or has("response")):
        context = r.get("input") or r.get("context")  # Alpaca's and Dolly's names
        question = ask(text_of(r, "instruction"), context)
        return demonstration(question + reply(text_of(r, "output", "response")))
    for question, answer in (("prompt", "completion"), ("prompt", "response"), ("question", "answer")):
        if has(question, answer):
            answer = as_messages(r[answer]) if isinstance(r[answer], list) else reply(text_of(r, answer))
            return demonstration(as_prompt(r[question]) + answer)
    if has("prompt"):
        return convert_prompt(r)
    if has("text"):
        if not text_of(r, "text").strip():
            raise Unusable("empty text")
        return [("sft", {"text": r["text"]})]
    raise Unusable(f"no known format in keys {', '.join(sorted(map(str, r)))[:100]}")


# --- files --------------------------------------------------------------------------------------------------

def open_text(path):
    """Lines of a possibly gzipped file, each decoded on its own, so that one bad byte costs one row."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            for number, line in enumerate(f, 1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"{path}: cannot be read ({error}).") from None


def text_chunks(path, size=2000):
    """A text file, all of it, in chunks of about `size` characters that end at blank lines."""
    chunk = ""
    for number, line in open_text(path):
        chunk += line.decode("utf-8", errors="replace")
        if len(chunk) >= size and not line.strip():
            yield number, {"text": chunk}
            chunk = ""
    if chunk:
        yield number, {"text": chunk}


def records(path):
    """-> (line number, record); a record that cannot be read is an Unusable."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".txt":
        yield from text_chunks(path)
    elif kind == ".json":
        try:
            whole = json.loads(b"".join(line for _, line in open_text(path)))
        except ValueError as error:
            raise SystemExit(f"{path}:{getattr(error, 'lineno', 1)}: broken JSON ({error}).") from None
        yield from enumerate(whole if isinstance(whole, list) else [whole], 1)
    else:
        for number, line in open_text(path):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    yield number, Unusable(f"broken JSON ({getattr(error, 'msg', 'not UTF-8')})")


def read(path, on_error):
    """-> (kind, row) of every usable record of a file; on_error(line, reason) hears of the others."""
    for number, record in records(path):
        try:
            if isinstance(record, Unusable):
                raise record
            yield from convert(record)
        except Unusable as error:
            on_error(number, str(error))


def stop_at(path):
    def on_error(number, reason):
        raise SystemExit(f"{path}:{number}: {reason}. Mend or delete that line.")
    return on_error


def is_held_out(row, val_fraction):
    """By a stable hash of the prompt (or text): rows of one prompt are on one side, on every machine."""
    messages = row["messages"][:-1] if "messages" in row else row.get("prompt", row.get("text"))
    digest = hashlib.blake2b(json.dumps(messages).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * 2**64


def load(path, kind, val_fraction=0.1, optional=False):
    """A folder of ours, or one file in any known format -> (train rows, held-out rows) of one of KINDS.

    Where a folder has no {kind}.val.jsonl, the training file is split. A broken row in a folder of ours stops
    with file and line (SystemExit); in a foreign file rows that cannot be used are counted. With `optional`,
    data that are not there are just empty.
    """
    path = Path(path)
    if not path.exists():
        raise SystemExit(f"{path}: no such file or folder. Give --data a folder with {kind}.jsonl, or one "
                         "file.")
    files = [path / f"{kind}.jsonl", path / f"{kind}.val.jsonl"] if path.is_dir() else [path]
    if not files[0].exists():
        if optional:
            return [], []
        raise SystemExit(f"{path}: no {kind}.jsonl here. Make one with: "
                         f"python data/prepare.py FILE... --out={path}")
    dropped = Counter()
    def count(number, reason):
        if "JSON" in reason:
            stop_at(path)(number, reason)
        dropped[reason] += 1
    found = [[row for k, row in read(file, stop_at(file) if path.is_dir() else count) if k == kind]
             for file in files if file.exists()]
    for reason, n in dropped.items():
        print(f"{path}: dropped {n:,} rows: {reason}")
    if not found[0] and not optional:
        raise SystemExit(f"{files[0]}: no row of the kind that {kind}.jsonl holds. {FORMATS}")
    if len(found) == 2:
        return tuple(found)
    train = [row for row in found[0] if not is_held_out(row, val_fraction)]
    return (train, [row for row in found[0] if is_held_out(row, val_fraction)]) if train else (found[0], [])


# --- the converter ------------------------------------------------------------------------------------------

class Writer:
    """The output files, under temporary names until all is well."""
    def __init__(self, out):
        out.mkdir(parents=True, exist_ok=True)
        self.paths = {(kind, val): out / f"{kind}{('', '.val')[val]}.jsonl"
                      for kind in KINDS for val in (0, 1)}
        self.files = {key: open(f"{path}.tmp", "w", encoding="utf-8") for key, path in self.paths.items()}
        self.counts, self.seen = Counter(), sqlite3.connect("")  # on disk: memory stays flat
        self.seen.execute("create table prompts (digest integer primary key)")

    def add(self, kind, row, val):
        if kind == "prompts":  # each once; eight bytes of a hash are enough to remember it by
            digest = hashlib.blake2b(json.dumps(row["prompt"]).encode(), digest_size=8).digest()
            new = "insert or ignore into prompts values (?)", (int.from_bytes(digest, "big", signed=True),)
            if not self.seen.execute(*new).rowcount:
                return
        self.files[kind, val].write(json.dumps(row, ensure_ascii=False) + "\n")
        self.counts[kind, val] += 1

    def close(self, keep):
        self.seen.close()
        for key, path in self.paths.items():
            self.files[key].close()
            if keep and (self.counts[key] or self.counts[key[0], 0]):
                os.replace(f"{path}.tmp", path)
            else:
                os.unlink(f"{path}.tmp")


def token_counter():
    sys.path.append(str(Path(__file__).parent.parent))
    from data.tokenizer import Tokenizer  # GPT-2's encoding may be a download: for --max_tokens only
    encode = Tokenizer("gpt2").encode

    def count(row):
        texts = [row.get("text", ""), row.get("chosen", ""), row.get("rejected", "")]
        texts += [m["content"] for m in row.get("messages", row.get("prompt", []))]
        return len(encode("".join(texts)))
    return count


def main(files, out, limit=0, val_fraction=0.1, max_tokens=0, strict=False):
    for path in files:
        if not path.exists():
            raise SystemExit(f"{path}: no such file.")
    if not 0 <= val_fraction < 1:
        raise SystemExit(f"--val_fraction={val_fraction}: at least 0 and below 1.")
    for name, value in (("limit", limit), ("max_tokens", max_tokens)):
        if value < 0:
            raise SystemExit(f"--{name}={value}: at least 0, which means no limit.")
    tokens = token_counter() if max_tokens else None
    dropped, writer = Counter(), Writer(out)
    try:
        for path in files:
            def on_error(number, reason):
                if strict:
                    stop_at(path)(number, reason)
                print(f"{path}:{number}: {reason}")
                dropped[reason] += 1
            for kind, row in read(path, on_error):
                if limit and writer.counts.total() >= limit:
                    break
                if tokens and tokens(row) > max_tokens:
                    dropped[f"{kind} of more than {max_tokens} tokens"] += 1
                    continue
                writer.add(kind, row, is_held_out(row, val_fraction))
        if not writer.counts:
            raise SystemExit(f"{', '.join(map(str, files))}: not one usable row. {FORMATS}")
    except BaseException:
        writer.close(keep=False)
        raise
    writer.close(keep=True)
    for kind in KINDS:
        if writer.counts[kind, 0] or writer.counts[kind, 1]:
            print(f"{out}/{kind}.jsonl: {writer.counts[kind, 0]:,} rows, {writer.counts[kind, 1]:,} held out")
    for reason, n in dropped.most_common():
        print(f"dropped {n:,}: {reason}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--limit", type=int, default=0, help="stop after writing this many rows [0: all]")
    parser.add_argument("--val_fraction", type=float, default=0.1, help="share of prompts held out [0.1]")
    parser.add_argument("--max_tokens", type=int, default=0,
                        help="drop rows of more GPT-2 tokens than this [0: none]")
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")
    main(**vars(parser.parse_args()))
