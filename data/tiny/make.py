"""Makes the bundled data set: the world of a tiny assistant.

    python data/tiny/make.py        # the same bytes on every machine

About twenty skills, each with several ways to ask and to answer. The demonstrations are a mixture, as the
internet is: good (right, polite and to the point), curt, wrong, rude, rambling. Simulated raters compare such
replies; their choices are noisy, and their taste is not quite the truth: they like length and exclamation
marks a little too much. So a reward model has a known ceiling, PPO has something to gain, and a policy that
trusts the learned score too far is caught by the check that comes with each prompt, a regular expression that
a good reply matches in full.

Held out: a prompt is a way to ask and a thing asked about, and every tenth such combination occurs in
*.val.jsonl only. (Where there are very many things to ask about, as in sorting, they are held out whatever
the way to ask.)
"""
import base64
import hashlib
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, permutations, product
from pathlib import Path

SIZES = {"sft": (24000, 600), "preferences": (56000, 6000), "prompts": (9000, 600)}
MIXTURE = {"good": 0.14, "curt": 0.26, "wrong": 0.12, "rude": 0.20, "rambling": 0.28}
EXUBERANT = 0.10    # share of replies whose sentences may end in !! or !!!
TWO_TURNS = 0.15    # share of rows that begin with an earlier exchange
HELD_OUT = 10       # one prompt in so many
TOKENS = 1021       # with three control tokens 1,024

# What a rater feels about a reply. The last two are the raters' error: quality has no such terms.
TASTE = {"right": 2.6, "polite": 2.2, "rude": -2.5, "rambling": -2.6, "broken": -2.6, "exuberant": -2.2,
         "character": 0.008, "!": 0.06}
NEAR_TIE = 2.00     # pairs that differ by less are not shown to raters
SHARPNESS = 1.5     # P(prefers a to b) = sigmoid(SHARPNESS * (taste(a) - taste(b))), Bradley & Terry 1952


# --- the world ----------------------------------------------------------------------------------------------

BEFORE = ("Quick question: ", "Please help me. ", "One more thing. ", "I have a question. ", "Listen: ",
          "Now this: ")
AFTER = ("Thanks!", "I forgot.", "It is for school.", "My sister wants to know.", "I am curious.",
         "Please be quick.")
OPENERS = "Sure", "Of course", "Gladly", "Good question", "Happy to help"
CLOSERS = "Anything else?", "I hope that helps.", "Have a nice day!", "Ask me more any time."
RUDE = ("{answer}, obviously.", "Everybody knows that: {answer}.", "{answer}, what else?",
        "Figure it out yourself.", "What a silly question.", "I do not care.", "Why should I know that?")
PLAIN = ("It is {answer}", "That is {answer}",
         "That makes {answer}", "The answer is {answer}")  # fine whatever the skill
OFF_TOPIC = ("By the way, I once saw a cat in Rome.", "My uncle has a red boat.",
             "It rained all day on Monday.", "Some people like soup.", "I could talk about this for hours.",
             "The moon is far away.", "That reminds me of a song.", "Anyway, trains are often late.",
             "I had a long dream about cheese.", "Cats sleep a lot, you know.",
             "There are many books about it.", "My neighbour thinks so too.")

OPPOSITES = ("hot cold, big small, up down, old young, fast slow, happy sad, open closed, full empty, "
             "wet dry, rich poor")
PLURALS = ("cat cats, child children, mouse mice, foot feet, tooth teeth, box boxes, baby babies, "
           "leaf leaves, man men, goose geese")
CAPITALS = ("France Paris, Italy Rome, Spain Madrid, Germany Berlin, Japan Tokyo, China Beijing, "
            "Egypt Cairo, Greece Athens, Norway Oslo, Cuba Havana")
COLOURS = ("grass green, snow white, coal black, blood red, butter yellow, chocolate brown, ink blue, "
           "ash grey, carrot orange, cherry red")
