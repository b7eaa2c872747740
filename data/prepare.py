"""Turns what people have into the three files that the stages read.

    python data/prepare.py FILE... --out=DIR

Reads HH-RLHF, Alpaca, prompt/completion, prompt/response, Dolly, question/answer, OpenAI messages, ShareGPT
conversations, UltraFeedback and TRL preferences, output_1/output_2/preference, and plain text; .json, .jsonl,
.txt, each also zipped with gzip. System texts, contexts and history become part of the prompt; of many
rejected replies each makes a pair; a turn with "weight": 0 ("train" or "loss": false) is read, not learned.
FIELDS says what a row, a turn and a part of a turn may hold; what is not used is named, with its rows. Writes
sft.jsonl, preferences.jsonl and prompts.jsonl, with *.val.jsonl beside them:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}  or  {"text": ...}
    {"prompt": [messages], "chosen": "...", "rejected": "..."}
    {"prompt": [messages]}          and, where a right answer is known, regular expressions that a whole reply
                                    matches: "right" if the answer is there, "check" if it is good

A text file is cut into many rows of one document: "begins": false and "ends": false mark where it goes on.
"""
import argparse
import codecs
import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import sqlite3
import sys
import zlib
from collections import Counter
from itertools import chain, product
from pathlib import Path

KINDS = "sft", "preferences", "prompts"
FORMATS = """Known formats: chosen/rejected (strings or message lists), instruction/output,
instruction/response, prompt/completion, prompt/response, question/answer, messages, conversations,
output_1/output_2/preference, text, and a prompt alone."""
QUESTIONS, REPLIES = ("instruction", "prompt", "question"), ("output", "response", "completion", "answer")


class Unusable(ValueError):
    """A row that nothing can be learned from; the message is the reason that gets counted."""


# --- columns: what a row, a turn and a part of a turn may hold ----------------------------------------------

ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
         "model": "assistant", "developer": "system"}


def text(value, name, family):
    """A string, or OpenAI's list of parts, [{"type": "text", "text": ...}, ...], joined."""
    if value and isinstance(value, list) and all(isinstance(part, dict) for part in value):
        parts = [Record(part, "part", family) for part in value]
        kinds = {part.first("type") for part in parts} - {None, "text", "input_text", "output_text"}
        if kinds or not all("text" in part for part in parts):
            raise Unusable(f"a part of {name} is not text")
        value = "".join(part["text"] for part in parts)
    if not isinstance(value, str):
        raise Unusable(f"{name} is not text")
    return value


def turns(value, name, family):
    """OpenAI's or ShareGPT's turns -> messages. OpenAI's "weight": 0, others' "train" or "loss": false stay,
    as "weight": 0: that turn is read, not learned."""
    if not isinstance(value, list):
        raise Unusable(f"{name} is not a list")
    out = []
    for turn in value:
        if not isinstance(turn, dict):
            raise Unusable("a turn is not an object")
        turn = Record(turn, "turn", family)
        message = {"role": turn.first("role", "from"), "content": turn.first("content", "value")}
        if None in message.values():
            raise Unusable("a turn without role or text")
        learned = all([turn[name] for name in ("weight", "train", "loss") if name in turn])
        out.append(message if learned or message["role"] != "assistant" else message | {"weight": 0})
    return out


def role(value, name, family):
    known = ROLES.get(str(value).lower(), str(value).lower())
    if known not in ("system", "user", "assistant"):
        raise Unusable(f"unknown role {str(value)[:30]!r}")
    return known


def said(value, name, family):
    """A dialogue -> messages; or text."""
    value = [value] if isinstance(value, dict) else value
    if isinstance(value, list) and all(isinstance(turn, dict) and "type" not in turn for turn in value):
        return turns(value, name, family)
    return text(value, name, family)


def question(value, name, family):
    value = said(value, name, family)
    if isinstance(value, str):
        return hh_messages(value.removesuffix("\n\nAssistant:")) or [{"role": "user", "content": value}]
    return value


def reply(value, name, family):
    value = said(value, name, family)
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def replies(value, name, family):
    """One reply or a list of strings, of which each is one -> [text or messages, ...]."""
    several = value and isinstance(value, list) and all(isinstance(x, str) for x in value)
    return [said(x, name, family) for x in (value if several else [value])]


