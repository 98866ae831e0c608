"""Triton's interpreter (TRITON_INTERPRET=1), which runs kernels on the CPU, made fit for our tests."""

import os
import threading
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def repair() -> None:
    """It multiplies the bits of bfloat16 numbers as if they were integers, cuts floats off instead of rounding
    them to bfloat16, and knows of one thread only.
    """
    interpreter: Any = pytest.importorskip("triton.runtime.interpreter")
    tl: Any = pytest.importorskip("triton.language")
    create_dot = interpreter.InterpreterBuilder.create_dot
    cast = interpreter.InterpreterBuilder.cast_impl
    launch = interpreter.GridExecutor.__call__
    one_at_a_time = threading.Lock()

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        numbers = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(numbers.view("float32"), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    def rounded(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        numbers = torch.from_numpy(np.array(source.data)).to(torch.bfloat16)
        return interpreter.TensorHandle(numbers.view(torch.uint16).numpy(), tl.bfloat16)

    def launch_alone(self: Any, *args: Any, **kwargs: Any) -> None:
        with one_at_a_time:
            launch(self, *args, **kwargs)

    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.cast_impl = rounded
    interpreter.GridExecutor.__call__ = launch_alone
