"""Writes dialogues: the training text of the chat model, and the held-out ones that test it.

A dialogue keeps a book of what the user has told so far (``facts``), so that every answer of the
assistant follows from the conversation: what was told is repeated, the latest value wins, and what
was never told is said to be unknown.  Names, animals and two-word colours are split into a
training part and a held-out part; a seed gives the same dialogue every time.
"""

# ruff: noqa: SIM905 - lists of words are easier to read and to extend as text

from __future__ import annotations

import argparse
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from models.train.frames import (
    ASK,
    ASK_ALL,
    ASK_ANY_ANIMAL,
    CLAUSE,
    CLAUSE_PLURAL,
    CORRECTION,
    NOUN,
    SYSTEM,
    TELL,
    TELL_PLURAL,
    UNKNOWN_NOUN,
)
from models.train.grammar import capital, expand
from models.train.smalltalk import WHO, small_talk
from models.train.words import ANIMALS, CITIES, COLOR_SHADES, COLORS, FOODS, NAMES

Message = dict[str, str]
KINDS = ["name", "color", "animal", "pet", "pet_name", "food", "city", "age"]
KIND_WEIGHTS = [30, 25, 18, 14, 0, 8, 8, 6]
HELD_OUT_ANIMALS = ["seal", "snail", "donkey", "crow", "robin", "pigeon", "lemur"]
NO_PLURAL = set("goose mouse sheep deer salmon moose bison squid reindeer".split())


def is_held_out(value: str) -> bool:
    """Say whether a name, animal or two-word colour is kept for the test (told in no training)."""
    if value in ANIMALS:
        return value in HELD_OUT_ANIMALS
    return zlib.crc32(value.lower().encode()) % 8 == 0


def invented_word(rng: random.Random) -> str:
    """Make up a pronounceable word; the model can only copy it, not know it."""
    starts = "b c d f g h j k l m n p r s t v w z br ch cl dr fr gr kr sh st th tr".split()
    middles = "a e i o u a e i o ai ea ia io".split()
    ends = "n r l s m t k x nd rt lla ro na th ck y".split()
    count = rng.choice([1, 2, 2, 2, 3])
    word = "".join(rng.choice(starts) + rng.choice(middles) for _ in range(count))
    return word + (rng.choice(ends) if count == 1 or rng.random() < 0.5 else "")


def pick_value(rng: random.Random, kind: str, held_out: bool = False) -> str:
    """Choose a value for a kind of fact, from the training part or from the held-out part."""
    for _ in range(10_000):
        if kind in ("name", "pet_name"):
            draw = rng.random()
            value = rng.choice(NAMES) if draw < 0.45 else capital(invented_word(rng))
            if draw > 0.96:
                value += rng.choice([" ", "-"]) + rng.choice(NAMES)
        elif kind == "color":
            value = rng.choice(COLORS)
            if rng.random() < 0.3:
                value = f"{rng.choice(COLOR_SHADES)} {value}"
            elif held_out:
                return value  # one-word colours are few: they are known, their mixtures are not
        elif kind in ("animal", "pet"):
            value = rng.choice(ANIMALS) if rng.random() < 0.7 else invented_word(rng)
        elif kind == "food":
            return rng.choice(FOODS) if rng.random() < 0.85 else invented_word(rng)
        elif kind == "city":
            return rng.choice(CITIES) if rng.random() < 0.75 else capital(invented_word(rng))
        else:
            return str(rng.randint(3, 99))
        if is_held_out(value) == held_out or (kind == "color" and " " not in value):
            return value
    raise RuntimeError(f"no value for {kind}")


