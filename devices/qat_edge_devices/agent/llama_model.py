"""A GGUF file in llama.cpp, through the C functions in the shared library of the package xllamacpp.

The package's own interface is a server that gives text. Logits come from llama.cpp's C interface, which the same
library exports. Its functions take two structures by value, of which only some fields are used here, and which grow
from version to version: a larger block of memory is passed instead (what follows the fields that a version knows is
ignored by the calling conventions of 64-bit systems), and fields are written only if the defaults around them are those
of the version that this was read in.

Attention is computed without the fused operator and with a cache in float32: the fused one reads keys and values in
float16, which changes logits by about -60 dB.

Interface: https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Relative, because the folder is sent under a shorter name.
from .llama_grammar import FUNCTIONS as GRAMMAR_FUNCTIONS  # noqa: TID252
from .llama_grammar import LlamaGrammar  # noqa: TID252
from .model_errors import RequestRejected, token_chunks  # noqa: TID252

PACKAGE = "xllamacpp"
PARAMETER_BYTES = 2048  # more than either structure has in any version
BATCH = 512  # tokens in one call at most; the default of both sizes
ERROR_LEVEL = 4  # of messages that llama.cpp logs
MINUS_ONE = struct.unpack("<I", struct.pack("<f", -1.0))[0]
# Fields of llama_context_params in words of 32 bits, as xllamacpp 2026.10.11549 has them -> their defaults.
N_CTX, N_BATCH, N_UBATCH, N_SEQ_MAX, N_THREADS, N_THREADS_BATCH, FLASH_ATTN, TYPE_K, TYPE_V = (
    0,
    1,
    2,
    3,
    7,
    8,
    13,
    26,
    27,
)
DEFAULTS = {
    N_CTX: 512, N_BATCH: 2048, N_UBATCH: BATCH, N_SEQ_MAX: 1, N_THREADS: 4, N_THREADS_BATCH: 4,
    **dict.fromkeys(range(10, 14), 2**32 - 1), **dict.fromkeys(range(16, 20), MINUS_ONE), TYPE_K: 1, TYPE_V: 1,
}  # fmt: skip
DISABLED, FLOAT32 = 0, 0  # values of FLASH_ATTN, and of TYPE_K and TYPE_V


class _Parameters(ctypes.Structure):
    """Memory for llama_model_params or llama_context_params."""

    _fields_ = (("words", ctypes.c_uint32 * (PARAMETER_BYTES // 4)),)


class _Batch(ctypes.Structure):
    """llama_batch: tokens with their positions and sequences."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
