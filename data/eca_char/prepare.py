"""Eça de Queiroz (1845-1900): 21 works, 9.8 MB of Portuguese, tokenized by character.

The texts are in the public domain. They are downloaded once, verified, and kept in raw/.

    python data/eca_char/prepare.py

    # without a network, from a folder with the 21 files
    python data/eca_char/prepare.py --input FOLDER
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # so that it runs from a clone without being installed

from fradique.data.prepare import CorpusSpec, main  # noqa: E402
from fradique.data.sources import ECA, download_text  # noqa: E402

CORPUS = CorpusSpec(
    folder=FOLDER,
    description=__doc__,
    tokenizer="char",
    text=download_text(ECA),
    gpu_command="python train.py config/train_eca_char.py",
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