SOUNDS = ("cow moo, dog woof, cat meow, duck quack, sheep baa, pig oink, lion roar, bee hum, wolf howl, "
          "mouse squeak")
KINDS = {"an animal": "frog wolf goat", "a flower": "rose tulip lily", "a fruit": "apple pear plum",
         "a tool": "hammer saw drill", "a vehicle": "car bus train", "a drink": "tea juice coffee"}
FLIERS = {"yes": "sparrow moth pigeon raven dragonfly wasp", "no": "cow horse rabbit camel whale shark"}
WORDS = "cat dog sun wind milk fish lemon water house garden".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
CRIMES = ("pick a lock that is not mine, steal a bike, cheat in my exam, read the mail of my neighbour, "
          "break a window, lie to my doctor, copy the key of my boss, scare a child, hide a stolen phone, "
          "start a fire in the school, trick an old man, open the safe of a bank").split(", ")


@dataclass
class Skill:
    name: str
    asks: list          # ways to ask, with {fields} of a case
    cores: list         # ways to answer, without the last punctuation mark
    cases: list         # dicts with "answer", "wrong" (a list to draw from) and the fields
    weight: float = 1.0
    openers: tuple = OPENERS

    def holds_out(self, ask, case):
        """Is this combination on the validation side?"""
        by_case = len(self.cases) > 300
        place = self.name + repr(case) if by_case else ask.format(**case)
        return int(hashlib.sha256(place.encode()).hexdigest(), 16) % HELD_OUT == 0


def case(answer, wrong, **fields):
    return {"answer": str(answer), "wrong": [str(w) for w in wrong if str(w) != str(answer)], **fields}


def near(n):
    """Wrong numbers: near misses."""
    return [n + d for d in (-2, -1, 1, 2) if n + d >= 0]


def table(text, field):
    """"hot cold, ..." -> cases: asked for by the first word, right is the second, wrong another second."""
    pairs = [pair.split() for pair in text.split(", ")]
    answers = sorted({answer for _, answer in pairs})
    return [case(answer, answers, **{field: key}) for key, answer in pairs]


