"""Weights in the Hugging Face hub's layouts, in and out.

    config, tensors = read(folder)       # any GPT-2, Llama or Qwen3 folder, in our names and orientation
    write(folder, config, tensors)       # config.json, model.safetensors, the tokenizer's files
    folder = hub_folder("gpt2")          # in the hub's local cache, or downloaded there

config: model.py's GPTConfig as a dict. tensors: {name: tensor}, whose names and shapes data/layouts.py
translates. HF_HOME or HF_HUB_CACHE names the cache, HF_ENDPOINT a mirror, HF_TOKEN an account;
HF_HUB_OFFLINE=1 bans downloads.
"""
import contextlib
import hashlib
import http.client
import json
import math
import mmap
import os
import re
import ssl
import struct
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from tqdm import tqdm

from data import layouts
from data.bpe import read_json
from data.layouts import MODELS, SCRATCH
from data.prepare import lock_folder
from data.tokenizer import VOCAB_SIZE, Tokenizer, tokenizer_files


# --- files --------------------------------------------------------------------------------------------------

def write_file(path, write):
    """write(temporary path), then rename: a kill or a full disk leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "r+b") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise SystemExit(f"{path}: could not be written ({error}). What was there before is untouched. Free "
                         "some space or give another folder; a run goes on with --resume.") from None


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
          "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
          "I64": torch.int64}


def write_safetensors(path, tensors):
    """8 bytes of header length, a JSON header, raw bytes: https://huggingface.co/docs/safetensors"""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        dtype = next(k for k, v in DTYPES.items() if v == t.dtype)
        header[name] = {"dtype": dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for t in tensors.values():
            f.write(t.contiguous().cpu().view(-1).view(torch.uint8).numpy())


def read_safetensors(path):
    """{name: tensor}, memory-mapped: nothing is read before it is used."""
    try:
        with open(path, "rb") as f:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        return {name: torch.frombuffer(data, dtype=DTYPES[t["dtype"]], count=math.prod(t["shape"]),
                                       offset=start + t["data_offsets"][0]).view(t["shape"])
                for name, t in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RuntimeError) as error:
        raise SystemExit(f"{path}: not a readable safetensors file ({error}).") from None


# --- a folder in the hub's layout ---------------------------------------------------------------------------

def write(folder, config, tensors):
    """For transformers: a language model, or a ...ForSequenceClassification if there is a "score.weight"."""
    folder, scorer, tokenizer = Path(folder), "score.weight" in tensors, Tokenizer(config["tokenizer"])
    written = layouts.write_config(config, scorer)
    begin = tokenizer.first if tokenizer.chat.begin else tokenizer.end
    written |= {"bos_token_id": begin, "eos_token_id": tokenizer.end}
    if tokenizer.name in VOCAB_SIZE:
        written["tokenizer"] = tokenizer.name
    # transformers reads the score at the last token that is not padding: padding must not be the end token
    written |= {"num_labels": 1, "pad_token_id": tokenizer.first} if scorer else {}
    hub_tensors = layouts.write_tensors(tensors, config)
    write_file(folder / "model.safetensors", lambda path: write_safetensors(path, hub_tensors))
    files = {"config.json": written, **tokenizer_files(tokenizer.name, config["n_positions"])}
    for name, content in files.items():
        write_file(folder / name, lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))


def read(folder):
    """-> (config, tensors) of a model in whichever way the hub stores it: whole, sharded, pytorch_model.bin,
    in 32 or 16 bits.

    A vocabulary without room for the control tokens (GPT-2's own) grows: new rows are the mean of the old.
    SystemExit with file and remedy if it is not there, damaged, or another architecture.
    """
    folder = Path(folder)
    config = read_config(folder)
    # DataParallel, FSDP and torch.compile put such words into the names
    stored = {re.sub(r"\b(_orig_mod|\w*module)\.", "", name): t for name, t in read_tensors(folder).items()}
    tensors = layouts.read_tensors(stored, config)
    embedding = tensors.get("wte.weight")
    head = tensors.pop("lm_head.weight", None) if config["tied"] else None
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise SystemExit(f"{folder}: lm_head.weight differs from the embedding; config.json says they "
                         "are tied.")
    if embedding is not None:
        check_vocabulary(folder, config["tokenizer"], embedding.shape[0] if embedding.ndim else 0)
    for name in {"wte.weight", "lm_head.weight"} & tensors.keys():
        t, missing = tensors[name], config["vocab_size"] - len(tensors[name])
        if missing > 0:
            mean = t.float().mean(0, keepdim=True).to(t.dtype)
            tensors[name] = torch.cat([t, mean.expand(missing, -1)])
    return config, tensors


CONVERT = {"ckpt*.pt": "nanoGPT's: docs/reference.md, Your own data, turns it into such a folder",
           "*.bin": "llm.c's, whose dev/eval/export_hf.py --input FILE --output FOLDER makes such a folder"}


