"""The `tpserve` command: its arguments, and what becomes of errors.

Each subcommand is a module of client/commands and is loaded when it is called for, so that none
waits for the libraries of the others; `serve`, `plan`, `compare` and `bench` become other programs and
need nothing of this.
"""

import argparse
import importlib
import io
import os
import sys

from client.defaults import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S
from client.render import one_line
from shared.errors import TpserveError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""What a shell reports for a program that SIGINT or SIGPIPE has ended."""
MAX_TIMEOUT_S = 86_400
OTHER_PROGRAMS = {
    "serve": "coordinator",
    "plan": "coordinator.plan",
    "compare": "worker.compare",
    "bench": "benchmarks.scaling",
}
"""Commands that this process becomes: the modules to run."""


def main() -> int:
    """Entry of the `tpserve` command; the exit code. Usage errors exit with 2."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in OTHER_PROGRAMS:
        # -P: the working directory must not decide which packages are imported.
        module = OTHER_PROGRAMS[arguments[0]]
        os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments[1:]])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as input is; the locale may not hold the text
    parser = argument_parser()
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.error("which command? see tpserve --help")
    try:
        command = importlib.import_module(f"client.commands.{args.command}")
        code: int = command.run(args)
        sys.stdout.flush()
    except TpserveError as error:
        print(f"tpserve: error: {one_line(error.message)}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout again at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return code


def argument_parser() -> argparse.ArgumentParser:
    """All subcommands and their flags."""
    parser = argparse.ArgumentParser(
        prog="tpserve",
        description="Tensor-parallel LLM inference: start a server and talk to it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version",
        dest="command",
        action="store_const",
        const="version",
        help="print the version and exit",
    )
    server, generation, as_json = _server_flags(), _generation_flags(), _json_flag()
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", help="start a server; its flags: tpserve serve --help")
    commands.add_parser(
        "compare",
        help="accuracy of precisions on a model folder, without a server; tpserve compare --help",
    )

    commands.add_parser(
        "bench", help="one worker against many, measured on this machine; tpserve bench --help"
    )

    story = commands.add_parser(
        "story",
        parents=[server, generation, as_json],
        allow_abbrev=False,
        help="continue a text",
        description="Print PROMPT and its continuation as it is generated.",
    )
    story.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="text to continue; without it, or for -, standard input less its last line break",
    )

    chat = commands.add_parser(
        "chat",
        parents=[server, generation],
        allow_abbrev=False,
        help="hold a conversation",
        description="Hold a conversation; /help lists the commands. At a terminal the server keeps "
        "it, if it can. When standard input is not a terminal, each of its lines is a turn and only "
        "the answers are printed; the server keeps them with --session and --last only.",
    )
    chat.add_argument("--system", metavar="TEXT", help="instructions that precede the conversation")
    kept = chat.add_mutually_exclusive_group()
    kept.add_argument(
        "--session", metavar="ID", type=_count, help="go on with a conversation of the server"
    )
    kept.add_argument(
        "--last", action="store_true", help="the same with the chat that was changed last"
    )
    kept.add_argument(
        "--no-session", action="store_true", help="have the server keep nothing of it"
    )

    status = commands.add_parser(
        "status", parents=[server, as_json], help="workers, queue, memory of the server"
    )
    status.add_argument("--watch", action="store_true", help="every second, with rates")
    load = commands.add_parser(
        "load",
        parents=[server, as_json],
        allow_abbrev=False,
        help="load one more model into the running server",
        description="Load a model beside those that are served, which go on meanwhile.",
    )
    load.add_argument("model", metavar="NAME=PATH", help="name to serve it by, and its folder")
    load.add_argument("--dtype", metavar="TYPE", help="of weights (default: as the server's)")
    load.add_argument("--kv-dtype", metavar="TYPE", help="of the KV cache (as the server's)")
    load.add_argument(
        "--max-model-len", metavar="N", type=int, help="longest prompt + answer in tokens"
    )
    unload = commands.add_parser(
        "unload",
        parents=[server],
        allow_abbrev=False,
        help="give a model's memory back",
        description="Unload a model; jobs that it has are finished first.",
    )
    unload.add_argument("model", metavar="NAME", help="the model")
    unload.add_argument("--force", action="store_true", help="end its jobs at once")
    commands.add_parser(
        "plan", help="memory that a model takes, and predicted speed: tpserve plan --help"
    )
    commands.add_parser("models", parents=[server, as_json], help="the models that are loaded")
    commands.add_parser(
        "health", parents=[server], help="whether the server is ready; if not, exit with 1"
    )
    _add_session_commands(commands, server, as_json)
    _add_job_commands(commands, server, generation, as_json)
    _add_cache_commands(commands, as_json)
    return parser


def _add_session_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
    as_json: argparse.ArgumentParser,
) -> None:
    """`tpserve sessions` and its own commands."""
    sessions = commands.add_parser(
        "sessions", help="conversations that the server keeps; tpserve sessions --help"
    )
    actions = sessions.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", parents=[server, as_json], help="those changed last first")
    show = actions.add_parser("show", parents=[server, as_json], help="the messages of one")
    search = actions.add_parser("search", parents=[server, as_json], help="find words in them")
    rename = actions.add_parser("rename", parents=[server], help="give one another title")
    rm = actions.add_parser("rm", parents=[server], help="delete with all messages")
    export = actions.add_parser("export", parents=[server], help="write one as JSON")
    imported = actions.add_parser("import", parents=[server], help="make one of such a file")
    listing.add_argument("--limit", metavar="N", type=_count, default=50, help="(default: 50)")
    search.add_argument("text", metavar="WORDS")
    search.add_argument("--limit", metavar="N", type=_count, default=50, help="(default: 50)")
    for action in (show, rename, export):
        action.add_argument("session", metavar="ID", type=_count)
    rm.add_argument("session", metavar="ID", type=_count, nargs="+")
    rename.add_argument("title", metavar="TITLE")
    for action in (export, imported):
        action.add_argument(
            "file", metavar="FILE", nargs="?", default="-", help="default: - (pipe)"
        )


