"""Instructions that a regular expression can check, in the manner of IFEval (Zhou et al. 2023,
arXiv:2311.07911).

    python data/follow/make.py        # writes prompts.jsonl, prompts.val.jsonl and sft.jsonl beside this file

A prompt asks something about an everyday topic and says how to answer. Its "check" matches a reply that
keeps the instruction, names the topic and does not repeat the instruction. Three held-out sets, apart: new
topics, new wordings of the instructions that training knows, and kinds of instruction that it does not.
sft.jsonl shows each kind twice.
"""
import json
import random
import re
from pathlib import Path

TOPICS = """rain snow wind thunder rainbows clouds fog summer winter spring autumn sunrise sunset stars
rivers lakes oceans beaches islands mountains valleys deserts forests gardens flowers roses grass trees
leaves mushrooms bread butter cheese milk eggs rice noodles soup salad pizza apples bananas oranges lemons
grapes strawberries potatoes tomatoes carrots onions garlic beans nuts honey sugar salt pepper chocolate
cookies cake coffee tea juice water dogs cats horses cows sheep goats pigs chickens ducks geese owls eagles
parrots penguins dolphins whales sharks turtles frogs snakes spiders ants bees butterflies elephants lions
tigers bears wolves foxes rabbits mice bicycles cars buses trains ships boats planes bridges roads tunnels
traffic houses windows doors kitchens beds chairs tables lamps mirrors carpets curtains stairs keys locks
clocks candles umbrellas hats gloves shoes socks coats scarves buttons pockets glasses watches rings books
letters newspapers maps pencils pens paper scissors hammers nails ladders ropes buckets brooms knives spoons
forks plates cups bottles kettles ovens fridges phones radios cameras computers robots music songs guitars
pianos drums violins dancing painting singing reading writing cooking baking running swimming hiking camping
fishing football tennis chess puzzles kites balloons birthdays weddings holidays picnics museums libraries
schools hospitals markets farms parks zoos castles lighthouses windmills volcanoes waterfalls""".split()
QUESTIONS = ["Tell me about {}.", "What is there to like about {}?", "What do people think of {}?",
             "Describe {}.", "Why do people care about {}?", "Write something about {}."]


def kinds(topic, draw):
    """-> {kind: (regular expression, wordings, the last of which is held out)}. Python's (?s: ) lets a dot be
    a new line, too; (?i: ) any case."""
    n, points = draw.choice((3, 4, 5, 6)), draw.choice((2, 3, 4))
    first = draw.choice(("Well", "Today", "Honestly", "Imagine"))
    last = draw.choice(("indeed", "again", "forever"))
    thrice = draw.choice(("very", "good", "often"))
    name = draw.choice(("mother", "doctor", "teacher", "neighbour"))
    number = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
    word = r"[^\W_][\w'’-]*"
    about = rf"(?is:(?=.*\b{topic[:max(3, len(topic) - 3)]}))"  # it names the topic, in singular or plural
    return {
        "words": (rf"{about}\W*{word}(?:[\s,;:—-]+{word}){{{n - 1}}}\W*",
                  [f"Answer in exactly {number[n]} words.", f"Use exactly {number[n]} words.",
                   f"Your answer must have {number[n]} words, no more and no less."]),
        "one sentence": (rf"{about}[^.!?\n]+[.!?]",
                         ["Answer in one sentence.", "Use a single sentence.", "Keep it to one sentence."]),
        "no comma": (rf"{about}[^,]{{20,}}",
                     ["Do not use any commas.", "Answer without a comma.", "Commas are forbidden."]),
        "lower case": (rf"{about}[^A-Z]{{20,}}",
                       ["Write in lower case only.", "Use no capital letters.",
                        "Every letter has to be small."]),
        "capitals": (rf"{about}[^a-z]{{10,}}",
                     ["Answer in capital letters.", "Use capital letters only.",
                      "EVERY LETTER HAS TO BE BIG."]),
        "begin": (rf"{about}{first}\b(?s:.+)",
                  [f'Begin your answer with the word "{first}".', f'The first word has to be "{first}".',
                   f'Start with "{first}".']),
        "end": (rf"{about}(?s:.+)\b{last}\W*",
                [f'End your answer with the word "{last}".', f'The last word has to be "{last}".',
                 f'Finish with "{last}".']),
        "bullets": (rf"{about}(?:[-*•] ?[^\n]+\n*){{{points}}}",
                    [f"Answer with exactly {number[points]} bullet points.",
                     f"Give {number[points]} bullet points and nothing else.",
                     f"Make a list of {number[points]} items, each after a dash."]),
        "quotes": (rf'{about}"[^"]+"',
                   ["Put your whole answer in double quotes.", "Wrap the answer in double quotation marks.",
                    "Your reply must be inside double quotes."]),
        "question": (rf"{about}(?s:.+)\?",
                     ["End with a question mark.", "Your answer must end with a question.",
                      "Finish by asking me something."]),
        "thrice": (rf"{about}(?is:(?:.*\b{thrice}\b){{3}}.*)",
                   [f'Use the word "{thrice}" at least three times.',
                    f'The word "{thrice}" should appear three times or more.',
                    f'Say "{thrice}" again and again.']),
        "two sentences": (rf"{about}[^.!?\n]+[.!?] [^.!?\n]+[.!?]",
                          ["Answer in two sentences.", "Use exactly two sentences.",
                           "Two sentences, please."]),
        # held out as kinds
        "short": (rf"{about}\W*{word}(?:\W+{word}){{1,7}}\W*", ["Use fewer than nine words."]),
        "word": (rf"{about}(?is:.*\b{name}\b.*)", [f'Use the word "{name}" in your answer.']),
        "three sentences": (rf"{about}(?:[^.!?\n]+[.!?] ?){{3}}", ["Answer in three sentences."]),
        "brackets": (rf"{about}\[[^\[\]]+\]", ["Put your whole answer in square brackets."]),
        "thanks": (rf"{about}(?s:.+)Thank you[.!]?", ['Say "Thank you" at the very end.']),
        "no e": (rf"{about}[^eE]{{10,}}", ["Do not use the letter e."]),
        "numbered": (rf"{about}1[.)][^\n]+\n+2[.)][^\n]+\n+3[.)][^\n]+\n*",
                     ["Answer with a list numbered from 1 to 3."])}


