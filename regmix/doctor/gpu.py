"""The GPUs and the driver: what is there, what torch can use, who else uses it.

Enters: what nvidia-smi and torch say. Leaves: findings. Only reads: clocks, modes and processes
stay as they are.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

from regmix.display import size
from regmix.doctor.cards import CardFacts, look_at_cards
from regmix.doctor.findings import Finding, Request, Subject, note, ok, problem

LEAST_CAPABILITY = (8, 0)  # bf16 products in the tensor cores
LEAST_FREE_BYTES = 2 << 30
BUSY_SHARE = 0.1
# First driver of the series that runs programs of a CUDA version (CUDA's compatibility guide).
FIRST_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
TORCH_CURE = "Install the build of torch for this driver: https://pytorch.org/get-started/locally"


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU as torch counts them; error: why a small product failed."""

    index: int
    name: str
    capability: tuple[int, int]
    free_bytes: int
    total_bytes: int
    uuid: str
    error: str

    @property
    def usable(self) -> bool:
        """Whether a worker could train on it now."""
        fits = self.capability >= LEAST_CAPABILITY and self.free_bytes >= LEAST_FREE_BYTES
        return fits and not self.error


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the driver and torch say.

    torch: its version, None where it could not be imported (torch_error says why); cuda: of its
    build, None for a CPU build; driver_cuda: newest CUDA of the driver, 12040 for 12.4; visible:
    CUDA_VISIBLE_DEVICES; wanted: GPUs that must be usable.
    """

    cards: CardFacts
    torch: str | None
    torch_error: str
    cuda: str | None
    hip: str | None
    driver_cuda: int | None
    cuda_error: str
    devices: tuple[Device, ...]
    visible: str | None
    wanted: int | None

    @property
    def has_driver(self) -> bool:
        """Whether a driver shows GPUs to this system."""
        return bool(self.cards.cards or self.cards.nodes)

    @property
    def hidden(self) -> bool:
        """Whether the environment hides every GPU."""
        return self.visible is not None and self.visible.strip() in ("", "-1")


def gather(request: Request) -> Facts:
    """Return the facts of this machine's GPUs."""
    build = request.answer("torch")
    failures = request.failures
    torch_error = failures.get("torch") or ("" if build else failures.get("probe", "no answer"))
    cuda_error = failures.get("devices") or str(build.get("cuda_error", ""))
    devices = tuple(
        Device(
            index=row["index"],
            name=row.get("name", "unknown"),
            capability=tuple(row.get("capability", (0, 0))),
            free_bytes=row.get("free_bytes", 0),
            total_bytes=row.get("total_bytes", 0),
            uuid=row.get("uuid", ""),
            error=row["error"],
        )
        for row in request.answer("devices").get("devices", [])
    )
    return Facts(
        cards=request.cards if request.cards is not None else look_at_cards(),
        torch=build.get("version"),
        torch_error=torch_error,
        cuda=build.get("cuda"),
        hip=build.get("hip"),
        driver_cuda=build.get("driver_cuda") or None,
        cuda_error=cuda_error,
        devices=devices,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        wanted=request.gpus,
    )


def check_torch(facts: Facts) -> list[Finding]:
    """Does torch load, and is it a build that can use the GPUs that are there?"""
    if facts.torch is None:
        return [problem(f"torch cannot be used: {facts.torch_error}", 'pip install "torch>=2.10"')]
    if facts.hip is not None:
        return [
            note(
                f"torch {facts.torch} is built for ROCm {facts.hip}, which is not supported",
                "Work on the CPU, or on an NVIDIA GPU with a CUDA build of torch",
            )
        ]
    if facts.cuda is None:
        what = f"torch {facts.torch}, a CPU build"
        if facts.has_driver:
            number = max(len(facts.cards.cards), facts.cards.nodes)
            gpus = "GPU" if number == 1 else "GPUs"
            level = note if facts.hidden else problem
            return [level(f"{what}, on a machine with {number} NVIDIA {gpus}", TORCH_CURE)]
        return [ok(what)]
    return [ok(f"torch {facts.torch}, built for CUDA {facts.cuda}")]


