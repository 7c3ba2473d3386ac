"""Shakespeare, the tinyshakespeare selection of Andrej Karpathy's char-rnn: 1.1 MB, with GPT-2's BPE.

The text is in the public domain. It is downloaded once, verified, and kept in raw/.
The tokens are those of nanoGPT's data/shakespeare.

    python data/shakespeare/prepare.py

    # without a network
    python data/shakespeare/prepare.py --input FILE
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # so that it runs from a clone without being installed

from fradique.data.prepare import CorpusSpec, main  # noqa: E402
from fradique.data.sources import SHAKESPEARE, download_text  # noqa: E402

CORPUS = CorpusSpec(
    folder=FOLDER,
    description=__doc__,
    tokenizer="gpt2",
    text=download_text(SHAKESPEARE),
    gpu_command="python train.py config/finetune_shakespeare.py",
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
