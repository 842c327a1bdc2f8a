"""The encoding process, started by encoder_pool.py with `python -m`.

Enters, on standard input: the settings, then one message a block. Leaves, on standard output: one
answer a block, in their order. Ends with its input.
"""

from __future__ import annotations

import os
import sys

from regmix.data.packing.encoder import BlockEncoder, EncoderSettings
from regmix.data.packing.encoder_pool import describe_error, receive, send, send_encoded
from regmix.data.packing.readers import Block


def main() -> None:
    """Answer blocks until there are none."""
    stdin = sys.stdin.buffer
    # What a library prints must not mix with the answers.
    stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        settings, _ = receive(stdin)
        encoder: BlockEncoder | None = None
        while True:
            table, buffers = receive(stdin)
            side, verify_bytes = table.pop("side"), table.pop("verify_bytes")
            table["refused"] = {int(row): words for row, words in table["refused"].items()}
            raw = buffers.pop()
            try:
                encoder = encoder or BlockEncoder(EncoderSettings(**settings))
                result = encoder.encode(Block(**table), raw, side=side, verify_bytes=verify_bytes)
            except Exception as error:  # is the coordinator's to judge
                send(stdout, {"error": describe_error(error)})
            else:
                send_encoded(stdout, result)
                del result
            del raw
    except (EOFError, BrokenPipeError):
        os._exit(0)


if __name__ == "__main__":
    main()
