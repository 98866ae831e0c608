"""What `tpserve compare` says of a precision, against transformers and against itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from shared.messages import KVPrecision, Precision
from shared.model_config import read_model_config
from shared.worker_messages import SequenceStep
from tests.worker.forward import GREEDY, loaded, relative
from tests.worker.rank_threads import run_ranks
from worker.comm.base import Communicator, Floats
from worker.compare import observe as observing
from worker.compare.__main__ import main
from worker.compare.measures import Difference, difference, perplexity
from worker.compare.observe import LocalModel, Observed, observe
from worker.compare.text import BUNDLED, LEAST_TOKENS, PROMPTS, Text, read_text
from worker.native.api import Pool, native_library

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4

needs_native = pytest.mark.skipif(
    native_library() is None, reason="there is no native library: no C++ compiler to build it"
)


@pytest.fixture
def kernels(host_kernels: str) -> str:
    """Comparisons are computed on the CPU."""
    return host_kernels


def pool_of(kernels: str) -> Pool | None:
    library = native_library() if kernels == "native" else None
    return None if library is None else Pool(library, 1, crowded=False)


@pytest.fixture(scope="module")
def text(story_model: Path) -> Text:
    return read_text(story_model, read_model_config(story_model))


@pytest.fixture(scope="module")
def transformers_model(story_model: Path) -> Any:
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    return from_pretrained(story_model, dtype=torch.float32).eval()


def compare(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """The command, as a user runs it."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TPSERVE_")}
    return subprocess.run(
        [sys.executable, "-m", "client.cli", "compare", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), **env},
        check=False,
    )


# --- what is observed -----------------------------------------------------------------------------


def test_the_bundled_text_takes_more_than_one_window(text: Text, story_model: Path) -> None:
    config = read_model_config(story_model)
    assert len(text.windows) == 2
    assert all(window[0] == config.bos_id for window in text.windows)
    assert max(map(len, text.windows)) == config.max_positions
    assert text.positions == text.tokens + 2
    assert len(set(text.prompts)) == PROMPTS


def test_layers_logits_and_perplexity_equal_transformers(
    text: Text, story_model: Path, transformers_model: Any, kernels: str
) -> None:
    ours = observe(story_model, "fp32", "fp32", text, pool_of(kernels))
    layers: list[list[Floats]] = []
    logits: list[Floats] = []
    losses: list[torch.Tensor] = []
    for window in text.windows:
        ids = torch.tensor([window])
        with torch.inference_mode():
            theirs = transformers_model(ids, output_hidden_states=True)
        # The last of them is normed already: what is observed is to become the same.
        layers.append([state[0].numpy() for state in theirs.hidden_states[1:]])
        logits.append(theirs.logits[0].numpy())
        predicted = theirs.logits[0, :-1].double().log_softmax(-1)
        losses.append(-predicted.gather(1, ids[0, 1:, None])[:, 0])
    for layer in range(len(layers[0])):
        stream = torch.from_numpy(ours.layers[layer])
        if layer == len(layers[0]) - 1:
            with torch.inference_mode():
                stream = transformers_model.model.norm(stream)
        expected = np.concatenate([of_window[layer] for of_window in layers])
        assert relative(stream.numpy(), expected) < TOLERANCE, layer
    all_logits = np.concatenate(logits)
    assert relative(ours.logits, all_logits) < TOLERANCE
    assert np.mean(ours.best == all_logits.argmax(1)) > 0.99  # but for ties within rounding
    expected_perplexity = torch.cat(losses).mean().exp().item()
    assert perplexity(ours) == pytest.approx(expected_perplexity, rel=1e-3)


def test_layers_are_seen_with_their_biases(tmp_path: Path, kernels: str) -> None:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=72,  # not whole groups: buffers are wider than what is observed
        intermediate_size=200,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.1,
        attention_bias=True,
        mlp_bias=True,
    )
    torch.manual_seed(1)
    from_config: Any = AutoModelForCausalLM.from_config
    theirs = from_config(config, dtype=torch.float32).eval()
    with torch.inference_mode():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(3, 100, (50,)).tolist()
    with torch.inference_mode():
        states = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states[1:]
    text = Text("ids", 50, (tuple(ids),), (tuple(ids[:16]),), 1)
    model = LocalModel(tmp_path, "fp32", "fp32", pool_of(kernels), text)
    first, _, _ = model.forward(ids[:33], 0)
    rest, _, _ = model.forward(ids[33:], 33)
    streams = [torch.from_numpy(np.concatenate(pair)) for pair in zip(first, rest, strict=True)]
    with torch.inference_mode():
        streams[-1] = theirs.model.norm(streams[-1])
    assert len(streams) == 3
    for stream, state in zip(streams, states, strict=True):
        assert relative(stream.numpy(), state[0].numpy()) < TOLERANCE