@dataclass
class Dialogue:
    """A conversation in the making: its messages, its facts and how its user writes."""

    rng: random.Random
    held_out: bool = False
    messages: list[Message] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    clauses: dict[str, str] = field(default_factory=dict)
    lower: bool = False
    bare: bool = False
    american: bool = False

    def __post_init__(self) -> None:
        """Draw the user's way of writing."""
        self.lower = self.rng.random() < 0.15
        self.bare = self.rng.random() < 0.2
        self.american = self.rng.random() < 0.4

    def add(self, user: str, assistant: str) -> None:
        """Append one exchange, the user's words in the user's way of writing."""
        if self.american:
            user = user.replace("olour", "olor").replace("avourite", "avorite")
        if self.lower:
            user = user.lower()
        if self.bare:
            user = user.rstrip(".!?")
        self.messages.append({"role": "user", "content": user})
        self.messages.append({"role": "assistant", "content": assistant})

    def system(self) -> None:
        """Perhaps begin with a system prompt."""
        if self.rng.random() < 0.5:
            text = expand(self.rng, self.rng.choice(SYSTEM), {})
            self.messages.insert(0, {"role": "system", "content": text})

    def learn(self, kind: str) -> str:
        """Choose a new value of a kind, note it, and return the user's sentence that tells it."""
        rng = self.rng
        value = pick_value(rng, kind, self.held_out)
        while value == self.facts.get(kind):
            value = pick_value(rng, kind, self.held_out)
        if self.lower:
            value = value.lower()
        regular = value[-1] not in "sxyhf" and value not in NO_PLURAL
        plural = kind == "animal" and regular and rng.random() < 0.15
        slots = {"v": value, "V": capital(value)}
        if kind == "pet" and rng.random() < 0.25:
            slots["n"] = pick_value(rng, "pet_name", self.held_out)
            if self.lower:
                slots["n"] = slots["n"].lower()
            self.facts["pet_name"] = slots["n"]
            self.clauses["pet_name"] = f"your {value} is called {slots['n']}"
            text = expand(rng, rng.choice(TELL["pet_name"]), slots)
        else:
            if kind == "pet":
                self.facts.pop("pet_name", None)
                self.clauses.pop("pet_name", None)
            text = expand(rng, rng.choice(TELL_PLURAL if plural else TELL[kind]), slots)
        self.facts[kind] = value
        clause = CLAUSE_PLURAL if plural else CLAUSE[kind]
        self.clauses[kind] = expand(rng, clause, slots)
        return text

    def acknowledge(self, kinds: list[str]) -> str:
        """Return the assistant's answer to news."""
        rng = self.rng
        listed = [self.clauses[kind] for kind in kinds]
        if kinds == ["pet"] and "pet_name" in self.clauses:
            listed.append(self.clauses["pet_name"])
        if kinds[0] == "name" and rng.random() < 0.8:
            hello = expand(
                rng, "[Nice to meet you|Hello|Nice to meet you], {v}!", {"v": self.facts["name"]}
            )
            if len(listed) == 1:
                return hello
            return f"{hello} I will remember that {join(listed[1:])}."
        frame = rng.choice(
            ["I will remember that {}.", "Good to know: {}.", "Thank you for telling me. So {}."]
        )
        return frame.format(join(listed))

    def tell(self, kinds: list[str]) -> None:
        """Let the user tell one or several facts in one message (again: a correction)."""
        rng = self.rng
        old = self.facts.get(kinds[0])
        if len(kinds) == 1 and old is not None:
            text = self.learn(kinds[0])
            if rng.random() < 0.2:
                text = f"{text.rstrip('.!')}, not {old}."
            if not text.startswith(("I ", "I'm ", "I'v", self.facts[kinds[0]])):
                text = text[0].lower() + text[1:]
            self.add(
                rng.choice(CORRECTION).format(text),
                f"Thank you, I will remember that {self.clauses[kinds[0]]}.",
            )
            return
        texts = [capital(self.learn(kind)) for kind in kinds]
        text = texts[0]
        for more in texts[1:]:
            if rng.random() < 0.5 and text.endswith("."):
                keep = (
                    more.startswith(("I ", "I'm", "I'v")) or more.split()[0] in self.facts.values()
                )
                text = f"{text[:-1]} and {more if keep else more[0].lower() + more[1:]}"
            else:
                text = f"{text} {more}"
        answer = self.acknowledge(kinds)
        if rng.random() < 0.15:
            text = (
                rng.choice(
                    [
                        "Hello! ",
                        "Hi, ",
                        "Hello, ",
                        "Hey! ",
                        "Hi! ",
                        "By the way, ",
                        "You should know: ",
                    ]
                )
                + text
            )
        elif rng.random() < 0.08:
            text += rng.choice(
                [" Who are you?", " And you?", " What are you?", " And who are you?"]
            )
            answer += " " + WHO
        self.add(text, answer)

    def prompted_tell(self) -> None:
        """Let the assistant ask for the name first."""
        self.add(
            self.rng.choice(["Hello!", "Hi.", "Good morning.", "Hello there!"]),
            "Hello! What is your name?",
        )
        text = capital(self.learn("name"))
        if self.rng.random() < 0.4:
            text = self.facts["name"] + self.rng.choice([".", "", "!"])
        self.add(text, self.acknowledge(["name"]))

    def answer(self, kinds: list[str]) -> str:
        """Return what is known about the asked kinds, and say what is not."""
        known = [self.clauses[kind] for kind in kinds if kind in self.clauses]
        unknown = [UNKNOWN_NOUN[kind] for kind in kinds if kind not in self.clauses]
        sentences = [f"{capital(join(known))}."] if known else []
        if unknown:
            sentences.append(f"You have not told me {join(unknown, 'or')} yet.")
        return " ".join(sentences)

    def ask(self, kinds: list[str]) -> None:
        """Let the user ask for one or several facts."""
        rng = self.rng
        slots = {"pet": self.facts.get("pet", "pet")}
        if len(kinds) == 1:
            text = expand(rng, rng.choice(ASK[kinds[0]]), slots)
        elif rng.random() < 0.3:
            parts = [expand(rng, rng.choice(ASK[kind]), slots) for kind in kinds]
            text = " ".join(parts)
        else:
            nouns = join([NOUN[kind] for kind in kinds])
            text = expand(
                rng,
                "[What is|What are|What's|Tell me|Please tell me|Can you tell me|Do you know|Do you "
                "remember|Do you still know|Remind me, what is|So what is|What was] {nouns}",
                {"nouns": nouns},
            )
            text += "." if text.startswith(("Tell", "Please")) else "?"
        if rng.random() < 0.06:
            text = rng.choice(["Hello! ", "Thanks. ", "OK. ", "Hi, ", "Now, ", "And "]) + text
        self.add(text, self.answer(kinds))

    def ask_any_animal(self) -> None:
        """Let the user ask for an animal without saying whether favourite or pet."""
        known = [self.clauses[kind] for kind in ("animal", "pet") if kind in self.clauses]
        told = f"{capital(join(known))}." if known else "You have not told me about an animal yet."
        self.add(expand(self.rng, ASK_ANY_ANIMAL, {}), told)

    def ask_all(self) -> None:
        """Let the user ask for everything that was told."""
        known = [f"{capital(self.clauses[kind])}." for kind in KINDS if kind in self.clauses]
        answer = " ".join(known) or "You have not told me anything about yourself yet."
        self.add(expand(self.rng, ASK_ALL, {}), answer)

    def talk(self) -> None:
        """Add an unrelated exchange."""
        self.add(*small_talk(self.rng))

    def some_kinds(self, count: int) -> list[str]:
        """Choose different kinds of facts."""
        chosen: list[str] = []
        while len(chosen) < count:
            kind = self.rng.choices(KINDS, KIND_WEIGHTS)[0]
            if kind not in chosen:
                chosen.append(kind)
        return chosen

    def random_tell(self) -> None:
        """Tell one to three facts, now and then correcting one."""
        rng = self.rng
        if "name" not in self.facts and rng.random() < 0.05:
            self.prompted_tell()
        elif self.facts and rng.random() < 0.25:
            self.tell([rng.choice([kind for kind in self.facts if kind != "pet_name"])])
        else:
            fresh = [
                k for k in self.some_kinds(rng.choice([1, 1, 1, 2, 2, 3])) if k not in self.facts
            ]
            if fresh:
                self.tell(fresh)

    def random_ask(self) -> None:
        """Ask for something, told or not."""
        rng = self.rng
        draw = rng.random()
        if draw < 0.09:
            self.ask_all()
        elif draw < 0.13:
            self.ask_any_animal()
        elif draw < 0.16:
            self.ask(["pet_name"])
        else:
            count = rng.choice([1, 1, 1, 2, 2, 2, 2, 3])
            kinds = self.some_kinds(count)
            if self.facts and rng.random() < 0.7:
                told = [kind for kind in self.facts if kind != "pet_name"]
                rng.shuffle(told)
                kinds = list(dict.fromkeys([*told[:count], *kinds]))[:count]
                rng.shuffle(kinds)
            self.ask(kinds)


