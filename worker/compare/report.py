"""A comparison for people: lines of context and a Markdown table."""

from collections.abc import Sequence

from worker.compare.measures import Comparison


def report(result: Comparison) -> str:
    """Columns are the precisions; the reference comes first where it has a value of its own."""
    reference, precisions = result.reference, result.precisions
    most = result.continued_tokens
    rows = [
        ["", f"{reference.dtype} (reference)", *(p.dtype for p in precisions)],
        ["keys and values", reference.kv_dtype, *(p.kv_dtype for p in precisions)],
        *(
            [f"error after layer {i + 1}", "", *(f"{p.layer_errors[i]:.1e}" for p in precisions)]
            for i in range(len(precisions[0].layer_errors))
        ),
        ["error of the logits", "", *(f"{p.logits_error:.1e}" for p in precisions)],
        ["same most probable token", "", *(f"{p.greedy_agreement:.2%}" for p in precisions)],
        [
            f"greedy tokens until they differ, of {most}",
            "",
            *(" ".join(map(str, p.equal_tokens)) for p in precisions),
        ],
        [
            "perplexity",
            f"{reference.perplexity:.4f}",
            *(f"{p.perplexity:.4f}" for p in precisions),
        ],
    ]
    return f"{_context(result)}\n\n{markdown(rows)}"


def _context(result: Comparison) -> str:
    compared = "all" if result.compared_positions == result.positions else "the first"
    windows = "window" if result.windows == 1 else "windows"
    return (
        f"{result.model}, {result.kernels} kernels\n"
        f"{result.text}: {result.tokens} tokens in {result.windows} {windows} of up to"
        f" {result.window_tokens}; errors are relative L2, over {compared}"
        f" {result.compared_positions} positions"
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row names the columns, aligned for reading as it is."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
