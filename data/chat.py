"""The chat: python model.py --model=out/ppo

    python model.py --model=out/ppo --prompt="What is 2 plus 3?"
    python model.py --model=out/ppo --compare=out/sft --reward=out/reward    # both answer, the score beside

Every turn sees the dialogue so far, without its oldest exchanges where it grows too long.
"""
import codecs
import sys
from contextlib import suppress
from dataclasses import dataclass

import torch

from data.batches import rng
from data.run import check_flags, pick_device, require
from data.tokenizer import Tokenizer, same_tokens
from model import GPT, Scorer, generate, load_model


@dataclass(slots=True)
class Config:
    model: str = "out/ppo"      # a checkpoint folder
    compare: str = ""           # a second folder, to answer beside the first
    reward: str = ""            # a reward model's folder, to score the replies
    prompt: str = ""            # answer this and exit
    max_new_tokens: int = 0     # 0: half of the context, at most 512
    temperature: float = 0.7    # 0: always the most likely token
    top_k: int = 0              # sample among the k most likely tokens; 0: all
    top_p: float = 1.0          # sample among the most likely tokens that make up this probability
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"


def last_exchanges(messages, tokenizer, room):
    """The dialogue without its oldest exchanges, as many as it takes to fit `room` tokens. Of a last one that
    is too long alone, Tokenizer.prompt() keeps the end."""
    while len(messages) > 2 and len(tokenizer.render(messages)[0]) >= room:
        messages = messages[2:]
    return messages


def reply(model, tokenizer, messages, cfg, generator):
    """Streams the assistant's next turn to the terminal and returns its text. Ctrl-C ends it."""
    new, said = cfg.max_new_tokens or min(512, model.cfg.n_positions // 2), []
    room = model.cfg.n_positions - new
    prompt = tokenizer.prompt(last_exchanges(messages, tokenizer, room), room)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span several tokens

    def show(_, token):
        said.append(token)
        print(decoder.decode(tokenizer.bytes([token])), end="", flush=True)
    try:
        generate(model, [prompt], new, tokenizer.end, cfg.temperature, cfg.top_k, cfg.top_p, generator,
                 on_token=show)
    except KeyboardInterrupt:
        pass
    print(decoder.decode(b"", final=True))
    return tokenizer.decode(said)


@torch.no_grad()
def score_dialogue(reward_model, tokenizer, messages):
    """The reward model's score of a dialogue's last turn."""
    room = reward_model.cfg.n_positions
    ids, _ = tokenizer.render(last_exchanges(messages, tokenizer, room))
    return reward_model.scores([[ids[-room:]]]).item()


def main(cfg):
    check_flags(cfg)
    require(cfg.prompt or sys.stdin, 'Standard input is closed, a chat reads it. Use --prompt="..." instead.')
    require(cfg.compare != cfg.model, f"--compare={cfg.compare} is --model itself. Name another folder.")
    device, dtype = pick_device(cfg.device, cfg.dtype)
    models = {folder: load_model(folder, GPT, device, dtype) for folder in (cfg.model, cfg.compare) if folder}
    reward_model = load_model(cfg.reward, Scorer, device, dtype) if cfg.reward else None
    names = {net.cfg.tokenizer: None for net in (*models.values(), reward_model) if net}
    name, *others = names
    require(all(same_tokens(name, other) for other in others),
            f"--compare, --reward: their tokenizers differ ({', '.join(sorted(names))}).")
    context = min(net.cfg.n_positions for net in models.values())
    require(cfg.max_new_tokens < context,
            f"--max_new_tokens={cfg.max_new_tokens}: the context has {context} positions.")
    tokenizer, generator = Tokenizer(name), rng(cfg.seed)
    dialogues = {folder: [] for folder in models}

    def answer(text):
        text = text.encode(errors="replace").decode()  # bytes that are no character arrive as half ones
        for folder, messages in dialogues.items():
            messages.append({"role": "user", "content": text})
            if len(models) > 1:
                print(f"{folder}: ", end="")
            said = reply(models[folder], tokenizer, messages, cfg, generator)
            messages.append({"role": "assistant", "content": said})
            if reward_model:
                print(f"    (score {score_dialogue(reward_model, tokenizer, messages):+.2f})")
        return dialogues[cfg.model][-1]["content"]
    if cfg.prompt:
        return answer(cfg.prompt)
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys, where Python has it)
    if name == "tiny":
        print('It knows "What is 2 plus 3?", "opposite of hot", "Spell lemon." and what else README lists.')
    print("/reset forgets, Ctrl-C ends a reply, Ctrl-D leaves. Of a long dialogue it sees the last turns.")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt, OSError):  # OSError: the terminal is gone
            return print()
        if text == "/reset":
            dialogues = {folder: [] for folder in models}
        elif text:
            answer(text)
