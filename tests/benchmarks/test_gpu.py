"""The GPU benchmark runs end to end on the CPU, with a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scaling.random_model import random_checkpoint
from shared.config import PROJECT_ROOT


@pytest.mark.slow
def test_every_part_has_its_numbers(tmp_path: Path) -> None:
    model = random_checkpoint("tiny", tmp_path / "tiny")
    parts = ["decode", "prefill", "int8", "server", "errors", "deterministic", "transformers"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    command += ["--model", str(model), "--dtype", "bf16", "--batches", "1", "3"]
    command += [
        "--prompts",
        "32",
        "--new-tokens",
        "8",
        "--error-tokens",
        "64",
        "--story-tokens",
        "8",
    ]
    command += ["--copied-bytes", "1048576", "--kv-memory", "64M", "--parts", *parts]
    environment = {**os.environ, "TPSERVE_TEST_DEVICE": "cpu", "TRITON_INTERPRET": "0"}
    environment["OMP_NUM_THREADS"] = "1"  # other tests run beside it
    done = subprocess.run(
        command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    # Here, without Triton, it is the one part that cannot be.
    assert list(found["failures"]) == ["deterministic"], done.stderr
    assert "--deterministic needs the Triton kernels" in found["failures"]["deterministic"]
    assert done.returncode == 1
    assert [row["what"] for row in found["rows"]] == [
        "decode, batch 1",
        "decode, batch 3",
        "prefill, 32 tokens",
        "decode, int8, batch 1",
        "server, one stream",
        "server, story model, one stream",
        "transformers generate, sdpa, dynamic cache, batch 1",
        "transformers generate, sdpa, static cache, compiled, batch 1",
    ]
    assert all(row["tokens_per_s"] > 0 for row in found["rows"])
    assert 0 <= found["waiting"] < 1
    assert set(found["errors"]) == {"fp16", "bf16"}
    assert 0 < found["errors"]["fp16"]["logits"] < found["errors"]["bf16"]["logits"] < 0.1
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "| decode, batch 3 |" in text
    assert "deterministic was not measured" in text
