"""Other ways from compressed documents to stored token ids, each a process: see `WAYS`.

Enters: a folder of `.jsonl.zst`, a `tokenizer.json`, an output folder, a number of processes.
Leaves: the data in that way's format, and on stdout the seconds, imports excluded. A way whose
package is not installed exits with its reason.

    python -m regmix_bench.pack_peers WAY CORPUS TOKENIZER OUT WORKERS
"""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CHUNK_TOKENS = 2049 * 256  # of the reference's preparation script
BATCH_DOCUMENTS = 256


def texts(path: Path) -> Iterator[str]:
    """Yield the documents of a file."""
    import zstandard

    with path.open("rb") as raw:
        stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            yield json.loads(line)["text"]


@functools.cache
def load_tokenizer(path: str) -> Any:
    """Return the tokenizer, loaded once a process: real files are larger than the sample's."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)


class ChunkBuilder:
    """The reference's packed files: arrays are joined and cut into chunks of one size.

    A last chunk that is not full is never written, as there.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix
        self._chunk = np.zeros(CHUNK_TOKENS, np.uint16)
        self._filled = self._number = 0

    def add(self, ids: np.ndarray) -> None:
        """Append a document."""
        while self._filled + len(ids) > CHUNK_TOKENS:
            room = CHUNK_TOKENS - self._filled
            self._chunk[self._filled :] = ids[:room]
            self._chunk.tofile(self._folder / f"{self._prefix}_{self._number:010d}.bin")
            self._number, self._filled, ids = self._number + 1, 0, ids[room:]
        self._chunk[self._filled : self._filled + len(ids)] = ids
        self._filled += len(ids)


def _script_file(task: tuple[str, str, str]) -> None:
    path, tokenizer_path, out = task
    tokenizer = load_tokenizer(tokenizer_path)
    builder = ChunkBuilder(Path(out), Path(path).name.split(".")[0])
    for text in texts(Path(path)):
        builder.add(np.array(tokenizer.encode(text).ids, dtype=np.uint16))


def script(files: list[Path], tokenizer: str, out: Path, workers: int) -> None:
    """Our stand-in of sail-sg/regmix's preparation script: one document at a time, files in a pool.

    Written from its description; the original also copies every document through a torch tensor.
    """
    tasks = [(str(path), tokenizer, str(out)) for path in files]
    if workers == 1:
        for task in tasks:
            _script_file(task)
        return
    load_tokenizer(tokenizer)  # the processes inherit it
    with multiprocessing.Pool(workers) as pool:
        pool.map(_script_file, tasks, chunksize=1)


def encode_batch(files: list[Path], tokenizer: str, out: Path, workers: int) -> None:
    """`tokenizers` alone, 256 documents a call on its own threads; nothing is written."""
    loaded = load_tokenizer(tokenizer)
    for path in files:
        batch: list[str] = []
        for text in texts(path):
            batch.append(text)
            if len(batch) == BATCH_DOCUMENTS:
                loaded.encode_batch(batch)
                batch = []
        loaded.encode_batch(batch)


class _Rows:
    """Yields the ids of each document of a file; picklable for litdata's workers."""

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = tokenizer

    def __call__(self, path: str) -> Iterator[Any]:
        import torch

        tokenizer = load_tokenizer(self._tokenizer)
        for text in texts(Path(path)):
            yield torch.from_numpy(np.array(tokenizer.encode(text).ids, dtype=np.uint16))


def litdata(files: list[Path], tokenizer: str, out: Path, workers: int) -> None:
    """litdata's `optimize` for its TokensLoader."""
    from litdata import TokensLoader, optimize

    optimize(
        fn=_Rows(tokenizer),
        inputs=[str(path) for path in files],
        output_dir=str(out / "litdata"),
        chunk_size=2049 * 8012,
        item_loader=TokensLoader(),
        num_workers=workers,
    )


def _mosaic_file(task: tuple[str, str, str]) -> None:
    from streaming import MDSWriter

    path, tokenizer_path, out = task
    tokenizer = load_tokenizer(tokenizer_path)
    folder = str(Path(out) / Path(path).name.split(".")[0])
    with MDSWriter(out=folder, columns={"tokens": "ndarray:uint16"}) as writer:
        for text in texts(Path(path)):
            writer.write({"tokens": np.array(tokenizer.encode(text).ids, dtype=np.uint16)})


def mosaic(files: list[Path], tokenizer: str, out: Path, workers: int) -> None:
    """mosaicml-streaming's MDSWriter, a writer for each file."""
    tasks = [(str(path), tokenizer, str(out)) for path in files]
    if workers == 1:
        for task in tasks:
            _mosaic_file(task)
        return
    load_tokenizer(tokenizer)
    with multiprocessing.Pool(workers) as pool:
        pool.map(_mosaic_file, tasks, chunksize=1)


WAYS: dict[str, tuple[Callable[[list[Path], str, Path, int], None], str]] = {
    "script": (script, "tokenizers"),
    "encode_batch": (encode_batch, "tokenizers"),
    "litdata": (litdata, "litdata"),
    "mosaic": (mosaic, "streaming"),
}


def main() -> None:
    """Run one way and print its seconds."""
    import importlib

    way, corpus, tokenizer, out, workers = sys.argv[1:]
    run, package = WAYS[way]
    if way == "mosaic":
        from regmix_bench.peer_imports import stand_in_for_torchvision

        stand_in_for_torchvision()
    try:
        for name in ("tokenizers", "zstandard", package):
            importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"{package}: {error}") from None
    started = time.perf_counter()
    run(sorted(Path(corpus).glob("*.jsonl.zst")), tokenizer, Path(out), int(workers))
    print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
