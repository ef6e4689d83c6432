"""The example task: phone-assistant requests, each answered by one JSON tool call.

    Remind me to order the cake at 6:45 pm
    {"tool":"add_reminder","arguments":{"text":"order the cake","time":"6:45 pm"}}

Everything is generated, the same for the same seed. Evaluation rows use phrasings and slot values that no training
row uses. `python -m qat_edge.demo_data.assistant FOLDER` writes both files.
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
from qat_edge.run import write_text

# In every row: a chat template's own system prompt, written where there is none, is three times as long.
SYSTEM = "Answer with one JSON tool call."
TRAIN_ROWS = 4000
EVAL_ROWS = 400
# No intent gives more of the rows than it has distinct requests: draws that repeat are drawn again.
PATIENCE = 200


def rows(split: str, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` distinct rows of `split` ("train" or "eval") in the `messages` shape.

    Raises:
        UsageError: an unknown split, or more rows than the phrasings and values can make.
    """
    if split not in ("train", "eval"):
        raise UsageError(f"split {split!r}: there are 'train' and 'eval'.")
    draw = random.Random(f"{split} {seed}")
    seen: set[str] = set()
    for done in range(count):
        for _ in range(PATIENCE):
            request, answer = _request(draw.choice(INTENTS), split, draw)
            if request not in seen:
                break
        else:
            raise UsageError(f"{count} rows asked for, but {split} has hardly more than {done} distinct requests.")
        seen.add(request)
        yield {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": request},
                {"role": "assistant", "content": answer},
            ]
        }


def write(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write train.jsonl and eval.jsonl into `folder`; returns their paths."""
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, split, count in zip(paths, ("train", "eval"), (TRAIN_ROWS, EVAL_ROWS), strict=True):
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split, count, seed)))
    return paths


def _request(intent: Intent, split: str, draw: random.Random) -> tuple[str, str]:
    values = {name: draw.choice(slot.of(split)) for name, slot in intent.slots.items()}
    opener = str(draw.choice(OPENERS.of(split)))
    phrasing = str(draw.choice(intent.phrasings.of(split)))
    request = opener + phrasing.format(**values)
    if draw.random() < 0.5:
        request = request[0].upper() + request[1:]
    call = {"tool": intent.tool, "arguments": {**values, **intent.fixed}}
    return request, json.dumps(call, ensure_ascii=False, separators=(",", ":"))


def main() -> None:
    """Write the example's data files into the folder named on the command line."""
    for path in write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/data/assistant")):
        print(path)


if __name__ == "__main__":
    main()
