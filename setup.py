"""The parts that pyproject.toml cannot say: where the packages lie, and the C++ library."""

from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

# Folders at the root that are packages of qformat: converters/ is qformat.converters when imported.
FOLDERS = ["converters", "runtime", "kernels", "spec", "examples"]
DATA = {
    "qformat": ["py.typed"],
    "qformat.spec": ["*.md", "*.json", "codecs/*.md", "tables/*", "vectors/**/*"],
    "qformat.examples": ["heldout.txt"],
}


class BuildExt(build_ext):
    """Compiles the sources side by side."""

    def build_extensions(self):
        compile_all = self.compiler.compile

        def compile_each(sources, **options):
            with ThreadPoolExecutor() as pool:
                return sum(pool.map(lambda source: compile_all([source], **options), sources), [])

        self.compiler.compile = compile_each
        super().build_extensions()


inside = find_namespace_packages(include=["converters*", "runtime*", "kernels*"], exclude=["*__pycache__*"])
native = Extension(
    "qformat.kernels._native",
    sources=sorted(glob("kernels/cpu/*.cpp")),
    depends=sorted(glob("kernels/cpu/*.h")),
    extra_compile_args="-O3 -g0 -std=c++17 -fvisibility=hidden -pthread -ffp-contract=off -Wno-psabi".split(),
    extra_link_args=["-pthread"],
    language="c++",
    py_limited_api=True,  # links no Python at all: one build serves every version
    optional=True,  # without it everything still works, slower
)
setup(
    packages=[
        *find_namespace_packages(include=["qformat*"], exclude=["*__pycache__*"]),
        *(f"qformat.{name}" for name in [*inside, "spec", "examples"]),
    ],
    package_dir={f"qformat.{name}": name for name in FOLDERS},
    package_data=DATA,
    ext_modules=[native] if native.sources else [],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
