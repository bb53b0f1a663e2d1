"""Write the texts of the quality table: Python's own language reference, of the standard library's `pydoc_data`.

    python tests/bench/eval_text.py FOLDER

FOLDER/eval.txt has the first half of its topics by name, FOLDER/calibrate.txt how each of the others begins. The text
is that of the running Python, so figures are to be compared with those of the same version only. It is under the PSF
licence and not in this repository.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
from pathlib import Path
from pydoc_data.topics import topics

BEGINNING = 500  # characters of a topic: some 4,000 tokens in all, so that calibration takes minutes


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(topics)
    half = len(names) // 2
    texts = [topics[name] for name in names[:half]], [topics[name][:BEGINNING] for name in names[half:]]
    for file, part in zip(("eval.txt", "calibrate.txt"), texts, strict=True):
        text = "\n\n".join(part)
        (folder / file).write_text(text, encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()
        print(f"{folder / file}: {len(text)} characters of Python {platform.python_version()}, sha256 {digest}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write an evaluation text and a calibration text")
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
