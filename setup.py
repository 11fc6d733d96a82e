"""Packaging. Lower bounds are here, the tested set is in constraints.txt, tool settings in pyproject.toml.

A wheel carries the package, its assets, configs/ and data_recipes/ (so that an installed package needs no
clone) and, where a C++ compiler is found, the compiled CPU kernels; where nvcc and a GPU are found, or
LONGLLAVA_CUDA=1 is set, the CUDA kernels too. Without them the wheel is pure Python: everything works, slower. torch is
not needed to build.
"""

import importlib.util
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
LIBRARIES = "lib/liblongllava_*.so"
SHIPPED = ("configs", "data_recipes")

CORE = [
    "torch>=2.6",
    "transformers>=5.6",
    "numpy>=1.26",
    "pillow>=11",
    "safetensors>=0.4.3",
    "tokenizers>=0.22.1",
    "huggingface-hub>=1.5",
    "einops>=0.8",
    "pyyaml>=6",
    "jinja2>=3.1",
    "typer>=0.26",
    "rich>=13.8",
    "tqdm>=4.66.3",
    "matplotlib>=3.8",
]
TRAIN = ["accelerate>=1.3", "datasets>=3.6", "peft>=0.19.1", "tensorboard>=2.16.2"]
TEST = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "psutil>=5.9"]
DEV = [*TEST, "ruff>=0.9", "mypy>=1.13", "build>=1.2"]
EXTRAS = {
    "train": TRAIN,
    "deepspeed": [*TRAIN, "deepspeed>=0.19"],
    "video": ["av>=14.2"],
    "cuda": ["triton>=3.6", "mamba-ssm>=2.2", "causal-conv1d>=1.4"],
    "openclip": ["open_clip_torch>=2.30"],
    "dev": DEV,
}


def version() -> str:
    text = (HERE / "longllava/version.py").read_text("utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)[1]


def compile_libraries(folder: Path) -> None:
    """Build the kernels into `folder`; where that cannot be done, say so in one sentence and go on."""
    spec = importlib.util.spec_from_file_location("longllava_csrc_build", HERE / "csrc/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    builds = [("C++", module.build, "plain torch stands in, slower")]
    if module.wants_cuda():
        builds.append(("CUDA", module.build_cuda, "Triton's stand in"))
    for kind, build, instead in builds:
        try:
            build(folder)
        except (OSError, RuntimeError) as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"longllava: the {kind} kernels were not built ({first_line}); {instead}.")


class BuildPy(build_py):
    def run(self) -> None:
        package = HERE / "longllava" if self.editable_mode else Path(self.build_lib) / "longllava"
        if not self.editable_mode:  # a file deleted from the sources must not live on in build/
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for kind in SHIPPED:
                shutil.copytree(HERE / kind, package / kind)
        compile_libraries(package / "lib")


class BdistWheel(bdist_wheel):
    """py3-none-any, or py3-none-PLATFORM with the library in: it speaks C, one build serves every Python."""

    def run(self) -> None:
        self.run_command("build")
        package = Path(self.get_finalized_command("build_py").build_lib) / "longllava"
        self.root_is_pure = not any(package.glob(LIBRARIES))
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    name="longllava",
    version=version(),
    description="Multimodal language models that look at a thousand images at once on one device",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    packages=find_packages(include=["longllava", "longllava.*"]),
    package_data={"longllava": ["assets/**", "py.typed"]},
    include_package_data=False,
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["longllava = longllava.cli:main"]},
    cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
)
