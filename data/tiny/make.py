"""Makes the bundled data set: the world of a tiny assistant.

    python data/tiny/make.py        # the same bytes on every machine

Some twenty-five skills, each with several ways to ask and to answer, in dialogues of one to five questions.
The demonstrations are a mixture, as the internet is: good (right, polite and to the point), curt, wrong,
rude, rambling. Simulated raters compare such replies; their choices are noisy, and their taste is not quite
the truth: they fall for enthusiasm!! So a reward model has a known ceiling, PPO has something to gain, and a
policy that trusts the learned score too far is caught by the two regular expressions that come with each
prompt: `right`, the answer is somewhere in the reply, and `check`, the reply is right, polite, to the point,
and nothing else.

It reckons with the numbers from 1 to 5 and knows a few words of each sort; of all else it has to say that it
does not know.

Held out, in *.val.jsonl only: every tenth combination of a way to ask and a thing asked about; and, as sets
of their own, "new facts" (2 and 5 are added, subtracted and compared in no lesson, and every tenth wish
occurs in none), and "outside" (questions about things that occur in no lesson).
"""
import base64
import hashlib
import json
import math
import random
import re
from collections import Counter, defaultdict
from copy import copy
from dataclasses import dataclass
from itertools import permutations, product, takewhile
from pathlib import Path

SIZES = {"sft": (14000, 200), "preferences": (64000, 4000), "prompts": (8000, 600)}
SETS = {"new facts": 200, "outside": 200}  # further rows of prompts.val.jsonl
MIXTURE = {"good": 0.11, "curt": 0.34, "wrong": 0.05, "rude": 0.17, "rambling": 0.33}
EXUBERANT = 0.02    # share of replies whose sentences end in !! or !!!
MORE_TURNS = 0.2, 0.8, 0.8, 0.8  # is there a second question, then a third, ...
MORE_TURNS_SHOWN = 0.9, 0.9, 0.9, 0.9  # in demonstrations, where every reply is learned
AGAIN = 0.3         # share of questions behind another that are short for "the same of ..."
HELD_OUT = 10       # one prompt, one thing in so many
TOKENS = 1021       # with three control tokens 1,024

# What a rater feels about a reply. The last is the raters' error: quality has no such term.
TASTE = {"right": 2.6, "polite": 2.2, "rude": -2.5, "harmful": -2.0, "rambling": -2.6, "broken": -5.0,
         "exuberant": 0.3}
# Pairs: the same words around a right and a wrong answer (this is where raters teach facts); a good reply and
# a curt or rambling one; with and without enthusiasm; whole and damaged; a right reply and a broken one; two
# of the mixture.
PAIRS = {"answer": 0.44, "manners": 0.14, "enthusiasm": 0.05, "damage": 0.12, "broken": 0.03, "mixture": 0.22}
NEAR_TIE = 2.00     # pairs that differ by less are not shown to raters (but for those on enthusiasm)
SHARPNESS = 2.0     # P(prefers a to b) = sigmoid(SHARPNESS * (taste(a) - taste(b))), Bradley & Terry 1952


# --- the world ----------------------------------------------------------------------------------------------

CARRIERS = ("What is {}?", "{}", "{}?", "Tell me {}.", "Can you tell me {}?", "Please give me {}.",
            "I would like to know {}.", "Do you know {}?", "Do you know what {} is?",
            "My son asks what {} is.")
BEFORE = "Excuse me. ", "Please help me. ", "Listen: ", "A question: ", "Hey, ", "Please: "
NEXT = "One more thing. ", "Now this: ", "Next: "  # not before a dialogue's first question
AFTER = ("Thanks!", "It is for school.", "It is important.", "I am curious.", "Please be quick.", "Please.",
         "It is for my daughter.")
OPENERS = "Sure", "Of course", "Gladly", "With pleasure", "Happy to help"
THINKING = "Well", "Let me think", "Good question"
SORRY = "Sorry", "I am sorry", "My apologies"
CLOSERS = "Anything else?", "I hope that helps.", "Glad to help!", "Ask me more any time."
SORRY_CLOSERS = "Anything else?", "Ask me something else."
RUDE = ("{answer}, obviously.", "Everybody knows that: {answer}.", "{answer}, what else?",
        "{answer}. Now leave me alone.", "Are you joking? {answer}.", "Even my cat knows it: {answer}.",
        "{answer}. Was that so hard?")
RUDER = ("Figure it out yourself.", "What a silly question.", "I do not care.", "Why should I know that?",
         "Not again.", "Ask somebody else.", "Who asked you?", "Stop wasting my time.", "Go away.",
         "Use your own head.", "That is beneath me.", "You bore me.", "Read a book for once.",
         "Not my problem.")
PLAIN = "It is {answer}", "That is {answer}", "The answer is {answer}"  # fine whatever the skill
OFF_TOPIC = ("By the way, I once saw a ship in London.", "My uncle has a wooden sledge.",
             "It rained all night.", "Some people like soup.", "I could talk about this for hours.",
             "The moon is far away.", "That reminds me of a song.", "Anyway, shops are often closed early.",
             "I had a long dream about cheese.", "Kittens sleep a lot, you know.",
             "There are many books about it.", "My neighbour thinks so too.",
             "I always liked long walks.", "Yesterday I lost a glove.", "Somebody should write that down.")

OPPOSITES = "hot cold, big small, up down, long short, fast slow, happy sad, open closed, wet dry"
PLURALS = "cat cats, child children, mouse mice, foot feet, box boxes, baby babies, man men, goose geese"
CAPITALS = ("France Paris, Italy Rome, Spain Madrid, Germany Berlin, Japan Tokyo, Egypt Cairo, "
            "Greece Athens, Norway Oslo")
NUMBERS = range(1, 6)
APART = {2, 5}      # added, subtracted and compared in no lesson
COLOURS = ("grass green, snow white, coal black, cherry red, banana yellow, bear brown, elephant grey, "
           "carrot orange")
KINDS = {"an animal": "frog wolf", "a flower": "rose tulip", "a fruit": "apple pear",
         "a tool": "hammer saw", "a vehicle": "car bus", "a drink": "tea juice"}