def join(parts: list[str], word: str = "and") -> str:
    """Join parts as in "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"


def write_dialogue(seed: int) -> list[Message]:
    """Write the training dialogue that belongs to ``seed``."""
    rng = random.Random(f"dialogue-{seed}")
    dialogue = Dialogue(rng)
    length = rng.choice([1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8])
    if rng.random() < 0.02:
        length = rng.randint(12, 24)
    if rng.random() < 0.6:  # first tell, then talk, then ask
        for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3])):
            dialogue.random_tell()
        for _ in range(rng.choice([0, 1, 1, 2, 2, 3])):
            dialogue.talk()
        for _ in range(rng.choice([1, 1, 2, 2, 3])):
            dialogue.random_ask()
    else:  # anything in any order
        for _ in range(length):
            rng.choice(
                [dialogue.random_tell, dialogue.random_ask, dialogue.random_ask, dialogue.talk]
            )()
    if not dialogue.messages:
        dialogue.talk()
    dialogue.system()
    return dialogue.messages


def dialogues(seed: int, count: int) -> Iterator[list[Message]]:
    """Write ``count`` dialogues, numbered from ``seed`` million on."""
    for number in range(count):
        yield write_dialogue(seed * 1_000_000 + number)


def held_out(seed: int) -> Dialogue:
    """Begin a dialogue of the test: own seeds, and values that training never saw."""
    return Dialogue(random.Random(f"held-out-{seed}"), held_out=True)


def main() -> None:
    """Print a few dialogues."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=10)
    options = parser.parse_args()
    for messages in dialogues(options.seed, options.count):
        for message in messages:
            print(f"{message['role']:>9}: {message['content']}")
        print()


if __name__ == "__main__":
    main()