def check_driver(facts: Facts) -> list[Finding]:
    """Does the driver answer, and is it new enough for torch's CUDA?"""
    found = []
    if facts.cards.error:
        cure = "Start nvidia-smi by hand; a mismatch of driver and library is cured by a restart"
        level = problem if facts.has_driver or facts.cards.on_bus else note
        found.append(level(f"nvidia-smi fails: {facts.cards.error}", cure))
    versions = {card.driver for card in facts.cards.cards}
    major = int((facts.cuda or "0").split(".")[0])
    newest = None if facts.driver_cuda is None else facts.driver_cuda // 1000
    first = FIRST_DRIVERS.get(major)
    old = newest is not None and newest < major
    if first is not None:
        old = old or any(_dotted(version) < _dotted(first) for version in versions)
    driver = f"driver {', '.join(sorted(versions)) or 'of unknown version'}"
    if facts.driver_cuda:
        driver += f" (CUDA up to {newest}.{facts.driver_cuda % 1000 // 10})"
    if old:
        least = f"{first} or newer" if first else "a newer one"
        found.append(
            problem(
                f"{driver} is too old for torch {facts.torch}, built for CUDA {facts.cuda}",
                f"Update the driver ({least}), or install a torch built for an older CUDA",
            )
        )
    elif versions and not facts.cards.error:
        found.append(ok(driver))
    return found