def test_continuations_are_those_of_transformers(
    text: Text, story_model: Path, transformers_model: Any, kernels: str
) -> None:
    ours = observe(story_model, "fp32", "fp32", text, pool_of(kernels)).continuations
    for prompt, continuation in zip(text.prompts, ours, strict=True):
        ids = list(prompt)
        for _ in range(text.new_tokens):
            with torch.inference_mode():
                ids.append(int(transformers_model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert continuation.tolist() == ids[len(prompt) :]


def test_observing_changes_no_result(story_model: Path, kernels: str, text: Text) -> None:
    ids = list(text.windows[0][:100])
    table = np.arange(40, dtype="<i4").tobytes()
    observed = observe(story_model, "fp32", "fp32", text, pool_of(kernels))

    def job(comm: Communicator, owned: list[range]) -> None:
        model = loaded(story_model, comm, owned, kernels)
        step = SequenceStep(0, 0, ids, table, GREEDY)
        alone = model.ops.run([step], model.last_tokens).logits.copy()
        every = model.ops.run([step], model.last_tokens, every_token=True).logits
        assert every.shape == (100, alone.shape[1])
        if kernels == "native":
            assert np.array_equal(every[-1:], alone)
            assert np.array_equal(every, observed.logits[:100])
        else:  # torch picks kernels by shape
            assert relative(every[-1:], alone) < TOLERANCE
            assert relative(every, observed.logits[:100]) < TOLERANCE

    run_ranks(1, job)


def test_what_does_not_fit_is_not_kept(
    text: Text, story_model: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = observe(story_model, "fp32", "fp32", text, pool_of(kernels))
    floats = 2 * 128 + 2048  # of a position: two layers of 128, 2048 logits
    monkeypatch.setattr(observing, "KEPT_BYTES", 4 * floats * 150)
    part = observe(story_model, "fp32", "fp32", text, pool_of(kernels))
    assert part.layers.shape == (2, 150, 128)
    assert np.array_equal(part.layers, whole.layers[:, :150])
    assert np.array_equal(part.logits, whole.logits[:150])
    assert np.array_equal(part.best, whole.best)
    assert np.array_equal(part.log_probabilities, whole.log_probabilities)


# --- what is measured -----------------------------------------------------------------------------


def test_a_precision_equals_itself(text: Text, story_model: Path, kernels: str) -> None:
    pool = pool_of(kernels)
    first, second = (observe(story_model, "fp32", "fp32", text, pool) for _ in range(2))
    measured = difference(first, second, "fp32", "fp32")
    assert measured == Difference(
        dtype="fp32",
        kv_dtype="fp32",
        layer_errors=[0.0, 0.0],
        logits_error=0.0,
        greedy_agreement=1.0,
        equal_tokens=[text.new_tokens] * PROMPTS,
        perplexity=perplexity(second),
    )


@pytest.fixture(scope="module")
def exact(text: Text, story_model: Path) -> Observed:
    return observe(story_model, "fp32", "fp32", text, pool_of("native"))


def measured(
    exact: Observed, text: Text, folder: Path, dtype: Precision, kv_dtype: KVPrecision, kernels: str
) -> Difference:
    ours = observe(folder, dtype, kv_dtype, text, pool_of(kernels))
    return difference(ours, exact, dtype, kv_dtype)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_are_close(
    dtype: Any, exact: Observed, text: Text, story_model: Path, kernels: str
) -> None:
    found = measured(exact, text, story_model, dtype, dtype, kernels)
    assert 0 < found.logits_error < 1e-2
    assert all(0 < error < 1e-2 for error in found.layer_errors)
    assert found.greedy_agreement > 0.98
    assert found.perplexity == pytest.approx(perplexity(exact), rel=2e-3)


@needs_native
def test_eight_bits_are_close_and_four_are_not_far(
    exact: Observed, text: Text, story_model: Path
) -> None:
    eight = measured(exact, text, story_model, "int8", "bf16", "native")
    four = measured(exact, text, story_model, "int4", "bf16", "native")
    assert 0 < eight.logits_error < 2e-2
    assert eight.perplexity == pytest.approx(perplexity(exact), rel=1e-2)
    assert 2e-2 < four.logits_error < 0.3
    assert four.greedy_agreement < eight.greedy_agreement
    assert sum(four.equal_tokens) < sum(eight.equal_tokens)


@needs_native
def test_the_kv_cache_can_be_measured_by_itself(
    exact: Observed, text: Text, story_model: Path
) -> None:
    found = measured(exact, text, story_model, "fp32", "int8", "native")
    assert 0 < found.logits_error < 2e-2


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_a_table(story_model: Path) -> None:
    done = compare(str(story_model), "--dtype", "bf16", "--dtype", "fp16", "--threads", "1")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[1].startswith("bundled stories: 643 tokens in 2 windows of up to 512;")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[3:]]
    assert table[0] == ["", "fp32 (reference)", "bf16", "fp16"]
    assert [row[0] for row in table[2:]] == [
        "keys and values",
        "error after layer 1",
        "error after layer 2",
        "error of the logits",
        "same most probable token",
        "greedy tokens until they differ, of 40",
        "perplexity",
    ]
    assert all(len(row) == 4 and row[2] and row[3] for row in table[1:])


def test_the_command_prints_json_and_draws(story_model: Path, tmp_path: Path) -> None:
    picture, story = tmp_path / "errors.png", tmp_path / "story.txt"
    story.write_text(BUNDLED.read_text(encoding="utf-8") * 2, encoding="utf-8")
    flags = ["--dtype", "fp32", "--dtype", "bf16", "--dtype", "fp32", "--threads", "1"]
    text = ["--text", str(story), "--max-tokens", "700"]
    done = compare(str(story_model), *flags, *text, "--json", "--plot", str(picture))
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert (result["tokens"], result["windows"], result["text"]) == (700, 2, str(story))
    same, other = result["precisions"]
    assert same["logits_error"] == 0
    assert same["perplexity"] == result["reference"]["perplexity"]
    assert other["dtype"] == other["kv_dtype"] == "bf16"
    assert len(other["layer_errors"]) == 2
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size > 10_000


def test_equal_precisions_can_be_drawn(story_model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "errors.png"
    flags = ["--dtype", "fp32", "--max-tokens", "20", "--plot", str(picture)]
    done = compare(str(story_model), *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_mistakes_are_named(
    story_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, short, binary = str(story_model), tmp_path / "short.txt", tmp_path / "binary"
    short.write_text("Once upon a time")
    binary.write_bytes(b"Once \xff")
    least = f"at least {LEAST_TOKENS}"
    for arguments, words in (
        ([str(tmp_path / "none")], ["none", "neither a folder nor"]),
        ([str(tmp_path)], ["config.json is missing"]),
        ([model, "--text", str(short)], [f"{short} has 5 tokens", least, "--text"]),
        ([model, "--text", str(binary)], [f"--text {binary} is not UTF-8 (byte 5)"]),
        ([model, "--text", str(tmp_path / "no.txt")], ["no.txt cannot be read: No such file"]),
        ([model, "--max-tokens", "3"], ["--max-tokens is 3", least]),
        ([model, "--plot", str(tmp_path / "no" / "x.png")], ["--plot", "there is no folder"]),
    ):
        monkeypatch.setattr(sys, "argv", ["compare", *arguments, "--dtype", "bf16"])
        assert main() == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("tpserve compare: error: ")
        assert printed.err.count("\n") == 1
        for word in words:
            assert word in printed.err


def test_usage_errors_exit_with_2(
    story_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, word in (
        ([], "--dtype"),
        (["--dtype", "int7"], "'int7' (choose from"),
        (["--dtype", "bf16", "--kv-dtype", "int4"], "'int4' (choose from"),
        (["--dtype", "bf16", "--threads", "0"], "0 is not a number between 1 and 1024"),
        (["--dtype", "bf16", "--threads", "all"], "all is not a number between 1 and 1024"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare", str(story_model), *arguments])
        with pytest.raises(SystemExit, match=r"^2$"):
            main()
        assert word in capsys.readouterr().err


def test_torch_refuses_what_it_cannot_compute(story_model: Path) -> None:
    done = compare(str(story_model), "--dtype", "int8", TPSERVE_KERNELS="torch")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--dtype int8 needs the native kernels" in done.stderr
