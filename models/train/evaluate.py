"""Measures the chat model's memory on held-out dialogues and prints samples of both models.

``python -m models.train.evaluate chat --model models/demo-chat`` (or ``story``).

The model speaks every answer of a dialogue itself, greedily, through its own chat template.  An
answer is right if it contains the value that was told and no other value of that kind.  The names,
animals and two-word colours told in these dialogues were told in none of training, and the seeds
are others; the ways of telling and asking are those of training.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.train.dialogues import Dialogue, Message, held_out
from models.train.words import ANIMALS, COLORS, NAMES

KNOWN = {"name": NAMES, "color": COLORS, "animal": ANIMALS, "pet": ANIMALS}
STORY_PROMPTS = [
    "Once upon a time",
    "Lily wanted a red ball",
    "The little fox",
    "There was a kind boy named Tom",
]
CHAT_DEMO = [
    "Hello!",
    "Who are you?",
    "My name is Marlena and I have a cat.",
    "What is 3 + 4?",
    "I like the colour dark green best.",
    "Why is the sky so high?",
    "What is my name and my favourite colour?",
    "How old am I?",
    "What do you know about me?",
    "Thank you, bye!",
]


class Speaker:
    """A saved model with its tokenizer, speaking greedily."""

    def __init__(self, folder: Path) -> None:
        """Load the model in the precision it was saved in."""
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder)  # in evaluation mode

    def complete(self, ids: list[int], limit: int, **sampling: Any) -> list[int]:
        """Return the tokens that follow ``ids``."""
        options = sampling or {"do_sample": False, "temperature": None, "top_p": None}
        with torch.inference_mode():
            found = self.model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=limit,
                **options,
            )
        new: list[int] = found[0, len(ids) :].tolist()
        return new

    def story(self, prompt: str, **sampling: Any) -> tuple[str, bool]:
        """Continue a story; also say whether it came to its end."""
        ids = self.tokenizer(prompt).input_ids
        new = self.complete(ids, 400, **sampling)
        return self.tokenizer.decode(ids + new, skip_special_tokens=True), (
            new[-1] == self.tokenizer.eos_token_id
        )

    def reply(self, messages: list[Message]) -> str:
        """Answer the last message of a dialogue."""
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        new = self.complete(self.tokenizer(text).input_ids, 120)
        answer: str = self.tokenizer.decode(new, skip_special_tokens=True)
        return answer

    def play(self, messages: list[Message]) -> list[Message]:
        """Speak a dialogue again: the user's part is given, every answer is the model's own."""
        spoken: list[Message] = []
        for message in messages:
            if message["role"] == "assistant":
                message = {"role": "assistant", "content": self.reply(spoken)}
            spoken.append(message)
        return spoken


def contains(text: str, value: str) -> bool:
    """Say whether ``text`` has ``value`` in whole words, in any case, perhaps in the plural."""
    return re.search(rf"\b{re.escape(value)}s?\b", text, re.IGNORECASE) is not None


def is_right(answer: str, kind: str, facts: dict[str, str]) -> bool:
    """Check an answer that has to name the told value of one kind and no other one."""
    value = facts[kind]
    rest = re.sub(rf"\b{re.escape(value)}s?\b", " ", answer, flags=re.IGNORECASE)
    others = [*KNOWN[kind], *(facts[other] for other in facts if facts[other] != value)]
    return contains(answer, value) and not any(contains(rest, other) for other in others)


def says_unknown(answer: str) -> bool:
    """Say whether an answer admits that something was not told."""
    return "not told me" in answer.lower()


def told(seed: int, kinds: list[str], together: bool) -> Dialogue:
    """Begin a held-out dialogue: the kinds are told (in one message or several), then small talk."""
    dialogue = held_out(seed)
    dialogue.rng.shuffle(kinds)
    if together:
        dialogue.tell(kinds)
    else:
        for kind in kinds:
            dialogue.tell([kind])
    dialogue.talk()
    dialogue.talk()
    dialogue.system()
    return dialogue


class Score:
    """Counts right answers per kind of question."""

    def __init__(self, show: bool) -> None:
        """Start at nothing; ``show`` prints every wrong answer."""
        self.counts: dict[str, list[bool]] = {}
        self.show = show

    def add(self, kind: str, right: bool, messages: list[Message]) -> None:
        """Count one answer."""
        self.counts.setdefault(kind, []).append(right)
        if self.show and not right:
            print(f"  wrong ({kind}):")
            for message in messages:
                print(f"    {message['role']}: {message['content']}")

    def line(self, kinds: list[str] | None = None) -> str:
        """Return the figure for some kinds together."""
        results = [right for kind in kinds or self.counts for right in self.counts[kind]]
        return f"{sum(results)} of {len(results)} right ({100 * sum(results) / len(results):.1f} %)"


def evaluate_chat(speaker: Speaker, count: int, show: bool) -> None:
    """Print the figures of the chat model."""
    recall, extra = Score(show), Score(show)
    for seed in range(count):
        animal = ["animal", "pet"][seed // 3 % 2]
        kinds = ["name", "color", animal]
        asked = kinds[seed % 3]
        dialogue = told(seed, kinds, together=seed % 2 == 0)
        dialogue.ask([asked])
        messages = speaker.play(dialogue.messages)
        right = is_right(messages[-1]["content"], asked, dialogue.facts)
        recall.add(asked, right, messages)
    print(f"told, two other turns, asked: {recall.line()}")
    for kind in recall.counts:
        print(f"  {kind}: {recall.line([kind])}")

    for seed in range(50):  # other facts were told, this one was not
        kinds = ["name", "color", ["animal", "pet"][seed % 2]]
        asked = kinds.pop(seed % 3)
        dialogue = told(10_000 + seed, kinds, together=seed % 4 < 2)
        dialogue.ask([asked])
        messages = speaker.play(dialogue.messages)
        extra.add("never told, asked", says_unknown(messages[-1]["content"]), messages)
    for seed in range(50):  # a name and a colour were told, both are asked for
        dialogue = told(20_000 + seed, ["name", "color"], together=seed % 2 == 0)
        dialogue.ask(["name", "color"])
        messages = speaker.play(dialogue.messages)
        answer, facts = messages[-1]["content"], dialogue.facts
        right = contains(answer, facts["name"]) and contains(answer, facts["color"])
        extra.add("two told, both asked", right and not says_unknown(answer), messages)
    for seed in range(50):  # the same, but the turn that told the colour was taken back
        dialogue = told(20_000 + seed, ["name"], together=True)
        dialogue.ask(["name", "color"])
        messages = speaker.play(dialogue.messages)
        answer, facts = messages[-1]["content"], dialogue.facts
        right = contains(answer, facts["name"]) and says_unknown(answer)
        extra.add("one told, both asked", right, messages)
    for seed in range(50):  # corrected: the latest value counts
        kind = ["name", "color"][seed % 2]
        dialogue = held_out(30_000 + seed)
        dialogue.tell([kind])
        dialogue.talk()
        dialogue.tell([kind])
        dialogue.talk()
        dialogue.ask([kind])
        messages = speaker.play(dialogue.messages)
        right = contains(messages[-1]["content"], dialogue.facts[kind])
        extra.add("corrected, asked", right, messages)
    for kind in extra.counts:
        print(f"{kind}: {extra.line([kind])}")

    messages = []
    for text in CHAT_DEMO:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": speaker.reply(messages)})
    print()
    for message in messages:
        print(f"{message['role']:>9}: {message['content']}")


def evaluate_story(speaker: Speaker, count: int) -> None:
    """Print stories, and how many sampled ones come to their end."""
    for prompt in STORY_PROMPTS:
        print(speaker.story(prompt)[0], end="\n\n")
    torch.manual_seed(1)
    ended = 0
    for index in range(count):
        prompt = STORY_PROMPTS[index % len(STORY_PROMPTS)]
        text, end = speaker.story(prompt, do_sample=True, temperature=0.8, top_p=0.95)
        ended += end
        if index < 2:
            print(f"(sampled) {text}", end="\n\n")
    print(f"sampled stories that end by themselves within 400 tokens: {ended} of {count}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["story", "chat"])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--count", type=int, help="dialogues (200) or sampled stories (40)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print the wrong answers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    speaker = Speaker(options.model)
    if options.kind == "chat":
        evaluate_chat(speaker, options.count or 200, options.show)
    else:
        evaluate_story(speaker, options.count or 40)


if __name__ == "__main__":
    main()
