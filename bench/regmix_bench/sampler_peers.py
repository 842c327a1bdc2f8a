"""Other loaders behind one interface: the reference's, litdata, mosaicml-streaming, Megatron.

Enters: the corpus, a number of DataLoader workers. Leaves: int64 batches of 16 sequences, each in
the loader's own format, made once. Every loader has the settings that were fastest for it. A peer
that cannot be imported says so, and is left out.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from regmix_bench.peer_imports import stand_in_for_torchvision
from regmix_bench.sampler_data import BATCH, DOMAINS, LENGTH, SEQ_LEN, WEIGHTS, Corpus

REFERENCE_BLOCKS = 256  # sequences in a chunk file, as in the reference's preparation script
MEGATRON_DOCUMENT = 1 << 16  # tokens; longer documents are easier for it: fewer joins
MEGATRON_STEPS = 1_000_000  # its index is built for a run of this length


class Peer:
    """A loader: `make` its data, then iterate; `checkpoint` and `resume` as its users would."""

    name = ""
    needs: tuple[str, ...] = ("torch",)
    workers: tuple[int, ...] = (0, 2)

    def __init__(self, corpus: Corpus, num_workers: int = 0) -> None:
        self.corpus, self.num_workers = corpus, num_workers
        self.folder = corpus.folder / self.name

    def missing(self) -> str | None:
        """Return why this peer cannot run here, or None."""
        for module in self.needs:
            try:
                importlib.import_module(module)
            except ImportError as error:
                return f"{module}: {error}"
        return None

    def make(self) -> None:
        """Write the corpus in this loader's format, unless it is there."""
        note = self.folder / "made.json"
        said = json.dumps({"tokens": self.corpus.num_tokens})
        if note.is_file() and note.read_text(encoding="utf-8") == said:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.write()
        note.write_text(said, encoding="utf-8")

    def write(self) -> None:
        """Write the data."""
        raise NotImplementedError

    def open(self) -> None:
        """Make the loader, before its first batch."""
        raise NotImplementedError

    def batches(self) -> Iterator[Any]:
        """Yield int64 tensors [16, T+1] without end."""
        raise NotImplementedError

    def checkpoint(self, step: int) -> Any:
        """Return what a checkpoint keeps at the start of `step`; not timed."""
        return step

    def resume(self, state: Any) -> Iterator[Any]:
        """Return the batches from the checkpoint on, of a loader just opened."""
        raise NotImplementedError


def _endless(loader: Any, unpack: Callable[[Any], Any]) -> Iterator[Any]:
    while True:
        for batch in loader:
            yield unpack(batch)


