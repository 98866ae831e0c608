"""langchain-openai against a real server; addresses and key come from its environment variables."""

import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI


def test_chat_whole_streamed_and_in_batches() -> None:
    chat = ChatOpenAI(model="chat", temperature=0, max_tokens=20)
    messages = [SystemMessage("Be brief."), HumanMessage("Hello!")]
    whole = chat.invoke(messages)
    assert whole.content
    assert whole.usage_metadata["output_tokens"] <= 20
    assert "".join(chunk.content for chunk in chat.stream(messages)) == whole.content
    assert len(chat.batch(["Hello!", "Good morning!"])) == 2


def test_stories() -> None:
    story = OpenAI(model="story", temperature=0, max_tokens=10)
    assert story.invoke("Once upon a time")
    assert "".join(story.stream("Once upon a time")) == story.invoke("Once upon a time")


def test_errors_are_those_of_the_sdk() -> None:
    with pytest.raises(openai.NotFoundError):
        ChatOpenAI(model="none").invoke("Hello!")