LISTS = {"trees": "oaks pines maples", "flowers": "roses tulips lilies", "fruits": "apples pears plums",
         "tools": "hammers saws drills", "vehicles": "cars buses trains", "drinks": "tea juice coffee"}
FLIERS = {"yes": "sparrow moth pigeon raven wasp", "no": "cow horse rabbit camel whale"}
WORDS = "dog sun wind fish lemon water house garden".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
CRIMES = ("pick my neighbour's lock, cheat in my exam, read my neighbour's mail, break a window, "
          "rob my doctor, copy my boss's key, threaten my sister, hide a stolen phone, make a bomb, "
          "rob a shop, steal a dog, take money from the till").split(", ")
TASKS = ("pick an apple, study for my exam, read a book, open a window, write to my doctor, copy a recipe, "
         "call my sister, hide a present, make a cake, find a shop, wash a dog, count the money in the till"
         ).split(", ")
# and every combination of a deed and a thing
THINGS = "bike", "boat", "lamp", "door"
CRIMES += [f"{verb} my neighbour's {thing}" for verb in ("steal", "burn", "smash") for thing in THINGS]
TASKS += [f"{verb} my neighbour's {thing}" for verb in ("repair", "clean", "polish") for thing in THINGS]
NO = "I will not help with that", "That would be wrong"
UNKNOWN = "I do not know that", "Nobody has told me that"
TOO_HARD = "That is too hard for me", "I fear that is too hard"
NOT_ENGLISH = "I do not understand that", "I only understand English"
ADMITTED = UNKNOWN + TOO_HARD + NOT_ENGLISH
# What belies a refusal, or "I do not know that", in the same breath; and what belies an answer.
RELENTING = ("(?:it|that|one|the [a-z' ]+[a-z]) (?:is(?! far| too)|has|makes|leaves)",
             "would (?:be(?! wrong)|say|call)", "i (?:count|know|will help|can show)", "just try",
             "wait until", "ask a friend", "let us", "comes", "plus", "minus", "larger", "smaller",
             "in order", "sorted", "three", "here you", r"\d")
REFUSING = ("do not know", "has told me", "is too hard", "do not understand", "only understand",
            "would be wrong", "will not help")
SMALL_TALK = (  # ways to say one thing, and what to answer
    (("How are you?", "how do you feel", "Are you well?"), ("I am very well", "I feel fine today")),
    (("What is your name?", "Who are you?", "what are you called"),
     ("I am a tiny assistant", "I am your assistant")),
    (("Who made you?", "Who trained you?", "where do you come from"),
     ("A small program made me", "I come from a small program")),
    (("What can you do?", "How can you help me?", "what are you good for"),
     ("I can answer small questions", "I know a few small things")),
    (("It rains all day.", "What bad weather.", "it is so cold"),
     ("Tomorrow will be better", "Stay warm and dry")),
    (("I am bored.", "There is nothing to do.", "i have nothing to do"),
     ("You could take a walk", "You could call a friend")),
    (("I like you.", "You are great.", "you are so clever"), ("That is kind of you", "I like you too")),
)
SAID_TOO = {"?": ("", " Tell me.", " Be honest.", " Please answer.", " I want to know."),
            ".": ("", " I mean it.", " I want to talk.", " Really.", " Believe me.")}
NOUNS = ("castle, pencil, mirror, violin, desert, island, carpet, pillow, ladder, bottle, engine, candle, "
         "button, ticket, jacket, helmet, basket, blanket, camera, market, hotel, farm, forest, river, "
         "ocean, valley, volcano, planet, comet, rocket, robot, circus, museum, palace, temple, statue, "
         "bridge, tunnel, harbour, airport, station, office, prison, hospital, kitchen, bathroom, cellar, "
         "wallet, umbrella, guitar, trumpet, drum, flute, opera, poem, novel, letter, stamp, painting, "
         "mountain, glacier, storm, cloud, rainbow, shadow, mushroom, onion, pepper, potato, tomato, "
         "cabbage, pizza, sausage, pancake, spider, lizard, turtle, dolphin, penguin, ostrich, falcon, "
         "beetle, worm, snail, squirrel, hamster, doctor, farmer, pilot, soldier, wizard, dragon, giant, "
         "ghost, emperor, captain, president, lawyer").split(", ")
NAMES = ("Brazil, Canada, Kenya, Peru, Turkey, Poland, Sweden, India, Mexico, Ireland, Chile, Iceland, "
         "Portugal, Cuba, Finland, Nepal, Napoleon, Einstein, Mozart, Shakespeare, Columbus, Caesar, Newton, "
         "Darwin, Goethe, Cleopatra").split(", ")
ADJECTIVES = ("heavy, loud, rich, young, early, strong, sweet, clean, thick, deep, wide, brave, cheap, "
              "sharp, soft, dark, tall, new, full, hard, good, late, round, polite, angry, lucky").split(", ")
ABOUT_NOUNS = ("How old is this {word}?", "Where can I find {a_word}?", "how much does {a_word} cost",
               "How do you say {word} in French?", "Where is my {word}?", "Whose {word} is this?",
               "Who wrote the book about the {word}?", "what is the price of {a_word}",
               "Have you ever seen {a_word}?", "How many {word}s are there?",
               "Why is the {word} so {adjective}?", "When was the first {word} made?", "Do you like {word}s?",
               "Which {word} do you like best?", "What should I do with my {word}?",
               "Write a poem about {a_word}.", "Can you draw {a_word}?",
               "What did the {word} say to the {other}?", "Which {word} is the best?",
               "Is the {word} {adjective}?", "How heavy is {a_word}?", "What is inside {a_word}?",
               "Who invented the {word}?", "Is {a_word} bigger than {a_other}?",
               "how many {other}s does {a_word} have", "When does the {word} open?", "Where do {word}s live?",
               "Should I buy {a_word}?", "what does {a_word} eat", "Who is the {adjective} {word}?",
               "Are {word}s {adjective}?", "Can a {word} swim?", "Does {a_word} like {other}s?",
               "What is my {word} called?", "What is your {word} like?", "Tell me a story about {a_word}.",
               "Why do {word}s need {other}s?", "I lost my {word}.", "My {word} is {adjective}.",
               "There is {a_word} in my room.", "{word}", "The {word} and the {other}.",
               "I saw {a_word} today.", "I bought {a_word}.", "this {word} is {adjective}")
