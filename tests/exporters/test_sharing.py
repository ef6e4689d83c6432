"""One table in the .pte for a tied embedding and head: it saves the table's bytes, and nothing else changes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import executorch.kernels.quantized  # noqa: F401  operators of the .pte
import pytest
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  operators of the .pte
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
from executorch.extension.pybindings.portable_lib import _load_for_executorch, _load_for_executorch_from_buffer
from tiny import TinyExport, export_into, freeze, llama, prefill_and_decode

from qat_edge.verbs.verify import verify_folder
from qat_edge_exporters.executorch.export_pte import MODEL
from qat_edge_exporters.executorch.pte import delegates, shared_table
from qat_edge_exporters.executorch.pte.inspection import inspect
from qat_edge_exporters.executorch.pte.pte_reader import read

TABLE = 288 * 64 + 288 * 4  # bytes of int8 codes and float32 scales, both multiples of what segments are aligned to


def exported(root: Path, tied: bool) -> tuple[TinyExport, Path]:
    """Export a model; return the export, and a copy of the program as ExecuTorch's serializer wrote it."""
    freeze(llama(num_hidden_layers=1, tie_word_embeddings=tied), 32, root / "frozen")
    share = shared_table.share

    def copy_and_share(path: Path) -> int:
        shutil.copyfile(path, root / "plain.pte")
        return share(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_table, "share", copy_and_share)
        return export_into(root / "frozen", root / "export"), root / "plain.pte"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyExport, Path]:
    return exported(tmp_path_factory.mktemp("tied"), tied=True)


def logits(program: Any) -> torch.Tensor:
    """Return those of a prompt's last token and of four more, (5, vocabulary)."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 288, (1, 9))
    rows = []
    for begin, end in prefill_and_decode(5, 9):
        rows.append(program.forward((tokens[:, begin:end].contiguous(), torch.tensor([begin])))[0][0])
    return torch.cat(rows)


def test_the_file_is_smaller_by_the_table_and_has_the_same_content(tied: tuple[TinyExport, Path]) -> None:
    made, plain = tied
    assert plain.stat().st_size - made.pte.stat().st_size == TABLE
    assert "stored once for embedding and head: 0.0 MB" in made.messages
    one, other = delegates.open_pte(made.pte), delegates.open_pte(plain)
    assert delegates.named_constants(one) == delegates.named_constants(other)
    assert one.program == other.program
    assert shared_table.share(made.pte) == 0  # nothing is left to share


def test_logits_are_equal_bit_for_bit(tied: tuple[TinyExport, Path]) -> None:
    made, plain = tied
    wanted, data = logits(_load_for_executorch(str(plain))), made.pte.read_bytes()
    assert torch.equal(wanted, logits(_load_for_executorch(str(made.pte))))  # a mapped file
    assert torch.equal(wanted, logits(_load_for_executorch_from_buffer(data)))


def test_the_llm_runner_generates_the_same_text(tied: tuple[TinyExport, Path]) -> None:
    texts = []
    for path in (tied[1], tied[0].pte):
        pieces: list[str] = []
        config = GenerationConfig(max_new_tokens=8, temperature=0.0, echo=False)
        runner = TextLLMRunner(str(path), str(tied[0].folder / "tokenizer.json"))
        runner.generate("a", config, token_callback=pieces.append)
        texts.append(pieces)
    assert texts[0] == texts[1] != []


def test_sizes_count_the_table_once(tied: tuple[TinyExport, Path]) -> None:
    made, plain = tied
    sizes, program, twice = read(made.folder).size_bytes, inspect(made.pte), inspect(plain)
    assert (sizes["embedding"], sizes["head"]) == (TABLE, 0)
    assert sum(sizes.values()) == sum(p.stat().st_size for p in made.folder.iterdir())
    assert program.shared_bytes == TABLE and twice.shared_bytes == 0
    assert program.size_bytes == {**twice.size_bytes, "head": 0}
    assert sum(program.size_bytes.values()) == made.pte.stat().st_size


def test_one_flipped_bit_is_found_in_embedding_and_head(tied: tuple[TinyExport, Path], tmp_path: Path) -> None:
    made = tied[0]
    whole = verify_folder(made.folder, "executorch", made.frozen)
    assert whole.faults == [] and whole.embedding_equal and whole.head_equal
    shutil.copytree(made.folder, tmp_path / "copy")

    # The codes are in the file once.
    codes = read(made.folder).weights["lm_head"].codes.tobytes()
    data = bytearray((tmp_path / "copy" / MODEL).read_bytes())
    assert data.count(codes) == 1
    data[data.index(codes) + 3 * 64 + 5] ^= 1
    (tmp_path / "copy" / MODEL).write_bytes(data)

    # Both layers differ, at the same position, and nothing else does.
    found = verify_folder(tmp_path / "copy", "executorch", made.frozen)
    assert replace(found, faults=[]) == replace(
        whole, folder=tmp_path / "copy", embedding_equal=False, head_equal=False
    )
    for name in ("model.embed_tokens", "lm_head"):
        assert [f for f in found.faults if f.startswith(f"{name}: 1 of") and "row 3, column 5" in f]
    assert [f for f in found.faults if f.startswith("lm_head: its codes in model.pte were changed after export")]


def test_two_different_tables_stay_as_the_serializer_wrote_them(tmp_path: Path) -> None:
    made, plain = exported(tmp_path, tied=False)
    assert made.pte.read_bytes() == plain.read_bytes()
    assert inspect(made.pte).shared_bytes == 0
    sizes = read(made.folder).size_bytes
    assert sizes["embedding"] == sizes["head"] == TABLE
