"""Trains a demo model on generated text, within a given time, on the CPU.

``python -m models.train.train story --out models/demo-story --minutes 55`` (or ``chat``).

Text is generated as training goes on, so nothing is seen twice.  The learning rate falls with the
time used up, so that the training always ends annealed; checkpoints are complete models.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from models.train.dialogues import dialogues, pick_value
from models.train.stories import ANIMAL_NAMES, COLORS, stories
from models.train.tokenizer import (
    CHAT,
    STORY,
    Special,
    chat_segments,
    token_id,
    train_tokenizer,
    write_json,
    write_tokenizer,
)
from models.train.words import BOYS, GIRLS, THINGS

CONTEXT = 1024
CHUNK = 1500  # documents generated at a time
TOKENS_PER_STEP = 2048
DRILL_FILLERS = {
    "story": [" a", " the", " my", " that", " his", ". The", " and the", "! It was the"],
    "chat": [",", ".", " and", " is", "!", " name is", " called", ""],
}
WORD_WEIGHT = 3.0
DRILL_ROWS, DRILL_LENGTH = 20, 80
GENERATION = {
    "story": {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
    "chat": {"do_sample": True, "temperature": 0.3, "top_p": 0.9},
}

Document = tuple[list[int], list[bool]]  # tokens, and which of them are to be learned
Batch = tuple[torch.Tensor, torch.Tensor]


def texts(kind: str, seed: int, count: int) -> Iterator[str]:
    """Generate plain texts, for the tokenizer."""
    if kind == "story":
        yield from stories(seed, count)
        return
    for messages in dialogues(seed, count):
        yield from (message["content"] for message in messages)


def documents(kind: str, tokenizer: Tokenizer, seed: int, count: int) -> Iterator[Document]:
    """Generate tokenized documents."""
    if kind == "story":
        end = token_id(tokenizer, STORY.eos)
        for story in stories(seed, count):
            tokens = [*tokenizer.encode(story).ids, end]
            yield tokens, [True] * len(tokens)
        return
    for messages in dialogues(seed, count):
        tokens, learned = [], []
        for text, spoken in chat_segments(messages):
            piece = tokenizer.encode(text).ids
            tokens += piece
            learned += [spoken] * len(piece)
        yield tokens[:CONTEXT], learned[:CONTEXT]


def pack(parts: list[Document]) -> list[Document]:
    """Join documents to rows as long as the context."""
    tokens = [token for part in parts for token in part[0]]
    learned = [flag for part in parts for flag in part[1]]
    starts = range(0, len(tokens) - CONTEXT, CONTEXT)
    return [(tokens[i : i + CONTEXT], learned[i : i + CONTEXT]) for i in starts]


def batches(kind: str, tokenizer: Tokenizer, pad: int, seed: int) -> Iterator[Batch]:
    """Generate batches without end: rows of similar length, inputs and targets (-100: ignore)."""
    rng = random.Random(seed)
    chunk = 0
    while True:
        chunk += 1
        rows = list(documents(kind, tokenizer, seed * 10_000 + chunk, CHUNK))
        if kind == "story":  # some long rows, so that every position of the context is trained
            rows = [*pack(rows[: CHUNK // 8]), *rows[CHUNK // 8 :]]
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[Document]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row[0]) > TOKENS_PER_STEP:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(tokens) for tokens, _ in group)
            inputs = torch.full((len(group), longest), pad)
            targets = torch.full((len(group), longest), -100)
            for index, (tokens, learned) in enumerate(group):
                row_tokens = torch.tensor(tokens)
                inputs[index, : len(tokens)] = row_tokens
                targets[index, : len(tokens)] = row_tokens.where(torch.tensor(learned), -100)
            yield inputs[:, :-1], targets[:, 1:]


def drill_words(kind: str, rng: random.Random) -> list[str]:
    """Choose what one row of a drill repeats: the things of a story, or values told in a chat."""
    if kind == "story":
        count = rng.choice([1, 1, 1, 2, 3])
        return [f"{rng.choice(COLORS)} {rng.choice(list(THINGS))}" for _ in range(count)]
    return [pick_value(rng, rng.choice(["name", "animal"])) for _ in range(rng.randint(1, 6))]


def copy_drill(kind: str, rng: random.Random, tokenizer: Tokenizer) -> Batch:
    """Make a batch of rows in which a few words come again and again.

    Nothing in it can be known, only copied; what is learned is how a word goes on that was there
    before.  It teaches a small model early to look back.
    """
    rows, marks = [], []
    for _ in range(DRILL_ROWS):
        phrases = [
            tokenizer.encode(f" {word}", add_special_tokens=False).ids
            for word in drill_words(kind, rng)
        ]
        row: list[int] = []
        mark: list[int] = []
        seen: set[int] = set()
        while len(row) < DRILL_LENGTH:
            index = rng.randrange(len(phrases))
            between = rng.choice(DRILL_FILLERS[kind])
            filler = tokenizer.encode(between, add_special_tokens=False).ids
            phrase = phrases[index]
            row += filler + phrase
            first = phrase[0] if len(phrases) == 1 and seen else -100
            rest = phrase[1:] if index in seen else [-100] * (len(phrase) - 1)
            mark += [-100] * len(filler) + [first, *rest]
            seen.add(index)
        rows.append(row[:DRILL_LENGTH])
        marks.append(mark[:DRILL_LENGTH])
    return torch.tensor(rows)[:, :-1], torch.tensor(marks)[:, 1:]


def build_model(vocabulary: int, special: Special, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Make the untrained model."""
    eos, pad = token_id(tokenizer, special.eos), token_id(tokenizer, special.pad)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=pad if special.bos is None else token_id(tokenizer, special.bos),
        eos_token_id=eos,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    seed_lookback(model)
    return model