def history(value, name, family):
    """Turns, or Alpaca's pairs of question and reply."""
    if isinstance(value, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        value = [{"role": who, "content": words}
                 for pair in value for who, words in zip(("user", "assistant"), pair)]
    return turns(value, name, family)


def flag(value, name, family):
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if str(value).lower() not in known:
        raise Unusable(f"{name} is {str(value)[:30]!r}, neither true nor false")
    return known[str(value).lower()]


def as_it_is(value, name, family):
    return value


def first_or_second(value, name, family):
    if value not in (1, 2, "1", "2"):
        raise Unusable("no clear preference")
    return int(value)


def share(value, name, family):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise Unusable(f"{name} is {str(value)[:30]!r}, not a number from 0 to 1")
    return value


def pattern(value, name, family):
    try:
        re.compile(value)
    except Exception as error:  # re has many: OverflowError, RecursionError, ...
        raise Unusable(f"{name} is not a regular expression ({type(error).__name__}: {error})") from None
    return value


FIELDS = {level: {name: read for names, read in fields.items() for name in names.split()}
          for level, fields in {
    "row": {"messages conversations": turns, "instruction prompt question": question,
            "output response completion answer": reply, "chosen rejected": replies, "history": history,
            "system system_prompt input context output_1 output_2 text skill set": text,
            "preference": first_or_second, "agreement": share, "right check": pattern,
            "label begins ends": as_it_is},
    "turn": {"role from": role, "content value": text, "weight train loss": flag},
    "part": {"type text": text}}.items()}


class Record(dict):
    """A row, a turn or a part, without its nulls, which mean the same as no column. record[name] is what
    FIELDS reads there. `family` collects a row's Records: what nobody asked them for is named in the end."""
    def __init__(self, row, level="row", family=None):
        super().__init__((name, value) for name, value in row.items() if value is not None)
        self.level, self.used, self.family = level, set(), [] if family is None else family
        self.family.append(self)

    def __getitem__(self, name):
        self.used.add(name)
        return FIELDS[self.level][name](super().__getitem__(name), name, self.family)

    def first(self, *names):
        """The first of these columns that is there, or None."""
        return next((self[name] for name in names if name in self), None)

    def unused(self):
        return {name if record is self else f"{name} of a {record.level}"
                for record in self.family for name in record.keys() - record.used}


# --- messages -----------------------------------------------------------------------------------------------

def join_systems(messages):
    """A dialogue may begin with one system message, which those after it join unless they say the same; the
    text of a later one goes before the next user's."""
    out, system = [], ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system" and out and out[-1] == message:
            continue
        elif role == "system" and (not out or out[-1]["role"] == "system"):
            before = f"{out[0]['content']}\n\n" if out else ""
            out = [{"role": "system", "content": before + content}]
        elif role == "system":
            system += content + "\n\n"
        else:
            out.append(message | {"content": (system if role == "user" else "") + content})
            system = "" if role == "user" else system
    if system:
        raise Unusable("a system message that no user's follows")
    return out


def check_turns(messages, last):
    """user and assistant take turns, perhaps after a system message, `last` ends, and no reply is empty."""
    roles = [message["role"] for message in messages]
    roles = roles[roles[:1] == ["system"]:]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise Unusable("turns do not alternate from user to assistant")
    if roles[-1] != last:
        raise Unusable(f"the last turn is not the {last}'s" + " (a column \"prompt\" alone is a prompt)" * (
            last == "assistant"))
    if last == "assistant" and not messages[-1]["content"].strip():
        raise Unusable("empty reply")
    if any(message["content"].startswith("\n\nHuman:") for message in messages):
        raise Unusable("a whole dialogue where one turn belongs")
    return messages


def hh_messages(dialogue):
    """Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ..." -> messages; of other text none."""
    parts = re.split(r"\n\n(Human|Assistant):", dialogue)
    return [] if parts[0].strip() else [
        {"role": "user" if who == "Human" else "assistant", "content": text.strip()}
        for who, text in zip(parts[1::2], parts[2::2])]


def opening(r):
    """All that comes before the reply: system text, history, question and context, in any layout."""
    asked = r.first(*QUESTIONS)
    if asked is None:
        return []
    messages = join_systems([*system_of(r), *(r.first("history") or []), *asked])
    context = [r[name] for name in ("input", "context") if name in r]  # Alpaca's, Dolly's
    if messages:
        messages[-1]["content"] = "\n\n".join(filter(None, (messages[-1]["content"], *context)))
    return messages


def system_of(r):
    return [{"role": "system", "content": r[name]} for name in ("system", "system_prompt")
            if r.first(name)]


def notes(r, *names):
    """Those of our own columns that the row has."""
    return {name: r[name] for name in names if name in r}


# --- formats: a Record -> [(kind, row), ...] ----------------------------------------------------------------

def demonstration(r, messages):
    check_turns(messages, "assistant")
    if r.first("label") in (False, "false", "False"):
        raise Unusable("label is false: not a reply to imitate")
    if "label" in r and r["label"] not in (True, "true", "True"):
        r.used.remove("label")  # of another kind
    if all("weight" in message for message in messages if message["role"] == "assistant"):
        raise Unusable("every reply has weight 0: nothing to learn")
    asked = {"prompt": messages[:-1], **notes(r, "right", "check")}
    return [("sft", {"messages": messages, **notes(r, "skill")}), ("prompts", asked)]


def preference(prompt, chosen, rejected, **extra):
    check_turns(prompt, "user")
    for text in chosen, rejected:
        check_turns([*prompt, {"role": "assistant", "content": text}], "assistant")
    if chosen == rejected:
        raise Unusable("both replies are equal")
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extra}
    good = [*prompt, {"role": "assistant", "content": chosen}]
    return [("preferences", row), ("sft", {"messages": good}), ("prompts", {"prompt": prompt})]