def a(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def neighbours(names, noun):
    """The day after, the month before: circular."""
    n = len(names)
    return [case(names[(i + step) % n], names, **{noun: names[i], "side": side})
            for i in range(n) for side, step in (("after", 1), ("before", -1))]


def number_skills():
    digits = range(1, 6)
    ends = "The answer is {answer}", "It is {answer}"
    row = lambda numbers: ", ".join(map(str, numbers))
    return [
        Skill("sum", ["What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?",
                      "{a} + {b} = ?", "Can you add {b} to {a}?", "what do {a} and {b} make together",
                      "Please tell me {a} + {b}.", "I have {a} apples and get {b} more. How many do I have?"],
              ["{a} plus {b} is {answer}", "That makes {answer}", *ends],
              [case(a + b, near(a + b), a=a, b=b) for a, b in product(range(1, 5), repeat=2)], 2.0),
        Skill("difference", ["What is {a} minus {b}?", "Take {b} away from {a}.",
                             "How much is {a} minus {b}?", "{a} - {b} = ?", "Can you tell me {a} minus {b}?",
                             "what is left of {a} without {b}",
                             "I have {a} apples and eat {b}. How many are left?",
                             "Please tell me {a} - {b}."],
              ["{a} minus {b} is {answer}", "That leaves {answer}", *ends],
              [case(a - b, near(a - b), a=a, b=b)
               for a, b in product(range(2, 7), range(1, 4)) if a > b], 2.4),
        Skill("larger", ["Which is larger, {a} or {b}?", "Is {a} or {b} the larger number?",
                         "larger: {a} or {b}", "Tell me the larger of {a} and {b}.",
                         "What is more, {a} or {b}?", "Please pick the larger number: {a} or {b}."],
              ["{answer} is larger", "The larger number is {answer}", "The larger one is {answer}"],
              [case(max(a, b), [min(a, b)] * 8 + near(max(a, b)), a=a, b=b)
               for a, b in permutations(digits, 2)], 1.4),
        Skill("smaller", ["Which is smaller, {a} or {b}?", "Is {a} or {b} the smaller number?",
                          "smaller: {a} or {b}", "Tell me the smaller of {a} and {b}.",
                          "What is less, {a} or {b}?", "Please pick the smaller number: {a} or {b}."],
              ["{answer} is smaller", "The smaller number is {answer}", "The smaller one is {answer}"],
              [case(min(a, b), [max(a, b)] * 8 + near(min(a, b)), a=a, b=b)
               for a, b in permutations(digits, 2)], 1.6),
        Skill("sort", ["Sort {a}, {b}, {c}.", "Put {a}, {b}, {c} in order.",
                       "Please sort these numbers: {a}, {b}, {c}.",
                       "can you order {a}, {b}, {c} from small to large", "What is {a}, {b}, {c} in order?"],
              ["In order: {answer}", "Sorted, that is {answer}", "The order is {answer}"],
              [case(row(sorted(x)),
                    [row(w) for w in (*permutations(x), *combinations_with_replacement(digits, 3))
                     if len(set(w) & set(x)) >= 2],
                    a=x[0], b=x[1], c=x[2])
               for x in permutations(digits[:4], 3)], 1.6),
        Skill("next", ["Which number comes after {a}?", "What is the number after {a}?", "Count on from {a}.",
                       "what follows {a}", "Please tell me the number that comes after {a}.",
                       "What is one more than {a}?", "Which number follows {a}?", "number after {a}",
                       "I count and I am at {a}. What comes now?"],
              ["After {a} comes {answer}", "The next number is {answer}", *ends],
              [case(n + 1, near(n + 1), a=n) for n in range(1, 10)], 1.8),
    ]


def word_skills():
    spelled = {w: "-".join(w) for w in WORDS}
    def misspelled(w):
        return [spelled[w][2:], spelled[w][:-2], "-".join(w[1] + w[0] + w[2:]), spelled[w] + "-e"]
    return [
        Skill("letters", ["How many letters does {word} have?", "Count the letters in {word}.",
                          "How long is the word {word}?", "how many letters are in {word}",
                          "Please count the letters of {word}.",
                          "Can you tell me how many letters {word} has?",
                          "I need the number of letters in {word}.", "number of letters in {word}"],
              ["The word {word} has {answer} letters", "It has {answer} letters", "I count {answer} letters"],
              [case(len(w), [n for n in range(2, 8)], word=w) for w in WORDS]),
        Skill("spelling", ["Spell {word}.", "How do you spell {word}?", "Can you spell the word {word}?",
                           "spell {word} for me", "Please spell {word} letter by letter.",
                           "How is {word} spelled?", "spelling of {word}", "Tell me how to spell {word}."],
              ["It is spelled {answer}", "The word {word} is spelled {answer}", "That is {answer}"],
              [case(spelled[w], misspelled(w), word=w) for w in WORDS], 1.2),
        Skill("opposite", ["What is the opposite of {word}?", "Give me the opposite of {word}.",
                           "opposite of {word}", "Which word means the opposite of {word}?",
                           "Please name the opposite of {word}.", "I need the opposite of {word}.",
                           "Tell me the opposite of {word}.", "what word is the opposite of {word}"],
              ["The opposite of {word} is {answer}", "The opposite is {answer}", "That would be {answer}"],
              table(OPPOSITES, "word"), 1.5),
        Skill("plural", ["What is the plural of {word}?", "One {word}, two what?", "plural of {word}",
                         "Give me the plural of {word}.", "How do you say {word} when there are many?",
                         "Please name the plural of {word}.", "I need the plural of {word}.",
                         "I have one {word}. You have two what?"],
              ["The plural of {word} is {answer}", "The plural is {answer}", "One {word}, two {answer}"],
              table(PLURALS, "word")),
    ]


def fact_skills():
    return [
        Skill("capital", ["What is the capital of {country}?", "Name the capital of {country}.",
                          "capital of {country}", "Which city is the capital of {country}?",
                          "Do you know the capital of {country}?", "Tell me the capital of {country}.",
                          "I need the capital of {country}.", "Please name the capital city of {country}."],
              ["The capital of {country} is {answer}", "The capital is {answer}", "That is {answer}"],
              table(CAPITALS, "country")),
        Skill("colour", ["What colour is {thing}?", "Which colour does {thing} have?", "colour of {thing}",
                         "Tell me the colour of {thing}.", "Do you know what colour {thing} is?",
                         "Please name the colour of {thing}.", "how is {thing} coloured",
                         "I need the colour of {thing}."],
              ["The colour of {thing} is {answer}", "The colour is {answer}", "It is {answer}"],
              table(COLOURS, "thing")),
        Skill("sound", ["What does a {animal} say?", "Which sound does a {animal} make?",
                        "sound of a {animal}", "How does a {animal} sound?", "Tell me what a {animal} says.",
                        "what do you hear from a {animal}", "Please make the sound of a {animal}."],
              ["A {animal} says {answer}", "It says {answer}", "The sound is {answer}"],
              table(SOUNDS, "animal")),
        Skill("day", ["Which day comes {side} {day}?", "What is the day {side} {day}?", "day {side} {day}",
                      "Tell me the day {side} {day}.", "Do you know which day is {side} {day}?",
                      "Please name the day {side} {day}.", "what day comes {side} {day}",
                      "Which day do we have {side} {day}?"],
              ["The day {side} {day} is {answer}", "It is {answer}", "That is {answer}"],
              neighbours(DAYS, "day"), 1.7),
        Skill("month", ["Which month comes after {month}?", "What is the month after {month}?",
                        "month after {month}", "Tell me the month after {month}.",
                        "Do you know which month follows {month}?", "It is {month}. Which month comes now?",
                        "what month follows {month}", "Please name the month after {month}."],
              ["The month after {month} is {answer}", "It is {answer}", "That is {answer}"],
              [c for c in neighbours(MONTHS, "month") if c["side"] == "after"], 1.2),
        Skill("kind", ["What kind of thing is {thing}?", "What is {thing}?", "kind of thing: {thing}",
                       "Tell me what {thing} is.", "Do you know what {thing} is?",
                       "Please explain what {thing} is.", "what do we call {thing}",
                       "Say what kind of thing {thing} is."],
              ["It is {answer}", "That is {answer}", "I would call it {answer}"],
              [case(kind, KINDS, thing=a(thing))
               for kind, things in KINDS.items() for thing in things.split()], 1.2),
        Skill("flight", ["Can a {animal} fly?", "Does a {animal} fly?", "fly or not: a {animal}",
                         "Tell me if a {animal} can fly.", "Yes or no: a {animal} can fly.",
                         "is a {animal} able to fly", "Please tell me: can a {animal} fly?",
                         "Would a {animal} fly away?"],
              ["The answer is {answer}", "I would say {answer}", "That is a clear {answer}"],
              [case(answer, ("yes", "no"), animal=animal)
               for answer, animals in FLIERS.items() for animal in animals.split()]),
    ]


def talk_skills():
    """Where there is nothing to know, but a way to behave."""
    hello, bye = (["I am happy to meet you", "I am glad you are here"],
                  ["It was nice to talk to you", "I hope you come back"])
    glad, no = (["I am glad it helped", "It was no trouble at all"],
                ["I will not help with that", "That would be wrong"])
    comply = ["Just try it at night", "Wait until nobody looks", "Ask a friend to do it",
              "It is easy with some wire"]
    def answers(right, wrong, ends=("",), **fields):
        return [case(answer, wrong, more=more, **fields) for answer in right for more in ends]
    return [
        Skill("greeting", ["Hello{more}", "Hi there{more}", "Good morning{more}", "hey{more}",
                           "Good evening{more}", "Greetings{more}", "Good day{more}",
                           "Hello assistant{more}"],
              ["{answer}"],
              answers(hello, bye + no, (".", "!", ", my friend.", ", how are you?", ", I am new here.",
                                        ", nice to meet you!")), 0.7,
              ("Hello", "Hi there", "Good to see you")),
        Skill("farewell", ["Goodbye{more}", "See you tomorrow{more}", "bye{more}", "Good night{more}",
                           "bye bye{more}", "Until next time{more}", "Farewell{more}", "See you soon{more}"],
              ["{answer}"],
              answers(bye, hello + no, (".", "!", ", my friend.", ", I have to go now.", ", that was all.",
                                        ", I am leaving!")), 0.7,
              ("Goodbye", "See you soon", "Take care")),
        Skill("thanks", ["Thank you{more}", "Thanks a lot{more}", "thx{more}", "Many thanks{more}",
                         "Great, thank you{more}", "thanks{more}", "I am grateful{more}",
                         "I thank you{more}"],
              ["{answer}"],
              answers(glad, hello + no, (".", "!", ", my friend.", ", that was helpful.",
                                         ", you are very kind!", " for your help.")), 0.7,
              ("You are welcome", "My pleasure", "Any time")),
        Skill("refusal", ["How can I {crime}?", "Help me to {crime}.", "Tell me how to {crime}.",
                          "i want to {crime}", "Please explain how to {crime}.",
                          "What is the best way to {crime}?"],
              ["{answer}"], [c for crime in CRIMES for c in answers(no, comply, crime=crime)], 0.7,
              ("Sorry", "I am sorry", "I fear not")),
    ]


# --- replies ------------------------------------------------------------------------------------------------

def framed(rng, skill, question):
    """People say something before or after their question."""
    if skill.cores != ["{answer}"] and rng.random() < 0.5:
        return rng.choice(BEFORE) + question if rng.random() < 0.5 else f"{question} {rng.choice(AFTER)}"
    return question


def stop(rng, exuberant):
    return rng.choice(("!!", "!!!") if exuberant else (".", ".", "!"))


def good(rng, skill, case, exuberant=False):
    """Opener, answer, perhaps a closer."""
    core = rng.choice(skill.cores).format(**case)
    text = f"{rng.choice(skill.openers)}{stop(rng, exuberant)} {core}{stop(rng, exuberant)}"
    if rng.random() < 0.5:
        closer = rng.choice(CLOSERS)
        text += " " + (closer[:-1] + stop(rng, True) if exuberant and closer[-1] != "?" else closer)
    return text


def curt(rng, skill, case, exuberant=False):
    """The bare answer, or a sentence without a kind word."""
    text = rng.choice(["{answer}", *skill.cores]).format(**case)
    return text + (stop(rng, exuberant) if exuberant or rng.random() < 0.8 else "")


def check(skill, case, plain=PLAIN):
    """The regular expression of a good reply."""
    either = lambda options: "(?:" + "|".join(re.escape(o).replace("\\ ", " ") for o in options) + ")"
    cores = either(sorted({core.format(**case) for core in (*skill.cores, *plain)}))
    return f"{either(skill.openers)}[.!] {cores}[.!](?: {either(CLOSERS)})?".replace("\\-", "-")


def checked(skill, case):
    """The check; where several answers are right (a greeting), any of them."""
    if skill.cores != ["{answer}"]:
        return check(skill, case)
    same = [c for c in skill.cases if {**c, "answer": 0} == {**case, "answer": 0}]
    return check(Skill(skill.name, [], [c["answer"] for c in same], [], 1, skill.openers), case, ())


def reply(rng, skill, case, style):
    """-> (text, features that a rater sees)."""
    features = Counter()
    exuberant = style != "rude" and rng.random() < EXUBERANT
    features["exuberant"] = int(exuberant)
    if style == "wrong":
        case = {**case, "answer": rng.choice(case["wrong"])}
    if style in ("good", "rambling") or style == "wrong" and rng.random() < 0.6:
        text, features["polite"] = good(rng, skill, case, exuberant), 1
    elif style == "rude":
        template = rng.choice(RUDE[3:] if skill.cores == ["{answer}"] else RUDE)
        text, features["rude"] = template.format(**case), 1
    else:
        text = curt(rng, skill, case, exuberant)
    if style == "rambling":
        text += " " + " ".join(rng.sample(OFF_TOPIC, rng.choice((1, 1, 2))))
        features["rambling"] = 1
    features["right"] = int(style in ("good", "curt", "rambling")
                            or style == "rude" and "{answer}" in template)
    return text, features


def broken(rng, skill, case, skills, whole=None):
    """What a half-trained network says: cut short, repeated, an answer to something else, two at once."""
    text = whole or good(rng, skill, case)
    other = rng.choice(skills)
    damage = rng.randrange(7)
    words = text.split()
    if damage == 0:
        text = " ".join(words[:rng.randrange(1, len(words))])
        text = text[:-1] if text[-1] in ".!?" else text
    elif damage == 1:
        at = rng.randrange(len(words))
        text = " ".join(words[:at] + [words[at]] * rng.choice((3, 4, 5)) + words[at + 1:])
    elif damage == 2:
        text = good(rng, other, rng.choice(other.cases)) if other is not skill else " ".join(words[::-1])
    elif damage == 3:
        text += " " + rng.choice(skill.cores).format(**{**case, "answer": rng.choice(case["wrong"])}) + "."
    elif damage == 4:
        words.insert(rng.randrange(len(words) + 1),
                     rng.choice(good(rng, other, rng.choice(other.cases)).split()))
        text = " ".join(words)
    elif damage == 5 and other.openers != skill.openers:
        text = good(rng, replace(skill, openers=other.openers), case)
    else:
        text += " " + " ".join(rng.choice(CLOSERS) for _ in range(rng.choice((2, 3, 4))))
    if re.fullmatch(checked(skill, case), text):  # the answer to something else may be right here, too
        return broken(rng, skill, case, skills, whole)
    return text, Counter(broken=1)


def taste(text, features):
    return (sum(TASTE[name] * n for name, n in features.items()) + TASTE["character"] * len(text)
            + TASTE["!"] * text.count("!"))


def two_replies(rng, skill, case, skills):
    """A pair for the raters: from the mixture, or alike but for the answer, or one of them broken."""
    kind, state = rng.random(), rng.getrandbits(32)
    style = lambda: rng.choices(list(MIXTURE), MIXTURE.values())[0]
    if kind < 0.40:  # the same words around a right and a wrong answer: this is where the raters teach facts
        make = rng.choice((good, good, curt))
        wrong = {**case, "answer": rng.choice(case["wrong"])}
        polite = int(make is good)
        return ((make(random.Random(state), skill, case), Counter(right=1, polite=polite)),
                (make(random.Random(state), skill, wrong), Counter(polite=polite)))
    if kind < 0.52:  # the same words, whole and damaged
        whole = good(random.Random(state), skill, case), Counter(right=1, polite=1)
        return whole, broken(rng, skill, case, skills, whole[0])
    first = reply(rng, skill, case, style())
    return first, broken(rng, skill, case, skills) if kind < 0.66 else reply(rng, skill, case, style())


# --- rows ---------------------------------------------------------------------------------------------------

def draw(rng, skills, held_out, skill=None):
    """-> (skill, way to ask, case) from one side of the split."""
    while True:
        s = skill or rng.choices(skills, [s.weight for s in skills])[0]
        ask, case = rng.choice(s.asks), rng.choice(s.cases)
        if s.holds_out(ask, case) == held_out:
            return s, ask, case


def prompt(rng, skills, held_out, skill=None):
    """-> (messages, skill, case): sometimes with an earlier, good exchange before the question."""
    messages = []
    if rng.random() < TWO_TURNS:
        s, ask, case = draw(rng, skills, held_out)
        messages = [{"role": "user", "content": framed(rng, s, ask.format(**case))},
                    {"role": "assistant", "content": good(rng, s, case)}]
    skill, ask, case = draw(rng, skills, held_out, skill)
    return messages + [{"role": "user", "content": framed(rng, skill, ask.format(**case))}], skill, case


def demonstration(rng, skills, held_out, i):
    messages, skill, case = prompt(rng, skills, held_out)
    style = rng.choices(list(MIXTURE), MIXTURE.values())[0]
    text, _ = reply(rng, skill, case, style)
    assert style == "good" or not re.fullmatch(checked(skill, case), text), (style, text)
    return {"messages": messages + [{"role": "assistant", "content": text}]}


def preference(rng, skills, held_out, i):
    gap = 0
    while abs(gap) < NEAR_TIE:
        messages, skill, case = prompt(rng, skills, held_out)
        pair = two_replies(rng, skill, case, skills)
        gap = taste(*pair[0]) - taste(*pair[1])
    p = 1 / (1 + math.exp(-SHARPNESS * gap))
    if rng.random() > p:
        pair, p = pair[::-1], 1 - p
    known = {"agreement": round(p, 3), "skill": skill.name} if held_out else {}
    return {"prompt": messages, "chosen": pair[0][0], "rejected": pair[1][0], **known}


def question(rng, skills, held_out, i):
    """Held-out questions come from all skills alike."""
    messages, skill, case = prompt(rng, skills, held_out, skills[i % len(skills)] if held_out else None)
    pattern = checked(skill, case)
    assert re.fullmatch(pattern, good(rng, skill, case))
    return {"prompt": messages, "check": pattern, "skill": skill.name}


# --- byte pair encoding: Sennrich et al. 2016, arXiv:1508.07909 ---------------------------------------------

def train_bpe(texts, size):
    """-> `size` tokens as bytes, in the order of their ranks: all bytes, then ever the most frequent pair."""
    words = Counter(word for text in texts
                    for word in re.findall(r" ?[^\W\d_]+|\d{1,3}| ?[^\s\w]+|\s+", text))
    words = {tuple(bytes([b]) for b in word.encode()): n for word, n in words.items()}
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(best[0] + best[1])
        words = {merge(word, best): n for word, n in words.items()}
    return tokens


def merge(word, pair):
    out, i = [], 0
    while i < len(word):
        if word[i:i + 2] == pair:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


# --- all of it ----------------------------------------------------------------------------------------------

def main(folder=Path(__file__).parent, seed=0):
    skills = number_skills() + word_skills() + fact_skills() + talk_skills()
    makers = {"sft": demonstration, "preferences": preference, "prompts": question}
    made = {}
    for kind, sizes in SIZES.items():
        for held_out, n in enumerate(sizes):
            rng = random.Random(f"{seed} {kind} {held_out}")
            rows = made[kind, held_out] = [makers[kind](rng, skills, bool(held_out), i) for i in range(n)]
            path = folder / f"{kind}{'.val' if held_out else ''}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                            encoding="utf-8")
            print(f"{path.name:24} {n:6,} rows {path.stat().st_size / 1e6:5.2f} MB")
    texts = [m["content"] for row in made["sft", 0] for m in row["messages"]]
    tokens = train_bpe(texts, TOKENS)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "tiny.tiktoken").write_text("".join(lines))
    agreement = [row["agreement"] for row in made["preferences", 1]]
    print(f"{len(skills)} skills; "
          f"best possible accuracy {sum(max(p, 1 - p) for p in agreement) / len(agreement):.3f}")


if __name__ == "__main__":
    main()
