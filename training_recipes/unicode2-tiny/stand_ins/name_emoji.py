"""Copies emoji under a folder and writes their English names to captions.tsv.

python training_recipes/unicode2-tiny/stand_ins/name_emoji.py SOURCE TARGET
"""

import shutil
import sys
from pathlib import Path


def main(source: str, target: str) -> None:
    import emoji

    from transformers_unicode2.files import write_file

    rows = []
    Path(target).mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(source).rglob("*.webp")):
        points = path.stem.split("-")
        if all(len(point) >= 4 and set(point) <= set("0123456789abcdef") for point in points):
            character = "".join(chr(int(point, 16)) for point in points)
            entry = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA.get(character + "\ufe0f")
            if entry:
                shutil.copy(path, Path(target) / path.name)
                rows.append(f"{path.name}\t{entry['en'].strip(':').replace('_', ' ')}")
    write_file(Path(target, "captions.tsv"), ("\n".join(rows) + "\n").encode())
    print(f"{target}: {len(rows)} emoji")


if __name__ == "__main__":
    main(*sys.argv[1:])
