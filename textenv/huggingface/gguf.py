"""GGUF files, the format of llama.cpp, in the place of a model's name: "folder/file.gguf"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from textenv.checks.extras import check_extra

SUFFIX = ".gguf"
MAGIC = b"GGUF"  # the first bytes of every such file
FILE = "gguf_file"  # the argument of transformers' `from_pretrained` that names a file inside its folder or repository


def is_gguf(name: str | PathLike[str]) -> bool:
    """Return whether a name ends in ".gguf" and is not that of a folder; the file need not exist.

    Example:
        >>> is_gguf("models/small.gguf"), is_gguf("models")
        (True, False)
    """
    return fspath(name).endswith(SUFFIX) and not Path(name).is_dir()


def check_gguf(name: str | PathLike[str]) -> None:
    """Check that the packages that read GGUF files are installed, and that a name is the path of such a file.

    Raises:
        MissingExtraError: If `gguf` or `accelerate` is missing, both of which the extra `gguf` brings.
        ValueError: If there is no such file, or it does not begin as GGUF files do.
    """
    check_packages(name)
    file = Path(name)
    if not file.is_file():
        raise ValueError(
            f"Expected the path of a GGUF file, got {fspath(name)!r}: there is no such file. For one on the hub, "
            'Pretrained("owner/model", gguf_file="file.gguf") downloads it.'
        )
    with file.open("rb") as opened:
        start = opened.read(len(MAGIC))
    if start != MAGIC:
        raise ValueError(
            f"Expected a GGUF file, which begins with {MAGIC!r}, got {fspath(name)!r}, which begins with {start!r}: "
            "is it a download that failed, or a file of another format?"
        )


def check_packages(name: str | PathLike[str]) -> None:
    """Raise MissingExtraError if a package is missing with which transformers reads GGUF files."""
    # transformers' `modeling_gguf_pytorch_utils.load_gguf_checkpoint` needs gguf, and `from_pretrained` of a model
    # accelerate.
    check_extra("gguf", "gguf", f"the GGUF file {fspath(name)}")
    check_extra("gguf", "accelerate", f"the GGUF file {fspath(name)}")


def located(name: str | PathLike[str], arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the other arguments for transformers' `from_pretrained`, which takes a file as `gguf_file`.

    Args:
        name: A folder, a name on the hub, or the path of a GGUF file.
        arguments: The other arguments of `from_pretrained`.

    Raises:
        MissingExtraError: As `check_gguf`.
        ValueError: As `check_gguf`.
    """
    if is_gguf(name):
        check_gguf(name)
        return str(Path(name).parent), {**arguments, FILE: Path(name).name}
    if arguments.get(FILE) is not None:
        check_packages(arguments[FILE])
    return fspath(name), arguments


def as_floats() -> dict[str, Any]:
    """Return the arguments with which transformers unpacks all weights of a GGUF file, as if they had been floats.

    Otherwise versions with a `GgufConfig` keep a quantiser at the model (`quantizers.base.HfQuantizer.
    postprocess_model`), also where all weights were unpacked, and `save_pretrained` refuses the model. Where the
    package `kernels` is installed, they keep weights in blocks that cannot be trained. Versions without a `GgufConfig`
    always unpack.
    """
    import transformers  # here, since `import textenv` loads gymnasium and numpy only

    config_class = getattr(transformers, "GgufConfig", None)
    return {} if config_class is None else {"quantization_config": config_class(dequantize=True)}


@contextmanager
def readable_gguf(name: str | PathLike[str], file: str) -> Iterator[None]:
    """Turn transformers' errors on a GGUF file that it does not read into a ValueError that names the file.

    The bar of unpacking shows or not as transformers' other bars do (`transformers.utils.logging`).

    Args:
        name: The folder, or the name on the hub.
        file: The file.
    """
    from transformers import modeling_gguf_pytorch_utils as reader  # here, as above
    from transformers.utils import logging

    # `load_gguf_checkpoint` takes its bar from tqdm itself, which does not know of `disable_progress_bar`.
    bar, reader.tqdm = reader.tqdm, logging.tqdm
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # struct.error, KeyError, ...: transformers' readers do not check what they read
        if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
            raise  # torch's, such as one for too little memory
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"Expected a GGUF file that transformers reads, got {str(Path(name) / file)!r}: {type(error).__name__}: "
            f"{reason}. Is it cut short, or of an architecture or a quantisation that transformers does not read? Then "
            "take the Hugging Face folder of the model."
        ) from error
    finally:
        reader.tqdm = bar