def seed_lookback(model: LlamaForCausalLM) -> None:
    """Set two heads of the first layer up to look one and two tokens back.

    Copying a word of several tokens needs a head that knows which token came before.  A small
    model finds such a head only after a long time, so it is given one as a start; all its weights
    are trained on like the others.  One component of every embedding becomes a constant, from
    which keys and queries are made whose rotary positions agree best at the wanted distance.
    """
    config = model.config
    layer = model.model.layers[0]
    size = config.hidden_size // config.num_attention_heads
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    shared = config.num_attention_heads // kv_heads
    group = kv_heads - 1
    pairs, strength = 6, 51.0
    rates = 10000.0 ** (-torch.arange(pairs) / (size // 2))
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        scale = embedding.std()
        embedding[:, 0] = 3 * scale
        constant = 3 * layer.input_layernorm.weight[0] / (1 + 9 / config.hidden_size) ** 0.5
        amount = strength**0.5 / constant
        keys = slice(group * size, (group + 1) * size)
        attention = layer.self_attn
        attention.k_proj.weight[keys] = 0
        attention.k_proj.weight[keys][:pairs, 0] = amount
        attention.v_proj.weight[keys].normal_(std=config.hidden_size**-0.5)
        for back in range(1, shared + 1):
            head = group * shared + back - 1
            rows = slice(head * size, (head + 1) * size)
            queries = attention.q_proj.weight[rows]
            queries.zero_()
            queries[:pairs, 0] = amount * torch.cos(-back * rates)
            queries[size // 2 : size // 2 + pairs, 0] = amount * torch.sin(-back * rates)
            attention.o_proj.weight[:, rows].normal_(std=float(scale) * size**-0.5)


def save(model: LlamaForCausalLM, kind: str, folder: Path) -> None:
    """Write the model in bfloat16; a reader never sees half a file."""
    scratch = folder / ".writing"
    small: Any = copy.deepcopy(model)
    small.to(torch.bfloat16).save_pretrained(scratch)
    config = json.loads((scratch / "config.json").read_text(encoding="utf-8"))
    # The names that readers of older configurations look for, next to the present ones.
    config |= {"torch_dtype": "bfloat16", "rope_theta": 10000.0}
    write_json(scratch / "config.json", config)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        **GENERATION[kind],
    }
    write_json(scratch / "generation_config.json", generation)
    for path in scratch.iterdir():
        path.replace(folder / path.name)
    scratch.rmdir()


def token_weights(kind: str, tokenizer: Tokenizer) -> torch.Tensor:
    """Return how much each token counts: names and colours of a story are easily mixed up."""
    weights = torch.ones(tokenizer.get_vocab_size())
    if kind == "story":
        for word in [*COLORS, *GIRLS, *BOYS, *ANIMAL_NAMES]:
            weights[tokenizer.encode(f" {word}", add_special_tokens=False).ids] = WORD_WEIGHT
    return weights


def loss_of(model: LlamaForCausalLM, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over the tokens that are to be learned."""
    inputs, targets = batch
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    learned = targets != -100
    loss: torch.Tensor = functional.cross_entropy(
        model.lm_head(hidden[learned]), targets[learned], weight=weights
    )
    return loss


def train(
    kind: str, folder: Path, minutes: float, seed: int, peak: float, drills: float, resume: bool
) -> None:
    """Train tokenizer and model of one kind and leave them in ``folder``.

    With ``resume`` the model in the folder is trained on, with the text of another seed.
    """
    torch.manual_seed(seed)
    special = STORY if kind == "story" else CHAT
    if resume:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    else:
        tokenizer = train_tokenizer(texts(kind, seed, 8_000), special)
        write_tokenizer(tokenizer, special, folder, CONTEXT)
        model = build_model(tokenizer.get_vocab_size(), special, tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{kind}: {parameters} parameters", flush=True)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    other = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
    )
    start = saved = time.monotonic()
    seen, smooth, drilled = 0, 0.0, 0.0
    pad = token_id(tokenizer, special.pad)
    rng = random.Random(seed)
    weights = token_weights(kind, tokenizer)
    for step, batch in enumerate(batches(kind, tokenizer, pad, seed), start=1):
        used = (time.monotonic() - start) / (60 * minutes)
        if used >= 1:
            break
        drill = used < drills and step % 2 == 0
        if drill:
            batch = copy_drill(kind, rng, tokenizer)
        rate = peak * min(1.0, step / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * used)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, batch, weights)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += batch[0].numel()
        if drill:
            drilled = loss.item()
        else:
            smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        if step % 20 == 0:
            speed = seen / (time.monotonic() - start)
            print(
                f"step {step}: loss {smooth:.4f} (drill {drilled:.3f}), {seen} tokens, {speed:.0f} tokens/s, "
                f"{100 * used:.1f} % of the time",
                flush=True,
            )
        if time.monotonic() - saved > 120:
            save(model, kind, folder)
            saved = time.monotonic()
    save(model, kind, folder)
    print(f"done: {seen} tokens in {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["story", "chat"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--minutes", type=float, default=55, help="time to train")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--drills", type=float, default=0.6, help="part of the time with copy drills in between"
    )
    parser.add_argument("--resume", action="store_true", help="train the model in --out on")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(
        options.kind,
        options.out,
        options.minutes,
        options.seed,
        options.rate,
        options.drills,
        options.resume,
    )


if __name__ == "__main__":
    main()
