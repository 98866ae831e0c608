"""`tpserve story`: a prompt and its continuation."""

import argparse

from client.commands.common import (
    connect,
    interrupt_cancels,
    read_prompt,
    sampling_options,
    show,
    speed,
    write_json,
)
from client.render import note
from shared.messages import Done


def run(args: argparse.Namespace) -> int:
    """Continue the prompt. Raises KeyboardInterrupt after Ctrl-C has ended the job."""
    prompt = args.prompt if args.prompt not in (None, "-") else read_prompt()
    with connect(args) as client:
        stream = client.story(
            prompt, model=args.model, stream=not args.json, **sampling_options(args)
        )
        if args.json:
            with interrupt_cancels(stream):
                list(stream)
        else:
            show(stream, prompt)
    if not isinstance(stream.end, Done):
        raise KeyboardInterrupt
    if args.json:
        _show_json(prompt, stream.end)
    note(speed(stream.end))
    return 0


def _show_json(prompt: str, done: Done) -> None:
    write_json(
        {
            "text": prompt + done.text,
            "token_ids": done.token_ids,
            "finish_reason": done.finish_reason,
            "usage": done.usage,
            "timings": done.timings,
        }
    )
