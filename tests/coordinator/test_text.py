"""Text to tokens and back: nothing lost, no half characters, templates kept in their box."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from coordinator.text import Detokenizer, TextModel
from shared.errors import ContextLengthError, InvalidRequestError, ModelError
from shared.messages import Message
from shared.model_config import read_model_config

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 4096,
}


def byte_level() -> Tokenizer:
    """A small byte-level BPE, like those of Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat with a ball " * 20], trainer)
    return tokenizer


BYTE_LEVEL = byte_level()


def folder_with(tmp_path: Path, template: object = None, **more: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    BYTE_LEVEL.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **more}))
    return tmp_path


def open_text(folder: Path) -> TextModel:
    return TextModel(folder, read_model_config(folder))


@settings(max_examples=300)
@given(st.text(), st.text())
def test_pieces_join_to_the_whole_text_byte_level(prompt: str, answer: str) -> None:
    check_pieces(BYTE_LEVEL, BYTE_LEVEL.encode(prompt).ids, BYTE_LEVEL.encode(answer).ids)


def check_pieces(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> None:
    stream = Detokenizer(tokenizer, prompt)
    pieces = [stream.push(token) for token in new]
    whole = tokenizer.decode(prompt + new)
    before = tokenizer.decode(prompt)
    if "\ufffd" not in whole:
        assert all("\ufffd" not in piece for piece in pieces)
    if "\ufffd" not in before:
        assert before + "".join(pieces) + stream.flush() == whole


@settings(max_examples=100)
@given(st.lists(st.integers(0, 399), max_size=30))
@example([127, 0, 0, 0, 0, 95])  # special tokens within a character
@example([95, 95, 95, 95, 127, 95])  # a character after bytes that belong to none
def test_random_tokens_never_break_the_stream(ids: list[int]) -> None:
    stream = Detokenizer(BYTE_LEVEL, [])
    text = "".join(stream.push(token) for token in ids) + stream.flush()
    assert text == BYTE_LEVEL.decode(ids)


@pytest.mark.parametrize(
    "text", ["héllo 😀 wörld", "你好，世界", "a👩‍👩‍👧‍👦b", "  two  spaces \n\n x"]
)
def test_pieces_join_with_sentencepiece_byte_fallback(reference: Path, text: str) -> None:
    for name in ("minueza-32m-tokenizer", "story"):
        tokenizer = Tokenizer.from_file(str(reference / "models" / name / "tokenizer.json"))
        ids = tokenizer.encode(text).ids
        for cut in range(1, len(ids)):
            check_pieces(tokenizer, ids[:cut], ids[cut:])


@pytest.mark.parametrize("text", ["日本語の物語" * 4 + " b", "😀😁😂🤣😃😄 x" * 3, "é" * 30])
def test_long_runs_of_byte_tokens_come_out_whole_and_soon(reference: Path, text: str) -> None:
    path = reference / "models" / "minueza-32m-tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    ids = tokenizer.encode(text).ids
    for cut in (1, 2, 3, 5, 9, 14):
        stream = Detokenizer(tokenizer, ids[:cut])
        given = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        for at, token in enumerate(ids[cut:], cut + 1):
            given += stream.push(token)
            whole = tokenizer.decode(ids[:at])
            assert given == whole or whole.endswith("\ufffd"), "complete text is not held back"
        assert given + stream.flush() == text


def test_tokens_without_text_and_broken_bytes_do_not_pile_up() -> None:
    broken = BYTE_LEVEL.encode("é").ids[:1]
    stream = Detokenizer(BYTE_LEVEL, BYTE_LEVEL.encode("the").ids)
    for token in [0] * 200 + broken * 200:  # <|end|>, then halves of characters
        stream.push(token)
        assert len(stream._ids) <= 16
    assert stream.push(BYTE_LEVEL.encode("cat").ids[0]).endswith("cat")


def test_a_template_that_makes_nothing_is_the_clients_error(tmp_path: Path) -> None:
    only_users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    model = open_text(folder_with(tmp_path, only_users))
    with pytest.raises(InvalidRequestError, match="makes nothing"):
        model.encode_chat([Message("system", "x")])


def test_a_truncating_tokenizer_does_not_cut_the_prompt(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    description = json.loads((folder / "tokenizer.json").read_text())
    description["truncation"] = {
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    (folder / "tokenizer.json").write_text(json.dumps(description))
    assert len(open_text(folder).encode_story("q " * 50)) > 50


def test_a_hopelessly_long_prompt_is_refused_without_tokenising(tmp_path: Path) -> None:
    model = open_text(folder_with(tmp_path))
    with pytest.raises(ContextLengthError, match="characters"):
        model.encode_story("word " * 200_000)


def test_golden_prompts_and_texts(story_model: Path, golden: list[dict[str, Any]]) -> None:
    model = open_text(story_model)
    for case in golden:
        assert model.encode_story(case["prompt"]) == case["prompt_ids"]
        stream = model.detokenizer(case["prompt_ids"])
        text = case["prompt"] + "".join(stream.push(t) for t in case["new_ids"]) + stream.flush()
        assert text == case["text"]


def test_a_model_without_a_template_gets_chatml(tmp_path: Path) -> None:
    model = open_text(folder_with(tmp_path))
    assert not model.has_chat_template
    ids = model.encode_chat([Message("user", "hi")])
    assert BYTE_LEVEL.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_models_own_template_is_used_also_as_a_file(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}:{{ m['content'] }}]{% endfor %}{{ eos_token }}"
    folder = folder_with(tmp_path, template, eos_token={"content": "<|end|>"})
    assert open_text(folder).encode_chat([Message("user", "hi")])[-1] == 0
    (folder / "chat_template.jinja").write_text("FILE {{ messages[0].content }}")
    assert BYTE_LEVEL.decode(open_text(folder).encode_chat([Message("user", "x")])) == "FILE x"


def test_special_tokens_of_older_checkpoints_reach_the_template(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "{{ bos_token }}|{{ eos_token }}", bos_token="the")
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "cat", "eos_token": {"content": "mat"}})
    )
    ids = open_text(folder).encode_chat([Message("user", "x")])
    assert BYTE_LEVEL.decode(ids) == "the|mat"


def test_named_templates_default_first(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    ids = open_text(folder_with(tmp_path, named)).encode_chat([Message("user", "x")])
    assert BYTE_LEVEL.decode(ids) == "D"


def test_a_template_that_refuses_messages_is_the_clients_error(tmp_path: Path) -> None:
    model = open_text(folder_with(tmp_path, "{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        model.encode_chat([Message("user", "x")])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ self._TemplateReference__context }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(tmp_path: Path, attack: str) -> None:
    model = open_text(folder_with(tmp_path, attack))
    try:
        ids = model.encode_chat([Message("user", "x")])
    except InvalidRequestError:
        return
    shown = BYTE_LEVEL.decode(ids)
    assert "<class" not in shown
    assert "globals" not in shown
    assert "Context" not in shown


def test_special_tokens_stand_for_themselves_even_if_marked_normalised(story_model: Path) -> None:
    model = open_text(story_model)
    ids = model.encode_story("The end.<|end_story|>")
    assert ids[-1] == 2


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": {"type": "Nonsense"}}'),
        ("tokenizer_config.json", '{"chat_template": 7}'),
        ("chat_template.jinja", "{% for %}"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, file: str, content: str) -> None:
    folder = folder_with(tmp_path)
    (folder / file).write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer|template"):
        open_text(folder)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 100}))
    with pytest.raises(ModelError, match="vocab_size is 100"):
        open_text(folder)
