"""`tpserve sessions`: the conversations and stories that the server keeps."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from client.commands.common import connect, decode_input, when, write_json
from client.render import write
from client.tables import write_table
from client.zmq_client import Client
from shared.errors import InvalidRequestError
from shared.session_messages import SessionExport, SessionInfo, SessionState

_PAGE = 1000


def run(args: argparse.Namespace) -> int:
    """Carry out one of its own commands."""
    with connect(args) as client:
        match args.action:
            case "list":
                _list(client, args)
            case "show":
                _show(client.sessions.get(args.session), args.json)
            case "search":
                _search(client, args)
            case "rename":
                client.sessions.rename(args.session, args.title)
            case "rm":
                for session in args.session:
                    client.sessions.delete(session)
                    print(f"session {session} deleted")
            case "export":
                _export(client.sessions.export(args.session), args.file)
            case "import":
                print(client.sessions.import_(_read(args.file)).session.id)
    return 0


def _list(client: Client, args: argparse.Namespace) -> None:
    found: list[SessionInfo] = []
    cursor = None
    while len(found) < args.limit:
        page = client.sessions.page(min(_PAGE, args.limit - len(found)), cursor)
        found += page.sessions
        if (cursor := page.cursor) is None:
            break
    if args.json:
        write_json(found)
    else:
        write_sessions(found)


def write_sessions(found: Sequence[SessionInfo]) -> None:
    """As a table."""
    rows = [[str(s.id), s.kind, when(s.updated), s.model or "", s.title] for s in found]
    write_table("sessions", ["id", "kind", "changed", "model", "title"], rows)


def _show(state: SessionState, as_json: bool) -> None:
    """The selected path; where a message has siblings, which of how many it is."""
    if as_json:
        write_json(state)
        return
    write(f"{state.session.id}: {state.session.title}\n")
    for message in state.messages:
        place = f" {message.position}/{len(message.siblings)}" if len(message.siblings) > 1 else ""
        cut = " (partial)" if message.partial else ""
        write(f"\n[{message.id}] {message.role}{place}{cut}\n{message.content}\n")


def _search(client: Client, args: argparse.Namespace) -> None:
    hits = client.sessions.search(args.text, args.limit)
    if args.json:
        write_json(hits)
        return
    rows = [[str(h.session), str(h.message or ""), h.title, h.text] for h in hits]
    write_table("found", ["session", "message", "title", "text"], rows)


def _export(data: SessionExport, file: str) -> None:
    encoded = msgspec.json.format(msgspec.json.encode(data)) + b"\n"
    if file == "-":
        write(encoded.decode())
        return
    try:
        Path(file).write_bytes(encoded)
    except OSError as error:
        raise InvalidRequestError(f"{file} cannot be written: {error.strerror}") from None


def _read(file: str) -> SessionExport:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"{file} cannot be read: {error.strerror}") from None
    try:
        return msgspec.json.decode(decode_input(data), type=SessionExport)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequestError(f"{file} is no exported session: {error}") from None
