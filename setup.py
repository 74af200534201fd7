import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
URL = "https://github.com/rq-draft-revise/rq_draft_revise"


def read_version() -> str:
    """Reads the version as text: importing the package here would need torch before it is installed."""
    source = (ROOT / "src" / "rq_draft_revise" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('src/rq_draft_revise/__init__.py has no line of the form __version__ = "1.2.3"')
    return match.group(1)


def read_description() -> str:
    """The README, whose links to files of the repository lead there from wherever it is shown."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^\]]*\])\((?!https?:|#)", rf"\1({URL}/raw/main/", text)
    return re.sub(r"(?<!\!)(\[[^\]]*\])\((?!https?:|#)", rf"\1({URL}/blob/main/", text)


extras = {
    "train": ["datasets", "tensorboard", "torchvision", "lpips", "peft", "matplotlib"],
    "eval": ["evaluate", "torch-fidelity>=0.4", "datasets", "torchvision", "lpips"],  # before 0.4 precision was recall
    # ruff lays out the signatures of the API pages; matplotlib draws the plots of the pages of results
    "docs": ["mkdocs-material", "mkdocstrings[python]", "ruff", "matplotlib"],
    # setuptools: the packaging test builds a wheel without the network, and Python 3.12 environments come without it.
    "test": [
        *("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "setuptools>=77"),
        *("datasets", "evaluate", "lpips", "peft", "tensorboard", "torch-fidelity>=0.4", "torchvision"),
        *("mkdocs-material", "mkdocstrings[python]", "matplotlib"),  # the strict build of the documentation is a test
    ],
}
extras["dev"] = [*extras["test"], "ruff"]

setup(
    name="rq_draft_revise",
    version=read_version(),
    description="Draft-and-Revise image generation with Contextual RQ-Transformer, as a diffusers pipeline",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    author="The rq_draft_revise contributors",
    url=URL,
    project_urls={"Source": URL, "Issues": f"{URL}/issues", "Paper": "https://arxiv.org/abs/2206.04452"},
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="image generation, diffusers, residual quantization, rq-vae, masked transformer, text-to-image",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"rq_draft_revise": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.8",
        "diffusers>=0.40",
        "transformers>=4.57",
        "accelerate>=1.6",  # the first that knows FSDP2's settings
        "huggingface_hub",
        "safetensors",
        "numpy",
        "pillow>=10.1",  # the first with a scalable default font, which the contact sheets are labelled in
        "tqdm",
    ],
    extras_require=extras,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
