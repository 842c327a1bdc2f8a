"""The C++ part of the build; everything else is in pyproject.toml.

Enters: csrc/. Leaves: the extension `regmix._sampler`. Without a C++ compiler the package installs
with a warning and Numba serves; REGMIX_REQUIRE_NATIVE=1 makes that an error.
"""

import os

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "regmix._sampler",
            ["csrc/bindings.cpp"],
            # without these the sdist loses the headers
            depends=[
                "csrc/isa.hpp",
                "csrc/order.hpp",
                "csrc/check.hpp",
                "csrc/gather.hpp",
                "csrc/ring.hpp",
                "csrc/third_party/xxhash.h",
            ],
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=[] if os.name == "nt" else ["-O3", "-pthread"],
            optional=os.environ.get("REGMIX_REQUIRE_NATIVE") != "1",
        )
    ]
)
