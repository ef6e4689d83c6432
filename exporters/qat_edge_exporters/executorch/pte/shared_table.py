"""Store the table of a tied embedding and head once in a .pte.

ExecuTorch's serializer finds equal bytes among the program's own constants and among those of its delegates, but not
between the two. A delegate's constant is a name with a position in the file, and every loader of the runtime reads that
position independently, so it may be inside the program's constants:
https://github.com/pytorch/executorch/blob/v1.4.1/runtime/executor/pte_data_map.cpp

    before   program | constants: embedding, ... | delegates | named data: ..., head, ...
    after    program | constants: embedding, ... | delegates | named data: ...            (head -> embedding)

This holds for int4 as well, although the two operators want a byte's codes in different orders: see
`quantized_modules.QuantizedEmbedding`.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from qat_edge_exporters.executorch.compat import (
    ALIGNMENT,
    PteHeader,
    open_program_table,
    read_pte_header,
    set_segment_offset,
)

SMALLEST_BYTES = 1024  # of a constant that is shared: a smaller one would move the whole file for nothing
HEADER_AT = 8  # byte of the file, after the root's offset and the format


class _Span(NamedTuple):
    """Bytes of a .pte, counted from the first segment."""

    begin: int
    length: int


@dataclass(frozen=True)
class _PteLayout:
    """Positions in a .pte, counted from the first segment.

    Attributes:
        head: all bytes before that.
        header: sizes of the file's parts.
        segments: tables inside `head`, with the offset and size of each.
        constants: of the program itself, padding included.
        named: segment of each of the delegates' constants, by name.
    """

    head: bytearray
    header: PteHeader
    segments: list[Any]
    constants: list[_Span]
    named: dict[str, int]


def share(path: Path) -> int:
    """Store once, in the .pte at `path`, what the program and its delegates both hold; return the bytes saved.

    A file that holds nothing twice is not touched. Segments keep their alignment. A shared constant has the 16 bytes of
    the program's constants, which is all that XNNPACK needs.

    Raises:
        OSError: there is no space for the second file, which replaces the first.
    """
    layout = _read_layout(path)
    if layout is None:
        return 0

    # Written next to the original and renamed, so that an interruption leaves a complete file.
    smaller = path.with_name(f"{path.name}.shared")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped)[len(layout.head) :] as data,
    ):
        twins = _find_twins(layout, data)
        if not twins:
            return 0
        # The head is changed in memory, then written in front of what is kept.
        kept = _move_segments(layout, twins)
        with smaller.open("wb") as out:
            out.write(layout.head)
            for span in kept:
                out.write(data[span.begin : span.begin + span.length])

    saved = path.stat().st_size - smaller.stat().st_size
    smaller.replace(path)
    return saved


def shared(path: Path) -> set[str]:
    """Return the names of delegates' constants that are inside the program's, and add nothing to the file's size."""
    layout = _read_layout(path)
    return set() if layout is None else {name for name, index in layout.named.items() if _is_shared(layout, index)}


def _read_layout(path: Path) -> _PteLayout | None:
    """Read the positions in a .pte; None for a program without segments, or without its own constants."""
    # The head only: the segments may be as large as the model.
    with path.open("rb") as file:
        header = read_pte_header(file.read(PteHeader.NUM_HEAD_BYTES))
        if header is None or not header.segment_base_offset:
            return None
        file.seek(0)
        head = bytearray(file.read(header.segment_base_offset))

    program = open_program_table(head)
    segments = [program.Segments(i) for i in range(program.SegmentsLength())]
    table = program.ConstantSegment()
    if table is None or not table.OffsetsLength():
        return None

    # All of the program's constants are in one segment; each ends where the next begins.
    own = segments[table.SegmentIndex()]
    ends = [table.Offsets(i) for i in range(table.OffsetsLength())] + [own.Size()]
    constants = [_Span(own.Offset() + begin, end - begin) for begin, end in itertools.pairwise(ends)]
    entries = [program.NamedData(i) for i in range(program.NamedDataLength())]
    named = {entry.Key().decode(): entry.SegmentIndex() for entry in entries}
    return _PteLayout(head, header, segments, constants, named)


def _is_shared(layout: _PteLayout, index: int) -> bool:
    return any(layout.segments[index].Offset() == span.begin and span.length for span in layout.constants)


def _find_twins(layout: _PteLayout, data: memoryview) -> dict[int, int]:
    """Return segments of delegates' constants that the program holds as well, and the positions where it does."""
    twins = {}
    for index in sorted(set(layout.named.values())):
        position = next(_equal_constants(layout, index, data), None)
        if position is not None:
            twins[index] = position
    return twins


def _equal_constants(layout: _PteLayout, index: int, data: memoryview) -> Iterator[int]:
    """Yield positions of the program's constants that begin with the bytes of segment `index`."""
    if _is_shared(layout, index):
        return
    begin, size = layout.segments[index].Offset(), layout.segments[index].Size()
    for span in layout.constants:
        # The program's constant has the same length, up to padding.
        fits = SMALLEST_BYTES <= size <= span.length < size + ALIGNMENT
        if fits and data[begin:][:size] == data[span.begin :][:size]:
            yield span.begin


def _move_segments(layout: _PteLayout, twins: Mapping[int, int]) -> list[_Span]:
    """Write the new position of every segment into `layout.head`, and return the spans of the file that are kept.

    Whole spans with their padding are removed, so whatever follows moves by a multiple of the segments' alignment.
    """
    # A span reaches from one segment to the next.
    begins = sorted({segment.Offset() for segment in layout.segments})
    ends = dict(zip(begins, [*begins[1:], layout.header.segment_data_size], strict=True))
    removed = sorted(layout.segments[index].Offset() for index in twins)

    # A removed segment moves to its twin; any other one closes the gaps before it.
    for index, segment in enumerate(layout.segments):
        begin = segment.Offset()
        moved = begin - sum(ends[other] - other for other in removed if other < begin)
        position = twins.get(index, moved)
        if position != begin:
            set_segment_offset(layout.head, segment, position)

    # The header has the size of all segments together.
    kept = [_Span(begin, ends[begin] - begin) for begin in begins if begin not in removed]
    header = replace(layout.header, segment_data_size=sum(span.length for span in kept)).to_bytes()
    layout.head[HEADER_AT : HEADER_AT + len(header)] = header
    return kept
