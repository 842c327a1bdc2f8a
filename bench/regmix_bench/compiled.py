"""What the compiler makes of every kernel: a table that needs no GPU.

Enters: the kernels' shipped configurations. Leaves: registers, shared memory, spills and matrix
instructions for sm_80 and sm_90, as records. Times nothing: how fast a kernel is, a GPU says.

    python -m regmix_bench.compiled --json results.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from regmix_bench import harness


def measure(word: str = "") -> Iterator[harness.Record]:
    """Compile every case whose name contains `word`, and yield what the compiler made of it."""
    from regmix_kernels.compilation import CAPABILITIES, compile_case, shipped

    for capability in CAPABILITIES:
        for case in shipped(capability):
            if word not in case.name:
                continue
            report = compile_case(case, capability)
            for metric, value, unit in (
                ("registers", report.registers, "registers of a thread"),
                ("shared memory", report.shared_bytes, "bytes of a block"),
                ("spills", report.num_spills, "instructions"),
                ("stack", report.stack_bytes, "bytes of a thread"),
                ("matrix instructions", report.matrix_instructions, "instructions"),
                ("special functions", report.opcodes.get("MUFU", 0), "instructions"),
            ):
                name = f"sm_{capability} {case.name}, {case.num_warps} warps"
                yield harness.Record(
                    suite="compiled", case=name, metric=metric, value=float(value), unit=unit
                )


def main() -> None:
    """Compile, print the table; with --json, append the records to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="append records to FILE")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with WORD in their name")
    arguments = parser.parse_args()
    records = list(measure(arguments.only))
    print(harness.table(records))
    if arguments.json:
        harness.append(arguments.json, records)


if __name__ == "__main__":
    main()
