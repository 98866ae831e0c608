"""tokenizer.model -> tokenizers.Tokenizer: a SentencePiece model, told in the terms of `tokenizers`.

The file is a protobuf message; the few fields that count are read here, because the sentencepiece
package does not tell how its models normalise a text.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from shared.errors import ModelError

_SPACE = "▁"  # what SentencePiece has for a space

# Numbers of sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
_KINDS = {_UNIGRAM: "unigram", _BPE: "BPE", 3: "word", 4: "char"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; its place in the list is its id."""

    text: str
    score: float
    """BPE: pieces with a higher one are merged first. Unigram: log probability."""
    type: int


@dataclass
class SentencePieceModel:
    """The parts of a SentencePiece model that decide which ids a text has."""

    pieces: list[Piece] = field(default_factory=list)
    kind: int = _UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    """Precompiled normalisation of characters; empty: none."""
    add_dummy_prefix: bool = True
    """A text gets a space in front."""
    remove_extra_whitespaces: bool = True


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Parse a tokenizer.model. Raises ModelError when it is anything else."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    try:
        model = _parse(data)
    except (ValueError, LookupError, TypeError, struct.error):
        model = SentencePieceModel()
    if not model.pieces:
        raise ModelError(
            f"{path} is not a SentencePiece model (some checkpoints have a tiktoken vocabulary by "
            "that name, which is not supported): add the checkpoint's tokenizer.json to the folder"
        )
    if model.kind not in (_UNIGRAM, _BPE):
        kind = _KINDS.get(model.kind, str(model.kind))
        raise ModelError(
            f"{path} is a SentencePiece model of type {kind}; only BPE and unigram are supported"
        )
    if any(piece.type == _UNUSED for piece in model.pieces):
        raise ModelError(f"{path} has pieces that are marked as unused, which is not supported")
    return model


def build_tokenizer(model: SentencePieceModel, *, spaced_segments: bool, prefix: bool) -> Tokenizer:
    """A tokenizer that gives the ids that SentencePiece would give.

    With `prefix`, a text that the model would give a space in front gets it; with `spaced_segments`
    so does every part of it that follows a special token.
    """
    tokenizer = Tokenizer(_tokenizer_model(model))
    prefix = prefix and model.add_dummy_prefix
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix and spaced_segments:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if prefix and not spaced_segments:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    # They are in the vocabulary already, and keep their ids.
    for piece in model.pieces:
        if piece.type in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([AddedToken(piece.text, normalized=False, special=True)])
        elif piece.type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.text, normalized=False)])
    return tokenizer


def _tokenizer_model(model: SentencePieceModel) -> models.Model:
    unknown = next((i for i, p in enumerate(model.pieces) if p.type == _UNKNOWN), None)
    if model.kind == _UNIGRAM:
        # A byte's piece stands for that byte only, not for a text that reads "<0x41>": there, six
        # characters by themselves have to be more probable.
        never = 10 * min(piece.score for piece in model.pieces) - 100
        scored = [(p.text, never if p.type == _BYTE else p.score) for p in model.pieces]
        return models.Unigram(scored, unknown, model.byte_fallback)
    return models.BPE(
        vocab={piece.text: i for i, piece in enumerate(model.pieces)},
        merges=_merges(model.pieces),
        unk_token=None if unknown is None else model.pieces[unknown].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Pairs to merge, the first ones first.

    SentencePiece merges the two neighbours whose union is the piece with the highest score, however
    they came about: so every way to cut a piece into two others is a merge.
    """
    plain = {piece.text: i for i, piece in enumerate(pieces) if piece.type == _NORMAL}
    found = [
        (-pieces[i].score, i, plain[text[:cut]], plain[text[cut:]])
        for text, i in plain.items()
        for cut in range(1, len(text))
        if text[:cut] in plain and text[cut:] in plain
    ]
    return [(pieces[left].text, pieces[right].text) for _, _, left, right in sorted(found)]


def _parse(data: bytes) -> SentencePieceModel:
    """Raises ValueError, LookupError, TypeError or struct.error for what is no such message."""
    model = SentencePieceModel()
    for number, value in _fields(data):
        if number == 1:
            model.pieces.append(_parse_piece(_message(value)))
        elif number == 2:
            trainer = dict(_fields(_message(value)))
            model.kind = _number(trainer.get(3, _UNIGRAM))
            model.byte_fallback = bool(trainer.get(35, 0))
        elif number == 3:
            normalizer = dict(_fields(_message(value)))
            model.charsmap = _message(normalizer.get(2, b""))
            model.add_dummy_prefix = bool(normalizer.get(3, 1))
            model.remove_extra_whitespaces = bool(normalizer.get(4, 1))
    return model


def _parse_piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", _message(fields.get(2, bytes(4))))
    return Piece(_message(fields[1]).decode(), score, _number(fields.get(3, _NORMAL)))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: an int, or bytes for whatever is not a varint."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("the message is cut off")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where the next thing begins."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number where text or a message belongs")
    return value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise TypeError("text where a number belongs")
    return value