def convert_pair(r, chosen, rejected):
    """Two replies, or two whole dialogues that share everything but the last reply."""
    extra, used = notes(r, "agreement", "skill"), {*r.used}
    asked = opening(r)
    if isinstance(chosen, str) and isinstance(rejected, str):
        dialogues = [hh_messages(x) for x in (chosen, rejected)]
        if asked and not all(dialogues):
            return preference(asked, chosen, rejected, **extra)
        if not all(dialogues):
            raise Unusable("chosen and rejected without a prompt: a dialogue begins with Human:")
        chosen, rejected = dialogues
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise Unusable("chosen and rejected are neither strings nor message lists")
    chosen, rejected = join_systems(chosen), join_systems(rejected)
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("the prompts of chosen and rejected differ")
    before = chosen[:-1]
    if not before or before[0]["role"] == "assistant":  # only the reply: the prompt is apart
        before = asked + before
    elif len(asked) >= len(before) and asked[-1]["content"].endswith(before[-1]["content"]):
        before = asked  # the lists repeat the prompt, which may have a system text, too
    else:
        if not asked or asked[-1]["content"].strip() not in [turn["content"].strip() for turn in before]:
            r.used = used  # another prompt
        before = join_systems([*system_of(r), *before])
    check_turns(before + chosen[-1:], "assistant")
    check_turns(before + rejected[-1:], "assistant")
    return preference(before, chosen[-1]["content"], rejected[-1]["content"], **extra)


def convert_preference(r):
    rows = []
    for chosen, rejected in product(r["chosen"], r["rejected"]):
        rows += [row for row in convert_pair(r, chosen, rejected) if row not in rows]
    return rows


def convert_ranked(r):
    """output_1, output_2 and which of them is preferred: 1 or 2."""
    pair = r["output_1"], r["output_2"]
    pair = pair if r["preference"] == 1 else pair[::-1]
    return preference(opening(r), *pair, **notes(r, "agreement", "skill"))


def convert_prompt(r):
    return [("prompts", {"prompt": check_turns(opening(r), "user"),
                         **notes(r, "right", "check", "skill", "set")})]


def convert(r):
    """A Record in any known format -> [(kind, row), ...]; raises Unusable with the reason."""
    has = lambda *names: all(name in r for name in names)
    if has("chosen", "rejected"):
        return convert_preference(r)
    if has("output_1", "output_2", "preference"):
        return convert_ranked(r)
    if has("messages") or has("conversations"):
        return demonstration(r, join_systems([*system_of(r), *r.first("messages", "conversations")]))
    if any(map(has, QUESTIONS)):
        if any(map(has, REPLIES)):
            return demonstration(r, opening(r) + r.first(*REPLIES))
        return convert_prompt(r)
    if has("text"):
        if has("role") or has("message_id") or has("parent_id"):
            raise Unusable("one message of a tree or dialogue. Join each dialogue into one row of messages")
        if not r["text"].strip():
            raise Unusable("empty text")
        return [("sft", {"text": r["text"], **{side: False for side in ("begins", "ends")
                                               if r.first(side) is False}})]
    raise Unusable(f"no known format in keys {', '.join(sorted(map(str, r)))[:100]}")


