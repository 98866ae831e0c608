"""`tpserve chat`: several turns, typed at a prompt or read from a pipe."""

import argparse
import sys

from client.commands.common import connect, sampling_options
from client.kept_chat import KeptConversation, keeps_sessions, last_chat
from client.render import note, one_line
from client.repl import Conversation, piped_lines, typed_lines
from client.zmq_client import Client
from shared.errors import InvalidRequestError, TpserveError


def run(args: argparse.Namespace) -> int:
    """Talk until the input or /exit ends it."""
    with connect(args) as client:
        conversation = _conversation(client, args)
        if _at_terminal():
            _talk(conversation)
        else:
            _answer_lines(conversation)
    return 0


def _conversation(client: Client, args: argparse.Namespace) -> Conversation:
    options = sampling_options(args)
    if args.session is None and not args.last:
        keep = _at_terminal() and not args.no_session and keeps_sessions(client)
        kind = KeptConversation if keep else Conversation
        return kind(client, args.model, args.system, options)
    if args.model is not None or args.system is not None:
        raise InvalidRequestError(
            "a conversation of the server has its own model and system prompt: leave out --model "
            "and --system"
        )
    conversation = KeptConversation(client, None, None, options)
    conversation.open(last_chat(client) if args.session is None else args.session)
    return conversation


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _talk(conversation: Conversation) -> None:
    """Neither an error nor Ctrl-C ends it."""
    note("/help lists the commands")
    for line in typed_lines(conversation.commands):
        if line.rstrip() == "/exit":
            return
        try:
            if not _turn(conversation, line):
                note("stopped")
        except KeyboardInterrupt:  # a second one, in case the server no longer reacts to the first
            note("stopped; this turn is forgotten")
        except TpserveError as error:
            print(f"tpserve: error: {one_line(error.message)}", file=sys.stderr)


def _answer_lines(conversation: Conversation) -> None:
    """The first error ends it, and so does Ctrl-C, as KeyboardInterrupt."""
    for line in piped_lines():
        if line.rstrip() == "/exit":
            return
        if not _turn(conversation, line):
            raise KeyboardInterrupt


def _turn(conversation: Conversation, line: str) -> bool:
    """One line of input; False when its answer was cut short."""
    if line.startswith("/"):
        return conversation.command(line)
    if line.strip():
        return conversation.say(line.strip())
    return True
