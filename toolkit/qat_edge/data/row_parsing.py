"""Check the records of a file or data set and make rows of them.

Every key of a record is used, refused with an explanation, or counted as unused (`unused_keys`), which `load_rows`
reports. Keys of messages are passed on: only the chat template decides which of them it uses (`data.conversation`).
"""

from __future__ import annotations

from types import NoneType
from typing import Any

from qat_edge.data.rows import EXPECTED, REASONING, WEIGHT, Chat, Completion, Message, Pair, Row, Text, is_trained
from qat_edge.errors import DataError
from qat_edge.readers import parse_json, shorten, show

# Keys of each shape. The first key that a record has decides its shape, in this order.
CHAT_KEYS = ("messages", "tools", "documents", "chat_template_kwargs")
SHARE_GPT = "conversations"  # {"from": "human", "value": "Hi"} in place of messages
COMPLETION_KEYS = ("prompt", "completion")
TEXT_KEYS = ("text", "text_pair", "label")
SCORED_KEYS = ("text_a", "text_b", "score")
MATCHING_KEYS = ("anchor", "positive")

# Roles of ShareGPT, and the names that chat templates have for them.
SHARE_GPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "tool": "tool", "observation": "tool",
}  # fmt: skip

# Roles that have a meaning here, and other names of them: under those, an answer would have no loss.
ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
PART_KEYS = ("type", "text", "cache_control")  # of a part of content; the last is about a vendor's cache

# Keys of a row, in every shape, that weight its loss.
ROW_WEIGHTS = ("weight", "weights", "sample_weight", "loss_weight")
# Keys next to 'messages' whose meaning would be lost, and what to write instead.
CHAT_HINTS = {
    "functions": 'List the functions in \'tools\', each as {"type": "function", "function": {...}}.',
    "function_call": "Write calls as 'tool_calls' of the assistant's message.",
    "system": "Make it the first of the 'messages', with the role 'system'.",
}
# Keys of what models for text cannot be trained on, next to 'messages' and in one of them.
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")
_LOSS_HINT = 'Write "weight": 0 on a message of the assistant without loss, and remove the key from the others.'
MESSAGE_HINTS = {
    **dict.fromkeys(("train", "train_detail", "training_detail", "loss", "loss_scale", "mask"), _LOSS_HINT),
    "function_call": 'Write it as \'tool_calls\': [{"type": "function", "function": {"name": ..., "arguments": ...}}].',
}
# Further shapes that people have, and what to write instead.
OTHER_SHAPES = {
    ("chosen", "rejected"): "Preference rows are for DPO and similar methods. To train on the chosen answer, write it "
    "as 'messages', or as 'prompt' and 'completion'.",
    ("instruction", "output"): "Alpaca rows: write them as 'messages', or 'instruction' and 'input' as 'prompt' and "
    "'output' as 'completion'.",
    ("question", "answer"): "Write them as 'messages' of the user and the assistant, or as 'prompt' and 'completion'.",
}


