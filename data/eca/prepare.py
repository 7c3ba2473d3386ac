"""Eça de Queiroz (1845-1900), 21 works, with a byte-level BPE of their own: 9.8 MB of Portuguese.

The texts are in the public domain. They are downloaded once, checked, and kept in raw/.

    python data/eca/prepare.py
    python data/eca/prepare.py --input FOLDER   # with the 21 files, for work without a network
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # so that it runs from a fresh clone, without an installation

from fradique.data.prepare import CorpusSpec, main  # noqa: E402
from fradique.data.sources import ECA, download_text  # noqa: E402

# 4,096 tokens: 3.2 characters a token on the validation split. 8,192 would give 3.6, and take twice the
# embedding (3.1M parameters at 384 wide, a third of a 6-layer model) with half the examples of each token.
CORPUS = CorpusSpec(
    folder=FOLDER,
    about=__doc__,
    tokenizer="bpe:4096",
    text=download_text(ECA),
    then="python train.py config/train_eca.py",
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
