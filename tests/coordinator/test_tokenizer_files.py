"""tokenizer.model makes the tokenizer that SentencePiece is, and is refused when it is none."""

import base64
import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from coordinator.tokenizer_files import load_tokenizer, read_tokenizer_config
from shared.errors import ModelError
from tests.coordinator.test_text import check_pieces

LLAMA: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "like Llama's": LLAMA,
    "no byte fallback": {"model_type": "bpe"},
    "NFKC and single spaces": {"model_type": "bpe", "byte_fallback": True},
    "no space in front": LLAMA | {"add_dummy_prefix": False},
    "special tokens of its own": LLAMA | {"control_symbols": ["[INST]"]},
    "unigram": {"model_type": "unigram", "byte_fallback": True},
    "unigram, as it comes": {
        "model_type": "unigram",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
}
TEXTS = [
    "",
    "the cat sat on the mat",
    " a leading space",
    "  several   spaces    inside and after  ",
    "\n\nlines\n and\ttabs\r\n",
    "12345 - 67.89 %",
    "Grüße, naïve café, ſoft ﬁ ligature, ½, Ⅷ",
    "日本語の物語 and 你好",
    "😀 👩‍👩‍👧‍👦 🇩🇪",
    "▁ the space sign itself ▁▁",
    "<0x41> is no byte",
    "a" * 200,
]


WORDS = "the cat sat on mat with a ball and café naïve Grüße 2024 17 said: hello, world <x> 0141"


def train(**options: Any) -> bytes:
    """A small SentencePiece model, as the content of its file."""
    words = WORDS.split()
    chosen = random.Random(1)
    lines = [" ".join(chosen.choices(words, k=9)) + " " * chosen.randrange(3) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=400 if options.get("byte_fallback") else 120,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


MODELS = {name: train(**options) for name, options in KINDS.items()}


def folder_with(tmp_path: Path, model: bytes, **config: Any) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def open_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder, read_tokenizer_config(folder))


def plain(tmp_path: Path, name: str, **config: Any) -> Tokenizer:
    return open_tokenizer(folder_with(tmp_path, MODELS[name], add_bos_token=False, **config))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", MODELS)
def test_ids_and_text_are_those_of_sentencepiece(tmp_path: Path, name: str, text: str) -> None:
    original = sentencepiece.SentencePieceProcessor(model_proto=MODELS[name])
    tokenizer = plain(tmp_path, name)
    ids = original.encode(text)
    assert tokenizer.encode(text).ids == ids
    if original.unk_id() not in ids:  # which tokenizers leaves out, and SentencePiece shows
        assert tokenizer.decode(ids) == original.decode(ids)


def test_any_text_has_the_ids_of_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> None:
    original = sentencepiece.SentencePieceProcessor(model_proto=MODELS["like Llama's"])
    tokenizer = plain(tmp_path_factory.mktemp("model"), "like Llama's")

    @settings(max_examples=300, deadline=None)
    @given(
        st.text(
            st.sampled_from("the catsomé ▁\n😀日1<>")
            | st.characters(codec="utf-8", exclude_characters="\0")
        )
    )
    def check(text: str) -> None:
        if any(special in text for special in ("<s>", "</s>", "<unk>")):
            return
        ids = original.encode(text)
        assert tokenizer.encode(text).ids == ids
        assert tokenizer.decode(ids) == text.replace("▁", " ")

    check()


def test_text_comes_out_in_whole_characters(tmp_path: Path) -> None:
    tokenizer = plain(tmp_path, "like Llama's")
    ids = tokenizer.encode("日本 the cat 😀 naïve").ids
    borders = [cut for cut in range(1, len(ids)) if "\ufffd" not in tokenizer.decode(ids[:cut])]
    assert len(borders) > 5
    for cut in borders:  # a prompt is a text, so it never ends within a character
        check_pieces(tokenizer, ids[:cut], ids[cut:])


