"""`tpserve jobs`: what was submitted, and what has become of it."""

import argparse

from client.commands.common import connect, show, speed, when, write_json
from client.render import note, write
from client.tables import write_table
from client.zmq_client import Client
from shared.job_messages import JobInfo, StoredJob
from shared.messages import Done, Failed

EXIT_FAILED = 1
_PAGE = 1000


def run(args: argparse.Namespace) -> int:
    """Carry out one of its own commands."""
    with connect(args) as client:
        match args.action:
            case "list":
                _list(client, args)
            case "show":
                return _show(client.jobs.get(args.job), args.json)
            case "follow":
                _follow(client, args.job, args.from_token)
            case "cancel":
                for job in args.job:
                    print(f"job {job}: {client.jobs.cancel(job).job.state}")
            case "rm":
                for job in args.job:
                    client.jobs.delete(job)
                    print(f"job {job} deleted")
    return 0


def _list(client: Client, args: argparse.Namespace) -> None:
    found: list[JobInfo] = []
    cursor = None
    while len(found) < args.limit:
        page = client.jobs.page(min(_PAGE, args.limit - len(found)), cursor, state=args.state)
        found += page.jobs
        if (cursor := page.cursor) is None:
            break
    if args.json:
        write_json(found)
        return
    rows = [
        [job.job, job.state, job.kind, job.model, when(job.created), str(job.attempts)]
        for job in found
    ]
    write_table("jobs", ["id", "state", "kind", "model", "submitted", "attempts"], rows)


def _show(stored: StoredJob, as_json: bool) -> int:
    """The job, and its answers as far as it has them; whether it failed is the exit code."""
    end = stored.end
    if as_json:
        write_json(stored)
    else:
        note(f"{stored.job.job}: {stored.job.state}")
        if isinstance(end, Failed):
            note(f"{end.code}: {end.message}")
        elif end is not None:
            for answer in end.choices if isinstance(end, Done) else end.partial:
                write(answer.text + "\n")
    return EXIT_FAILED if isinstance(end, Failed) else 0


def _follow(client: Client, job: str, from_token: int) -> None:
    """Raises KeyboardInterrupt after Ctrl-C has ended the following, not the job."""
    with client.jobs.follow(job, from_token) as stream:
        show(stream)
    if not isinstance(stream.end, Done):
        raise KeyboardInterrupt
    note(speed(stream.end))