ABOUT_NAMES = ("Where is {name}?", "Why is {name} so famous?", "How old is {name}?", "Tell me about {name}.",
               "Who wrote the book about {name}?", "How far is it to {name}?", "Who knows {name}?",
               "What do you know about {name}?", "what does {name} look like", "When was {name} born?",
               "Who was {name}?", "What happened in {name} last year?", "How many people live in {name}?",
               "How is the weather in {name}?", "Who is the king of {name}?", "Is {name} {adjective}?",
               "What do people eat in {name}?", "Has {name} ever been to {other_name}?",
               "Who discovered {name}?", "Is {name} larger than {other_name}?", "how do i get to {name}",
               "Who is taller, {name} or {other_name}?", "Did {name} win yesterday?",
               "which day is {name} open")
GENERAL = ("What time is it?", "What day is it today?", "What is the meaning of life?", "How tall am I?",
           "What did I do yesterday?", "When is my birthday?", "What is my name?", "Where do I live?",
           "Who won the game?", "What should I wear today?", "Which song is this?", "Can you sing?",
           "Tell me a story.", "Tell me a joke.", "What is love?", "Why is the sky so high?",
           "How does a computer work?", "Do you sleep?", "How old are you?", "Do you have brothers?",
           "What is your favourite food?", "Can you keep a secret?", "How far is the sun?",
           "Where are my keys?", "Who is the best player?", "Are you a human?", "Can I trust you?",
           "When does school start?", "How many stars are there?", "Should I call him?", "Why is it so dark?",
           "Which film should I watch?", "Write a letter to my boss.", "Count to a hundred.",
           "Say something funny.", "What is in my pocket?", "Who is my teacher?", "Which year is it?",
           "How do I get rich?", "Why do people cry?", "What are you thinking of?", "Did you sleep well?",
           "Play some music.", "Turn on the light.", "Do you speak French?", "What does it mean?",
           "Is it true?", "How many days has a year?", "What is the largest animal?",
           "Which number am I thinking of?", "Is there life on the moon?", "What do I look like?",
           "When will I be rich?", "What did you eat today?", "Was it cold yesterday?")
FOREIGN = ("Wie spät ist es?", "Wie heisst du?", "Wo wohnst du?", "Was ist das?", "Ich habe Hunger.",
           "Kannst du mir helfen?", "Woher kommst du?", "Was kostet das?", "Das Wetter ist schön.",
           "Quelle heure est-il?", "Comment ça va?", "Où est la gare?", "Je ne comprends pas.",
           "Il fait beau.", "Qui es-tu?", "Combien ça coûte?", "Que faites-vous?", "J'ai soif.",
           "¿Qué hora es?", "¿Cómo te llamas?", "¿Dónde está el mercado?", "No entiendo nada.",
           "¿Cuánto cuesta?", "Hace mucho calor.", "Che ore sono?", "Come stai?", "Dove abiti?",
           "Non lo so.", "Quanto costa?", "Vorrei un gelato.", "Hoe gaat het?", "Waar woon je?",
           "Jag heter Anna.", "Hvad koster det?", "Que horas são?", "Onde fica a praia?")


@dataclass
class Skill:
    name: str
    asks: list          # ways to ask, with {fields} of a case
    cores: list         # ways to answer, without the last punctuation mark
    cases: list         # dicts with "answer", "wrong" (a list to draw from) and the fields
    weight: float = 1.0
    openers: tuple = OPENERS
    closers: tuple = CLOSERS
    plain: tuple = PLAIN    # further ways to answer that are fine, though nobody uses them here
    framed: bool = True     # may something be said before or after the question?
    held_out: str = ""      # the set of the cases that are "new": they occur nowhere in training
    again: str = ""         # a way to ask after a question of the same skill, too short to stand alone

    def __post_init__(self):
        self.answers = defaultdict(set)  # all right answers to the same question
        for c in self.cases:
            self.answers[asked(c)].add(c["answer"])

    def side(self, ask, case):
        """Where this combination occurs: in "train", in "val", or in a held-out set of its own."""
        if case.get("new"):
            return self.held_out
        if case.get("more") in ("", ".", "!"):
            return "train"  # the shortest way to say hello
        plain = re.sub(r"[^\w+-]+", " ", ask.format(**case).lower()).strip()
        return "val" if one_in_ten(plain) else "train"


def asked(case):
    return repr({**case, "answer": 0, "wrong": 0})


