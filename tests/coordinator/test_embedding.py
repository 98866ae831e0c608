"""A mean of hidden states becomes a vector of length 1, or nothing."""

import numpy as np
import pytest

from coordinator.embedding import normalised


def test_a_mean_is_scaled_to_length_1() -> None:
    for factor in (1.0, 1e-30, 1e30):  # whose squares float32 cannot hold
        vector = normalised(np.array([3 * factor, -4 * factor], dtype="<f4").tobytes())
        assert vector is not None
        assert np.frombuffer(vector, dtype="<f4") == pytest.approx([0.6, -0.8])


@pytest.mark.parametrize("mean", [[1.0, np.nan], [np.inf, 1.0], [0.0, 0.0]])
def test_what_has_no_direction_has_no_vector(mean: list[float]) -> None:
    assert normalised(np.array(mean, dtype="<f4").tobytes()) is None
