"""A text of your own: one file, several, or folders of .txt files, in UTF-8.

The corpus goes into data/NAME, and `--dataset=NAME` trains on it.

    python data/custom/prepare.py --input book.txt --name my_book
    python data/custom/prepare.py --input books/ --tokenizer bpe:4096 --name my_books
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # so that it runs from a fresh clone, without an installation

from fradique.data.prepare import CorpusSpec, main  # noqa: E402

CORPUS = CorpusSpec(
    folder=FOLDER,
    about=__doc__,
    tokenizer="char",
    then="python train.py config/train_python_char.py --dataset={name} --out_dir=out/{name}",
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