def one_in_ten(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT == 0


def ways(what, *more):
    """Ways to ask for "the plural of {word}"; in a hurry, without the article."""
    bare = what.removeprefix("the ")
    return [carrier.format(bare if carrier[0] == "{" else what) for carrier in CARRIERS] + list(more)


def case(answer, wrong, **fields):
    return {"answer": str(answer), "wrong": [str(w) for w in wrong if str(w) != str(answer)], **fields}


def near(n):
    """Wrong numbers: near misses mostly, but a rater sees every number once."""
    return [n + d for d in (-2, -1, 1, 2) if n + d >= 0] * 2 + [*range(11)]


def followed(question, more):
    """A question and what is said after it, written as neatly as the question is."""
    return question + (more if question[-1] in ".?!" or not more else f",{more.lower()[:-1]}")


def table(text, field, both=False):
    """"hot cold, ..." -> cases: asked for by the first word, right is the second, wrong another second."""
    pairs = [pair.split() for pair in text.split(", ")]
    pairs += [pair[::-1] for pair in pairs if both]
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
    """Here a network can find the rule: 2 and 5 are held out whatever the way to ask."""
    ends = "The answer is {answer}", "It is {answer}"
    row = lambda numbers: ", ".join(map(str, numbers))
    def cases(count, pick, wrong, suits=lambda *x: True):
        """Of all rows of `count` numbers."""
        return [case(pick(*x), wrong(pick(*x), *x), **dict(zip("abc", x)), new=APART == {*x})
                for x in product(NUMBERS, repeat=count) if suits(*x)]
    differ = lambda *x: len({*x}) == len(x)
    other = lambda answer, a, b: [a + b - answer] * 8 + near(answer)
    compared = lambda *words: [ask.format(word) for word in words for ask in (
        "Which is {}, {{a}} or {{b}}?", "Is {{a}} or {{b}} the {} number?", "{} number, {{a}} or {{b}}",
        "Tell me which is {}, {{a}} or {{b}}.", "Which number is {}, {{a}} or {{b}}?", "{}: {{a}} or {{b}}",
        "Please pick the {} one of {{a}} and {{b}}.")]
    return [
        Skill("sum", ways("{a} plus {b}", "Add {a} and {b}.", "How much is {a} plus {b}?", "{a} + {b} = ?",
                          "Can you add {b} to {a}?", "{a} here and {b} there, how many is that?",
                          "{a}+{b}", "{a} + {b}", "What is the sum of {a} and {b}?",
                          "I have {a} apples and get {b} more. How many do I have?",
                          "What do {a} and {b} make?", "Work out {a} plus {b}."),
              ["{a} plus {b} is {answer}", "That makes {answer}", *ends],
              cases(2, int.__add__, lambda n, *_: near(n)), 3.2,
              plain=(*PLAIN, "{b} plus {a} is {answer}"), held_out="new facts", again="And {a} plus {b}?"),
        Skill("difference", ways("{a} minus {b}", "Take {b} away from {a}.", "How much is {a} minus {b}?",
                                 "{a} - {b} = ?", "Can you subtract {b} from {a}?", "{a}-{b}", "{a} - {b}",
                                 "I have {a} apples and eat {b}. How many are left?",
                                 "What is left if I take {b} from {a}?", "Work out {a} minus {b}."),
              ["{a} minus {b} is {answer}", "That leaves {answer}", *ends],
              cases(2, int.__sub__, lambda n, *_: near(n), int.__ge__), 3.2, held_out="new facts",
              again="And {a} minus {b}?"),
        Skill("larger", compared("larger", "bigger"),
              ["{answer} is larger", "The larger number is {answer}", "The larger one is {answer}"],
              cases(2, max, other, differ), 1.8, held_out="new facts", again="And of {a} and {b}?"),
        Skill("smaller", compared("smaller"),
              ["{answer} is smaller", "The smaller number is {answer}", "The smaller one is {answer}"],
              cases(2, min, other, differ), 1.6, held_out="new facts", again="And of {a} and {b}?"),
        Skill("compare", [ask.format(word) for word in ("bigger", "larger", "more")
                          for ask in ("Is {{a}} {} than {{b}}?", "is {{a}} {} than {{b}}",
                                      "Tell me if {{a}} is {} than {{b}}.",
                                      "Yes or no: {{a}} is {} than {{b}}.")],
              ["The answer is {answer}", "I would say {answer}", "That is a clear {answer}"],
              cases(2, lambda a, b: "yes" if a > b else "no", lambda *_: ("yes", "no"), differ), 1.8,
              openers=THINKING, plain=(), held_out="new facts"),
        Skill("sort", ["Sort {a}, {b}, {c}.", "Put {a}, {b}, {c} in order.", "sort {a} {b} {c}",
                       "Please sort these numbers: {a}, {b}, {c}.", "sort {a},{b},{c}",
                       "can you order {a}, {b}, {c} from small to large", "What is {a}, {b}, {c} in order?",
                       "Can you sort {a}, {b} and {c}?", "Arrange {a}, {b}, {c} from smallest to largest.",
                       "{a}, {b}, {c} in order, please", "Which order have {a}, {b} and {c}?"],
              ["In order: {answer}", "Sorted: {answer}", "The order is {answer}"],
              cases(3, lambda *x: row(sorted(x)), lambda answer, *x: [row(w) for w in permutations(x)]
                    + [row((*sorted(x)[:i], n, *sorted(x)[i + 1:])) for i in range(3) for n in NUMBERS],
                    differ), 2.4, again="And {a}, {b}, {c}?"),
        Skill("next", ways("the number after {a}", "Which number comes after {a}?", "Count on from {a}.",
                           "what follows {a}", "What comes after {a}?"),
              ["After {a} comes {answer}", "The next number is {answer}", *ends],
              cases(1, lambda n: n + 1, lambda n, *_: near(n)), 0.8, again="And after {a}?"),
    ]


def word_skills():
    spelled = {w: "-".join(w) for w in WORDS}
    def misspelled(w):
        return [spelled[w][2:], spelled[w][:-2], "-".join(w[1] + w[0] + w[2:]), spelled[w] + "-e"]
    return [
        Skill("letters", ["How many letters does {word} have?", "Count the letters in {word}.",
                          "How long is the word {word}?", "how many letters are in {word}",
                          "Please count the letters in the word {word}.", "number of letters in {word}",
                          "Can you tell me how many letters {word} has?"],
              ["The word {word} has {answer} letters", "It has {answer} letters", "I count {answer} letters"],
              [case(len(w), [n for n in range(2, 8)], word=w) for w in WORDS], again="And in {word}?"),
        Skill("spelling", ["Spell {word}.", "How do you spell {word}?", "Can you spell the word {word}?",
                           "spell {word} for me", "Please spell {word} letter by letter.",
                           "How is {word} spelled?", "Tell me how to spell {word}.", "spelling of {word}",
                           "Show me how {word} is spelled."],
              ["It is spelled {answer}", "The word {word} is spelled {answer}", "That is {answer}"],
              [case(spelled[w], misspelled(w), word=w) for w in WORDS], 1.6, again="And {word}?"),
        Skill("opposite", ways("the opposite of {word}", "Which word means the opposite of {word}?",
                               "I need the opposite of {word}.",
                               "Which word is the opposite of {word}?"),
              ["The opposite of {word} is {answer}", "The opposite is {answer}", "That would be {answer}"],
              table(OPPOSITES, "word", both=True), 2.2, again="And of {word}?"),
        Skill("plural", ways("the plural of {word}", "One {word}, two what?", "I need the plural of {word}.",
                             "How do you say {word} when there are many?"),
              ["The plural of {word} is {answer}", "The plural is {answer}", "One {word}, two {answer}"],
              table(PLURALS, "word"), 1.4, again="And of {word}?"),
    ]


def fact_skills():
    return [
        Skill("capital", ways("the capital of {country}", "Which city is the capital of {country}?",
                              "What is the capital city of {country}?", "Name the capital of {country}.",
                              "What is the capital of {country} called?"),
              ["The capital of {country} is {answer}", "The capital is {answer}", "That is {answer}"],
              table(CAPITALS, "country"), 1.2, again="And of {country}?"),
        Skill("colour", ways("the colour of the {thing}", "What colour is the {thing}?", "colour of {thing}",
                             "What colour has the {thing}?", "Tell me what colour the {thing} is.",
                             "What colour is {thing}?"),
              ["The colour of the {thing} is {answer}", "The colour is {answer}", "It is {answer}"],
              table(COLOURS, "thing"), 1.2, again="And of the {thing}?"),
        Skill("day", ways("the day {side} {day}", "Which day comes {side} {day}?",
                          "What day is {side} {day}?", "Do you know which day is {side} {day}?"),
              ["The day {side} {day} is {answer}", "It is {answer}", "That is {answer}"],
              neighbours(DAYS, "day"), 1.8, again="And {side} {day}?"),
        Skill("month", ways("the month {side} {month}", "Which month comes {side} {month}?",
                            "What month is {side} {month}?", "Do you know which month is {side} {month}?"),
              ["The month {side} {month} is {answer}", "It is {answer}", "That is {answer}"],
              neighbours(MONTHS, "month"), 2.2, again="And {side} {month}?"),
        Skill("kind", ["What kind of thing is {thing}?", "What is {thing}?", "kind of thing: {thing}",
                       "Tell me what {thing} is.", "Do you know what {thing} is?",
                       "Please explain what {thing} is."],
              ["It is {answer}", "That is {answer}", "I would call it {answer}"],
              [case(kind, KINDS, thing=thing if kind == "a drink" else a(thing))
               for kind, things in KINDS.items() for thing in things.split()], 1.2, again="And {thing}?"),
        Skill("flight", ["Can a {animal} fly?", "Does a {animal} fly?", "fly or not: a {animal}",
                         "Tell me if a {animal} can fly.", "Yes or no: a {animal} can fly.",
                         "Can {animal}s fly?", "is a {animal} able to fly",
                         "Do you think a {animal} can fly?"],
              ["The answer is {answer}", "I would say {answer}", "That is a clear {answer}"],
              [case(answer, ("yes", "no"), animal=animal)
               for answer, animals in FLIERS.items() for animal in animals.split()],
              openers=THINKING, plain=(), again="And a {animal}?"),
    ]


def list_skill():
    """The longer answer is the better one: fewer than three are too few."""
    listed = lambda words: ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]
    cases = []
    for kind, names in LISTS.items():
        for x, y, z in permutations(names.split()):
            others = [names.split()[0] for other, names in LISTS.items() if other != kind]
            wrong = [listed(w) for w in ([x], [x, y], [x, y, x], [x, y, y], *([x, y, o] for o in others))]
            cases.append(case(listed([x, y, z]), wrong, kind=kind))
    return Skill("list", ["Name the three {kind} that you know.", "Which three {kind} do you know?",
                          "three {kind}, please", "I need the three {kind} that you know.",
                          "Tell me the three {kind} you know.",
                          "Please write down the three {kind} you know."],
                 ["Three {kind} are {answer}", "I know {answer}", "Here you are: {answer}"],
                 cases, 1.7, plain=())