# --- files --------------------------------------------------------------------------------------------------

JSONL = "Save its rows as JSON lines, one object a line"
ARROW = f"an Arrow table. {JSONL}: datasets.Dataset.from_file(FILE).to_json(OUT)"
FOREIGN = {  # the first bytes of a file that is not text -> what it is, and the remedy
    b"PAR1": f"a Parquet table. {JSONL}: "
             "pandas.read_parquet(FILE).to_json(OUT, orient='records', lines=True)",
    b"ARROW1": ARROW, b"\xff\xff\xff\xff": ARROW,
    b"PK\x03\x04": "a zip archive. Unpack it first",
    b"\x28\xb5\x2f\xfd": "packed by zstd. Unpack it first",
    b"BZh": "packed by bzip2. Unpack it first",
    b"\xfd7zXZ": "packed by xz. Unpack it first",
    b"version https://git-lfs": "a git-lfs pointer, not the data. Fetch them with: git lfs pull",
    b"<!DOCTYPE": "a web page, not the data. Download the file itself",
    b"<html": "a web page, not the data. Download the file itself"}
CSV = (f"no JSON. A table (.csv)? {JSONL}: python -c \"import csv, json, sys; [print(json.dumps(row)) for "
       "row in csv.DictReader(sys.stdin)]\" < FILE > OUT.jsonl. Plain text? Let its name end in .txt")


def open_text(path):
    """Numbered lines of a file in UTF-8 or UTF-16, zipped with gzip or not, whatever its name says; bytes, to
    be decoded one by one, so that one bad byte costs one row."""
    try:
        with open(path, "rb") as f:
            f = gzip.open(f) if f.peek(2)[:2] == b"\x1f\x8b" else f
            head = f.peek(1000)[:1000]
            for magic, what in FOREIGN.items():
                if head.startswith(magic):
                    raise SystemExit(f"{path}: {what}.")
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                f = (line.encode() for line in io.TextIOWrapper(f, "utf-16", newline="\n"))
            elif b"\0" in head:
                raise SystemExit(f"{path}: holds zero bytes, so it is no text in UTF-8. Convert it first, as "
                                 "with iconv -t UTF-8.")
            for number, line in enumerate(f, 1):
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise SystemExit(f"{path}: cannot be read ({error}).") from None


def text_chunks(path, size=2000):
    """A text file, all of it, as rows of one document: `size` characters up to the next blank line, or
    2 * `size` where none comes."""
    chunk, begins, blank = "", {}, False
    for number, line in open_text(path):
        try:
            line = line.decode()
        except UnicodeError as error:
            raise SystemExit(f"{path}:{number}: not UTF-8 ({error.reason}). Convert the file first: iconv -f "
                             "LATIN1 -t UTF-8, or drop such bytes: iconv -c -t UTF-8.") from None
        for i in range(0, len(line), size):  # a whole book may be one line
            if len(chunk) >= 2 * size or len(chunk) >= size and blank:
                cut = len(chunk) if blank else 2 * size
                yield number, {"text": chunk[:cut], **begins, "ends": False}
                chunk, begins = chunk[cut:], {"begins": False}
            chunk, blank = chunk + line[i:i + size], False
        blank = not line.strip()
    if chunk:
        yield number, {"text": chunk, **begins}


def from_json(data):
    try:
        return json.loads(data)
    except UnicodeError:
        return Unusable("broken JSON (not UTF-8)")
    except RecursionError:
        return Unusable("nested too deeply")
    except ValueError as error:
        return Unusable(f"broken JSON ({getattr(error, 'msg', error)})")


