"""A comparison as a picture: the error after each layer."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from shared.errors import ConfigError
from worker.compare.measures import Comparison

_MARKERS = "osD^v"


def plot(result: Comparison, path: Path) -> None:
    """Write a PNG. Raises ConfigError if the file cannot be written."""
    mpl.use("Agg")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    layers = len(result.precisions[0].layer_errors)
    at = range(1, layers + 2)
    # Zero has no place on a logarithmic scale.
    lines = [
        [error if error > 0 else float("nan") for error in (*p.layer_errors, p.logits_error)]
        for p in result.precisions
    ]
    for i, (precision, errors) in enumerate(zip(result.precisions, lines, strict=True)):
        label = f"{precision.dtype} (KV {precision.kv_dtype})"
        marker = _MARKERS[i % len(_MARKERS)]
        (line,) = axes.plot(at[:-1], errors[:-1], marker=marker, markersize=5, label=label)
        axes.plot(at[-1:], errors[-1:], marker=marker, markersize=8, color=line.get_color())
    if any(error > 0 for errors in lines for error in errors):
        axes.set_yscale("log")
    shown = [*range(1, layers + 1, -(-layers // 16))]
    axes.set_xticks([*shown, layers + 1], [*map(str, shown), "logits"])
    axes.axvline(layers + 0.5, color="gray", linewidth=0.8, linestyle=":")
    axes.set_xlim(0.5, layers + 1.5)
    axes.set_xlabel("after layer")
    axes.set_ylabel(f"relative L2 error against {result.reference.dtype}")
    axes.set_title(f"{Path(result.model).name}: error of the residual stream", fontsize=11)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error.strerror}") from None
