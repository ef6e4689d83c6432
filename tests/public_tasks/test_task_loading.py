"""Questions of public tasks: read from wheels, split by function, in a fixed order."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from public_tasks import stand_ins
from qat_edge import options
from qat_edge.data.formats import Chat, load_rows
from qat_edge.errors import DataError, RunError, UsageError
from qat_edge.public_tasks import function_calls, reference_text
from qat_edge.public_tasks.numbers_in_text import answer_number, equals_number
from qat_edge.public_tasks.questions import TASKS, TEST, TRAIN, load_task
from qat_edge.verbs.task_rows import write_task_rows


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return stand_ins.install(tmp_path, monkeypatch)


def test_the_command_line_offers_every_task() -> None:
    assert tuple(TASKS) == options.PUBLIC_TASKS


@pytest.mark.parametrize("name", [name for name in TASKS if name != "gsm_symbolic"])
def test_every_task_loads_the_same_questions_again(name: str, cache: Path) -> None:
    task, again = load_task(name, cache), load_task(name, cache)
    assert task.name == name and task.test
    assert [q.digest for q in task.test] == [q.digest for q in again.test]
    assert len({q.id for q in task.test}) == len(task.test)


def test_an_unknown_task_is_refused(cache: Path) -> None:
    with pytest.raises(UsageError, match=r"--task mmlu: not known. Known: bfcl, "):
        load_task("mmlu", cache)


# --- function calls ------------------------------------------------------------------------------------------


def test_no_function_of_a_test_question_is_in_a_training_row(cache: Path) -> None:
    task = load_task("bfcl", cache)
    assert task.train is not None
    train = list(task.train())
    tested = {name for q in task.test for answer in q.expected for name in answer}
    assert train and tested
    assert tested.isdisjoint(tool["function"]["name"] for q in train for tool in q.tools or ())
    assert all(function_calls.part_of(name) == TEST for name in tested)


def test_the_parts_depend_on_the_name_alone() -> None:
    parts = {name: function_calls.part_of(name) for name in stand_ins.FUNCTIONS}
    assert parts == {
        "alarm.set": TEST, "lamp.dim": TEST, "oven.heat": TRAIN, "door.open": TEST, "tap.close": TEST,
        "radio.tune": TRAIN, "blind.lower": TRAIN, "fan.spin": TEST,
    }  # fmt: skip


def test_a_question_of_both_parts_is_in_neither(cache: Path) -> None:
    entry = function_calls._Entry({}, [{"alarm.set": {}}, {"oven.heat": {}}])
    assert entry.part is None


def test_a_solution_is_right_and_a_wrong_answer_is_not(cache: Path) -> None:
    task = load_task("bfcl_simple", cache)
    assert task.grade is not None
    for question in task.test:
        answer = function_calls.as_text(question).solution
        assert answer is not None and task.grade(question, answer["content"])
        assert not task.grade(question, answer["content"].replace('"level"', '"height"'))
        assert not task.grade(question, "I do not know")


def test_types_of_the_definitions_are_those_of_json_schema(cache: Path) -> None:
    question = load_task("bfcl_simple", cache).test[0]
    assert question.tools is not None
    parameters = question.tools[0]["function"]["parameters"]
    assert parameters["type"] == "object"
    assert [each["type"] for each in parameters["properties"].values()] == ["number", "string", "object"]
    assert question.definitions[0]["parameters"]["properties"]["level"]["type"] == "float"


def test_functions_as_text_follow_the_instruction_and_precede_the_system_message() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go"}]
    question = function_calls.as_text(function_calls.Question("q", messages=messages, tools=[tool]))
    assert question.tools is None
    assert question.messages == [
        {"role": "system", "content": f'{function_calls.INSTRUCTION}{{"name": "f", "parameters": {{}}}}\n\nBe brief.'},
        {"role": "user", "content": "Go"},
    ]


def test_solutions_have_required_arguments_and_the_first_of_several_values() -> None:
    definition = {
        "name": "f",
        "parameters": {
            "properties": {
                "a": {"type": "string"}, "b": {"type": "integer"}, "c": {"type": "dict"},
                "d": {"type": "array", "items": {"type": "dict"}},
            },
            "required": ["a"],
        },
    }  # fmt: skip
    possible = {"a": ["", "x"], "b": [1, ""], "c": [{"k": [2, 3], "o": ["", 4]}], "d": [[{"k": [5, 6]}]]}
    solution = function_calls._solution([{"f": possible}], [definition])
    assert solution is not None
    assert solution["tool_calls"][0]["function"] == {
        "name": "f",
        "arguments": {"a": "x", "c": {"k": 2}, "d": [{"k": 5}]},
    }
    # A required argument without a possible value: no answer is right.
    assert function_calls._solution([{"f": {"a": [], "b": [1]}}], [definition]) is None


def test_a_question_without_an_answer_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(function_calls, "ANSWERS", function_calls.ANSWERS.replace("{}", "multiple"))
    with pytest.raises(DataError, match="question simple_python_0 has no answer"):
        load_task("bfcl_simple", cache)


# --- arithmetic ----------------------------------------------------------------------------------------------


def test_problems_are_generated_without_importing_the_whole_package(cache: Path) -> None:
    task = load_task("chain_sum", cache)
    assert (len(task.test), task.test[3].messages[0]["content"], task.test[3].expected) == (500, "3 + 1 =", "4")


def test_no_training_problem_is_a_test_problem(cache: Path) -> None:
    task = load_task("chain_sum", cache)
    assert task.train is not None
    train = {q.messages[0]["content"] for q in task.train()}
    # The stand-in has 700 problems, of which 500 are tested.
    assert len(train) == 200
    assert train.isdisjoint(q.messages[0]["content"] for q in task.test)


def test_a_generator_that_fails_is_named(cache: Path) -> None:
    with pytest.raises(DataError, match=r"gsm_symbolic failed \(ValueError: this generator is broken\)"):
        load_task("gsm_symbolic", cache)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 18.", 18), ("2 + 3 = 5", 5), ("So 1,234.50 dollars", Decimal("1234.5")), ("-7", -7),
        ("#### 12\nNot 13", 12), ("3 #### none", None), ("none", None), ("9" * 5000, None), ("5-3", -3),
    ],
)  # fmt: skip
def test_the_number_of_an_answer(text: str, number: Decimal | None) -> None:
    assert answer_number(text) == number


def test_numbers_are_compared_by_value() -> None:
    assert equals_number("18.00", "18") and equals_number("1,000", "1000")
    assert not equals_number("18.01", "18") and not equals_number("", "0")


# --- text ----------------------------------------------------------------------------------------------------


def test_passages_are_the_held_out_topics(cache: Path) -> None:
    task = load_task("python_docs", cache)
    in_order = sorted(task.test, key=lambda q: int(q.id.removeprefix("passage-")))
    whole = "".join("".join(q.text.split()) for q in in_order)
    topics = reference_text.python_reference.split()[1]
    assert whole == "".join("".join(topic.split()) for topic in topics)
    paragraphs = [p for topic in topics for p in topic.split("\n\n")]
    longest = max(map(len, paragraphs)) + reference_text.PASSAGE_CHARACTERS
    assert all(0 < len(q.text) <= longest for q in task.test)


# --- rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [False, True])
def test_rows_are_read_as_they_were_written(cache: Path, tmp_path: Path, as_text: bool) -> None:
    written = write_task_rows("bfcl_simple", tmp_path / "data", as_text=as_text)
    rows = load_rows(str(written.train))
    assert (len(rows), written.train_rows + written.test_rows) == (written.train_rows, 16)
    assert all(isinstance(row, Chat) and (row.tools is None) == as_text for row in rows)
    last = json.loads(written.test.read_text().splitlines()[0])["messages"][-1]
    assert ("tool_calls" in last) != as_text


def test_rows_replace_nothing_without_force(cache: Path, tmp_path: Path) -> None:
    write_task_rows("chain_sum", tmp_path / "data")
    with pytest.raises(RunError, match=r"train.jsonl exists already. Give --force"):
        write_task_rows("chain_sum", tmp_path / "data")
    assert write_task_rows("chain_sum", tmp_path / "data", force=True).test_rows == 500


def test_a_task_without_a_training_part_writes_no_rows(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hellaswag: has questions for testing only"):
        write_task_rows("hellaswag", tmp_path / "data")
    assert not (tmp_path / "data").exists()