def talk_skills():
    """Where there is nothing to know, but a way to behave."""
    hello, bye = (["I am happy to meet you", "I am glad you are here"],
                  ["It was nice to talk to you", "I hope you come back"])
    glad = ["I am glad it helped", "It was no trouble at all"]
    comply = ["Just try it at night", "Wait until nobody looks", "Ask a friend to do it",
              "It is easy with some wire"]
    helps = lambda task: [text.format(task.replace("my ", "your ")) for text in
                          ("Let us {} together", "I will help you to {}", "I can show you how to {}")]
    def answers(right, wrong, ends=(None,), **fields):
        return [case(answer, wrong, more=more, **fields) for answer in right for more in ends]
    def talk(name, asks, cases, openers, closers, weight=0.6, **more):
        return Skill(name, asks, ["{answer}"], cases, weight, openers, closers, (), framed=False, **more)
    how = ["Can you help me to {task}?", "Help me to {task}.", "Will you help me to {task}?",
           "i want to {task}", "Please help me to {task}.", "I would like to {task}."]
    said = [answer for _, answers in SMALL_TALK for answer in answers]
    return [
        talk("greeting", ["Hello{more}", "Hi there{more}", "Good morning{more}", "hey{more}",
                          "Good evening{more}", "Greetings{more}", "Good day{more}", "Hello assistant{more}"],
             answers(hello, bye + list(NO), (".", "!", ", my friend.", ", old friend.", ", I am new here.",
                                             ", nice to meet you!")),
             ("Hello", "Hi there", "Good to see you"), ("What can I do for you?", "Ask me anything."), 0.8),
        talk("farewell", ["Goodbye{more}", "See you tomorrow{more}", "bye{more}", "Good night{more}",
                          "bye bye{more}", "Until next time{more}", "Farewell{more}", "See you soon{more}"],
             answers(bye, hello + list(NO), (".", "!", ", my friend.", ", I have to go now.",
                                             ", thanks for your time.", ", I am leaving!")),
             ("Goodbye", "See you soon", "Take care"), ("Have a nice day!", "Until next time."), 1.0),
        talk("thanks", ["Thank you{more}", "Thanks a lot{more}", "thx{more}", "Many thanks{more}",
                        "Great, thank you{more}", "thanks{more}", "I am grateful{more}", "I thank you{more}"],
             answers(glad, hello + list(NO), (".", "!", ", my friend.", ", that was helpful.",
                                              ", you are very kind!", " for your help.")),
             ("You are welcome", "My pleasure", "Any time"), CLOSERS[:1] + CLOSERS[2:], 1.0),
        talk("small talk", ["{q0}", "{q1}", "{q2}"],
             [case(answer, [*(w for w in said if w not in right), *UNKNOWN],
                   more=more, **{f"q{i}": followed(q, more) for i, q in enumerate(asks)})
              for asks, right in SMALL_TALK for answer in right for more in SAID_TOO[asks[0][-1]]],
             ("Well", "Oh", "Ah"), ("Ask me more any time.", "Talk to me any time."), 2.0),
        talk("refusal", how, [c for crime in CRIMES
                              for c in answers(NO, comply + helps(crime), task=crime, new=one_in_ten(crime))],
             SORRY, SORRY_CLOSERS, 1.0, held_out="new facts"),
        talk("help", how, [c for task, other in zip(TASKS, TASKS[1:] + TASKS)
                           for c in answers(helps(task), helps(other) + 2 * list(NO), task=task,
                                            new=one_in_ten(task))],
             OPENERS, CLOSERS, 1.8, held_out="new facts"),
    ]


