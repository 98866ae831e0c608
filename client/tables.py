"""Tables: drawn by rich on a terminal, plain aligned columns elsewhere."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from client.render import one_line


def write_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; without column names when they are all empty."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    named = any(columns)
    if sys.stdout.isatty():
        table = Table(title=title, title_justify="left", show_header=named)
        for column in columns:
            table.add_column(column)
        for row in cells:
            # Text: what a server calls its models must not be read as markup.
            table.add_row(*map(Text, row))
        Console().print(table)
    else:
        sys.stdout.write(f"{title}\n{_aligned([list(columns), *cells] if named else cells)}")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines with columns two spaces apart."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "".join(f"  {line}\n" for line in lines)
