"""Eça de Queiroz (1845-1900): 21 works, 9.8 MB of Portuguese, with a byte-level BPE trained on them.

The texts are in the public domain. They are downloaded once, verified, and kept in raw/.

    python data/eca/prepare.py

    # without a network, from a folder with the 21 files
    python data/eca/prepare.py --input FOLDER
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # so that it runs from a clone without being installed

from fradique.data.prepare import CorpusSpec, main  # noqa: E402
from fradique.data.sources import ECA, download_text  # noqa: E402

# 4,096 tokens: 3.2 characters per token on the validation split. 8,192 would give 3.6, but would double the
# embedding (to 3.1M parameters at n_embd=384, a third of a 6-layer model) and halve the examples per token.
CORPUS = CorpusSpec(
    folder=FOLDER,
    description=__doc__,
    tokenizer="bpe:4096",
    text=download_text(ECA),
    gpu_command="python train.py config/train_eca.py",
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
