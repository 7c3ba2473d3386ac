"""James Baldwin, A Story of the Golden Age (1887): 0.4 MB of English, tokenized by character.

The text is in the public domain. It is downloaded once, verified, and kept in raw/. The validation split is
taken from the whole book, because its end is a glossary.

    python data/golden_age_char/prepare.py

    # without a network
    python data/golden_age_char/prepare.py --input FILE
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # so that it runs from a clone without being installed

from fradique.data.prepare import CorpusSpec, main  # noqa: E402
from fradique.data.sources import GOLDEN_AGE, download_text  # noqa: E402

CORPUS = CorpusSpec(
    folder=FOLDER,
    description=__doc__,
    tokenizer="char",
    text=download_text(GOLDEN_AGE),
    val_split="blocks",  # the last tenth of the book is a glossary
    next_command="python train.py config/train_golden_age_baby.py",
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