def records(path):
    """-> (line number, record); a record that cannot be read is an Unusable."""
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if kind == ".txt":
        yield from text_chunks(path)
        return
    lines, head = open_text(path), []
    for numbered in lines:
        head.append(numbered)
        if numbered[1].strip():
            break
    else:
        return
    number, line = head[-1]
    lines, one = chain(head, lines), from_json(line)
    if isinstance(one, Unusable) and not line.lstrip().startswith((b"{", b"[")):
        raise SystemExit(f"{path}:{number}: {CSV}.")
    # what counts is how it begins: a list of objects, or an object that goes on, is one JSON value
    if re.match(rb"\s*(\[\s*(\{|$)|\{\s*$)", line) or kind == ".json" and not isinstance(one, dict):
        try:
            whole = json.loads(b"".join(line for _, line in lines))
        except (ValueError, RecursionError) as error:
            raise SystemExit(f"{path}:{getattr(error, 'lineno', 1)}: broken JSON ({error}).") from None
        yield from enumerate(whole if isinstance(whole, list) else [whole], 1)
    else:
        yield from ((number, from_json(line)) for number, line in lines if line.strip())


def read(path, on_error):
    """-> (kind, row) of every usable record of a file; on_error(line, reason) hears of the others."""
    unused = Counter()
    try:
        for number, record in records(path):
            try:
                if isinstance(record, Unusable):
                    raise record
                if not isinstance(record, dict):
                    raise Unusable("not a JSON object")
                rows = convert(record := Record(record))
                json.dumps(rows, ensure_ascii=False).encode()
            except Unusable as error:
                on_error(number, str(error))
            except UnicodeEncodeError:
                on_error(number, "half a character (a lone surrogate)")
            except Exception as error:  # whatever a row holds costs that row only
                on_error(number, f"cannot be converted ({type(error).__name__}: {str(error)[:100]})")
            else:
                if len(unused) < 50:
                    unused.update(record.unused())
                yield from rows
    finally:
        if unused:
            shown = ", ".join(f"{name} ({n:,})" for name, n in sorted(unused.items()))
            print(f"{path}: columns not used, in so many rows: {shown[:300]}")


def stop_at(path):
    def on_error(number, reason):
        raise SystemExit(f"{path}:{number}: {reason}. Mend or delete that line.")
    return on_error


def is_held_out(row, val_fraction):
    """By a stable hash of the first question (or the text): dialogues that begin alike are on one side, on
    every machine."""
    first = row["text"] if "text" in row else row.get("messages", row.get("prompt"))[0]["content"]
    digest = hashlib.blake2b(first.encode(), digest_size=8).digest()
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


def by_set(rows):
    """Held-out rows -> {set: its rows}, in the order of the file; "held out" are those that name no "set"."""
    sets = {}
    for row in rows:
        sets.setdefault(row.get("set", "held out"), []).append(row)
    return sets


# --- the converter ------------------------------------------------------------------------------------------

