"""Text about the guard of the QAT phase, from its entry in training.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qat_edge.report.formatting import number, percent


def guard_sentence(log: Mapping[str, Any]) -> str:
    """Return what the guard found, for the caption of the training chart; empty where nothing was measured."""
    guard = _entry(log)
    start, result = _number(guard, "start_loss"), _number(guard, "result_loss")
    if start is None or result is None:
        return ""
    sentence = (
        f"On {guard.get('rows')} evaluation rows the loss was {start:.4f} where QAT began and is {result:.4f} "
        f"in the result, of step {guard.get('result_step')}"
    )
    restarts = [f"{event.get('step')}" for event in _objects(guard, "restarts")]
    if restarts:
        sentence += f". QAT diverged and was started again after step {', '.join(restarts)}"
    stopped = guard.get("stopped")
    if isinstance(stopped, Mapping):
        sentence += f". QAT diverged, and training ended at step {stopped.get('step')}"
    return sentence


def guard_rows(log: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of all that the guard measured and did, empty where it measured nothing."""
    guard = _entry(log)
    if not guard:
        return []
    rows = [("evaluation rows", f"{guard.get('rows')}")]
    for index, each in enumerate(_objects(guard, "evaluations")):
        loss = _number(each, "loss")
        what = "loss where QAT began, step" if index == 0 else "loss at step"
        rows.append((f"{what} {each.get('step')}", "not a number" if loss is None else f"{loss:.4f}"))
    for name, key in (("best", "best"), ("result", "result")):
        loss = _number(guard, f"{key}_loss")
        if loss is not None:
            rows.append((name, f"{loss:.4f}, of step {guard.get(f'{key}_step')}"))
    rows += [
        (f"started again after step {event.get('step')}", f"{event.get('reason')}")
        for event in _objects(guard, "restarts")
    ]
    stopped = guard.get("stopped")
    if isinstance(stopped, Mapping):
        rows.append((f"ended at step {stopped.get('step')}", f"{stopped.get('reason')}"))
    return rows + _movement_rows(guard) + _time_rows(guard)


def _movement_rows(guard: Mapping[str, Any]) -> list[tuple[str, str]]:
    moved = guard.get("moved")
    if not isinstance(moved, Mapping):
        return []
    steps, codes, scales = (_number(moved, key) for key in ("rms_steps", "codes_changed", "rms_scale"))
    return [
        *([("weights moved by", f"{number(steps)} of a code's step (root mean square)")] if steps is not None else []),
        *([("scales moved by", f"{percent(scales)} (root mean square)")] if scales is not None else []),
        *([("codes changed", percent(codes))] if codes is not None else []),
    ]


def _time_rows(guard: Mapping[str, Any]) -> list[tuple[str, str]]:
    seconds, share = _number(guard, "wall_s"), _number(guard, "share")
    if seconds is None or share is None:
        return []
    return [("time", f"{number(seconds)} s, {percent(share)} of the training")]


def _entry(log: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the guard's entry; empty where it is missing or damaged."""
    entry = log.get("qat_guard")
    return entry if isinstance(entry, Mapping) else {}


def _objects(guard: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = guard.get(key)
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def _number(values: Mapping[str, Any], key: str) -> float | None:
    """Return an entry if it is a finite number, None otherwise: the file may be damaged by hand."""
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)