# Functions of the interface: name -> result and arguments.
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG, _POINTER)),
    "llama_model_default_params": (_Parameters, ()),
    "llama_model_load_from_file": (_POINTER, (ctypes.c_char_p, _Parameters)),
    "llama_model_n_ctx_train": (_INT, (_POINTER,)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_vocab_n_tokens": (_INT, (_POINTER,)),
    "llama_context_default_params": (_Parameters, ()),
    "llama_init_from_model": (_POINTER, (_POINTER, _Parameters)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_clear": (None, (_POINTER, ctypes.c_bool)),
    "llama_memory_seq_rm": (ctypes.c_bool, (_POINTER, _INT, _INT, _INT)),
    "llama_batch_init": (_Batch, (_INT, _INT, _INT)),
    "llama_decode": (_INT, (_POINTER, _Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (_POINTER, _INT)),
    "llama_tokenize": (
        _INT,
        (_POINTER, ctypes.c_char_p, _INT, ctypes.POINTER(_INT), _INT, ctypes.c_bool, ctypes.c_bool),
    ),
}


class LlamaModel:
    """A GGUF file in llama.cpp; see `DeviceModel`."""

    def __init__(self) -> None:
        import numpy
        import xllamacpp

        self.numpy = numpy
        self.runtime, self.version = PACKAGE, str(xllamacpp.__version__)
        self.context_length: int | None = None
        self.pool_threads: int | None = None
        self.errors: list[str] = []
        self.position = 0
        self.grammar: LlamaGrammar | None = None
        library = ctypes.CDLL(str(Path(xllamacpp.xllamacpp.__file__)))
        self.functions = {}
        for name, (result, arguments) in (FUNCTIONS | GRAMMAR_FUNCTIONS).items():
            function = getattr(library, name, None)
            if function is None:
                raise _other_version()
            function.restype, function.argtypes = result, arguments
            self.functions[name] = function
        # The library calls it until the process ends.
        self._log = _LOG(self._keep_error)
        self._call("llama_log_set", self._log, None)
        self._call("llama_backend_init")

    def load(self, artifact: Path, request: dict[str, Any], threads: int) -> None:
        """Load the file, with a cache for as many tokens as it was exported for."""
        self.model = self._call(
            "llama_model_load_from_file", str(artifact).encode(), self._call("llama_model_default_params")
        )
        if not self.model:
            raise RequestRejected(f"{artifact.name} cannot be loaded: {self._reason()}")
        self.context_length = int(self._call("llama_model_n_ctx_train", self.model))
        self.vocabulary = self._call("llama_model_get_vocab", self.model)
        self.width = int(self._call("llama_vocab_n_tokens", self.vocabulary))

        parameters = self._call("llama_context_default_params")
        if any(parameters.words[index] != value for index, value in DEFAULTS.items()):
            raise _other_version()
        chosen = {N_CTX: self.context_length, N_THREADS: threads, N_THREADS_BATCH: threads, FLASH_ATTN: DISABLED}
        for index, value in {**chosen, TYPE_K: FLOAT32, TYPE_V: FLOAT32}.items():
            parameters.words[index] = value
        self.context = self._call("llama_init_from_model", self.model, parameters)
        if not self.context:
            raise RequestRejected(f"{artifact.name}: no cache could be made for it: {self._reason()}")
        self.batch = self._call("llama_batch_init", BATCH, 0, 1)
        self.pool_threads = threads
        if request.get("grammar") is not None:
            self.constrain(Path(request["grammar"]).read_text(encoding="utf-8"), request["eos_ids"])

    def constrain(self, grammar: str, ends: list[int]) -> None:
        """Choose only tokens that a grammar permits, and end only at `ends`, in all answers from now on."""
        self.grammar = LlamaGrammar(self._call, self.vocabulary, self.width, grammar, ends, self._reason)

    def start(self, prompt: list[int], length: int) -> int:
        """Empty the cache, process the prompt, return the most likely next id."""
        return self.resume(prompt, 0)

    def resume(self, prompt: list[int], kept: int) -> int:
        """Keep the first `kept` ids of the cache, process the others of the prompt, return the most likely next id."""
        memory = self._call("llama_get_memory", self.context)
        # A cache of another form than keys and values by position cannot be cut, and says so.
        if kept and self._call("llama_memory_seq_rm", memory, 0, kept, -1):
            self.position = kept
        else:
            self._empty()
        for chunk in token_chunks(prompt[self.position :], None):
            rows = self._forward(chunk, last_only=True)
        if self.grammar is not None:
            self.grammar.reset()
        return self._choose(rows[-1])

    def next(self, token: int) -> int:
        """Process an id, return the most likely id after it."""
        return self._choose(self._forward([token], last_only=True)[-1])

    def read(self, ids: list[int], decode_from: int | None) -> Iterator[dict[str, Any]]:
        """Process a sequence from an empty cache; yield the logits of each chunk."""
        self._empty()
        for chunk in token_chunks(ids, decode_from):
            yield {"logits": self._forward(chunk, last_only=False)}

    def tokenize(self, text: str, adds_special: bool = True) -> list[int]:
        """Return the ids of a text as llama.cpp's own tokenizer gives them; special tokens in it are recognized."""
        data = text.encode("utf-8")
        most = len(data) + 2  # no token is shorter than a byte, and a text may get one before and one after it
        ids = (ctypes.c_int32 * most)()
        count = self._call("llama_tokenize", self.vocabulary, data, len(data), ids, most, adds_special, True)
        if count < 0:
            raise RequestRejected(f"llama.cpp has no tokens for the text {text!r}.")
        return list(ids[:count])

    def _choose(self, logits: Any) -> int:
        """Return the most likely id; with a grammar, the most likely one that it permits."""
        return int(logits.argmax()) if self.grammar is None else self.grammar.choose(logits)

    def _call(self, name: str, *arguments: Any) -> Any:
        return self.functions[name](*arguments)

    def _empty(self) -> None:
        self.position = 0
        self._call("llama_memory_clear", self._call("llama_get_memory", self.context), True)

    def _forward(self, ids: list[int], last_only: bool) -> Any:
        """Process ids after those in the cache; return logits, float32 (rows, vocabulary)."""
        batch = self.batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, self.position + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = not last_only or index == len(ids) - 1
        code = self._call("llama_decode", self.context, batch)
        if code:
            raise RequestRejected(f"llama.cpp could not process {len(ids)} tokens (code {code}): {self._reason()}")
        self.position += len(ids)
        rows = [len(ids) - 1] if last_only else range(len(ids))
        found = [self._call("llama_get_logits_ith", self.context, index) for index in rows]
        return self.numpy.stack([self.numpy.ctypeslib.as_array(row, (self.width,)).copy() for row in found])

    def _keep_error(self, level: int, text: bytes, _: Any) -> None:
        if level >= ERROR_LEVEL and text.strip(b". \n"):
            self.errors.append(text.decode("utf-8", "replace").strip())

    def _reason(self) -> str:
        return " ".join(self.errors[-2:]) or "llama.cpp logged no reason."


def _other_version() -> ModuleNotFoundError:
    """Return an error that names the package, of which a version with the known interface is missing."""
    return ModuleNotFoundError(f"{PACKAGE} with another interface", name=PACKAGE)
