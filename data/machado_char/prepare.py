"""Machado de Assis (1839-1908): his short stories, 1.8 MB of Portuguese, tokenized by character.

The text is in the public domain. It is downloaded once, verified, and kept in raw/.

    python data/machado_char/prepare.py

    # without a network
    python data/machado_char/prepare.py --input FILE
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # so that it runs from a clone without being installed

from fradique.data.prepare import CorpusSpec, main  # noqa: E402
from fradique.data.sources import MACHADO_TALES, download_text  # noqa: E402

CORPUS = CorpusSpec(
    folder=FOLDER,
    description=__doc__,
    tokenizer="char",
    text=download_text(MACHADO_TALES),
    next_command="python train.py config/train_machado_char_cpu.py",
    gpu_command="python train.py config/train_machado_char.py",
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
