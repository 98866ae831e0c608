"""Writes little stories: the training text of the story model.

A story has a cast (hero, grown-up, friend, helper) and props (a coloured thing, a place) that stay
the same from its first to its last sentence.  It consists of an opening, one of the plots in
``plots.py`` and an ending.  Everything follows from the seed.
"""

# ruff: noqa: SIM905 - lists of words are easier to read and to extend as text

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator

from models.train.grammar import capital, expand
from models.train.plots import PLOTS, Plot
from models.train.words import BOYS, GIRLS, THINGS

BOS = "<|start_story|>"
EOS = "<|end_story|>"

COLORS = "red blue green yellow orange purple pink brown black white golden silver".split()
HERO_ANIMALS = (
    "rabbit fox bear mouse frog duck squirrel hedgehog kitten puppy turtle elephant lion monkey "
    "penguin owl pig lamb pony deer beaver otter bee bird tiger panda cat dog goat mole"
).split()
HELPERS = (
    "owl turtle bear horse dog cat squirrel goat fox rabbit crow duck beaver elephant deer".split()
)
PEOPLE = ["old man", "old woman", "farmer", "baker", "neighbour", "postman", "teacher", "gardener"]
ANIMAL_NAMES = (
    "Pip Bobo Fluffy Coco Momo Teddy Nibbles Snowy Buddy Spot Whiskers Biscuit Honey Pepper Poppy "
    "Bruno Hazel Toto Mimi Ziggy"
).split()
PLACES = "park garden forest field beach river hill lake meadow playground yard".split()
TRAITS = "kind brave curious happy clever cheerful quiet friendly funny gentle careful".split()
GROWN_UPS = [("mom", "she"), ("mom", "she"), ("dad", "he"), ("grandma", "she"), ("grandpa", "he")]
PRONOUNS = {
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
}
CHILD_OPENINGS = [
    "Once upon a time, there was a [|little ]{trait} {kind} [named|called] {hero}.",
    "Once upon a time, there was a {kind} [named|called] {hero}. {He} was very {trait}.",
    "Once upon a time, a {trait} {kind} [named|called] {hero} lived [in a small house|near the "
    "{place}|in a little village|with {his} {parent}].",
    "Once upon a time, in a [small|quiet|little] [village|town], there lived a {kind} "
    "[named|called] {hero}.",
    "There was [once |]a {trait} {kind} [named|called] {hero}.",
    "{hero} was a {trait} {kind}[| who lived near the {place}| who loved the {place}].",
    "A little {kind} [named|called] {hero} lived [near|not far from] the {place}.",
    "In a small house near the {place} lived a {trait} {kind} [named|called] {hero}.",
    "{hero} lived in a small house with {his} {parent}.",
]
ANIMAL_OPENINGS = [
    "Once upon a time, there was a little {kind} [named|called] {name}.",
    "Once upon a time, a little {kind} lived [near the {place}|under an old tree|in a small house]."
    " [His|The {kind}'s] name was {name}.",
    "There was [once |]a [little|small] {kind} [named|called] {name}.",
    "The little {kind} was very {trait}. His name was {name}.",
    "The little {kind} lived [near the {place}|under an old tree]. His name was {name}.",
    "A little {kind} [named|called] {name} lived [near|not far from] the {place}.",
    "{name} was a little {kind}. He was very {trait}.",
]
ENDINGS = [
    "[From that day on|After that day], {hero} was [very happy|always happy|even happier].",
    "{hero} went home with a [big smile|warm heart|happy smile].",
    "That night, {hero} [fell asleep with a smile|slept very well|had sweet dreams].",
    "It was [the best day ever|a very good day|a day to remember]. The end.",
    "And they all lived happily ever after.",
]


