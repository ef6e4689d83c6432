"""What the program and one of its delegates both hold, stored once: the table of a tied embedding and head.

ExecuTorch's serializer finds equal bytes among the program's own constants and among those of its delegates, not
between the two. But a delegate's constant is a name and a place in the file, and every loader of the runtime reads that
place by itself, so it may lie inside the program's constants:
https://github.com/pytorch/executorch/blob/v1.4.1/runtime/executor/pte_data_map.cpp

    before   program | constants: embedding, ... | delegates | named data: ..., head, ...
    after    program | constants: embedding, ... | delegates | named data: ...            (head -> embedding)

So it is with int4, though the two operators want a byte's codes in different orders: see `tracing.QuantizedEmbedding`.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from executorch.exir._serialize._flatbuffer_program import _patch_generated_flatbuffer_aliases
from executorch.exir._serialize._program import _ExtendedHeader, _get_extended_header
from executorch.exir._serialize.generated.executorch_flatbuffer.Program import Program
from executorch.exir.tensor import ALIGNMENT

LEAST = 1024  # bytes of a constant that is worth it: a small one moves the whole file for nothing
HEADER_AT = 8  # byte of the file, after the root's offset and the format
OFFSET_FIELD = 4  # of a DataSegment in the schema's table of fields


@dataclass(frozen=True)
class _Layout:
    """Where things lie in a .pte; places count from the first segment.

    head: all bytes before that. segments: tables of `head`, which say begin and size. constants: begin and greatest
    length of the program's own, padding included. named: segments of the delegates' constants, by name.
    """

    head: bytearray
    header: _ExtendedHeader
    segments: list[Any]
    constants: list[tuple[int, int]]
    named: dict[str, int]


def share(path: Path) -> int:
    """Store what the program and its delegates both hold once, in the .pte at `path`; bytes saved.

    A file that holds nothing twice is left alone. Segments stay as aligned as they were; what is shared keeps the 16
    bytes that the program's constants have, all that XNNPACK asks for its own.

    Raises:
        OSError: there is no space for the second file, which takes the place of the first.
    """
    layout = _layout(path)
    if layout is None:
        return 0
    other = path.with_name(f"{path.name}.shared")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped)[len(layout.head) :] as data,
    ):
        twins = dict(_twins(layout, data))
        if not twins:
            return 0
        kept = _move(layout, twins)
        with other.open("wb") as out:
            out.write(layout.head)
            for begin, end in kept:
                out.write(data[begin:end])
    saved = path.stat().st_size - other.stat().st_size
    other.replace(path)
    return saved


def shared(path: Path) -> set[str]:
    """Names of the delegates' constants that lie inside the program's own, and take no bytes of the file themselves."""
    layout = _layout(path)
    return set() if layout is None else {name for name, index in layout.named.items() if _is_shared(layout, index)}


def _layout(path: Path) -> _Layout | None:
    """None of a program without segments or constants of its own."""
    with path.open("rb") as file:
        header = _get_extended_header(file.read(_ExtendedHeader.NUM_HEAD_BYTES))
        if header is None or not header.segment_base_offset:
            return None
        file.seek(0)
        head = bytearray(file.read(header.segment_base_offset))
    _patch_generated_flatbuffer_aliases()  # without it the generated classes do not find each other
    program = Program.GetRootAs(head)
    segments = [program.Segments(i) for i in range(program.SegmentsLength())]
    table = program.ConstantSegment()
    if table is None or not table.OffsetsLength():
        return None
    own = segments[table.SegmentIndex()]
    ends = [table.Offsets(i) for i in range(table.OffsetsLength())] + [own.Size()]
    constants = [(own.Offset() + begin, end - begin) for begin, end in itertools.pairwise(ends)]
    entries = [program.NamedData(i) for i in range(program.NamedDataLength())]
    named = {entry.Key().decode(): entry.SegmentIndex() for entry in entries}
    return _Layout(head, header, segments, constants, named)


def _is_shared(layout: _Layout, index: int) -> bool:
    return any(layout.segments[index].Offset() == begin and length for begin, length in layout.constants)


def _twins(layout: _Layout, data: memoryview) -> Iterator[tuple[int, int]]:
    """Segments of the delegates' constants that the program holds as well, and where."""
    for index in sorted(set(layout.named.values())):
        begin, size = layout.segments[index].Offset(), layout.segments[index].Size()
        for place, length in layout.constants:
            fits = LEAST <= size <= length < size + ALIGNMENT
            if fits and not _is_shared(layout, index) and data[begin:][:size] == data[place:][:size]:
                yield index, place
                break


def _move(layout: _Layout, twins: dict[int, int]) -> list[tuple[int, int]]:
    """Write into `layout.head` where every segment will lie; begin and end of the spans of the file that stay.

    Whole spans with their padding go, so what follows moves by a multiple of the segments' alignment.
    """
    begins = sorted({segment.Offset() for segment in layout.segments})
    ends = dict(zip(begins, [*begins[1:], layout.header.segment_data_size], strict=True))
    gone = sorted(layout.segments[index].Offset() for index in twins)
    for index, segment in enumerate(layout.segments):
        begin = segment.Offset()
        place = twins.get(index, begin - sum(ends[other] - other for other in gone if other < begin))
        if place != begin:
            struct.pack_into("<Q", layout.head, segment._tab.Pos + segment._tab.Offset(OFFSET_FIELD), place)
    kept = [(begin, ends[begin]) for begin in begins if begin not in gone]
    header = replace(layout.header, segment_data_size=sum(end - begin for begin, end in kept)).to_bytes()
    layout.head[HEADER_AT : HEADER_AT + len(header)] = header
    return kept