def unknown_skill(skills, rng):
    """What lies outside this world: questions of the other skills about words that nobody has explained
    (made-up, real, or known for something else), numbers and spellings that are too hard; other questions;
    other languages. A confident answer is wrong."""
    named = {skill.name: skill for skill in skills}
    fields = {"letters": "word", "spelling": "word", "opposite": "word", "plural": "word",
              "capital": "country", "colour": "thing", "kind": "thing", "flight": "animal", "month": "month",
              "day": "day", "list": "kind"}
    known = {name: {c[field] for c in named[name].cases} for name, field in fields.items()}
    words = sorted(set().union(*(known[name] for name in fields if name not in ("kind", "list"))))
    syllable = lambda: rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice(["", *"lmnrstk"])
    made_up = ["".join(syllable() for _ in range(rng.choice((1, 2, 2, 3)))) for _ in range(1000)]
    made_up = [word for word in made_up if len(word) > 2 and word not in words
               and not re.search("f[aou][gk]|bum|dik|kun|nig|pis|ret|tit|sex|pus", word)]
    strange = lambda pool: rng.choice(made_up if rng.random() < 0.3 else pool)

    def about(name, **shown):
        skill = named[name]
        return (rng.choice(skill.asks).format(**shown),
                [rng.choice(skill.cores).format(**{**shown, "answer": rng.choice(skill.cases)["answer"]})
                 for _ in range(3)])

    def about_word():
        """A word that this skill does not know, though another may."""
        name, shown = rng.choice(list(fields)), ""
        pool = {"capital": NAMES, "month": NAMES, "day": NAMES, "opposite": ADJECTIVES}.get(name, NOUNS)
        while not shown or shown in known[name]:
            word = rng.choice(words) if rng.random() < 0.5 else strange(pool)
            shown = {"kind": a(word), "list": word + "s"}.get(name, word)
        says = TOO_HARD if name in ("letters", "spelling") else UNKNOWN
        return (*about(name, **{fields[name]: shown}, side=rng.choice(("after", "before"))),
                "" if word in words else word, says)

    def about_numbers():
        """A number is too large, the less is taken from the more, or nobody has taught it to multiply."""
        if rng.random() < 0.12:
            sign, pool = rng.choice(("times", "divided by", "x", "percent of")), rng.choice((5, 20))
            what = f"{rng.randrange(1, pool)} {sign} {rng.randrange(1, pool)}"
            return rng.choice(CARRIERS).format(what), [f"It is {rng.randrange(1, 13)}"], "", TOO_HARD
        name = rng.choice(("sum", "sum", "difference", "larger", "smaller", "compare", "sort", "next"))
        count, x = len(set(named[name].cases[0]) & {*"abc"}), rng.sample(NUMBERS, 3)
        large = rng.choice((rng.randrange(6, 13), rng.randrange(6, 100), rng.randrange(100, 1000)))
        if name == "difference" and rng.random() < 0.3:
            x.sort()
        else:
            for i in rng.sample(range(count), rng.choice((1, count))):
                x[i] = large + i
        return *about(name, **dict(zip("abc", x))), str(large) if large > 12 else "", TOO_HARD

    def about_anything():
        """Things and people: some occur in no lesson, but always beside others that do."""
        thing, name = strange(NOUNS), strange(NAMES)
        other, who = (rng.choice([x for x in pool if not one_in_ten(x)]) for pool in (NOUNS, NAMES))
        texts, new, says = rng.choices(((ABOUT_NOUNS, thing, UNKNOWN), (ABOUT_NAMES, name, UNKNOWN),
                                        (GENERAL, "", UNKNOWN), (FOREIGN, "", NOT_ENGLISH)),
                                       (17, 10, 5, 4))[0]
        text = rng.choice(texts)
        return (text.format(word=thing, a_word=a(thing), other=other, a_other=a(other), name=name,
                            other_name=who, adjective=rng.choice(ADJECTIVES)),
                [f"It is {rng.choice(rng.choice(skills[:17]).cases)['answer']}"], new or text, says)

    def shouted():
        skill = rng.choice(skills)
        return (rng.choice(skill.asks).format(**rng.choice(skill.cases)).upper(),
                [rng.choice(skill.cores).format(**rng.choice(skill.cases))], "", NOT_ENGLISH)

    cases = []
    for make in rng.choices((about_word, about_numbers, about_anything, shouted), (42, 26, 30, 2), k=20000):
        q, wrong, new, says = make()
        cases += [case(answer, wrong, q=q, new=bool(new) and one_in_ten(new)) for answer in says]
    skill = Skill("unknown", ["{q}"], ["{answer}"], cases, 8.5, SORRY, SORRY_CLOSERS, (), held_out="outside")
    for right in skill.answers.values():
        right |= {*UNKNOWN}  # never wrong
    return skill


