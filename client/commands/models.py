"""`tpserve models`: what is loaded."""

import argparse
from collections.abc import Sequence

from client.commands.common import connect, write_json
from client.tables import write_table
from shared.messages import ModelInfo


def run(args: argparse.Namespace) -> int:
    """Print a row, or an object, for each model."""
    with connect(args) as client:
        models = client.models()
    if args.json:
        write_json(models)
    else:
        write_table("models", *model_rows(models))
    return 0


def model_rows(models: Sequence[ModelInfo]) -> tuple[list[str], list[list[str]]]:
    """Column names and a row for each model."""
    columns = ["name", "state", "type", "dtype", "KV", "parameters", "memory MB"]
    columns += ["context", "vocabulary", "chat", "path"]
    rows = [
        [
            model.name,
            model.state,
            model.model_type,
            model.dtype,
            model.kv_dtype,
            f"{model.parameters:,}",
            f"{(sum(model.weight_bytes) + sum(model.kv_bytes)) / 1e6:,.0f}",
            str(model.max_model_len),
            str(model.vocab_size),
            "yes" if model.has_chat_template else "no",
            model.path,
        ]
        for model in models
    ]
    return columns, rows