def test_a_tokenizer_json_converted_by_others_has_the_same_ids(
    reference: Path, tmp_path: Path
) -> None:
    source = reference / "models" / "minueza-32m-tokenizer"
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    ours = open_tokenizer(tmp_path)
    theirs = Tokenizer.from_file(str(source / "tokenizer.json"))
    specials = ["<|im_start|>user\nhi<|im_end|>\n", "a</s> b", "<unk> <s>x"]
    for text in [*TEXTS, *specials, Path(__file__).read_text(encoding="utf-8")]:
        ids = theirs.encode(text).ids
        assert ours.encode(text).ids == ids
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ["<s>", "▁the", "▁cat"]),
        ({"add_bos_token": False}, ["▁the", "▁cat"]),
        ({"add_eos_token": True}, ["<s>", "▁the", "▁cat", "</s>"]),
        ({"bos_token": "</s>"}, ["</s>", "▁the", "▁cat"]),
        ({"bos_token": {"content": "<s>"}}, ["<s>", "▁the", "▁cat"]),
    ],
)
def test_texts_begin_and_end_as_the_tokenizer_config_says(
    tmp_path: Path, config: dict[str, Any], expected: list[str]
) -> None:
    tokenizer = open_tokenizer(folder_with(tmp_path, MODELS["like Llama's"], **config))
    assert tokenizer.encode("the cat").tokens == expected
    assert tokenizer.encode("the cat", add_special_tokens=False).tokens == ["▁the", "▁cat"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ["▁the", "</s>", "▁cat"]),
        ({"legacy": True}, ["▁the", "</s>", "▁cat"]),
        ({"legacy": False}, ["▁the", "</s>", "c", "at"]),
        ({"add_prefix_space": False}, ["the", "</s>", "c", "at"]),
    ],
)
def test_what_follows_a_special_token_has_a_space_where_it_had_one_in_training(
    tmp_path: Path, config: dict[str, Any], expected: list[str]
) -> None:
    tokens = plain(tmp_path, "like Llama's", **config).encode("the</s>cat").tokens
    # How a word without its space is cut depends on the training; that it is the same text does not.
    assert "".join(tokens) == "".join(expected)


def test_added_tokens_have_the_ids_that_the_files_give(tmp_path: Path) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=MODELS["like Llama's"]).vocab_size()
    decoder = {
        "1": {"content": "<s>", "special": True},
        str(size + 1): {"content": "<tool>", "special": False, "normalized": False},
    }
    folder = folder_with(tmp_path, MODELS["like Llama's"], added_tokens_decoder=decoder)
    (folder / "added_tokens.json").write_text(json.dumps({"<|end|>": size, "<tool>": size + 1}))
    tokenizer = open_tokenizer(folder)
    ids = tokenizer.encode("the<|end|><tool>").ids
    assert ids[-2:] == [size, size + 1]
    assert tokenizer.decode(ids) == "the<tool>", "a special token is no text, another one is"


def test_an_added_token_that_cannot_have_its_id_is_refused(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path, MODELS["like Llama's"], added_tokens_decoder={"9000": {"content": "<|end|>"}}
    )
    with pytest.raises(ModelError, match=r"'<\|end\|>' has id 9000"):
        open_tokenizer(folder)


def test_a_begin_token_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, MODELS["like Llama's"], bos_token="<begin>")
    with pytest.raises(ModelError, match="has no token '<begin>'"):
        open_tokenizer(folder)


def test_tokenizer_json_is_preferred(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, b"whatever")
    plain_folder = folder / "plain"
    plain_folder.mkdir()
    plain(plain_folder, "unigram").save(str(folder / "tokenizer.json"))
    assert open_tokenizer(folder).encode("the cat").ids


TIKTOKEN = b"".join(
    base64.b64encode(bytes([i])) + b" " + str(i).encode() + b"\n" for i in range(256)
)


@pytest.mark.parametrize(
    "content",
    [TIKTOKEN, b"", b"{}", MODELS["unigram"][:-1], MODELS["unigram"][:100], b"\xff" * 40],
    ids=["tiktoken", "empty", "json", "cut off", "cut off early", "no message"],
)
def test_what_is_not_sentencepiece_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ModelError, match=r"tokenizer.model is not a SentencePiece model.*tiktoken"):
        open_tokenizer(folder_with(tmp_path, content))


def test_other_types_of_sentencepiece_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="of type char; only BPE and unigram"):
        open_tokenizer(folder_with(tmp_path, train(model_type="char")))


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 3000), byte=st.integers(0, 255))
def test_a_damaged_file_is_refused_or_read_but_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    content = bytearray(MODELS["like Llama's"])
    content[at % len(content)] = byte
    folder = folder_with(tmp_path_factory.mktemp("model"), bytes(content))
    with contextlib.suppress(ModelError):
        open_tokenizer(folder).encode("the cat")


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer.json is missing, and so is tokenizer.model"):
        open_tokenizer(tmp_path)
