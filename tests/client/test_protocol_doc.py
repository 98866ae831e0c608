"""docs/protocol.md says what the messages and shared/errors.py say."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from msgspec import Struct
from msgspec.inspect import Field, StructType, multi_type_info, type_info

from shared import errors
from shared.errors import TpserveError
from shared.messages import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, BaseEvent
from shared.protocol import Event, Request, decode_events, decode_request
from shared.sockets import CLIENT_HIGH_WATER_MARK
from tests.client.conftest import MakePeer
from tests.client.terminal import ROOT, environment

DOCUMENT = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
ENVELOPE = ("id", "v", "user")


def headings() -> dict[str, type[Struct]]:
    """Which message each section is about."""
    found: dict[str, type[Struct]] = {}
    for family, kinds in (("Request", get_args(Request)), ("Event", get_args(Event))):
        for info in multi_type_info(kinds):
            assert isinstance(info, StructType)
            found[f"{family} `{info.tag}`"] = info.cls
            for module, name in re.findall(r"class '([\w.]+)\.(\w+)'", str(info.fields)):
                message = getattr(import_module(module), name)
                if not issubclass(message, BaseEvent):  # those have sections of their own
                    found[f"Object `{name}`"] = message
    return found


HEADINGS = headings()


def section(heading: str) -> str:
    """The text under a heading, up to the next one."""
    assert f"### {heading}\n" in DOCUMENT, f"no section {heading!r}"
    return re.split(r"^##", DOCUMENT.partition(f"### {heading}\n")[2], flags=re.MULTILINE)[0]


def rows(text: str) -> dict[str, str]:
    """The lines of a section's table by what their first column names."""
    return dict(re.findall(r"^\| `(\w+)` \|(.*)$", text, flags=re.MULTILINE))


def fields(message: type[Struct]) -> dict[str, Field]:
    info = type_info(message)
    assert isinstance(info, StructType)
    envelope = ENVELOPE if info.tag is not None else ()  # objects within a message have none
    return {field.name: field for field in info.fields if field.name not in envelope}


def test_the_sections_are_the_messages() -> None:
    sections = re.findall(r"^### ((?:Request|Event|Object) `\w+`)$", DOCUMENT, flags=re.MULTILINE)
    assert sorted(sections) == sorted(HEADINGS)


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_table_has_exactly_the_fields_of_its_message(heading: str) -> None:
    assert list(rows(section(heading))) == list(fields(HEADINGS[heading]))


@pytest.mark.parametrize("heading", [h for h in HEADINGS if not h.startswith("Event")])
def test_a_table_gives_limits_choices_and_which_fields_are_required(heading: str) -> None:
    described = rows(section(heading))
    for name, field in fields(HEADINGS[heading]).items():
        row = described[name]
        kind = str(field.type) if "StructType" not in str(field.type) else ""
        limits = re.findall(r"(?:ge|gt|le|lt|min_length|max_length)=(\d+)", kind)
        choices = re.findall(r"'(\w+)'", kind)
        for value in [*limits, *choices]:
            assert re.search(rf"\b{value}\b", row), f"{name}: {value} is not in {row!r}"
        if heading.startswith("Request") or name in ("role", "content"):
            assert ("| required |" in row) == field.required, name


def test_all_error_codes_are_explained() -> None:
    codes = {
        value.code
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, TpserveError)
    }
    text = DOCUMENT.partition("\n## Errors\n")[2].partition("\n## ")[0]
    assert {code for code in codes if f"`{code}`" not in text} == set()


def test_the_limits_of_the_transport_are_the_ones_in_force() -> None:
    assert f"({MAX_MESSAGE_BYTES} bytes)" in DOCUMENT
    assert f"more than {CLIENT_HIGH_WATER_MARK} frames" in DOCUMENT
    assert f"protocol, version {PROTOCOL_VERSION}\n" in DOCUMENT


def test_the_examples_are_valid_messages() -> None:
    blocks = re.findall(r"```json\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    examples = [json.loads(text) for block in blocks for text in re.split(r"\n(?=\{)", block)]
    for example in examples:
        if "op" in example:
            assert decode_request(msgspec.msgpack.encode(example)).id == example["id"]
        else:
            (event,) = decode_events(msgspec.msgpack.encode([example]))
            assert event.id == example["id"]
    assert len(examples) >= 8


def test_the_complete_client_works(make_peer: MakePeer, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    assert "tcp://127.0.0.1:5555" in program
    script = tmp_path / "story.py"
    script.write_text(program.replace("tcp://127.0.0.1:5555", make_peer().address))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" and so it went\n {'prompt_tokens': 3")