def read_config(folder):
    """-> config alone: no weight is read."""
    folder = Path(folder)
    files = weight_files(folder)
    if not (folder / "config.json").exists() or not files:
        script = {"out/sft": "sft.py", "out/reward": "reward.py", "out/ppo": "ppo.py"}.get(str(folder))
        foreign = [f"{path.name} may be {whose}." for pattern, whose in CONVERT.items() if not files
                   for path in (folder, *folder.glob("*")) if path.is_file() and path.match(pattern)]
        remedy = (f'Run "python {script}" first.' if script else
                  foreign[0] if foreign else
                  "It should hold config.json and model.safetensors." if folder.is_dir() else
                  f"It is no folder, and no name: {', '.join(MODELS)}.")
        raise SystemExit(f"{folder}: no checkpoint here. {remedy}")
    stored = read_json(folder / "config.json")
    try:
        config = layouts.read_config(stored)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise SystemExit(f"{folder}/config.json: {error}.") from None
    # a damaged config.json could ask for terabytes; weights have at least 2 bytes
    n_layer, width, rows = (config[name] for name in ("n_layer", "n_embd", "vocab_size"))
    if 2 * n_layer * layouts.block_weights(config) > sum(map(weight_bytes, files)):
        raise SystemExit(f"{folder}: {n_layer} layers of width {width} (config.json) are more than "
                         "model.safetensors holds.")
    tokenizer = find_tokenizer(folder, stored)
    check_vocabulary(folder, tokenizer, rows)
    rows = VOCAB_SIZE[tokenizer] if tokenizer in VOCAB_SIZE else Tokenizer(tokenizer).rows(rows)
    return config | {"vocab_size": rows, "tokenizer": tokenizer}


def find_config(cfg):
    """A script's flags -> the config that --init names: random weights' of the size that other flags say,
    a model's by its name, without any file, or a folder's."""
    if cfg.init in SCRATCH:
        sizes = layouts.scratch(SCRATCH[cfg.init], cfg.n_layer, cfg.n_head, cfg.n_embd)
        return sizes | {"vocab_size": VOCAB_SIZE[cfg.tokenizer], "n_positions": cfg.block_size,
                        "tokenizer": cfg.tokenizer}
    if cfg.init in MODELS:
        return MODELS[cfg.init][1] | {"tokenizer": "tiny"}
    return read_config(cfg.init)


def find_tokenizer(folder, stored):
    """-> tiny, gpt2, or the folder itself, whose tokenizer.json then counts."""
    name = stored.get("tokenizer")
    if name not in (None, *VOCAB_SIZE):
        raise SystemExit(f"{folder}/config.json: tokenizer is {name}; known here: tiny, gpt2, or none and a "
                         "tokenizer.json.")
    if name == "tiny" or stored["model_type"] != "gpt2":
        return name or str(folder)
    for file in folder / "tokenizer.json", folder / "vocab.json":  # GPT-2s of other languages
        if file.is_file() and not re.search(
                r'"(Ġ|\\u0120)the": *262\b', file.read_text(encoding="utf-8", errors="replace")):
            if file.name == "tokenizer.json":
                return str(folder)
            raise SystemExit(f"{file}: these are not GPT-2's tokens. Put its tokenizer.json there, too.")
    return "gpt2"


def check_vocabulary(folder, tokenizer, rows):
    """GPT-2's 50257 rows pass, too, and those with a few tokens more: rows are added up to ours."""
    if tokenizer in VOCAB_SIZE and rows not in range(
            50257 if tokenizer == "gpt2" else VOCAB_SIZE[tokenizer], VOCAB_SIZE[tokenizer] + 1):
        raise SystemExit(f"{folder}: a vocabulary of {rows} rows is not that of the tokenizer {tokenizer}.")


def weight_files(folder):
    """-> the files that are to be read: one, the shards, or none."""
    for name in "model.safetensors", "pytorch_model.bin":
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise SystemExit(f"{index}: no weight_map from keys to files.")
            return [folder / Path(file).name for file in sorted(set(files.values()))]
    return []


def weight_bytes(path):
    try:
        with open(path, "rb") as f:
            pointer = f.read(23) == b"version https://git-lfs"
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error}).") from None
    if pointer:
        raise SystemExit(f"{path}: git-lfs's pointer to the weights, not the weights. Run \"git lfs pull\" "
                         "there.")
    return path.stat().st_size


def read_tensors(folder):
    """-> {name: tensor} as stored."""
    return {name: t for file in weight_files(folder) for name, t in (
        read_safetensors if file.suffix == ".safetensors" else read_pickle)(file).items()}


def read_pickle(path):
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # pickle's are many
        raise SystemExit(f"{path}: not readable without running its code ({type(error).__name__}).") from None
    if not isinstance(stored, dict) or not all(isinstance(t, torch.Tensor) for t in stored.values()):
        raise SystemExit(f"{path}: not a state_dict(), names with a tensor each.")
    return stored


