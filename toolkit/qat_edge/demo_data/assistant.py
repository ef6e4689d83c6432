"""Example task: phone-assistant requests, each answered with one JSON tool call.

    Remind me to order the cake at 6:45 pm
    {"tool":"add_reminder","arguments":{"text":"order the cake","time":"6:45 pm"}}

All rows are generated, and a seed always gives the same rows. Evaluation rows use phrasings and slot values that no
training row uses. `python -m qat_edge.demo_data.assistant FOLDER` writes both files.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qat_edge.demo_data.intents import INTENTS, OPENERS, Intent
from qat_edge.errors import UsageError
from qat_edge.storage import write_text

# In every row: without one, SmolLM2's chat template writes a system prompt of its own that is three times as long.
SYSTEM = "Answer with one JSON tool call."
TRAIN_ROWS = 4000
EVAL_ROWS = 400
# Draws of one row before giving up: a request that occurred already is drawn again.
MAX_DRAWS = 200


def rows(split: str, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Generate distinct rows in the `messages` shape.

    Args:
        split: "train" or "eval".
        count: Number of rows.
        seed: Of the random choices.

    Raises:
        UsageError: The split is unknown, or phrasings and values do not make that many distinct requests.
    """
    if split not in ("train", "eval"):
        raise UsageError(f"split {split!r}: not known. Use 'train' or 'eval'.")

    # A generator per split: the number of training rows does not change the evaluation rows.
    draw = random.Random(f"{split} {seed}")
    seen: set[str] = set()
    for done in range(count):
        for _ in range(MAX_DRAWS):
            request, answer = _draw_request(draw.choice(INTENTS), split, draw)
            if request not in seen:
                break
        else:
            raise UsageError(
                f"{count} rows requested, but {split} has hardly more than {done} distinct requests. Request fewer."
            )
        seen.add(request)
        yield {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": request},
                {"role": "assistant", "content": answer},
            ]
        }


def write(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write train.jsonl and eval.jsonl into `folder` and return their paths."""
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, split, count in zip(paths, ("train", "eval"), (TRAIN_ROWS, EVAL_ROWS), strict=True):
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split, count, seed)))
    return paths


def _draw_request(intent: Intent, split: str, draw: random.Random) -> tuple[str, str]:
    """Draw values, opener and phrasing of a request; return the request and its tool call as JSON."""
    values = {name: draw.choice(slot.for_split(split)) for name, slot in intent.slots.items()}
    opener = str(draw.choice(OPENERS.for_split(split)))
    phrasing = str(draw.choice(intent.phrasings.for_split(split)))
    request = opener + phrasing.format(**values)
    # People begin a request with a capital letter or without.
    if draw.random() < 0.5:
        request = request[0].upper() + request[1:]
    # Compact JSON: fewer tokens to generate.
    call = {"tool": intent.tool, "arguments": {**values, **intent.fixed}}
    return request, json.dumps(call, ensure_ascii=False, separators=(",", ":"))


def main() -> None:
    """Write the example's data files into the folder named on the command line."""
    for path in write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/data/assistant")):
        print(path)


if __name__ == "__main__":
    main()
