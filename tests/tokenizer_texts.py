"""Sample text and hypothesis strategies for the tokenizer tests."""

from hypothesis import settings
from hypothesis import strategies as st

SAMPLE = (
    "O Ramalhete, sombrio casarão de paredes severas — não é? 'Tis 42 naïve cats' tails...\r\n\t  日本語 🙂 x"
)
# All characters except lone surrogates, which UTF-8 cannot encode, and unassigned characters, which libraries
# classify differently.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
TEXTS = st.text(CHARACTERS, max_size=60) | st.text("ab é'.,\n\t 1s🙂\u00a0", max_size=60)
PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)