# --- downloads ----------------------------------------------------------------------------------------------

BY_HAND = """{error}
Without the hub: put {files} of https://huggingface.co/{repo}
into a folder and give that folder in place of {name}. (HF_HOME names the cache, HF_ENDPOINT a mirror,
HF_TOKEN an account. Where that page has a gate, ask for access there first.)"""


def hub_folder(name):
    """A model of the hub by name -> its folder in the hub's local cache, downloaded if it is not there."""
    try:
        cache = Path(os.environ.get("HF_HUB_CACHE")
                     or Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface") / "hub")
    except RuntimeError:
        raise SystemExit(f"{name}: you have no home folder to keep it in. Set HF_HOME to a folder.") from None
    repo, config = MODELS[name]
    words = ["tokenizer.json", "tokenizer_config.json"] if "model_type" in config else []  # GPT-2's: tiktoken
    small = [*words, "config.json"]

    def refuse(error):
        files = ", ".join([*small[:-1], "config.json and model.safetensors"])
        raise SystemExit(BY_HAND.format(error=error, name=name, repo=repo, files=files)) from None
    for directory in f"models--{repo.replace('/', '--')}", f"models--{name}":
        for folder in (cache / directory / "snapshots").glob("*"):
            files = weight_files(folder)
            if files and all(file.exists() for file in [*files, *(folder / name for name in small)]):
                return folder
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        refuse(f"{name} is not in {cache}, and HF_HUB_OFFLINE is set.")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    folder = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / "main"

    def get(file, otherwise=None):
        try:
            download(f"{endpoint}/{repo}/resolve/main/{file}", folder / file)
        except OSError as error:
            if otherwise and isinstance(error, FileNotFoundError):
                return get(otherwise)
            refuse(f"{folder / file}: {error}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"{folder}: {error}")
    with lock_folder(folder, f"{name}: "):
        get("model.safetensors", otherwise="model.safetensors.index.json")
        shards = [file.name for file in weight_files(folder) if not file.exists()]
        for file in (*shards, *small):  # config.json last: with it the folder is whole
            get(file)
    return folder


class _Redirect(urllib.request.HTTPRedirectHandler):
    """The hub answers with a redirect whose headers tell the file's size and SHA-256."""
    linked = {}

    def redirect_request(self, request, fp, code, message, headers, url):
        self.linked = headers
        return super().redirect_request(request, fp, code, message, headers, url)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.sha256(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)).hexdigest()


def fetch(url, part):
    """One attempt to fetch url, from where `part` ends, into `part`. Raises OSError and its kin."""
    have, redirect = part.stat().st_size if part.exists() else 0, _Redirect()
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    if os.environ.get("HF_TOKEN"):  # not to be sent along to where a redirect leads
        request.add_unredirected_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
    with urllib.request.build_opener(redirect).open(request, timeout=30) as answer:
        told = lambda name: redirect.linked.get(name) or answer.headers.get(name) or ""
        have = have if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        size = int(told("X-Linked-Size") or (have + int(length) if length else 0))  # 0: nobody tells
        digest = told("X-Linked-Etag").strip('"')
        bar = tqdm(desc=url.split("/")[-1], total=size or None, initial=have, unit="B",
                   unit_scale=True, disable=None)
        with open(part, "ab" if have else "wb") as f, bar:
            while piece := answer.read(2**20):
                f.write(piece)
                bar.update(len(piece))
    have = part.stat().st_size
    if have < max(size, 1):
        raise ConnectionError(f"the connection ended after {have:,} of {size:,} bytes")
    if have > size > 0 or len(digest) == 64 and sha256(part) != digest:
        part.unlink()
        raise ConnectionError("what came is not what was announced (size or SHA-256)")


def download(url, path, attempts=5):
    """Fetch url to path, whole or not at all; what a broken connection left in path.part is gone on with.
    Raises OSError with what went wrong."""
    part = path.with_name(path.name + ".part")
    for attempt in range(attempts):
        try:
            fetch(url, part)
            return part.replace(path)
        except urllib.error.HTTPError as error:
            problem, code = error, error.code
            error.close()
        except (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, ValueError,
                http.client.HTTPException) as error:  # not a full disk's OSError
            problem, code = error, 0
        if code == 416:  # what is there does not fit: begin again
            part.unlink(missing_ok=True)
        elif code == 404:
            raise FileNotFoundError("the hub answers 404: not there")
        elif 400 <= code < 500 and code not in (408, 429):  # too slow, too often: both may pass
            raise OSError(f"the hub answers {code}" + " (set HF_TOKEN)" * (code in (401, 403)))
        if attempt + 1 < attempts:
            time.sleep(2**attempt)
    raise OSError(f"{problem}. The same command goes on where this one stopped.")