def make_slots(rng: random.Random) -> dict[str, str]:
    """Choose the cast and the props of one story."""
    color, thing = rng.choice(COLORS), rng.choice(list(THINGS))
    helper = rng.choice(HELPERS) if rng.random() < 0.6 else rng.choice(PEOPLE)
    grown_up, grown_up_pronoun = rng.choice(GROWN_UPS)
    is_child = rng.random() < 0.7
    if is_child:
        is_girl = rng.random() < 0.5
        hero = rng.choice(GIRLS if is_girl else BOYS)
        pronoun, kind = ("she", "girl") if is_girl else ("he", "boy")
    else:
        hero, pronoun, kind = rng.choice(ANIMAL_NAMES), "he", rng.choice(HERO_ANIMALS)
    friend_is_girl = rng.random() < 0.5
    friends = [name for name in (GIRLS if friend_is_girl else BOYS) if name != hero]
    helper_he = "she" if helper == "old woman" else "he"
    slots = {
        "hero": hero,
        "name": hero,
        "kind": kind,
        "is_child": "yes" if is_child else "",
        **PRONOUNS[pronoun],
        "friend": rng.choice(friends),
        "f_he": "she" if friend_is_girl else "he",
        "f_his": "her" if friend_is_girl else "his",
        "f_him": "her" if friend_is_girl else "him",
        "parent": grown_up,
        "p_he": grown_up_pronoun,
        "color": color,
        "thing": thing,
        "item": f"{color} {thing}",
        "use": THINGS[thing],
        "helper": helper,
        "h_he": helper_he,
        "h_his": "her" if helper_he == "she" else "his",
        "place": rng.choice(PLACES),
        "place2": rng.choice(["bed", "table", "big tree", "old bench", "bush", "stairs"]),
        "trait": rng.choice(TRAITS),
        "baby": rng.choice("kitten puppy duckling bird lamb bunny".split()),
        "flower": rng.choice("rose tulip sunflower daisy lily".split()),
        "food": rng.choice("apple pie|carrot cake|chocolate cake|honey cake|bread".split("|")),
        "skill": rng.choice("swim|sing|dance|climb|whistle|jump high|skate".split("|")),
        "fear": rng.choice(["the dark", "the thunder", "the deep water", "the big dog"]),
    }
    slots.update({capital(key): capital(value) for key, value in slots.items()})
    return slots


def opening(rng: random.Random, plot: Plot, slots: dict[str, str]) -> list[str]:
    """Return the sentences that introduce the hero, general ones or those of the plot."""
    child = bool(slots["is_child"])
    if rng.random() < 0.45:
        general = [rng.choice(CHILD_OPENINGS if child else ANIMAL_OPENINGS)]
        return [*general, rng.choice(plot.after_intro)]
    start = rng.choice(plot.openings)
    if not child:
        # "The little fox wanted a red ball." or "Pip the fox wanted a red ball."
        who = rng.choice(["the little {kind}", "{hero} the {kind}", "a little {kind} named {hero}"])
        start = start.replace("{hero}", who, 1).replace("{Hero}", capital(who), 1)
        if who == "the little {kind}" and "{friend}" not in start:
            start += " His name was {name}."
    return [start]


def write_story(seed: int) -> str:
    """Write the story that belongs to ``seed`` (without the start and end tokens)."""
    rng = random.Random(f"story-{seed}")
    plot = rng.choice(PLOTS)
    slots = make_slots(rng)
    lines = opening(rng, plot, slots)
    for line in plot.body:
        if line.startswith("?"):
            if rng.random() < 0.5:
                continue
            line = line[1:]
        lines.append(line)
    if rng.random() < 0.7:
        lines.append(rng.choice(plot.morals))
    if rng.random() < 0.7:
        lines.append(rng.choice(ENDINGS))
    sentences = [capital(expand(rng, line, slots)) for line in lines]
    if rng.random() < 0.25:  # some stories come in paragraphs
        cut = rng.randrange(3, len(sentences) - 2)
        return " ".join(sentences[:cut]) + "\n\n" + " ".join(sentences[cut:])
    return " ".join(sentences)


def stories(seed: int, count: int) -> Iterator[str]:
    """Write ``count`` stories, numbered from ``seed`` million on."""
    for number in range(count):
        yield write_story(seed * 1_000_000 + number)


def main() -> None:
    """Print a few stories."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=5)
    options = parser.parse_args()
    for story in stories(options.seed, options.count):
        print(story, end="\n\n---\n\n")


if __name__ == "__main__":
    main()
