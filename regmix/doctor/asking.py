"""Questions to other programs: the probe and nvidia-smi, both bounded in time.

Enters: what to run. Leaves: what they said, or why they said nothing. nvidia-smi is asked with
`--query` options only, which change nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROBE = Path(__file__).with_name("probe.py")
# Eight GPUs whose driver is not kept loaded take half a minute to wake.
PROBE_SECONDS = 120.0
SMI_SECONDS = 30.0


def ask_probe(
    tokenizer: Sequence[str] = (),
    *,
    program: Sequence[str] = (str(PROBE),),
    limit_seconds: float = PROBE_SECONDS,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return section -> answer, and section -> why there is none, of a fresh interpreter.

    tokenizer: nothing, or the path of a tokenizer and its separator.
    """
    words = [sys.executable, *program, *tokenizer]
    # As the workers of a sweep are started: the current folder is not searched for modules.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        errors="replace",
    )
    try:
        output, errors = process.communicate(timeout=limit_seconds)
        ending = _ending(process.returncode, errors)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        ending = f"no answer within {limit_seconds:.0f} s"
    except BaseException:
        process.kill()
        raise
    return read_answers(output, ending)


def read_answers(output: str, ending: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the answers and failures of the probe's lines; `ending` is why it ended early.

    Where not even the first line is there, the one failure is called "probe".
    """
    answers: dict[str, Any] = {}
    failures: dict[str, str] = {}
    begun, sections = None, ["probe"]
    for line in output.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if "sections" in said:
            sections = said["sections"]
        elif "begun" in said:
            begun = said["begun"]
        elif "error" in said:
            failures[said["section"]], begun = said["error"], None
        else:
            answers[said["section"]], begun = said["answer"], None
    ending = ending or "ended without an answer"
    for section in sections:
        if section == begun or (begun is None and section not in {*answers, *failures}):
            failures[section] = ending
        elif section not in {*answers, *failures}:
            failures[section] = f"not asked, as the probe stopped at {begun}"
    return answers, failures


def _ending(code: int, errors: str) -> str:
    if code == 0:
        return ""
    last = errors.strip().splitlines()[-1:] or ["nothing on stderr"]
    how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"{how}: {last[0][:200]}"


def ask_smi(words: Sequence[str], *, limit_seconds: float = SMI_SECONDS) -> tuple[str, str]:
    """Return nvidia-smi's answer to a query, and why there is none."""
    assert all(word.startswith(("--query-", "--format=")) for word in words)
    try:
        done = subprocess.run(
            ["nvidia-smi", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_seconds,
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer within {limit_seconds:.0f} s"
    except OSError as error:
        return "", str(error)
    if done.returncode != 0:
        said = (done.stdout.strip() or done.stderr.strip() or "no word").splitlines()[0]
        return "", f"{said[:200]} (code {done.returncode})"
    return done.stdout, ""
