"""Talks to `windlass serve` with the clients that people have: openai, anthropic, Prometheus' parser.

Usage: clients.py WINDLASS MODEL. Starts the server itself; exits with 1 when something is not as the clients want it.
"""

import math
import sys
import threading
import time
import urllib.request
from typing import Literal

import anthropic
import openai
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict, Field

from server import KEY, running

MESSAGES = [{"role": "user", "content": "Once there was one."}]


class Place(BaseModel):
    """The same without numbers."""

    city: Literal["Oslo", "Rome"]


class Trip(BaseModel):
    """What an answer must look like."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


TOOL = {
    "type": "function",
    "function": {"name": "book", "description": "Books a trip.", "parameters": Trip.model_json_schema()},
}


def metrics(url: str) -> dict[str, float]:
    """All samples without labels of their own, by name."""
    request = urllib.request.Request(url + "/metrics", headers={"Authorization": "Bearer " + KEY})
    text = urllib.request.urlopen(request).read().decode()
    families = list(text_string_to_metric_families(text))
    assert len(families) > 20, text
    return {sample.name: sample.value for family in families for sample in family.samples}


def chat(client: openai.OpenAI) -> None:
    """Whole and streamed answers are the same."""
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "seed": 3, "temperature": 0.9}
    whole = client.chat.completions.create(**asked)
    assert whole.usage.completion_tokens <= 20 and whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content, (streamed, whole)
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    two = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=4)
    assert two.choices[0].message.content == whole.choices[0].message.content
    assert all(len(entry.top_logprobs) == 4 for entry in two.choices[1].logprobs.content)


def tools(client: openai.OpenAI) -> None:
    """Calls have the arguments that their schema allows, whole and streamed, one or several."""
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 400, "tools": [TOOL], "seed": 1}
    named = {"type": "function", "function": {"name": "book"}}
    answer = client.chat.completions.create(**asked, tool_choice=named, parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and call.function.name == "book", answer
    Trip.model_validate_json(call.function.arguments)
    with client.chat.completions.stream(**asked, tool_choice=named, parallel_tool_calls=False) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in events, events
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    required = client.chat.completions.create(**asked, tool_choice="required")
    assert len(required.choices[0].message.tool_calls) >= 1
    history = [*MESSAGES, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "booked"}]
    client.chat.completions.create(model="tiny", messages=history, tools=[TOOL], max_tokens=5)


def forms(client: openai.OpenAI) -> None:
    """`parse` gives objects of the class."""
    parsed = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Trip, max_tokens=200, seed=1)
    assert isinstance(parsed.choices[0].message.parsed, Trip), parsed
    response = client.responses.parse(model="tiny", input="Where to?", text_format=Trip, max_output_tokens=200, temperature=0)
    assert isinstance(response.output_parsed, Trip), response
    tool = openai.pydantic_function_tool(Trip, name="book")
    asked = {"model": "tiny", "messages": MESSAGES, "tools": [tool], "max_tokens": 400, "seed": 1}
    parsed = client.chat.completions.parse(**asked, tool_choice="required", parallel_tool_calls=False)
    assert all(isinstance(call.function.parsed_arguments, Trip) for call in parsed.choices[0].message.tool_calls)


def completions(client: openai.OpenAI) -> None:
    """Prompts are echoed and scored."""
    answer = client.completions.create(model="tiny", prompt="Once there was", echo=True, logprobs=2, max_tokens=4)
    choice = answer.choices[0]
    assert choice.text.startswith("Once there was"), choice
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) == len(choice.logprobs.text_offset)
    chunks = client.completions.create(model="tiny", prompt=["Once", "There"], max_tokens=6, stream=True)
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}


def embeddings(client: openai.OpenAI) -> None:
    """Vectors have length 1, in both encodings."""
    both = client.embeddings.create(model="tiny", input=["Once", "there was one"])
    floats = client.embeddings.create(model="tiny", input="Once", encoding_format="float")
    for one, other in zip(both.data[0].embedding, floats.data[0].embedding, strict=True):
        assert math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-7)
    assert math.isclose(sum(x * x for x in both.data[1].embedding), 1, rel_tol=1e-4)
    short = client.embeddings.create(model="tiny", input="Once", dimensions=4)
    assert len(short.data[0].embedding) == 4


def responses(client: openai.OpenAI) -> None:
    """The newer API, whole and streamed."""
    asked = {"model": "tiny", "input": "Once there was one.", "max_output_tokens": 20, "temperature": 0}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == whole.output_text, (text, whole)
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens


def errors(client: openai.OpenAI) -> None:
    """Errors become the client's own, and none of these is tried again."""
    for refused, kind in [
        (lambda: client.chat.completions.create(model="other", messages=MESSAGES), openai.NotFoundError),
        (lambda: client.chat.completions.create(model="tiny", messages=[]), openai.BadRequestError),
        (lambda: client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"unheard_of": 1}), openai.BadRequestError),
        (lambda: client.completions.create(model="tiny", prompt="x", suffix="y"), openai.BadRequestError),
        (lambda: client.with_options(api_key="wrong").models.list(), openai.AuthenticationError),
    ]:
        try:
            refused()
        except kind as error:
            assert error.body["message"], error
            assert error.response.headers["x-request-id"].startswith("req_")
        else:
            sys.exit(f"{kind.__name__} was expected")
    try:
        client.completions.create(model="tiny", prompt="x", suffix="y")
    except openai.BadRequestError as error:
        assert error.param == "suffix", error


