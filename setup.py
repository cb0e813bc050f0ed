"""The compiled engine of the data path, where there is a C compiler; without one there is none.

All else is in pyproject.toml. One build is for every CPython from 3.11 on (the stable ABI), and
`nbd-bridge --version` says which engine an installation has.
"""

from setuptools import Extension, setup

_NATIVE = "bridge/datapath/native"
_SOURCES = ("core", "turns", "sends", "module", "turns_module")

setup(
    ext_modules=[
        Extension(
            "bridge.datapath._native",
            sources=[f"{_NATIVE}/{name}.c" for name in _SOURCES],
            depends=[f"{_NATIVE}/{name}.h" for name in ("core", "turns", "module")],
            define_macros=[("_GNU_SOURCE", None)],
            extra_compile_args=["-std=c99", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
