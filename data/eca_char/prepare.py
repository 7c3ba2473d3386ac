"""Eça de Queiroz (1845-1900), 21 works, character by character: 9.8 MB of Portuguese.

The texts are in the public domain. They are downloaded once, checked, and kept in raw/.

    python data/eca_char/prepare.py
    python data/eca_char/prepare.py --input FOLDER   # with the 21 files, for work without a network
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # so that it runs from a fresh clone, without an installation

from fradique.data.prepare import CorpusSpec, main  # noqa: E402
from fradique.data.sources import ECA, download_text  # noqa: E402

CORPUS = CorpusSpec(
    folder=FOLDER,
    about=__doc__,
    tokenizer="char",
    text=download_text(ECA),
    then="python train.py config/train_eca_char.py",
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
