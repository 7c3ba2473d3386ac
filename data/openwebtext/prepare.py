"""OpenWebText, an open copy of the pages that GPT-2 was trained on: 8 million documents, with GPT-2's BPE.

The collection is under CC0; the pages belong to their authors. Its 40 GB are streamed from the Hugging Face
hub and become about 9 billion tokens (18 GB on disk) in a few hours.

    python data/openwebtext/prepare.py

    # a trial
    python data/openwebtext/prepare.py --max_documents 20000 --val_fraction 0.01

    # the fourth of 16 machines
    python data/openwebtext/prepare.py --shards 64 --worker 3/16

    # from .parquet, .jsonl, .jsonl.gz or .txt files
    python data/openwebtext/prepare.py --input FOLDER
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # so that it runs from a clone without being installed

from fradique.data.documents import hub_documents, hub_files  # noqa: E402
from fradique.data.prepare import CorpusSpec, main  # noqa: E402
from fradique.data.sources import OPENWEBTEXT  # noqa: E402

CORPUS = CorpusSpec(
    folder=FOLDER,
    description=__doc__,
    tokenizer="gpt2",
    val_fraction=0.0005,
    documents=lambda: hub_documents(OPENWEBTEXT),
    document_files=lambda: hub_files(OPENWEBTEXT),
    gpu_command="torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py",
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
