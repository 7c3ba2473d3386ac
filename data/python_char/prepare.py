"""The standard library of the Python that runs this, character by character: up to 8 MB of source code.

Nothing is downloaded. Only files of plain ASCII are taken, so that the vocabulary is 96 characters, in an
order that follows from their names alone. Another Python gives another text. The licence is Python's (PSF).

    python data/python_char/prepare.py
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # so that it runs from a fresh clone, without an installation

from fradique.data.prepare import CorpusSpec, main  # noqa: E402
from fradique.data.sources import python_library  # noqa: E402

CORPUS = CorpusSpec(
    folder=FOLDER,
    about=__doc__,
    tokenizer="char",
    text=python_library,
    then="python train.py config/train_python_char.py",
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
