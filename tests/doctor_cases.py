"""Facts of healthy machines, and of ill ones with what doctor must say of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from regmix.doctor import gpu, interpreter, kernels, machine, native, storage, variables
from regmix.doctor.cards import CardFacts, look_at_cards
from regmix.doctor.disk import FolderFacts, Mount, Speed, Trial
from regmix.doctor.findings import Subject

GIB = 1 << 30
LOCAL = Mount(point="/", kind="ext4", options=("rw",))
NFS = Mount(point="/home", kind="nfs4", options=("rw",))

SMI_ROW = (
    "{i}, GPU-{i}a, NVIDIA H100, 580.82.07, 81559, 600, Enabled, Disabled, Default, Enabled, 0"
)


def cards(*changes: tuple[str, str], num: int = 2, processes: str = "", **facts: Any) -> CardFacts:
    """What nvidia-smi would say of `num` GPUs, with words of the first one changed."""
    rows = [SMI_ROW.format(i=i) for i in range(num)]
    for old, new in changes:
        assert old in rows[0]
        rows[0] = rows[0].replace(old, new)

    def ask(words: Any) -> tuple[str, str]:
        return (processes if "compute-apps" in words[0] else "\n".join(rows)), ""

    return replace(look_at_cards(ask, root=Path("/nowhere")), **facts)


NO_CARDS = CardFacts(has_smi=False, error="", cards=(), processes=(), nodes=0, on_bus=0)

INTERPRETER = interpreter.Facts(
    version="3.12.4",
    supported=">=3.11,<3.14",
    fits=True,
    implementation="CPython",
    bits=64,
    system="Linux x86_64",
    free_threaded=False,
    optimized=False,
    executable="/env/bin/python",
    requirements=(
        interpreter.Requirement(name="torch", wanted=">=2.10", version="2.11.0", fits=True),
    ),
)
NATIVE = native.Facts(
    folder="/env/regmix",
    worker_folder="/env/regmix",
    extension="/env/regmix/_sampler.so",
    in_source_tree=False,
    installed="0.1.0",
    editable=False,
    revision="unknown",
    sampler={"chosen": "native", "reasons": {}},
    tokenizer={"engine": "fastokens", "version": "0.3.5", "reason": ""},
    failures={},
)
DEVICES = tuple(
    gpu.Device(
        index=index,
        name="NVIDIA H100",
        capability=(9, 0),
        free_bytes=78 * GIB,
        total_bytes=80 * GIB,
        uuid=f"{index}a",
        error="",
    )
    for index in range(2)
)
GPU = gpu.Facts(
    cards=cards(),
    torch="2.11.0",
    torch_error="",
    cuda="12.8",
    hip=None,
    driver_cuda=13000,
    cuda_error="",
    devices=DEVICES,
    visible=None,
    wanted=2,
)
NO_GPU = replace(GPU, cards=NO_CARDS, cuda=None, driver_cuda=None, devices=(), wanted=None)
FOLDER = FolderFacts(
    role="study",
    asked="/data/study",
    path="/data/study",
    mount=LOCAL,
    free_bytes=500 * 10**9,
    total_bytes=10**12,
    free_files=10**6,
    trial=Trial(),
    speed=Speed(num_bytes=32 << 20, seconds=0.02, cached=False, source="tokens.bin"),
)
KERNELS = kernels.Facts(
    triton="3.6.0",
    triton_error="",
    wanted="triton==3.6.0",
    fits=True,
    compiler="/usr/bin/gcc",
    asked=None,
    header="/usr/include/python3.12/Python.h",
    cache=replace(FOLDER, role="Triton's cache", asked="/home/me/.triton/cache"),
    launches={"cuda:0": "", "cuda:1": ""},
    launch_error="",
    paths={"cpu": {"loss": "torch-cpu"}, "cuda:0": {"loss": "triton", "attention": "sdpa"}},
    paths_error="",
    num_gpus=2,
)
MACHINE = machine.Facts(
    cores=16,
    machine_cores=16,
    quota=None,
    total_bytes=128 * GIB,
    available_bytes=120 * GIB,
    memory_limit_bytes=None,
    shared_bytes=64 * GIB,
    open_files=65536,
    open_files_ceiling=65536,
    address_bytes=None,
    file_bytes=None,
    seconds=1.8e9,
    num_gpus=2,
)
VARIABLES = variables.Facts(values={}, cores=16, gpu=True)
STORAGE = storage.Facts(folders=(FOLDER,))

HEALTHY: tuple[tuple[Subject, Any], ...] = (
    (interpreter.SUBJECT, INTERPRETER),
    (native.SUBJECT, NATIVE),
    (gpu.SUBJECT, GPU),
    (kernels.SUBJECT, KERNELS),
    (machine.SUBJECT, MACHINE),
    (variables.SUBJECT, VARIABLES),
    (storage.SUBJECT, STORAGE),
)
SUBJECT_OF = {type(facts): subject for subject, facts in HEALTHY}


def in_folder(**changes: Any) -> storage.Facts:
    return replace(STORAGE, folders=(replace(FOLDER, **changes),))


def with_variable(name: str, value: str) -> variables.Facts:
    return replace(VARIABLES, values={name: value})


# What is ill: the facts, the check that must see it, its level, a word of it, a word of its cure.
ILL: tuple[tuple[Any, str, str, str, str], ...] = (
    # interpreter
    (replace(INTERPRETER, version="3.9.1", fits=False), "version", "problem", "3.9.1", ">=3.11"),
    (replace(INTERPRETER, bits=32), "version", "problem", "32-bit", "64-bit"),
    (replace(INTERPRETER, implementation="PyPy"), "version", "problem", "PyPy", "CPython"),
    (replace(INTERPRETER, system="Darwin arm64"), "version", "note", "Linux only", "CPU"),
    (replace(INTERPRETER, free_threaded=True), "build", "note", "global lock", "ordinary"),
    (replace(INTERPRETER, optimized=True), "build", "note", "-O", "PYTHONOPTIMIZE"),
    (replace(INTERPRETER, supported=None), "packages", "note", "not installed", "pip install -e"),
    (
        replace(
            INTERPRETER,
            requirements=(
                interpreter.Requirement(name="torch", wanted=">=2.10", version="2.1", fits=False),
            ),
        ),
        *("packages", "problem", "torch 2.1 is not >=2.10", 'pip install "torch>=2.10"'),
    ),
    (
        replace(
            INTERPRETER,
            requirements=(
                interpreter.Requirement(name="numba", wanted=">=0.60", version=None, fits=False),
            ),
        ),
        *("packages", "problem", "numba is not installed", 'pip install "numba>=0.60"'),
    ),
    # package
    (
        replace(NATIVE, worker_folder="/src/regmix"),
        "origin",
        "problem",
        "/src/regmix",
        "regmix-fast",
    ),
    (replace(NATIVE, worker_folder=None), "origin", "problem", "would find none", "pip install"),
    (replace(NATIVE, failures={"imports": "boom"}), "origin", "problem", "boom", "import regmix"),
    (
        replace(
            NATIVE,
            extension=None,
            in_source_tree=True,
            sampler={"chosen": "numba", "reasons": {"native": "native: no module"}},
        ),
        *("sampler", "note", "native: no module", "another folder"),
    ),
    (
        replace(
            NATIVE,
            extension=None,
            sampler={"chosen": "numba", "reasons": {"native": "native: no module"}},
        ),
        *("sampler", "note", "numba", "compiler"),
    ),
    (
        replace(
            NATIVE,
            extension=None,
            sampler={"chosen": "numpy", "reasons": {"native": "none", "numba": "numba: no LLVM"}},
        ),
        *("sampler", "problem", "numba: no LLVM", "REGMIX_REQUIRE_NATIVE"),
    ),
    (
        replace(NATIVE, sampler={"chosen": None, "reasons": {"numpy": "broken"}}),
        *("sampler", "problem", "no sampler backend works", "again"),
    ),
    (
        replace(NATIVE, sampler={}, failures={"sampler": "killed by signal 11"}),
        *("sampler", "problem", "signal 11", "again"),
    ),
    (
        replace(
            NATIVE,
            tokenizer={"engine": "tokenizers", "version": "0.23", "reason": "it differs on 'a'"},
        ),
        *("tokenizer", "note", "it differs on 'a'", "fastokens"),
    ),
    (
        replace(NATIVE, tokenizer={}, failures={"tokenizer": "no separator"}),
        *("tokenizer", "problem", "no separator", "tokenizer"),
    ),
    (
        replace(NATIVE, extension="/src/regmix/_sampler.so"),
        *("sampler", "note", "another installation's", "pip install -e . in /env"),
    ),
    # gpu
    (replace(GPU, torch=None, torch_error="signal 11"), "torch", "problem", "signal 11", "pip"),
    (
        replace(GPU, cuda=None),
        "torch",
        "problem",
        "a CPU build, on a machine with 2",
        "pytorch.org",
    ),
    (replace(GPU, hip="6.2"), "torch", "note", "ROCm", "CUDA build"),
    (replace(GPU, cuda="13.0", driver_cuda=12040), "driver", "problem", "too old", "580"),
    (
        replace(GPU, cards=cards(("580.82.07", "470.57.02")), driver_cuda=None),
        *("driver", "problem", "470.57.02", "525.60.13"),
    ),
    (
        replace(GPU, cards=cards(error="Driver/library version mismatch (code 18)", nodes=2)),
        *("driver", "problem", "mismatch", "restart"),
    ),
    (
        replace(NO_GPU, cards=replace(NO_CARDS, has_smi=True, error="no driver (code 9)")),
        *("driver", "note", "code 9", "by hand"),
    ),
    (
        replace(NO_GPU, cards=cards(), visible=""),
        *("torch", "note", "a CPU build, on a machine with 2", "pytorch.org"),
    ),
    (replace(GPU, visible=""), "visible", "note", "hides every GPU", "unset"),
    (replace(GPU, visible="0,2"), "visible", "problem", "2 is not one of 0 to 1", "0,1"),
    (replace(GPU, visible="0,0"), "visible", "problem", "0 is there twice", "once"),
    (replace(GPU, visible="all"), "visible", "problem", "'all' is neither", "0,1"),
    (replace(GPU, visible="GPU-7"), "visible", "problem", "no GPU is called GPU-7", "0,1"),
    (replace(NO_GPU, visible="cuda"), "visible", "note", "'cuda' is neither", "unset"),
    (NO_GPU, "presence", "note", "no GPU", "driver"),
    (
        replace(NO_GPU, cards=replace(NO_CARDS, on_bus=1)),
        *("presence", "note", "no driver", "--gpus all"),
    ),
    (
        replace(GPU, devices=(), cuda_error="CUDA unknown error"),
        *("presence", "problem", "CUDA unknown error", "nvidia-smi"),
    ),
    (
        replace(GPU, devices=(), cards=cards(("Enabled, Disabled", "Enabled, Enabled"))),
        *("presence", "problem", "torch can use none", "MIG-"),
    ),
    (
        replace(GPU, devices=(replace(DEVICES[0], error="no kernel image is available"),)),
        *("devices", "problem", "no kernel image", "pytorch.org"),
    ),
    (
        replace(GPU, devices=(replace(DEVICES[0], error="CUDA out of memory"),)),
        *("devices", "problem", "out of memory", "Stop the programs"),
    ),
    (
        replace(GPU, devices=(replace(DEVICES[0], error="all devices are busy"),)),
        *("devices", "problem", "busy", "Stop the programs"),
    ),
    (
        replace(GPU, devices=(replace(DEVICES[0], capability=(7, 5)),)),
        *("devices", "note", "7.5", "A100"),
    ),
    (
        replace(GPU, devices=(replace(DEVICES[0], free_bytes=GIB),)),
        *("devices", "problem", "too little is free", "Stop"),
    ),
    (
        replace(GPU, cards=cards(("Enabled, 0", "Enabled, 3"))),
        *("modes", "problem", "3 uncorrected", "leave it out"),
    ),
    (
        replace(GPU, cards=cards(("600, Enabled", "600, Disabled"))),
        *("modes", "note", "ECC is off", "administrator"),
    ),
    (
        replace(GPU, cards=cards(("Enabled, Disabled", "Enabled, Enabled"))),
        *("modes", "note", "MIG is on", "MIG-"),
    ),
    (
        replace(GPU, cards=cards(("Default", "Prohibited"))),
        *("modes", "problem", "Prohibited", "administrator"),
    ),
    (
        replace(GPU, cards=cards(("Default", "Exclusive_Process"))),
        *("modes", "note", "one process at a time", "administrator"),
    ),
    (
        replace(GPU, cards=cards(("Default, Enabled", "Default, Disabled"))),
        *("modes", "note", "persistence", "administrator"),
    ),
    (
        replace(GPU, cards=cards(processes="GPU-0a, 4242, python, 40000")),
        *("others", "note", "python (process 4242)", "CUDA_VISIBLE_DEVICES"),
    ),
    (
        replace(GPU, cards=cards(("600", "70000"))),
        *("others", "note", "cannot be seen", "CUDA_VISIBLE_DEVICES"),
    ),
    (replace(GPU, wanted=8), "wanted", "problem", "2 usable GPUs, --gpus 8", "--gpus 2"),
    (replace(NO_GPU, wanted=1), "wanted", "problem", "0 usable GPUs", "CPU"),
    # kernels
    (
        replace(KERNELS, triton="3.4.0", fits=False),
        *("triton", "problem", "requires triton==3.6.0", 'pip install "triton==3.6.0"'),
    ),
    (replace(KERNELS, triton=None), "triton", "problem", "not installed", "pip install"),
    (replace(KERNELS, triton=None, num_gpus=0), "triton", "note", "not installed", "pip install"),
    (replace(KERNELS, compiler=None), "compiler", "problem", "no C compiler", "apt install gcc"),
    (replace(KERNELS, compiler=None, num_gpus=0), "compiler", "note", "no C compiler", "gcc"),
    (replace(KERNELS, compiler=None, asked="icc"), "compiler", "problem", "'icc'", "CC"),
    (replace(KERNELS, header=None), "compiler", "problem", "Python.h", "python3-dev"),
    (
        replace(KERNELS, cache=replace(FOLDER, trial=Trial(error="Read-only file system"))),
        *("cache", "problem", "Read-only", "TRITON_CACHE_DIR"),
    ),
    (
        replace(KERNELS, cache=replace(FOLDER, mount=replace(LOCAL, options=("rw", "noexec")))),
        *("cache", "problem", "noexec", "TRITON_CACHE_DIR"),
    ),
    (
        replace(KERNELS, cache=replace(FOLDER, free_bytes=10**8)),
        *("cache", "problem", "100.0 MB free", "space"),
    ),
    (
        replace(KERNELS, cache=replace(FOLDER, mount=NFS)),
        *("cache", "note", "network (nfs4)", "TRITON_CACHE_DIR"),
    ),
    (
        replace(KERNELS, launches={"cuda:0": "ptxas failed"}),
        *("launches", "problem", "ptxas failed", "Triton"),
    ),
    (
        replace(KERNELS, launches={}, launch_error="killed by signal 9"),
        *("launches", "problem", "signal 9", "Mend"),
    ),
    (
        replace(KERNELS, paths={"cuda:0": {"loss": "reference", "norm": "triton"}}),
        *("paths", "note", "reference: loss", "Mend Triton"),
    ),
    (replace(KERNELS, paths={}, paths_error="no torch"), "paths", "problem", "no torch", "torch"),
    # machine
    (replace(MACHINE, quota=2.5), "cores", "note", "the time of 2.5", "--workers 2"),
    (replace(MACHINE, cores=4), "cores", "note", "4 of the machine's 16", "taskset"),
    (replace(MACHINE, available_bytes=GIB // 2), "memory", "problem", "536.9 MB", "Stop"),
    (replace(MACHINE, available_bytes=2 * GIB), "memory", "note", "2.1 GB", "--workers"),
    (replace(MACHINE, memory_limit_bytes=GIB // 2), "memory", "problem", "container", "limit"),
    (replace(MACHINE, total_bytes=None), "memory", "note", "not known", "free -h"),
    (replace(MACHINE, shared_bytes=64 << 20), "shared_memory", "problem", "67.1 MB", "--shm-size"),
    (
        replace(MACHINE, shared_bytes=64 << 20, num_gpus=1),
        *("shared_memory", "note", "67.1 MB", "--shm-size"),
    ),
    (replace(MACHINE, shared_bytes=None), "shared_memory", "problem", "no /dev/shm", "tmpfs"),
    (replace(MACHINE, open_files=512), "limits", "note", "512 files", "ulimit -n 65536"),
    (replace(MACHINE, open_files=128), "limits", "problem", "128 files", "ulimit -n"),
    (replace(MACHINE, address_bytes=8 * GIB), "limits", "problem", "8.6 GB", "ulimit -v"),
    (replace(MACHINE, file_bytes=GIB), "limits", "note", "1.1 GB", "ulimit -f"),
    (replace(MACHINE, seconds=0.0), "clock", "problem", "1970-01-01", "Set the clock"),
    # variables
    (with_variable("OMP_NUM_THREADS", "1"), "threads", "note", "1 of 16", "unset OMP_NUM"),
    (with_variable("OMP_NUM_THREADS", "64"), "threads", "note", "on 16 cores", "unset"),
    (with_variable("MKL_NUM_THREADS", "two"), "threads", "note", "not a number", "unset MKL"),
    (with_variable("OMP_PROC_BIND", "true"), "rules", "note", "same cores", "unset OMP_PROC"),
    (with_variable("KMP_AFFINITY", "compact"), "rules", "note", "same cores", "unset KMP"),
    (with_variable("TRITON_INTERPRET", "1"), "rules", "problem", "in Python", "unset TRITON"),
    (
        replace(with_variable("TRITON_INTERPRET", "1"), gpu=False),
        *("rules", "note", "in Python", "unset TRITON"),
    ),
    (with_variable("CUDA_LAUNCH_BLOCKING", "1"), "rules", "problem", "wait", "unset CUDA"),
    (with_variable("PYTHONPATH", "/src"), "rules", "note", "/src", "unset PYTHONPATH"),
    # storage
    (in_folder(free_bytes=10**7), "space", "problem", "10.0 MB free", "Free some space"),
    (in_folder(free_bytes=2 * 10**9), "space", "note", "2.0 GB free", "Free some space"),
    (in_folder(free_files=3), "space", "problem", "3 more files", "Delete"),
    (
        in_folder(trial=Trial(error="Permission denied")),
        *("writing", "problem", "Permission denied", "permissions"),
    ),
    (
        in_folder(trial=Trial(lock_error="flock: Function not implemented")),
        *("writing", "problem", "cannot be locked", "-o flock"),
    ),
    (in_folder(trial=Trial(skew_seconds=-90.0)), "writing", "note", "-90.0 s", "chrony"),
    (in_folder(mount=NFS), "kind", "note", "SQLite", "one machine at a time"),
    (in_folder(mount=NFS, role="shards", trial=None), "kind", "note", "speed may vary", "local"),
    (in_folder(mount=replace(LOCAL, kind="tmpfs")), "kind", "note", "in memory", "disk"),
    (
        in_folder(speed=Speed(num_bytes=10**7, seconds=1.0, cached=False, source="a.bin")),
        *("speed", "note", "10.0 MB/s", "local SSD"),
    ),
    (in_folder(asked="/data/study/new"), "presence", "note", "does not exist", "Check the name"),
    (
        in_folder(asked="/gone", role="shards", trial=None),
        *("presence", "problem", "not in /gone", "study.toml"),
    ),
    (replace(STORAGE, study_error="study.toml: cut"), "presence", "problem", "cut", "Restore"),
)
