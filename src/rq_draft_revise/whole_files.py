"""Files and folders that are there whole or not at all: written under another name and renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Where to write `path`. It gets its name when the block ends well, and goes away when it does not.

    Until then what had the name before is there.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(output_dir: str | Path) -> Iterator[Path]:
    """A new folder that becomes `output_dir` when the block ends well, and goes away when it does not.

    Raises:
        `ValueError`: `output_dir` exists and is not an empty folder.
    """
    final = Path(output_dir).resolve()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"`output_dir` must not exist or be an empty folder, got {str(output_dir)!r}.")
    aside = final.with_name(final.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)  # of one that was killed
    aside.mkdir(parents=True)
    try:
        yield aside
        if final.exists():
            final.rmdir()
        aside.rename(final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