class Reference(Peer):
    """Our stand-in of sail-sg/regmix's loader, written from its description.

    Per sequence: `random.choices` over the domains, then the next block of that domain's current
    chunk file, mapped, in random order, made int64. One chunk is open per domain, as its training
    script has it. Files have no header, and no call serves anything but the next sequence.
    """

    name = "reference"

    def write(self) -> None:
        """Write chunk files of 256 sequences; a last one that is not full is not written."""
        for domain in DOMAINS:
            blocks = self.corpus.blocks(domain)
            size = max(1, min(REFERENCE_BLOCKS, len(blocks) // 2))
            for number in range(len(blocks) // size):
                chunk = blocks[number * size : (number + 1) * size]
                chunk.tofile(self.folder / f"{domain}_{number:010d}.bin")

    def open(self) -> None:
        """Make the data sets and the DataLoader."""
        from torch.utils.data import DataLoader

        files = [sorted(self.folder.glob(f"{domain}_*.bin")) for domain in DOMAINS]
        for domain_files in files:
            random.Random(1).shuffle(domain_files)
        self._loader = DataLoader(
            _combined(files), batch_size=BATCH, shuffle=False, num_workers=self.num_workers
        )

    def batches(self) -> Iterator[Any]:
        """See `Peer.batches`."""
        return iter(self._loader)

    def resume(self, state: int) -> Iterator[Any]:
        """Replay every batch: that is how its training script resumes."""
        iterator = iter(self._loader)
        for _ in range(state):
            next(iterator)
        return iterator


def _combined(files: list[list[Path]]) -> Any:
    """Return the reference's iterable data set over the files of each domain."""
    import torch
    from torch.utils.data import IterableDataset, get_worker_info

    class Blocks:
        def __init__(self, paths: list[Path], num_chunks: int = 1) -> None:
            self._paths, self._file, self._num_chunks = paths, 0, num_chunks
            self._generator = np.random.default_rng(1)
            self._order = np.empty(0, np.int64)
            self._at = 0

        def __next__(self) -> Any:
            if self._at == len(self._order):
                self._open_chunks()
            block = self._order[self._at]
            self._at += 1
            buffer = self._buffers[block // self._num_blocks]
            offset = (block % self._num_blocks) * LENGTH * 2
            tokens = np.frombuffer(buffer, np.uint16, LENGTH, offset)
            return torch.from_numpy(tokens.astype(np.int64))

        def _open_chunks(self) -> None:
            if self._file + self._num_chunks > len(self._paths):
                self._file = 0
            chunks = self._paths[self._file : self._file + self._num_chunks]
            self._file += self._num_chunks
            self._buffers = [np.memmap(path, mode="r").data for path in chunks]
            self._num_blocks = len(self._buffers[0]) // (2 * LENGTH)
            self._order = self._generator.permutation(self._num_blocks * self._num_chunks)
            self._at = 0

    class Combined(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            worker = get_worker_info()
            first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
            parts = [Blocks(paths[first::stride] or paths) for paths in files]
            choices, numbers = random.Random(1).choices, range(len(parts))
            while True:
                yield next(parts[choices(numbers, weights=WEIGHTS, k=1)[0]])

    return Combined()


class Litdata(Peer):
    """litdata's CombinedStreamingDataset over TokensLoader, one data set a domain."""

    name = "litdata"
    needs = ("torch", "litdata")

    def write(self) -> None:
        """Write chunks of 8,012 sequences, the size that its documentation shows."""
        import torch
        from litdata.streaming.cache import Cache
        from litdata.streaming.item_loader import TokensLoader

        for domain in DOMAINS:
            folder = self.folder / domain
            folder.mkdir()
            cache = Cache(
                str(folder), chunk_size=LENGTH * 8012, item_loader=TokensLoader(block_size=LENGTH)
            )
            blocks = self.corpus.blocks(domain)
            for number, first in enumerate(range(0, len(blocks), 256)):
                cache[number] = torch.from_numpy(blocks[first : first + 256].reshape(-1).copy())
            cache.done()
            cache.merge()

    def open(self) -> None:
        """Make the data sets and the loader."""
        from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset
        from litdata.streaming.item_loader import TokensLoader

        parts = [
            StreamingDataset(
                str(self.folder / domain),
                item_loader=TokensLoader(block_size=LENGTH),
                shuffle=True,
                drop_last=True,
            )
            for domain in DOMAINS
        ]
        combined = CombinedStreamingDataset(
            parts, weights=list(WEIGHTS), iterate_over_all=False, seed=2
        )
        self._loader = StreamingDataLoader(combined, batch_size=BATCH, num_workers=self.num_workers)

    def batches(self) -> Iterator[Any]:
        """See `Peer.batches`."""
        return _endless(self._loader, lambda batch: batch.long())

    def checkpoint(self, step: int) -> Any:
        """Run to the step and keep what the loader says."""
        iterator = iter(self._loader)
        for _ in range(step):
            next(iterator)
        return self._loader.state_dict()

    def resume(self, state: Any) -> Iterator[Any]:
        """Load the state of the loader."""
        self._loader.load_state_dict(state)
        return self.batches()


class Mosaic(Peer):
    """mosaicml-streaming's StreamingDataset with one Stream a domain and its proportion."""

    name = "mosaicml-streaming"
    needs = ("torch", "streaming")
    workers = (0, 2, 8)
    _opened = 0

    def missing(self) -> str | None:
        """See `Peer.missing`; the package imports torchvision for image data only."""
        stand_in_for_torchvision()
        return super().missing()

    def write(self) -> None:
        """Write MDS shards of 64 MiB, its default."""
        from streaming import MDSWriter

        columns = {"tokens": f"ndarray:uint16:{LENGTH}"}
        for domain in DOMAINS:
            with MDSWriter(out=str(self.folder / domain), columns=columns) as out:
                for block in self.corpus.blocks(domain):
                    out.write({"tokens": np.asarray(block)})

    def open(self) -> None:
        """Make the data set under a name of this process: two may not share a local folder."""
        from streaming import Stream, StreamingDataLoader, StreamingDataset

        Mosaic._opened += 1
        local = self.folder.parent / f"{self.name}-{os.getpid()}-{Mosaic._opened}"
        local.symlink_to(self.folder.resolve())
        atexit.register(local.unlink, missing_ok=True)
        streams = [
            Stream(local=str(local / domain), proportion=weight)
            for domain, weight in zip(DOMAINS, WEIGHTS, strict=True)
        ]
        self._dataset = StreamingDataset(
            streams=streams, batch_size=BATCH, shuffle=True, num_canonical_nodes=1
        )
        self._loader = StreamingDataLoader(
            self._dataset, batch_size=BATCH, num_workers=self.num_workers, collate_fn=_stack_tokens
        )

    def batches(self) -> Iterator[Any]:
        """See `Peer.batches`."""
        return _endless(self._loader, lambda batch: batch)

    def checkpoint(self, step: int) -> Any:
        """Return what its loader would keep after so many samples."""
        return self._dataset.state_dict(step * BATCH, from_beginning=True)

    def resume(self, state: Any) -> Iterator[Any]:
        """Load the state of the loader."""
        self._loader.load_state_dict(state)
        return self.batches()


def _stack_tokens(samples: list[dict[str, Any]]) -> Any:
    import torch

    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))


class _Tokenizer:
    """What Megatron asks of a tokenizer."""

    vocab_size = 50_277
    eod = 0
    pad = -1
    unique_identifiers: dict[str, str] = {"class": "bench"}  # noqa: RUF012


class Megatron(Peer):
    """Megatron-core's BlendedDataset over GPTDataset; its `.bin` files are links to our shards."""

    name = "megatron"
    needs = ("torch", "megatron.core.datasets.gpt_dataset", "megatron.core.datasets.helpers_cpp")

    def write(self) -> None:
        """Write an index beside each shard, and build the indices of the run."""
        from regmix.data.writer import HEADER_BYTES

        for domain in DOMAINS:
            (self.folder / f"{domain}.bin").symlink_to(
                (self.corpus.shards / "train" / f"{domain}-0.tokens").resolve()
            )
            num_tokens = len(self.corpus.tokens(domain))
            starts = np.arange(0, num_tokens, MEGATRON_DOCUMENT, dtype=np.int64)
            lengths = np.minimum(MEGATRON_DOCUMENT, num_tokens - starts).astype(np.int32)
            with (self.folder / f"{domain}.idx").open("wb") as out:
                out.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 8))
                out.write(struct.pack("<QQ", len(starts), len(starts) + 1))
                out.write(lengths.tobytes() + (HEADER_BYTES + 2 * starts).tobytes())
                out.write(np.arange(len(starts) + 1, dtype=np.int64).tobytes())
        self.open()

    def open(self) -> None:
        """Build the blend; the indices come from their cache after the first time."""
        import torch
        from megatron.core.datasets.blended_megatron_dataset_builder import (
            BlendedMegatronDatasetBuilder,
        )
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        if not torch.distributed.is_initialized():
            store = self.folder / f"store-{os.getpid()}"
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store.resolve()}", rank=0, world_size=1
            )
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=SEQ_LEN,
            blend=([str(self.folder / domain) for domain in DOMAINS], list(WEIGHTS)),
            split="1,0,0",
            path_to_cache=str(self.folder / "cache"),
            tokenizer=_Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        sizes = [MEGATRON_STEPS * BATCH + 16 * BATCH, 0, 0]
        builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
        self._dataset = builder.build()[0]

    def batches(self) -> Iterator[Any]:
        """See `Peer.batches`."""
        return self.resume(0)

    def resume(self, state: int) -> Iterator[Any]:
        """Start at an index, which is all that its order depends on."""
        from torch.utils.data import DataLoader

        indices = range(state * BATCH, len(self._dataset))
        loader = DataLoader(
            self._dataset,
            batch_size=BATCH,
            sampler=indices,
            num_workers=self.num_workers,
            collate_fn=_stack_text,
        )
        return _endless(loader, lambda batch: batch[0])


def _stack_text(samples: list[dict[str, Any]]) -> Any:
    import torch

    tokens = torch.stack([sample["tokens"] for sample in samples])
    return tokens, torch.stack([sample["labels"] for sample in samples])


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Reference, Litdata, Megatron, Mosaic)}
