"""GPT-2's weights from the Hugging Face hub: found in its local cache, or downloaded there.

HF_HOME (or HF_HUB_CACHE) names the cache, HF_ENDPOINT a mirror, HF_TOKEN an account; HF_HUB_OFFLINE=1 forbids
to ask.
"""
import hashlib
import http.client
import mmap
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

BY_HAND = """{error}
Without the hub: put config.json and model.safetensors of https://huggingface.co/openai-community/{name}
into a folder and give that folder in place of {name}. (HF_HOME names the cache, HF_ENDPOINT a mirror,
HF_TOKEN an account.)"""


def hub_folder(name):
    """A model of the hub by name -> its folder in the hub's local cache, downloaded if it is not there."""
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface") / "hub"
    cache = Path(os.environ.get("HF_HUB_CACHE") or cache)
    for repo in f"models--openai-community--{name}", f"models--{name}":
        for folder in (cache / repo / "snapshots").glob("*"):
            if (folder / "config.json").exists() and (folder / "model.safetensors").exists():
                return folder
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        error = f"{name} is not in {cache}, and HF_HUB_OFFLINE is set."
        raise SystemExit(BY_HAND.format(name=name, error=error))
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    folder = cache / f"models--openai-community--{name}" / "snapshots" / "main"
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("model.safetensors", "config.json"):  # the small one last: with it the folder is whole
        try:
            download(f"{endpoint}/openai-community/{name}/resolve/main/{file}", folder / file)
        except OSError as error:
            raise SystemExit(BY_HAND.format(name=name, error=f"{file} of {name}: {error}")) from None
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
        size = int(told("X-Linked-Size") or have + int(answer.headers.get("Content-Length") or 0))
        digest = told("X-Linked-Etag").strip('"')
        bar = tqdm(desc=url.split("/")[-1], total=size, initial=have, unit="B", unit_scale=True, disable=None)
        with open(part, "ab" if have else "wb") as f, bar:
            while piece := answer.read(2**20):
                f.write(piece)
                bar.update(len(piece))
    have = part.stat().st_size
    if have < size:
        raise ConnectionError(f"the connection ended after {have:,} of {size:,} bytes")
    if have > size or len(digest) == 64 and sha256(part) != digest:
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
        except (OSError, ValueError, http.client.HTTPException) as error:
            problem, code = error, 0
        if code == 416:  # what is there does not fit: begin again
            part.unlink()
        elif 400 <= code < 500:
            raise OSError(f"the hub answers {code} ({'set HF_TOKEN' if code in (401, 403) else 'not there'})")
        elif attempt + 1 == attempts:
            raise OSError(f"{problem}. The same command goes on where this one stopped.")
        time.sleep(2**attempt)
