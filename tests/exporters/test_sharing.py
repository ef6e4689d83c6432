"""One table in the .pte for a tied embedding and head: what it saves, that nothing else changes, what verify sees."""

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
from tiny import Exported, export_into, freeze, llama

from qat_edge.verbs.verify import verify_folder
from qat_edge_exporters.executorch.export_pte import MODEL
from qat_edge_exporters.executorch.pte import delegates, shared_table
from qat_edge_exporters.executorch.pte.inspection import inspect
from qat_edge_exporters.executorch.pte.pte_reader import read

TABLE = 288 * 64 + 288 * 4  # bytes of int8 codes and float32 scales, both multiples of what segments are aligned to


def exported(root: Path, tied: bool) -> tuple[Exported, Path]:
    """An export, and beside it the program as ExecuTorch's serializer wrote it."""
    freeze(llama(num_hidden_layers=1, tie_word_embeddings=tied), 32, root / "frozen")
    share = shared_table.share

    def kept(path: Path) -> int:
        shutil.copyfile(path, root / "plain.pte")
        return share(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_table, "share", kept)
        return export_into(root / "frozen", root / "export"), root / "plain.pte"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Exported, Path]:
    return exported(tmp_path_factory.mktemp("tied"), tied=True)


def logits(program: Any) -> torch.Tensor:
    """Of a prompt's last token and of four more, (5, vocabulary)."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 288, (1, 9))
    steps = [(0, 5), *((i, i + 1) for i in range(5, 9))]
    return torch.cat([program.forward((tokens[:, a:b].contiguous(), torch.tensor([a])))[0][0] for a, b in steps])


def test_the_file_is_smaller_by_the_table_and_holds_the_same(tied: tuple[Exported, Path]) -> None:
    made, plain = tied
    assert plain.stat().st_size - made.pte.stat().st_size == TABLE
    assert "stored once for embedding and head: 0.0 MB" in made.messages
    one, other = delegates.open_pte(made.pte), delegates.open_pte(plain)
    assert delegates.constants(one) == delegates.constants(other)
    assert one.program == other.program
    assert shared_table.share(made.pte) == 0  # nothing is left to share


def test_logits_are_the_same_to_the_bit(tied: tuple[Exported, Path]) -> None:
    made, plain = tied
    wanted, data = logits(_load_for_executorch(str(plain))), made.pte.read_bytes()
    assert torch.equal(wanted, logits(_load_for_executorch(str(made.pte))))  # a mapped file
    assert torch.equal(wanted, logits(_load_for_executorch_from_buffer(data)))


def test_the_runner_of_phones_says_the_same(tied: tuple[Exported, Path]) -> None:
    said = []
    for path in (tied[1], tied[0].pte):
        pieces: list[str] = []
        config = GenerationConfig(max_new_tokens=8, temperature=0.0, echo=False)
        runner = TextLLMRunner(str(path), str(tied[0].folder / "tokenizer.json"))
        runner.generate("a", config, token_callback=pieces.append)
        said.append(pieces)
    assert said[0] == said[1] != []


def test_sizes_count_the_table_once(tied: tuple[Exported, Path]) -> None:
    made, plain = tied
    sizes, program, twice = read(made.folder).size_bytes, inspect(made.pte), inspect(plain)
    assert (sizes["embedding"], sizes["head"]) == (TABLE, 0)
    assert sum(sizes.values()) == sum(p.stat().st_size for p in made.folder.iterdir())
    assert program.shared_bytes == TABLE and twice.shared_bytes == 0
    assert program.size_bytes == {**twice.size_bytes, "head": 0}
    assert sum(program.size_bytes.values()) == made.pte.stat().st_size


def test_one_flipped_bit_is_found_in_embedding_and_head(tied: tuple[Exported, Path], tmp_path: Path) -> None:
    made = tied[0]
    whole = verify_folder(made.folder, "executorch", made.frozen)
    assert whole.faults == [] and whole.embedding_equal and whole.head_equal
    shutil.copytree(made.folder, tmp_path / "copy")
    codes = read(made.folder).weights["lm_head"].codes.tobytes()
    data = bytearray((tmp_path / "copy" / MODEL).read_bytes())
    assert data.count(codes) == 1
    data[data.index(codes) + 3 * 64 + 5] ^= 1
    (tmp_path / "copy" / MODEL).write_bytes(data)
    found = verify_folder(tmp_path / "copy", "executorch", made.frozen)
    assert replace(found, faults=[]) == replace(
        whole, folder=tmp_path / "copy", embedding_equal=False, head_equal=False
    )
    for name in ("model.embed_tokens", "lm_head"):
        assert [f for f in found.faults if f.startswith(f"{name}: 1 of") and "row 3, column 5" in f]
    assert [f for f in found.faults if f.startswith("lm_head: its codes in model.pte were changed after export")]


def test_two_tables_stay_as_the_serializer_wrote_them(tmp_path: Path) -> None:
    made, plain = exported(tmp_path, tied=False)
    assert made.pte.read_bytes() == plain.read_bytes()
    assert inspect(made.pte).shared_bytes == 0
    sizes = read(made.folder).size_bytes
    assert sizes["embedding"] == sizes["head"] == TABLE
