"""The `llm` command against a real server, configured as docs/clients.md says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LLM = str(Path(sys.executable).parent / "llm")
MODELS = """\
- model_id: tp-chat
  model_name: chat
  api_base: {url}
  api_key_name: tpserve
- model_id: tp-story
  model_name: story
  api_base: {url}
  api_key_name: tpserve
  completion: true
"""


@pytest.fixture
def user_path(tmp_path: Path) -> Path:
    url = os.environ["OPENAI_BASE_URL"]
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(url=url))
    llm(tmp_path, "keys", "set", "tpserve", "--value", os.environ["OPENAI_API_KEY"])
    return tmp_path


def llm(user_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        [LLM, *arguments],
        env={**os.environ, "LLM_USER_PATH": str(user_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in run.stderr
    return run


@pytest.mark.parametrize("model", ["tp-chat", "tp-story"])
def test_a_prompt_streamed_and_not(user_path: Path, model: str) -> None:
    options = ("-m", model, "-o", "max_tokens", "20", "-o", "temperature", "0")
    streamed = llm(user_path, "prompt", "Hello", *options)
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout.strip()
    assert llm(user_path, "prompt", "Hello", "--no-stream", *options).stdout == streamed.stdout


def test_a_conversation_goes_on(user_path: Path) -> None:
    options = ("-o", "max_tokens", "20")
    assert llm(user_path, "prompt", "Hello!", "-m", "tp-chat", *options).returncode == 0
    again = llm(user_path, "prompt", "And then?", "--continue", *options)
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip()


def test_an_error_is_shown(user_path: Path) -> None:
    refused = llm(user_path, "prompt", "Hello", "-m", "tp-chat", "-o", "temperature", "2")
    assert refused.returncode == 0  # the most that llm takes; the server takes it, too
    long = llm(user_path, "prompt", "x " * 5000, "-m", "tp-chat")
    assert long.returncode == 1
    assert "tokens" in long.stderr