def _dotted(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def check_visible(facts: Facts) -> list[Finding]:
    """Does CUDA_VISIBLE_DEVICES name GPUs that exist, each once?"""
    if facts.visible is None:
        return []
    said = f"CUDA_VISIBLE_DEVICES='{facts.visible}'"
    if facts.hidden:
        return [note(f"{said} hides every GPU", "unset CUDA_VISIBLE_DEVICES, to use them")]
    number = len(facts.cards.cards) or facts.cards.nodes
    wrong = []
    words = [word.strip() for word in facts.visible.split(",")]
    for word in words:
        if word.startswith(("GPU-", "MIG-")):
            known = [card.uuid for card in facts.cards.cards]
            if word.startswith("GPU-") and known and not any(u.startswith(word) for u in known):
                wrong.append(f"no GPU is called {word}")
        elif not word.isdecimal():
            wrong.append(f"'{word}' is neither a number nor a GPU-... or MIG-... name")
        elif number and int(word) >= number:
            there = f"one of 0 to {number - 1}" if number > 1 else "0, the only GPU"
            wrong.append(f"{word} is not {there}")
    wrong += [f"{word} is there twice" for word, times in Counter(words).items() if times > 1]
    if not wrong:
        return [ok(said)]
    cure = "Name each GPU once, for example CUDA_VISIBLE_DEVICES=0,1, or unset it"
    what = f"{said}: {'; '.join(wrong)}; CUDA ignores a wrong name and all after it"
    return [problem(what, cure) if number else note(what, cure)]


def check_presence(facts: Facts) -> list[Finding]:
    """Does torch see a GPU where there is one?"""
    if facts.devices or facts.torch is None:
        return []
    if not facts.has_driver:
        if facts.cards.on_bus:
            return [
                note(
                    f"the bus has NVIDIA GPUs ({facts.cards.on_bus}), but no driver shows them",
                    "Install the driver; in a container: --gpus all (NVIDIA Container Toolkit)",
                )
            ]
        cure = "Go on with small proxies; on a machine with a GPU, see that its driver is loaded"
        return [note("no GPU: proxies train on the CPU", cure)]
    if facts.cuda is None or facts.hidden:
        return []  # said by other checks
    why = f": {facts.cuda_error}" if facts.cuda_error else ""
    cure = "Mend the driver or the container (--gpus all, /dev/nvidia-uvm); start nvidia-smi there"
    if any(card.mig == "Enabled" for card in facts.cards.cards):
        cure = "MIG is on: name an instance, CUDA_VISIBLE_DEVICES=MIG-... (nvidia-smi -L lists)"
    return [problem(f"there are GPUs, but torch can use none{why}", cure)]


def check_devices(facts: Facts) -> list[Finding]:
    """Can each GPU that torch sees be used?"""
    found = []
    for device in facts.devices:
        capability = ".".join(map(str, device.capability))
        what = (
            f"GPU {device.index}: {device.name}, capability {capability}, "
            f"{size(device.free_bytes)} free of {size(device.total_bytes)}"
        )
        if device.error:
            cure = "Restart the machine where the GPU is lost; " + TORCH_CURE
            if "memory" in device.error or "busy" in device.error:
                cure = "Stop the programs that use it (nvidia-smi lists them)"
            found.append(problem(f"{what}: a small product fails ({device.error})", cure))
        elif device.capability < LEAST_CAPABILITY:
            least = ".".join(map(str, LEAST_CAPABILITY))
            found.append(
                note(
                    f"{what}: the kernels need {least}",
                    "Use an A100 or newer, or leave it out with CUDA_VISIBLE_DEVICES",
                )
            )
        elif not device.usable:
            found.append(
                problem(f"{what}: too little is free", "Stop the programs that use it, or wait")
            )
        else:
            found.append(ok(what))
    return found


def check_modes(facts: Facts) -> list[Finding]:
    """Are ECC, MIG and compute mode as training wants them?"""
    found = []
    admin = "Ask the administrator; doctor changes no setting"
    for card in facts.cards.cards:
        who = f"GPU {card.index} of nvidia-smi ({card.name})"
        if card.uncorrected:
            found.append(
                problem(
                    f"{who}: {card.uncorrected:,} uncorrected memory errors since the last start",
                    "Do not train on it: leave it out with CUDA_VISIBLE_DEVICES, and have it reset",
                )
            )
        if card.ecc == "Disabled":
            found.append(note(f"{who}: ECC is off, memory errors go unseen", admin))
        if card.mig == "Enabled":
            found.append(
                note(
                    f"{who}: MIG is on, a process sees one instance at most",
                    "Name an instance: CUDA_VISIBLE_DEVICES=MIG-... (nvidia-smi -L lists them), "
                    "or ask the administrator for the whole GPU",
                )
            )
        if card.compute_mode == "Prohibited":
            found.append(problem(f"{who}: compute mode Prohibited, no program may use it", admin))
        elif card.compute_mode == "Exclusive_Process":
            found.append(note(f"{who}: one process at a time (Exclusive_Process)", admin))
        if card.persistence == "Disabled":
            found.append(note(f"{who}: persistence is off, each start waits for the driver", admin))
    if facts.cards.cards and not found:
        found.append(ok("ECC on or absent, MIG off, compute mode default"))
    return found


def check_others(facts: Facts) -> list[Finding]:
    """Do other programs use the GPUs?"""
    if not facts.cards.cards:
        return []
    found = []
    for card in facts.cards.cards:
        users = [process for process in facts.cards.processes if process.uuid == card.uuid]
        share = (card.used_bytes or 0) / (card.total_bytes or 1)
        if not users and share < BUSY_SHARE:
            continue
        names = ", ".join(f"{process.name} (process {process.pid})" for process in users[:4])
        used = "an unknown amount" if card.used_bytes is None else size(card.used_bytes)
        who = names or "programs that cannot be seen from here, as in other containers"
        what = f"GPU {card.index} of nvidia-smi: {used} in use by {who}"
        found.append(note(what, "Wait for them, or leave the GPU out with CUDA_VISIBLE_DEVICES"))
    return found or [ok("no other program uses the GPUs")]


def check_wanted(facts: Facts) -> list[Finding]:
    """Are as many GPUs usable as were asked for?"""
    if facts.wanted is None:
        return []
    usable = sum(device.usable for device in facts.devices)
    what = f"{usable} usable GPUs, --gpus {facts.wanted} asks for {facts.wanted}"
    if usable >= facts.wanted:
        return [ok(what)]
    cure = f"Use --gpus {usable}" if usable else "Leave --gpus out to work on the CPU"
    return [problem(what, f"{cure}, or mend what is said above")]


SUBJECT = Subject(
    "gpu",
    gather,
    (
        *(check_torch, check_driver, check_visible, check_presence, check_devices),
        *(check_modes, check_others, check_wanted),
    ),
)