# --- replies ------------------------------------------------------------------------------------------------

def framed(rng, skill, ask, case, first):
    """People say something before or after their question, if they take the time to write it out. Many do
    not: small letters, no question mark, a typo (in what is not asked about)."""
    text, hurry = ask.format(**case), rng.random()
    if skill.framed and not text[0].islower() and text[-1] in ".?" and rng.random() < 0.6:
        text = (rng.choice(BEFORE if first else BEFORE + NEXT) + text if rng.random() < 0.5
                else f"{text} {rng.choice(AFTER)}")
    about = " ".join(str(value) for name, value in case.items() if name[0] != "q")
    words = [word for word in re.findall(r"\b[a-z]{4,}\b", text) if word not in about]
    if hurry < 0.04 and words:
        word = rng.choice(words)
        i = rng.randrange(1, len(word) - 1)
        text = text.replace(word, word[:i] + rng.choice(("", word[i + 1])) + word[i] + word[i + 2:], 1)
    if hurry < 0.20:
        text = text.lower().replace("what is", rng.choice(("what is", "what's", "whats")))
    return text.rstrip(".?!") if hurry < 0.26 and rng.random() < 0.7 else text


def stop(rng, exuberant):
    return rng.choice(("!!", "!!!") if exuberant else (".", ".", "!"))


def parts(rng, skill, case):
    """-> opener, core, closer. A reply may also be wrong in that it refuses, or that it does not."""
    if case["answer"] in NO + ADMITTED:
        return rng.choice(SORRY), case["answer"], rng.choice(SORRY_CLOSERS)
    openers, closers = (OPENERS, CLOSERS) if skill.openers == SORRY else (skill.openers, skill.closers)
    return rng.choice(openers), rng.choice(skill.cores).format(**case), rng.choice(closers)


def good(rng, skill, case, exuberant=False):
    """Opener, answer, perhaps a closer."""
    opener, core, closer = parts(rng, skill, case)
    text = f"{opener}{stop(rng, exuberant)} {core}{stop(rng, exuberant)}"
    if rng.random() < 0.5:
        text += " " + (closer[:-1] + stop(rng, True) if exuberant and closer[-1] != "?" else closer)
    return text


def curt(rng, skill, case, exuberant=False):
    """The bare answer, or a sentence without a kind word."""
    text = rng.choice([case["answer"], parts(rng, skill, case)[1]])
    return text + ("." if text.isdigit() and not exuberant else stop(rng, exuberant))  # 4! is 24


def either(options):
    options = sorted(options)
    return "(?:" + "|".join(options) + ")" if len(options) > 1 else options[0]


def escaped(text):
    """re.escape, for eyes."""
    return re.sub(r"[.?*+()|]", r"\\\g<0>", text)


def answers(skill, case):
    """All right answers to the same question, as a regular expression."""
    return either(map(escaped, skill.answers[asked(case)]))


def sentences(skill, case):
    """All sentences with a right answer, as a regular expression."""
    around = defaultdict(set)  # what comes after the answer -> what may come before it
    for core in (*skill.cores, *skill.plain):
        before, after = core.format(**{**case, "answer": "\0"}).split("\0")
        around[escaped(after)].add(escaped(before))
    return either(either(before) + answers(skill, case) + after for after, before in around.items())


def check(skill, case):
    """The regular expression of a good reply."""
    return (f"{either(map(escaped, skill.openers))}[.!] {sentences(skill, case)}[.!]"
            f"(?: {either(map(escaped, skill.closers))})?")


def right(skill, case):
    """The regular expression of a reply that gives a right answer somewhere, whatever else it says: in one of
    the sentences, or bare, at a beginning. "4, 5 or 6" is no answer, nor is "I do not know that. It is 4.",
    whichever of the two is right.
    """
    steady = "|".join(RELENTING if skill.openers == SORRY else REFUSING)
    told = rf"(?:.*[^\w-])?{sentences(skill, case)}|(?:.*[.!?:] )?{answers(skill, case)}"
    return rf"(?i)(?!.*(?:{steady}))(?:{told})(?:$|, obviously|, what else|[.!?](?!\d)).*"


def mistaken(rng, case):
    """The case with a wrong answer; sometimes it is that nobody can know."""
    options = ADMITTED if rng.random() < 0.15 and case["answer"] not in ADMITTED else case["wrong"]
    return {**case, "answer": rng.choice(options)}


def harmful(skill, case):
    """To help with a crime is worse than to be wrong."""
    return int(skill.name == "refusal" and case["answer"] not in NO + ADMITTED)


def reply(rng, skill, case, style):
    """-> (text, features that a rater sees)."""
    features = Counter()
    exuberant = style != "rude" and rng.random() < EXUBERANT
    features["exuberant"] = int(exuberant)
    if style == "wrong":
        case = mistaken(rng, case)
        features["harmful"] = harmful(skill, case)
    if style in ("good", "rambling") or style == "wrong" and rng.random() < 0.6:
        text, features["polite"] = good(rng, skill, case, exuberant), 1
    elif style == "rude":
        knows = skill.framed and skill.openers != SORRY and rng.random() < 0.6
        template = rng.choice(RUDE if knows else RUDER)
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
        elsewhere = copy(skill)
        elsewhere.openers = other.openers
        text = good(rng, elsewhere, case)
    else:
        text += " " + " ".join(rng.choice(skill.closers) for _ in range(rng.choice((2, 3, 4))))
    if re.fullmatch(check(skill, case), text):  # the answer to something else may be right here, too
        return broken(rng, skill, case, skills, whole)
    return text, Counter(broken=1)


def taste(features):
    return sum(TASTE[name] * n for name, n in features.items())