def parse_row(record: Any, where: str) -> Row:
    """Check a record and return the row of its shape; absent and null are the same.

    Args:
        record: A row as parsed.
        where: File and line, for error messages.

    Raises:
        DataError: The record has none of the shapes, or a value of the wrong type.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with {EXPECTED}, found {type_name(record)}.")
    # Columns of a table exist in every row, so null has to count as absent.
    given = {str(key): value for key, value in record.items() if value is not None}

    for key in ROW_WEIGHTS:
        if key in given and str(given[key]) not in ("1", "1.0"):
            raise DataError(
                f"{where}: '{key}' is {shorten(given[key])}, and all rows have the same weight. Remove the key; to "
                "train on a row more often, repeat the row."
            )

    # For text generation.
    if "messages" in given or SHARE_GPT in given:
        return _chat(given, where)
    if "prompt" in given and "completion" in given:
        return _completion(given, where)
    # For both: a label makes the text a classifier's.
    if "text" in given:
        pair = _string(given, "text_pair", where) if "text_pair" in given else None
        return Text(_string(given, "text", where), where, given.get("label"), pair)
    # For sentence encoders.
    if "text_a" in given and "text_b" in given:
        return Pair(_string(given, "text_a", where), _string(given, "text_b", where), _score(given, where), where)
    if "anchor" in given and "positive" in given:
        return Pair(_string(given, "anchor", where), _string(given, "positive", where), None, where)

    found = ", ".join(f"'{key}'" for key in given) or "none"
    hint = next((text for keys, text in OTHER_SHAPES.items() if given.keys() >= set(keys)), "")
    raise DataError(f"{where}: keys found: {found}; expected {EXPECTED}. {hint or 'Rename the keys of the rows.'}")


def unused_keys(record: dict[str, Any], row: Row) -> list[str]:
    """Return the keys of a record that its row does not use; null counts as absent."""
    if isinstance(row, Chat):
        used: tuple[str, ...] = CHAT_KEYS if record.get("messages") is not None else (SHARE_GPT, *CHAT_KEYS)
    elif isinstance(row, Completion):
        used = COMPLETION_KEYS
    elif isinstance(row, Text):
        used = TEXT_KEYS
    else:
        used = MATCHING_KEYS if row.score is None else SCORED_KEYS
    return [str(key) for key, value in record.items() if value is not None and key not in used]


def without_nulls(value: Any) -> Any:
    """Return a value without keys that are null, at any depth.

    In Arrow tables, which Parquet files and data sets are, every object of a column has the keys of all of them.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def type_name(value: Any) -> str:
    """Name the JSON type of a value, for messages."""
    if value is None:
        return "nothing"
    # Before numbers: bool is a subclass of int.
    if isinstance(value, bool):
        return "true or false"
    if value in ([], {}):
        return f"an empty {'list' if value == [] else 'object'}"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


# --- shapes ------------------------------------------------------------------------------------------------


def _chat(given: dict[str, Any], where: str) -> Chat:
    """Return a conversation, with its tools and arguments of the chat template."""
    for key, hint in CHAT_HINTS.items():
        if key in given:
            raise DataError(f"{where}: '{key}' next to 'messages' would be lost. {hint}")
    _require_no_media(given, where)

    # Tables without nested columns have these as JSON text.
    key = "messages" if "messages" in given else SHARE_GPT
    given = {
        name: _parsed(value, name, where) if name in (*CHAT_KEYS, SHARE_GPT) else value for name, value in given.items()
    }
    value = given[key] if key == "messages" else _from_share_gpt(given[key], where)
    arguments = given.get("chat_template_kwargs", {})
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: 'chat_template_kwargs' must be an object, found {type_name(arguments)}.")
    documents = _objects(given, "documents", where)
    return Chat(_messages(value, where), where, _tools(given, where), documents, arguments)


def _completion(given: dict[str, Any], where: str) -> Completion:
    """Return a prompt and its completion."""
    if isinstance(given["prompt"], list) and isinstance(given["completion"], list):
        raise DataError(
            f"{where}: 'prompt' and 'completion' are lists of messages. Join them into one list, 'messages'; "
            '"weight": 0 on an assistant\'s message leaves it without loss.'
        )
    if "label" in given:
        raise DataError(
            f"{where}: 'label' next to 'prompt' and 'completion' is of preference rows (KTO), which are not "
            "supported. Keep the rows with good completions, and remove 'label' from them."
        )
    completion = _string(given, "completion", where)
    if not completion:
        raise DataError(f"{where}: 'completion' is empty, so there is nothing to train on. Remove the row.")
    return Completion(_string(given, "prompt", where), completion, where)


def _score(record: dict[str, Any], where: str) -> float:
    """Return the score of a pair as a number, and check its range."""
    # A missing score is None, which is no number either.
    value = record.get("score")
    try:
        score = float(str(value))  # the values of a .csv are strings
    except ValueError as error:
        raise DataError(f"{where}: 'score' must be a number, found {type_name(value)}.") from error
    if isinstance(value, bool) or not -1 <= score <= 1:
        raise DataError(f"{where}: 'score' is {value}; a cosine is between -1 and 1. Divide scores of 0 to 5 by 5.")
    return score


# --- conversations -----------------------------------------------------------------------------------------