def aborted(url: str, client: openai.OpenAI) -> None:
    """A stream that is closed early stops computing."""
    stream = client.completions.create(model="tiny", prompt="Once", max_tokens=200, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 10
    while metrics(url)["windlass:num_requests_running"] > 0 or metrics(url)["windlass:kv_cache_blocks_used"] > 0:
        assert time.monotonic() < deadline, metrics(url)
        time.sleep(0.05)


def claude(url: str) -> None:
    """Anthropic's client: whole, streamed, tools, counting, errors."""
    client = anthropic.Anthropic(base_url=url, api_key=KEY)
    asked = {"model": "tiny", "max_tokens": 20, "messages": MESSAGES, "system": "Be brief.", "extra_body": {"temperature": 0}}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text, (text, whole)
    assert final.usage.output_tokens == whole.usage.output_tokens
    counted = client.messages.count_tokens(model="tiny", messages=MESSAGES, system="Be brief.")
    assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    tool = {"name": "book", "description": "Books a trip.", "input_schema": Trip.model_json_schema()}
    choice = {"type": "tool", "name": "book", "disable_parallel_tool_use": True}
    asked = {"model": "tiny", "max_tokens": 400, "messages": MESSAGES, "tools": [tool], "tool_choice": choice}
    called = client.messages.create(**asked)
    assert called.stop_reason == "tool_use"
    Trip.model_validate(called.content[0].input)
    with client.messages.stream(**asked) as stream:
        Trip.model_validate(stream.get_final_message().content[0].input)
    # This client takes limits of numbers out of schemas.
    with client.messages.stream(model="tiny", max_tokens=200, messages=MESSAGES, output_format=Place) as stream:
        assert isinstance(stream.get_final_message().parsed_output, Place)
    try:
        client.messages.create(model="other", max_tokens=1, messages=MESSAGES)
    except anthropic.NotFoundError as error:
        assert error.body["error"]["type"] == "not_found_error"
    else:
        sys.exit("a model that is not there was found")


def many(client: openai.OpenAI) -> None:
    """What runs beside a request changes nothing about it."""
    asked = {"model": "tiny", "prompt": "Once there was", "max_tokens": 30, "seed": 9}
    alone = client.completions.create(**asked).choices[0].text
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(client.completions.create(**asked).choices[0].text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [alone] * 8, texts


def main() -> None:
    with running(sys.argv[1], sys.argv[2], KEY) as url:
        client = openai.OpenAI(base_url=url + "/v1", api_key=KEY)
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "windlass"
        for check in [chat, tools, forms, completions, embeddings, responses, many]:
            check(client)
            print(f"{check.__name__}: as the openai client {openai.__version__} has it")
        errors(client)
        aborted(url, client)
        claude(url)
        print(f"messages: as the anthropic client {anthropic.__version__} has it")
        assert metrics(url)["windlass:generation_tokens_total"] > 0


if __name__ == "__main__":
    main()
