"""From the mean of a text's hidden states to its embedding."""

import numpy as np


def normalised(mean: bytes) -> bytes | None:
    """[hidden] float32 little-endian, scaled to length 1; None where there is no such vector."""
    values = np.frombuffer(mean, dtype="<f4").astype(np.float64)
    length = np.sqrt((values * values).sum())
    if not np.isfinite(length) or length == 0:
        return None
    vector: bytes = (values / length).astype("<f4").tobytes()
    return vector