def lock_folder(out, flag="--out="):
    """Make the folder and keep other processes' runs out of it until the returned file is closed; the system
    closes it when a process dies."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        file = open(Path(out) / ".lock", "w")
    except OSError as error:
        raise SystemExit(f"{flag}{out}: no folder that can be written to ({error.strerror}). Choose "
                         "another.") from None
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"{flag}{out}: another process is writing there. Wait for it, or choose another "
                         "folder.") from None
    except (ImportError, OSError):  # Windows; a file system without locks
        pass
    return file


class Writer:
    """The output files, under temporary names until all is well; one writer in a folder at a time."""
    def __init__(self, out):
        self.out, self.lock = out, lock_folder(out)
        self.files, self.counts = {}, Counter()
        self.paths = {(kind, val): out / f"{kind}{('', '.val')[val]}.jsonl"
                      for kind in KINDS for val in (0, 1)}
        self.prompts = sqlite3.connect("")  # on disk: memory stays flat
        self.prompts.execute("create table prompts (digest integer unique, row text, val integer)")

    def open(self):
        for key, path in self.paths.items():
            self.files[key] = open(f"{path}.tmp", "w", encoding="utf-8")

    def add(self, kind, row, val):
        """-> what is lost, in words, or None."""
        if kind == "prompts":
            return self.add_prompt(row, val)
        self.files[kind, val].write(json.dumps(row, ensure_ascii=False) + "\n")
        self.counts[kind, val] += 1

    def add_prompt(self, row, val):
        """Each once, by eight bytes of a hash; what a later one knows besides ("check") joins the first."""
        digest = hashlib.blake2b(json.dumps(row["prompt"]).encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "big", signed=True)
        was = self.prompts.execute("select row from prompts where digest = ?", (key,)).fetchone()
        first = json.loads(was[0]) if was else {}
        joined = json.dumps(row | first, ensure_ascii=False)
        if not was:
            self.prompts.execute("insert into prompts values (?, ?, ?)", (key, joined, val))
            self.counts["prompts", val] += 1
        elif joined != was[0]:
            self.prompts.execute("update prompts set row = ? where digest = ?", (joined, key))
        if any(first.get(name, value) != value for name, value in row.items()):
            return "a prompt that came before with other notes: the first ones stay"

    def finish(self):
        for row, val in self.prompts.execute("select row, val from prompts order by rowid"):
            self.files["prompts", val].write(row + "\n")
        for file in self.files.values():
            file.close()  # the disk may be full: all are closed before the first is put in place
        for (kind, val), path in self.paths.items():
            if self.counts[kind, 0] or self.counts[kind, 1]:
                os.replace(f"{path}.tmp", path)
            elif path.exists():
                print(f"{path}: left from an earlier preparation; delete it if it does not belong here.")

    def clear(self):
        """Whatever happened, no temporary file stays."""
        self.prompts.close()
        self.lock.close()
        for key, file in self.files.items():
            with contextlib.suppress(OSError):
                file.close()
            Path(f"{self.paths[key]}.tmp").unlink(missing_ok=True)


def token_counter():
    sys.path.append(str(Path(__file__).parent.parent))
    from data.tokenizer import Tokenizer  # GPT-2's encoding may be a download: for --max_tokens only
    encode = Tokenizer("gpt2").encode

    def count(row):
        """Of a pair, the prompt and the longer reply: each is a dialogue of its own."""
        said = [row.get("text", ""), *(m["content"] for m in row.get("messages", row.get("prompt", [])))]
        return max(len(encode("".join([*said, row.get(side, "")]))) for side in ("chosen", "rejected"))
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
    dropped, too_long, writer = Counter(), Counter(), Writer(out)
    for path in files:
        if any(theirs.exists() and theirs.samefile(path) for theirs in writer.paths.values()):
            raise SystemExit(f"{path}: --out={out} would overwrite what is read. Choose another --out.")
    tokens = token_counter() if max_tokens else None
    try:
        writer.open()
        for path in files:
            def on_error(number, reason):
                if strict:
                    stop_at(path)(number, reason)
                dropped[reason] += 1
                if dropped.total() <= 20:
                    print(f"{path}:{number}: {reason}")
                elif dropped.total() == 21:
                    print("further rows that cannot be used are only counted")
            for kind, row in read(path, on_error):
                if limit and writer.counts.total() >= limit:
                    break
                if tokens and tokens(row) > max_tokens:
                    too_long[f"{kind} of more than {max_tokens} tokens"] += 1
                    continue
                if lost := writer.add(kind, row, is_held_out(row, val_fraction)):
                    dropped[lost] += 1
        if not writer.counts:
            raise SystemExit(f"{', '.join(map(str, files))}: not one usable row. {FORMATS}")
        writer.finish()
    except (OSError, sqlite3.Error) as error:
        raise SystemExit(f"--out={out}: cannot be written ({error}). Choose a folder with free space; "
                         "earlier files there are unchanged.") from None
    finally:
        writer.clear()
    for kind in KINDS:
        if writer.counts[kind, 0] or writer.counts[kind, 1]:
            print(f"{out}/{kind}.jsonl: {writer.counts[kind, 0]:,} rows, {writer.counts[kind, 1]:,} held out")
    for reason, n in (dropped + too_long).most_common(20):
        print(f"dropped {n:,}: {reason}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--limit", type=int, default=0,
                        help="stop after writing this many rows; at least 0 [0: all]")
    parser.add_argument("--val_fraction", type=float, default=0.1,
                        help="share of prompts held out; at least 0, below 1 [0.1]")
    parser.add_argument("--max_tokens", type=int, default=0,
                        help="drop rows of more GPT-2 tokens than this; at least 0 [0: none]")
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")
    main(**vars(parser.parse_args()))
