"""Every id of a packed corpus against `tokenizers`, document by document.

Enters: a corpus and a tokenizer.json. Leaves: how many documents and tokens were equal, as
records, or an error that names the first document that differs. Packs with the fast engine, then
encodes every document whole with `tokenizers`, on its own, and compares with the shards.

    python -m regmix_bench.pack_ids CORPUS --tokenizer tokenizer.json --json FILE
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from regmix_bench import harness


def compare(corpus: Path, tokenizer: Path, out: Path) -> tuple[int, int]:
    """Return the documents and tokens that were compared; `RuntimeError` at a difference."""
    import tokenizers

    from regmix.data.packing.corpus import (
        Tally,
        choose_sides,
        find_sources,
        read_documents,
        side_of,
    )
    from regmix.data.packing.pack import pack
    from regmix.data.shards import ShardSet

    pack([corpus], out, tokenizer=tokenizer, engine="fast")
    shards = ShardSet.open(out)
    library = tokenizers.Tokenizer.from_file(str(tokenizer))
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    files, fraction = choose_sides(find_sources([corpus]).files, None)
    starts: dict[tuple[str, str], np.ndarray] = {}
    tokens: dict[tuple[str, str], np.ndarray] = {}
    for side in shards.splits:
        for domain in shards.domains(side):
            tokens[side, domain] = np.concatenate(shards.arrays(side, domain))
            places = shards.document_offsets(side, domain)
            starts[side, domain] = np.append(places, len(tokens[side, domain])).astype(np.int64)
    met: defaultdict[tuple[str, str], int] = defaultdict(int)
    total = 0
    for source in files:
        for text, utf8 in read_documents(source, Tally()):
            key = (source.side or side_of(utf8, fraction or 0.0), source.domain)
            number = met[key]
            met[key] += 1
            start, end = starts[key][number : number + 2]
            wanted = library.encode(text, add_special_tokens=False).ids
            if tokens[key][start : end - 1].tolist() != wanted:
                raise RuntimeError(f"{key}, document {number} of {source.path}: ids differ")
            if tokens[key][end - 1] != shards.separator_id:
                raise RuntimeError(f"{key}, document {number} of {source.path}: no separator")
            total += int(end - start)
    if {key: len(places) - 1 for key, places in starts.items()} != dict(met):
        raise RuntimeError("the shards hold other documents than the corpus")
    return sum(met.values()), total


def main() -> None:
    """Compare and print; with --json, append the records to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--json", metavar="FILE", help="append records to FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        documents, tokens = compare(arguments.corpus, arguments.tokenizer, Path(folder) / "shards")
    case = f"{arguments.corpus.name}, {arguments.tokenizer.name}"
    records = [
        harness.Record(suite="pack_ids", case=case, metric=metric, value=value, unit="all equal")
        for metric, value in (("documents compared", documents), ("tokens compared", tokens))
    ]
    print(harness.table(records))
    if arguments.json:
        harness.append(arguments.json, records)


if __name__ == "__main__":
    main()
