"""The standard library of the Python that runs this: up to 8 MB of source code, tokenized by character.

Nothing is downloaded. Only plain ASCII files are used, so that the vocabulary is 96 characters, in an order
that depends only on their names. Another Python version gives another text. The licence is Python's (PSF).

    python data/python_char/prepare.py
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # so that it runs from a clone without being installed

from fradique.data.prepare import CorpusSpec, main  # noqa: E402
from fradique.data.sources import python_library  # noqa: E402

CORPUS = CorpusSpec(
    folder=FOLDER,
    description=__doc__,
    tokenizer="char",
    text=python_library,
    val_fraction=0.02,  # 160,000 characters: the files are in random order, so that few of them are enough
    next_command="python train.py config/train_python_char.py",
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