NEW_KINDS = "short", "word", "three sentences", "brackets", "thanks", "no e", "numbered"
SENTENCES = ["Many people like {}.", "There is a lot to say about {}.", "Life without {} would be dull.",
             "My family talks about {} all the time.", "Nobody forgets {} in a hurry.",
             "The village would not be the same without {}."]
PHRASES = {3: "People like {}", 4: "Many people like {}", 5: "People talk about {} often",
           6: "Many people in town like {}"}


def demonstration(kind, asked, topic, draw):
    """An answer that keeps the instruction, dull on purpose: it shows how to obey, not what to say."""
    one, two, three, four = (sentence.format(topic) for sentence in draw.sample(SENTENCES, 4))
    quoted = (asked.split('"') + [""])[1]  # the word that the instruction names
    n = next((n for n, word in enumerate("zero one two three four five six".split())
              if word in asked or str(n) in asked), 0)
    return {"words": PHRASES.get(n, "").format(topic) + ".", "one sentence": one, "no comma": f"{one} {two}",
            "lower case": one.lower(), "capitals": one.upper(),
            "begin": f"{quoted}, {one[0].lower()}{one[1:]}", "end": f"{one[:-1]} {quoted}.",
            "bullets": "\n".join(f"- {x}" for x in (one, two, three, four)[:n]),
            "quotes": f'"{one}"', "question": f"{one} Do you?", "two sentences": f"{one} {two}",
            "thrice": f"It is {quoted}, {quoted} and {quoted} again what people say of {topic}."}[kind]


def row(topic, kind, wording, draw, **more):
    while kind == "no e" and "e" in topic[:max(3, len(topic) - 3)]:
        topic = draw.choice(TOPICS)
    check, wordings = kinds(topic, draw)[kind]
    instruction = wordings[wording]
    asked = f"{draw.choice(QUESTIONS).format(topic)} {instruction}"
    repeated = f"(?is:(?!.*{re.escape(instruction.rstrip('.'))}))"  # to say it again is not to keep it
    return {"prompt": [{"role": "user", "content": asked}], "check": repeated + check, "skill": kind, **more}


def make(seed=0):
    """-> (train rows, held-out rows, demonstrations: two of each kind that training knows)."""
    draw = random.Random(seed)
    topics = draw.sample(TOPICS, len(TOPICS))
    new, known = topics[:40], topics[40:]
    old_kinds = [kind for kind in kinds("rain", draw) if kind not in NEW_KINDS]
    train = [row(draw.choice(known), kind, draw.choice((0, 1)), draw)
             for kind in old_kinds for _ in range(100)]
    val = [row(new[i % 40], old_kinds[i % 12], i // 12 % 2, draw, set="new topics") for i in range(240)]
    val += [row(draw.choice(known), old_kinds[i % 12], 2, draw, set="new wordings") for i in range(120)]
    val += [row(draw.choice(known), NEW_KINDS[i % 7], 0, draw, set="new kinds") for i in range(119)]
    shown = []
    for kind in old_kinds:
        for wording in (0, 1):
            topic = draw.choice(known)
            asked = row(topic, kind, wording, draw)
            reply = demonstration(kind, asked["prompt"][0]["content"], topic, draw)
            shown.append({"messages": [*asked["prompt"], {"role": "assistant", "content": reply}],
                          "skill": kind})
            assert re.fullmatch(asked["check"], reply), (asked, reply)
    draw.shuffle(train)
    return train, val, shown


if __name__ == "__main__":
    for name, rows in zip(("prompts", "prompts.val", "sft"), make()):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (Path(__file__).parent / f"{name}.jsonl").write_text(text, encoding="utf-8")