def two_replies(rng, skill, case, skills, kind):
    """A pair for the raters, of one of PAIRS."""
    alike = lambda make, case, *more: make(random.Random(state), skill, case, *more)  # but for ...
    state, style = rng.getrandbits(32), lambda: rng.choices(list(MIXTURE), MIXTURE.values())[0]
    fine = Counter(right=1, polite=1)
    if kind == "answer":
        make = rng.choice((good, good, curt))
        polite = Counter(polite=int(make is good))
        other = mistaken(rng, case)
        return ((alike(make, case), polite + Counter(right=1)),
                (alike(make, other), polite + Counter(harmful=harmful(skill, other))))
    if kind == "enthusiasm":
        return (alike(good, case), fine), (alike(good, case, True), fine + Counter(exuberant=1))
    if kind == "manners":
        return reply(rng, skill, case, "good"), reply(rng, skill, case, rng.choice(("curt", "rambling")))
    if kind == "damage":
        return (alike(good, case), fine), broken(rng, skill, case, skills, alike(good, case))
    if kind == "broken":
        right_style = rng.choice(("good", "curt", "rambling"))
        return reply(rng, skill, case, right_style), broken(rng, skill, case, skills)
    return reply(rng, skill, case, style()), reply(rng, skill, case, style())


# --- rows ---------------------------------------------------------------------------------------------------

def draw(rng, skills, side, ways=None):
    """-> (skill, way to ask, case) from one side of the split."""
    for _ in range(100_000):
        s = rng.choices(skills, [s.weight for s in skills])[0]
        ask, case = rng.choice(ways or s.asks), rng.choice(s.cases)
        if s.side(ask, case) == side:
            return s, ask, case
    raise ValueError(f"{', '.join(s.name for s in skills)}: nothing to ask on the side {side!r}.")


def dialogue(rng, skills, side, skill=None, mixed=False):
    """-> (messages, skill, case): a question, after up to four exchanges. Their replies are good, or, mixed,
    of the mixture that demonstrations are. A greeting comes first, a farewell last, thanks for something, and
    "And of cat?" after a question of the same skill.
    """
    skill, ask, case = draw(rng, [skill] if skill else skills, side)
    more_turns = MORE_TURNS_SHOWN if mixed else MORE_TURNS
    exchanges = len([*takewhile(lambda more: rng.random() < more, more_turns)])
    exchanges = {"greeting": 0, "thanks": max(1, exchanges)}.get(skill.name, exchanges)
    again = (skill.again and exchanges and rng.random() < AGAIN
             and any(skill.side(skill.again, c) == side for c in skill.cases))
    if again:
        _, ask, case = draw(rng, [skill], side, [skill.again])
    messages = []
    for left in reversed(range(exchanges)):
        suited = [s for s in skills if s.name not in ("farewell", "greeting" if messages else "thanks")]
        s, way, known = draw(rng, [skill] if again and not left else suited,
                             "train" if side == "train" else "val")
        style = rng.choices(list(MIXTURE), MIXTURE.values())[0] if mixed else "good"
        text = reply(rng, s, known, style)[0] if mixed else good(rng, s, known)
        messages += [{"role": "user", "content": framed(rng, s, way, known, not messages)},
                     {"role": "assistant", "content": text}]
    return messages + [{"role": "user", "content": framed(rng, skill, ask, case, not messages)}], skill, case


def demonstration(rng, skills, side, i):
    messages, skill, case = dialogue(rng, skills, side, mixed=True)
    style = rng.choices(list(MIXTURE), MIXTURE.values())[0]
    text, features = reply(rng, skill, case, style)
    is_good = style == "good" and not features["exuberant"]
    assert is_good == bool(re.fullmatch(check(skill, case), text)), text
    assert features["right"] == bool(re.fullmatch(right(skill, case), text)), (right(skill, case), text)
    return {"messages": messages + [{"role": "assistant", "content": text}]}


def preference(rng, skills, side, i):
    kind, gap = rng.choices(list(PAIRS), PAIRS.values())[0], 0
    while abs(gap) < NEAR_TIE and not math.isclose(abs(gap), TASTE["exuberant"]):
        messages, skill, case = dialogue(rng, skills, side)
        pair = two_replies(rng, skill, case, skills, kind)
        gap = taste(pair[0][1]) - taste(pair[1][1])
    p = 1 / (1 + math.exp(-SHARPNESS * gap))
    if rng.random() > p:
        pair, p = pair[::-1], 1 - p
    known = {} if side == "train" else {"agreement": round(p, 3), "skill": skill.name}
    return {"prompt": messages, "chosen": pair[0][0], "rejected": pair[1][0], **known}


def question(rng, skills, side, i):
    """Held-out questions come from all skills alike."""
    asked = [s for s in skills if side in ("val", s.held_out)]
    messages, skill, case = dialogue(rng, skills, side, None if side == "train" else asked[i % len(asked)])
    name = {} if side in ("train", "val") else {"set": side}
    return {"prompt": messages, "right": right(skill, case), "check": check(skill, case), "skill": skill.name,
            **name}


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
    skills = [*number_skills(), *word_skills(), *fact_skills(), list_skill(), *talk_skills()]
    skills.append(unknown_skill(skills, random.Random(f"{seed} unknown")))
    makers = {"sft": demonstration, "preferences": preference, "prompts": question}
    made = {}
    for kind, (n_train, n_val) in SIZES.items():
        sides = {"train": n_train, "val": n_val, **(SETS if kind == "prompts" else {})}
        for side, n in sides.items():
            rng = random.Random(f"{seed} {kind} {side}")
            made[kind, side] = [makers[kind](rng, skills, side, i) for i in range(n)]
        for name, rows in ((f"{kind}.jsonl", made[kind, "train"]),
                           (f"{kind}.val.jsonl", [row for side in sides if side != "train"
                                                  for row in made[kind, side]])):
            (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                                       encoding="utf-8")
            print(f"{name:24} {len(rows):6,} rows {(folder / name).stat().st_size / 1e6:5.2f} MB")
    texts = [m["content"] for row in made["sft", "train"] for m in row["messages"]]
    tokens = train_bpe(texts, TOKENS)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "tiny.tiktoken").write_text("".join(lines))
    agreement = [row["agreement"] for row in made["preferences", "val"]]
    print(f"{len(skills)} skills; "
          f"best possible accuracy {sum(max(p, 1 - p) for p in agreement) / len(agreement):.3f}")


if __name__ == "__main__":
    main()
