"""`tpserve submit`: a job that the server stores, and runs whoever is there to see it."""

import argparse

from client.commands.common import connect, read_prompt, sampling_options, write_json
from client.jobs import Prompt
from shared.messages import Message


def run(args: argparse.Namespace) -> int:
    """Print the job's id once it is stored."""
    text = args.prompt if args.prompt not in (None, "-") else read_prompt()
    prompt: Prompt = text
    if args.chat or args.system is not None:
        system = [Message("system", args.system)] if args.system is not None else []
        prompt = [*system, Message("user", text)]
    with connect(args) as client:
        info = client.jobs.submit(
            prompt,
            job=args.id,
            model=args.model,
            priority=args.priority,
            keep_s=args.keep,
            **sampling_options(args),
        )
    if args.json:
        write_json(info)
    else:
        print(info.job)
    return 0
