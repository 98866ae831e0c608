"""`tpserve show`: what a model folder is, without a server."""

import argparse
from typing import Any

from client.commands.common import write_json
from client.tables import write_table
from shared.hub import resolve_model
from shared.hub_progress import readable_bytes
from shared.model_summary import ModelSummary, summarise


def run(args: argparse.Namespace) -> int:
    """Print a table, or one object."""
    summary = summarise(resolve_model(args.spec, offline=True))
    if args.json:
        write_json(summary)
        return 0
    rows = [[name, text] for name, text in _lines(summary).items() if text]
    write_table(args.spec, ["", ""], rows)
    files = [[file.name, readable_bytes(file.size_bytes)] for file in summary.files]
    write_table("files", ["name", "size"], files)
    return 0


def _lines(summary: ModelSummary) -> dict[str, str]:
    """Empty where the files do not say."""
    heads = _text(summary.num_heads)
    if summary.num_kv_heads:
        heads += f", {summary.num_kv_heads} of keys and values"
    if summary.head_dim:
        heads += f", {summary.head_dim} wide"
    return {
        "folder": summary.path,
        "architecture": _text(summary.model_type),
        "not supported": "; ".join(summary.problems),
        "parameters": f"{summary.parameters:,}" if summary.parameters else "",
        "dtype": _text(summary.dtype),
        "context": f"{summary.max_positions:,} tokens" if summary.max_positions else "",
        "vocabulary": f"{summary.vocab_size:,}" if summary.vocab_size else "",
        "layers": _text(summary.num_layers),
        "width": _text(summary.hidden_size),
        "MLP width": _text(summary.intermediate_size),
        "heads": heads,
        "sliding window": _text(summary.sliding_window),
        "positions": ", ".join(f"{name} {_value(v)}" for name, v in summary.rope.items()),
        "tokenizer": summary.tokenizer or "missing",
        "chat template": "yes" if summary.has_chat_template else "no",
        "sampling": ", ".join(f"{name} {_value(v)}" for name, v in summary.sampling.items()),
        "size": readable_bytes(sum(file.size_bytes for file in summary.files)),
    }


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