def _add_job_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
    generation: argparse.ArgumentParser,
    as_json: argparse.ArgumentParser,
) -> None:
    """`tpserve submit`, and `tpserve jobs` with its own commands."""
    submit = commands.add_parser(
        "submit",
        parents=[server, generation, as_json],
        allow_abbrev=False,
        help="have the server store a job and run it, also over its restart",
        description="Store a job and print its id; tpserve jobs shows what becomes of it.",
    )
    submit.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="text to continue; without it, or for -, standard input less its last line break",
    )
    submit.add_argument("--chat", action="store_true", help="PROMPT is to be answered")
    submit.add_argument("--system", metavar="TEXT", help="instructions that precede it; a chat")
    submit.add_argument("--id", metavar="ID", help="its id: submitted twice, it runs once")
    submit.add_argument(
        "--priority", metavar="N", type=int, default=0, help="lower numbers start first"
    )
    submit.add_argument(
        "--keep", metavar="SECONDS", type=int, help="after its end (default: as the server's)"
    )
    jobs = commands.add_parser("jobs", help="what was submitted; tpserve jobs --help")
    actions = jobs.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", parents=[server, as_json], help="the newest first")
    show = actions.add_parser("show", parents=[server, as_json], help="state and result of one")
    follow = actions.add_parser("follow", parents=[server], help="print one as it is written")
    cancel = actions.add_parser("cancel", parents=[server], help="end them early")
    rm = actions.add_parser("rm", parents=[server], help="forget those that have ended")
    states = ["queued", "running", "done", "failed", "cancelled"]
    listing.add_argument("--state", choices=states, help="only these")
    listing.add_argument("--limit", metavar="N", type=_count, default=50, help="(default: 50)")
    for action in (show, follow):
        action.add_argument("job", metavar="ID")
    for action in (cancel, rm):
        action.add_argument("job", metavar="ID", nargs="+")
    follow.add_argument(
        "--from-token", metavar="N", type=int, default=0, help="leave out the first N tokens"
    )


def _add_cache_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    as_json: argparse.ArgumentParser,
) -> None:
    """Those that need no server: models of the Hugging Face hub and their cache."""
    spec = "ORG/NAME or ORG/NAME@REVISION of the Hugging Face hub"
    pull = commands.add_parser(
        "pull",
        help="download a model of the Hugging Face hub",
        description="Download a model into the cache, or what is missing of it, and print its folder.",
    )
    pull.add_argument("spec", metavar="MODEL", help=spec)
    pull.add_argument("--offline", action="store_true", help="only look whether the cache has it")
    commands.add_parser("list", parents=[as_json], help="the models in the cache")
    rm = commands.add_parser("rm", help="delete a model from the cache")
    rm.add_argument("spec", metavar="MODEL", help=f"{spec}; without a revision, all of them")
    rm.add_argument("--yes", action="store_true", help="do not ask")
    show = commands.add_parser(
        "show", parents=[as_json], help="what a model is; needs no server and no hub"
    )
    show.add_argument("spec", metavar="MODEL", help=f"a folder, or {spec} that is in the cache")


def _server_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument(
        "--server",
        metavar="ADDRESS",
        default=os.environ.get("TPSERVE_SERVER") or DEFAULT_ADDRESS,
        help=f"ZeroMQ address (default: TPSERVE_SERVER, or {DEFAULT_ADDRESS})",
    )
    flags.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=DEFAULT_TIMEOUT_S,
        help="how long to wait for a server to answer at all (default: %(default)g)",
    )
    return flags


def _generation_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--model", metavar="NAME", help="which model (default: the server's choice)")
    flags.add_argument("--max-tokens", metavar="N", type=int, help="generate N tokens at most")
    randomness = flags.add_mutually_exclusive_group()
    randomness.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    randomness.add_argument(
        "--temperature", metavar="T", type=float, help="randomness; 0: always the likeliest token"
    )
    flags.add_argument("--top-k", metavar="K", type=int, help="sample among the K likeliest tokens")
    flags.add_argument(
        "--top-p", metavar="P", type=float, help="sample among the likeliest that add up to P"
    )
    flags.add_argument(
        "--min-p",
        metavar="P",
        type=float,
        help="leave out tokens less likely than P times the likeliest",
    )
    flags.add_argument("--seed", metavar="N", type=int, help="same request and seed, same text")
    for name, neutral, what in (
        ("repetition", None, "divides the logits of tokens that occur in prompt or answer"),
        ("presence", 0.0, "taken off the logits of tokens that the answer has"),
        ("frequency", 0.0, "the same, times how often it has them"),
    ):
        flags.add_argument(f"--{name}-penalty", metavar="X", type=float, default=neutral, help=what)
    flags.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before TEXT; repeatable"
    )
    flags.add_argument(
        "--min-tokens", metavar="N", type=int, default=0, help="no end before N new tokens"
    )
    flags.add_argument(
        "--ignore-eos", action="store_true", help="go on after the model's end-of-text token"
    )
    return flags


def _json_flag() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--json", action="store_true", help="print JSON")
    return flags


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {MAX_TIMEOUT_S}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
