"""A text of your own, in UTF-8: one file, several files, or folders of .txt files.

The corpus is made in data/NAME; `--dataset=NAME` trains on it.

    python data/custom/prepare.py --input book.txt --name my_book
    python data/custom/prepare.py --input poe/ --name poe --tokenizer bpe:4096
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # so that it runs from a clone without being installed

from fradique.data.prepare import CorpusSpec, main  # noqa: E402

CORPUS = CorpusSpec(
    folder=FOLDER,
    description=__doc__,
    tokenizer="char",
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