def _messages(value: Any, where: str) -> list[Message]:
    """Check the messages of a conversation, and that an assistant message has something to train on."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages' must be a list of {{role, content}}, found {type_name(value)}.")
    messages = [_message(message, where, number) for number, message in enumerate(value, start=1)]

    # Mistakes that need different corrections: no assistant at all, one that says nothing, one without weight.
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(f"{where}: no message of role 'assistant', so there is nothing to train on; roles: {roles}.")
    if all(map(_is_empty, answers)):
        raise DataError(f"{where}: the assistant's message is empty, so there is nothing to train on.")
    if all(m.get(WEIGHT, 1) == 0 for m in answers):
        raise DataError(
            f"{where}: every message of the assistant has the weight 0, so there is nothing to train on. Remove it."
        )
    for number, message in enumerate(messages, start=1):
        if is_trained(message) and _is_empty(message):
            raise DataError(
                f"{where}: message {number}: the assistant's message is empty, so the model would learn to say "
                'nothing. Fill it in, remove it, or give it "weight": 0.'
            )
    return messages


def _is_empty(message: Message) -> bool:
    """Return whether a message of the assistant has no more to train on than its end."""
    texts = [message.get(key, "") for key in ("content", *REASONING)]
    return "tool_calls" not in message and not any(text.strip() for text in texts)


def _message(message: Any, where: str, number: int) -> Message:
    """Check one message; keys whose value is null are left out, as chat templates expect."""
    if not isinstance(message, dict):
        raise DataError(f"{where}: message {number} must be {{role, content}}, found {type_name(message)}.")
    position = f"{where}: message {number}"
    found = {str(key): value for key, value in message.items() if value is not None}
    for key, hint in MESSAGE_HINTS.items():
        if key in found:
            raise DataError(f"{position}: '{key}' is not supported. {hint}")
    _require_no_media(found, position)

    role = _role(found, position)
    if "content" in found:
        found["content"] = _content(found["content"], position)
    if found.get("tool_calls", []) == []:
        found.pop("tool_calls", None)
    else:
        found["tool_calls"] = _tool_calls(found["tool_calls"], role, position)
    _check_reasoning(found, position)
    _check_weight(found.get(WEIGHT), role, position)

    # An assistant may say nothing besides its calls or its reasoning; any other message needs content.
    if role != "assistant":
        _string(found, "content", position)
    elif not any(found.get(key) for key in ("tool_calls", *REASONING)):
        found.setdefault("content", "")
    return found


def _require_no_media(record: dict[str, Any], position: str) -> None:
    """Refuse images, video and sound of a conversation or a message; columns of a table may be empty."""
    for key in MEDIA_KEYS:
        if record.get(key) not in (None, "", [], {}):
            raise DataError(
                f"{position}: '{key}' is not supported: only texts are trained, and they would refer to something "
                "that the model does not get. Remove the row, or the key where the texts do not need it."
            )


def _role(message: Message, position: str) -> str:
    """Return the role of a message, and refuse other spellings of those that have a meaning."""
    role = _string(message, "role", position)
    name = role.strip().lower()
    expected = OTHER_ROLES.get(name, name)
    if role != expected and expected in ROLES:
        raise DataError(f"{position}: the role {show(role)} has no meaning in training. Write '{expected}'.")
    return role


def _check_reasoning(message: Message, position: str) -> None:
    """Check that reasoning is one text, and the assistant's."""
    given = {key: _string(message, key, position) for key in REASONING if key in message}
    if given and message["role"] != "assistant":
        raise DataError(f"{position}: '{next(iter(given))}' belongs to messages of the assistant. Remove it.")
    if len(set(given.values())) > 1:
        raise DataError(f"{position}: {' and '.join(map(repr, given))} are different texts. Keep one of them.")


