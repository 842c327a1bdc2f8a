"""What the libraries say about themselves, asked in a process of its own.

A broken build can hang or crash whoever imports it, and a CUDA context would stay in the memory
of every GPU. So this file is run by its path, as the workers of a sweep are started, and answers
one line of JSON per section, each before the next is begun; `asking.py` reads them.

Enters: the path of a tokenizer and its separator, or nothing. Leaves: lines on stdout. Judges
nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

TINY_ELEMENTS = 1024


def imports() -> dict[str, Any]:
    """Return the files that a worker's imports find."""
    import importlib.util

    found: dict[str, Any] = {}
    for name in ("regmix", "regmix_kernels", "regmix._sampler"):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # the package of a module that is asked for
            spec = None
        found[name] = None if spec is None else spec.origin
    return found


def sampler() -> dict[str, Any]:
    """Return which backend serves, and why those before it do not."""
    from regmix.data.sampling.backends import BACKENDS, load_backend
    from regmix.errors import RegmixError

    reasons = {}
    for name in BACKENDS:
        try:
            load_backend(name)
        except RegmixError as error:
            reasons[name] = error.what
        except Exception as error:
            reasons[name] = f"{name}: {type(error).__name__}: {error}"
        else:
            break
    return {"chosen": next((n for n in BACKENDS if n not in reasons), None), "reasons": reasons}


def tokenizer(path: str | None, separator: str | None = None) -> dict[str, Any]:
    """Return which engine encodes with the tokenizer of that path, or could with any."""
    from importlib.metadata import version

    from regmix.data.packing.engines import FAST, REFERENCE, choose_engine
    from regmix.data.tokenizer import load_tokenizer

    if path is not None:
        choice = choose_engine(load_tokenizer(path, separator=separator), "auto")
        return {"engine": choice.name, "version": choice.version, "reason": choice.reason}
    try:
        import fastokens._native  # noqa: F401 - does it load?
    except Exception as error:
        return {"engine": REFERENCE, "version": version(REFERENCE), "reason": str(error)}
    return {"engine": FAST, "version": version(FAST), "reason": ""}


def torch_build() -> dict[str, Any]:
    """Return what torch was built for and whether it finds a GPU."""
    import torch

    cuda_error = ""
    try:
        torch.cuda.init()
    except Exception as error:
        cuda_error = str(error).splitlines()[0]
    driver_cuda = None
    with contextlib.suppress(Exception):
        driver_cuda = vars(torch._C)["_cuda_getDriverVersion"]()  # CUDA builds only
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver_cuda": driver_cuda,
        "cuda_error": cuda_error,
        "num_devices": torch.cuda.device_count(),
        "threads": torch.get_num_threads(),
    }


def triton_build() -> dict[str, Any]:
    """Return the version of Triton that loads."""
    import triton

    return {"version": triton.__version__}


def devices() -> dict[str, Any]:
    """Return every GPU that torch sees, and whether a small product works on it."""
    import torch

    if not torch.cuda.is_available():
        return {"devices": []}
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        device: dict[str, Any] = {"index": index, "error": ""}
        found.append(device)
        try:
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            uuid = str(getattr(properties, "uuid", ""))
            device.update(name=properties.name, uuid=uuid, free_bytes=free, total_bytes=total)
            device["capability"] = [properties.major, properties.minor]
            ones = torch.ones(16, 16, dtype=torch.bfloat16, device=f"cuda:{index}")
            if float((ones @ ones).sum()) != 4096.0:
                device["error"] = "a product of ones is wrong"
        except Exception as error:
            device["error"] = str(error).splitlines()[0]
    return {"devices": found}


def tiny_kernel() -> Any:
    """Return a Triton kernel that doubles `SIZE` numbers; made late, as Triton may not load."""
    import triton
    import triton.language as tl

    @triton.jit
    def double(x_pointer, y_pointer, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, SIZE)
        tl.store(y_pointer + at, tl.load(x_pointer + at) * 2)

    return double


def kernel(device: str | None = None) -> dict[str, Any]:
    """Compile and run one tiny Triton kernel on each GPU (or on `device`)."""
    import torch

    double = tiny_kernel()
    available = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    errors: dict[str, str] = {}
    started = time.monotonic()
    for name in [f"cuda:{index}" for index in available] if device is None else [device]:
        errors[name] = ""
        try:
            x = torch.arange(TINY_ELEMENTS, dtype=torch.float32, device=name)
            y = torch.empty_like(x)
            if x.is_cuda:
                torch.cuda.set_device(x.device)
            double[(1,)](x, y, SIZE=TINY_ELEMENTS)
            if not torch.equal(y, x * 2):
                errors[name] = "a tiny Triton kernel gives wrong numbers"
        except Exception as error:
            errors[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return {"errors": errors, "seconds": time.monotonic() - started}


def paths() -> dict[str, Any]:
    """Return what serves each of the model's operations, per device."""
    import importlib
    import importlib.util

    import torch

    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if importlib.util.find_spec("regmix.model.dispatch") is not None:
        describe = importlib.import_module("regmix.model.dispatch").describe
        return {name: dict(describe(name)) for name in names}
    from regmix.model import ops

    return {name: {"every operation": ops.path(name)} for name in names}


def answer(sections: dict[str, Callable[[], dict[str, Any]]], say: Callable[[str], object]) -> None:
    """Say all names, then each section's name and its answer or its error, as lines of JSON."""
    say(json.dumps({"sections": list(sections)}))
    for name, section in sections.items():
        say(json.dumps({"begun": name}))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                said: dict[str, Any] = {"answer": section()}
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        say(json.dumps({"section": name, **said}))


def main() -> None:
    """Answer every section on what was stdout; libraries that print do so on stderr."""
    words = sys.argv[1:]
    with os.fdopen(os.dup(1), "w") as stream:
        os.dup2(2, 1)
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "imports": imports,
            "sampler": sampler,
            "tokenizer": lambda: tokenizer(*(words or (None,))),
            "torch": torch_build,
            "triton": triton_build,
            "devices": devices,
            "paths": paths,
            "kernel": kernel,
        }
        answer(sections, lambda line: print(line, file=stream, flush=True))


if __name__ == "__main__":
    main()
