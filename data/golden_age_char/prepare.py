"""James Baldwin, A Story of the Golden Age (1887), character by character: 0.4 MB of English.

The text is in the public domain. It is downloaded once, checked, and kept in raw/.

    python data/golden_age_char/prepare.py
    python data/golden_age_char/prepare.py --input FILE   # for work without a network
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # so that it runs from a fresh clone, without an installation

from fradique.data.prepare import CorpusSpec, main  # noqa: E402
from fradique.data.sources import GOLDEN_AGE, download_text  # noqa: E402

CORPUS = CorpusSpec(
    folder=FOLDER,
    about=__doc__,
    tokenizer="char",
    text=download_text(GOLDEN_AGE),
    then="python train.py config/train_golden_age_baby.py",
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