def _content(value: Any, position: str) -> str:
    """Return the content of a message; parts of text, as the APIs of several vendors have them, are joined."""
    if not isinstance(value, list):
        return _string({"content": value}, "content", position)
    texts = []
    for number, part in enumerate(value, start=1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            shown = f"is of type '{kind}'" if kind else f"is {type_name(part)}"
            raise DataError(
                f"{position}: part {number} of 'content' {shown}. Only parts of text, "
                '{"type": "text", "text": ...}, can be used.'
            )
        lost = next((str(k) for k, v in part.items() if k not in PART_KEYS and v not in (None, [], {})), None)
        if lost is not None:
            raise DataError(
                f"{position}: part {number} of 'content': {show(lost)} next to 'text' would be lost. Remove it; "
                "a 'weight' belongs to the whole message."
            )
        texts.append(_string(part, "text", f"{position}: part {number}"))
    return "".join(texts)


def _tool_calls(value: Any, role: str, position: str) -> list[dict[str, Any]]:
    """Return tool calls as {"type": "function", "function": {"name", "arguments"}}, with arguments as an object."""
    if role != "assistant":
        raise DataError(f"{position}: 'tool_calls' belong to messages of the assistant, not of '{role}'.")
    if not isinstance(value, list):
        raise DataError(f"{position}: 'tool_calls' must be a list of calls, found {type_name(value)}.")

    calls = []
    for number, call in enumerate(value, start=1):
        place = f"{position}: tool call {number}"
        # {"name", "arguments"} alone is common too; templates are written for the form of the API.
        if isinstance(call, dict) and isinstance(call.get("name"), str) and "function" not in call:
            further = {k: v for k, v in call.items() if k not in ("name", "arguments", "type")}
            inner = {k: call[k] for k in ("name", "arguments") if k in call}
            call = {**further, "type": "function", "function": inner}
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f'{place} must be {{"type": "function", "function": {{"name", "arguments"}}}}.')
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{place}: 'arguments'", DataError) if arguments.strip() else {}
        if not isinstance(arguments, dict | NoneType):
            raise DataError(f"{place}: 'arguments' must be an object, found {type_name(arguments)}.")
        calls.append({**call, "function": {**function, "arguments": arguments or {}}})
    return calls


def _tools(given: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """Return the schemas of the tools as {"type": "function", "function": {...}}; None where the row has none."""
    tools = []
    for number, tool in enumerate(_objects(given, "tools", where) or (), start=1):
        wrapped = tool if "function" in tool else {"type": "function", "function": tool}
        function = wrapped["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}: tool {number} must be a JSON schema, "
                '{"type": "function", "function": {"name", "description", "parameters"}}.'
            )
        tools.append(wrapped)
    return tools or None


def _objects(given: dict[str, Any], key: str, where: str) -> list[dict[str, Any]] | None:
    """Return a list of objects; None where it is absent or empty."""
    value = given.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{where}: '{key}' must be a list of objects, found {type_name(value)}.")
    return value or None


def _check_weight(value: Any, role: str, position: str) -> None:
    """Check that a weight is 0 or 1, and that only the assistant's messages are to be trained."""
    if value is None:
        return
    if isinstance(value, bool) or value not in (0, 1):
        raise DataError(f"{position}: 'weight' is {value!r}; it must be 0, for a message without loss, or 1.")
    if value == 1 and role != "assistant":
        raise DataError(f"{position}: 'weight' 1 on a message of '{role}': only the assistant's messages have a loss.")


def _from_share_gpt(value: Any, where: str) -> Any:
    """Return the messages of a conversation in the form of ShareGPT, {"from", "value"}."""
    if not isinstance(value, list):
        return value
    messages = []
    for number, turn in enumerate(value, start=1):
        # Some data sets have messages under this name.
        if not isinstance(turn, dict) or "from" not in turn:
            messages.append(turn)
            continue
        role = SHARE_GPT_ROLES.get(str(turn["from"]))
        if role is None:
            raise DataError(
                f"{where}: turn {number} of 'conversations' is from '{turn['from']}'; known are "
                f"{', '.join(SHARE_GPT_ROLES)}. Write the row as 'messages', with calls as 'tool_calls'."
            )
        further = {key: item for key, item in turn.items() if item is not None and key not in ("from", "value")}
        message = {"role": role, "content": turn.get("value"), **further}
        for key, name in (("from", "role"), ("value", "content")):
            known = role if key == "from" else turn.get("value")
            if known is not None and message[name] not in (known, turn.get(key)):
                raise DataError(
                    f"{where}: turn {number} of 'conversations' has '{key}' {show(turn[key])} and '{name}' "
                    f"{show(message[name])}. Keep one of them."
                )
        messages.append({**message, "role": role})
    return messages


def _parsed(value: Any, key: str, where: str) -> Any:
    """Return JSON text as the list or object that it stands for, and any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        return parse_json(value, f"{where}: '{key}'", DataError)
    return value


def _string(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' must be a string, found {type_name(value)}.")
    return value
