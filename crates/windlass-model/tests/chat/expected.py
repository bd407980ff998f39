"""Writes expected.json: what `transformers` makes of the templates beside it. Run it after a change to a template.

    pip install transformers jinja2
    python expected.py [FOLDER WITH tokenizers/minimind]
"""

import datetime
import json
import pathlib
import sys

from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
NOW = datetime.datetime(2026, 11, 21, 9, 5, 7)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather of a "place" – now',
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Ort, 城市"},
                "days": {"type": "array", "items": {"type": "integer"}, "default": [1, 2.5]},
                "unit": {"type": "string", "enum": ["C", "F"], "nullable": True},
            },
            "required": ["place"],
        },
    },
}
PLAIN = [
    {"role": "user", "content": " Hello, who are you? "},
    {"role": "assistant", "content": "I am a model.\n"},
    {"role": "user", "content": "Write 'x' & <y>\n\tin 中文 🙂"},
]
SYSTEM = [{"role": "system", "content": "Be brief.\n"}] + PLAIN
THOUGHT = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6", "reasoning_content": "Easy too."},
]
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"place": "Zürich", "days": [1], "deep": {"x": None, "y": 1.0}}},
}
CALLS = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "Weather in Zürich?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "{\"sky\": \"grey\"}"},
    {"role": "assistant", "content": "Grey."},
    {"role": "user", "content": "Thanks!"},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": "b"}]}]
TWO_USERS = [PLAIN[0], PLAIN[2]]

CONVERSATIONS = {
    "plain": {"messages": PLAIN, "add_generation_prompt": True},
    "plain, no prompt": {"messages": PLAIN[:2]},
    "system": {"messages": SYSTEM, "add_generation_prompt": True},
    "thought": {"messages": THOUGHT},
    "thoughtless": {"messages": PLAIN, "add_generation_prompt": True, "variables": {"enable_thinking": False}},
    "tools": {"messages": PLAIN, "tools": [WEATHER, WEATHER], "add_generation_prompt": True},
    "calls": {"messages": CALLS, "tools": [WEATHER], "add_generation_prompt": True},
    "calls, tools outside": {
        "messages": CALLS,
        "tools": [WEATHER],
        "variables": {"tools_in_user_message": False, "date_string": "26 Jul 2024"},
    },
    "parts": {"messages": PARTS, "add_generation_prompt": True},
    "two users": {"messages": TWO_USERS},
}


def render(source, conversation):
    template = chat_template_utils._compile_jinja_template(source)
    template.globals["strftime_now"] = NOW.strftime
    return template.render(
        messages=conversation["messages"],
        tools=conversation.get("tools"),
        documents=None,
        add_generation_prompt=conversation.get("add_generation_prompt", False),
        **TOKENS,
        **conversation.get("variables", {}),
    )


def main():
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted((HERE / "templates").iterdir())}
    if len(sys.argv) > 1:
        config = pathlib.Path(sys.argv[1]) / "tokenizers/minimind/tokenizer_config.json"
        sources["minimind"] = json.loads(config.read_text(encoding="utf-8"))["chat_template"]
    cases = []
    for name, source in sources.items():
        for title, conversation in CONVERSATIONS.items():
            case = {"template": name, "conversation": title}
            try:
                case["text"] = render(source, conversation)
            except Exception as error:
                refused = type(error).__name__ == "TemplateError"
                case["refused" if refused else "fails"] = str(error)
            cases.append(case)
    data = {"tokens": TOKENS, "conversations": CONVERSATIONS, "cases": cases}
    (HERE / "expected.json").write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


main()
